//! Connections whose entry is gone, or runs the wrong way: put back where they were tracked, and
//! nowhere else.

use crate::lab;
use std::thread;
use std::time::Duration;

use crate::lab::{Lab, Peer, RawConn, holds_within, wait_for};
use crate::scene::{CLIENT, CTKEEP, Contrast, LIMIT, Limiter, PORT, SOON, Scene, TRIES, contrast};
use serde_json::Value;

/// Sweeps so often that a test need not wait long for one.
const BRISK: [&str; 2] = ["--sweep-interval", "100ms"];

/// Time for several of those.
const SWEPT: Duration = Duration::from_millis(600);

fn delete(scene: &Scene, conns: &[RawConn]) {
    for conn in conns {
        let (src, sport) = (conn.client.ip(), conn.client.port());
        scene.lab.server.run(&format!("conntrack -D -p tcp --orig-src {src} --sport {sport}"));
    }
}

fn flush(scene: &Scene, _: &[RawConn]) {
    // For a tick or two of its clock the kernel counts what it cannot find any more.
    thread::sleep(Duration::from_millis(50));
    scene.lab.server.run("conntrack -F");
}

/// Half-closed connections lose their entries, then their places in the limiter, and are counted
/// again: when the newcomers have left, nobody else gets in.
fn assert_forgotten_is_recounted(
    limiter: Limiter,
    args: &[&str],
    forget: impl Fn(&Scene, &[RawConn]) + Sync,
) {
    let args = [&BRISK[..], args].concat();
    let result = contrast(limiter, CLIENT, &args, |scene| {
        let conns = scene.half_closed();
        // ctkeep has seen them: the sweep has passed by.
        thread::sleep(SWEPT);
        scene.freeze();
        forget(scene, &conns);
        let newcomers = scene.open(TRIES);
        assert_eq!(newcomers.len(), LIMIT, "admitted in the place of those forgotten");
        scene.thaw();
        scene.await_repair("reinsert", &conns);
        scene.end(&newcomers);
        (scene.admitted(), scene.lab.sockets("close-wait"))
    });
    let Some(result) = result else { return };
    assert_eq!(result, Contrast { without: (LIMIT, LIMIT), with: (0, LIMIT) });
}

#[test]
fn entries_deleted_by_hand_are_put_back_and_counted() {
    assert_forgotten_is_recounted(Limiter::Connlimit, &[], delete);
}

/// A limiter forgets it at that SYN. Each sweep looks at 32 of all as well, hence the others.
#[test]
fn a_single_entry_that_is_deleted_is_back_soon_after_its_source_opens_a_connection() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    scene.guard(&["--deep-interval", "10m"]);
    let conns = scene.half_closed();
    let mut others: Vec<_> = (100..180)
        .flat_map(|host| scene.lab.peer(&format!("198.51.100.{host}")).open(PORT, LIMIT))
        .collect();
    others.iter_mut().for_each(RawConn::fin);
    // Until sweeps have named the sources.
    thread::sleep(Duration::from_secs(3));
    delete(&scene, conns.get(..1).unwrap_or_default());
    scene.open(1);
    let is_back = || conns.first().is_some_and(|conn| scene.lab.entry_state(conn).is_some());
    assert!(holds_within(Duration::from_millis(1200), is_back), "{}", scene.daemon().log());
}

#[test]
fn a_flushed_table_is_put_back_and_counted() {
    assert_forgotten_is_recounted(Limiter::Connlimit, &[], flush);
}

#[test]
fn a_flushed_table_is_put_back_and_counted_by_an_nft_set() {
    assert_forgotten_is_recounted(Limiter::NftSet, &[], flush);
}

#[test]
fn a_flushed_table_is_put_back_by_the_sweep_alone() {
    assert_forgotten_is_recounted(Limiter::Connlimit, &["--events", "off"], flush);
}

/// Nothing but the rules shows that the port is tracked: all that it had was forgotten before the
/// start.
fn forgotten_before_the_start(limiter: Limiter, rules: &[&str]) -> Option<usize> {
    let mut scene = Scene::new(limiter)?;
    rules.iter().for_each(|rule| scene.lab.server.run(rule));
    let conns = scene.half_closed();
    flush(&scene, &conns);
    let newcomers = scene.open(TRIES);
    assert_eq!(newcomers.len(), LIMIT, "without ctkeep, in the place of those forgotten");
    scene.end(&newcomers);
    flush(&scene, &conns);
    scene.guard(&[&BRISK[..], &["--deep-interval", "500ms"]].concat());
    holds_within(SWEPT * 3, || conns.iter().all(|conn| scene.is_counted(conn)));
    Some(scene.open(TRIES).len())
}

#[test]
fn what_was_forgotten_before_the_start_is_put_back_where_a_limit_is_for_the_port() {
    for limiter in [Limiter::Connlimit, Limiter::NftSet] {
        let Some(admitted) = forgotten_before_the_start(limiter, &[]) else { return };
        assert_eq!(admitted, 0);
    }
}

/// A rule may have led them here from another port: an entry that is not theirs would break them.
#[test]
fn what_was_forgotten_before_the_start_is_left_alone_where_rules_translate() {
    let redirect = "iptables -t nat -A PREROUTING -p tcp --dport 8080 -j REDIRECT --to-ports 80";
    let Some(admitted) = forgotten_before_the_start(Limiter::Connlimit, &[redirect]) else {
        return;
    };
    assert_eq!(admitted, LIMIT);
}

/// The same for connections that are not half-closed: ctkeep has heard of their ends.
#[test]
fn established_connections_of_a_flushed_table_are_put_back() {
    let result = contrast(Limiter::Connlimit, CLIENT, &["--events", "ctnetlink"], |scene| {
        let conns = scene.established();
        scene.freeze();
        flush(scene, &conns);
        let newcomers = scene.open(TRIES);
        assert_eq!(newcomers.len(), LIMIT, "admitted in the place of those forgotten");
        scene.end(&newcomers);
        scene.thaw();
        scene.await_repair("reinsert", &conns);
        scene.admitted()
    });
    let Some(result) = result else { return };
    assert_eq!(result, Contrast { without: LIMIT, with: 0 });
}

/// Nothing has heard of them since they were opened, and a look at all is ten minutes off.
#[test]
fn established_connections_of_a_flushed_table_are_put_back_by_the_next_sweeps() {
    let args = [&BRISK[..], &["--deep-interval", "10m"]].concat();
    let result = contrast(Limiter::Connlimit, CLIENT, &args, |scene| {
        let conns = scene.established();
        thread::sleep(SWEPT);
        flush(scene, &conns);
        let is_back = |conn| scene.told("reinsert", conn) > 0;
        // A twelfth of a lease, within which they were found before.
        let are_back = scene.is_guarded()
            && holds_within(Duration::from_secs(5), || conns.iter().all(is_back));
        (are_back, scene.admitted())
    });
    let Some(result) = result else { return };
    assert_eq!(result, Contrast { without: (false, LIMIT), with: (true, 0) });
}

/// Of connections that it has not heard of again, it knows that their port was tracked, even when
/// nothing shows that any more.
#[test]
fn established_connections_of_a_flushed_table_are_put_back_by_the_deep_sweep_alone() {
    let play = |guarded: bool| {
        let mut scene = Scene::new(Limiter::Connlimit)?;
        let conns = scene.established();
        if guarded {
            scene.guard(&["--events", "off", "--deep-interval", "1s"]);
        }
        scene.freeze();
        flush(&scene, &conns);
        let newcomers = scene.open(TRIES);
        assert_eq!(newcomers.len(), LIMIT, "admitted in the place of those forgotten");
        scene.end(&newcomers);
        flush(&scene, &conns);
        scene.thaw();
        scene.await_repair("reinsert", &conns);
        Some(scene.admitted())
    };
    let Some(without) = play(false) else { return };
    assert_eq!((without, play(true)), (LIMIT, Some(0)));
}

/// Conntrack picks an ESTABLISHED connection up at the client's next byte, in the right direction; no
/// limit has ever seen it.
#[test]
fn established_connections_that_are_picked_up_midway_are_counted() {
    let play = |guarded: bool| {
        let mut scene = Scene::new(Limiter::Connlimit)?;
        scene.lab.server.run("sysctl -w net.netfilter.nf_conntrack_tcp_loose=1");
        let mut conns = scene.established();
        if guarded {
            scene.guard(&["--deep-interval", "1s"]);
        }
        scene.freeze();
        flush(&scene, &conns);
        let newcomers = scene.open(TRIES);
        assert_eq!(newcomers.len(), LIMIT, "admitted in the place of those forgotten");
        scene.end(&newcomers);
        for conn in &mut conns {
            conn.send(b"x");
        }
        wait_for("the pick-up", SOON, || conns.iter().all(|conn| scene.lab.is_alive(conn)));
        scene.thaw();
        if guarded {
            scene.await_repair("recount", &conns);
        }
        Some(scene.admitted())
    };
    let Some(without) = play(false) else { return };
    assert_eq!((without, play(true)), (LIMIT, Some(0)));
}

/// Five connections of one client, of every kind that would be repaired if they were tracked.
fn untracked(lab: &Lab) -> Vec<RawConn> {
    let mut conns = lab.peer(CLIENT).open_promptly(PORT, 5);
    assert_eq!(conns.len(), 5, "nothing limits an untracked port");
    for (index, conn) in conns.iter_mut().enumerate() {
        if index > 0 {
            lab.half_close(conn);
        }
        if index > 1 {
            conn.stale_rst();
        }
        if index > 2 {
            conn.fin_again();
        }
    }
    conns
}

/// How many entries there are of connections from or to this port.
fn entries_of(lab: &Lab, port: u16) -> usize {
    let ends = |entry: &lab::Entry| [entry.orig.0.port(), entry.orig.1.port()].contains(&port);
    lab.entries().iter().filter(|entry| ends(entry)).count()
}

/// Whatever ctkeep is told to do, short of force, it does nothing.
fn assert_nothing_is_inserted(lab: &Lab) {
    let conns = untracked(lab);
    let daemon = lab.daemon(CTKEEP, &[&BRISK[..], &["--deep-interval", "300ms"]].concat());
    for conn in &conns {
        conn.stale_rst();
    }
    let newcomer = lab.peer(CLIENT).open_promptly(PORT, 1);
    assert_eq!(newcomer.len(), 1);
    thread::sleep(SWEPT);
    assert_eq!(entries_of(lab, PORT), 0, "{}", daemon.log());
    let (code, out, err) = lab.ctkeep(CTKEEP, &["reconcile"]);
    assert_eq!((code, entries_of(lab, PORT)), (0, 0), "{out}{err}");
    assert!(err.contains("--force"), "it says how: {err}");
    let (status, log) = daemon.term();
    assert!(status.success());
    assert!(!log.contains("reinsert"), "{log}");

    // The positive control: they are exactly what would be put back.
    let (code, out, err) = lab.ctkeep(CTKEEP, &["reconcile", "--force"]);
    assert_eq!((code, entries_of(lab, PORT)), (0, 6), "{out}{err}");
}

const METRICS: &str = "127.0.0.1:9815";

/// Rules for one family leave the other untracked, on the very same port.
#[test]
fn nothing_is_inserted_for_a_family_that_no_rule_tracks() {
    let Some(lab) = Lab::new() else { return };
    lab.server.run(
        "iptables -A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 \
         --connlimit-mask 32 -j DROP",
    );
    let _server = lab.serve("[::]:80");
    let tracked = lab.peer(CLIENT).open_promptly(PORT, 2);
    assert_eq!((tracked.len(), entries_of(&lab, PORT)), (2, 2));
    let peer = lab.peer("2001:db8:1::7");
    let mut conns = peer.open_promptly(PORT, 4);
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    let args = ["--deep-interval", "300ms", "--metrics-listen", METRICS];
    let daemon = lab.daemon(CTKEEP, &[&BRISK[..], &args].concat());
    // What it does for the other family shows that it has looked.
    let mut of_ipv4 = tracked;
    of_ipv4.iter_mut().for_each(|conn| lab.half_close(conn));
    lab.server.run("conntrack -D -p tcp --dport 80");
    wait_for("what is deleted to come back", SOON, || entries_of(&lab, PORT) == 2);
    thread::sleep(SWEPT);
    let (code, out, err) = lab.ctkeep(CTKEEP, &["audit", "--format", "json"]);
    let report: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {err}"));
    let classes = &report["summary"]["classes"];
    assert_eq!((code, &classes["untracked"]), (0, &4.into()), "{report:#}");
    assert_eq!(entries_of(&lab, PORT), 2, "{}", daemon.log());
    // What the critical alert stands on.
    let shows = |class: &str, count: u32| {
        let answer = lab::http::ask(&lab.server, METRICS, "GET /metrics", "").expect("metrics");
        answer.body.contains(&format!("ctkeep_mismatches{{class=\"{class}\"}} {count}.0\n"))
    };
    wait_for("a deep sweep", SOON, || shows("untracked", 4));
    assert!(shows("entry-missing", 0) && shows("entry-reversed", 0));
}

#[test]
fn nothing_is_inserted_for_a_port_under_notrack() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(443, 3);
    lab.server.run("iptables -t raw -A PREROUTING -p tcp --dport 80 -j NOTRACK");
    lab.server.run("iptables -t raw -A OUTPUT -p tcp --sport 80 -j NOTRACK");
    let _server = lab.serve("[::]:80 [::]:443");
    // Beside it a port that is tracked.
    let tracked = lab.peer(CLIENT).open_promptly(443, 2);
    assert_eq!((tracked.len(), entries_of(&lab, 443)), (2, 2));
    assert_nothing_is_inserted(&lab);
}

/// How many connections an audit counts under a class.
fn class(scene: &Scene, class: &str) -> Value {
    let (_, report, err) = scene.ctkeep(&["audit", "--format", "json"]);
    let report: Value = serde_json::from_str(&report).unwrap_or_else(|_| panic!("{err}"));
    report.pointer(&format!("/summary/classes/{class}")).cloned().unwrap_or_default()
}

/// Connections of which no two are in one tick of the kernel's clock: for so long a limit counts what
/// has no entry.
fn one_by_one(peer: &Peer, count: usize) -> Vec<RawConn> {
    let open = || {
        thread::sleep(Duration::from_millis(30));
        peer.connect(PORT)
    };
    (0..count).filter_map(|_| open()).collect()
}

/// A network that rules keep out of conntrack, on a port where everybody else is tracked: entries for
/// it would fill the table with what the administrator keeps out.
fn assert_trusted_clients_are_left_alone(rules: &[&str], args: &[&str]) {
    const TRUSTED: &str = "203.0.113.5";
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    rules.iter().for_each(|rule| scene.lab.server.run(rule));
    let mut trusted = one_by_one(&scene.lab.peer(TRUSTED), 5);
    assert_eq!(trusted.len(), 5, "no limit counts them");
    trusted.iter_mut().skip(2).for_each(|conn| scene.lab.half_close(conn));
    let conns = scene.half_closed();
    let of_trusted = |scene: &Scene| {
        let entries = scene.lab.entries().into_iter();
        entries.filter(|entry| entry.line.contains(TRUSTED)).count()
    };
    assert_eq!(of_trusted(&scene), 0);
    scene.guard(&[&BRISK[..], &["--deep-interval", "300ms"], args].concat());
    thread::sleep(SWEPT);
    delete(&scene, &conns);
    scene.await_repair("reinsert", &conns);
    thread::sleep(SWEPT);
    assert_eq!(of_trusted(&scene), 0, "{}", scene.daemon().log());
    assert_eq!(scene.admitted(), 0, "the others' limit holds");
    assert_eq!((class(&scene, "untracked"), class(&scene, "entry-missing")), (5.into(), 0.into()));
    let (_, out, err) = scene.ctkeep(&["reconcile"]);
    assert_eq!(of_trusted(&scene), 0, "{out}{err}");
}

#[test]
fn clients_that_iptables_leaves_untracked_are_left_alone() {
    let rules = [
        "iptables -t raw -A PREROUTING -s 203.0.113.0/24 -p tcp --dport 80 -j CT --notrack",
        "iptables -t raw -A OUTPUT -d 203.0.113.0/24 -p tcp --sport 80 -j CT --notrack",
    ];
    assert_trusted_clients_are_left_alone(&rules, &[]);
    assert_trusted_clients_are_left_alone(&rules, &["--follow-rules", "off"]);
}

#[test]
fn clients_that_nft_leaves_untracked_are_left_alone() {
    let rules = [
        "nft add table inet fw",
        "nft add set inet fw trusted { type ipv4_addr; flags interval; elements = { 203.0.113.0/24 }; }",
        "nft add chain inet fw pre { type filter hook prerouting priority raw; }",
        "nft add chain inet fw out { type filter hook output priority raw; }",
        "nft add rule inet fw pre ip saddr @trusted tcp dport 80 notrack",
        "nft add rule inet fw out ip daddr @trusted tcp sport 80 notrack",
    ];
    assert_trusted_clients_are_left_alone(&rules, &[]);
}

/// Rules that keep only what comes in out of conntrack: the answers are picked up, the wrong way
/// round. No limit counts such a connection, whatever its entry is made to be.
#[test]
fn what_is_untracked_on_its_way_in_is_not_turned_round() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    scene.lab.server.run("iptables -t raw -A PREROUTING -p tcp --dport 80 -j CT --notrack");
    let mut conns = one_by_one(&scene.peer, 5);
    scene.server.send_all(b"hello");
    conns.iter_mut().skip(2).for_each(|conn| scene.lab.half_close(conn));
    wait_for("pick-up", SOON, || entries_of(&scene.lab, PORT) == 5);
    let turned = |scene: &Scene| {
        let entries = scene.lab.entries().into_iter();
        entries.filter(|entry| entry.orig.1.port() == PORT).count()
    };
    assert_eq!(turned(&scene), 0);
    scene.guard(&[&BRISK[..], &["--deep-interval", "300ms"]].concat());
    thread::sleep(2 * SWEPT);
    assert_eq!(turned(&scene), 0, "{}", scene.daemon().log());
    assert_eq!(class(&scene, "entry-reversed"), 0);
    assert_eq!(class(&scene, "untracked"), 5);
}

#[test]
fn nothing_is_inserted_where_no_rule_needs_conntrack() {
    let Some(lab) = Lab::new() else { return };
    let _server = lab.serve("[::]:80");
    assert_nothing_is_inserted(&lab);
}

/// Lets conntrack forget these connections, the limiter throw them out, and the server send: its
/// data makes conntrack pick them up again, with the server as the client.
///
/// Returns the connections that took their places.
fn pick_up(
    scene: &mut Scene,
    conns: &[RawConn],
    forget: impl Fn(&Scene, &[RawConn]),
) -> Vec<RawConn> {
    scene.lab.server.sysctl("net/netfilter/nf_conntrack_tcp_loose", "1");
    forget(scene, conns);
    wait_for("empty table", SOON, || scene.lab.entries().is_empty());
    let newcomers = scene.open(TRIES);
    assert_eq!(newcomers.len(), LIMIT, "admitted in the place of those forgotten");
    scene.server.send_all(b"more of the page");
    for conn in conns {
        let reversed = (conn.server, conn.client);
        wait_for("reversed entry", SOON, || {
            scene.lab.entries().iter().any(|entry| entry.orig == reversed)
        });
    }
    newcomers
}

/// What is left of a stale RST one second later, instead of ten.
fn expire(scene: &Scene, conns: &[RawConn]) {
    scene.lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close", "1");
    for conn in conns {
        conn.stale_rst();
    }
}

fn assert_reversed_is_turned_round(source: &str, forget: impl Fn(&Scene, &[RawConn]) + Sync) {
    let result = contrast(Limiter::Connlimit, source, &[], |scene| {
        let conns = scene.half_closed();
        scene.freeze();
        let newcomers = pick_up(scene, &conns, &forget);
        scene.thaw();
        if scene.daemon.is_some() {
            scene.await_repair("reverse", &conns);
        }
        scene.end(&newcomers);
        let right_way = conns.iter().filter(|conn| scene.is_counted(conn)).count();
        (scene.admitted(), right_way)
    });
    let Some(result) = result else { return };
    assert_eq!(result, Contrast { without: (LIMIT, 0), with: (0, LIMIT) });
}

#[test]
fn reversed_entries_of_deleted_ones_are_turned_round_and_counted() {
    assert_reversed_is_turned_round(CLIENT, flush);
}

#[test]
fn reversed_entries_of_expired_ones_are_turned_round_and_counted() {
    assert_reversed_is_turned_round(CLIENT, expire);
}

#[test]
fn reversed_entries_over_ipv6_are_turned_round_and_counted() {
    assert_reversed_is_turned_round("2001:db8:1::7", flush);
}

#[test]
fn reversed_entries_older_than_ctkeep_are_turned_round_at_its_start() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    let conns = scene.half_closed();
    let newcomers = pick_up(&mut scene, &conns, flush);
    scene.guard(&[]);
    scene.await_repair("reverse", &conns);
    scene.end(&newcomers);
    assert_eq!(scene.admitted(), 0);
}

/// Ten tries with a stale RST after each FIN, then a flushed table.
fn assert_family_is_guarded(source: &str, listen: &str) {
    let play = |guarded: bool| {
        let lab = Lab::new()?;
        lab.connlimit(PORT, 3);
        let server = lab.serve(listen);
        let peer = lab.peer(source);
        let mut scene = Scene { lab, server, peer, daemon: None };
        if guarded {
            scene.guard(&["--port", "80"]);
        }
        let admitted = scene.attack(|scene, conn| {
            conn.stale_rst();
            scene.await_repair("revive", std::slice::from_ref(conn));
        });
        if guarded {
            flush(&scene, &admitted);
            scene.await_repair("reinsert", &admitted);
            assert_eq!(scene.admitted(), 0, "after a flush");
        }
        Some(admitted.len())
    };
    let Some(without) = play(false) else { return };
    assert_eq!((without, play(true)), (TRIES, Some(LIMIT)), "{source} to {listen}");
}

#[test]
fn ipv6_clients_of_a_dual_stack_listener_are_guarded() {
    assert_family_is_guarded("2001:db8:1::7", "[::]:80");
}

#[test]
fn ipv4_clients_of_a_dual_stack_listener_are_guarded() {
    assert_family_is_guarded(CLIENT, "[::]:80");
}

#[test]
fn ipv4_clients_of_an_ipv4_listener_are_guarded() {
    assert_family_is_guarded(CLIENT, "0.0.0.0:80");
}

#[test]
fn ipv6_clients_of_an_address_are_guarded() {
    assert_family_is_guarded("2001:db8:1::7", "[2001:db8::1]:80");
}

/// An administrator who forgets idle connections sooner than in five days does not open the limit:
/// what has a socket is not forgotten, and needs no recount.
#[test]
fn idle_connections_are_kept_however_soon_the_kernel_forgets() {
    let args = ["--deep-interval", "1s"];
    let result = contrast(Limiter::Connlimit, CLIENT, &args, |scene| {
        scene.lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_established", "30");
        let conns = scene.established();
        // A deep sweep of a debug build may come ten seconds after the last.
        thread::sleep(Duration::from_secs(33));
        let admitted = scene.admitted();
        let kept = conns.iter().all(|conn| scene.lab.entry(conn).is_some());
        let repaired = scene.is_guarded() && scene.daemon().logged("action=");
        (admitted, kept, repaired)
    });
    let Some(result) = result else { return };
    assert_eq!(result, Contrast { without: (LIMIT, false, false), with: (0, true, false) });
}

/// A cron job that deletes entries is said to be at work, once a minute, and so is one that changes
/// rules; it makes nobody an attacker.
#[test]
fn what_others_do_to_entries_and_rules_is_put_right_and_said_once_a_minute() {
    let Some(mut scene) = Scene::new(Limiter::Connlimit) else { return };
    scene.guard(&[]);
    let conns = scene.half_closed();
    for conn in &conns {
        conn.stale_rst();
    }
    scene.await_repair("revive", &conns);
    let said = |scene: &Scene| {
        let log = scene.daemon().log();
        log.lines().filter(|line| line.contains("somebody else deletes entries")).count()
    };
    assert_eq!(said(&scene), 0);
    for _ in 0..3 {
        scene.lab.server.run("conntrack -D -p tcp --dport 80");
        wait_for("entries", SOON, || conns.iter().all(|conn| scene.is_counted(conn)));
    }
    wait_for("a line", SOON, || said(&scene) > 0);
    assert_eq!(scene.admitted(), 0, "the limit holds");
    let log = scene.daemon().log();
    assert_eq!(said(&scene), 1, "{log}");
    assert!(!log.contains("defence level changed"), "{log}");
    // The same of rules.
    let changes = "somebody else changes the firewall's rules";
    assert!(!log.contains(changes), "{log}");
    for port in 1..4 {
        scene.lab.server.run(&format!("iptables -A INPUT -p udp --dport {port} -j DROP"));
    }
    wait_for("a line", SOON, || scene.daemon().logged(changes));
    assert_eq!(scene.daemon().log().matches(changes).count(), 1);
}
