//! Ports of this host that its rules lead elsewhere. Pure.

use std::collections::{BTreeMap, BTreeSet};

use super::limits::reached;
use super::play::Player;
use super::{Chain, Hook, Match, Ruleset, Step};

/// Whether a table that translates addresses names this port: containers are published so.
pub fn is_published(rules: &Ruleset, port: u16) -> bool {
    first(rules, &|of| of.ports.contains(port)).is_some()
}

/// Whether more than one rule of tables that translate addresses of this family names a port: where one
/// leads may be where another does.
pub fn are_several(rules: &Ruleset, ipv4: bool) -> bool {
    let of_it = |chain: &&Chain| chain.family.covers(ipv4) && translates(rules, chain);
    let chains = rules.chains.iter().filter(of_it);
    let steps = chains.flat_map(|chain| chain.rules.iter()).flat_map(|rule| &rule.steps);
    steps.flat_map(|step| named(step, &|_| true)).nth(1).is_some()
}

/// So many ports are named one by one.
const NAMED: usize = 4096;

/// Ports that rules lead elsewhere as clients come in, each with those that it leads to; without any where that cannot
/// be told.
pub type Published = BTreeMap<u16, BTreeSet<u16>>;

/// Those of clients of one family; `None` where they are too many to be named, or a map of them could not be read.
pub fn published(player: &Player<'_>, ipv4: bool) -> Option<Published> {
    let chains = &player.ruleset().chains;
    let is_way_in = |chain: &Chain| {
        chain.base.as_ref().is_some_and(|it| it.is_nat && it.hook == Hook::Prerouting)
    };
    let bases = chains.iter().enumerate().filter(|(_, chain)| is_way_in(chain));
    let bases: Vec<usize> = bases.map(|(at, _)| at).collect();
    let mut found = Published::new();
    let reached = reached(player, &bases).into_iter().filter_map(|at| chains.get(at));
    for rule in reached.filter(|it| it.family.covers(ipv4)).flat_map(|it| it.rules.iter()) {
        let mut named = Vec::new();
        let mut all = Match::default();
        for step in &rule.steps {
            match step {
                Step::Test(test) => all = all.and(&Match::of(test)),
                Step::Map(_, set) if set.unread.is_some() => return None,
                Step::Map(values, set) => {
                    let each = set.keyed().iter();
                    named.extend(each.map(|element| Match::of_element(values, element).ports));
                }
                _ => {}
            }
        }
        named.push(all.ports);
        let to = rule.steps.iter().find_map(|step| match step {
            Step::Leads(port) => Some(*port),
            _ => None,
        });
        let named = named.iter().filter(|ports| !ports.is_all());
        let named = named.flat_map(|of| (0..=u16::MAX).filter(|port| of.contains(*port)));
        for port in named.take(NAMED + 1) {
            found.entry(port).or_default().extend(to.map(|to| to.unwrap_or(port)));
        }
        if found.len() > NAMED {
            return None;
        }
    }
    Some(found)
}

/// A rule of a table that translates addresses, for some port.
pub fn any(rules: &Ruleset) -> Option<String> {
    first(rules, &|_| true)
}

/// What names ports in a step, and such ones; a map that could not be read may name any number.
fn named<'s>(
    step: &'s Step,
    wanted: &'s dyn Fn(&Match) -> bool,
) -> Box<dyn Iterator<Item = ()> + 's> {
    let names = move |of: Match| (!of.never && !of.ports.is_all() && wanted(&of)).then_some(());
    match step {
        Step::Test(test) => Box::new(names(Match::of(test)).into_iter()),
        Step::Map(_, set) if set.unread.is_some() => Box::new(std::iter::repeat(())),
        Step::Map(values, set) => {
            let each = set.keyed().iter().map(|element| Match::of_element(values, element));
            Box::new(each.filter_map(names))
        }
        _ => Box::new(std::iter::empty()),
    }
}

/// Whether addresses are translated in the table of this chain.
fn translates(rules: &Ruleset, chain: &Chain) -> bool {
    let is_of_it = |other: &&Chain| (other.family, &other.table) == (chain.family, &chain.table);
    let bases = rules.chains.iter().filter(is_of_it).filter_map(|other| other.base.as_ref());
    bases.into_iter().any(|base| base.is_nat)
}

fn first(rules: &Ruleset, wanted: &dyn Fn(&Match) -> bool) -> Option<String> {
    let leads = |step: &Step| named(step, wanted).next().is_some();
    let chains = rules.chains.iter().enumerate().filter(|(_, chain)| translates(rules, chain));
    chains.into_iter().find_map(|(number, chain)| {
        let rule = chain.rules.iter().position(|rule| rule.steps.iter().any(leads))?;
        rules.place(number, rule)
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::{Family, parse_saved};

    #[test]
    fn a_port_that_a_rule_of_nat_names_is_published() {
        let text = "*nat\n:PREROUTING ACCEPT [0:0]\n:DOCKER - [0:0]\n\
                    -A PREROUTING -m addrtype --dst-type LOCAL -j DOCKER\n\
                    -A DOCKER ! -i docker0 -p tcp -m tcp --dport 8001 -j DNAT --to-destination 10.1.1.2:80\n\
                    -A DOCKER -p tcp -m multiport --dports 90,95 -j DNAT --to-destination 10.1.1.3\n\
                    COMMIT\n\
                    *filter\n:INPUT ACCEPT [0:0]\n-A INPUT -p tcp --dport 22 -j ACCEPT\nCOMMIT\n";
        let rules = Ruleset { chains: parse_saved(text, Family::Ip), unread: Vec::new() };
        let published = [22, 80, 90, 95, 8001].map(|port| is_published(&rules, port));
        assert_eq!(published, [false, false, true, true, true]);
        let led = |ipv4| super::published(&Player::new(&rules), ipv4).map(Vec::from_iter);
        let to = |port| BTreeSet::from([port]);
        assert_eq!(led(true), Some(vec![(90, to(90)), (95, to(95)), (8001, to(80))]));
        assert_eq!(led(false), Some(vec![]));
        assert_eq!(any(&rules).as_deref(), Some("ip nat DOCKER rule 1"));
        assert_eq!([true, false].map(|ipv4| are_several(&rules, ipv4)), [true, false]);
        let filter = Ruleset { chains: rules.chains.into_iter().skip(2).collect(), ..rules };
        assert_eq!(any(&filter), None);
    }
}
