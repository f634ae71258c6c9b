//! The two tables through the library: the sweep, the repair of many, the whole dump.

#[path = "../tests/lab/mod.rs"]
mod lab;
mod report;
mod traffic;

use std::cell::{Cell, RefCell};
use std::collections::HashSet;
use std::io;
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::{Duration, Instant};

use ctkeep::Op;
use ctkeep::conntrack::{Change, Conntrack, Entry, Filter, TcpState};
use ctkeep::flow::AF_INET;
use ctkeep::netlink::{KernelSocket, Transport};
use ctkeep::reconcile::keeper::{Acted, Depth, Keeper, Settings, Trigger, Witness};
use ctkeep::reconcile::observe::Tables;
use ctkeep::reconcile::plan::Action;
use ctkeep::reconcile::policy::{Policy, Scope};
use ctkeep::reconcile::pressure::Defence;
use ctkeep::reconcile::whole::{By, Reading};
use ctkeep::recount::{Mode, Recounter};
use ctkeep::sockdiag::{Lookup, SockDiag, Socket, State, States};
use netlink_sys::protocols::{NETLINK_NETFILTER, NETLINK_SOCK_DIAG};

use lab::{Lab, SERVER_V4, passing};
use report::Target;

/// Half-closed sockets, from so many addresses.
const GUARDED: usize = 5_000;
const SOURCES: u8 = 125;
/// Entries in the table for the sweep and the repair, and for the dump.
const TABLE: usize = 180_000;
const WHOLE_TABLE: usize = 200_000;

const SWEEPS: usize = 60;
const REPAIRS: usize = 7;
const DUMPS: usize = 7;
/// `conntrack -U` reads the whole table for each.
const UPDATES: usize = 2;

fn main() {
    lab::serve_if_asked();
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 1_000);
    traffic::widen_ports(&lab);
    let sources = traffic::own_addresses(&lab, SOURCES);
    let mut server = lab.serve("0.0.0.0:80");
    traffic::half_close(&lab, &mut server, 80, &sources, GUARDED);
    lab.server.within(|| {
        let mut bench = Bench::open();
        bench.change(&passing::entries(0..TABLE - GUARDED));
        bench.keep_alive();
        bench.sweep();
        bench.repair(&lab);
        bench.keep_alive();
        bench.change(&passing::entries(TABLE - GUARDED..WHOLE_TABLE - GUARDED));
        bench.dump(&lab);
    });
    assert_eq!(server.held(), GUARDED, "the server's sockets");
}

/// What was sent, for everybody who shares it.
#[derive(Debug, Default)]
struct Sent {
    sends: Cell<usize>,
    messages: Cell<usize>,
    dumps: Cell<usize>,
    last: RefCell<Vec<u8>>,
}

/// A kernel socket that counts.
struct Counting {
    socket: KernelSocket,
    sent: Rc<Sent>,
}

impl Counting {
    fn open(family: isize) -> (Self, Rc<Sent>) {
        let socket = KernelSocket::open(Op::new("open for measurement"), family).expect("socket");
        let sent = Rc::<Sent>::default();
        (Self { socket, sent: Rc::clone(&sent) }, sent)
    }
}

impl Transport for Counting {
    fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        const NLM_F_DUMP: u16 = 0x300;
        let sent = &self.sent;
        sent.sends.set(sent.sends.get() + 1);
        let mut rest = datagram;
        while let Some((length, flags)) = header(rest) {
            sent.messages.set(sent.messages.get() + 1);
            sent.dumps.set(sent.dumps.get() + usize::from(flags & NLM_F_DUMP == NLM_F_DUMP));
            rest = rest.get(length.next_multiple_of(4)..).unwrap_or_default();
        }
        sent.last.replace(datagram.to_vec());
        self.socket.send(datagram)
    }

    fn recv(&mut self, datagram: &mut Vec<u8>) -> io::Result<()> {
        self.socket.recv(datagram)
    }
}

/// Length and flags of the first netlink message.
fn header(bytes: &[u8]) -> Option<(usize, u16)> {
    let length = u32::from_ne_bytes(bytes.get(..4)?.try_into().ok()?);
    let flags = u16::from_ne_bytes(bytes.get(6..8)?.try_into().ok()?);
    Some((usize::try_from(length).ok()?.max(16), flags))
}

/// Counts what the keeper has done.
#[derive(Default)]
struct Deeds {
    whole: usize,
    incomplete: usize,
}

impl Witness for Deeds {
    fn seen(&mut self, _ports: &HashSet<u16>, _half_closed: Option<&[Socket]>) {}

    fn acted(&mut self, acted: Acted) {
        for outcome in &acted.outcomes {
            // The kernel may have picked a connection up anew: that one is turned, not revived, and
            // not sealed.
            let is_whole = outcome.result.is_ok() && matches!(outcome.recount, Some(Ok(_)));
            *(if is_whole { &mut self.whole } else { &mut self.incomplete }) += 1;
        }
    }

    fn planned(&mut self, _actions: &[Action], _trigger: Trigger) {}
}

struct Bench {
    keeper: Keeper<Counting>,
    entries: Rc<Sent>,
    sockets: Rc<Sent>,
}

impl Bench {
    fn open() -> Self {
        let (conntrack, entries) = Counting::open(NETLINK_NETFILTER);
        let (diag, sockets) = Counting::open(NETLINK_SOCK_DIAG);
        let tables = Tables {
            conntrack: Conntrack::new(conntrack),
            sockets: SockDiag::new(diag),
            homes: Vec::new(),
            tracking: None,
        };
        let settings = Settings {
            policy: Policy::default(),
            sweep_interval: Duration::from_secs(1),
            deep_interval: Duration::from_secs(30),
            dry_run: false,
        };
        let now = Instant::now();
        let recounter = Recounter::open(Mode::Auto, "ctbench0", now).expect("recount");
        let keeper = Keeper::new(tables, recounter, settings, Defence::Auto, now, || 0);
        Self { keeper: keeper.expect("keeper"), entries, sockets }
    }

    fn change(&mut self, changes: &[Change]) {
        for result in self.keeper.tables.conntrack.change(changes).expect("changes") {
            result.expect("change");
        }
    }

    /// Gives the guarded entries a timeout that needs no renewal for as long as this runs.
    fn keep_alive(&mut self) {
        self.set(TcpState::CloseWait);
    }

    /// Sets the state of all guarded entries.
    fn set(&mut self, state: TcpState) {
        // What a repair before it has left half done is put right first.
        self.keeper.suspect_all();
        let mut deeds = Deeds::default();
        self.keeper.sweep(Depth::Shallow, Instant::now(), &mut deeds).expect("sweep");
        let found = self.guarded();
        let timeout = Duration::from_secs(600);
        let changes: Vec<_> = found
            .iter()
            .map(|entry| Change::Update { key: entry.key(), state, status: None, timeout })
            .collect();
        assert_eq!(changes.len(), GUARDED, "guarded entries");
        self.change(&changes);
    }

    /// The entries of the guarded sockets.
    fn guarded(&mut self) -> Vec<Entry> {
        let (tables, scope, policy, ledger) = self.keeper.parts();
        let sockets = tables.half_closed(scope, policy, ledger).expect("sockets");
        let lookups: Vec<_> = sockets.iter().map(Lookup::from).collect();
        let snapshot = tables.exactly(&lookups, ledger).expect("look-ups");
        snapshot.views.iter().filter_map(|view| view.entry).collect()
    }

    /// As the daemon sweeps, with nothing to do: by looks where something can have changed, and at
    /// everything that is watched, as without events.
    fn sweep(&mut self) {
        let mut deeds = Deeds::default();
        self.keeper.sweep(Depth::Deep, Instant::now(), &mut deeds).expect("deep sweep");
        let mut joins = Vec::new();
        for _ in 0..SWEEPS / 10 {
            let begun = Instant::now();
            let states = States::from_iter([State::CloseWait]);
            let all = Scope { ports: [80, 443, 8_080].into(), ..Scope::default() };
            let policy = self.keeper.settings().policy.clone();
            let snapshot =
                self.keeper.tables.whole(&mut all.clone(), &policy, states).expect("join");
            joins.push(report::ms(begun.elapsed()));
            assert_eq!(snapshot.views.len(), TABLE, "connections");
        }
        let join = report::median(&joins);
        report::heading("Sweep: 5 000 guarded sockets, table of 180 000, nothing to do");
        for (name, unseen, most) in
            [("sweep", Duration::MAX, 2.5), ("sweep without events", Duration::ZERO, 50.0)]
        {
            self.keeper.rely_on_events(unseen);
            self.keeper.rely_on_ends(unseen == Duration::MAX);
            self.keeper.suspect_all();
            // Those that ask for half-closed sockets once more.
            for _ in 0..3 {
                self.keeper.sweep(Depth::Shallow, Instant::now(), &mut deeds).expect("sweep");
            }
            let (mut times, mut busy) = (Vec::new(), Vec::new());
            let before = self.counts();
            for _ in 0..SWEEPS {
                let (begun, used) = (Instant::now(), report::cpu());
                self.keeper.sweep(Depth::Shallow, begun, &mut deeds).expect("sweep");
                times.push(report::ms(begun.elapsed()));
                busy.push(report::ms(report::cpu() - used));
            }
            assert_eq!(deeds.whole + deeds.incomplete, 0, "repairs");
            let after = self.counts();
            let median = report::median(&times);
            report::figure_beside(
                &format!("{name} (ratio: to a join of both whole tables)"),
                median,
                "ms",
                median / join,
                Target::AtMost(most),
            );
            let cpu = report::median(&busy);
            report::figure(&format!("{name}, CPU time"), cpu, "ms", Target::AtMost(most));
            let each = format!("{name}, per 1 000 guarded sockets");
            report::figure(&each, median / 5.0, "ms", Target::None);
            let names =
                ["conntrack dumps", "conntrack messages", "conntrack sends", "socket dumps"];
            for ((what, before), after) in names.iter().zip(before).zip(after) {
                let target =
                    if *what == "conntrack dumps" { Target::AtMost(0.0) } else { Target::None };
                let each =
                    f64::from(u32::try_from((after - before) / SWEEPS).expect("a small number"));
                report::figure(&format!("  {what}"), each, "", target);
            }
        }
        report::figure("join of both whole tables", join, "ms", Target::None);
    }

    fn counts(&self) -> [usize; 4] {
        let (entries, sockets) = (&self.entries, &self.sockets);
        [entries.dumps.get(), entries.messages.get(), entries.sends.get(), sockets.dumps.get()]
    }

    /// All entries closed at once, as by stale RSTs; found, revived, recounted and sealed.
    fn repair(&mut self, lab: &Lab) {
        let (mut rates, mut updates) = (Vec::new(), Vec::new());
        let (mut busy, mut incomplete) = (Vec::new(), 0);
        for round in 0..REPAIRS {
            self.set(TcpState::Close);
            let mut deeds = Deeds::default();
            self.keeper.suspect_all();
            let (begun, used) = (Instant::now(), report::cpu());
            self.keeper.sweep(Depth::Shallow, begun, &mut deeds).expect("sweep");
            rates.push(report::rate(GUARDED, begun.elapsed()));
            busy.push(report::rate(GUARDED, report::cpu() - used));
            incomplete += GUARDED - deeds.whole;
            if round < UPDATES {
                updates.push(update_by_tool(lab, self.guarded().first().copied()));
            }
        }
        let counted = self.guarded();
        let counted =
            counted.iter().filter(|entry| entry.state().is_some_and(TcpState::is_counted));
        assert_eq!(counted.count(), GUARDED, "counted entries");
        report::heading("Repair of 5 000 closed entries in a table of 180 000");
        let tool = report::median(&updates);
        let repair = report::median(&rates);
        report::figure_beside(
            "find, confirm, revive, recount, seal (ratio: to conntrack -U)",
            repair,
            "/s",
            repair / tool,
            Target::AtLeast(20_000.0),
        );
        let busy = report::median(&busy);
        report::figure("the same, by a second of CPU time", busy, "/s", Target::None);
        let incomplete = f64::from(u32::try_from(incomplete).expect("a small number"));
        report::figure("incomplete repairs in all rounds", incomplete, "", Target::AtMost(0.0));
        report::figure("conntrack -U, one after another", tool, "/s", Target::None);
    }

    /// Every entry of the table.
    fn dump(&mut self, lab: &Lab) {
        let all = Scope { ports: [80, 443, 8_080].into(), ..Scope::default() };
        let (mut raw, mut parsed, mut joined, mut tool) =
            (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (mut raw_busy, mut busy) = (Vec::new(), Vec::new());
        let (mut kept, mut kept_busy) = (Vec::new(), Vec::new());
        let policy = self.keeper.settings().policy.clone();
        self.read();
        let request = self.entries.last.borrow().clone();
        for _ in 0..DUMPS {
            let used = report::cpu();
            raw.push(receive_only(&request));
            raw_busy.push(report::ms(report::cpu() - used));
            let (begun, used) = (Instant::now(), report::cpu());
            assert_eq!(self.read(), WHOLE_TABLE, "entries");
            parsed.push(report::ms(begun.elapsed()));
            busy.push(report::ms(report::cpu() - used));
            let (begun, used) = (Instant::now(), report::cpu());
            let reading = Reading {
                by: By::Dump,
                scope: Scope { ports: [80, 81].into(), ..Scope::default() },
                policy: policy.clone(),
                aside: States::default(),
                of_members: Vec::new(),
                theirs: HashSet::new(),
                tracking: None,
            };
            let whole = self.keeper.tables.read(reading).expect("both tables");
            assert_eq!(whole.cookies.len(), GUARDED, "sockets");
            kept.push(report::ms(begun.elapsed()));
            kept_busy.push(report::ms(report::cpu() - used));
            let begun = Instant::now();
            let states = States::from_iter([State::CloseWait, State::Established]);
            let snapshot =
                self.keeper.tables.whole(&mut all.clone(), &policy, states).expect("join");
            joined.push(report::ms(begun.elapsed()));
            assert_eq!(snapshot.views.len(), WHOLE_TABLE, "connections");
            tool.push(list_by_tool(lab));
        }
        report::heading("Dump of 200 000 entries");
        report::figure(
            "receive loop that parses nothing",
            report::median(&raw),
            "ms",
            Target::None,
        );
        report::figure("conntrack -L >/dev/null", report::median(&tool), "ms", Target::None);
        for (name, times) in
            [("dump to values", &busy), ("both tables, as a deep sweep reads them", &kept_busy)]
        {
            report::ratio(
                &format!("{name}, CPU time"),
                report::median(times),
                "ms",
                report::paired(times, &raw_busy),
                Target::AtMost(1.05),
            );
        }
        for (name, times, is_judged) in [
            ("dump to values", &parsed, true),
            ("both tables, as a deep sweep reads them", &kept, true),
            ("dump, joined with the sockets (both families)", &joined, false),
        ] {
            let median = report::median(times);
            for (beside, others, bound) in
                [("receive loop", &raw, 1.05), ("conntrack -L", &tool, 0.6)]
            {
                let name = format!("{name}, to {beside}");
                let target = if is_judged || beside == "conntrack -L" {
                    Target::AtMost(bound)
                } else {
                    Target::None
                };
                report::ratio(&name, median, "ms", report::paired(times, others), target);
            }
        }
    }

    /// Reads all into memory.
    fn read(&mut self) -> usize {
        let all: Vec<Entry> = self
            .keeper
            .tables
            .conntrack
            .entries(AF_INET, Filter::Tcp, |all: &mut Vec<_>, entry| all.push(*entry))
            .expect("dump");
        all.len()
    }
}

/// The same dump, received and thrown away.
fn receive_only(request: &[u8]) -> f64 {
    const NLMSG_DONE: u16 = 3;
    let op = Op::new("open for measurement");
    let mut socket = KernelSocket::open(op, NETLINK_NETFILTER).expect("socket");
    let mut datagram = Vec::new();
    let begun = Instant::now();
    socket.send(request).expect("request");
    loop {
        socket.recv(&mut datagram).expect("part of the dump");
        // The end is a message of twenty bytes behind the last entry, or alone.
        let last = datagram.len().saturating_sub(20);
        let kind = datagram.get(last + 4..last + 6).and_then(|kind| kind.try_into().ok());
        let length = datagram.get(last..last + 4).and_then(|length| length.try_into().ok());
        if length.map(u32::from_ne_bytes) == Some(20)
            && kind.map(u16::from_ne_bytes) == Some(NLMSG_DONE)
        {
            return report::ms(begun.elapsed());
        }
    }
}

fn list_by_tool(lab: &Lab) -> f64 {
    let mut command = Command::new("conntrack");
    command.args(["-L", "-f", "ipv4", "-p", "tcp"]);
    let begun = Instant::now();
    let child = lab.server.spawn_with(&command, |command| {
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
    });
    assert!(child.expect("conntrack").wait().expect("conntrack").success(), "conntrack -L");
    report::ms(begun.elapsed())
}

/// Updates one entry by the tool; so many it would do a second.
fn update_by_tool(lab: &Lab, entry: Option<Entry>) -> f64 {
    let orig = entry.expect("an entry").orig;
    let begun = Instant::now();
    lab.server.run(&format!(
        "conntrack -U -p tcp -s {} -d {SERVER_V4} --sport {} --dport 80 -t 600",
        orig.src.addr(),
        orig.src.port()
    ));
    report::rate(1, begun.elapsed())
}
