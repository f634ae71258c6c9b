//! Judges devices and units. Pure: the thresholds stand here and in docs/doctor.md.

use super::unit::Unit;
use crate::audit::finding::Finding;
use crate::rtnetlink::link::Link;

/// Devices that repairs go by, and those that are not tried.
pub fn devices(links: &[Link]) -> Vec<Finding> {
    let mut all = Vec::new();
    for link in links {
        let ports = links.iter().filter(|port| port.master == Some(link.index));
        let ports: Vec<_> = ports.map(|port| port.name.as_str()).collect();
        let what = match ports.as_slice() {
            [] => format!("{} {}", link.kind, link.name),
            ports => format!("{} {} of {}", link.kind, link.name, ports.join(", ")),
        };
        match link.kind.as_str() {
            "vrf" => all.push(Finding::warn(
                "ingress-device",
                format!("{what}: its clients are not in the main routing table"),
                "recount is not tested there: after a repair, compare by ctkeep audit",
            )),
            "bridge" | "bond" if !ports.is_empty() => {
                all.push(Finding::ok("ingress-device", format!("{what}: nudges come in by it")));
            }
            "vlan" => {
                all.push(Finding::ok("ingress-device", format!("{what}: nudges come in by it")));
            }
            _ => {}
        }
    }
    all
}

/// What the service may use. Thresholds: twice what 100 000 held connections in a few namespaces
/// take.
pub fn unit(unit: &Unit) -> Vec<Finding> {
    const TASKS: u64 = 32;
    const MEMORY_MIB: u64 = 256;
    const CPU: u64 = 50;
    const FILES: u64 = 256;
    let bounds = [
        ("unit-limits", "TasksMax", unit.tasks, TASKS, ""),
        ("unit-limits", "MemoryMax", unit.memory.map(|bytes| bytes >> 20), MEMORY_MIB, "M"),
        ("unit-limits", "CPUQuota", unit.cpu, CPU, "%"),
        ("open-files", "LimitNOFILE", unit.files, FILES, ""),
    ];
    let judge = |(id, name, bound, needed, sign): (_, &str, Option<u64>, u64, &str)| {
        let bound = bound?;
        Some(if bound < needed {
            Finding::warn(
                id,
                format!("process {}: {name}={bound}{sign}, tight with many connections", unit.pid),
                format!("{name}={needed}{sign} in the systemd unit"),
            )
        } else {
            Finding::ok(id, format!("{name}={bound}{sign}"))
        })
    };
    bounds.into_iter().filter_map(judge).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::audit::finding::Verdict;

    #[test]
    fn repairs_go_by_a_bridge_and_not_by_its_ports() {
        let links = [
            Link::named(2, "eth0", "", Some(3)),
            Link::named(3, "br0", "bridge", None),
            Link::named(4, "eth1", "", None),
        ];
        let found: Vec<_> = devices(&links).iter().map(|f| (f.id, f.verdict)).collect();
        assert_eq!(found, [("ingress-device", Verdict::Ok)]);
    }

    #[test]
    fn a_service_is_judged_by_what_it_may_use() {
        let of = |unit: &Unit| {
            let findings = super::unit(unit);
            findings.iter().map(|f| (f.id, f.verdict)).collect::<Vec<_>>()
        };
        assert_eq!(of(&Unit::default()), []);
        let tight = Unit { tasks: Some(4), memory: Some(1 << 30), ..Unit::default() };
        assert_eq!(of(&tight), [("unit-limits", Verdict::Warn), ("unit-limits", Verdict::Ok)]);
        let few = Unit { files: Some(64), ..Unit::default() };
        assert_eq!(of(&few), [("open-files", Verdict::Warn)]);
    }
}
