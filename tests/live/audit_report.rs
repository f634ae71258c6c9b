//! What `ctkeep audit` says, against what the kernel's own tools say.

use crate::lab;
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use crate::lab::{Lab, SERVER_V4, holds_within, wait_for};
use ctkeep::conntrack::{Change, Conntrack, Entry, Insert, Status, TcpState, Zone};
use ctkeep::flow::{Endpoint, FourTuple};
use serde_json::Value;
use socket2::{Domain, SockRef, Socket, Type};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");

fn audit(lab: &Lab, args: &[&str]) -> (i32, Value) {
    let (code, out, err) = lab.ctkeep(CTKEEP, &[&["audit", "--format", "json"], args].concat());
    let report = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
    (code, report)
}

/// Limit 3, ten connections from one address that each send a stale RST, and one honest client.
fn bypassed() -> Option<(Lab, lab::Server, Vec<lab::RawConn>)> {
    let lab = Lab::new()?;
    lab.connlimit(80, 3);
    let server = lab.serve("[::]:80");
    let (peer, honest) = (lab.peer("198.51.100.7"), lab.peer("203.0.113.9"));
    // An answer that is late on a busy machine is not awaited: another try.
    let connect = |peer: &lab::Peer| (0..5).find_map(|_| peer.connect(80));
    let mut conns = vec![connect(&honest).expect("an honest client gets in")];
    for _ in 0..10 {
        let mut conn = connect(&peer).expect("the limit is bypassed");
        lab.half_close(&mut conn);
        conn.rst(-5);
        conns.push(conn);
    }
    Some((lab, server, conns))
}

#[test]
fn a_bypassed_limit_is_found_without_any_flag() {
    let Some((lab, server, _conns)) = bypassed() else { return };
    let (code, report) = audit(&lab, &[]);
    assert_eq!(code, 1);
    let worst = &report["sources"][0];
    assert_eq!(worst["source"], "198.51.100.7/32");
    assert_eq!((&worst["held"], &worst["limit"]), (&Value::from(10), &Value::from(3)));
    assert_eq!((&worst["uncounted"], &worst["over_limit"]), (&Value::from(10), &Value::from(true)));
    assert_eq!(report["sources"][1]["over_limit"], false);
    assert_eq!(report["summary"]["classes"]["entry-closed"], 10);
    let limiter = &report["layers"]["limiter"];
    assert_eq!(limiter["verdict"], "bad");
    let over = limiter["findings"].as_array().unwrap().iter();
    let over = over.filter(|finding| finding["id"] == "source-over-limit").collect::<Vec<_>>();
    assert_eq!(
        over[0]["what"],
        "198.51.100.7/32: 10 sockets, limit 3, 0 have an entry that counts"
    );
    assert_eq!(limiter["rules"][0]["rule"], "ip filter INPUT rule 1");
    let holder = &report["connections"][0];
    assert_eq!(holder["pid"], server.pid());
    let application = &report["layers"]["application"][0];
    assert_eq!(
        (&application["pid"], &application["verdict"]),
        (&server.pid().into(), &"warn".into())
    );
    assert_eq!(application["sockets"]["close-wait"], 10);
}

/// Who passes before a limit, who is at it and whether it holds stand with the limit.
#[test]
fn the_report_stands_around_the_limits() {
    let Some(lab) = Lab::new() else { return };
    let _server = lab.serve("[::]:80");
    lab.server.run("iptables -t mangle -A INPUT -m conntrack --ctstate NEW");
    let _conns = lab.peer("198.51.100.7").hold(80, 5);
    let _at_it = lab.peer("203.0.113.9").hold(80, 3);
    let closed = lab.peer("203.0.113.200").hold(80, 1);
    closed[0].rst(0);
    lab.server.feed(
        "iptables-restore",
        "*filter\n-A INPUT -s 203.0.113.77 -j ACCEPT\n\
         -A INPUT -m mark --mark 7 -p tcp --dport 80 -j ACCEPT\n\
         -A INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 -j DROP\nCOMMIT\n",
    );
    let (code, report) = audit(&lab, &[]);
    let rule = &report["layers"]["limiter"]["rules"][0];
    assert_eq!(rule["what"], "at most 3 from each /32 to port 80", "{rule:#}");
    assert_eq!(rule["counts"], "from each /32");
    assert_eq!(rule["passes"], serde_json::json!(["what goes to any port, from 203.0.113.77/32"]));
    assert!(rule["may_pass"][0].as_str().is_some_and(|it| it.contains("mark")), "{rule:#}");
    assert_eq!((code, &rule["verdict"], &rule["holds"]), (0, &"warn".into(), &Value::Null));
    let full = rule["full"].as_array().expect("sources");
    // What is marked passes before it: who is over it cannot be told.
    assert_eq!((&full[0]["held"], &full[0]["over"]), (&5.into(), &Value::Null), "{rule:#}");
    assert_eq!((&full[1]["source"], &full[1]["over"]), (&"203.0.113.9/32".into(), &false.into()));
    let (_, out, _) = lab.ctkeep(CTKEEP, &["audit"]);
    let at = |words: &str| out.find(words).unwrap_or_else(|| panic!("no {words}:\n{out}"));
    assert!(at("RULE") < at("SOURCE") && at("SOURCE") < at("LAYER"), "{out}");
    for words in [
        "passes before it: what goes to any port, from 203.0.113.77/32",
        "perhaps over it: 198.51.100.7/32, 5 sockets of 3, 5 counted",
        "at it: 203.0.113.9/32, 3 sockets of 3, 3 counted",
        "holds now: not asked (--ask)",
    ] {
        at(words);
    }
    assert!(!out.contains("\n203.0.113.200"), "a row of zeros:\n{out}");
}

#[test]
fn a_limit_of_a_device_is_for_those_that_come_in_by_it() {
    let Some(lab) = Lab::new() else { return };
    let _server = lab.serve("[::]:80");
    lab.server.run("iptables -t mangle -A INPUT -m conntrack --ctstate NEW");
    let conns = lab.peer("198.51.100.7").hold(80, 5);
    let rule = "-p tcp --syn --dport 80 -m connlimit --connlimit-above";
    lab.server.run(&format!("iptables -A INPUT -i wg0 {rule} 1 -j DROP"));
    let (code, report) = audit(&lab, &[]);
    let source = &report["sources"][0];
    assert_eq!((code, &source["limit"]), (0, &Value::Null), "of another device: {report:#}");
    lab.server.run(&format!("iptables -A INPUT -i eth+ {rule} 3 -j DROP"));
    let (code, report) = audit(&lab, &[]);
    let source = &report["sources"][0];
    let (limit, is_over) = (&source["limit"], &source["over_limit"]);
    assert_eq!((code, limit, is_over), (1, &3.into(), &true.into()), "{report:#}");
    let (local, remote) = ("192.0.2.1:80", &conns[0].client.to_string());
    let (_, out, _) = lab.ctkeep(CTKEEP, &["explain", local, remote]);
    assert!(out.contains("limits      at most 3 from each /32"), "{out}");
}

#[test]
fn json_keeps_to_its_schema() {
    let Some((lab, _server, _conns)) = bypassed() else { return };
    let schema: Value = serde_json::from_str(include_str!("../../docs/audit.schema.json")).unwrap();
    let validator = jsonschema::validator_for(&schema).expect("a valid schema");
    for args in [&["--all"][..], &[], &["--limit", "3", "--top", "1"], &["--mask", "0"]] {
        let (_, report) = audit(&lab, args);
        let errors: Vec<_> =
            validator.iter_errors(&report).map(|e| format!("{e} at {}", e.instance_path)).collect();
        assert!(errors.is_empty(), "{args:?}: {errors:#?}");
    }
    // What was written for version 0.1.0 can still read it.
    let first = serde_json::from_str(include_str!("../golden/audit.schema.0.1.0.json")).unwrap();
    let first = jsonschema::validator_for(&first).expect("a valid schema");
    let (_, report) = audit(&lab, &["--all"]);
    let errors: Vec<_> = first.iter_errors(&report).map(|e| e.to_string()).collect();
    assert!(errors.is_empty(), "{errors:#?}");
    // The schema is not a rubber stamp.
    let (_, mut report) = audit(&lab, &[]);
    report["connections"][0]["class"] = "odd".into();
    assert!(!validator.is_valid(&report));
}

#[test]
fn the_table_is_plain_text_of_a_hundred_columns() {
    let Some((lab, server, _conns)) = bypassed() else { return };
    let peer = lab.peer("2001:db8:1:0:aaaa:bbbb:cccc:dddd");
    let mut conn = peer.connect(80).expect("a connection over IPv6");
    lab.half_close(&mut conn);
    conn.rst(-5);
    let (code, out, err) = lab.ctkeep(CTKEEP, &["audit", "--all"]);
    assert_eq!((code, err.as_str()), (1, ""));
    assert!(!out.contains('\u{1b}'), "colours without a terminal:\n{out}");
    assert!(out.contains("over 3"), "{out}");
    for line in out.lines() {
        // Rows of addresses are never broken, and those of IPv6 are long.
        let of_addresses = ["CLASS", "entry-", "agree", "SOURCE", "198.51.", "203.0.", "2001:"];
        let is_long = of_addresses.iter().any(|word| line.starts_with(word));
        let columns = line.chars().count();
        assert!(columns <= 100 || is_long, "{columns} columns: {line}");
        assert_eq!(line, line.trim_end());
    }
    let (remote, local) = (conn.client.to_string(), conn.server.to_string());
    let row = out.lines().find(|line| line.contains(&remote)).expect("the address in one piece");
    let words: Vec<&str> = row.split_whitespace().collect();
    assert_eq!((words[0], words[1], words[2]), ("entry-closed", &*remote, &*local), "{row}");
    assert!(words[6].starts_with(&format!("{}/", server.pid())), "{row}");
    let (_, bare, _) = lab.ctkeep(CTKEEP, &["audit", "--no-header"]);
    assert!(!bare.contains("SOURCE") && !bare.contains("VERDICT"), "{bare}");
}

#[test]
fn sockets_shared_by_workers_are_shown_once() {
    let Some(lab) = Lab::new() else { return };
    let (ready, listening) = (AtomicBool::new(false), AtomicBool::new(true));
    // Numbers of processes begin anew at some time: a child's may be lower.
    let lowest = AtomicU32::new(std::process::id());
    let peer = lab.peer("198.51.100.7");
    thread::scope(|scope| {
        scope.spawn(|| {
            lab.server.within(|| {
                let listener = TcpListener::bind((SERVER_V4, 80)).expect("listen");
                ready.store(true, Ordering::Relaxed);
                let (stream, _) = listener.accept().expect("accept");
                // Two children that inherit the descriptor, as pre-forking servers do.
                let stdin = |stream: &TcpStream| {
                    std::process::Stdio::from(std::os::fd::OwnedFd::from(
                        stream.try_clone().unwrap(),
                    ))
                };
                let mut workers: Vec<_> = (0..2)
                    .map(|_| {
                        let mut command = std::process::Command::new("sleep");
                        command.arg("60").stdin(stdin(&stream)).spawn().expect("worker")
                    })
                    .collect();
                for worker in &workers {
                    lowest.fetch_min(worker.id(), Ordering::Relaxed);
                }
                while listening.load(Ordering::Relaxed) {
                    thread::sleep(Duration::from_millis(10));
                }
                for worker in &mut workers {
                    let _ = worker.kill();
                    let _ = worker.wait();
                }
            });
        });
        wait_for("listener", Duration::from_secs(5), || ready.load(Ordering::Relaxed));
        let _conn = peer.connect(80).expect("a connection");
        // A process that another test is just about to start has all descriptors, too, until it begins.
        let shared = holds_within(Duration::from_secs(20), || {
            let (_, report) = audit(&lab, &["--all"]);
            let all = report["connections"].as_array().unwrap();
            all.len() == 1
                && all[0]["processes"] == 3
                && all[0]["pid"] == lowest.load(Ordering::Relaxed)
                && report["layers"]["application"].as_array().unwrap().len() == 1
        });
        listening.store(false, Ordering::Relaxed);
        assert!(shared, "{:#}", audit(&lab, &["--all"]).1);
    });
}

type Ends = (SocketAddr, SocketAddr);

/// Seconds; so long that what is about to expire outlasts the test.
const LEASE: u64 = 3000;

type Counts = BTreeMap<String, u64>;

/// An independent count, from the output of `ss` and `conntrack -L` alone.
fn counted_by_tools(lab: &Lab, ports: &[u16]) -> (Counts, Counts) {
    let in_scope = |local: &SocketAddr| ports.contains(&local.port());
    let sockets: Vec<_> =
        lab.all_sockets().into_iter().filter(|socket| in_scope(&socket.local)).collect();
    let entries = lab.entries();
    let by_reply: HashMap<Ends, &lab::Entry> =
        entries.iter().map(|entry| (entry.reply, entry)).collect();
    let by_orig: HashMap<Ends, &lab::Entry> =
        entries.iter().map(|entry| (entry.orig, entry)).collect();
    let mut states: BTreeMap<String, u64> = BTreeMap::new();
    let mut classes: BTreeMap<String, u64> = BTreeMap::new();
    let mut backed: HashSet<Ends> = HashSet::new();
    let opening = ["SYN_SENT", "SYN_RECV", "SYN_SENT2", "NONE"];
    // The rules make conntrack see IPv4 alone.
    let port_of = |local: &SocketAddr| (local.is_ipv4(), local.port());
    let tracked: HashSet<_> = entries.iter().map(|entry| port_of(&entry.reply.0)).collect();
    for socket in &sockets {
        let name = match socket.state.as_str() {
            "listen" => "listening",
            name => name,
        };
        *states.entry(name.to_owned()).or_default() += 1;
        if name == "listening" {
            continue;
        }
        let ends = (socket.local, socket.remote);
        backed.insert(ends);
        let is_open = matches!(name, "established" | "close-wait");
        let class = match (by_reply.get(&ends), by_orig.get(&ends)) {
            _ if !is_open => "agree",
            (Some(entry), _) => match entry.state.as_str() {
                "LAST_ACK" | "TIME_WAIT" | "CLOSE" => "entry-closed",
                "ESTABLISHED" if name == "established" => "agree",
                state if opening.contains(&state) => "agree",
                _ if entry.timeout < LEASE / 2 => "entry-expiring",
                _ => "agree",
            },
            (None, Some(_)) => "entry-reversed",
            _ if !tracked.contains(&port_of(&socket.local)) => "untracked",
            (None, None) => "entry-missing",
        };
        *classes.entry(class.to_owned()).or_default() += 1;
    }
    let ours = |entry: &lab::Entry| {
        let own: [IpAddr; 2] = [SERVER_V4.into(), lab::SERVER_V6.into()];
        own.contains(&entry.reply.0.ip()) && in_scope(&entry.reply.0)
    };
    for entry in entries.iter().filter(|entry| ours(entry) && !backed.contains(&entry.reply)) {
        let class = match entry.state.as_str() {
            "LAST_ACK" | "TIME_WAIT" | "CLOSE" => "agree",
            state if opening.contains(&state) => "agree",
            _ => "socket-missing",
        };
        *classes.entry(class.to_owned()).or_default() += 1;
    }
    (states, classes)
}

fn without_zeros(counts: &Value) -> BTreeMap<String, u64> {
    let counts = counts.as_object().expect("counts by name").iter();
    let counts = counts.map(|(name, count)| (name.clone(), count.as_u64().expect("a count")));
    counts.filter(|(_, count)| *count > 0).collect()
}

/// Entries of other hosts, as on a router: what matters is how many there are.
fn insert_foreign(lab: &Lab, count: u32) {
    let change = |number: u32| {
        let client = Ipv4Addr::from(0x0a40_0000 + number / 50_000);
        let port = u16::try_from(number % 50_000 + 10_000).expect("a port");
        let flow = FourTuple::new(
            Endpoint::new(client.into(), port),
            Endpoint::new([172, 16, 0, 1].into(), 443),
        );
        Change::Insert(Insert {
            like: Entry::plain(flow, Zone::default()),
            state: TcpState::Established,
            status: Status::ASSURED,
            timeout: Duration::from_secs(3600),
        })
    };
    let changes: Vec<_> = (0..count).map(change).collect();
    let results = lab.server.within(|| Conntrack::open()?.change(&changes)).expect("inserts");
    assert!(results.iter().all(Result::is_ok), "not all of {count} entries could be made");
}

/// Two thousand connections in every state and class, of both families, redirected, in a zone,
/// translated to a container, and among 200 000 entries that belong to other hosts. The eleventh
/// state, that of a socket with no connection, is in no table of the kernel.
#[test]
fn two_thousand_mixed_connections_agree_with_an_independent_count() {
    let Some(lab) = Lab::new() else { return };
    let ports = [80, 81, 82, 83, 84, 85, 86, 87, 88];
    lab.server.feed(
        "iptables-restore",
        "*nat\n-A PREROUTING -p tcp --dport 8080 -j REDIRECT --to-ports 80\n\
         -A PREROUTING -p tcp --dport 8081 -j DNAT --to-destination 10.0.0.2:80\nCOMMIT\n\
         *raw\n-A PREROUTING -p tcp --dport 86 -j CT --zone 5\n\
         -A OUTPUT -p tcp --sport 86 -j CT --zone 5\nCOMMIT\n",
    );
    // Entries are looked at later than sockets; nothing may change by itself in between.
    for (name, value) in [("close", "3000"), ("time_wait", "3000"), ("last_ack", "3000")] {
        lab.server.sysctl(&format!("net/netfilter/nf_conntrack_tcp_timeout_{name}"), value);
    }
    lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_unacknowledged", "3000");
    lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_max_retrans", "3000");
    let container = lab.container();
    let _in_container = lab::Server::start(&container, "[::]:80");
    let _open = lab.serve("[::]:80 [::]:86");
    let mut closing = lab.serve("[::]:81 [::]:82 [::]:83 [::]:84 0.0.0.0:87");
    let mut talking = lab.serve("[::]:85");
    let mut conns = Vec::new();
    for (address, count) in
        [("198.51.100.7", 200), ("198.51.100.8", 150), ("203.0.113.9", 150), ("2001:db8:1::7", 200)]
    {
        let peer = lab.peer(address);
        for (port, count) in [(80, count * 2), (81, 30), (82, 30), (83, 30), (84, 30), (85, 30)] {
            let opened = peer.open(port, count);
            assert_eq!(opened.len(), count, "{address} to port {port}");
            conns.extend(opened);
        }
        // The zone and the redirection are rules of IPv4.
        if address.contains('.') {
            conns.extend(peer.open(8080, 20));
            conns.extend(peer.open(86, 20));
            conns.extend(peer.open(87, 20));
            let translated = peer.open(8081, 20);
            assert_eq!(translated.len(), 20, "{address} to the container");
            conns.extend(translated);
        }
        for _ in 0..5 {
            conns.push(peer.syn_only(80));
        }
    }
    assert!(conns.len() > 2000, "{}", conns.len());
    let mut by_port: HashMap<u16, Vec<&mut lab::RawConn>> = HashMap::new();
    for conn in &mut conns {
        by_port.entry(conn.server.port()).or_default().push(conn);
    }
    // Every third is half-closed; every third of those sends a stale RST.
    for port in [80, 86, 8080] {
        // The last ones are to be forgotten before half a lease has passed.
        let lasting = if port == 8080 { "1000" } else { "3000" };
        lab.server.sysctl("net/netfilter/nf_conntrack_tcp_timeout_close_wait", lasting);
        for (index, conn) in by_port.get_mut(&port).unwrap().iter_mut().enumerate() {
            if index % 3 == 0 && index < 900 {
                conn.fin();
                conn.await_ack();
                if index % 9 == 0 {
                    conn.rst(-5);
                }
            }
        }
    }
    // Last ACK: half-closed before the server closes.
    for conn in by_port.get_mut(&82).unwrap() {
        conn.fin();
        conn.await_ack();
    }
    closing.close_all();
    // FIN_WAIT_1 stays on port 81, the others go on.
    for conn in by_port.get_mut(&83).unwrap() {
        conn.await_fin();
        conn.ack();
    }
    for conn in by_port.get_mut(&87).unwrap() {
        conn.await_fin();
        conn.ack();
        conn.fin();
    }
    for conn in by_port.get_mut(&84).unwrap() {
        // Crossing FINs: this one does not acknowledge the server's.
        conn.fin();
    }
    // Forgotten, and picked up again by a packet of the server: the wrong way round.
    lab.server.run("conntrack -D -p tcp --orig-port-dst 85");
    talking.send_all(b"late");
    // Forgotten for good.
    lab.server.run("conntrack -D -p tcp -s 203.0.113.9 --orig-port-dst 80 --state ESTABLISHED");
    // Alive without a socket; and flows that only pass through this host.
    for port in 1..=40 {
        for (dst, timeout) in [("192.0.2.1", 3000), ("192.0.2.77", 3000)] {
            lab.server.run(&format!(
                "conntrack -I -p tcp -s 198.51.100.99 -d {dst} --sport {port} --dport 80 \
                 --state ESTABLISHED --timeout {timeout} --status ASSURED,SEEN_REPLY"
            ));
        }
    }
    let outgoing: Vec<Socket> = lab.server.within(|| {
        (0..5_u16)
            .map(|index| {
                let socket = Socket::new(Domain::IPV4, Type::STREAM, None).expect("socket");
                socket.set_nonblocking(true).expect("non-blocking");
                socket.set_reuse_address(true).expect("reuse address");
                // From a port that is looked after, though nobody listens there.
                socket.bind(&SocketAddr::from((SERVER_V4, 88)).into()).expect("bind");
                let to = SocketAddr::from(([198, 51, 100, 200], 1000 + index));
                let _ = socket.connect(&to.into());
                socket
            })
            .collect()
    });
    assert_eq!(lab.sockets("syn-sent"), outgoing.len());

    insert_foreign(&lab, 200_000);
    let mut flags: Vec<String> = ports.iter().map(|port| format!("--port={port}")).collect();
    flags.push(format!("--lease={LEASE}s"));
    let flags: Vec<&str> = flags.iter().map(String::as_str).collect();
    // 20 connections of each IPv4 address to the container's listener, which agree.
    let with_container = |(mut states, mut classes): (Counts, Counts)| {
        *states.entry("established".to_owned()).or_default() += 60;
        *states.entry("listening".to_owned()).or_default() += 1;
        *classes.entry("agree".to_owned()).or_default() += 60;
        (states, classes)
    };
    let mut last = String::new();
    // Retransmissions move a few states while the tools work; a disagreement that is one stays.
    let agrees = holds_within(Duration::from_secs(60), || {
        let (before, _) = with_container(counted_by_tools(&lab, &ports));
        let (_, report) = audit(&lab, &flags);
        let (states, classes) = with_container(counted_by_tools(&lab, &ports));
        let ours = (
            without_zeros(&report["summary"]["sockets"]),
            without_zeros(&report["summary"]["classes"]),
        );
        last = format!("audit {ours:#?}\ntools {:#?}", (&states, &classes));
        before == states && ours == (states, classes)
    });
    assert!(agrees, "{last}");
    for name in
        ["entry-missing", "entry-closed", "entry-expiring", "entry-reversed", "socket-missing"]
    {
        assert!(last.contains(name), "no {name} in\n{last}");
    }
    for state in [
        "established",
        "syn-sent",
        "syn-recv",
        "fin-wait-1",
        "fin-wait-2",
        "time-wait",
        "close-wait",
        "last-ack",
        "listening",
        "closing",
    ] {
        assert!(last.contains(state), "no {state} in\n{last}");
    }
    drop(conns);
}

/// A hundred audits while connections come and go as fast as they can.
#[test]
fn churn_is_never_taken_for_a_disagreement() {
    const RUNS: usize = 50;
    let Some(lab) = Lab::new() else { return };
    // Without a rule that needs it the kernel tracks nothing.
    lab.server.run("iptables -A INPUT -m conntrack --ctstate INVALID -j ACCEPT");
    // What is over would pile up, and every audit would read it.
    for state in ["time_wait", "close", "last_ack"] {
        lab.server.sysctl(&format!("net/netfilter/nf_conntrack_tcp_timeout_{state}"), "1");
    }
    let (stop, served) = (AtomicBool::new(false), AtomicUsize::new(0));
    thread::scope(|scope| {
        scope.spawn(|| {
            lab.server.within(|| {
                let listener = TcpListener::bind((SERVER_V4, 80)).expect("listen");
                listener.set_nonblocking(true).expect("non-blocking");
                while !stop.load(Ordering::Relaxed) {
                    match listener.accept() {
                        Ok((mut stream, _)) => {
                            served.fetch_add(1, Ordering::Relaxed);
                            let _ = stream.set_nonblocking(false);
                            let _ = stream.write_all(b"bye");
                            let _ = stream.set_read_timeout(Some(Duration::from_millis(50)));
                            let _ = stream.read(&mut [0; 16]);
                        }
                        Err(_) => thread::sleep(Duration::from_micros(200)),
                    }
                }
            });
        });
        for kind in 0..2 {
            let (stop, lab) = (&stop, &lab);
            scope.spawn(move || {
                lab.client.within(|| {
                    while !stop.load(Ordering::Relaxed) {
                        let Ok(mut stream) = TcpStream::connect((SERVER_V4, 80)) else { continue };
                        let _ = stream.read(&mut [0; 3]);
                        if kind == 0 {
                            let _ = SockRef::from(&stream).set_linger(Some(Duration::ZERO));
                        } else {
                            let _ = stream.shutdown(Shutdown::Write);
                        }
                    }
                });
            });
        }
        wait_for("churn", Duration::from_secs(10), || served.load(Ordering::Relaxed) > 50);
        let mut failed = Vec::new();
        for run in 0..RUNS {
            let (code, report) = audit(&lab, &["--port", "80"]);
            if code != 0 {
                failed.push(format!("run {run}: {:#}", report["connections"]));
            }
        }
        stop.store(true, Ordering::Relaxed);
        assert!(failed.is_empty(), "{} of {RUNS}: {}", failed.len(), failed.join("\n"));
    });
    assert!(served.load(Ordering::Relaxed) > RUNS, "hardly any churn");
}

/// The daemon tells administrators alone, and is believed where it runs as its own user.
#[test]
fn a_running_daemon_tells_for_how_long_connections_are_held() {
    let Some((lab, _server, _conns)) = bypassed() else { return };
    let oldest = |report: &Value| {
        let sources = report["sources"].as_array().expect("sources").clone();
        let of = |name: &str| sources.iter().find(|s| s["source"] == name).cloned();
        let [half, open] = ["198.51.100.7/32", "203.0.113.9/32"].map(|name| of(name).expect(name));
        assert_eq!(open["oldest_half_close_seconds"], Value::Null, "an open connection");
        half["oldest_half_close_seconds"].as_u64()
    };
    assert_eq!(oldest(&audit(&lab, &[]).1), None, "nobody to ask");
    let directory = tempfile::tempdir().expect("directory");
    let service = directory.path().join("ctkeep");
    let user = "--reuid=65533 --clear-groups";
    let may = "+net_admin,+net_raw";
    let script = format!(
        "#!/bin/sh\nexec setpriv {user} --inh-caps={may} --ambient-caps={may} -- {CTKEEP} \"$@\"\n"
    );
    std::fs::write(&service, script).expect("a script");
    let executable = std::os::unix::fs::PermissionsExt::from_mode(0o755);
    std::fs::set_permissions(&service, executable).expect("a mode");
    let _daemon = lab.daemon(service.to_str().expect("a path"), &["--recount", "loopback"]);
    wait_for("an age", Duration::from_secs(10), || {
        oldest(&audit(&lab, &[]).1).is_some_and(|age| (1..10).contains(&age))
    });
    let nobody = "--reuid=65534 --clear-groups --inh-caps=+net_admin --ambient-caps=+net_admin";
    let mut args: Vec<&str> = nobody.split(' ').collect();
    args.extend(["--", CTKEEP, "audit", "--format=json"]);
    let (_, out, err) = lab.ctkeep("setpriv", &args);
    let report = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
    assert_eq!(oldest(&report), None, "an ordinary user is told nothing");
}

#[test]
fn explain_names_the_limit_the_process_and_the_way_round() {
    let Some((lab, server, conns)) = bypassed() else { return };
    let (local, remote) = (conns[1].server.to_string(), conns[1].client.to_string());
    let (code, out, _) = lab.ctkeep(CTKEEP, &["explain", &local, &remote]);
    assert_eq!(code, 1, "{out}");
    for line in [
        format!("({})", server.pid()),
        "198.51.100.7/32 holds 10 sockets, 0 have an entry that counts".to_owned(),
        "cell        guarded socket in close-wait, entry in close".to_owned(),
        "would do    revive".to_owned(),
    ] {
        assert!(out.contains(&line), "no '{line}' in\n{out}");
    }
    let (code, out, _) = lab.ctkeep(CTKEEP, &["explain", &remote, &local]);
    assert_eq!(code, 0, "{out}");
    assert!(out.contains("the other way round"), "{out}");
}

#[test]
fn saved_tables_give_the_same_report_without_a_kernel() {
    let Some((lab, _server, _conns)) = bypassed() else { return };
    let directory = tempfile::tempdir().expect("directory");
    let save = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).expect("a file");
        path.to_str().expect("a path").to_owned()
    };
    let entries = lab.server.output("conntrack -L -o extended");
    let (_, live) = audit(&lab, &[]);
    for (name, command) in [("plain", "ss -tan"), ("full", "ss -tanoiep")] {
        let sockets = save(name, &lab.server.output(command));
        let entries = save("entries", &format!("{entries}tcp 6 rubbish\n"));
        let args = ["audit", "--format=json", "--sockets", &sockets, "--conntrack", &entries];
        let (code, out, err) = lab.ctkeep(CTKEEP, &[&args[..], &["--limit", "3"]].concat());
        assert_eq!(code, 1, "{err}");
        assert!(err.contains(&format!("{entries}:{}: ", count(&entries))), "{err}");
        let saved: Value = serde_json::from_str(&out).expect("JSON");
        assert_eq!(saved["summary"], live["summary"], "{command}");
        assert_eq!(saved["sources"], live["sources"], "{command}");
        assert_eq!(saved["layers"]["conntrack"], Value::Null);
    }
}

fn count(path: &str) -> usize {
    std::fs::read_to_string(path).expect("a file").lines().count()
}
