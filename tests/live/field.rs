//! Cases from the field that want a host of their own: a service without its listener, proxies,
//! published ports, containers with few rights, a tool under another name.

// A test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use crate::lab;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use crate::lab::{Lab, Namespace, Peer, wait_for};
use crate::scene::{CLIENT, CTKEEP, Contrast, LIMIT, Limiter, SOON, contrast};
use serde_json::Value;
use socket2::{Domain, Socket, Type};

/// Looks at everything as often as it can.
const EAGER: [&str; 4] = ["--sweep-interval", "100ms", "--deep-interval", "300ms"];

/// A shell's output in a namespace.
fn shell(namespace: &Namespace, script: &str) -> String {
    namespace.feed("sh", script)
}

fn audit(namespace: &Namespace, args: &str) -> Value {
    let said = shell(namespace, &format!("{CTKEEP} audit --format json {args}; true"));
    serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"))
}

/// Findings of the limiter by this name.
fn findings(report: &Value, id: &str) -> Vec<String> {
    let all = report["layers"]["limiter"]["findings"].as_array().unwrap().iter();
    all.filter(|it| it["id"] == id).map(|it| it["what"].as_str().unwrap().to_owned()).collect()
}

/// How many more get in after a stale RST for each of those that are held at the limit.
fn gain(peer: &Peer, port: u16, is_repaired: impl Fn(&str) -> bool) -> usize {
    let mut conns = peer.hold(port, LIMIT);
    for conn in &mut conns {
        conn.fin();
        assert!(conn.await_ack(), "no ACK for the FIN of {}", conn.client);
        conn.stale_rst();
    }
    for conn in &conns {
        wait_for("what comes of a stale RST", SOON, || is_repaired(&format!("{} ", conn.client)));
    }
    let more = (0..LIMIT).map(|_| peer.syn_only(port)).collect();
    peer.complete(more, Duration::from_secs(3)).len()
}

/// The service has closed its listener, and ctkeep begins a new life in which it has never seen it.
#[test]
fn connections_without_a_listener_stay_in_the_scope_over_a_restart() {
    let result = contrast(Limiter::Connlimit, CLIENT, &EAGER, |scene| {
        let conns = scene.half_closed();
        scene.server.stop_listening();
        if scene.is_guarded() {
            scene.daemon = None;
            let gone = findings(&audit(&scene.lab.server, ""), "listener-gone");
            assert_eq!(gone, ["nothing listens any more on port 80 (3 open sockets)"]);
            scene.guard(&EAGER);
        }
        conns.iter().for_each(lab::RawConn::stale_rst);
        scene.await_repair("revive", &conns);
        let _next = scene.lab.serve("[::]:80");
        scene.admitted()
    });
    let Some(result) = result else { return };
    assert_eq!(result, Contrast { without: LIMIT, with: 0 });
}

/// A transparent proxy: its sockets have the addresses that clients asked for, and a port on which
/// nothing listens. A limit stands before the rule that hands them to it, or behind.
fn proxied(limit_is_before: bool, args: Option<&[&str]>) -> Option<usize> {
    let lab = Lab::new()?;
    lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close", "60");
    lab.server.run("ip rule add fwmark 1 lookup 100");
    lab.server.run("ip route add local 0.0.0.0/0 dev lo table 100");
    let limit = "-p tcp --syn --dport 80 -m connlimit --connlimit-above 3 -j DROP";
    let hand = "-A PREROUTING -p tcp --dport 80 -j TPROXY --on-port 3129 --tproxy-mark 1/1";
    let (before, behind) = match limit_is_before {
        true => (format!("-A PREROUTING {limit}\n"), String::new()),
        false => (String::new(), format!("-A INPUT {limit}\n")),
    };
    lab.server.feed(
        "iptables-nft-restore",
        &format!("*mangle\n{before}{hand}\nCOMMIT\n*filter\n{behind}COMMIT\n"),
    );
    let listener = lab.server.within(|| {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("a socket");
        socket.set_ip_transparent_v4(true).expect("IP_TRANSPARENT");
        socket.bind(&SocketAddr::from((Ipv4Addr::UNSPECIFIED, 3129)).into()).expect("bound");
        socket.listen(50).expect("listening");
        socket
    });
    lab.client.run("ip route add 203.0.113.80 via 192.0.2.1");
    let daemon = args.map(|args| lab.daemon(CTKEEP, args));
    // New ones are taken all the time, by a listener of another port.
    let other = lab.peer_to("198.51.100.99", "203.0.113.80").hold(80, 1);
    let gone = findings(&audit(&lab.server, ""), "listener-gone");
    assert_eq!((other.len(), gone), (1, vec![]));
    let peer = lab.peer_to(CLIENT, "203.0.113.80");
    let more = gain(&peer, 80, |client| match &daemon {
        Some(daemon) => {
            let log = daemon.log();
            log.lines().any(|line| line.contains("revive") && line.contains(client))
        }
        None => lab.server.output("conntrack -L").matches(" CLOSE ").count() == LIMIT,
    });
    drop(listener);
    Some(more)
}

#[test]
fn connections_of_a_transparent_proxy_are_guarded_by_the_port_that_is_named() {
    let Some(without) = proxied(true, None) else { return };
    let args = [&EAGER[..], &["--port", "80"]].concat();
    let with = proxied(true, Some(&args)).unwrap();
    assert_eq!(Contrast { without, with }, Contrast { without: LIMIT, with: 0 });
}

/// Nobody has named a port, and when ctkeep starts there is no connection yet.
#[test]
fn connections_of_a_transparent_proxy_are_guarded_by_the_listener_that_takes_them() {
    for limit_is_before in [true, false] {
        let Some(without) = proxied(limit_is_before, None) else { return };
        let with = proxied(limit_is_before, Some(&EAGER)).unwrap();
        assert_eq!((without, with), (LIMIT, 0), "limit before: {limit_is_before}");
    }
}

/// Everybody is the gateway: a proxy of the container's host stands before it.
#[test]
fn a_limit_behind_a_proxy_is_said_to_count_all_clients_as_one() {
    let Some(lab) = Lab::new() else { return };
    let container = lab.container();
    let rule = "-A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 30 -j REJECT";
    container.run(&format!("iptables {rule}"));
    let _server = lab::Server::start(&container, "0.0.0.0:80");
    let open = || TcpStream::connect("10.0.0.2:80").expect("gets in");
    let proxied: Vec<_> = lab.server.within(|| (0..3).map(|_| open()).collect());
    let said = findings(&audit(&container, ""), "clients-as-one");
    assert_eq!(said, ["all 3 connections to port 80 come from 10.0.0.1, the gateway"]);
    // The control: one of them comes from elsewhere.
    drop(proxied);
    let _held: Vec<_> = lab.server.within(|| (0..2).map(|_| open()).collect());
    let direct = lab.peer("198.51.100.9");
    lab.server.run("iptables -t nat -A PREROUTING -p tcp --dport 80 -j DNAT --to 10.0.0.2");
    let _conn = direct.connect(80).expect("gets in");
    assert_eq!(findings(&audit(&container, ""), "clients-as-one"), [""; 0]);
}

/// A port that is published, limited by what clients ask for; another container is not.
#[test]
fn a_limit_for_a_published_port_holds_for_it_and_measures_no_other() {
    let Some(lab) = Lab::new() else { return };
    let container = lab.container();
    let rules =
        include_str!("../cases/docker-user.rules").replace("FORWARD DROP", "FORWARD ACCEPT");
    lab.server.feed("iptables-nft-restore", &rules);
    for (port, to) in [(8080, 80), (8081, 81)] {
        let to = format!("-p tcp --dport {port} -j DNAT --to 10.0.0.2:{to}");
        lab.server.run(&format!("iptables -t nat -A PREROUTING {to}"));
    }
    let _server = lab::Server::start(&container, "0.0.0.0:80 0.0.0.0:81");
    let is_closed = |_: &str| lab.server.output("conntrack -L").matches(" CLOSE ").count() == LIMIT;
    assert_eq!(gain(&lab.peer(CLIENT), 8080, is_closed), LIMIT, "the control");
    let daemon = lab.daemon(CTKEEP, &EAGER);
    let is_revived = |client: &str| {
        let log = daemon.log();
        log.lines().any(|line| line.contains("revive") && line.contains(client))
    };
    assert_eq!(gain(&lab.peer("198.51.100.8"), 8080, is_revived), 0, "{}", daemon.log());
    let other = lab.peer("198.51.100.9");
    let held = other.hold(8081, 5);
    let report = audit(&lab.server, "");
    let rows = report["sources"].as_array().unwrap().iter();
    let of_source: Vec<_> = rows.filter(|row| row["source"] == "198.51.100.9/32").collect();
    assert_eq!(of_source[0]["held"], 5, "{report:#}");
    assert_eq!(
        (&of_source[0]["limit"], &of_source[0]["over_limit"]),
        (&Value::Null, &false.into())
    );
    drop(held);
}

/// An old distribution calls the tool for the older tables by the common name.
#[test]
fn legacy_rules_are_read_by_a_tool_of_the_common_name() {
    let Some(lab) = Lab::new() else { return };
    let rule = "-A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 -j DROP";
    lab.server.run(&format!("iptables-legacy {rule}"));
    let folder = tempfile::tempdir().expect("a directory");
    let folder = folder.path().display();
    let script = format!(
        "set -e\ncp -L /usr/sbin/xtables-legacy-multi {folder}/tool\n\
         exec unshare -m sh -ec '\n\
           mount -t tmpfs none /usr/sbin\n\
           for name in iptables-save ip6tables-save; do\n\
             [ -n \"$1\" ] && ln -s {folder}/tool /usr/sbin/$name\n\
           done\n\
           PATH=/usr/bin {CTKEEP} audit --format json || true' sh "
    );
    let read = |more: &str| -> Value {
        let said = shell(&lab.server, &format!("{script}{more}"));
        serde_json::from_str(&said).unwrap_or_else(|error| panic!("{error}: {said}"))
    };
    let report = read("there");
    assert_eq!(findings(&report, "rules-unread"), [""; 0]);
    let limits = report["layers"]["limiter"]["rules"].as_array().unwrap();
    assert_eq!(limits.len(), 1, "{report:#}");
    // The control: without the tool that is said.
    let missing = findings(&read("''"), "rules-unread");
    assert!(missing[0].contains("install iptables"), "{missing:?}");
}

/// A container of an unprivileged user, whose settings are read-only or not there.
#[test]
fn with_few_rights_it_works_and_invents_no_figure() {
    let Some(lab) = Lab::new() else { return };
    let said = |mount: &str, command: &str| {
        let script = format!(
            "unshare -Urnm sh -ec 'ip link set lo up\n{mount}\n\
             exec 2>&1; rc=0; {CTKEEP} {command} || rc=$?; echo ended with $rc'"
        );
        shell(&lab.server, &script)
    };
    let absent = "mount -t tmpfs none /proc/sys";
    let read_only = "mount --bind /proc/sys /proc/sys\nmount -o remount,ro,bind /proc/sys";
    for mount in [absent, read_only] {
        for command in ["audit", "reconcile --dry-run", "doctor"] {
            let text = said(mount, command);
            assert!(text.ends_with("ended with 0\n"), "{command}: {text}");
        }
        let text = said(mount, "audit");
        assert_eq!(text.contains("SYN cookies are on"), mount == read_only, "{text}");
        assert_eq!(text.contains("cannot be read"), mount == absent, "{text}");
        let text = said(mount, "run --metrics-listen off --log-format text & sleep 2; kill $!");
        assert!(text.contains(" ready "), "{text}");
    }
}

/// `/proc` with `hidepid`, and no right to look behind it.
#[test]
fn processes_that_proc_hides_are_unknown_and_it_says_why() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 3);
    let _server = lab.serve("0.0.0.0:80");
    let mut conns = lab.peer(CLIENT).hold(80, 2);
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    // A program that another user may start, wherever it was built.
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let program = folder.path().join("ctkeep");
    std::fs::copy(CTKEEP, &program).unwrap();
    let said = |mount: &str, command: &str| {
        let rights = "+net_admin,+net_raw";
        let user = format!(
            "setpriv --reuid 65534 --regid 65534 --clear-groups --inh-caps {rights} \
             --ambient-caps {rights} {} {command}",
            program.display()
        );
        shell(&lab.server, &format!("unshare --mount sh -c '{mount} {user}'; true"))
    };
    let explain = format!("explain 192.0.2.1:80 {}", conns[0].client);
    let hidden = "mount -t proc -o hidepid=invisible proc /proc &&";
    for (mount, why) in [(hidden, "hidden by hidepid of /proc"), ("", "of another user")] {
        let why = format!("({why}: CAP_SYS_PTRACE is missing)");
        let audit = said(mount, "audit").replace('\n', " ");
        let words: Vec<_> = audit.split_whitespace().collect();
        let audit = words.join(" ");
        assert!(audit.contains("process unknown: 2 of 2 open sockets are half-closed"), "{audit}");
        assert!(audit.contains(&why), "{audit}");
        let explained = said(mount, &explain);
        assert!(explained.contains(&format!("process unknown {why}")), "{explained}");
    }
}

/// Rules keep the connections in a zone, where the limit looks, and a second entry of each lives on in
/// the default zone.
#[test]
fn of_entries_in_two_zones_the_one_that_the_limit_looks_at_decides() {
    let by_device = "*raw\n:PREROUTING ACCEPT [0:0]\n:OUTPUT ACCEPT [0:0]\n\
        -A PREROUTING -i eth0 -p tcp --dport 80 -j CT --zone 1\n\
        -A OUTPUT -o eth0 -p tcp --sport 80 -j CT --zone 1\nCOMMIT\n";
    let by_port = "table ip zones {
        chain pre { type filter hook prerouting priority raw; tcp dport 80 ct zone set 1; }
        chain out { type filter hook output priority raw; tcp sport 80 ct zone set 1; }
    }";
    let admitted = |is_guarded: bool, tool: &str, rules: &str| {
        let lab = Lab::new()?;
        lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close", "60");
        lab.server.feed(tool, rules);
        lab.connlimit(80, 3);
        let _server = lab.serve("0.0.0.0:80");
        let peer = lab.peer(CLIENT);
        let mut conns = peer.hold(80, LIMIT);
        let daemon = is_guarded.then(|| lab.daemon(CTKEEP, &EAGER));
        for conn in &mut conns {
            let ports = format!("--sport {} --dport 80", conn.client.port());
            lab.server.run(&format!(
                "conntrack -I -p tcp -s {CLIENT} -d 192.0.2.1 {ports} --state ESTABLISHED \
                 -t 3600 -u SEEN_REPLY,ASSURED"
            ));
            conn.fin();
            assert!(conn.await_ack(), "no ACK for the FIN of {}", conn.client);
            conn.stale_rst();
        }
        let in_zone = |state: &str| {
            let all = lab.server.output("conntrack -L -w 1 -p tcp --dport 80");
            all.matches(state).count() == LIMIT
        };
        match &daemon {
            Some(daemon) => wait_for("revive", SOON, || {
                let log = daemon.log();
                let of = |conn: &lab::RawConn| format!("{} ", conn.client);
                let is_told =
                    |conn| log.lines().any(|l| l.contains("revive") && l.contains(&of(conn)));
                conns.iter().all(is_told)
            }),
            None => wait_for("closed entries", SOON, || in_zone(" CLOSE ")),
        }
        let more = (0..LIMIT).map(|_| peer.syn_only(80)).collect();
        let more = peer.complete(more, Duration::from_secs(3)).len();
        let report = audit(&lab.server, "--all");
        let rows = report["connections"].as_array().unwrap().iter();
        let of_first = |row: &&Value| row["remote"] == conns[0].client.to_string();
        let row = rows.clone().find(of_first).unwrap();
        assert_eq!((&row["zone"], &row["other_zones"][0]), (&1.into(), &0.into()), "{report:#}");
        let first = format!("192.0.2.1:80 {}", conns[0].client);
        let said = shell(&lab.server, &format!("{CTKEEP} explain {first}; true"));
        assert!(said.contains("zone 1") && said.contains("zone 0"), "{said}");
        Some(more)
    };
    let ways = [("iptables-nft-restore", by_device), ("nft -f -", by_port)];
    let Some(without) = admitted(false, ways[0].0, ways[0].1) else { return };
    assert_eq!(without, LIMIT, "the control");
    for (tool, rules) in ways {
        assert_eq!(admitted(true, tool, rules), Some(0), "{rules}");
    }
}
