//! The table: what is marked is an ACK to conntrack, and to TCP what it was (`nftables::hidden`).

use crate::nftables::hidden::{self, By, Closing};
use crate::nftables::{ChainSpec, Expr, Field, Hook, SetSpec, TableSpec};

/// The devices that the program is at.
pub(super) const DEVICES: &str = "shielded";

/// Before the raw table (-300) and conntrack (-200); after reassembly (-400).
const HIDE: i32 = -310;
/// Behind the packet log (-198): what is hidden has changed no entry, and calls for no look.
const SHOW: i32 = -197;

const IPPROTO_TCP: u8 = 6;

/// Most packets leave each chain at its first rule.
pub(super) fn layout(mark: u32, devices: Vec<Vec<u8>>) -> TableSpec {
    let set = SetSpec {
        name: DEVICES,
        key: &[Field::IfaceIndex],
        size: None,
        timeout: None,
        elements: devices,
    };
    let chain = |name, priority, rules| ChainSpec { name, hook: Hook::Prerouting, priority, rules };
    TableSpec {
        sets: vec![set],
        chains: vec![chain("hide", HIDE, hide(mark)), chain("show", SHOW, show())],
        ..TableSpec::default()
    }
}

fn hide(mark: u32) -> Vec<Vec<Expr>> {
    let is_marked = [Expr::Mark, Expr::Mask(mark.to_ne_bytes().to_vec())];
    let unmarked = [&is_marked[..], &[Expr::Equals(vec![0; 4])]].concat();
    let mut rules = vec![
        [&unmarked[..], &hidden::never_hidden()].concat(),
        // A mark from a device without the program is none of ours.
        vec![Expr::InputDevice, Expr::NotIn(DEVICES), Expr::Accept],
    ];
    let of_tcp = [&tcp()[..], &unmarked].concat();
    rules.extend(Closing::ALL.map(|closing| closing.unmask(By::Shield, &of_tcp)));
    rules.push([&unmarked[..], &[Expr::Accept]].concat());
    // No chain behind this one sees it.
    rules.push(vec![Expr::Mark, Expr::Mask((!mark).to_ne_bytes().to_vec()), Expr::SetMark]);
    rules.push(hidden::without_urgent_data(&tcp()));
    rules.extend(Closing::ALL.map(|closing| closing.hide(By::Shield, &tcp())));
    rules
}

fn show() -> Vec<Vec<Expr>> {
    let mut rules =
        vec![hidden::never_hidden(), vec![Expr::InputDevice, Expr::NotIn(DEVICES), Expr::Accept]];
    rules.extend(Closing::ALL.map(|closing| closing.show(By::Shield, &tcp())));
    rules
}

fn tcp() -> [Expr; 2] {
    [Expr::L4Proto, Expr::Equals(vec![IPPROTO_TCP])]
}

/// A set element for a device.
pub(super) fn device_key(index: u32) -> Vec<u8> {
    index.to_ne_bytes().to_vec()
}
