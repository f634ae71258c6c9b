//! The limiter is asked how many connections its list holds. Each answer is held against the truth:
//! how many more connections are let in.

use std::net::IpAddr;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::lab::rules::{INPUT, chain, input, restore};
use crate::lab::{Lab, Namespace, RawConn, wait_for};
use ctkeep::conntrack::Zone;
use ctkeep::flow::Endpoint;
use ctkeep::recount::{Asked, Question, Recounter, Room};
use nix::time::{ClockId, clock_gettime};
use serde_json::Value;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ctkeep");
const CLIENT: &str = "198.51.100.7";
const CLIENT6: &str = "2001:db8:1::7";
const LIMIT: usize = 64;
const SOON: Duration = Duration::from_secs(10);

/// A way to write a limit of 64.
struct Form {
    name: &'static str,
    tool: &'static str,
    rules: fn() -> String,
}

const ABOVE: &str = "-m connlimit --connlimit-above 64";

const FORMS: [Form; 12] = [
    Form {
        name: "connlimit --syn",
        tool: "iptables-restore",
        rules: || input(&[&format!("INPUT -p tcp --syn --dport 80 {ABOVE} -j DROP")]),
    },
    Form {
        name: "connlimit of every packet",
        tool: "iptables-restore",
        rules: || input(&[&format!("INPUT -p tcp --dport 80 {ABOVE} -j DROP")]),
    },
    Form {
        name: "connlimit per /24, mangle PREROUTING",
        tool: "iptables-restore",
        rules: || {
            let rule =
                format!("PREROUTING -p tcp --syn --dport 80 {ABOVE} --connlimit-mask 24 -j DROP");
            restore("mangle", "PREROUTING", &[&rule])
        },
    },
    Form {
        name: "established accept, reject with tcp-reset",
        tool: "iptables-restore",
        rules: || {
            let reject = "-j REJECT --reject-with tcp-reset";
            input(&[
                "INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
                &format!("INPUT -p tcp --syn --dport 80 {ABOVE} {reject}"),
            ])
        },
    },
    Form {
        name: "connlimit-upto accept, policy drop",
        tool: "iptables-restore",
        rules: || {
            let upto = "-m connlimit --connlimit-upto 64 -j ACCEPT";
            restore(
                "filter",
                "INPUT=DROP",
                &[
                    "INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT",
                    &format!("INPUT -p tcp --syn --dport 80 {upto}"),
                ],
            )
        },
    },
    Form {
        name: "a chain of its own that logs and drops",
        tool: "iptables-restore",
        rules: || {
            restore(
                "filter",
                "INPUT ENOUGH=-",
                &[
                    &format!("INPUT -p tcp --syn --dport 80 {ABOVE} -j ENOUGH"),
                    "ENOUGH -p tcp -j DROP",
                ],
            )
        },
    },
    Form {
        name: "iptables-legacy",
        tool: "iptables-legacy-restore",
        rules: || input(&[&format!("INPUT -p tcp --syn --dport 80 {ABOVE} -j DROP")]),
    },
    Form {
        name: "plain ct count",
        tool: "nft -f -",
        rules: || chain(INPUT, "tcp dport 80 ct state new ct count over 64 drop"),
    },
    Form {
        name: "dynamic set",
        tool: "nft -f -",
        rules: || {
            chain(INPUT, "tcp dport 80 ct state new add @web { ip saddr ct count over 64 } drop")
        },
    },
    Form {
        name: "dynamic set of every packet, prerouting",
        tool: "nft -f -",
        rules: || {
            let rule = "tcp dport 80 add @web { ip saddr ct count over 64 } drop";
            chain("prerouting priority -150", rule)
        },
    },
    Form {
        name: "dynamic set per /24",
        tool: "nft -f -",
        rules: || {
            let rule = "add @web { ip saddr & 255.255.255.0 ct count over 64 } reject";
            chain(INPUT, &format!("tcp dport 80 ct state new {rule}"))
        },
    },
    Form {
        name: "meter",
        tool: "nft -f -",
        rules: || {
            let rule = "tcp dport 80 ct state new meter web64 { ip saddr ct count over 64 } drop";
            chain(INPUT, rule)
        },
    },
];

fn question(client: &str) -> Question {
    let client: IpAddr = client.parse().expect("an address");
    let server = if client.is_ipv4() { "192.0.2.1:80" } else { "[2001:db8::1]:80" };
    let server: Endpoint = server.parse().expect("an endpoint");
    Question { client, server, zone: Zone::default() }
}

/// By a name of its own: a child that has just been forked may still have the device of another.
fn recounter() -> Recounter {
    static NEXT: AtomicUsize = AtomicUsize::new(0);
    let name = format!("ctkeep-t{}", NEXT.fetch_add(1, Ordering::Relaxed));
    Recounter::to_ask(&name, Instant::now()).expect("a recounter")
}

/// What the library answers.
fn more(server: &Namespace, client: &str) -> usize {
    let room = server.within(|| recounter().room(question(client), 100, Instant::now()));
    match room.expect("an answer") {
        Room::For { more, .. } => usize::try_from(more).expect("a small number"),
        other => panic!("{other:?}"),
    }
}

/// Elements of sets, as nft shows them: of the host's own, when a child that has just been forked no
/// longer has our tables open.
fn elements(lab: &Lab) -> String {
    let rules = || lab.server.output("nft list ruleset");
    wait_for("the end of our tables", SOON, || !rules().contains("table inet ctkeep-t"));
    let rules = rules();
    rules.lines().filter(|line| line.contains("elements")).collect()
}

#[test]
fn asked_numbers_are_the_true_ones_from_an_empty_list_to_a_full_one() {
    for form in FORMS {
        let Some(lab) = Lab::new() else { return };
        lab.server.feed(form.tool, &(form.rules)());
        let _server = lab.serve("[::]:80");
        let peer = lab.peer(CLIENT);
        let mut held = Vec::new();
        for next in [0, 1, 62] {
            held.extend(peer.hold(80, next));
            assert_eq!(more(&lab.server, CLIENT), LIMIT - held.len(), "{}", form.name);
        }
        let (entries, before) = (lab.entries().len(), elements(&lab));
        let answered = more(&lab.server, CLIENT);
        assert_eq!(lab.entries().len(), entries, "{}: entries are left", form.name);
        assert_eq!(elements(&lab), before, "{}: elements are left", form.name);
        // The truth, with one place left.
        assert_eq!(peer.open_promptly(80, 10).len(), answered, "{}", form.name);
        assert_eq!(more(&lab.server, CLIENT), 0, "{}", form.name);
        assert_eq!(peer.open_promptly(80, 10).len(), 0, "{}: nothing is taken off", form.name);
    }
}

#[test]
fn asked_numbers_are_the_true_ones_over_ipv6() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 64);
    let _server = lab.serve("[::]:80");
    let peer = lab.peer(CLIENT6);
    let held = peer.hold(80, 60);
    assert_eq!(more(&lab.server, CLIENT6), LIMIT - held.len());
    assert_eq!(peer.open_promptly(80, 10).len(), LIMIT - held.len());
}

fn audit(lab: &Lab) -> (i32, Value) {
    let (code, out, err) = lab.ctkeep(PROGRAM, &["audit", "--ask", "--format", "json"]);
    let report = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
    (code, report)
}

fn is_counted(lab: &Lab, conn: &RawConn) -> bool {
    lab.entry_state(conn).is_some_and(|state| state != "CLOSE")
}

fn evict(lab: &Lab, conns: &[RawConn]) {
    for conn in conns {
        conn.stale_rst();
    }
    wait_for("closed entries", SOON, || !conns.iter().any(|conn| is_counted(lab, conn)));
}

/// What the limit has lost shows in its answer, and nowhere else: entries and sockets agree again
/// after a repair without recount.
#[test]
fn what_a_list_has_lost_is_seen_and_what_was_recounted_too() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 3);
    let _server = lab.serve("[::]:80");
    let peer = lab.peer(CLIENT);
    let mut conns = peer.hold(80, 3);
    let (code, report) = audit(&lab);
    assert_eq!((code, &report["sources"][0]["listed"]), (0, &3.into()), "{report:#}");
    assert_eq!(report["sources"][0]["full"], true);
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    evict(&lab, &conns[..2]);
    // The limit looks at its list.
    peer.syn_only(80).rst(0);
    let repair = |recount| lab.ctkeep(PROGRAM, &["reconcile", "--recount", recount]);
    assert_eq!(repair("off").0, 0);
    let (code, report) = audit(&lab);
    let source = &report["sources"][0];
    assert_eq!((code, &source["listed"], &source["full"]), (1, &1.into(), &false.into()));
    let findings = report["layers"]["limiter"]["findings"].as_array().expect("findings");
    let lacking = findings.iter().find(|finding| finding["id"] == "limit-lacking");
    let what = lacking.expect("said")["what"].as_str().expect("a text");
    assert!(what.contains("3 sockets, the list of ip filter INPUT rule 1 has 1"), "{what}");
    let remote = conns[0].client.to_string();
    let explain = ["explain", "192.0.2.1:80", &remote, "--ask"];
    let (code, out, err) = lab.ctkeep(PROGRAM, &explain);
    assert_eq!(code, 1, "{out}{err}");
    let said = "asked       2 more would be let in: 1 of 3 on the list of ip filter INPUT rule 1";
    assert!(out.contains(said), "{out}{err}");
    let (code, out, err) = lab.ctkeep(PROGRAM, &["recount"]);
    assert_eq!(code, 0, "{out}{err}");
    let (code, report) = audit(&lab);
    assert_eq!((code, &report["sources"][0]["listed"]), (0, &3.into()), "{report:#}");
    assert_eq!(lab.ctkeep(PROGRAM, &explain).0, 0);
    assert_eq!(peer.open_promptly(80, 5).len(), 0);
}

/// A list that is new has nothing, however many connections are open.
#[test]
fn a_reload_shows_in_the_answer() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 3);
    let _server = lab.serve("[::]:80");
    let peer = lab.peer(CLIENT);
    let _conns = peer.hold(80, 3);
    let saved = lab.server.output("iptables-save");
    lab.server.feed("iptables-restore", &saved);
    let (code, report) = audit(&lab);
    assert_eq!((code, &report["sources"][0]["listed"]), (1, &0.into()), "{report:#}");
    let _daemon = lab.daemon(PROGRAM, &[]);
    lab.server.feed("iptables-restore", &saved);
    thread::sleep(Duration::from_secs(1));
    let (code, report) = audit(&lab);
    assert_eq!((code, &report["sources"][0]["listed"]), (0, &3.into()), "{report:#}");
    assert_eq!(peer.open_promptly(80, 5).len(), 0);
}

/// What is asked of one client, by `explain --ask`: its line, and the answer in JSON.
fn explained(lab: &Lab, remote: &str) -> (String, Value) {
    let args = ["explain", "192.0.2.1:80", remote, "--ask"];
    let (_, out, err) = lab.ctkeep(PROGRAM, &args);
    let line = out.lines().find(|line| line.starts_with("asked")).map(str::to_owned);
    let (_, out, _) = lab.ctkeep(PROGRAM, &[&args[..], &["--format", "json"]].concat());
    let said: Value = serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {err}"));
    (line.unwrap_or_else(|| panic!("{out}{err}")), said.get("asked").cloned().unwrap_or_default())
}

/// No more are tried than tell whether the limit is full: what was not stopped is no number.
#[test]
fn a_client_that_no_rule_stops_has_room_for_at_least_what_was_tried() {
    let Some(lab) = Lab::new() else { return };
    let rules = [
        "INPUT -m length --length 0:200 -j ACCEPT",
        "INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 -j DROP",
    ];
    lab.server.feed("iptables-restore", &input(&rules));
    let _server = lab.serve("[::]:80");
    let peer = lab.peer(CLIENT);
    let held = peer.hold(80, 2);
    let (line, said) = explained(&lab, &held[0].client.to_string());
    let wanted =
        "asked       at least 4 more would be let in: no rule stopped one, and no more were tried";
    assert_eq!(line, wanted);
    assert_eq!((&said["at_least"], &said["more"]), (&4.into(), &Value::Null), "{said:#}");
    assert_eq!(peer.hold(80, 12).len(), 12, "the truth");
}

/// A limit that a rate keeps from refusing most: one probe more would be one refusal less.
#[test]
fn a_limit_whose_refusals_a_rate_limits_is_not_asked() {
    let Some(lab) = Lab::new() else { return };
    let above = "INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3";
    let rule = format!("{above} -m limit --limit 1/hour --limit-burst 5 -j DROP");
    lab.server.feed("iptables-restore", &input(&[&rule]));
    let _server = lab.serve("[::]:80");
    let peer = lab.peer(CLIENT);
    let other = lab.peer("198.51.100.8").hold(80, 2);
    let held = peer.hold(80, 3);
    let (line, said) = explained(&lab, &held[0].client.to_string());
    let why = "a rate beside its limit decides who is refused, and a probe would use that up";
    assert_eq!((line, &said["error"]), (format!("asked       not answered: {why}"), &why.into()));
    let (_, report) = audit(&lab);
    let rule = &report["layers"]["limiter"]["rules"][0];
    assert_eq!((&report["sources"][0]["listed"], &rule["holds"]), (&Value::Null, &Value::Null));
    let (_, out, err) = lab.ctkeep(PROGRAM, &["doctor", "--ask", "--format", "json"]);
    assert!(out.contains(&format!("not tried: ip filter INPUT rule 1: {why}")), "{out}{err}");
    drop(other);
    let dropped = lab.server.output("iptables -nvxL INPUT");
    let dropped = dropped.lines().find(|line| line.contains("#conn")).map(str::trim_start);
    assert!(dropped.is_some_and(|line| line.starts_with("0 ")), "the burst: {dropped:?}");
}

/// What stops the client is named, also where it is no limit.
#[test]
fn the_rule_that_decides_is_named() {
    let Some(lab) = Lab::new() else { return };
    lab.server.feed(
        "iptables-restore",
        &input(&[
            "INPUT -s 198.51.100.9 -j DROP",
            "INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 -j DROP",
        ]),
    );
    let _server = lab.serve("[::]:80");
    let ask = |remote: &str| {
        let explain = ["explain", "192.0.2.1:80", remote, "--ask", "--format", "json"];
        let (_, out, err) = lab.ctkeep(PROGRAM, &explain);
        let said: Value =
            serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {err}"));
        said["asked"].clone()
    };
    let other = ask("198.51.100.7:4000");
    assert_eq!((&other["listed"], &other["more"]), (&0.into(), &3.into()), "{other:#}");
    assert_eq!(other["decides"], "ip filter INPUT rule 2");
    let banned = ask("198.51.100.9:4000");
    let (listed, why) = (&banned["listed"], &banned["decides"]);
    assert_eq!(listed, &Value::Null, "{banned:#}");
    assert!(why == "ip filter INPUT rule 1" || banned["error"].is_string(), "{banned:#}");
}

/// SYNs that the limit of this source alone has dropped, by the rule's own counter: how long an answer
/// takes on a busy machine does not matter.
fn dropped(lab: &Lab, source: &str) -> usize {
    let saved = lab.server.output("iptables-save -c -t filter");
    let rule = saved.lines().find(|line| line.contains(source)).expect("the rule of a source");
    let packets = rule.trim_start_matches('[').split(':').next().expect("a counter");
    packets.parse().expect("a number")
}

/// Of the calling thread.
fn processor_time() -> Duration {
    let read = clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID);
    read.expect("every Linux has this clock").into()
}

/// A probe that got a place keeps it for a jiffy or two, in the list of others too.
#[test]
fn two_sources_under_one_limit_are_told_of_the_same_place() {
    const OTHER: &str = "198.51.100.8";
    let Some(lab) = Lab::new() else { return };
    let rule =
        "INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 --connlimit-mask 0 -j DROP";
    lab.server.feed("iptables-restore", &input(&[rule]));
    let _server = lab.serve("[::]:80");
    let _held = lab.peer(CLIENT).hold(80, 2);
    let answers: Vec<_> = lab.server.within(|| {
        let mut recounter = recounter();
        let clients = [CLIENT, OTHER].into_iter().cycle().take(20);
        clients.map(|client| recounter.ask(question(client), Instant::now())).collect()
    });
    for (nth, answer) in answers.into_iter().enumerate() {
        assert_eq!(answer.expect("an answer"), Asked::LetIn, "question {nth}");
    }
}

/// `CTKEEP_QUESTIONS` says how often (200).
#[test]
fn no_honest_syn_is_refused_since_a_limit_was_asked_whether_it_is_full() {
    const FULL: &str = "198.51.100.8";
    let Some(lab) = Lab::new() else { return };
    let questions = std::env::var("CTKEEP_QUESTIONS").ok().and_then(|text| text.parse().ok());
    let questions: usize = questions.unwrap_or(200);
    let rules = [CLIENT, FULL].map(|source| {
        format!(
            "INPUT -s {source} -p tcp --syn --dport 80 -m connlimit --connlimit-above 3 -j DROP"
        )
    });
    lab.server.feed("iptables-restore", &input(&rules.each_ref().map(String::as_str)));
    let _server = lab.serve("[::]:80");
    let (full, honest) = (lab.peer(FULL), lab.peer(CLIENT));
    let _held = (full.hold(80, 3), honest.hold(80, 1));
    let is_over = AtomicBool::new(false);
    thread::scope(|scope| {
        let asking = scope.spawn(|| {
            lab.server.within(|| {
                let mut recounter = recounter();
                let ask = |client| recounter.ask(question(client), Instant::now());
                let clients = [CLIENT, FULL].into_iter().cycle();
                let (begun, processor) = (Instant::now(), processor_time());
                let answers: Vec<_> = clients.take(2 * questions).map(ask).collect();
                is_over.store(true, Ordering::Relaxed);
                (answers, begun.elapsed(), processor_time() - processor)
            })
        });
        let (mut opened, mut unanswered) = (0, 0);
        // The server keeps a descriptor of each.
        while !is_over.load(Ordering::Relaxed) && opened < questions.max(500) {
            // A list is swept once a jiffy: until then it has the one before, too.
            thread::sleep(Duration::from_millis(20));
            // One that is answered late would stay half open, with a place of its own.
            match honest.complete(vec![honest.syn_only(80)], SOON).pop() {
                Some(conn) => {
                    conn.rst(0);
                    wait_for("its end", SOON, || !is_counted(&lab, &conn));
                }
                None => unanswered += 1,
            }
            opened += 1;
        }
        let (answers, took, processor) = asking.join().expect("no panic");
        let said = format!(
            "{unanswered} of {opened} unanswered, {questions} questions to each in {took:.1?}, \
             {processor:.2?} of a processor"
        );
        eprintln!("{said}");
        assert_eq!((opened > 0, dropped(&lab, CLIENT)), (true, 0), "{said}");
        // The control: each probe of a source that has no place left.
        assert_eq!(dropped(&lab, FULL), questions);
        for pair in answers.chunks(2) {
            assert_eq!(pair[0].as_ref().expect("an answer"), &Asked::LetIn);
            assert!(matches!(pair[1].as_ref().expect("an answer"), Asked::Stopped(_)));
        }
    });
    let left = lab.entries().into_iter().filter(|entry| entry.state != "CLOSE").count();
    assert_eq!(left, 4, "entries are left: {:?}", lab.entries());
}

/// What is shown to a limit that has it already is not counted twice.
#[test]
fn a_recount_of_what_is_counted_changes_no_number() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 64);
    let _server = lab.serve("[::]:80");
    let peer = lab.peer(CLIENT);
    let conns = peer.hold(80, 50);
    assert_eq!(more(&lab.server, CLIENT), 14);
    for _ in 0..3 {
        let (code, out, err) = lab.ctkeep(PROGRAM, &["recount"]);
        assert_eq!(code, 0, "{out}{err}");
        eprintln!("{}", more(&lab.server, CLIENT));
    }
    assert_eq!(more(&lab.server, CLIENT), 64 - conns.len());
}

/// `ctkeep doctor --ask` tries a recount through all rules of the host.
#[test]
fn a_recount_through_the_hosts_own_rules_is_tried_and_leaves_nothing() {
    let Some(lab) = Lab::new() else { return };
    lab.connlimit(80, 3);
    let _server = lab.serve("[::]:80");
    let peer = lab.peer(CLIENT);
    let _conns = peer.hold(80, 1);
    let doctor = || {
        let (_, out, err) = lab.ctkeep(PROGRAM, &["doctor", "--ask", "--format", "json"]);
        let said: Value = serde_json::from_str(&out).unwrap_or_else(|e| panic!("{e}: {out}{err}"));
        let findings = said["findings"].as_array().expect("findings").clone();
        let asked = findings.into_iter().find(|finding| finding["id"] == "recount-asked");
        asked.expect("a finding")
    };
    let entries = lab.entries().len();
    let good = doctor();
    assert_eq!(good["verdict"], "ok", "{good}");
    let what = good["what"].as_str().expect("a text");
    assert!(what.contains("ip filter INPUT rule 1") && what.contains("by ingress"), "{what}");
    assert_eq!(lab.entries().len(), entries, "{:?}", lab.entries());
    // The window of our nudges, which SYNs of others may have, too; probes have another.
    let rules = "tcp dport 80 tcp flags syn tcp window 64240 drop";
    lab.server.feed("nft -f -", &chain("prerouting priority -140", rules));
    let bad = doctor();
    assert_eq!(bad["verdict"], "bad", "{bad}");
    assert_eq!(lab.entries().len(), entries, "{:?}", lab.entries());
    lab.server.run("nft delete table inet limits");
    assert_eq!(peer.open_promptly(80, 5).len(), 2, "nothing is taken off or added");
}
