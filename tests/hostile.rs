//! A kernel that lies, breaks off or never ends, at every step of a sweep and its repairs: it may
//! fail them, but never makes a wrong one, and the next sweep on a sound kernel repairs what is left.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

mod played;

use std::cell::RefCell;
use std::collections::{HashSet, VecDeque};
use std::io;
use std::ops::Range;
use std::rc::Rc;
use std::time::{Duration, Instant};

use ctkeep::conntrack::{Entry, Tcp, TcpState, decode};
use ctkeep::firewall::limits::Limiter;
use ctkeep::firewall::{Key, Ruleset, nft_chains};
use ctkeep::flow::{Endpoint, FourTuple};
use ctkeep::netlink::{Conversation, Request, Transport};
use ctkeep::reconcile::apply::Outcome;
use ctkeep::reconcile::keeper::{Acted, Depth, Keeper, Settings, Trigger, Witness};
use ctkeep::reconcile::plan::Action;
use ctkeep::reconcile::policy::Policy;
use ctkeep::reconcile::pressure::Defence;
use ctkeep::sockdiag::{Socket, State};
use ctkeep::{Op, Result};
use played::host::{Host, Shared, tuple};
use played::{
    CT_DELETE, CT_NEW, ENOBUFS, ENOENT, ENOMEM, EPERM, NLM_F_DUMP_INTR, NLMSG_DONE, NLMSG_ERROR,
    NLMSG_NOOP, NLMSG_OVERRUN, Played, attribute, descend, entry, flow, nest, outgoing_entry,
    requests, reversed_entry, socket, u16_at, u32_at,
};

const EINTR: i32 = 4;
const EAGAIN: i32 = 11;
const PORT: u16 = 80;

/// One lie, told in place of one datagram.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Lie {
    /// This field of the header of this many of its messages (all where 0) becomes this number.
    Header(Field, u32),
    /// Bits of the flags are set.
    Flags(u16),
    /// Cut to so many bytes.
    Cut(usize),
    /// So many bytes behind it.
    Grow(usize),
    /// It never comes.
    Nothing,
    /// Only what came first comes; nothing any more.
    Silence,
    Twice,
    /// In place of the one behind it, and that in its place.
    Late,
    /// Receiving fails.
    Errno(i32),
    /// It does not fit.
    Truncated,
    /// All zeros.
    Zeros,
    /// An acknowledgement, or the end of a dump.
    Done(u16),
    /// A refusal.
    Refusal(i32),
    /// It tells of another connection: the peer's port is another one.
    AnotherTuple,
    /// Of the same connection, and another socket.
    AnotherCookie,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Field {
    Length,
    Kind,
    Sequence,
    Port,
}

fn lies() -> Vec<Lie> {
    use Field::*;
    use Lie::*;
    let mut all = lasting_lies();
    all.extend([0, 15, 17, 20, 60, u32::MAX - 3].map(|length| Header(Length, length)));
    all.extend([NLMSG_OVERRUN, 19, 0x105].map(|kind| Header(Kind, kind.into())));
    all.extend([0, 1 << 20, 1 << 31].map(|seq| Header(Sequence, seq)));
    all.extend([0x100, 0x200].map(Flags));
    all.extend([0, 8, 16, 20, 36, 80].map(Cut));
    all.extend([1, 4, 16].map(Grow));
    all.extend([Truncated, Zeros]);
    all.extend([ENOBUFS, ENOMEM, EPERM, 17].map(Refusal));
    all
}

/// Those that are also told from some step on.
fn lasting_lies() -> Vec<Lie> {
    use Lie::*;
    let mut all = vec![Nothing, Silence, Twice, Late, AnotherTuple, AnotherCookie];
    all.extend([NLMSG_NOOP, 20, CT_NEW].map(|kind| Header(Field::Kind, kind.into())));
    all.push(Header(Field::Port, 1));
    all.push(Flags(NLM_F_DUMP_INTR));
    all.extend([ENOBUFS, EINTR, ENOMEM, EPERM].map(Errno));
    all.extend([NLMSG_ERROR, NLMSG_DONE].map(Done));
    all.push(Refusal(ENOENT));
    all
}

/// What passes between ctkeep and the kernel, on both sockets.
#[derive(Default)]
struct Wire {
    /// Datagrams received so far.
    received: usize,
    /// What is told in place of which datagram, and of so many behind it.
    lie: Option<(Lie, Range<usize>)>,
    silent: bool,
    /// The connections whose sockets were looked up, and those whose entries were to be changed.
    looked_up: HashSet<FourTuple>,
    changed: Vec<FourTuple>,
}

/// One socket of the lying kernel.
struct Liar {
    kernel: Played,
    wire: Rc<RefCell<Wire>>,
    is_conntrack: bool,
    late: VecDeque<Vec<u8>>,
}

impl Transport for Liar {
    fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        let mut wire = self.wire.borrow_mut();
        for request in requests(datagram) {
            if !self.is_conntrack {
                if !request.is_dump() {
                    wire.looked_up.insert(asked_socket(&request.body));
                }
            } else if [CT_NEW, CT_DELETE].contains(&request.kind) {
                let body = &request.body[4..];
                wire.changed.push(tuple(descend(body, &[1]).expect("never without a tuple")));
            }
        }
        self.kernel.send(datagram)
    }

    fn recv(&mut self, datagram: &mut Vec<u8>) -> io::Result<()> {
        let (lie, silent) = {
            let mut wire = self.wire.borrow_mut();
            let step = wire.received;
            wire.received += 1;
            let lie = wire.lie.clone().filter(|(_, steps)| steps.contains(&step));
            let lie = lie.map(|(lie, _)| lie);
            wire.silent |= lie == Some(Lie::Silence);
            (lie, wire.silent)
        };
        if silent {
            // What the kernel had to say is lost.
            while self.kernel.recv(datagram).is_ok() {}
            return Err(io::Error::from_raw_os_error(EAGAIN));
        }
        if let Some(late) = self.late.pop_front() {
            *datagram = late;
            return Ok(());
        }
        match lie {
            Some(Lie::Errno(errno)) => return Err(io::Error::from_raw_os_error(errno)),
            Some(Lie::Truncated) => return Err(io::Error::from(io::ErrorKind::InvalidData)),
            Some(Lie::Nothing) => {
                self.kernel.recv(&mut Vec::new())?;
                return self.kernel.recv(datagram);
            }
            Some(Lie::Late) => {
                let mut first = Vec::new();
                self.kernel.recv(&mut first)?;
                self.late.push_back(first);
                return match self.kernel.recv(datagram) {
                    Ok(()) => Ok(()),
                    Err(_) => self.recv(datagram),
                };
            }
            _ => self.kernel.recv(datagram)?,
        }
        if let Some(lie) = lie {
            self.tell(lie, datagram);
        }
        Ok(())
    }
}

impl Liar {
    fn tell(&mut self, lie: Lie, bytes: &mut Vec<u8>) {
        let whole = bytes.len() >= 16;
        match lie {
            Lie::Header(field, value) if whole => {
                let (at, value) = match field {
                    Field::Length => (0, value.to_ne_bytes().to_vec()),
                    Field::Kind => (4, (value as u16).to_ne_bytes().to_vec()),
                    // By so much.
                    Field::Sequence => {
                        let seq = u32_at(bytes, 8).wrapping_add(value.max(2) / 2 * 2 - 1);
                        (8, seq.to_ne_bytes().to_vec())
                    }
                    Field::Port => (12, value.to_ne_bytes().to_vec()),
                };
                bytes[at..at + value.len()].copy_from_slice(&value);
            }
            Lie::Flags(flags) if whole => {
                let flags = u16_at(bytes, 6) | flags;
                bytes[6..8].copy_from_slice(&flags.to_ne_bytes());
            }
            Lie::Cut(length) => bytes.truncate(length),
            Lie::Grow(length) => bytes.resize(bytes.len() + length, 0xa5),
            Lie::Twice => self.late.push_back(bytes.clone()),
            Lie::Zeros => bytes.fill(0),
            Lie::Done(kind) if whole => {
                *bytes = played::message(kind, 0, u32_at(bytes, 8), &[0; 20]);
            }
            Lie::Refusal(errno) if whole => *bytes = played::refusal(u32_at(bytes, 8), errno),
            Lie::AnotherTuple if !self.is_conntrack && bytes.len() >= 88 => bytes[16 + 6] ^= 0x40,
            Lie::AnotherTuple if self.is_conntrack => another_tuple(bytes),
            Lie::AnotherCookie if !self.is_conntrack && bytes.len() >= 88 => bytes[16 + 44] ^= 0x40,
            _ => {}
        }
    }
}

/// Every port of the peers' becomes another one.
fn another_tuple(bytes: &mut [u8]) {
    for at in 0..bytes.len().saturating_sub(1) {
        if (4000..4100).contains(&u16::from_be_bytes([bytes[at], bytes[at + 1]])) {
            bytes[at] ^= 0x40;
        }
    }
}

/// The connection that a look-up by `struct inet_diag_req_v2` asks for.
fn asked_socket(body: &[u8]) -> FourTuple {
    let end = |port: usize, at: usize| {
        let addr = <[u8; 4]>::try_from(&body[at..at + 4]).unwrap();
        Endpoint::new(addr.into(), u16::from_be_bytes([body[port], body[port + 1]]))
    };
    FourTuple::new(end(8, 12), end(10, 28))
}

fn peer(port: u16) -> FourTuple {
    flow(&format!("192.0.2.1:{PORT}"), &format!("198.51.100.7:{port}"))
}

fn ours(entry: Entry) -> Entry {
    Entry { tcp: entry.tcp.map(|tcp| Tcp { flags: [0x88, 0x88], ..tcp }), ..entry }
}

/// One connection for each thing that can be wrong, and some that are none of our business.
fn host() -> Host {
    let of = |flow: FourTuple, state, cookie| {
        socket(&flow.src.to_string(), &flow.dst.to_string(), state, cookie)
    };
    let elsewhere = flow("192.0.2.1:22", "198.51.100.7:4060");
    let sockets = vec![
        socket(&format!("0.0.0.0:{PORT}"), "0.0.0.0:0", State::Listen, 1),
        of(peer(4000), State::CloseWait, 10),
        of(peer(4001), State::CloseWait, 11),
        of(peer(4002), State::CloseWait, 12),
        of(peer(4003), State::CloseWait, 13),
        of(peer(4004), State::Established, 14),
        of(peer(4005), State::CloseWait, 15),
        // Closed by its application.
        Socket { inode: 0, ..of(peer(4006), State::LastAck, 16) },
        of(peer(4007), State::CloseWait, 17),
        of(elsewhere, State::CloseWait, 18),
    ];
    let entries = vec![
        entry(peer(4000), TcpState::Close, 9),
        // 4001 has none.
        reversed_entry(peer(4002), TcpState::Established, 300),
        entry(peer(4003), TcpState::CloseWait, 55),
        entry(peer(4004), TcpState::TimeWait, 100),
        entry(peer(4005), TcpState::CloseWait, 5),
        entry(peer(4006), TcpState::LastAck, 20),
        outgoing_entry(peer(4007), TcpState::CloseWait, 50),
        // Dialled from a port on which nothing listens.
        outgoing_entry(elsewhere, TcpState::Close, 9),
        // A former life held it; its socket is gone.
        ours(entry(peer(4008), TcpState::CloseWait, 50)),
        entry(peer(4009), TcpState::Established, 4000),
    ];
    Host { sockets, entries, ..Host::default() }
}

/// What a right sweep repairs.
fn wrong() -> HashSet<FourTuple> {
    [4000, 4001, 4002, 4004, 4005, 4008].map(peer).into()
}

struct World {
    host: Shared,
    keeper: Keeper<Liar>,
    wire: Rc<RefCell<Wire>>,
    now: Instant,
}

/// The repairs of a sweep.
#[derive(Default)]
struct Repairs(Vec<Outcome>);

impl Witness for Repairs {
    fn seen(&mut self, _ports: &HashSet<u16>, _half_closed: Option<&[Socket]>) {}

    fn acted(&mut self, acted: Acted) {
        self.0.extend(acted.outcomes);
    }

    fn planned(&mut self, _actions: &[Action], _trigger: Trigger) {}
}

impl World {
    fn new() -> Self {
        let wire = Rc::<RefCell<Wire>>::default();
        let (host, tables) = host().open_by(|kernel, is_conntrack| Liar {
            kernel,
            wire: wire.clone(),
            is_conntrack,
            late: VecDeque::new(),
        });
        let settings = Settings {
            policy: Policy::default(),
            sweep_interval: Duration::from_secs(1),
            deep_interval: Duration::from_secs(30),
            dry_run: false,
        };
        let (recounter, defence, now) = (None, Defence::Auto, Instant::now());
        let keeper = Keeper::new(tables, recounter, settings, defence, now, || 0).unwrap();
        Self { host, keeper, wire, now }
    }

    /// A sweep with its repairs.
    fn sweep(&mut self, depth: Depth) -> Result<Vec<Outcome>> {
        let lie = self.wire.take().lie;
        self.wire.borrow_mut().lie = lie;
        let mut repairs = Repairs::default();
        self.keeper.sweep(depth, self.now, &mut repairs)?;
        Ok(repairs.0)
    }

    /// Whatever was sent to the kernel was right.
    fn assert_nothing_wrong_done(&self, case: &str) {
        let wire = self.wire.borrow();
        for orig in &wire.changed {
            let (one, other) = (*orig, orig.inverse());
            assert!(
                wire.looked_up.contains(&one) || wire.looked_up.contains(&other),
                "{case}: {orig} changed without a look at its socket"
            );
            assert!(
                wrong().contains(&one) || wrong().contains(&other),
                "{case}: {orig} was right, or none of our business"
            );
        }
        let before = host();
        for entry in &before.entries {
            if !wrong().contains(&entry.reply) && !wrong().contains(&entry.orig) {
                assert!(self.host.borrow().entries.contains(entry), "{case}: {entry:?} is changed");
            }
        }
    }

    fn assert_all_repaired(&self, case: &str) {
        let host = self.host.borrow();
        for flow in wrong() {
            let entry = host.entries.iter().find(|entry| entry.reply == flow);
            let state = entry.and_then(Entry::state);
            let wanted = match flow.dst.port() {
                4004 => TcpState::Established,
                4008 => TcpState::Close,
                _ => TcpState::CloseWait,
            };
            assert_eq!(state, Some(wanted), "{case}: {flow}");
        }
    }
}

/// A sweep in which `lie` is told in place of the datagrams of these steps, then sound ones.
/// Whether the lie was noticed.
fn lied_to(lie: Lie, steps: Range<usize>, depth: Depth) -> bool {
    let case = format!("{lie:?} at {steps:?} of a {depth:?} sweep");
    let mut world = World::new();
    world.wire.borrow_mut().lie = Some((lie, steps));
    let swept = world.sweep(depth);
    let refused = |outcome: &Outcome| outcome.result.is_err();
    let noticed = swept.as_ref().map_or(true, |outcomes| outcomes.iter().any(refused));
    if let Err(error) = swept {
        let text = error.to_string();
        assert!(text.starts_with(error.op.verb) && text.len() > error.op.verb.len() + 2, "{text}");
    }
    world.assert_nothing_wrong_done(&case);
    world.wire.borrow_mut().lie = None;
    // A table that was said to be full lets inserts rest for a minute at most.
    world.now += Duration::from_secs(61);

    let outcomes = world.sweep(Depth::Deep).unwrap_or_else(|error| panic!("{case}, then: {error}"));
    assert!(outcomes.iter().all(|outcome| outcome.result.is_ok()), "{case}: {outcomes:?}");
    world.assert_nothing_wrong_done(&case);
    world.assert_all_repaired(&case);
    let again = world.sweep(Depth::Deep).unwrap();
    assert!(again.is_empty(), "{case}: {again:?}");
    noticed
}

fn steps(depth: Depth) -> usize {
    let mut world = World::new();
    world.sweep(depth).unwrap();
    world.assert_nothing_wrong_done("no lie");
    world.wire.borrow().received
}

#[test]
fn a_sound_kernel_is_repaired_by_one_sweep() {
    let mut world = World::new();
    world.sweep(Depth::Deep).unwrap();
    world.assert_all_repaired("no lie");
    let changed: HashSet<u16> =
        world.wire.borrow().changed.iter().map(|f| f.src.port().max(f.dst.port())).collect();
    assert_eq!(changed, [4000, 4001, 4002, 4004, 4005, 4008].into());
}

#[test]
fn one_lie_at_any_step_of_a_deep_sweep_makes_no_wrong_repair() {
    let steps = steps(Depth::Deep);
    assert!(steps > 30, "{steps} steps");
    let mut noticed = 0;
    for step in 0..steps {
        for lie in lies() {
            noticed += usize::from(lied_to(lie, step..step + 1, Depth::Deep));
        }
    }
    // Some do no harm: a padding that grows, an answer that comes twice.
    let told = steps * lies().len();
    assert!(noticed > told / 2, "{noticed} of {told}");
}

#[test]
fn one_lie_at_any_step_of_a_shallow_sweep_makes_no_wrong_repair() {
    for step in 0..steps(Depth::Shallow) {
        for lie in lies() {
            lied_to(lie, step..step + 1, Depth::Shallow);
        }
    }
}

#[test]
fn a_lie_told_from_some_step_on_makes_no_wrong_repair() {
    for step in 0..steps(Depth::Deep) {
        for lie in lasting_lies() {
            lied_to(lie, step..usize::MAX, Depth::Deep);
        }
    }
}

/// A kernel that answers a send by this datagram for ever.
struct Endless(Box<dyn Fn(u32) -> Vec<u8>>, Vec<u8>);

impl Transport for Endless {
    fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        self.1 = self.0(requests(datagram)[0].seq);
        Ok(())
    }

    fn recv(&mut self, datagram: &mut Vec<u8>) -> io::Result<()> {
        datagram.clone_from(&self.1);
        Ok(())
    }
}

#[test]
fn an_answer_without_end_is_an_error() {
    let request = Request {
        op: Op::new("question"),
        kind: played::CT_GET,
        flags: 0,
        body: vec![2, 0, 0, 0],
        joined: false,
    };
    let endless = |kind| {
        let endless = move |seq| played::message(kind, 2, seq, &[0; 60_000]);
        Conversation::new(Endless(Box::new(endless), Vec::new()))
    };
    let dumped = endless(CT_NEW).dump(&request, |(): &mut (), _| Ok(()));
    let asked = endless(NLMSG_NOOP).execute(&request);
    let done = endless(NLMSG_NOOP).transaction(&request, std::slice::from_ref(&request), &request);
    for result in [dumped, asked, done] {
        assert_eq!(result.unwrap_err().to_string(), "question: malformed answer: it has no end");
    }
}

#[test]
fn a_tuple_of_two_address_families_is_malformed() {
    let mut bytes = played::entry_payload(&entry(peer(4000), TcpState::CloseWait, 60));
    assert!(decode::entry(&bytes).unwrap().is_some());
    // The destination of the first tuple: CTA_IP_V4_DST becomes CTA_IP_V6_DST of 16 bytes.
    let at = bytes.windows(4).position(|four| four == [8, 0, 2, 0]).unwrap();
    let v6 = played::attribute(4, &[0x20; 16]);
    let more = (v6.len() - 8) as u16;
    bytes.splice(at..at + 8, v6);
    for nest in [4, 8] {
        let length = u16_at(&bytes, nest) + more;
        bytes[nest..nest + 2].copy_from_slice(&length.to_ne_bytes());
    }
    let error = decode::entry(&bytes).unwrap_err().to_string();
    assert!(error.contains("one family"), "{error}");
}

/// A dynamic set that counts by the source, with a mask of 20 bytes.
#[test]
fn a_mask_in_a_rule_dump_is_never_longer_than_its_address() {
    let number = |kind, value: u32| attribute(kind, &value.to_be_bytes());
    let text = |kind, text: &str| attribute(kind, format!("{text}\0").as_bytes());
    let expression = |name, parts: &[Vec<u8>]| nest(1, &[text(1, name), nest(2, parts)]);
    let rule = [
        expression("payload", &[number(1, 1), number(2, 1), number(3, 12), number(4, 4)]),
        expression("bitwise", &[number(1, 1), number(2, 1), nest(4, &[attribute(1, &[0xff; 20])])]),
        expression(
            "dynset",
            &[
                text(1, "s"),
                number(4, 1),
                nest(7, &[text(1, "connlimit"), nest(2, &[number(1, 10), number(2, 1)])]),
            ],
        ),
    ];
    let chain = [text(1, "t"), text(3, "in"), nest(4, &[number(1, 1), number(2, 0)])];
    let rule = [text(1, "t"), text(2, "in"), nest(4, &rule)];
    let set = [text(1, "t"), text(2, "s"), number(5, 4)];
    let kernel = played::obliging(move |request| {
        let (kind, parts): (u16, &[Vec<u8>]) = match request.kind & 0xff {
            4 => (3, &chain),
            7 => (6, &rule),
            10 => (9, &set),
            _ => return Ok(Vec::new()),
        };
        let payload = [vec![2, 0, 0, 0], parts.concat()].concat();
        Ok(vec![played::message(10 << 8 | kind, 2, request.seq, &payload)])
    });
    let chains = nft_chains(&mut Conversation::new(kernel)).unwrap();
    let limiter = Limiter::of(&Ruleset { chains, unread: Vec::new() });
    assert_eq!(limiter.rules[0].limit.key, Key::Source(32));
    assert_eq!((limiter.prefix(true), limiter.prefix(false)), (Some(32), None));
}
