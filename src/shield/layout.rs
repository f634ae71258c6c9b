//! The table: where a mark becomes `notrack`.

use crate::nftables::{Chain, Expr, Hook, Layout, Set};

/// The devices that the program is at.
pub(super) const DEVICES: &str = "devices";

/// Before the raw table (-300) and conntrack (-200); after reassembly (-400).
const PRIORITY: i32 = -310;

/// A mark from a device without the program is none of ours.
pub(super) fn layout(mark: u32, devices: Vec<Vec<u8>>) -> Layout {
    let is_marked = [Expr::Mark, Expr::Mask(mark.to_ne_bytes().to_vec())];
    let unmark = [Expr::Mark, Expr::Mask((!mark).to_ne_bytes().to_vec()), Expr::SetMark];
    let rules = vec![
        [&is_marked[..], &[Expr::Equals(vec![0; 4]), Expr::Accept]].concat(),
        vec![Expr::InputDevice, Expr::NotIn(DEVICES), Expr::Accept],
        [&unmark[..], &[Expr::NoTrack, Expr::Accept]].concat(),
    ];
    let set = Set { name: DEVICES, key_length: 4, size: None, timeout: None, elements: devices };
    let chain = Chain { name: "hide", hook: Hook::Prerouting, priority: PRIORITY, rules };
    Layout { sets: vec![set], chains: vec![chain] }
}

/// A set element for a device.
pub(super) fn device_key(index: u32) -> Vec<u8> {
    index.to_ne_bytes().to_vec()
}
