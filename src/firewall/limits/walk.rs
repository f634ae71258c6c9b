//! Walks from a base chain down, to the limits and to what passes before them. Pure.

use super::earlier::{Earlier, EarlierAccept, earlier, untracked};
use super::key::{key, key_of};
use super::told::{notes, remembers, tells};
use super::witness::{Sight, Witness, rate, stops};
use super::{Limit, LimitRule, Limiter, SetUse};
use crate::firewall::play::{CONNTRACK, DEPTH, LimitAt, Player};
use crate::firewall::rule::Threshold;
use crate::firewall::set::{Element, Set};
use crate::firewall::value::Operand;
use crate::firewall::{Base, Chain, Family, Hook, Match, Outcome, Rule, STATE_NEW, Step, Test};

/// So many rules are walked for each base chain: rule sets of thousands of services fan out.
const STEPS: usize = 200_000;

/// So many limits are listed: each path to a limit that asks for other packets is one of its own.
const LIMITS: usize = 1000;

/// So many elements of one map, or with a limit of their own, are followed.
const ELEMENTS: usize = 256;

impl Limiter {
    pub(super) fn walk(&mut self, player: &Player<'_>, at: usize) {
        let Some(chain) = player.ruleset().chains.get(at) else { return };
        let Some(base) = &chain.base else { return };
        let mut walk = Walk {
            player,
            base,
            lets_all_go_on: base.is_nat && !stops(player, at),
            found: self,
            before: Vec::new(),
            returned: Vec::new(),
            path: Vec::new(),
            steps: STEPS,
        };
        let ipv4 = match chain.family {
            Family::Ip => Some(true),
            Family::Ip6 => Some(false),
            _ => None,
        };
        // Rules that translate see the first packet of each connection alone (`nf_nat_inet_fn()`).
        let states = base.is_nat.then_some(STATE_NEW);
        walk.chain(at, chain, &Match { ipv4, states, ..Match::default() });
    }

    /// The same limit by another way is another row, but where only its ports differ.
    fn add(&mut self, found: LimitRule) {
        // What passes before it goes to the ports of each way.
        let before = |known: &LimitRule| -> Option<Vec<EarlierAccept>> {
            let all = known.before.iter().zip(&found.before);
            let is_one = known.before.len() == found.before.len();
            if is_one { all.map(|(one, other)| one.or(other)).collect() } else { None }
        };
        let same = |known: &LimitRule| {
            known.at == found.at
                && known.limit == found.limit
                && (known.hook, known.priority) == (found.hook, found.priority)
                && known.matches
                    == Match { ports: known.matches.ports.clone(), ..found.matches.clone() }
        };
        let of_both = |known: &mut LimitRule| {
            let before = before(known).filter(|_| same(known));
            before.map(|before| {
                known.before = before;
                known.matches.ports = known.matches.ports.or(&found.matches.ports);
            })
        };
        if self.rules.iter_mut().find_map(of_both).is_none() {
            self.rules.push(found);
        }
    }
}

/// One packet path, from a base chain down.
struct Walk<'p, 'r, 'f> {
    player: &'p Player<'r>,
    base: &'r Base,
    /// Whatever its rules decide, each packet goes on behind it: they say where to.
    lets_all_go_on: bool,
    found: &'f mut Limiter,
    /// Rules met so far that take packets off the path.
    before: Vec<Earlier>,
    /// What the chains of the path have sent back so far, each to the chain that called it.
    returned: Vec<Match>,
    /// Chains between the base chain and the rule, with both ends.
    path: Vec<&'r Chain>,
    steps: usize,
}

/// Whether no packet leaves a chain by its end or is sent back: it ends in a verdict on all.
fn keeps_all(chain: &Chain) -> bool {
    let is_end = |rule: &Rule| match rule.steps.as_slice() {
        [Step::Verdict(outcome), ..] => {
            matches!(outcome, Outcome::Accept | Outcome::Drop | Outcome::Reject | Outcome::Reset)
        }
        _ => false,
    };
    let returns = |rule: &Rule| {
        let is_back = |step: &Step| matches!(step, Step::Verdict(Outcome::Return) | Step::Map(..));
        rule.steps.iter().any(is_back)
    };
    chain.rules.last().is_some_and(is_end) && !chain.rules.iter().any(returns)
}

fn limit(threshold: Threshold, by: &[Operand], dynamic: bool) -> Limit {
    let Threshold { count, over } = threshold;
    Limit { count, over, key: key(by), is_keyless: by.is_empty(), dynamic }
}

impl<'r> Walk<'_, 'r, '_> {
    fn chain(&mut self, at: usize, chain: &'r Chain, path: &Match) {
        // The kernel takes no rules that go round in circles; a text may have some.
        if self.path.len() > DEPTH || self.path.iter().any(|on_it| std::ptr::eq(*on_it, chain)) {
            return;
        }
        self.path.push(chain);
        let returned = self.returned.len();
        let mut back = Vec::new();
        for (index, rule) in chain.rules.iter().enumerate() {
            let Some(steps) = self.steps.checked_sub(1) else { break };
            self.steps = steps;
            let place = LimitAt { chain: at, rule: index, step: 0 };
            if self.rule(chain, rule, place, path, &mut back) {
                break;
            }
        }
        self.returned.truncate(returned);
        // What goes back to the calling chain is on the path again.
        back.into_iter().rev().for_each(|at| {
            if at < self.before.len() {
                self.before.remove(at);
            }
        });
        self.path.pop();
    }

    /// Whether no packet comes to the next rule.
    fn rule(
        &mut self,
        chain: &'r Chain,
        rule: &'r Rule,
        mut place: LimitAt,
        path: &Match,
        back: &mut Vec<usize>,
    ) -> bool {
        let mut matches = path.clone();
        let mut limited: Option<Threshold> = None;
        for (number, step) in rule.steps.iter().enumerate() {
            place.step = number;
            if matches.never {
                return false;
            }
            match step {
                Step::Test(Test::In { values, set, is: true }) if set.has_limits() => {
                    limited = self.elements(chain, rule, place, (values, set), &matches);
                    matches = matches.and(&Match::of(&Test::In {
                        values: values.clone(),
                        set: set.clone(),
                        is: true,
                    }));
                }
                Step::Test(test) => {
                    if let Test::Rate(what) = test {
                        self.witness(chain, rule, &matches, rate(rule, what.clone()));
                    }
                    matches = matches.and(&Match::of(test));
                }
                Step::Count(counting) => {
                    let limit = limit(counting.limit, &counting.by, false);
                    self.limit(chain, rule, place, limit, None, matches.clone());
                    limited = Some(counting.limit);
                }
                Step::Add(adding) => {
                    matches.is_rated |= adding.is_sometimes;
                    if adding.limit.is_none() {
                        let set = format!("set {}", adding.set.name);
                        let sight =
                            if adding.is_sometimes { rate(rule, set) } else { Sight::Memory(set) };
                        self.witness(chain, rule, &matches, sight);
                    }
                    if let Some(threshold) = adding.limit {
                        let limit = limit(threshold, &adding.by, true);
                        let set = SetUse {
                            name: adding.set.name.clone(),
                            handle: adding.set.handle,
                            size: adding.set.size,
                            elements: adding.set.elements().len(),
                        };
                        self.limit(chain, rule, place, limit, Some(set), matches.clone());
                        limited = Some(threshold);
                    }
                }
                Step::Map(values, set) => {
                    self.elements(chain, rule, place, (values, set), &matches);
                    self.map(chain, (values, set), &matches, limited, back);
                    return false;
                }
                Step::Notrack => self.notrack(chain, rule, &matches),
                Step::Verdict(outcome) => {
                    self.outcome(chain, outcome, &matches, limited, back);
                    let is_all = matches.is_same_of_tcp(path);
                    return is_all && limited.is_none() && *outcome == Outcome::Return
                        || is_all && matches!(outcome, Outcome::Goto(_));
                }
                Step::Log => self.witness(chain, rule, &matches, Sight::Log),
                Step::Note(what) => {
                    self.witness(chain, rule, &matches, Sight::Memory(what.clone().into_owned()));
                }
                Step::Remove(_)
                | Step::SetMark(_)
                | Step::SetCtMark(_)
                | Step::Write(_)
                | Step::SetZone(_)
                | Step::Leads(_) => {}
            }
        }
        false
    }

    fn map(
        &mut self,
        chain: &'r Chain,
        (values, set): (&[Operand], &'r Set),
        matches: &Match,
        limited: Option<Threshold>,
        back: &mut Vec<usize>,
    ) {
        let mut seen: Vec<(Match, &Outcome)> = Vec::new();
        let otherwise = set.otherwise().map(|element| (Match::default(), element));
        let keyed = set.keyed().iter().map(|e| (Match::of_element(values, e), e));
        for (asked, element) in keyed.chain(otherwise).take(ELEMENTS) {
            let Some(outcome) = &element.verdict else { continue };
            let all = matches.and(&asked);
            let limited = element.limit.or(limited);
            if !all.never && !seen.contains(&(all.clone(), outcome)) {
                self.outcome(chain, outcome, &all, limited, back);
                seen.push((all, outcome));
            }
        }
    }

    fn outcome(
        &mut self,
        chain: &'r Chain,
        outcome: &Outcome,
        matches: &Match,
        limited: Option<Threshold>,
        back: &mut Vec<usize>,
    ) {
        if matches.never {
            return;
        }
        match outcome {
            Outcome::Jump(name) | Outcome::Goto(name) => {
                if let Some(at) = self.player.target(chain, name)
                    && let Some(next) = self.player.ruleset().chains.get(at)
                {
                    self.chain(at, next, matches);
                    // What comes back from there goes on in the chain that called this one.
                    let is_goto = matches!(outcome, Outcome::Goto(_));
                    if is_goto && !keeps_all(next) {
                        if self.path.len() > 1 {
                            self.returned.push(matches.clone());
                        } else {
                            self.ended(next, matches, limited);
                        }
                    }
                }
            }
            Outcome::Accept | Outcome::Return | Outcome::Queue => {
                // What exceeds a limit has been counted there.
                if limited.is_some_and(|limit| limit.over) {
                    return;
                }
                let within = limited.map(|limit| limit.count);
                // What has been sent back does not come here.
                let left = self.returned.iter().fold(matches.clone(), |all, it| all.without(it));
                if left.ports.is_empty() {
                    return;
                }
                if *outcome == Outcome::Return && self.path.len() > 1 {
                    back.push(self.before.len());
                    let is_rated = matches.is_rated || within.is_some();
                    self.returned.push(Match { is_rated, ..matches.clone() });
                }
                self.before.push(Earlier { matches: left, within });
            }
            Outcome::Synproxy if !matches.without_syn => {
                self.found.synproxied.push(matches.ports.clone());
            }
            Outcome::Synproxy
            | Outcome::Continue
            | Outcome::Drop
            | Outcome::Reject
            | Outcome::Reset => {}
        }
    }

    /// The base chain ends for what a `goto` leads elsewhere: its policy decides.
    fn ended(&mut self, next: &Chain, matches: &Match, limited: Option<Threshold>) {
        let is_counted = limited.is_some_and(|limit| limit.over);
        let left = self.returned.iter().fold(matches.clone(), |all, it| all.without(it));
        if self.base.drops || is_counted || left.ports.is_empty() {
            return;
        }
        // That chain may take some of it.
        let is_rated = left.is_rated || !next.rules.is_empty();
        let within = limited.map(|limit| limit.count);
        self.before.push(Earlier { matches: Match { is_rated, ..left }, within });
    }

    /// A rule that sees SYNs.
    fn witness(&mut self, chain: &Chain, rule: &Rule, matches: &Match, sight: Sight) {
        let is_of_hosts = matches!(self.base.hook, Hook::Prerouting | Hook::Input | Hook::Forward);
        if !is_of_hosts {
            return;
        }
        // What is sent in a client's name is a SYN that conntrack takes for the first of a connection.
        if matches.never || !matches.may_open() || matches.is_loopback() {
            return;
        }
        let place = chain.place(rule);
        let limits = self.found.rules.len();
        let (base, matches) = ((self.base.hook, self.base.priority), matches.clone());
        let (lets_go_on, is_of_nat) = (self.lets_all_go_on, self.base.is_nat);
        let before = None;
        let found = Witness { place, sight, before, is_of_nat, base, lets_go_on, matches, limits };
        let is_known = |known: &Witness| {
            known.place == found.place && known.sight == found.sight && known.base.0 == found.base.0
        };
        if self.found.witnesses.len() < LIMITS && !self.found.witnesses.iter().any(is_known) {
            self.found.witnesses.push(found);
        }
    }

    fn notrack(&mut self, chain: &Chain, rule: &Rule, matches: &Match) {
        let is_early = self.base.hook == Hook::Prerouting && self.base.priority < CONNTRACK;
        if !is_early || !matches.may_open() || matches.never {
            return;
        }
        // What another rule has accepted before stays tracked.
        let before = self.before.iter().filter(|it| it.within.is_none() && !it.matches.is_rated);
        let left = before.fold(matches.clone(), |left, it| left.without(&it.matches));
        if left.ports.is_empty() {
            return;
        }
        if left.syn && left.is_for_everybody() && !left.is_rated {
            // The next packet of the connection makes its entry.
            self.found.untracked_syns.push((left.ports.clone(), chain.place(rule)));
        } else if left.is_for_everybody() && !left.is_rated {
            self.found.untracked.push((left.ports.clone(), chain.place(rule)));
        } else {
            self.found.untracked_of_some.push(left);
        }
    }

    /// Limits of the elements of a set that is looked up.
    fn elements(
        &mut self,
        chain: &Chain,
        rule: &Rule,
        place: LimitAt,
        (values, set): (&[Operand], &'r Set),
        matches: &Match,
    ) -> Option<Threshold> {
        let mut last = None;
        let own = |element: &'r Element| Some((element.limit?, element));
        for (threshold, element) in set.elements().iter().filter_map(own).take(ELEMENTS) {
            let all = matches.and(&Match::of_element(values, element));
            if !all.never {
                let limit =
                    Limit { key: key_of(values, element), ..limit(threshold, values, false) };
                self.limit(chain, rule, place, limit, None, all);
            }
            last = Some(threshold);
        }
        last
    }

    fn limit(
        &mut self,
        chain: &Chain,
        rule: &Rule,
        at: LimitAt,
        limit: Limit,
        set: Option<SetUse>,
        matches: Match,
    ) {
        // No packet that opens a connection comes to it.
        if matches.without_syn {
            return;
        }
        let untracked =
            self.found.untracked_of_some.iter().filter_map(|it| untracked(it, &matches));
        let before = earlier(&self.before, &matches).into_iter().chain(untracked).collect();
        let found = LimitRule {
            family: chain.family,
            table: chain.table.clone(),
            chain: chain.name.clone(),
            position: rule.position,
            handle: rule.handle,
            at,
            set,
            hook: self.base.hook,
            priority: self.base.priority,
            limit,
            before,
            matches,
            outcome: rule.outcome().clone(),
            tells: tells(self.player, chain, rule, at.step),
            notes: notes(rule, at.step),
            remembers: remembers(self.player, chain, rule, at.step),
        };
        if self.found.rules.len() < LIMITS {
            self.found.add(found);
            return;
        }
        let rest = format!("limits beyond the first {LIMITS}");
        if !self.found.unread.contains(&rest) {
            self.found.unread.push(rest);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::limits::EarlierAccept;
    use crate::firewall::{Ruleset, parse_saved};

    #[test]
    fn rules_that_go_round_in_circles_have_an_end() {
        let goto = "-A limits -p tcp -m mark --mark 1 -g limits\n".repeat(3);
        let text = format!(
            "*filter\n:INPUT DROP [0:0]\n:limits - [0:0]\n-A INPUT -g limits\n{goto}\
             -A limits -p tcp -m connlimit --connlimit-above 40 -j DROP\n"
        );
        let ruleset = Ruleset { chains: parse_saved(&text, Family::Ip), unread: Vec::new() };
        let places: Vec<_> = Limiter::of(&ruleset).rules.iter().map(LimitRule::place).collect();
        assert_eq!(places, ["ip filter limits rule 4"]);
    }

    /// A packet that opens a translated connection is both new and DNAT.
    #[test]
    fn what_is_for_translated_connections_is_for_those_that_open() {
        let limit = |rules: &str| {
            let text = format!("*filter\n:FORWARD DROP [0:0]\n{rules}\nCOMMIT\n");
            let ruleset = Ruleset { chains: parse_saved(&text, Family::Ip), unread: Vec::new() };
            Limiter::of(&ruleset)
        };
        let counts = "-p tcp -m connlimit --connlimit-above 3 --connlimit-mask 32 -j DROP";
        for states in ["DNAT", "SNAT,DNAT", "RELATED,ESTABLISHED,DNAT", "NEW,DNAT"] {
            let ctstate = format!("-A FORWARD -m conntrack --ctstate {states}");
            let of_it = limit(&format!("{ctstate} {counts}"));
            assert!(of_it.rules.iter().all(|rule| rule.matches.may_open()), "{states}");
            assert_eq!(of_it.rules.len(), 1, "{states}");
            let behind = limit(&format!("{ctstate} -j ACCEPT\n-A FORWARD {counts}"));
            let (unsure, sure): (Vec<_>, Vec<_>) =
                behind.rules[0].before.iter().partition(|before| !before.is_sure());
            let wanted: &[EarlierAccept] = match states {
                "RELATED,ESTABLISHED,DNAT" => &[EarlierAccept::Established],
                _ => &[],
            };
            assert_eq!((sure, unsure.len()), (wanted.iter().collect(), 1), "{states}");
        }
        let none = limit(&format!(
            "-A FORWARD -m conntrack --ctstate ESTABLISHED -j ACCEPT\n-A FORWARD {counts}"
        ));
        assert_eq!(none.rules[0].before, [EarlierAccept::Established]);
    }

    #[test]
    fn one_limit_on_many_paths_is_listed_a_thousand_times_at_most() {
        let mut text = "*filter\n:INPUT DROP [0:0]\n".to_owned();
        for level in 0..11 {
            let (from, to) = (["INPUT".to_owned(), format!("c{level}")], level + 1);
            let from = &from[usize::from(level > 0)];
            let jump = |side, net| format!("-A {from} -{side} 10.{level}.{net}.0/24 -j c{to}\n");
            text.push_str(&format!(
                ":c{to} - [0:0]\n{}{}",
                jump("m x ! -s", 0),
                jump("m y ! -s", 1)
            ));
        }
        text.push_str("-A c11 -p tcp -m connlimit --connlimit-above 40 -j DROP\n");
        let ruleset = Ruleset { chains: parse_saved(&text, Family::Ip), unread: Vec::new() };
        let limiter = Limiter::of(&ruleset);
        assert_eq!((limiter.rules.len(), limiter.unread.len()), (LIMITS, 1));
    }
}
