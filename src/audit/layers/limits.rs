//! The layer of the limits: each limit, who is at it, and what it says when it is asked. Pure.

use ipnet::IpNet;
use serde::Serialize;

use super::{Inputs, Layer};
use crate::audit::asked::{Answered, Holds};
use crate::audit::beyond::Beyond;
use crate::audit::finding::{Finding, Verdict, worst};
use crate::audit::judge;
use crate::audit::loads::Load;
use crate::audit::whose::Whose;
use crate::firewall::Hook;
use crate::firewall::limits::{EarlierAccept, LimitRule, SetUse};
use crate::flow::Endpoint;
use crate::reconcile::snapshot::{View, Views};

/// What is found about a limit on this host, and about its sources.
const OF_RULES: [&str; 8] = [
    "source-over-limit",
    "limit-uncounted",
    "limit-met-twice",
    "limit-notes",
    "limit-rated",
    "limit-translated",
    "limit-interface",
    "limit-partial",
];

/// Figures of the limiter layer.
#[derive(Clone, Debug, Serialize)]
pub struct Limits {
    /// The limits that were found.
    pub rules: Vec<LimitFigures>,
}

/// One limit, and who is at it.
#[derive(Clone, Debug, Serialize)]
pub struct LimitFigures {
    /// Where it stands.
    pub rule: String,
    /// What it is for, by what it counts, in words.
    pub what: String,
    /// Ports that it is for.
    pub ports: String,
    /// Connections.
    pub limit: u32,
    /// Prefix length of what is counted together; `null` where it is not by source.
    pub mask: Option<u8>,
    /// By what it counts, in words.
    pub counts: String,
    /// What passes before it, by its kind.
    pub before: Vec<&'static str>,
    /// What surely passes before it, in words.
    pub passes: Vec<String>,
    /// What may.
    pub may_pass: Vec<String>,
    /// Who gets in though it is exceeded, or may, in words.
    pub beyond: Vec<String>,
    /// How many sources hold more than it allows.
    pub sources_over: usize,
    /// Those that hold as much as it allows, or more, or may.
    pub full: Vec<Full>,
    /// Whether it holds, as what it was asked shows, or entries that it lacks; `null` where neither does.
    pub holds: Option<bool>,
    /// The worst of what was found about it.
    pub verdict: Verdict,
    /// All of that; the layer has them too.
    #[serde(skip)]
    pub findings: Vec<Finding>,
}

/// A source that holds as much as a limit allows, or more.
#[derive(Clone, Debug, Serialize)]
pub struct Full {
    /// Whose connections are counted together; all addresses where it is not by source, and they
    /// are of several clients or of all.
    pub source: String,
    /// The destination whose connections are counted together, whoever opens them; `null` where it is not
    /// by destination.
    pub destination: Option<String>,
    /// To which port, where each is counted on its own.
    pub port: Option<u16>,
    /// Its sockets that the limit counts, or may count.
    pub held: usize,
    /// Entries that it can count.
    pub counted: usize,
    /// How many it allows.
    pub limit: u32,
    /// More than it allows are held; `null` where that cannot be told.
    pub over: Option<bool>,
}

impl LimitFigures {
    fn of(rule: &LimitRule, loads: &[&Load], beyond: &Beyond) -> Self {
        let over: Vec<_> = loads.iter().filter(|load| load.is_over() == Some(true)).collect();
        let mut findings = judge::limits::limit(rule);
        findings.extend(over.first().map(|worst| {
            judge::sockets::over(Whose::of(rule, worst), worst.held, worst.limit, worst.counted)
        }));
        let unsure = loads.iter().find(|load| load.is_over().is_none() && load.times == 1);
        let unsure = unsure.filter(|_| over.is_empty());
        findings.extend(unsure.map(|load| {
            judge::sockets::perhaps_over(Whose::of(rule, load), load.held, load.limit)
        }));
        let twice = loads.iter().filter(|load| load.times > 1 && !load.is_noted());
        findings.extend(twice.max_by_key(|load| load.held).map(|load| {
            judge::sockets::met_twice(Whose::of(rule, load), load.held, load.limit, load.times)
        }));
        // Of those that are over it, that says how many the rule sees.
        let uncounted = |load: &&&Load, is_sure| {
            load.is_over() == Some(false) && load.is_uncounted() == is_sure
        };
        let lost = |is_sure| {
            let all = loads.iter().filter(|load| uncounted(load, is_sure));
            all.max_by_key(|load| load.held.saturating_sub(load.counted))
        };
        let lacks = loads.iter().any(|load| load.is_uncounted() == Some(true));
        findings.extend(lost(Some(true)).or_else(|| lost(None)).map(|load| {
            let (held, is_sure) = match load.is_uncounted() {
                Some(_) => (load.held_for_sure, true),
                None => (load.held, false),
            };
            judge::sockets::uncounted(
                Whose::of(rule, load),
                held,
                is_sure,
                load.limit,
                load.counted,
            )
        }));
        if !rule.notes {
            let refuses_nobody = beyond.refuses_nobody().unwrap_or_else(|| {
                let mut tried =
                    loads.iter().filter(|load| load.is_noted() || load.is_full()).peekable();
                tried.peek().is_some() && tried.all(|load| load.is_noted())
            });
            findings.extend(match refuses_nobody {
                true if beyond.open.is_empty() || rule.limit.over => {
                    Some(judge::limits::noted(rule))
                }
                true => Some(judge::limits::inert(rule)),
                false => beyond.is_rated.then(|| judge::limits::rated(rule)),
            });
        }
        let passing = |is_sure| {
            let all = rule.before.iter().filter(move |before| before.is_sure() == is_sure);
            all.map(EarlierAccept::to_string).collect()
        };
        let full = loads.iter().filter(|load| load.is_full()).map(|load| Full {
            source: Whose::of(rule, load).net.to_string(),
            destination: load.to.map(|to| to.to_string()),
            port: load.port,
            held: load.held,
            counted: load.counted,
            limit: load.limit,
            over: load.is_over(),
        });
        let is_crowded = rule.set.as_ref().is_some_and(SetUse::is_full);
        Self {
            rule: rule.place(),
            what: rule.words(),
            ports: rule.matches.ports.to_string(),
            limit: rule.limit.count,
            mask: rule.source_prefix(),
            counts: rule.limit.key.to_string(),
            before: rule.before.iter().filter_map(EarlierAccept::name).collect(),
            passes: passing(true),
            may_pass: passing(false),
            beyond: beyond.words(),
            sources_over: over.len(),
            full: full.collect(),
            // One whose set has no room limits nobody that is not in it.
            holds: (lacks || is_crowded).then_some(false),
            verdict: worst(&findings),
            findings,
        }
    }

    fn take(&mut self, finding: Option<Finding>) {
        self.findings.extend(finding);
        self.verdict = worst(&self.findings);
    }
}

/// What is open to the ports of a limit that meets none of it, since rules lead it elsewhere first.
fn passed_by(rule: &LimitRule, views: &Views) -> Option<Finding> {
    let matches = &rule.matches;
    if rule.is_before_nat() || matches.ports.is_all() && matches.destinations.is_empty() {
        return None;
    }
    let asked = |view: &View| {
        let entry = view.entry.filter(|entry| entry.reply == view.connection.sent())?;
        let (asked, local) = (entry.orig.dst, view.connection.local);
        let ends = [asked, local];
        let is_addressed = |to: Endpoint| {
            let is_for = |(net, inside): &(IpNet, bool)| net.contains(&to.addr()) == *inside;
            matches.destinations.iter().all(is_for)
        };
        let covers = |to: Endpoint| rule.covers(view.client().addr(), to.port());
        let is_it = view.socket.is_some_and(|socket| socket.takes_a_slot())
            && !view.is_outgoing()
            && asked != local
            && ends.into_iter().any(covers)
            && ends.into_iter().any(is_addressed)
            && !(covers(local) && is_addressed(local));
        is_it.then_some((asked, local))
    };
    let mut all = views.iter().filter_map(|view| asked(&view));
    let (first, local) = all.next()?;
    let others = all.filter(|(asked, _)| asked.port() == first.port()).count();
    Some(judge::reach::translated(rule, first.port(), local, others + 1))
}

/// Whether it is a limit of INPUT for all that this host has, and so seems to be for what it forwards.
pub(in crate::audit) fn seems_to_be_for_containers(rule: &LimitRule) -> bool {
    let matches = &rule.matches;
    rule.hook == Hook::Input && matches.ports.is_all() && matches.destinations.is_empty()
}

/// What clients have opened to containers by ports of this host, past such a limit.
fn passed_to_containers(rule: &LimitRule, unlimited: &[View]) -> Option<Finding> {
    if !seems_to_be_for_containers(rule) {
        return None;
    }
    let asked = |view: &View| {
        let entry = view.entry.filter(|entry| entry.reply == view.connection.sent())?;
        let (asked, local) = (entry.orig.dst, view.connection.local);
        let is_it = asked != local && rule.covers(view.client().addr(), asked.port());
        is_it.then_some((asked.port(), local))
    };
    let mut all = unlimited.iter().filter_map(asked);
    let first = all.next()?;
    let others = all.filter(|other| *other == first).count();
    Some(judge::reach::forwarded(rule, first.0, first.1, others + 1))
}

/// What is open of a transparent proxy, whose own port a limit names that meets none of it: the packets keep the port
/// that their client asked for.
fn passed_by_proxy(rule: &LimitRule, inputs: Inputs<'_>) -> Option<Finding> {
    let ports = &rule.matches.ports;
    let is_of_proxy = inputs.proxies.iter().any(|port| ports.contains(*port));
    if rule.hook == Hook::Forward || ports.is_all() || !is_of_proxy {
        return None;
    }
    let is_heard = |port| inputs.listeners.iter().any(|socket| socket.local.port() == port);
    let taken = |view: &View| {
        let port = view.connection.local.port();
        let is_it = view.socket.is_some_and(|socket| socket.takes_a_slot())
            && !view.is_outgoing()
            && inputs.proxied.contains(&view.connection)
            && rule.is_of(view.client().addr().is_ipv4())
            && !ports.contains(port)
            && !is_heard(port);
        is_it.then_some(port)
    };
    let mut all = inputs.views.iter().filter_map(|view| taken(&view));
    let first = all.next()?;
    let others = all.filter(|port| *port == first).count();
    Some(judge::reach::proxied(rule, first, others + 1))
}

impl Layer<Limits> {
    /// Takes what limits said when they were asked.
    pub(in crate::audit) fn asked(&mut self, all: &[Answered]) {
        for answered in all {
            let Some(rule) = self.figures.rules.get_mut(answered.rule) else { continue };
            // A list that was asked by several sources is named once.
            let lacking = judge::sockets::lacking(answered, &rule.rule)
                .filter(|lacking| !rule.findings.contains(lacking));
            rule.findings.extend(lacking.clone());
            rule.verdict = worst(&rule.findings);
            self.extend(lacking);
        }
        for (index, rule) in self.figures.rules.iter_mut().enumerate() {
            let of_rule = || all.iter().filter(|answered| answered.rule == index);
            let any = |wanted| of_rule().any(|answered| answered.holds() == wanted);
            let is_open = of_rule().any(|answered| match answered.holds() {
                Holds::Perhaps => true,
                Holds::Unanswered => answered.is_at_limit,
                Holds::Yes | Holds::No => false,
            });
            if any(Holds::No) {
                rule.holds = Some(false);
            } else if any(Holds::Yes) && !is_open && rule.holds.is_none() {
                rule.holds = Some(true);
            }
        }
        // What could not be told is known now.
        let is_unsure = |one: &Finding| OF_RULES.contains(&one.id) && one.verdict == Verdict::Warn;
        for rule in self.figures.rules.iter_mut().filter(|rule| rule.holds == Some(true)) {
            let told: Vec<_> = rule.findings.extract_if(.., |one| is_unsure(one)).collect();
            rule.verdict = worst(&rule.findings);
            self.findings.retain(|one| !told.contains(one));
        }
        self.extend([]);
    }
}

pub(super) fn of(inputs: Inputs<'_>) -> Layer<Limits> {
    let Inputs { limiter, loads, .. } = inputs;
    let mut ports: Vec<u16> = inputs.listeners.iter().map(|socket| socket.local.port()).collect();
    ports.sort_unstable();
    ports.dedup();
    let mut findings = judge::limits::limiter(limiter, &ports);
    if inputs.is_limit_named {
        findings.retain(|finding| !matches!(finding.id, "no-limit" | "rules-unread"));
    }
    let of = |index| loads.iter().filter(|load| load.rule == index).collect::<Vec<_>>();
    let rules = limiter.rules.iter().enumerate();
    let figures = |(index, rule)| {
        let loads = of(index);
        let beyond =
            Beyond::of(rule, inputs.player, inputs.listeners, inputs.guests, inputs.published);
        let mut figures = LimitFigures::of(rule, &loads, &beyond);
        figures.take(judge::reach::device(rule, inputs.links));
        figures.take(judge::reach::partial(rule, inputs.left_out));
        if loads.is_empty() {
            figures.take(passed_by(rule, inputs.views).or_else(|| passed_by_proxy(rule, inputs)));
        }
        figures.take(passed_to_containers(rule, inputs.unlimited));
        figures
    };
    let rules: Vec<_> = rules.map(figures).collect();
    let told = rules.iter().flat_map(|rule| &rule.findings);
    for finding in told.filter(|finding| OF_RULES.contains(&finding.id)) {
        if !findings.contains(finding) {
            findings.push(finding.clone());
        }
    }
    Layer::new(findings, Limits { rules })
}
