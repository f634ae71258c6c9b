//! The shield alone: whatever a client sends, conntrack forgets no connection whose socket lives.
//!
//! ctkeep is stopped (SIGSTOP) as soon as it is ready, so nothing is repaired: what is not lost was
//! not lost in the first place. Each pattern is played with no pause between its packets, with a
//! tenth of a second, and in one batch, and beside it without ctkeep, where it gains connections.
//! docs/shield.md explains the patterns.

use crate::lab;
use std::thread;
use std::time::Duration;

use crate::lab::{ACK, Daemon, FIN, Lab, PSH, Peer, RST, RawConn, SYN, Server, Way, kernel};
use etherparse::{IpFragOffset, Ipv4Header, Ipv4Options};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const PORT: u16 = 80;
const LIMIT: usize = 5;
/// An answer to a SYN takes microseconds; its absence must be waited for.
const ANSWER: Duration = Duration::from_millis(150);
const SOON: Duration = Duration::from_secs(10);

/// What makes the stock conntrack forget. Every one begins on an ESTABLISHED connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pattern {
    /// A FIN, then an RST this far from it. Linux accepts 0 and 1.
    FinRst(i64),
    /// A FIN again, as a retransmission is, and the acknowledgement of what the server answers.
    FinFinAck,
    FinFinRst,
    /// So many bytes of TCP in the first one; in 8 there are no flags.
    FinRstInFragments(usize),
    /// IPv4 options, or an IPv6 extension header.
    FinRstWithOptions,
    FinSynRst,
    /// The rest leave the socket ESTABLISHED.
    HoleRst,
    HoleFinAck,
    /// The RST is at the end of the FIN: only what TCP has acknowledged selectively may do that.
    HoleRstBehind,
    AckRst,
    DataRst,
    DataFinRst,
}

impl Pattern {
    const ALL: [Self; 18] = [
        Self::FinRst(-1),
        Self::FinRst(-5),
        Self::FinRst(6),
        Self::FinRst(100),
        Self::FinRst(200_000),
        Self::FinRst(-200_000),
        Self::FinFinAck,
        Self::FinFinRst,
        Self::FinRstInFragments(8),
        Self::FinRstInFragments(24),
        Self::FinRstWithOptions,
        Self::FinSynRst,
        Self::HoleRst,
        Self::HoleFinAck,
        Self::HoleRstBehind,
        Self::AckRst,
        Self::DataRst,
        Self::DataFinRst,
    ];

    fn packets(self, conn: &RawConn) -> Vec<Vec<u8>> {
        let one = |flags, offset| conn.segment(flags, offset).to_packet();
        let fin = |offset| one(FIN | ACK, offset);
        let rst = |offset| one(RST, offset);
        let stale = kernel::stale_rst();
        let data = || {
            let mut segment = conn.segment(PSH | ACK, 0);
            segment.payload = b"a request".to_vec();
            segment.to_packet()
        };
        match self {
            Self::FinRst(offset) => vec![fin(0), rst(offset)],
            Self::FinFinAck => vec![fin(0), fin(0), one(ACK, 1)],
            Self::FinFinRst => vec![fin(0), fin(0), rst(stale)],
            Self::FinRstInFragments(first) => {
                let mut segment = conn.segment(RST, stale);
                segment.payload = vec![0; 12];
                [vec![fin(0)], in_fragments(&segment.to_packet(), first)].concat()
            }
            Self::FinRstWithOptions => vec![fin(0), with_options(&rst(stale))],
            Self::FinSynRst => vec![fin(0), one(SYN, 100_000), one(SYN, 100_000), rst(stale)],
            Self::HoleRst => vec![fin(50), rst(stale)],
            Self::HoleFinAck => vec![fin(50), fin(50), one(ACK, 0)],
            Self::HoleRstBehind => vec![fin(50), rst(51)],
            Self::AckRst => vec![one(ACK, 100), rst(100)],
            Self::DataRst => vec![data(), rst(0)],
            Self::DataFinRst => vec![data(), fin(9), rst(0)],
        }
    }
}

/// From packet to packet of a pattern.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Pace {
    AtOnce,
    Slow,
    InOneBatch,
    /// With the last packet of the handshake before it.
    InOneBatchWithHandshake,
}

impl Pace {
    const ALL: [Self; 3] = [Self::AtOnce, Self::Slow, Self::InOneBatch];

    fn is_in_one_batch(self) -> bool {
        matches!(self, Self::InOneBatch | Self::InOneBatchWithHandshake)
    }
}

#[derive(Clone, Copy, Debug)]
enum Rules {
    /// The limit alone.
    Plain,
    /// INVALID dropped, what is established accepted, the limit, everything else dropped.
    Strict,
}

#[derive(Clone, Copy, Debug)]
enum Family {
    V4,
    V6,
    /// In turn, from pattern to pattern.
    Both,
}

impl Family {
    fn source(self, number: usize) -> String {
        match self {
            Self::Both if number % 2 == 1 => Self::V4.source(number),
            Self::V4 => format!("198.51.100.{number}"),
            Self::V6 | Self::Both => format!("2001:db8:1::{number}"),
        }
    }
}

fn in_fragments(packet: &[u8], first: usize) -> Vec<Vec<u8>> {
    if is_ipv6(packet) {
        let (first, second) = packet.split_at(40).1.split_at(first);
        let part = |field: u16, payload: &[u8]| {
            let header = [&[6, 0][..], &field.to_be_bytes(), &[0, 0, 0, 7]].concat();
            extended(packet, 44, &[&header, payload].concat())
        };
        // The offset in bytes, and one bit for more to come.
        let offset = u16::try_from(first.len()).expect("a small offset");
        return vec![part(1, first), part(offset, second)];
    }
    let (whole, tcp) = Ipv4Header::from_slice(packet).expect("an IPv4 packet");
    let (first, second) = tcp.split_at(first);
    let offset = u16::try_from(first.len() / 8).expect("a small offset");
    let part = |more: bool, offset: u16, payload: &[u8]| {
        let mut header = whole.clone();
        header.identification = 7;
        header.dont_fragment = false;
        header.more_fragments = more;
        header.fragment_offset = IpFragOffset::try_new(offset).expect("a small offset");
        written(header, payload)
    };
    vec![part(true, 0, first), part(false, offset, second)]
}

fn with_options(packet: &[u8]) -> Vec<u8> {
    if is_ipv6(packet) {
        // Destination options: six bytes of padding.
        let padding = [6, 0, 1, 4, 0, 0, 0, 0];
        return extended(packet, 60, &[&padding, packet.split_at(40).1].concat());
    }
    let (mut header, tcp) = Ipv4Header::from_slice(packet).expect("an IPv4 packet");
    header.options = Ipv4Options::try_from(&[1_u8, 1, 1, 0][..]).expect("NOPs");
    written(header, tcp)
}

fn written(mut header: Ipv4Header, payload: &[u8]) -> Vec<u8> {
    header.set_payload_len(payload.len()).expect("a small payload");
    let mut packet = Vec::new();
    header.write(&mut packet).expect("a header");
    packet.extend(payload);
    packet
}

/// The IPv6 header of `packet` before an extension header of this kind and what follows.
fn extended(packet: &[u8], kind: u8, payload: &[u8]) -> Vec<u8> {
    let (header, _) = packet.split_at(40);
    let mut header = header.to_vec();
    let length = u16::try_from(payload.len()).expect("a small payload");
    header.splice(4..7, [length.to_be_bytes().to_vec(), vec![kind]].concat());
    [header, payload.to_vec()].concat()
}

fn is_ipv6(packet: &[u8]) -> bool {
    packet.first().is_some_and(|byte| byte >> 4 == 6)
}

/// A limited server, with the shield before it or without.
struct Scene {
    lab: Lab,
    _server: Server,
    daemon: Option<Daemon>,
    family: Family,
    sources: usize,
}

impl Scene {
    fn new(rules: Rules, family: Family, way: Way, shield: bool) -> Option<Self> {
        let lab = Lab::new()?;
        if !lab.go_by(way) {
            return None;
        }
        if shield && !ctkeep::shield::IS_BUILT_IN {
            lab::skip("ctkeep was built without clang, hence without the shield");
            return None;
        }
        limit(&lab, rules);
        lab.poll_in_batches();
        let server = lab.serve("[::]:80");
        let mut this = Self { lab, _server: server, daemon: None, family, sources: 0 };
        if shield {
            let daemon = this.lab.daemon(CTKEEP, &["--port", "80", "--shield", "on"]);
            daemon.stop();
            this.daemon = Some(daemon);
        }
        Some(this)
    }

    fn peer(&mut self) -> Peer {
        self.sources += 1;
        self.lab.peer(&self.family.source(self.sources))
    }

    fn play(&self, peer: &Peer, conns: &[RawConn], pattern: Pattern, pace: Pace) {
        let each = |pause: Duration| {
            for conn in conns {
                for packet in pattern.packets(conn) {
                    peer.send_packet(&packet);
                    thread::sleep(pause);
                }
            }
        };
        match pace {
            Pace::AtOnce => each(Duration::ZERO),
            Pace::InOneBatchWithHandshake => each(Duration::ZERO),
            Pace::InOneBatch => self.lab.in_one_batch(|| each(Duration::ZERO)),
            // Side by side: a tenth of a second between the packets of each connection.
            Pace::Slow => {
                let all: Vec<_> = conns.iter().map(|conn| pattern.packets(conn)).collect();
                let steps = all.iter().map(Vec::len).max().unwrap_or_default();
                for step in 0..steps {
                    for packet in all.iter().filter_map(|packets| packets.get(step)) {
                        peer.send_packet(packet);
                    }
                    thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    /// How many connections beyond the limit a source gets by a pattern.
    fn gain(&mut self, pattern: Pattern, pace: Pace) -> usize {
        let peer = self.peer();
        let held = if pace == Pace::InOneBatchWithHandshake {
            let begun = (0..LIMIT).map(|_| peer.syn_only(PORT)).collect();
            let mut held = Vec::new();
            self.lab.in_one_batch(|| {
                held = peer.complete(begun, ANSWER);
                self.play(&peer, &held, pattern, pace);
            });
            assert_eq!(held.len(), LIMIT, "connections");
            held
        } else {
            let held = peer.hold(PORT, LIMIT);
            self.play(&peer, &held, pattern, pace);
            held
        };
        let mut gained = 0;
        // A rule that counts anew at each SYN may take one more round.
        for _ in 0..2 {
            let begun = (0..LIMIT).map(|_| peer.syn_only(PORT)).collect();
            gained += peer.complete(begun, ANSWER).len();
        }
        let sockets = self.lab.all_sockets();
        let is_open = |conn: &&RawConn| {
            sockets.iter().any(|socket| socket.remote == conn.client && socket.is_open())
        };
        let open = held.iter().filter(is_open).count();
        assert_eq!(open, LIMIT, "{pattern:?} {pace:?}: the server's sockets stay");
        gained
    }
}

fn limit(lab: &Lab, rules: Rules) {
    let limit = LIMIT;
    for (program, mask) in [("iptables", 32), ("ip6tables", 128)] {
        let connlimit = format!(
            "-A INPUT -p tcp --syn --dport {PORT} -m connlimit --connlimit-above {limit} \
             --connlimit-mask {mask} -j DROP\n"
        );
        let rules = match rules {
            Rules::Plain => format!("*filter\n{connlimit}COMMIT\n"),
            Rules::Strict => format!(
                "*filter\n:INPUT DROP [0:0]\n\
                 -A INPUT -m conntrack --ctstate INVALID -j DROP\n\
                 -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n\
                 {connlimit}\
                 -A INPUT -p tcp --dport {PORT} -m conntrack --ctstate NEW -j ACCEPT\n\
                 COMMIT\n"
            ),
        };
        lab.server.feed(&format!("{program}-restore"), &rules);
    }
}

fn assert_nothing_gained(rules: Rules, family: Family, way: Way, paces: &[Pace]) {
    let Some(mut scene) = Scene::new(rules, family, way, true) else { return };
    for pattern in Pattern::ALL {
        for pace in paces {
            let gained = scene.gain(pattern, *pace);
            assert_eq!(gained, 0, "{pattern:?} {pace:?} {rules:?} {family:?} {way:?}");
        }
    }
}

/// Without the shield they work, or the tests would prove nothing.
fn assert_stock_kernel_is_fooled(rules: Rules, family: Family, way: Way, paces: &[Pace]) {
    let Some(mut scene) = Scene::new(rules, family, way, false) else { return };
    let mut resisted = Vec::new();
    for pattern in Pattern::ALL {
        for pace in paces {
            let resists = match (pattern, family) {
                (Pattern::FinRst(offset), _) => !kernel::believes_rst(offset),
                // TCP has the data before the RST comes, and conntrack knows that it is old.
                (Pattern::DataRst, _) => !pace.is_in_one_batch(),
                // The RST is nine before the FIN; in a batch the server has not acknowledged any.
                (Pattern::DataFinRst, _) => !pace.is_in_one_batch() && !kernel::believes_rst(-9),
                // RFC 8200: all headers are in the first fragment.
                (Pattern::FinRstInFragments(8), Family::V6) => true,
                _ => false,
            };
            if resists {
                continue;
            }
            if scene.gain(pattern, *pace) == 0 {
                resisted.push((pattern, *pace));
            }
        }
    }
    assert_eq!(resisted, [], "{rules:?} {family:?} {way:?}");
}

fn assert_covered(way: Way, pace: Pace) {
    assert_stock_kernel_is_fooled(Rules::Plain, Family::Both, way, &[pace]);
    assert_nothing_gained(Rules::Plain, Family::Both, way, &[pace]);
}

#[test]
fn patterns_gain_nothing_under_plain_rules() {
    assert_nothing_gained(Rules::Plain, Family::V4, Way::Cable, &Pace::ALL);
}

#[test]
fn patterns_gain_nothing_under_strict_rules() {
    assert_nothing_gained(Rules::Strict, Family::V4, Way::Cable, &Pace::ALL);
}

#[test]
fn patterns_gain_nothing_over_ipv6() {
    assert_nothing_gained(Rules::Plain, Family::V6, Way::Cable, &Pace::ALL);
}

#[test]
fn patterns_gain_nothing_over_ipv6_under_strict_rules() {
    assert_nothing_gained(Rules::Strict, Family::V6, Way::Cable, &Pace::ALL);
}

#[test]
fn the_stock_kernel_is_fooled_by_each() {
    assert_stock_kernel_is_fooled(Rules::Plain, Family::V4, Way::Cable, &Pace::ALL);
}

#[test]
fn the_stock_kernel_is_fooled_by_each_under_strict_rules() {
    assert_stock_kernel_is_fooled(Rules::Strict, Family::V4, Way::Cable, &Pace::ALL);
}

#[test]
fn the_stock_kernel_is_fooled_by_each_over_ipv6() {
    assert_stock_kernel_is_fooled(Rules::Plain, Family::V6, Way::Cable, &Pace::ALL);
}

/// The socket that the FIN and the RST are for is not there yet when they come by.
#[test]
fn the_end_of_the_handshake_in_the_batch_gains_nothing() {
    assert_covered(Way::Cable, Pace::InOneBatchWithHandshake);
}

#[test]
fn a_vlan_is_covered() {
    assert_covered(Way::Vlan, Pace::InOneBatch);
}

#[test]
fn a_vlan_whose_tags_are_in_the_frames_is_covered() {
    assert_covered(Way::VlanInFrame, Pace::InOneBatch);
}

#[test]
fn a_vlan_in_a_vlan_is_covered() {
    assert_covered(Way::VlanInVlan, Pace::InOneBatch);
}

/// No packet program is given the sockets of a VRF: it is left to the reconciler, which says so.
#[test]
fn a_vrf_is_left_to_repairs() {
    let scene = |shield| Scene::new(Rules::Plain, Family::V4, Way::Vrf, shield);
    let pattern = Pattern::FinRst(kernel::stale_rst());
    let Some(mut stock) = scene(false) else { return };
    assert!(stock.gain(pattern, Pace::AtOnce) > 0);
    let Some(mut scene) = scene(true) else { return };
    let daemon = scene.daemon.as_ref().expect("a shielded scene");
    assert_eq!(daemon.log().matches("no shield in this bridge or VRF").count(), 1);
    daemon.cont();
    let peer = scene.peer();
    let held = peer.hold(PORT, LIMIT);
    scene.play(&peer, &held, pattern, Pace::AtOnce);
    let is_repaired = || held.iter().all(|conn| scene.lab.is_alive(conn));
    lab::wait_for("repairs", SOON, is_repaired);
    lab::wait_for("recounts", SOON, || peer.admitted(PORT, 1) == 0);
}
