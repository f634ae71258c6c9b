//! The table: which packets are logged.
//!
//! A packet without FIN or RST leaves at the first rule, one to another port at the third.
//! Priority -150: conntrack (-200) has seen the packet, the filter rules have not.
//!
//! There is no `ct` expression here, on purpose: one would switch conntrack on in a namespace that
//! has been living without. So a flood of stray FINs can fill the set of closing connections (at
//! 87 000 a second); then what it would have told is found by the next sweep.

use std::collections::HashSet;
use std::time::Duration;

use crate::nftables::{ChainSpec, Expr, Hook, SetSpec, TableSpec, key};

pub(super) const PORTS: &str = "ports";
pub(super) const HELD4: &str = "held4";
pub(super) const HELD6: &str = "held6";
const CLOSING4: &str = "closing4";
const CLOSING6: &str = "closing6";

const PRIORITY: i32 = -150;

/// RSTs that are logged although no FIN came before: a sample. Every one would wake the daemon for
/// each connection that its client resets (0.72 of the connections a second); one that proves to
/// have fooled conntrack makes the daemon look at all the others.
const UNHERALDED: Expr = Expr::Limit { rate: 100, burst: 100 };

/// A FIN that found its set full: once a second, not each.
const UNLEARNED: Expr = Expr::Limit { rate: 1, burst: 1 };
/// The word that goes with it.
pub(super) const FULL: &str = "full";

/// Closing connections of a family that are remembered at once.
pub const CLOSING: u32 = 262_144;

const IPPROTO_TCP: u8 = 6;
const NFPROTO_IPV4: u8 = 2;
const NFPROTO_IPV6: u8 = 10;
const TCP_DESTINATION_PORT: u32 = 2;
const TCP_FLAGS: u32 = 13;
const FIN: u8 = 0x01;
const RST: u8 = 0x04;

pub(super) fn layout(
    hook: Hook,
    group: u16,
    ports: &HashSet<u16>,
    closing: u32,
    memory: Duration,
) -> TableSpec {
    let set = |name, key_length, size, timeout| SetSpec {
        name,
        key_length,
        size,
        timeout,
        elements: Vec::new(),
    };
    let sets = vec![
        SetSpec {
            elements: ports.iter().map(|port| port_key(*port)).collect(),
            ..set(PORTS, 2, None, None)
        },
        set(CLOSING4, 16, Some(closing), Some(memory)),
        set(CLOSING6, 40, Some(closing), Some(memory)),
        set(HELD4, 16, None, None),
        set(HELD6, 40, None, None),
    ];
    let flags = |mask: u8| [Expr::transport(TCP_FLAGS, 1), Expr::Mask(vec![mask])];
    let any = |mask: u8| [&flags(mask)[..], &[Expr::Differs(vec![0])]].concat();
    let log = |prefix| Expr::Log { group, snaplen: super::nflog::SNAPLEN, prefix };
    let mut rules = vec![
        // First, and of whatever protocol: it is what most packets are.
        [&flags(FIN | RST)[..], &[Expr::Equals(vec![0]), Expr::Accept]].concat(),
        vec![Expr::L4Proto, Expr::Differs(vec![IPPROTO_TCP]), Expr::Accept],
        vec![Expr::transport(TCP_DESTINATION_PORT, 2), Expr::NotIn(PORTS), Expr::Accept],
    ];
    for (family, closing, held, key) in [
        (NFPROTO_IPV4, CLOSING4, HELD4, key::load_v4()),
        (NFPROTO_IPV6, CLOSING6, HELD6, key::load_v6()),
    ] {
        let of_family = [Expr::NfProto, Expr::Equals(vec![family])];
        let tell = [log(None), Expr::Accept];
        for known in [held, closing] {
            rules.push([&of_family[..], &key, &[Expr::In(known)], &tell].concat());
        }
        // With an RST it is an RST, to TCP and to conntrack.
        let fin = [&of_family[..], &flags(FIN | RST), &[Expr::Equals(vec![FIN])]].concat();
        rules.push([&fin[..], &key, &[Expr::Add(closing), Expr::Accept]].concat());
        // Nothing can be added to a full set, and the rule above ends there.
        rules.push([&fin[..], &[UNLEARNED, log(Some(FULL)), Expr::Accept]].concat());
    }
    rules.push([&any(RST)[..], &[UNHERALDED, log(None)]].concat());
    let chain = ChainSpec { name: "watch", hook, priority: PRIORITY, rules };
    TableSpec { sets, chains: vec![chain] }
}

/// A set element for a port.
pub(super) fn port_key(port: u16) -> Vec<u8> {
    port.to_be_bytes().to_vec()
}
