//! What a connection passes on its way in, layer by layer, each with figures and a verdict. Pure.

mod limits;

use std::collections::{BTreeMap, BTreeSet, HashSet};
use std::fmt;

use serde::Serialize;

pub(super) use self::limits::seems_to_be_for_containers;
pub use self::limits::{Full, LimitFigures, Limits};
use super::figures::{Figures, Table, Tcp};
use super::finding::{Finding, Verdict, worst};
use super::guests::Guests;
use super::judge;
use super::loads::Load;
use super::processes::{Holder, Owner, Owners, place};
use crate::firewall::limits::Limiter;
use crate::firewall::play::Player;
use crate::firewall::published::Published;
use crate::flow::{Connection, Endpoint};
use crate::reconcile::snapshot::{View, Views};
use crate::rtnetlink::link::Link;
use crate::sockdiag::{Socket, State};

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
    /// Its backlog: one more may wait.
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
    pub player: &'a Player<'a>,
    /// The limits in them.
    pub limiter: &'a Limiter,
    /// Network devices; empty where they are not known.
    pub links: &'a [Link],
    /// What they have to bear.
    pub loads: &'a [Load],
    /// Ports that something listens on, and that were not looked at.
    pub left_out: &'a BTreeSet<u16>,
    /// Whether the administrator named a limit, so that no rule is missed.
    pub is_limit_named: bool,
    /// Listeners of the scope.
    pub listeners: &'a [Socket],
    /// What listens in containers, in the scope or not.
    pub guests: &'a Guests,
    /// Ports of IPv4 and of IPv6 that rules lead elsewhere; `None` where they are not known.
    pub published: &'a [Option<Published>; 2],
    /// Connections of the scope.
    pub views: &'a Views,
    /// Those to containers that no limit counts.
    pub unlimited: &'a [View],
    /// Those that a transparent proxy has taken.
    pub proxied: &'a HashSet<Connection>,
    /// Ports that such proxies listen on.
    pub proxies: &'a HashSet<u16>,
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
        let handshakes: Vec<Endpoint> = inputs
            .views
            .iter()
            .filter_map(|view| view.socket)
            .filter(|socket| socket.state == State::SynRecv)
            .map(|socket| socket.local)
            .collect();
        let syn_recv = u64::try_from(handshakes.len()).unwrap_or(u64::MAX);
        Self {
            conntrack: inputs.figures.map(|figures| {
                Layer::new(judge::figures::conntrack(&figures.table), figures.table.clone())
            }),
            limiter: limits::of(inputs),
            syn: inputs.figures.map(|figures| {
                let mut findings = judge::figures::syn(&figures.tcp, syn_recv);
                findings.extend(inputs.listeners.iter().filter_map(|listener| {
                    let local = listener.local;
                    let is_its = |to: &&Endpoint| {
                        to.port() == local.port()
                            && (local.addr().is_unspecified() || to.addr() == local.addr())
                    };
                    let waiting = handshakes.iter().filter(is_its).count();
                    judge::figures::handshakes(local, waiting, listener.send_queue)
                }));
                findings.push(judge::figures::listen_drops(&figures.tcp));
                Layer::new(findings, Handshakes { syn_recv, tcp: figures.tcp.clone() })
            }),
            listen: inputs
                .listeners
                .iter()
                .map(|socket| queue(socket, inputs.owners, inputs.figures.is_some()))
                .collect(),
            application: applications(inputs),
        }
    }
}

/// A listener's queue; of a saved text (`is_live` is not) a backlog of 0 may be one that is not shown.
fn queue(socket: &Socket, owners: &Owners, is_live: bool) -> Queue {
    let backlog = Some(socket.send_queue).filter(|backlog| is_live || *backlog > 0);
    let finding = judge::figures::queue(socket.recv_queue, backlog);
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
