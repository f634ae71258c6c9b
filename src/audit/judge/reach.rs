//! Whether clients come to a limit at all: devices, ports and translations that keep them from it, and sockets that
//! nothing looks at.

use std::collections::BTreeSet;

use crate::audit::finding::Finding;
use crate::firewall::limits::{Key, LimitRule, Limiter};
use crate::firewall::{Hook, Ruleset, published};
use crate::flow::Endpoint;
use crate::rtnetlink::link::Link;

/// A limit for devices that none of its packets comes in by: those of a bridge, bond or VRF come in by that one.
/// `links` are empty where they are not known. Nothing of one that is named by its number.
pub fn device(rule: &LimitRule, links: &[Link]) -> Option<Finding> {
    const ID: &str = "limit-interface";
    let named = &rule.matches.interfaces;
    let link = |name: &String| links.iter().find(|link| link.name == *name);
    if named.is_empty()
        || links.is_empty()
        || named.iter().any(|name| name.ends_with('*') || name.contains(' '))
    {
        return None;
    }
    let found: Vec<_> = named.iter().filter_map(link).collect();
    if found.is_empty() {
        return Some(Finding::warn(
            ID,
            format!(
                "{rule} is for {}, which this host does not have now: it counts nothing",
                named.join(", ")
            ),
            format!("name the device that clients come in by: {}", names(links)),
        ));
    }
    let master = |link: &&Link| links.iter().find(|other| Some(other.index) == link.master);
    let masters: Vec<_> = found.iter().filter_map(master).collect();
    let first = masters.first().filter(|_| masters.len() == found.len())?;
    Some(Finding::bad(
        ID,
        format!(
            "{rule} is for {}, whose packets come in by {} {}: it never counts one",
            named.join(", "),
            first.kind,
            first.name
        ),
        format!("name {} in the rule", first.name),
    ))
}

/// A limit that counts connections to these ports together with others, which were not looked at.
pub fn partial(rule: &LimitRule, left_out: &BTreeSet<u16>) -> Option<Finding> {
    let is_together = !matches!(rule.limit.key, Key::SourceAndPort(_)) && rule.hook == Hook::Input;
    let ports = left_out.iter().filter(|port| is_together && rule.matches.ports.contains(**port));
    let ports: Vec<_> = ports.map(u16::to_string).collect();
    (!ports.is_empty()).then(|| {
        Finding::warn(
            "limit-partial",
            format!(
                "{rule} counts port {}, too, which was not looked at: a source may be at it with fewer \
                 sockets than are shown",
                ports.join(", ")
            ),
            "leave --port out",
        )
    })
}

/// Those by which others may come in.
fn names(links: &[Link]) -> String {
    let all = links.iter().filter(|link| !link.is_loopback && link.master.is_none());
    all.map(|link| link.name.as_str()).collect::<Vec<_>>().join(", ")
}

/// None of the connections to a port that the limit names comes to it.
pub fn translated(rule: &LimitRule, port: u16, local: Endpoint, connections: usize) -> Finding {
    let all = all(connections);
    Finding::warn(
        "limit-translated",
        format!("{rule} does not see {all} to port {port}: rules lead them to {local} first"),
        format!(
            "limit port {} where they pass (FORWARD, where that is in a container), or what clients asked \
             for: --ctorigdstport {port} (nft: ct original proto-dst {port})",
            local.port()
        ),
    )
}

fn all(connections: usize) -> &'static str {
    if connections == 1 { "the one open connection" } else { "any of the open connections" }
}

/// A limit of INPUT for any port, which connections to containers do not pass; no other limit is for these.
pub fn forwarded(rule: &LimitRule, port: u16, local: Endpoint, connections: usize) -> Finding {
    let all = all(connections);
    Finding::warn(
        "limit-translated",
        format!(
            "{rule} does not see {all} to port {port}: rules lead them to {local} in a container, past INPUT, and \
             no limit is there"
        ),
        format!("limit port {} in FORWARD (DOCKER-USER), too", local.port()),
    )
}

/// The same of what a transparent proxy takes, whose own port the limit names.
pub fn proxied(rule: &LimitRule, port: u16, connections: usize) -> Finding {
    let all = all(connections);
    Finding::warn(
        "limit-translated",
        format!(
            "{rule} does not see {all} to port {port}: a transparent proxy takes them, and their packets keep \
             the port that clients asked for"
        ),
        format!("limit port {port}"),
    )
}

/// Ports that are named in vain.
pub fn unheard(ports: &[u16]) -> Option<Finding> {
    let ports: Vec<_> = ports.iter().map(u16::to_string).collect();
    (!ports.is_empty()).then(|| {
        Finding::warn(
            "port-unheard",
            format!("nothing listens on port {}, and no rule leads it elsewhere", ports.join(", ")),
            "start its server, or name the ports that clients use: --port",
        )
    })
}

/// Limits of what is forwarded, and published ports, whose sockets are in other namespaces: the daemon
/// does not look at them, as it says, or this look may not, for want of privileges.
pub fn unseen(
    limiter: &Limiter,
    rules: &Ruleset,
    namespaces: usize,
    unseen: usize,
    daemon_looks: Option<bool>,
) -> Option<Finding> {
    let forwarded = limiter.rules.iter().find(|rule| rule.hook == Hook::Forward);
    let place = forwarded.map(LimitRule::place).or_else(|| published::any(rules))?;
    if unseen > 0 {
        return Some(Finding::bad(
            "limit-unseen",
            format!("{place}: its sockets are in namespaces that this look may not enter"),
            "run it as root, with CAP_SYS_ADMIN, CAP_SYS_PTRACE and CAP_DAC_READ_SEARCH",
        ));
    }
    (namespaces > 0 && daemon_looks == Some(false)).then(|| {
        Finding::bad(
            "limit-unseen",
            format!("{place}: the daemon does not look at its sockets, in {namespaces} namespaces"),
            "install -D -m 0644 -t /etc/systemd/system/ctkeep.service.d \
             /usr/share/doc/ctkeep/examples/containers.conf && systemctl daemon-reload && \
             systemctl restart ctkeep",
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::finding::Verdict;
    use crate::firewall::{Family, parse_saved};

    #[test]
    fn packets_of_a_bridges_port_come_in_by_the_bridge() {
        let links = [
            Link::named(1, "lo", "", None),
            Link::named(2, "eth0", "", Some(3)),
            Link::named(3, "br0", "bridge", None),
            Link::named(4, "eth1", "", None),
        ];
        let said = |interface: &str, links: &[Link]| {
            let text = format!(
                "*filter\n:INPUT ACCEPT [0:0]\n-A INPUT -i {interface} -p tcp -m tcp --syn -m connlimit --connlimit-above 3 -j DROP\nCOMMIT\n"
            );
            let limiter = Limiter::of(&Ruleset {
                chains: parse_saved(&text, Family::Ip),
                unread: Vec::new(),
            });
            let rule = limiter.rules.first().expect("a limit");
            device(rule, links).map(|it| (it.verdict, it.advice))
        };
        let name = |what: &str| Some((Verdict::Bad, format!("name {what} in the rule")));
        assert_eq!(said("eth0", &links), name("br0"));
        let way = "name the device that clients come in by: br0, eth1";
        assert_eq!(said("ens3", &links), Some((Verdict::Warn, way.to_owned())));
        for interface in ["br0", "eth1", "ens+", "eth+"] {
            assert_eq!(said(interface, &links), None, "{interface}");
        }
        assert_eq!(said("ens3", &[]), None, "where they are not known");
    }
}
