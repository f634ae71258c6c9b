//! What the daemon is told, by whether a reload can change it.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::Duration;

use crate::host::netns::Namespace;
use crate::host::privileges::{self, Capability};
use crate::overload::Overload;
use crate::reconcile::keeper;
use crate::reconcile::policy::Policy;
use crate::reconcile::pressure::Defence;
use crate::recount;
use crate::watch::EventSource;

/// What becomes of held entries at the end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum OnExit {
    /// They live out their lease.
    #[default]
    Keep,
    /// They get the timeout that the kernel would have given them.
    Release,
}

/// Whether FINs and RSTs that TCP does not act on are kept from conntrack.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum ShieldMode {
    /// Where the kernel allows it.
    Auto,
    /// Always: the daemon refuses to start without it.
    On,
    /// Never.
    #[default]
    Off,
}

/// Everything that the daemon is told.
#[derive(Clone, Debug)]
pub struct Settings {
    /// What a reload cannot change.
    pub foundation: Foundation,
    /// What a reload puts in force.
    pub live: Live,
}

/// Set up once, at the start: a reload that changes any of it is refused.
#[derive(Clone, Debug)]
pub struct Foundation {
    /// How the limiter is made to count again.
    pub recount: recount::Mode,
    /// Name of the helper device and of the nftables table.
    pub device: String,
    /// Event source.
    pub events: EventSource,
    /// Whether changes of the firewall's rules are followed.
    pub follow_rules: bool,
    /// NFLOG group of the source `nflog`.
    pub nflog_group: u16,
    /// Shield.
    pub shield: ShieldMode,
    /// The bit of the packet mark that the shield works with.
    pub shield_mark: u32,
    /// Observe, count and log; change nothing.
    pub dry_run: bool,
    /// Defence level.
    pub defence: Defence,
    /// Whether workers run with real-time priority.
    pub realtime: bool,
    /// The folder that the history is kept in.
    pub history: Option<PathBuf>,
    /// Bytes that it may take.
    pub history_room: u64,
    /// Where metrics and the status page are served.
    pub metrics_listen: Option<SocketAddr>,
}

/// What a reload puts in force while the daemon runs.
#[derive(Clone, Debug)]
pub struct Live {
    /// Scope and lease.
    pub policy: Policy,
    /// Time from one look at half-closed sockets to the next.
    pub sweep_interval: Duration,
    /// Time from one look at every socket in scope to the next.
    pub deep_interval: Duration,
    /// What becomes of held entries at the end.
    pub on_exit: OnExit,
    /// Namespaces to guard beside the own one: each on its own, and its connections in the own table.
    pub namespaces: Vec<Namespace>,
    /// Whether the connections of containers in the own table are guarded, without naming them.
    pub containers: bool,
    /// Whether the entries of half-closed connections that this host opened are kept, too.
    pub outgoing: bool,
    /// Sources that hold too much, and the sets that they are put into.
    pub overloads: Vec<Overload>,
    /// The file that metrics are written to.
    pub metrics_textfile: Option<PathBuf>,
    /// Whether the status page names peers.
    pub status_addresses: bool,
}

impl Settings {
    /// What the daemon must be permitted as long as it runs.
    pub(super) fn privileges(&self, needs_bpf: bool) -> Vec<Capability> {
        let mut all = vec![Capability::CAP_NET_ADMIN, Capability::CAP_NET_RAW];
        if needs_bpf {
            all.push(Capability::CAP_BPF);
        }
        if self.live.enters_others() {
            // To find them and to enter them whenever they come back, by paths such as
            // /proc/PID/ns/net or below a user's own directory.
            all.extend(privileges::ELSEWHERE);
        }
        if self.foundation.realtime {
            all.push(Capability::CAP_SYS_NICE);
        }
        all
    }

    /// The namespaces whose own tables are guarded: always that which ctkeep was started in.
    pub(super) fn guarded(&self) -> impl Iterator<Item = Namespace> {
        std::iter::once(Namespace::Own).chain(self.live.namespaces.clone())
    }
}

impl Foundation {
    /// The keys whose values are others in `new`.
    pub(super) fn changed(&self, new: &Self) -> Vec<&'static str> {
        // A key that is added is missed here by the compiler.
        let Self {
            recount,
            device,
            events,
            follow_rules,
            nflog_group,
            shield,
            shield_mark,
            dry_run,
            defence,
            realtime,
            history,
            history_room,
            metrics_listen,
        } = self;
        let keys = [
            ("recount", *recount == new.recount),
            ("device", *device == new.device),
            ("events", *events == new.events),
            ("follow-rules", *follow_rules == new.follow_rules),
            ("nflog-group", *nflog_group == new.nflog_group),
            ("shield", *shield == new.shield),
            ("shield-mark", *shield_mark == new.shield_mark),
            ("dry-run", *dry_run == new.dry_run),
            ("defence", *defence == new.defence),
            ("realtime", *realtime == new.realtime),
            ("history", *history == new.history),
            ("history-room", *history_room == new.history_room),
            ("metrics-listen", *metrics_listen == new.metrics_listen),
        ];
        keys.into_iter().filter(|(_, is_same)| !is_same).map(|(key, _)| key).collect()
    }
}

impl Live {
    /// Whether other namespaces than the own one are to be entered.
    pub(super) const fn enters_others(&self) -> bool {
        self.containers || !self.namespaces.is_empty()
    }

    /// What the keeper goes by.
    pub(super) fn keeper(&self, dry_run: bool) -> keeper::Settings {
        keeper::Settings {
            policy: self.policy.clone(),
            sweep_interval: self.sweep_interval,
            deep_interval: self.deep_interval,
            dry_run,
        }
    }
}
