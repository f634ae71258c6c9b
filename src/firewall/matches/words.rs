//! The names that rules give to values. Pure.

use crate::firewall::value::{Bits, Field, Operand};

/// A value by the name that rules give it.
pub(in crate::firewall) fn words(value: &Operand) -> String {
    match (value.field, value.length) {
        (Field::Ip(12), 1..=4) | (Field::Ip(8), 2..=16) => "source address",
        (Field::Ip(16), 1..=4) | (Field::Ip(24), 1..=16) => "destination address",
        (Field::CtSource(true), _) => "source address",
        (Field::CtDestination(true), _) => "asked address",
        (Field::Tcp(0) | Field::CtSourcePort(true), 2) => "source port",
        (Field::Tcp(2), 2) => "port",
        (Field::CtDestinationPort(true), 2) => "asked port",
        (Field::L4Proto, _) => "protocol",
        (Field::InterfaceName | Field::InterfaceIndex, _) => "interface",
        (Field::OutName | Field::OutIndex, _) => "output interface",
        (Field::Mark, _) => "mark",
        (Field::CtMark, _) => "ct mark",
        (Field::CtState | Field::XtState, _) => "ct state",
        (Field::DestinationType, _) => "fib daddr type",
        (Field::SourceType, _) => "fib saddr type",
        (Field::Ip(_), _) => "ip header",
        (Field::Tcp(_), _) => "tcp header",
        _ => "another value",
    }
    .to_owned()
}

pub(super) fn described(value: &Operand, from: Bits, to: Bits, is: bool) -> String {
    let sign = if is { "" } else { "not " };
    match (value.field, from.value(), to.value()) {
        (Field::Tcp(0) | Field::CtSourcePort(true), Some(from), Some(to)) if from == to => {
            format!("{} {sign}{from}", words(value))
        }
        (Field::Tcp(0) | Field::CtSourcePort(true), Some(from), Some(to)) => {
            format!("{} {sign}{from}-{to}", words(value))
        }
        (Field::Mark | Field::CtMark, ..) => {
            let bytes = from.bytes().unwrap_or_default();
            let mark = <[u8; 4]>::try_from(bytes.as_slice()).map_or(0, u32::from_ne_bytes);
            format!("{} {sign}0x{mark:x}", words(value))
        }
        _ => words(value),
    }
}

#[cfg(test)]
mod tests {
    use crate::firewall::{Family, Match, Step, parse_saved};

    /// Whether it asks for what is in the set or for what is not, the words hold.
    #[test]
    fn a_set_of_which_the_way_round_is_not_read_is_not_said_to_have_it() {
        for asked in ["--match-set vip src", "! --match-set vip src"] {
            let text = format!("*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -m set {asked} -j DROP\n");
            let chains = parse_saved(&text, Family::Ip);
            let steps = chains.iter().flat_map(|chain| chain.rules.iter()).flat_map(|it| &it.steps);
            let words: Vec<_> = steps
                .filter_map(|step| match step {
                    Step::Test(test) => Some(Match::of(test).to_string()),
                    _ => None,
                })
                .collect();
            assert_eq!(words, [" to any port, if a set has or lacks it"], "{asked}");
        }
    }
}
