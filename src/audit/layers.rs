//! What a connection passes on its way in, layer by layer, each with figures and a verdict. Pure.

use std::collections::BTreeMap;
use std::fmt;

use ipnet::IpNet;
use serde::Serialize;

use super::asked::{Answered, Holds};
use super::figures::{Figures, Table, Tcp};
use super::finding::{Finding, Verdict, worst};
use super::judge;
use super::processes::{Holder, Owner, Owners, place};
use super::sources::Load;
use crate::firewall::limits::{EarlierAccept, Key, LimitRule, Limiter, SetUse};
use crate::reconcile::snapshot::Views;
use crate::sockdiag::{Socket, State};

/// What is found about the sources of a limit.
const OF_SOURCES: [&str; 3] = ["source-over-limit", "limit-uncounted", "limit-notes"];

/// The layers, in the order that a packet meets them. The first and the third are `None` for saved
/// tables: the host that they come from is not at hand.
#[derive(Clone, Debug, Serialize)]
pub struct Layers {
    /// The conntrack table.
    pub conntrack: Option<Layer<Table>>,
    /// The limits.
    pub limiter: Layer<Limits>,
    /// Handshakes.
    pub syn: Option<Layer<Handshakes>>,
    /// Listen queues.
    pub listen: Vec<Queue>,
    /// Processes that hold sockets.
    pub application: Vec<Application>,
}

/// One layer: a verdict, its reasons, and its figures.
#[derive(Clone, Debug, Serialize)]
pub struct Layer<F> {
    /// The worst of its findings.
    pub verdict: Verdict,
    /// What to do about the worst of them.
    pub advice: Option<String>,
    /// All of them.
    pub findings: Vec<Finding>,
    /// What they come from.
    #[serde(flatten)]
    pub figures: F,
}

impl Layer<Limits> {
    /// Takes what limits said when they were asked.
    pub(super) fn asked(&mut self, all: &[Answered]) {
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
        let is_unsure =
            |one: &Finding| OF_SOURCES.contains(&one.id) && one.verdict == Verdict::Warn;
        for rule in self.figures.rules.iter_mut().filter(|rule| rule.holds == Some(true)) {
            let told: Vec<_> = rule.findings.extract_if(.., |one| is_unsure(one)).collect();
            rule.verdict = worst(&rule.findings);
            self.findings.retain(|one| !told.contains(one));
        }
        self.extend([]);
    }
}

impl<F> Layer<F> {
    /// Takes more findings.
    pub(super) fn extend(&mut self, findings: impl IntoIterator<Item = Finding>) {
        self.findings.extend(findings);
        (self.verdict, self.advice) = judged(&self.findings);
    }

    fn new(findings: Vec<Finding>, figures: F) -> Self {
        let (verdict, advice) = judged(&findings);
        Self { verdict, advice, findings, figures }
    }
}

/// The worst verdict, and what to do about it.
fn judged(findings: &[Finding]) -> (Verdict, Option<String>) {
    let verdict = worst(findings);
    let advised = |finding: &&Finding| finding.verdict == verdict && !finding.advice.is_empty();
    (verdict, findings.iter().find(advised).map(|finding| finding.advice.clone()))
}

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
    fn of(rule: &LimitRule, loads: &[&Load]) -> Self {
        let over: Vec<_> = loads.iter().filter(|load| load.is_over() == Some(true)).collect();
        let mut findings = judge::limits::limit(rule);
        findings.extend(over.first().map(|worst| {
            judge::sockets::over(whose(rule, worst), worst.held, worst.limit, worst.counted)
        }));
        let unsure = loads.iter().find(|load| load.is_over().is_none()).filter(|_| over.is_empty());
        findings
            .extend(unsure.map(|load| {
                judge::sockets::perhaps_over(whose(rule, load), load.held, load.limit)
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
            judge::sockets::uncounted(whose(rule, load), held, is_sure, load.limit, load.counted)
        }));
        let noted = loads.iter().find(|load| load.is_noted).filter(|_| !rule.notes);
        findings.extend(noted.map(|_| judge::limits::noted(rule)));
        let passing = |is_sure| {
            let all = rule.before.iter().filter(move |before| before.is_sure() == is_sure);
            all.map(EarlierAccept::to_string).collect()
        };
        let full = loads.iter().filter(|load| load.is_full()).map(|load| Full {
            source: whose(rule, load).to_string(),
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
            sources_over: over.len(),
            full: full.collect(),
            // One whose set has no room limits nobody that is not in it.
            holds: (lacks || is_crowded).then_some(false),
            verdict: worst(&findings),
            findings,
        }
    }
}

/// Whose connections a limit counts together, as well as it can be named.
pub fn whose(rule: &LimitRule, load: &Load) -> IpNet {
    let is_by_source = rule.source_prefix().is_some() || rule.limit.key == Key::All;
    load.client.filter(|_| !is_by_source).map_or(load.net, IpNet::from)
}

/// Figures of the handshake layer.
#[derive(Clone, Debug, Serialize)]
pub struct Handshakes {
    /// Sockets in SYN_RECV.
    pub syn_recv: u64,
    /// Settings and counters.
    #[serde(flatten)]
    pub tcp: Tcp,
}

/// One listener's queue.
#[derive(Clone, Debug, Serialize)]
pub struct Queue {
    /// Where it listens.
    pub local: String,
    /// Connections that wait to be accepted.
    pub waiting: u32,
    /// How many may.
    pub limit: u32,
    /// Who listens.
    pub pid: Option<i32>,
    /// Its command name.
    pub command: Option<String>,
    /// The container that it is in, where it is in one.
    pub container: Option<String>,
    /// How full it is.
    pub verdict: Verdict,
    /// The finding in words, with its figures.
    pub what: String,
    /// What to do about it.
    pub advice: Option<String>,
}

/// Who has the sockets of one row.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// A process, or a group of workers that share their sockets.
    Process,
    /// Listen queues: the connections wait to be accepted.
    Queue,
    /// Processes that cannot be seen.
    Unseen,
    /// No process: subflows of MPTCP.
    Descriptorless,
    /// The kernel, since their process has closed them.
    Kernel,
}

/// The sockets of one owner.
#[derive(Clone, Debug, Serialize)]
pub struct Application {
    /// Who has them.
    pub kind: Kind,
    /// The lowest process id; `null` for sockets that no process holds or may be seen to hold.
    pub pid: Option<i32>,
    /// Its command name.
    pub command: Option<String>,
    /// The container that it is in, where it is in one.
    pub container: Option<String>,
    /// How many processes share its sockets, at most.
    pub processes: usize,
    /// Sockets by state.
    pub sockets: BTreeMap<&'static str, usize>,
    /// Bytes received that it has not read.
    pub unread: u64,
    /// How it does.
    pub verdict: Verdict,
    /// The finding in words, with its figures.
    pub what: String,
    /// What to do about it.
    pub advice: Option<String>,
}

/// All that the layers are made of.
#[derive(Clone, Copy, Debug)]
pub struct Inputs<'a> {
    /// Settings and counters, where the host is at hand.
    pub figures: Option<&'a Figures>,
    /// The rules.
    pub limiter: &'a Limiter,
    /// What they have to bear.
    pub loads: &'a [Load],
    /// Whether the administrator named a limit, so that no rule is missed.
    pub is_limit_named: bool,
    /// Listeners of the scope.
    pub listeners: &'a [Socket],
    /// Connections of the scope.
    pub views: &'a Views,
    /// Who has the sockets.
    pub owners: &'a Owners,
}

impl Queue {
    /// How full it is, and whose it is.
    pub fn finding(&self) -> Finding {
        let who = self.command.as_deref().map_or(String::new(), |name| format!(" by {name}"));
        let place = place(self.container.as_deref());
        let what = format!("{}: {}{who}{place}", self.local, self.what);
        Finding::of("listen-queue-full", self.verdict, what, self.advice.clone())
    }
}

impl Application {
    /// How it does, and who it is.
    pub fn finding(&self) -> Finding {
        let who = match (self.pid, &self.command) {
            (Some(pid), Some(command)) if self.processes > 1 => {
                format!("{command} ({pid} and {} more)", self.processes - 1)
            }
            (Some(pid), Some(command)) => format!("{command} ({pid})"),
            _ => self.kind.to_string(),
        };
        let what = format!("{who}{}: {}", place(self.container.as_deref()), self.what);
        Finding::of("half-closed-held", self.verdict, what, self.advice.clone())
    }
}

impl fmt::Display for Kind {
    /// Whose sockets these are, where no process can be named.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Queue => "waiting to be accepted",
            Self::Unseen | Self::Process => "process unknown",
            Self::Descriptorless => "no process (MPTCP subflows)",
            Self::Kernel => "closed by their process",
        })
    }
}

impl Layers {
    /// Judges every layer.
    pub fn of(inputs: Inputs<'_>) -> Self {
        let syn_recv = inputs.views.iter().filter_map(|view| view.socket);
        let syn_recv = syn_recv.filter(|socket| socket.state == State::SynRecv).count();
        let syn_recv = u64::try_from(syn_recv).unwrap_or(u64::MAX);
        Self {
            conntrack: inputs.figures.map(|figures| {
                Layer::new(judge::figures::conntrack(&figures.table), figures.table.clone())
            }),
            limiter: limits(inputs),
            syn: inputs.figures.map(|figures| {
                let mut findings = judge::figures::syn(&figures.tcp, syn_recv);
                findings.push(judge::figures::listen_drops(&figures.tcp));
                Layer::new(findings, Handshakes { syn_recv, tcp: figures.tcp.clone() })
            }),
            listen: inputs.listeners.iter().map(|socket| queue(socket, inputs.owners)).collect(),
            application: applications(inputs),
        }
    }
}

fn limits(inputs: Inputs<'_>) -> Layer<Limits> {
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
    let rules: Vec<_> = rules.map(|(index, rule)| LimitFigures::of(rule, &of(index))).collect();
    let told = rules.iter().flat_map(|rule| &rule.findings);
    for finding in told.filter(|finding| OF_SOURCES.contains(&finding.id)) {
        if !findings.contains(finding) {
            findings.push(finding.clone());
        }
    }
    Layer::new(findings, Limits { rules })
}

fn queue(socket: &Socket, owners: &Owners) -> Queue {
    let finding = judge::figures::queue(socket.recv_queue, socket.send_queue);
    let holder = owners.holder(socket);
    Queue {
        local: socket.local.to_string(),
        waiting: socket.recv_queue,
        limit: socket.send_queue,
        pid: holder.map(|holder| holder.pid),
        command: holder.map(|holder| holder.command.clone()),
        container: holder.and_then(|holder| holder.container.clone()),
        verdict: finding.verdict,
        what: finding.what,
        advice: Some(finding.advice).filter(|advice| !advice.is_empty()),
    }
}

/// Sockets by those who have them: processes first, those with most half-closed sockets before
/// others.
fn applications(inputs: Inputs<'_>) -> Vec<Application> {
    type Group<'h> = (Option<&'h Holder>, Vec<Socket>);
    let mut groups: BTreeMap<(Kind, Option<i32>), Group<'_>> = BTreeMap::new();
    for socket in inputs.views.iter().filter_map(|view| view.socket) {
        let owner = inputs.owners.of(&socket);
        let (kind, holder) = match owner {
            Owner::Process(holder) => (Kind::Process, Some(holder)),
            Owner::Queue => (Kind::Queue, None),
            Owner::Descriptorless => (Kind::Descriptorless, None),
            Owner::Unseen => (Kind::Unseen, None),
            // A handshake is no application's yet: the layer syn counts it.
            Owner::Kernel if socket.state == State::SynRecv => continue,
            Owner::Kernel => (Kind::Kernel, None),
        };
        let group = groups.entry((kind, holder.map(|holder| holder.pid))).or_default();
        group.0 = holder;
        group.1.push(socket);
    }
    let mut all: Vec<_> = groups
        .into_iter()
        .map(|((kind, _), (holder, sockets))| {
            let mut found = application(kind, holder, &sockets);
            if kind == Kind::Unseen {
                found.what += &inputs.owners.why_unseen();
            }
            found
        })
        .collect();
    all.sort_by_key(|application| {
        let close_wait = application.sockets.get(State::CloseWait.name()).copied();
        (application.kind, std::cmp::Reverse(close_wait))
    });
    all
}

fn application(kind: Kind, holder: Option<&Holder>, sockets: &[Socket]) -> Application {
    let mut by_state = BTreeMap::new();
    let mut unread = 0_u64;
    for socket in sockets {
        *by_state.entry(socket.state.name()).or_insert(0) += 1;
        // The client's FIN is in the queue as one byte.
        let fin = u32::from(socket.state == State::CloseWait);
        unread += u64::from(socket.recv_queue.saturating_sub(fin));
    }
    let of = |state: State| by_state.get(state.name()).copied().unwrap_or(0);
    let close_wait = of(State::CloseWait);
    let open = close_wait + of(State::Established);
    let finding = match kind {
        Kind::Kernel => judge::sockets::closing(sockets.len()),
        _ => judge::sockets::application(open, close_wait, unread),
    };
    Application {
        kind,
        pid: holder.map(|holder| holder.pid),
        command: holder.map(|holder| holder.command.clone()),
        container: holder.and_then(|holder| holder.container.clone()),
        processes: holder.map_or(0, |holder| holder.processes),
        sockets: by_state,
        unread,
        verdict: finding.verdict,
        what: finding.what,
        advice: Some(finding.advice).filter(|advice| !advice.is_empty()),
    }
}
