//! The table: which packets are logged, and when.
//!
//! The chain stands right behind conntrack (-198), before anything that can drop a packet that
//! conntrack has acted upon: mangle, IP's own checks, the filter rules, the socket. What is logged
//! there is compared with the socket, so it does not matter who kept it from TCP.
//!
//! - A packet without SYN, FIN and RST leaves at the first rule, one with SYN by a chain of its own, one
//!   without entry at the `ct state` rule: strangers' packets change no entry, and are not logged.
//! - The first FIN of a connection is remembered by a label of its entry ([`CLOSING_LABEL`]). What follows it,
//!   FIN or RST, is logged at once. The next connection on the tuple has an entry, and labels, of its own.
//!   Entries that were there before the rule have no room for labels, and some kernels have none: there
//!   the tuple is remembered for a while.
//! - TCP answers an ACK of what it has never sent, in a handshake, by an RST of its own, and goes on to wait
//!   for the right one; conntrack closes the entry. So RSTs of the server that answer an ACK are logged,
//!   too, behind conntrack again. So is what a rule that rejects with a reset answers to a packet of an open
//!   connection: it closes the entry, and TCP never gets that packet.
//! - An RST without a FIN before it waits in the kernel for others, up to [`QUEUE`] of them or some
//!   ten milliseconds: each would else wake the daemon, for every connection that its client resets
//!   (0.72 of the connections a second). Where RSTs wait, the next SYN sends them off: a limiter
//!   drops closed connections at the next SYN, so no attacker gains by the delay.

use std::collections::HashSet;
use std::time::Duration;

use super::Memory;
use crate::conntrack::CLOSING_LABEL;
use crate::nftables::{ChainSpec, Expr, Field, Header, Hook, RegularSpec, SetSpec, TableSpec, key};

pub(super) const PORTS: &str = "ports";
pub(super) const HELD4: &str = "held4";
pub(super) const HELD6: &str = "held6";
pub(super) const HOLDERS4: &str = "holders4";
pub(super) const HOLDERS6: &str = "holders6";
/// Ports whose connections may end without any packet that is seen (Multipath TCP).
pub(super) const OPENED: &str = "opened";
const CLOSING4: &str = "closing4";
const CLOSING6: &str = "closing6";
/// Sources of packets with SYN, for [`SYN_MEMORY`] from the last one on.
pub(super) const SYNS4: &str = "syns4";
pub(super) const SYNS6: &str = "syns6";
/// Has an element while such packets were not noted, or may have closed an entry.
pub(super) const MISSED: &str = "missed";
/// Ports at which an RST waits to be sent.
const RESET: &str = "hurried";

/// Behind conntrack (-200) and where packets that were hidden from it are what they were again
/// (-199), before mangle (-150).
const PRIORITY: i32 = -198;

/// RSTs that wait for each other at most.
pub(super) const QUEUE: u16 = 64;
/// They are looked at together for 2 us each: a flood takes a twentieth of a core.
const RESETS: Expr = Expr::Limit { rate: 20_000, burst: 5_000 };
/// SYNs that send off what waits. Between two of them a source sends a burst that gains at most
/// what the next finds.
const HURRIES: Expr = Expr::Limit { rate: 250, burst: 2 };
/// For so long an RST waits at most, and a little more.
const RESET_WAITS: Duration = Duration::from_millis(20);
/// Ports of [`RESET`]: RSTs of others wait for their time to be up.
const RESET_PORTS: u32 = 1024;

/// A repair comes within milliseconds of what called for it, rarely seconds.
pub(super) const SYN_MEMORY: Duration = Duration::from_secs(5);
/// Sources of SYNs: those of a flood fill it, and then nothing is known. 4 MiB while they do.
const SYN_SOURCES: u32 = 32_768;
/// The protocol: there is one element.
pub(super) const MISSED_KEY: [u8; 1] = [IPPROTO_TCP];

/// A FIN that found its set full, an RST beyond [`RESETS`]: once a second, not each.
const ONCE_A_SECOND: Expr = Expr::Limit { rate: 1, burst: 1 };
/// The word that goes with it.
pub(super) const FULL: &str = "full";
/// The word that goes with a first FIN: something begins to close, and a look at the sockets is worth its
/// price.
pub(super) const CLOSING_WORD: &str = "closing";
/// First FINs a second that are logged. Each leads to a look at its connection, as TCP may not have taken it:
/// behind a hole, say. Some 10 us each.
const FIRST_FINS: Expr = Expr::Limit { rate: 50, burst: 50 };
/// The word that goes with a SYN that only sends off what waits.
pub(super) const HURRY: &str = "hurry";
/// The word that goes with a SYN of a source that has half-closed connections, or to a port of
/// [`OPENED`].
pub(super) const OPENS: &str = "opens";
/// Those of so many a second lead to looks at what the source has: some ten each, as many as a limit
/// lets one have.
const OPENINGS: Expr = Expr::Limit { rate: 50, burst: 50 };
/// The word that goes with a packet whose destination or source is translated.
pub(super) const TRANSLATED: &str = "translated";

/// The words that go with an RST without a FIN before it, which has waited for others.
pub(super) const WAITED: &str = "waited";
pub(super) const TRANSLATED_WAITED: &str = "translated, waited";

/// The word that goes with a packet that says to be the server's own.
pub(super) const SPOOFED: &str = "spoofed";

/// The word that goes with an RST of the server.
pub(super) const ANSWERED: &str = "answered";

/// Closing connections without labels of each family that are remembered at once. At some 100 bytes each
/// those of IPv4 take 25 MiB.
pub const CLOSING: u32 = 262_144;

/// The regular chains: packets with SYN, those without any other flag, those to no port of the scope, and
/// those that are logged at once.
const SYNS: &str = "syns";
const OPENING: &str = "opening";
const UNGUARDED: &str = "unguarded";
const KNOWN: &str = "known";

const IPPROTO_TCP: u8 = 6;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const TCP_SOURCE_PORT: u32 = 0;
const TCP_DESTINATION_PORT: u32 = 2;
const TCP_SEQUENCE: u32 = 4;
const TCP_FLAGS: u32 = 13;
const FIN: u8 = 0x01;
const SYN: u8 = 0x02;
const RST: u8 = 0x04;
const ACK: u8 = 0x10;

/// `NF_CT_STATE_BIT` of `IP_CT_ESTABLISHED` and `IP_CT_RELATED`: there was an entry before.
const TRACKED: u32 = 1 << 1 | 1 << 2;
/// And that of `IP_CT_NEW`: of a FIN or RST that there is one, whose SYN is without an answer. A SYN on
/// the tuple of a closed entry makes one, and TCP answers it twice in a second.
const WITH_ENTRY: u32 = TRACKED | NEW;
const NEW: u32 = 1 << 3;
/// `enum ip_conntrack_status`
const IPS_CONFIRMED: u32 = 1 << 3;
const IPS_DST_NAT: u32 = 1 << 5;
/// Of either side; a source is translated on its way in, too (nat INPUT).
const IPS_NAT_MASK: u32 = 1 << 4 | IPS_DST_NAT;
/// `enum ip_conntrack_dir`
const IP_CT_DIR_ORIGINAL: u8 = 0;
const IP_CT_DIR_REPLY: u8 = 1;
/// `LOOPBACK_IFINDEX`, in every namespace.
const LOOPBACK: u32 = 1;

/// What the table is made with.
#[derive(Clone, Copy, Debug)]
pub(super) struct Watched<'a> {
    pub(super) group: u16,
    pub(super) ports: &'a HashSet<u16>,
    pub(super) memory: Memory,
    pub(super) kernel: Kernel,
}

/// What not every kernel can do.
#[derive(Clone, Copy, Debug)]
pub(super) struct Kernel {
    /// Say whether an address is its own (`nft_fib`).
    pub(super) knows_own: bool,
    /// Keep labels with an entry (`CONFIG_NF_CONNTRACK_LABELS`).
    pub(super) has_labels: bool,
}

pub(super) fn layout(watched: Watched<'_>) -> TableSpec {
    let Watched { group, ports, memory, kernel } = watched;
    let Kernel { knows_own, has_labels } = kernel;
    let Memory { most, time } = memory;
    let set = |name, key, size, timeout| SetSpec { name, key, size, timeout, elements: Vec::new() };
    let sets = vec![
        SetSpec {
            elements: ports.iter().map(|port| port_key(*port)).collect(),
            ..set(PORTS, &[Field::InetService], None, None)
        },
        set(OPENED, &[Field::InetService], None, None),
        set(CLOSING4, key::TUPLE_V4, Some(most), Some(time)),
        set(CLOSING6, key::TUPLE_V6, Some(most), Some(time)),
        set(HELD4, key::TUPLE_V4, None, None),
        set(HELD6, key::TUPLE_V6, None, None),
        set(HOLDERS4, &[Field::Ipv4Addr], None, None),
        set(HOLDERS6, &[Field::Ipv6Addr], None, None),
        set(RESET, &[Field::InetService], Some(RESET_PORTS), Some(RESET_WAITS)),
        set(SYNS4, &[Field::Ipv4Addr], Some(SYN_SOURCES), Some(SYN_MEMORY)),
        set(SYNS6, &[Field::Ipv6Addr], Some(SYN_SOURCES), Some(SYN_MEMORY)),
        set(MISSED, &[Field::InetProto], Some(4), Some(SYN_MEMORY)),
    ];
    let incoming = ChainSpec {
        name: "watch",
        hook: Hook::Prerouting,
        priority: PRIORITY,
        rules: [
            ordinary(),
            vec![rule(&[&any_flag(SYN), &[Expr::Jump(SYNS)]])],
            vec![rule(&[&ct(Expr::CtState, WITH_ENTRY, false), &[Expr::Accept]])],
            if knows_own { vec![spoofed(group)] } else { Vec::new() },
            answered(group),
            vec![vec![port(), Expr::NotIn(PORTS), Expr::Jump(UNGUARDED)]],
            if has_labels { vec![known_by_label()] } else { Vec::new() },
            known_by_tuple(|family| family.held),
            announced(group),
            if has_labels { remembered_by_label() } else { Vec::new() },
            known_by_tuple(|family| family.closing),
            remembered_by_tuple(group),
            resets(group),
        ]
        .concat(),
    };
    let outgoing = ChainSpec {
        name: "answers",
        hook: Hook::Output,
        priority: PRIORITY,
        rules: [vec![rule(&[&no_flag(RST), &[Expr::Accept]])], answered(group)].concat(),
    };
    let impostors = if knows_own { vec![spoofed_syn_ack(group)] } else { Vec::new() };
    let regular = [
        (SYNS, [impostors, syns()].concat()),
        (OPENING, opening(group)),
        (UNGUARDED, unguarded()),
        (KNOWN, known(group).into()),
    ];
    let regular = regular.map(|(name, rules)| RegularSpec { name, rules });
    TableSpec { sets, chains: vec![incoming, outgoing], regular: regular.into() }
}

/// Packets of no interest leave, by the cheapest test first.
fn ordinary() -> Vec<Vec<Expr>> {
    vec![
        rule(&[&no_flag(SYN | FIN | RST), &[Expr::Accept]]),
        vec![Expr::L4Proto, Expr::Differs(vec![IPPROTO_TCP]), Expr::Accept],
    ]
}

/// SYNs that begin a connection, or begin one anew.
fn opening(group: u16) -> Vec<Vec<Expr>> {
    let mut rules = Vec::new();
    // A limiter forgets what lacks its entry at the next SYN of its source.
    for family in FAMILIES {
        let seen = [Expr::In(family.holders), OPENINGS, log(group, Some(OPENS), 1)];
        let source = [Expr::NfProto, Expr::Equals(vec![family.nfproto]), family.source()];
        rules.push(rule(&[&source, &seen]));
    }
    rules.push(vec![port(), Expr::In(OPENED), OPENINGS, log(group, Some(OPENS), 1)]);
    rules.push(vec![port(), Expr::In(RESET), HURRIES, log(group, Some(HURRY), 1)]);
    rules
}

/// Packets that come in and say to be answers of this host, or of a container that is not where they
/// come from: conntrack believes them, and the server never has sent them.
fn spoofed(group: u16) -> Vec<Expr> {
    let source_port = Expr::transport(TCP_SOURCE_PORT, 2);
    let ours = [
        Expr::CtDirection,
        Expr::Equals(vec![IP_CT_DIR_REPLY]),
        Expr::L4Proto,
        Expr::Equals(vec![IPPROTO_TCP]),
        source_port,
        Expr::In(PORTS),
        // This host's connections to itself come in there.
        Expr::InputDevice,
        Expr::Differs(LOOPBACK.to_ne_bytes().to_vec()),
        Expr::SourceRoute,
        Expr::Equals(vec![0; 4]),
    ];
    // One is as bad as an RST that TCP never gets, and no ordinary one is among them.
    rule(&[&ours, &[RESETS, log(group, Some(SPOOFED), 1), Expr::Accept]])
}

/// The same of an answer to a SYN: behind one that conntrack had no use for, it begins the handshake anew.
fn spoofed_syn_ack(group: u16) -> Vec<Expr> {
    rule(&[&flags(SYN | ACK, SYN | ACK), &spoofed(group)])
}

/// RSTs that answer an ACK, of the server or of a container's; and those that answer a SYN of a connection that
/// is there already: a rule's (REJECT with a reset), which closes the entry of what TCP never gets. Those that end
/// a connection have an ACK and a sequence number (RFC 9293, 3.5.2). They wait as RSTs of peers do.
fn answered(group: u16) -> Vec<Vec<Expr>> {
    let of_server = [
        &[Expr::L4Proto, Expr::Equals(vec![IPPROTO_TCP])][..],
        &[Expr::CtDirection, Expr::Equals(vec![IP_CT_DIR_REPLY])],
        &[Expr::transport(TCP_SOURCE_PORT, 2), Expr::In(PORTS)],
    ]
    .concat();
    let to_ack = flags(RST | ACK, RST).to_vec();
    let no_number = [Expr::transport(TCP_SEQUENCE, 4), Expr::Equals(vec![0; 4])];
    let is_known = ct(Expr::CtStatus, IPS_CONFIRMED, true);
    let to_syn = [&flags(RST | ACK, RST | ACK)[..], &no_number, &is_known].concat();
    let wait = [RESETS, log(group, Some(ANSWERED), QUEUE), Expr::Accept];
    let one = |kind: &[Expr]| {
        [rule(&[kind, &of_server, &[Expr::Add(RESET)]]), rule(&[kind, &of_server, &wait])]
    };
    [one(&to_ack), one(&to_syn)].concat()
}

/// Packets to no port of the scope leave, unless their port is translated into one.
fn unguarded() -> Vec<Vec<Expr>> {
    vec![
        rule(&[&ct(Expr::CtStatus, IPS_DST_NAT, false), &[Expr::Accept]]),
        vec![Expr::CtDirection, Expr::Differs(vec![IP_CT_DIR_ORIGINAL]), Expr::Accept],
        vec![
            // Known already, but nft loads the port only where the rule itself says of what.
            Expr::L4Proto,
            Expr::Equals(vec![IPPROTO_TCP]),
            Expr::CtReplySource,
            Expr::NotIn(PORTS),
            Expr::Accept,
        ],
    ]
}

/// Notes who sends SYNs, by which limits look at their lists. One of a connection that is there already can
/// have a rule close its entry (REJECT with a reset).
fn syns() -> Vec<Vec<Expr>> {
    let missed = [Expr::L4Proto, Expr::Update(MISSED)];
    let done = rule(&[&no_flag(FIN | RST), &[Expr::Accept]]);
    let mut rules = vec![
        rule(&[&flags(SYN | ACK | FIN | RST, SYN), &[Expr::Jump(OPENING)]]),
        rule(&[&ct(Expr::CtState, TRACKED, true), &missed]),
    ];
    rules.extend(FAMILIES.map(|family| {
        let is_of_it = [Expr::NfProto, Expr::Equals(vec![family.nfproto])];
        rule(&[&is_of_it, &[family.source(), Expr::Update(family.syns)], &done])
    }));
    // Its set is full, and the rule above has ended there.
    rules.push(rule(&[&missed, &done]));
    rules
}

/// What closes a connection of which that is known already is logged at once.
fn known(group: u16) -> [Vec<Expr>; 2] {
    let plain = ct(Expr::CtStatus, IPS_NAT_MASK, false);
    [
        rule(&[&plain, &[log(group, None, 1), Expr::Accept]]),
        vec![log(group, Some(TRANSLATED), 1), Expr::Accept],
    ]
}

fn known_by_label() -> Vec<Expr> {
    rule(&[&closing_label(), &[Expr::Goto(KNOWN)]])
}

/// By a set of each family.
fn known_by_tuple(set: fn(&Family) -> &'static str) -> Vec<Vec<Expr>> {
    let of = |family: &Family| rule(&[&family.key(), &[Expr::In(set(family)), Expr::Goto(KNOWN)]]);
    FAMILIES.iter().map(of).collect()
}

/// With an RST it is an RST, to TCP and to conntrack; with a SYN it has no entry (`tcp_valid_flags`), and has left.
fn fin() -> Vec<Expr> {
    flags(FIN | SYN | RST, FIN)
}

fn closing_label() -> [Expr; 3] {
    let none = vec![0; CLOSING_LABEL.len()];
    [Expr::CtLabels, Expr::Mask(CLOSING_LABEL.to_vec()), Expr::Differs(none)]
}

/// Something begins to close.
fn announced(group: u16) -> Vec<Vec<Expr>> {
    vec![rule(&[&fin(), &[FIRST_FINS, log(group, Some(CLOSING_WORD), QUEUE)]])]
}

/// Who has room for the label has it then, and leaves.
fn remembered_by_label() -> Vec<Vec<Expr>> {
    let label = [Expr::Constant(CLOSING_LABEL.to_vec()), Expr::AddCtLabels];
    vec![rule(&[&fin(), &label]), rule(&[&fin(), &closing_label(), &[Expr::Accept]])]
}

fn remembered_by_tuple(group: u16) -> Vec<Vec<Expr>> {
    let mut rules = Vec::new();
    // Nothing can be added to a full set, and its rule ends there.
    for family in FAMILIES {
        rules.push(rule(&[&fin(), &family.key(), &[Expr::Add(family.closing), Expr::Accept]]));
    }
    rules.push(rule(&[&fin(), &[ONCE_A_SECOND, log(group, Some(FULL), 1)]]));
    rules.push(rule(&[&fin(), &[Expr::Accept]]));
    rules
}

fn resets(group: u16) -> Vec<Vec<Expr>> {
    let plain = ct(Expr::CtStatus, IPS_NAT_MASK, false);
    let wait = |word| [RESETS, log(group, Some(word), QUEUE), Expr::Accept];
    vec![
        vec![port(), Expr::Add(RESET)],
        rule(&[&plain, &wait(WAITED)]),
        rule(&[&ct(Expr::CtStatus, IPS_NAT_MASK, true), &wait(TRANSLATED_WAITED)]),
        vec![ONCE_A_SECOND, log(group, Some(FULL), 1)],
    ]
}

struct Family {
    nfproto: u8,
    closing: &'static str,
    held: &'static str,
    syns: &'static str,
    holders: &'static str,
    load: fn() -> [Expr; 4],
}

const FAMILIES: [Family; 2] = [
    Family {
        nfproto: NFPROTO_IPV4,
        closing: CLOSING4,
        held: HELD4,
        syns: SYNS4,
        holders: HOLDERS4,
        load: key::load_v4,
    },
    Family {
        nfproto: NFPROTO_IPV6,
        closing: CLOSING6,
        held: HELD6,
        syns: SYNS6,
        holders: HOLDERS6,
        load: key::load_v6,
    },
];

impl Family {
    /// Goes on with the packet's four-tuple, if it is of this family.
    fn key(&self) -> Vec<Expr> {
        let is_of_it = [Expr::NfProto, Expr::Equals(vec![self.nfproto])];
        rule(&[&is_of_it, &(self.load)()])
    }

    /// Loads the packet's source address.
    fn source(&self) -> Expr {
        let (offset, length) = if self.nfproto == NFPROTO_IPV4 { (12, 4) } else { (8, 16) };
        Expr::Load { header: Header::Network, offset, length, register: 0 }
    }
}

fn rule(parts: &[&[Expr]]) -> Vec<Expr> {
    parts.concat()
}

fn port() -> Expr {
    Expr::transport(TCP_DESTINATION_PORT, 2)
}

fn flags(mask: u8, value: u8) -> Vec<Expr> {
    Expr::transport_bits(TCP_FLAGS, mask, value)
}

fn no_flag(mask: u8) -> Vec<Expr> {
    flags(mask, 0)
}

fn any_flag(mask: u8) -> [Expr; 3] {
    [Expr::transport(TCP_FLAGS, 1), Expr::Mask(vec![mask]), Expr::Differs(vec![0])]
}

/// Goes on if one of these bits is set, or none.
fn ct(load: Expr, bits: u32, is_set: bool) -> [Expr; 3] {
    let none = vec![0; 4];
    let compare = if is_set { Expr::Differs(none) } else { Expr::Equals(none) };
    [load, Expr::Mask(bits.to_ne_bytes().to_vec()), compare]
}

fn log(group: u16, prefix: Option<&'static str>, threshold: u16) -> Expr {
    Expr::Log { group, snaplen: super::nflog::SNAPLEN, prefix, threshold }
}

/// A set element for a port.
pub(super) fn port_key(port: u16) -> Vec<u8> {
    port.to_be_bytes().to_vec()
}
