//! Takes the look: joins the tables, and makes sure of every disagreement.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;
use std::thread;
use std::time::Duration;

use super::arrivals::{Arrivals, arrivals};
use super::asked::Answered;
use super::classes::Class;
use super::figures::Figures;
use super::fronts::{Front, fronts};
use super::guests::Guests;
use super::plays::Plays;
use super::processes::Owners;
use super::ways::Ways;
use crate::containers;
use crate::error::Result;
use crate::firewall::Ruleset;
use crate::firewall::limits::Limiter;
use crate::flow::Connection;
use crate::host::addresses::has_global_ipv6;
use crate::host::instance::{self, DaemonStatus};
use crate::reconcile::ledger::Ledger;
use crate::reconcile::observe::Tables;
use crate::reconcile::outgoing::Survey;
use crate::reconcile::plan::cell;
use crate::reconcile::policy::{Policy, Scope};
use crate::reconcile::pressure::Defence;
use crate::reconcile::snapshot::{Snapshot, View};
use crate::reconcile::whole::Over;
use crate::rtnetlink::link::{Link, links};
use crate::sockdiag::{Lookup, Socket, States};

/// All that was seen in one look at one host, or read from files.
#[derive(Debug, Default)]
pub struct Seen {
    /// How the namespace is called.
    pub netns: String,
    /// Kernel release; empty where the tables are saved ones.
    pub kernel: String,
    /// Both tables, joined.
    pub snapshot: Snapshot,
    /// What entries looked like.
    pub ledger: Ledger,
    /// Listening sockets.
    pub listeners: Vec<Socket>,
    /// Connections that a transparent proxy has taken, whose port is not that of its listener.
    pub proxied: HashSet<Connection>,
    /// Ports that transparent proxies listen on.
    pub proxies: HashSet<u16>,
    /// The rules.
    pub rules: Ruleset,
    /// The limits in them.
    pub limiter: Limiter,
    /// By which devices clients come in, as far as the rules ask.
    pub arrivals: Arrivals,
    /// Network devices; empty where they are not known.
    pub links: Vec<Link>,
    /// Ports whose clients all come from one address.
    pub fronts: Vec<Front>,
    /// Settings and counters, where the host is at hand.
    pub figures: Option<Figures>,
    /// Who has the sockets.
    pub owners: Owners,
    /// The status of a running daemon; `None` for saved tables.
    pub told: Option<DaemonStatus>,
    /// What limits said; `None` where they were not asked.
    pub asked: Option<Vec<Answered>>,
    /// Local addresses of other namespaces whose sockets were looked at.
    pub behind: HashSet<IpAddr>,
    /// What listens there.
    pub guests: Guests,
    /// How many namespaces those are.
    pub namespaces: usize,
    /// How many could not be looked into.
    pub unseen: usize,
    /// Whether others can reach the host by IPv6.
    pub has_ipv6: bool,
    /// Half-closed connections that this host opened; `None` for saved tables.
    pub outgoing: Option<Survey>,
}

impl Seen {
    /// Looks at the namespace that the calling thread is in.
    ///
    /// # Errors
    /// A missing privilege or module; a lost or malformed answer.
    pub fn look(netns: &str, policy: &Policy) -> Result<(Self, Scope)> {
        let mut tables = Tables::open()?;
        let unseen = containers::join(&mut tables.sockets)?;
        let rules = Ruleset::read();
        tables.follow_tracking(&rules);
        let listeners = tables.sockets.listeners()?;
        let proxies = tables.sockets.proxies().clone();
        let proxied = match proxies.is_empty() {
            false => tables.sockets.transparent()?.iter().map(Socket::connection).collect(),
            true => HashSet::new(),
        };
        let mut scope = policy.scope(&listeners);
        let sockets = tables.sockets.sockets(States::connected())?;
        scope.ports.extend(tables.served_without_listener(&sockets, &scope, policy)?);
        let mut snapshot = tables.with_entries(sockets, &mut scope, policy, Over::Each)?;
        let mut ledger = Ledger::new(Defence::Auto, policy.zone);
        ledger.note(&snapshot);
        tables.play(&mut snapshot, &ledger);
        let was_doubtful = make_sure(&mut tables, &mut snapshot, &scope, policy, &ledger)?;
        let limiter = Limiter::of(&rules);
        let behind = behind(&tables, &snapshot);
        let mut plays = Plays::new(&limiter, &rules).behind(&behind).beside(&snapshot.evidence);
        let class = |view: &View| {
            let evidence = &snapshot.evidence;
            Class::of(view, cell(view, evidence, &scope, policy, &ledger), evidence)
        };
        if was_doubtful {
            let mut ways = Ways::open()?;
            snapshot.views.retain(|view| {
                class(view) != Class::Untracked || ways.are_ours(view, &behind, &mut plays)
            });
        }
        let sockets = snapshot.views.iter().filter_map(|view| view.socket);
        let owners = Owners::look(sockets, &listeners);
        let behind = self::behind(&tables, &snapshot);
        let arrivals = arrivals(&rules, snapshot.views.iter(), &behind)?;
        let fronts = fronts(snapshot.views.iter(), &behind)?;
        let outgoing = Survey::look(&mut tables, &scope, policy)?;
        let links = links()?;
        let guests = Guests::look(&mut tables.sockets, &links)?;
        let seen = Self {
            netns: if netns.is_empty() { own_namespace() } else { netns.to_owned() },
            kernel: nix::sys::utsname::uname()
                .map(|name| name.release().to_string_lossy().into_owned())
                .unwrap_or_default(),
            snapshot,
            ledger,
            listeners,
            proxied,
            proxies,
            limiter,
            rules,
            arrivals,
            links,
            fronts,
            figures: Some(Figures::read(&mut tables.conntrack)?),
            owners,
            told: Some(instance::ask("ctkeep")),
            asked: None,
            behind,
            guests,
            namespaces: tables.sockets.members().len(),
            unseen,
            has_ipv6: has_global_ipv6(),
            outgoing: Some(outgoing),
        };
        Ok((seen, scope))
    }

    /// Plays SYNs through the rules, with all that the look has shown.
    pub fn plays(&self) -> Plays<'_> {
        self.plays_as_seen().beside(&self.snapshot.evidence)
    }

    /// The same, where each connection stands for itself: what its siblings asked for says nothing of it.
    pub fn plays_as_seen(&self) -> Plays<'_> {
        Plays::new(&self.limiter, &self.rules).arriving(&self.arrivals).behind(&self.behind)
    }
}

/// Local addresses of other namespaces whose sockets were looked at.
pub fn behind(tables: &Tables, snapshot: &Snapshot) -> HashSet<IpAddr> {
    let all = snapshot.views.iter().map(|view| view.connection.local.addr());
    all.filter(|addr| tables.sockets.is_of_member(*addr)).collect()
}

/// A connection that closes in an orderly way leaves the two tables microseconds apart; a packet is
/// judged by conntrack before TCP has it.
const SETTLE: Duration = Duration::from_millis(5);

/// Looks at every suspected disagreement again, exactly: dumps of a moving table lie. What is left
/// is looked at once more a little later: a disagreement is one that stays. Says whether there was any.
fn make_sure(
    tables: &mut Tables,
    snapshot: &mut Snapshot,
    scope: &Scope,
    policy: &Policy,
    ledger: &Ledger,
) -> Result<bool> {
    let mut before = Snapshot::default();
    let mut was_doubtful = false;
    for pause in [Duration::ZERO, SETTLE] {
        let suspects: Vec<Lookup> = snapshot
            .views
            .iter()
            .filter(|view| {
                let cell = cell(view, &snapshot.evidence, scope, policy, ledger);
                let class = Class::of(view, cell, &snapshot.evidence);
                !matches!(class, Class::Agree | Class::Offloaded)
            })
            .map(|view| Lookup {
                connection: view.connection,
                interface: view.socket.map_or(0, |socket| socket.interface),
            })
            .collect();
        if suspects.is_empty() {
            break;
        }
        thread::sleep(pause);
        let exact = tables.exactly_again(&suspects, ledger, &before)?.into_snapshot();
        snapshot.evidence.opened_here.clone_from(&exact.evidence.opened_here);
        snapshot.evidence.direct.clone_from(&exact.evidence.direct);
        let found: HashMap<Connection, View> =
            exact.views.iter().map(|view| (view.connection, view)).collect();
        let newest = |view: View| found.get(&view.connection).copied().unwrap_or(view);
        snapshot.views = snapshot.views.iter().map(newest).collect();
        before = exact;
        was_doubtful = true;
    }
    if was_doubtful {
        snapshot.views.retain(|view| view.socket.is_some() || view.entry.is_some());
        tables.play(snapshot, ledger);
    }
    Ok(was_doubtful)
}

/// What `ip netns identify` cannot name has at least a number.
fn own_namespace() -> String {
    std::fs::read_link("/proc/thread-self/ns/net")
        .map(|link| link.to_string_lossy().into_owned())
        .unwrap_or_default()
}
