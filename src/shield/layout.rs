//! The table: where a mark becomes `notrack`.

use crate::nftables::{ChainSpec, Expr, Field, Hook, SetSpec, TableSpec};

/// The devices that the program is at.
pub(super) const DEVICES: &str = "shielded";

/// Before the raw table (-300) and conntrack (-200); after reassembly (-400).
const PRIORITY: i32 = -310;

/// One rule, which most packets leave at once. A mark from a device without the program is none of
/// ours.
pub(super) fn layout(mark: u32, devices: Vec<Vec<u8>>) -> TableSpec {
    let rule = vec![
        Expr::Mark,
        Expr::Mask(mark.to_ne_bytes().to_vec()),
        Expr::Differs(vec![0; 4]),
        Expr::InputDevice,
        Expr::In(DEVICES),
        Expr::Mark,
        Expr::Mask((!mark).to_ne_bytes().to_vec()),
        Expr::SetMark,
        Expr::NoTrack,
    ];
    let set = SetSpec {
        name: DEVICES,
        key: &[Field::IfaceIndex],
        size: None,
        timeout: None,
        elements: devices,
    };
    let chain =
        ChainSpec { name: "hide", hook: Hook::Prerouting, priority: PRIORITY, rules: vec![rule] };
    TableSpec { sets: vec![set], chains: vec![chain] }
}

/// A set element for a device.
pub(super) fn device_key(index: u32) -> Vec<u8> {
    index.to_ne_bytes().to_vec()
}
