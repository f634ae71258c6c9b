//! Is this host set up so that limits work? One finding for each thing that must be right.

mod asked;
pub mod judge;
mod trial;
pub mod unit;

use nix::errno::Errno;
use nix::sched::{CloneFlags, unshare};
use std::thread;
use std::time::{Duration, Instant, SystemTime};

use netlink_sys::protocols::NETLINK_NETFILTER;

use self::trial::Trial;
use self::unit::Unit;
use crate::audit::figures::Figures;
use crate::audit::finding::{Finding, Verdict};
use crate::audit::judge::sockets;
use crate::audit::layers::{Application, Layers, Queue};
use crate::audit::look::Seen;
use crate::audit::report::{Report, Request};
use crate::error::{Error, Op, Result};
use crate::firewall::Hook;
use crate::firewall::limits::{EarlierAccept, LimitRule, Limiter};
use crate::host::instance::{self, Holder};
use crate::host::modules;
use crate::netlink::KernelSocket;
use crate::reconcile::policy::Policy;
use crate::recount::Route;
use crate::shield;

/// Capabilities by their bits (`include/uapi/linux/capability.h`).
const CAP_NET_ADMIN: u64 = 1 << 12;
const CAP_NET_RAW: u64 = 1 << 13;
const CAP_SYS_PTRACE: u64 = 1 << 19;
/// What the event socket asks for; holds 13 000 events.
const RECEIVE_BUFFER: usize = 8 << 20;

/// The findings of one look at a host.
#[derive(Debug)]
pub struct Diagnosis {
    /// In the order of looking.
    pub findings: Vec<Finding>,
    /// A privilege or kernel feature is missing: nothing works.
    pub is_unavailable: bool,
}

/// Examines the namespace that the calling thread is in; with `ask` a recount is tried through its own
/// rules.
///
/// `clock` is the same moment as `now`.
pub fn examine(policy: &Policy, ask: bool, now: Instant, clock: SystemTime) -> Diagnosis {
    let mut findings = vec![kernel(&release())];
    findings.extend(privileges());
    let (seen, scope) = match Seen::look("", policy) {
        Ok(seen) => seen,
        Err(error) => {
            findings.push(unavailable(&error));
            return Diagnosis { findings, is_unavailable: true };
        }
    };
    let (limiter, links) = (seen.limiter.clone(), seen.links.clone());
    findings.extend(seen.figures.iter().filter_map(|figures| lease(policy.lease, figures)));
    let asked = ask.then(|| asked::ask(&seen, now));
    let request = Request { limit: None, mask: None, mask6: None, now: clock };
    findings.extend(found(Report::of(seen, &scope, policy, request)));
    let trial = try_recount(now);
    findings.extend(recount(&trial, &limiter));
    findings.extend(judge::devices(&links));
    findings.push(receive_buffer());
    findings.extend(Unit::read().iter().flat_map(judge::unit));
    findings.push(daemon());
    findings.push(shield(!limiter.rules.is_empty()));
    let is_unavailable = findings
        .iter()
        .any(|finding| finding.verdict == Verdict::Bad && MISSING.contains(&finding.id));
    findings.extend(asked.filter(|_| !is_unavailable));
    Diagnosis { findings, is_unavailable }
}

/// What the audit finds, layer by layer.
fn found(report: Report) -> Vec<Finding> {
    let classes = report.classes().into_iter();
    let disagreeing = classes.filter(|(class, n)| *n > 0 && class.is_disagreement());
    let disagreeing: Vec<_> = disagreeing.map(|(class, n)| format!("{n} {class}")).collect();
    let Layers { conntrack, limiter, syn, listen, application } = report.layers;
    let mut all: Vec<_> = conntrack.into_iter().flat_map(|layer| layer.findings).collect();
    let is_unread = limiter.findings.iter().any(|finding| finding.id == "rules-unread");
    let is_limited = is_unread || !limiter.figures.rules.is_empty();
    all.push(sockets::tables(&disagreeing, is_limited));
    let is_over = limiter.findings.iter().any(|finding| finding.id == "source-over-limit");
    if !is_over && !limiter.figures.rules.is_empty() {
        let held: usize = report.sources.iter().map(|source| source.held).sum();
        let sources = report.sources.iter().filter(|source| source.held > 0).count();
        let s = |count| if count == 1 { "" } else { "s" };
        let (of_sources, of_held) = (s(sources), s(held));
        let what = format!(
            "{sources} source{of_sources} with {held} socket{of_held}, none over its limit"
        );
        all.push(Finding::ok("source-over-limit", what));
    }
    all.extend(limiter.findings);
    all.extend(syn.into_iter().flat_map(|layer| layer.findings));
    // The fullest queue stands for those that are no worse.
    let fill = |queue: &Queue| u64::from(queue.waiting) * 1000 / (u64::from(queue.limit) + 1);
    let fullest = listen.iter().max_by_key(|queue| fill(queue)).map(Queue::finding);
    let none = || Finding::ok("listen-queue-full", "no listening port");
    all.extend(troubled(listen.iter().map(Queue::finding), fullest.unwrap_or_else(none)));
    let most = application.first().map(Application::finding);
    let none = || Finding::ok("half-closed-held", "no open sockets");
    all.extend(troubled(application.iter().map(Application::finding), most.unwrap_or_else(none)));
    all
}

/// Those of which something is wrong; where nothing is, this one.
fn troubled(all: impl Iterator<Item = Finding>, otherwise: Finding) -> Vec<Finding> {
    let some: Vec<_> = all.filter(|finding| finding.verdict != Verdict::Ok).collect();
    if some.is_empty() { vec![otherwise] } else { some }
}

/// Without these nothing can be done here.
const MISSING: [&str; 3] = ["privilege-net-admin", "privilege-net-raw", "kernel-feature"];

fn release() -> String {
    nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// A kernel's limiter, as it was measured (docs/doctor.md).
fn kernel(release: &str) -> Finding {
    let mut numbers = release.split(['.', '-']).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    match version {
        (0..=4, _) | (5, 0..=9) => Finding::warn(
            "kernel",
            format!("Linux {release}: older than any that ctkeep is tested on"),
            "use Linux 5.10 or newer",
        ),
        (5, 10..=14) => Finding::ok(
            "kernel",
            format!("Linux {release}: old RSTs are INVALID here, repeated FINs free a slot"),
        ),
        _ => Finding::ok(
            "kernel",
            format!("Linux {release}: an old RST or a repeated FIN frees a slot of the limiter"),
        ),
    }
}

fn privileges() -> Vec<Finding> {
    let held = procfs::process::Process::myself()
        .and_then(|process| process.status())
        .map_or(0, |status| status.capeff);
    let grant =
        "run as root, or by the systemd unit: AmbientCapabilities=CAP_NET_ADMIN CAP_NET_RAW";
    let check = |id, name: &str, bit: u64, needed: &str| {
        if held & bit != 0 {
            Finding::ok(id, format!("{name} is held"))
        } else {
            Finding::bad(id, format!("{name} is missing: {needed}"), grant)
        }
    };
    let mut all = vec![
        check("privilege-net-admin", "CAP_NET_ADMIN", CAP_NET_ADMIN, "conntrack cannot be read"),
        check("privilege-net-raw", "CAP_NET_RAW", CAP_NET_RAW, "no recount"),
    ];
    if held & CAP_SYS_PTRACE == 0 {
        all.push(Finding::warn(
            "privilege-ptrace",
            "CAP_SYS_PTRACE is missing: the audit cannot name other users' processes",
            "run the audit as root",
        ));
    }
    all
}

fn unavailable(error: &Error) -> Finding {
    let advice = match error.errno() {
        // No module helps.
        Some(Errno::EPERM) => "run doctor as root".to_owned(),
        _ => modules::advice(),
    };
    Finding::bad("kernel-feature", error.to_string(), advice)
}

/// A lease must be longer than what the kernel gives by itself, and shorter than ESTABLISHED.
fn lease(lease: Duration, figures: &Figures) -> Option<Finding> {
    let established = Duration::from_secs(figures.table.timeout_established?);
    Some(if established < lease {
        Finding::warn(
            "lease",
            format!(
                "idle ESTABLISHED entries last {} s, shorter than the lease of {} s",
                established.as_secs(),
                lease.as_secs()
            ),
            "a shorter --lease, or sysctl -w \
             net.netfilter.nf_conntrack_tcp_timeout_established=432000",
        )
    } else {
        Finding::ok("lease", format!("held entries last {} s", lease.as_secs()))
    })
}

/// What a throw-away namespace with the same kernel and the same rights allows.
fn try_recount(now: Instant) -> Result<Trial> {
    thread::scope(|scope| {
        let trial = scope.spawn(|| {
            unshare(CloneFlags::CLONE_NEWNET)
                .map_err(|errno| Op::new("make a network namespace").io(errno.into()))?;
            Trial::run(now)
        });
        trial.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

fn recount(trial: &Result<Trial>, limiter: &Limiter) -> Vec<Finding> {
    const MODULES: &str = "modprobe -a tun sch_ingress cls_u32 act_mirred nf_tables";
    let trial = match trial {
        Ok(trial) => trial,
        Err(error) => {
            return vec![Finding::warn(
                "recount-route",
                format!("not tried: {error}"),
                "run ctkeep doctor as root; modprobe -a nf_tables nft_connlimit",
            )];
        }
    };
    let mut counted = Vec::new();
    let mut failed = Vec::new();
    let mut seal = None;
    let mut hides = None;
    for (route, outcome) in &trial.routes {
        match outcome {
            Ok(of_route) => {
                counted.push(*route);
                seal = seal.or(Some(&of_route.sealed));
                hides = hides.or(of_route.hides);
            }
            Err(error) => failed.push(format!("not by {route}: {}", error.cause)),
        }
    }
    let names: Vec<_> = counted.iter().map(|route| route.name()).collect();
    let what = format!(
        "tried in a namespace of its own: a limit counts connections again by {}",
        names.join(" and by ")
    );
    let loopback_only = !counted.contains(&Route::Ingress);
    let load = format!("{MODULES}; {}", modules::advice());
    let mut all = vec![match (counted.is_empty(), loopback_only) {
        (true, _) => Finding::bad(
            "recount-route",
            format!(
                "tried in a namespace of its own: no limit counts a connection again: {}",
                failed.join("; ")
            ),
            load,
        ),
        (false, true) => {
            Finding::warn("recount-route", format!("{what}; {}", failed.join("; ")), load)
        }
        (false, false) if failed.is_empty() => Finding::ok("recount-route", what),
        (false, false) => Finding::ok("recount-route", format!("{what}; {}", failed.join("; "))),
    }];
    all.extend(
        limiter.rules.iter().filter(|rule| loopback_only && !is_reached_by_loopback(rule)).map(
            |rule| {
                Finding::bad(
                    "recount-unreachable",
                    format!("{}: the loopback route does not reach it", rule.place()),
                    format!("load the modules of the ingress route: {MODULES}"),
                )
            },
        ),
    );
    all.extend(seal.map(|sealed| match sealed {
        Ok(()) => Finding::ok("seal", "revived connections can be made immune to stale RSTs"),
        Err(error) => Finding::warn(
            "seal",
            format!("revived connections stay open to the next stale RST: {}", error.cause),
            "modprobe nf_tables",
        ),
    }));
    all.extend(hides.map(|hides| match hides {
        true => Finding::ok("hide", "packets that fool conntrack can be hidden from it"),
        false => Finding::warn(
            "hide",
            "nf_tables of this kernel does not write TCP's flags: what fools conntrack again is repaired afterwards",
            "use another kernel, or expect up to a limit more in each burst of packets",
        ),
    }));
    all
}

fn is_reached_by_loopback(rule: &LimitRule) -> bool {
    rule.hook != Hook::Forward
        && !rule.before.contains(&EarlierAccept::Loopback)
        && rule.matches.interfaces.is_empty()
}

fn receive_buffer() -> Finding {
    let op = Op::new("open conntrack netlink");
    let granted = KernelSocket::open(op, NETLINK_NETFILTER).map(|mut socket| {
        let _ = socket.grow_receive_buffer(RECEIVE_BUFFER);
        socket.receive_buffer()
    });
    match granted {
        Ok(bytes) if bytes >= RECEIVE_BUFFER => {
            Finding::ok("receive-buffer", format!("{} MiB for events", bytes >> 20))
        }
        Ok(bytes) => Finding::warn(
            "receive-buffer",
            format!("only {} KiB for events: bursts will overrun it", bytes >> 10),
            format!("sysctl -w net.core.rmem_max={RECEIVE_BUFFER}"),
        ),
        Err(error) => unavailable(&error),
    }
}

fn daemon() -> Finding {
    match instance::holder("ctkeep") {
        None => Finding::warn(
            "daemon",
            "no ctkeep run guards this namespace",
            "systemctl enable --now ctkeep",
        ),
        Some(Holder::Ctkeep) => Finding::ok("daemon", "ctkeep run guards this namespace"),
        Some(Holder::Stranger) => Finding::warn(
            "daemon",
            "a user who is no administrator has the name by which a ctkeep run is found, so whether \
             one guards this namespace is not known",
            "ss -xlp | grep @ctkeep",
        ),
    }
}

/// Recommended where it would work and there is a limit to keep.
fn shield(is_limited: bool) -> Finding {
    if let Some(shield) = instance::ask("ctkeep").shield {
        let ports = shield.ports.len();
        return if shield.is_whole {
            Finding::ok("shield", format!("up, over {ports} ports"))
        } else {
            Finding::warn(
                "shield",
                format!("up, over {ports} ports, but not at every device"),
                "journalctl -u ctkeep names them; docs/shield.md says why",
            )
        };
    }
    if !shield::IS_BUILT_IN {
        return Finding::ok("shield", "not built into this ctkeep");
    }
    match shield::try_load() {
        Ok(()) if is_limited => Finding::warn(
            "shield",
            "down: in one burst of packets a client gains connections that are counted only later",
            "shield = \"auto\" in ctkeep.toml, and the drop-in shield.conf",
        ),
        Ok(()) => Finding::ok("shield", "could be raised"),
        Err(error) => Finding::ok("shield", format!("cannot be raised: {}", error.cause)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_apart_by_their_numbers() {
        assert_eq!(kernel("4.19.0-27-amd64").verdict, Verdict::Warn);
        assert!(kernel("5.10.0-32-amd64").what.contains("INVALID"));
        assert!(kernel("6.18.44").what.contains("an old RST"));
        assert_eq!(kernel("nonsense").verdict, Verdict::Warn);
    }
}
