//! One packet on its way through the rules. Pure.

use std::sync::Arc;

use super::{CONNTRACK, Certainty, Counts, DEPTH, Hit, LimitAt, NAT_DST, Played, Player, set_of};
use crate::firewall::Family;
use crate::firewall::packet::{Interface, Packet};
use crate::firewall::rule::{Adding, Chain, Counting, Outcome, Rule, Step, Test, Threshold};
use crate::firewall::set::{self, Element, Found, Set};
use crate::firewall::value::{Answer, Bits, Field, Operand};
use crate::nftables::Hook;

/// How a chain was left, of the packets that entered it.
#[derive(Clone, Copy, Debug)]
struct Left {
    /// Out of the base chain.
    base: Answer,
    /// Back to the calling chain, before the end.
    back: Answer,
    /// Every packet that came to some rule was dropped there.
    is_dead_end: bool,
    /// Every packet that came to some rule left there.
    is_gone: bool,
}

impl Left {
    const NOWHERE: Self =
        Self { base: Answer::No, back: Answer::No, is_dead_end: false, is_gone: false };

    /// Out of the base chain, of the packets that came to a rule. Others may have gone back before.
    fn out(&mut self, surely: Answer) {
        self.is_gone |= surely == Answer::Yes;
        let of_all = if self.back == Answer::No { surely } else { surely.and(Answer::Unknown) };
        self.base = self.base.max(of_all);
    }

    /// How surely a packet is still there.
    fn here(self) -> Answer {
        match self.base.max(self.back) {
            _ if self.is_dead_end || self.is_gone => Answer::No,
            Answer::No => Answer::Yes,
            Answer::Yes => Answer::No,
            other => other,
        }
    }
}

/// One packet on its way.
pub(super) struct Run<'p, 'r, 's, 'e> {
    pub(super) player: &'p Player<'r>,
    pub(super) packet: Packet<'s>,
    pub(super) played: Played,
    /// Whether it is dropped.
    pub(super) dead: Answer,
    /// Sets that it has been put into.
    pub(super) added: Vec<Arc<Set>>,
    /// SYNPROXY has opened the connection in the client's name.
    pub(super) is_proxys: bool,
    /// SYNPROXY has just taken it.
    pub(super) is_stolen: bool,
    pub(super) steps: usize,
    /// The limit that it is taken to come to: no rate in another rule before is for it.
    pub(super) comes_to: Option<LimitAt>,
    pub(super) exceeded: &'e mut dyn FnMut(&Hit) -> Option<bool>,
}

impl<'r> Run<'_, 'r, '_, '_> {
    pub(super) fn way(&mut self, bases: &[usize]) {
        for at in bases {
            if self.dead == Answer::Yes || self.is_stolen {
                return;
            }
            let Some(chain) = self.player.ruleset.chains.get(*at) else { continue };
            let Some(base) = &chain.base else { continue };
            let wrong = if self.packet.syn().is_forwarded { Hook::Input } else { Hook::Forward };
            if base.hook == wrong || !chain.family.covers(self.packet.syn().source.is_ipv4()) {
                continue;
            }
            let early = matches!(base.hook, Hook::Prerouting | Hook::Ingress);
            let priority = if base.is_nat { NAT_DST } else { base.priority };
            let is_before = |other| early && (base.hook == Hook::Ingress || priority < other);
            self.packet.is_seen = !is_before(CONNTRACK);
            self.packet.is_translated = !is_before(NAT_DST + 1);
            if base.is_nat && self.packet.is_tracked == Some(false) {
                continue;
            }
            let entered = self.of_device(chain.family, base.hook, &base.devices);
            if entered == Answer::No {
                continue;
            }
            let left = self.chain(*at, chain, entered, 0);
            if self.is_stolen {
                return;
            }
            let drops = if base.drops { entered.and(ended(left)) } else { Answer::No };
            self.die(drops);
        }
    }

    /// Whether the packet comes in by one of the devices of an ingress chain.
    fn of_device(&self, family: Family, hook: Hook, devices: &[String]) -> Answer {
        if family != Family::Netdev && hook != Hook::Ingress {
            return Answer::Yes;
        }
        match &self.packet.syn().interface {
            Interface::Known(name, _) => devices.iter().any(|device| device == name).into(),
            _ if devices.is_empty() => Answer::No,
            _ => Answer::Unknown,
        }
    }

    fn die(&mut self, surely: Answer) {
        self.dead = self.dead.max(surely);
    }

    /// `reach` is how surely the packet enters the chain.
    fn chain(&mut self, at: usize, chain: &'r Chain, reach: Answer, depth: usize) -> Left {
        let mut left = Left::NOWHERE;
        if depth > DEPTH {
            return left;
        }
        for (index, rule) in chain.rules.iter().enumerate() {
            let here = left.here();
            let Some(steps) = self.steps.checked_sub(1) else { return left };
            self.steps = steps;
            if here == Answer::No || self.dead == Answer::Yes || self.is_stolen {
                return left;
            }
            let reach = reach.and(here);
            for (surely, outcome) in self.rule(at, index, rule, reach) {
                self.outcome(chain, reach, surely, &outcome, depth, &mut left);
            }
        }
        left
    }

    fn outcome(
        &mut self,
        chain: &'r Chain,
        reach: Answer,
        surely: Answer,
        outcome: &Outcome,
        depth: usize,
        left: &mut Left,
    ) {
        match outcome {
            Outcome::Continue => {}
            Outcome::Accept => left.out(surely),
            Outcome::Return => left.back = left.back.max(surely),
            Outcome::Drop | Outcome::Reject | Outcome::Reset => {
                self.die(reach.and(surely));
                left.is_dead_end |= surely == Answer::Yes;
            }
            Outcome::Queue => {
                self.die(Answer::Unknown);
                left.out(surely);
            }
            Outcome::Synproxy => {
                left.out(surely);
                self.synproxy(surely);
            }
            Outcome::Jump(name) | Outcome::Goto(name) => {
                let Some(at) = self.player.target(chain, name) else { return };
                let Some(next) = self.player.ruleset.chains.get(at) else { return };
                let inside = self.chain(at, next, reach.and(surely), depth + 1);
                left.out(inside.base.and(surely));
                // Who was sent back before that end goes on here.
                let is_end = inside.is_dead_end && inside.back == Answer::No;
                left.is_dead_end |= is_end && surely == Answer::Yes;
                if matches!(outcome, Outcome::Goto(_)) {
                    left.back = left.back.max(surely);
                }
            }
        }
    }

    /// The proxy answers; when the client has answered it in turn, it opens the connection itself,
    /// by a SYN that is tracked.
    fn synproxy(&mut self, surely: Answer) {
        self.played.is_synproxied = true;
        self.is_stolen = surely == Answer::Yes && !self.is_proxys;
    }

    /// What a rule makes of the packet: each outcome, and how surely, given that it comes there.
    fn rule(
        &mut self,
        chain: usize,
        index: usize,
        rule: &Rule,
        reach: Answer,
    ) -> Vec<(Answer, Outcome)> {
        let mut passed = Answer::Yes;
        for (number, step) in rule.steps.iter().enumerate() {
            let at = LimitAt { chain, rule: index, step: number };
            // Without an entry there is nothing to read, and the rule ends (`nft_ct_get_eval()`).
            passed = passed.and(self.has_entry(step.operands()));
            if passed == Answer::No {
                return Vec::new();
            }
            let answer = match step {
                Step::Test(Test::In { values, set, is }) => {
                    let found = set.find(values, &self.packet);
                    let mut answer = self.is_unchanged(set, found.answer);
                    // An element that must not be there is not asked any further.
                    if *is && let Some(element) = found.element {
                        answer =
                            answer.and(self.of_element(at, element, values, reach.and(passed)));
                    }
                    answer.not_if(!is)
                }
                Step::Test(test) => self.test(at, test),
                Step::Count(Counting { limit, by }) => {
                    let group = self.group(by);
                    // xt's, which always has a key, keeps a list for each zone (`connlimit_mt()`).
                    let of_zone = |key: Vec<u8>| {
                        let zone = self.packet.zone?;
                        Some([&key[..], &zone.to_be_bytes()].concat())
                    };
                    let group = if by.is_empty() { group } else { group.and_then(of_zone) };
                    self.meet(at, *limit, group, reach.and(passed))
                }
                Step::Add(adding) => self.add(at, adding, reach.and(passed)),
                Step::Remove(set) => {
                    self.added.push(Arc::clone(set));
                    Answer::Yes
                }
                Step::Map(values, set) => return self.map(at, values, set, reach, passed),
                Step::SetMark(value) => {
                    let bits = self.set_to(value.as_ref(), reach.and(passed));
                    self.packet.mark = bits;
                    Answer::Yes
                }
                Step::SetCtMark(value) => {
                    let surely = reach.and(passed).and(self.is_in_conntrack());
                    if surely != Answer::No {
                        self.packet.ct_mark = self.set_to(value.as_ref(), surely);
                    }
                    Answer::Yes
                }
                Step::Write(bytes) => {
                    self.packet.written.push((bytes.field, bytes.length));
                    Answer::Yes
                }
                Step::SetZone(zone) => {
                    self.set_zone(*zone, reach.and(passed));
                    Answer::Yes
                }
                Step::Notrack => {
                    self.notrack(chain, index, reach.and(passed));
                    Answer::Yes
                }
                Step::Log | Step::Note(_) | Step::Leads(_) => Answer::Yes,
                Step::Verdict(outcome) => return vec![(passed, outcome.clone())],
            };
            passed = passed.and(answer);
            if passed == Answer::No {
                return Vec::new();
            }
        }
        Vec::new()
    }

    /// Whether the packet has an entry by now.
    fn is_in_conntrack(&self) -> Answer {
        match self.packet.is_tracked {
            Some(is) => Answer::from(is && self.packet.is_seen),
            None if self.packet.is_seen => Answer::Unknown,
            None => Answer::No,
        }
    }

    /// Whether the packet has the entry that these are read from, if any of them is.
    fn has_entry(&self, values: &[Operand]) -> Answer {
        // An address of the other family is none of the entry (`nft_ct_get_eval()`).
        let own = if self.packet.syn().source.is_ipv4() { 4 } else { 16 };
        let is_others = |value: &Operand| {
            matches!(value.field, Field::CtSource(_) | Field::CtDestination(_))
                && value.length != own
        };
        if !values.iter().any(|value| value.field.is_of_entry()) {
            return Answer::Yes;
        }
        if values.iter().any(is_others) { Answer::No } else { self.is_in_conntrack() }
    }

    /// A set that the packet itself has been put into, or taken out of, may answer otherwise than when it was
    /// read.
    fn is_unchanged(&self, set: &Arc<Set>, answer: Answer) -> Answer {
        let is_changed = self.added.iter().any(|added| {
            Arc::ptr_eq(added, set)
                || !set.name.is_empty() && added.handle == set.handle && added.name == set.name
        });
        if is_changed { Answer::Unknown } else { answer }
    }

    fn test(&self, at: LimitAt, test: &Test) -> Answer {
        match test {
            Test::Within { value, from, to, is } => {
                let (Some(low), Some(high)) = (from.value(), to.value()) else {
                    return Answer::Unknown;
                };
                let bits = value.of(&self.packet).first(from.length());
                let answer = bits.is_within(low, high);
                let of_lo = || {
                    let pieces = std::slice::from_ref(value);
                    let key = from.bytes().unwrap_or_default();
                    from == to
                        && set::is_not_loopback(pieces, &self.packet)
                        && set::is_lo(pieces, &key)
                };
                if answer == Answer::Unknown && of_lo() {
                    return Answer::No.not_if(!is);
                }
                answer.not_if(!is)
            }
            Test::In { values, set, is } => set.find(values, &self.packet).answer.not_if(!is),
            Test::Unclear(_) => Answer::Unknown,
            Test::Rate(_) => self.rate(at),
            Test::Never => Answer::No,
        }
    }

    /// Whether a rate is for it.
    fn rate(&self, at: LimitAt) -> Answer {
        let is_before = |to: LimitAt| (to.chain, to.rule) != (at.chain, at.rule);
        if self.comes_to.is_some_and(is_before) { Answer::No } else { Answer::Sometimes }
    }

    fn list(&self, at: LimitAt) -> LimitAt {
        let rule = self.player.ruleset.chains.get(at.chain).and_then(|c| c.rules.get(at.rule));
        let set = rule.and_then(|rule| rule.steps.get(at.step)).and_then(set_of);
        set.and_then(|set| self.player.lists.get(&Arc::as_ptr(set))).copied().unwrap_or(at)
    }

    /// What is counted together with the packet; `None` where that is unknown.
    fn group(&self, by: &[Operand]) -> Option<Vec<u8>> {
        let values: Vec<Bits> = by.iter().map(|value| value.of(&self.packet)).collect();
        if by.is_empty() { Some(Vec::new()) } else { set::key(&values) }
    }

    fn count(&mut self, at: LimitAt, counting: &Counting, reach: Answer) -> Answer {
        let group = self.group(&counting.by);
        self.meet(at, counting.limit, group, reach)
    }

    /// The answer of an element's own limit.
    fn of_element(
        &mut self,
        at: LimitAt,
        element: &Element,
        values: &[Operand],
        reach: Answer,
    ) -> Answer {
        let Some(limit) = element.limit else { return Answer::Yes };
        let group = element.of_several().or_else(|| self.group(values));
        self.meet(at, limit, group, reach)
    }

    /// The limit's answer: whether the rule goes on.
    fn meet(
        &mut self,
        at: LimitAt,
        limit: Threshold,
        group: Option<Vec<u8>>,
        reach: Answer,
    ) -> Answer {
        let tracked = match self.packet.is_tracked {
            // By its tuple, also of a SYN that is not tracked (`xt_connlimit`, `nft_connlimit_do_eval()`).
            _ if self.packet.syn().is_taken_up => Answer::Yes,
            Some(true) => Answer::Yes,
            None => Answer::Unknown,
            Some(false) => Answer::No,
        };
        let counts = if tracked == Answer::No { Counts::Untracked } else { Counts::Yes };
        let sure = if tracked == Answer::No { reach } else { reach.and(tracked) };
        let Some(certainty) = Certainty::of(sure) else { return Answer::No };
        let list = self.list(at);
        let hit = Hit { at, list, limit, group, certainty, counts };
        let exceeded = (self.exceeded)(&hit);
        self.comes_to = self.comes_to.filter(|to| *to != at);
        self.played.hits.push(hit);
        let exceeded = exceeded.map_or(Answer::Unknown, Answer::from);
        exceeded.not_if(!limit.over)
    }

    fn add(&mut self, at: LimitAt, adding: &Adding, reach: Answer) -> Answer {
        let Adding { by, set, limit, is_sometimes } = adding;
        let found: Found<'_> = set.find(by, &self.packet);
        let room = match found.answer {
            _ if !set.is_full() => Answer::Yes,
            Answer::No => Answer::No,
            Answer::Yes => Answer::Yes,
            _ => Answer::Unknown,
        };
        let own = found.element.and_then(|element| element.limit);
        self.added.push(Arc::clone(set));
        let rate = if *is_sometimes { self.rate(at) } else { Answer::Yes };
        let Some(limit) = own.or(*limit) else { return room.and(rate) };
        let counting = Counting { limit, by: by.clone() };
        if room == Answer::No {
            let values: Vec<Bits> = by.iter().map(|value| value.of(&self.packet)).collect();
            if let Some(certainty) = Certainty::of(reach) {
                let group = set::key(&values);
                let list = self.list(at);
                let hit = Hit { at, list, limit, group, certainty, counts: Counts::NoRoom };
                self.played.hits.push(hit);
            }
            return Answer::No;
        }
        room.and(rate).and(self.count(at, &counting, reach.and(room)))
    }

    fn map(
        &mut self,
        at: LimitAt,
        values: &[Operand],
        set: &Arc<Set>,
        reach: Answer,
        passed: Answer,
    ) -> Vec<(Answer, Outcome)> {
        let found = set.find(values, &self.packet);
        match (found.element, found.answer) {
            (_, Answer::No) => Vec::new(),
            (Some(element), answer) => {
                let mut surely = passed.and(self.is_unchanged(set, answer));
                surely = surely.and(self.of_element(at, element, values, reach.and(surely)));
                match (surely, &element.verdict) {
                    (Answer::No, _) | (_, None) => Vec::new(),
                    (_, Some(outcome)) => vec![(surely, outcome.clone())],
                }
            }
            // Any of them may be the one.
            (None, _) => {
                let mut all: Vec<Outcome> = Vec::new();
                for outcome in set.elements().iter().filter_map(|e| e.verdict.as_ref()) {
                    if !all.contains(outcome) {
                        all.push(outcome.clone());
                    }
                }
                if set.unread.is_some() {
                    all.extend([Outcome::Accept, Outcome::Drop]);
                }
                all.into_iter().map(|outcome| (Answer::Unknown, outcome)).collect()
            }
        }
    }

    fn set_to(&self, value: Option<&Operand>, reach: Answer) -> Bits {
        match value {
            Some(value) if reach == Answer::Yes => value.of(&self.packet).first(4),
            _ => Bits::unknown(4),
        }
    }

    /// The first rule that names one decides (`nft_ct_set_zone_eval()`, `xt_ct_target()`).
    fn set_zone(&mut self, zone: Option<u16>, surely: Answer) {
        if !self.packet.is_seen && !self.is_proxys && self.packet.zone == Some(0) {
            self.packet.zone = zone.filter(|_| surely == Answer::Yes);
        }
    }

    fn notrack(&mut self, chain: usize, rule: usize, surely: Answer) {
        if self.packet.is_seen || self.is_proxys || self.packet.is_tracked == Some(false) {
            return;
        }
        self.packet.is_tracked = if surely == Answer::Yes { Some(false) } else { None };
        self.played.notrack.get_or_insert((chain, rule));
    }
}

/// How surely a packet comes to the end of a base chain, to its policy.
fn ended(left: Left) -> Answer {
    match left.base {
        _ if left.is_dead_end => Answer::No,
        Answer::No => Answer::Yes,
        Answer::Yes => Answer::No,
        other => other,
    }
}
