//! Connections that this host and its containers opened: kept with their translation for as long as
//! the socket is half-closed, and not longer.

mod scene;

use std::fs;
use std::io::Write;
use std::net::Shutdown;
use std::thread;
use std::time::{Duration, Instant};

use crate::lab::{self, Entry, Namespace, passing, wait_for};
use scene::{CLOSE_WAIT, Dialled, EXTEND, FAR, SOON, Scene, both, leaving};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const FAR_V6: &str = "[2001:db8::2]:443";
const CONTAINER: fn(&Scene) -> &Namespace = |scene| &scene.container;
const MASQUERADE: &str = "-j MASQUERADE --random-fully";
const ONE_PORT: &str = "-j SNAT --to-source 192.0.2.1:61000-61000";
/// The kernel's time is over twice, the tuples are as they were, and what is written then arrives.
fn keeps_what_is_translated(
    scene: impl Fn() -> Option<Scene> + Sync,
    from: fn(&Scene) -> &Namespace,
    args: &[&str],
) {
    let with = [EXTEND, args].concat();
    let play = |is_kept: bool| {
        let scene = scene()?;
        let daemon = scene.daemon(if is_kept { &with } else { args });
        let mut all = [scene.half_closed_from(from(&scene))];
        let before = scene.tuples(&all);
        scene.outlive(&all[0], is_kept);
        assert!(!is_kept || scene.tuples(&all) == before, "{}", daemon.log());
        let delivers = all[0].delivers();
        let local = all[0].near.local_addr().expect("an address");
        drop(all);
        wait_for("the end of the entry", SOON, || {
            let entries = scene.lab.entries();
            let open = |entry: &&Entry| entry.orig.0 == local && entry.state == "CLOSE_WAIT";
            entries.iter().find(open).is_none()
        });
        let (status, log) = daemon.term();
        assert!(status.success() && !log.contains("ERROR"), "{log}");
        Some(delivers)
    };
    let Some(both) = both(play) else { return };
    assert_eq!(both, (false, true));
}

/// kube-proxy's and Docker's way: a port by chance.
#[test]
fn what_a_container_writes_long_after_the_far_side_has_closed_arrives() {
    keeps_what_is_translated(|| Scene::new(MASQUERADE), CONTAINER, &[]);
}

#[test]
fn over_ipv6_the_same_by_masquerade_and_by_snat() {
    for rule in [MASQUERADE, "-j SNAT --to-source 2001:db8::1 --random-fully"] {
        let rule = leaving(rule).replace("iptables", "ip6tables");
        keeps_what_is_translated(|| Scene::of(FAR_V6, &[&rule]), CONTAINER, &[]);
    }
}

/// As kube-proxy has it, with two endpoints: each new entry would lead to the other one.
fn cluster_address(chain: &str) -> Option<Scene> {
    let endpoint = |turn: &str, port: u16| {
        format!(
            "iptables -t nat -A {chain} -d 10.96.0.10 -p tcp --dport 80 {turn} -j DNAT \
             --to-destination 192.0.2.2:{port}"
        )
    };
    let first = endpoint("-m statistic --mode nth --every 2 --packet 0", 443);
    let commands = [
        "ip route add 10.96.0.0/12 via 192.0.2.2",
        &first,
        &endpoint("", 444),
        &leaving(MASQUERADE),
    ];
    let mut scene = Scene::of(FAR, &commands)?;
    scene.dials = "10.96.0.10:80".parse().expect("an address");
    Some(scene)
}

#[test]
fn a_container_stays_with_the_endpoint_of_a_cluster_address() {
    keeps_what_is_translated(|| cluster_address("PREROUTING"), CONTAINER, &[]);
}

#[test]
fn the_host_stays_with_the_endpoint_of_a_cluster_address() {
    keeps_what_is_translated(|| cluster_address("OUTPUT"), |scene| &scene.lab.server, &[]);
}

#[test]
fn in_a_zone_that_is_named_the_same() {
    let scene = || {
        let scene = Scene::new(MASQUERADE)?;
        let chain = "type filter hook prerouting priority raw; iifname { cont0, eth0 }";
        let zones = format!("table ip zones {{ chain pre {{ {chain} ct zone set 5; }}\n}}\n");
        scene.lab.server.feed("nft -f -", &zones);
        Some(scene)
    };
    keeps_what_is_translated(scene, CONTAINER, &["--zone", "5"]);
}

/// Of a range with one port the second connection gets none as long as the first has it.
#[test]
fn a_port_is_not_given_away_while_its_socket_is_open() {
    let play = |is_kept: bool| {
        let scene = Scene::new(ONE_PORT)?;
        let _daemon = scene.daemon(if is_kept { EXTEND } else { &[] });
        let mut first = scene.dial();
        scene.outlive(&first, is_kept);
        let second = scene.dial_from(&scene.container);
        Some((second.is_some(), first.delivers()))
    };
    let Some(both) = both(play) else { return };
    assert_eq!(both, ((true, false), (false, true)));
}

#[test]
fn one_of_a_pool_of_addresses_keeps_its_own() {
    let play = |is_kept: bool| {
        let scene = Scene::new("-j SNAT --to-source 192.0.2.10-192.0.2.13 --random")?;
        for last in 10..14 {
            scene.lab.server.run(&format!("ip addr add 192.0.2.{last}/32 dev eth0"));
        }
        let _daemon = scene.daemon(if is_kept { EXTEND } else { &[] });
        let mut all: Vec<_> = (0..8).map(|_| scene.dial()).collect();
        let before = scene.tuples(&all);
        if is_kept {
            all.iter().for_each(|one| scene.outlive_lease(one));
        }
        // As an administrator would.
        scene.lab.server.run("conntrack -D -p tcp --state CLOSE_WAIT");
        if is_kept {
            wait_for("put back", SOON * 2, || scene.tuples(&all) == before);
        }
        Some(all.iter_mut().map(Dialled::delivers).filter(|it| *it).count())
    };
    let Some(both) = both(play) else { return };
    assert_eq!(both, (0, 8));
}

#[test]
fn the_hosts_own_connections_are_kept_too() {
    keeps_the_hosts_own(FAR);
}

#[test]
fn the_hosts_own_connections_over_ipv6_are_kept_too() {
    keeps_the_hosts_own(FAR_V6);
}

fn keeps_the_hosts_own(far: &str) {
    let play = |is_kept: bool| {
        // Without an entry of its own what comes is INVALID, and dropped.
        let rule = |program| format!("{program} -A INPUT -m conntrack --ctstate INVALID -j DROP");
        let scene = Scene::of(far, &[&rule("iptables"), &rule("ip6tables")])?;
        scene.lab.server.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0");
        let _daemon = scene.daemon(if is_kept { EXTEND } else { &[] });
        let mut dialled = scene.half_closed_from(&scene.lab.server);
        scene.outlive(&dialled, is_kept);
        assert!(dialled.delivers());
        // Its ACK is INVALID without an entry, so it is sent again and again.
        let unacked = || {
            let local = dialled.near.local_addr().expect("an address");
            let line = scene.lab.server.output(&format!("ss -Htn sport = :{}", local.port()));
            line.split_whitespace().nth(2).map(str::to_owned)
        };
        thread::sleep(Duration::from_secs(1));
        Some(unacked().as_deref() == Some("0"))
    };
    let Some(both) = both(play) else { return };
    assert_eq!(both, (false, true));
}

/// The process holds its socket for as long as it likes; it ends when TCP gives up.
#[test]
fn of_a_far_side_that_is_gone_the_entry_goes_with_the_socket() {
    let play = |is_kept: bool| {
        let scene = Scene::new(MASQUERADE)?;
        let daemon = scene.daemon(if is_kept { EXTEND } else { &[] });
        let dialled = scene.dial();
        if is_kept {
            scene.outlive_lease(&dialled);
        }
        scene.lab.client.run("ip link set eth0 down");
        let local = dialled.near.local_addr().expect("an address");
        let lives = || {
            let entries = scene.lab.entries();
            entries.iter().any(|entry| entry.orig.0 == local && entry.state == "CLOSE_WAIT")
        };
        thread::sleep(CLOSE_WAIT * 2);
        let with_socket = lives();
        // Without a word to anybody.
        scene.container.run(&format!("ss -K sport = :{}", local.port()));
        wait_for("the release", SOON, || !lives());
        assert!(!daemon.logged("ERROR"), "{}", daemon.log());
        Some(with_socket)
    };
    let Some(both) = both(play) else { return };
    assert_eq!(both, (false, true));
}

/// Its retransmissions come ever later, and at last later than the kernel's time.
#[test]
fn a_far_side_that_comes_back_gets_what_was_written_meanwhile() {
    let play = |is_kept: bool| {
        let scene = Scene::new(MASQUERADE)?;
        let _daemon = scene.daemon(if is_kept { EXTEND } else { &[] });
        let mut all = [scene.dial()];
        let before = scene.tuples(&all);
        if is_kept {
            scene.outlive_lease(&all[0]);
        }
        scene.lab.client.run("iptables -I INPUT -p tcp -j DROP");
        assert!(!all[0].delivers());
        // After 13 s the next one comes 13 s later.
        match is_kept {
            true => thread::sleep(Duration::from_secs(20)),
            false => wait_for("the end", SOON * 2, || scene.tuples(&all) != before),
        }
        assert!(!is_kept || scene.tuples(&all) == before);
        scene.lab.client.run("iptables -D INPUT -p tcp -j DROP");
        Some(all[0].arrives(SOON))
    };
    let Some(both) = both(play) else { return };
    assert_eq!(both, (false, true));
}

/// The far side has not had the ACK of its FIN, it seems.
#[test]
fn a_fin_that_comes_again_does_not_end_it() {
    let play = |is_kept: bool| {
        let scene = Scene::new(MASQUERADE)?;
        for (state, seconds) in [("last_ack", "5"), ("time_wait", "5")] {
            let name = format!("net/netfilter/nf_conntrack_tcp_timeout_{state}");
            scene.lab.server.sysctl(&name, seconds);
        }
        let _daemon = scene.daemon(if is_kept { EXTEND } else { &[] });
        let mut dialled = scene.dial_from(&scene.container).expect("a connection");
        scene.lab.client.run("iptables -I INPUT -p tcp --dport 443 -j DROP");
        dialled.far.shutdown(Shutdown::Write).expect("a FIN");
        wait_for("the second FIN", SOON, || {
            scene.entry(&dialled).is_some_and(|entry| entry.state == "TIME_WAIT")
        });
        scene.lab.client.run("iptables -D INPUT -p tcp --dport 443 -j DROP");
        scene.outlive(&dialled, is_kept);
        Some(dialled.delivers())
    };
    let Some(both) = both(play) else { return };
    assert_eq!(both, (false, true));
}

/// While nobody looks after it: it is as lost as without ctkeep, and that is said.
#[test]
fn a_port_that_was_given_away_is_said() {
    let play = |is_kept: bool| {
        let scene = Scene::new(ONE_PORT)?;
        let daemon = scene.daemon(if is_kept { EXTEND } else { &[] });
        let mut first = scene.dial();
        if is_kept {
            scene.outlive_lease(&first);
        }
        daemon.stop();
        scene.lab.server.run("conntrack -D -p tcp --state CLOSE_WAIT");
        let mut second = scene.dial_from(&scene.container).expect("the port is free");
        let entry = scene.entry(&second).expect("an entry").line;
        daemon.cont();
        if is_kept {
            wait_for("the loss", SOON * 2, || daemon.logged("has lost its entry"));
            let log = daemon.log();
            assert!(log.contains("another connection has its address and port now"), "{log}");
        }
        assert_eq!(scene.entry(&second).expect("an entry").line, entry);
        Some((first.delivers(), second.delivers(), daemon.logged("has lost its entry")))
    };
    let Some(both) = both(play) else { return };
    assert_eq!(both, ((false, true, false), (false, true, true)));
}

/// The translation of a connection goes with its entry: doctor gives no all-clear then.
#[test]
fn what_has_lost_its_entry_is_not_said_to_be_well() {
    let Some(scene) = Scene::new("-j MASQUERADE") else { return };
    let _dialled = scene.dial();
    let said = || {
        let (_, out, err) = scene.lab.ctkeep(CTKEEP, &["doctor", "--format", "json"]);
        let report: serde_json::Value = serde_json::from_str(&out).expect("a report");
        let all = report["findings"].as_array().expect("findings");
        let found = all.iter().find(|it| it["id"] == "outgoing");
        let found = found.unwrap_or_else(|| panic!("{out}{err}"));
        (found["verdict"].clone(), found["what"].to_string().contains("cannot be told"))
    };
    assert_eq!(said(), ("warn".into(), false));
    scene.lab.server.run("conntrack -F");
    assert_eq!(said(), ("warn".into(), true));
}

/// Both of them before and after: as a container's that nobody keeps, and as one that is kept.
#[test]
fn audit_explain_doctor_and_metrics_show_them_apart() {
    let Some(scene) = Scene::new("-j MASQUERADE") else { return };
    let dialled = scene.dial();
    let local = dialled.near.local_addr().expect("an address").to_string();
    let audit = || {
        let (_, out, err) = scene.lab.ctkeep(CTKEEP, &["audit", "--format", "json"]);
        let report: serde_json::Value = serde_json::from_str(&out).expect("a report");
        (report["outgoing"].clone(), format!("{report:#}{err}"))
    };
    let shown = |args: &[&str], words: &[&str]| {
        let (_, out, err) = scene.lab.ctkeep(CTKEEP, args);
        let words: Vec<_> = words.iter().filter(|word| !out.contains(**word)).collect();
        assert!(words.is_empty(), "{words:?}: {out}{err}");
    };
    let (summary, report) = audit();
    let wanted = serde_json::json!({
        "sockets": 1, "translated": 1, "closing": 0, "without_entry": 0, "held": null, "lost": null,
    });
    assert_eq!(summary, wanted, "{report}");
    shown(&["explain", &local, FAR], &["this host opened it", "ctkeep run does not keep it"]);
    shown(
        &["doctor"],
        &["1 half-closed connections that this host or its containers opened, 1", "extend"],
    );

    let address = "127.0.0.1:9815";
    let args = ["--outgoing", "extend", "--metrics-listen", address];
    let daemon = scene.daemon(&args);
    wait_for("a lease", SOON, || scene.is_extended(&dialled));
    let (summary, report) = audit();
    assert_eq!((&summary["held"], &summary["lost"]), (&1.into(), &0.into()), "{report}");
    shown(&["explain", &local, FAR], &["kept        by ctkeep run for", "as long as its socket"]);
    shown(
        &["doctor"],
        &["1 half-closed connections that this host or its containers opened, 1", "entries kept"],
    );
    scene.lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close_wait", "3600");
    shown(&["doctor"], &["3600 s for all are needed no more", "timeout_close_wait=60"]);
    let answer = lab::http::ask(&scene.lab.server, address, "GET /metrics", "");
    let metrics = lab::http::samples(&answer.expect("metrics").body);
    for (name, wanted) in [
        ("ctkeep_outgoing_sockets", 1.0),
        ("ctkeep_outgoing_held_entries", 1.0),
        ("ctkeep_outgoing_lost_entries", 0.0),
        ("ctkeep_outgoing_lost_total{reason=\"taken\"}", 0.0),
    ] {
        assert_eq!(metrics.get(name), Some(&wanted), "{name}: {}", daemon.log());
    }
    let extended = metrics.get("ctkeep_outgoing_actions_total{action=\"extend\"}");
    assert!(extended.is_some_and(|count| *count >= 1.0));
    // None of it is a connection of the scope.
    assert_eq!(metrics.get("ctkeep_actions_total{action=\"extend\"}"), Some(&0.0));
    assert_eq!(metrics.get("ctkeep_held_connections{family=\"ipv4\"}"), Some(&0.0));
}

/// What is lost waits for room, and what is there goes on.
#[test]
fn a_full_table_is_said_and_the_lost_ones_are_back_when_there_is_room() {
    let maximum = fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_max");
    let maximum: usize = maximum.expect("a sysctl").trim().parse().expect("a number");
    if maximum > 300_000 {
        lab::skip(&format!("a table of {maximum} entries takes too long to fill"));
        return;
    }
    let play = |is_kept: bool| {
        let scene = Scene::new(MASQUERADE)?;
        let defence = ["--defence", "0"];
        let with = [EXTEND, &defence].concat();
        let daemon = scene.daemon(if is_kept { &with } else { &defence });
        let mut all: Vec<_> = (0..3).map(|_| scene.dial()).collect();
        let before = scene.tuples(&all);
        if is_kept {
            all.iter().for_each(|one| scene.outlive_lease(one));
        }
        daemon.stop();
        scene.lab.server.run("conntrack -D -p tcp --state CLOSE_WAIT");
        passing::fill_up(&scene.lab, maximum);
        daemon.cont();
        if is_kept {
            wait_for("the word", SOON * 2, || daemon.logged("conntrack table full"));
        }
        scene.lab.server.run("conntrack -F");
        if is_kept {
            wait_for("put back", SOON * 2, || scene.tuples(&all) == before);
            assert_eq!(daemon.log().matches("conntrack table full").count(), 1, "{}", daemon.log());
        }
        Some(all.iter_mut().map(Dialled::delivers).filter(|it| *it).count())
    };
    // One after the other: two full tables are a lot of memory.
    let Some(without) = play(false) else { return };
    assert_eq!((without, play(true)), (0, Some(3)));
}

/// The figures of docs/outgoing.md: the same traffic by the timeout of kube-proxy, by the kernel's, and by the
/// kernel's with ctkeep. A container closes 25 connections a second whose far side never does, and holds 50
/// that the far side has closed, and upon which it writes when 100 s are over.
#[test]
#[ignore = "two minutes, for figures"]
fn figures_of_three_ways() {
    const HELD: usize = 50;
    let files = nix::sys::resource::Resource::RLIMIT_NOFILE;
    let (_, most) = nix::sys::resource::getrlimit(files).expect("limits");
    nix::sys::resource::setrlimit(files, most, most).expect("more files");
    let play = |name: &str, timeout: &str, is_kept: bool| -> Option<String> {
        let scene = Scene::new(MASQUERADE)?;
        let setting = "net/netfilter/nf_conntrack_tcp_timeout_close_wait";
        scene.lab.server.sysctl(setting, timeout);
        let _daemon = scene.daemon(if is_kept { EXTEND } else { &[] });
        let mut held: Vec<_> = (0..HELD).map(|_| scene.dial()).collect();
        let count = || scene.lab.server.output("conntrack -C").trim().to_owned();
        let began = Instant::now();
        let (mut open, mut fill) = (Vec::new(), Vec::new());
        let mut resets = 0;
        for second in 1..=120_u32 {
            for _ in 0..25 {
                let Dialled { near, far } = scene.dial_from(&scene.container)?;
                drop(near);
                open.push(far);
            }
            if second == 100 {
                for dialled in &mut held {
                    dialled.near.write_all(b"late").expect("a socket that is open");
                }
                thread::sleep(Duration::from_millis(300));
                resets = held
                    .iter()
                    .filter(|it| it.near.take_error().is_ok_and(|e| e.is_some()))
                    .count();
            }
            if second % 40 == 0 {
                fill.push(format!("{} at {second} s", count()));
            }
            let next = Duration::from_secs(1) * second;
            thread::sleep(next.saturating_sub(began.elapsed()));
        }
        Some(format!("{name}: entries {}; {resets} of {HELD} reset", fill.join(", ")))
    };
    let ways = [("an hour", "3600", false), ("60 s", "60", false), ("60 s and ctkeep", "60", true)];
    thread::scope(|scope| {
        let all = ways.map(|(name, timeout, kept)| scope.spawn(move || play(name, timeout, kept)));
        all.into_iter().for_each(|way| println!("{:?}", way.join().expect("figures")));
    });
}
