//! Proxies and masquerades between clients and a container: to its socket all clients are one. Where
//! that is so is said, with the place for the limit, which holds there; where the clients' own
//! addresses are seen nothing is said.

use crate::lab::guests;
use std::net::TcpStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::lab::guests::{Guest, INSIDE, LIMIT};
use crate::lab::{Lab, Namespace, Server, wait_for};
use crate::scene::CTKEEP;

const SOON: Duration = Duration::from_secs(15);

/// A proxy that takes connections and opens one to the container for each, as docker-proxy does.
struct Proxy(Child);

impl Proxy {
    fn start(lab: &Lab, port: u16, guest: &Guest) -> Self {
        Self::start_for("AF_INET", lab, port, guest)
    }

    fn start_for(family: &str, lab: &Lab, port: u16, guest: &Guest) -> Self {
        let script = format!(
            "import socket\ns = socket.create_server(('', {port}), family=socket.{family}, backlog=100)\nh = []\n\
             while True: h.append((s.accept(), socket.create_connection(('{}', {INSIDE}))))\n",
            guest.address
        );
        let mut command = Command::new("/usr/bin/python3");
        command.args(["-c", &script]);
        let child = lab.server.spawn_with(&command, |command| {
            command.stdin(Stdio::null()).stdout(Stdio::null());
        });
        let this = Self(child.expect("a proxy"));
        let listens = || !lab.server.output(&format!("ss -Hltn sport = :{port}")).is_empty();
        wait_for("the proxy", SOON, listens);
        this
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// What `audit` says of clients that are one, with its advice; `doctor` says the same.
fn said(lab: &Lab, args: &[&str]) -> Vec<(String, String)> {
    let (code, out, err) = lab.ctkeep(CTKEEP, &[&["audit", "--format", "json"], args].concat());
    assert!(code == 0 || code == 1, "{err}");
    let report: serde_json::Value = serde_json::from_str(&out).expect("a report");
    let all = report.pointer("/layers/limiter/findings").and_then(|all| all.as_array());
    let all = all.expect("findings");
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let ours = all.iter().filter(|it| it["id"] == "clients-as-one");
    let said: Vec<_> = ours.map(|it| (text(&it["what"]), text(&it["advice"]))).collect();
    if args.is_empty() {
        let (_, doctor, err) = lab.ctkeep(CTKEEP, &["doctor"]);
        assert_eq!(doctor.matches("clients-as-one").count(), said.len(), "{doctor}{err}");
    }
    said
}

#[test]
fn behind_a_proxy_of_the_host_all_clients_are_one_and_the_limit_stands_in_input() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    let guest = Guest::start_again(&lab, 1);
    let proxy = Proxy::start(&lab, 8001, &guest);
    let held: Vec<_> = (1..=3)
        .flat_map(|number| lab.peer(&format!("198.51.100.{number}")).hold(8001, 2))
        .collect();
    // The proxy dials the container behind the client's back.
    wait_for("the proxy's own connections", SOON, || {
        let open = guest.namespace.output("ss -Htn state established sport = :8080");
        open.lines().count() == 6
    });
    let said_now = said(&lab, &[]);
    let [(what, advice)] = said_now.as_slice() else { panic!("{said_now:?}") };
    assert_eq!(
        what,
        "all 6 connections to 10.1.1.2:8080 come from 10.1.1.1, an address of this host"
    );
    assert!(advice.contains("in INPUT of this host"), "{advice}");
    // What the host opens itself passes OUTPUT alone: twice the limit is there, and none of it is over.
    let (code, out, err) = lab.ctkeep(CTKEEP, &["audit"]);
    assert_eq!((code, out.contains("over it")), (0, false), "{out}{err}");
    let (_, killed, _) = lab.ctkeep(CTKEEP, &["kill", "--over-limit"]);
    assert!(!killed.contains("would be closed"), "{killed}");
    drop(held);

    lab.connlimit(8001, u32::try_from(LIMIT).expect("a limit"));
    let gain = |source: &str, with_ctkeep| guests::gain(&lab, &lab.peer(source), 8001, with_ctkeep);
    assert_eq!(gain("198.51.100.7", false), LIMIT, "the control");
    let daemon = lab.daemon(CTKEEP, &[]);
    assert_eq!(gain("198.51.100.8", true), 0, "{}", daemon.log());
    drop(proxy);
}

/// Containers that reach another one by the host's address, with a masquerade, as their answers would not
/// come back by the host.
#[test]
fn behind_a_hairpin_the_container_sees_one_client_and_the_host_sees_each() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    let server = Guest::start(&lab, 1);
    let clients = [Guest::start_again(&lab, 2), Guest::start_again(&lab, 3)];
    lab.server.run(&format!(
        "iptables -t nat -A POSTROUTING -s 10.1.0.0/16 -d {} -p tcp --dport {INSIDE} -j MASQUERADE",
        server.address
    ));
    let published = format!("192.0.2.1:{}", server.port);
    let open = |namespace: &Namespace, time: Duration| {
        let one = |time| TcpStream::connect_timeout(&published.parse().expect("an address"), time);
        namespace.within(|| (0..LIMIT).map_while(|_| one(time).ok()).collect::<Vec<_>>())
    };
    let held: Vec<_> = clients.iter().flat_map(|guest| open(&guest.namespace, SOON)).collect();
    assert_eq!(held.len(), 2 * LIMIT, "the limit of the host counts each");

    let path = server.namespace.path();
    assert_eq!(said(&lab, &[]), [], "on the host");
    let said_inside = said(&lab, &["--netns", &path, "--limit", "3"]);
    let [(what, advice)] = said_inside.as_slice() else { panic!("{said_inside:?}") };
    assert_eq!(what, "all 6 connections to port 8080 come from 10.1.1.1, the gateway");
    assert!(advice.contains("on the host or router that has 10.1.1.1"), "{advice}");
    for guest in &clients {
        assert_eq!(
            open(&guest.namespace, SOON / 15).len(),
            0,
            "the limit in FORWARD is for each of them"
        );
    }
}

/// What `audit` says of ports that are limited for one family alone, with its advice; `doctor` says the same.
fn one_family(lab: &Lab) -> Vec<(String, String)> {
    let (_, out, err) = lab.ctkeep(CTKEEP, &["audit", "--format", "json"]);
    let report: serde_json::Value = serde_json::from_str(&out).expect(&err);
    let all = report.pointer("/layers/limiter/findings").and_then(|all| all.as_array());
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let ours = all.expect("findings").iter().filter(|it| it["id"] == "limit-one-family");
    let said: Vec<_> = ours.map(|it| (text(&it["what"]), text(&it["advice"]))).collect();
    let (_, doctor, err) = lab.ctkeep(CTKEEP, &["doctor"]);
    assert_eq!(doctor.matches("limit-one-family").count(), said.len(), "{doctor}{err}");
    said
}

/// Rules publish a port for clients of IPv4 alone, whom a limit in FORWARD counts; those of IPv6 come to a proxy of
/// the host.
#[test]
fn clients_of_ipv6_that_a_proxy_takes_are_said_to_pass_a_limit_in_forward() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    let guest = Guest::start(&lab, 1);
    assert_eq!(one_family(&lab), [], "nothing listens for IPv6");
    let proxy = Proxy::start_for("AF_INET6", &lab, guest.port, &guest);
    let (ipv4, ipv6) = (lab.peer("198.51.100.7"), lab.peer("2001:db8:1::7"));
    let mut all = Vec::new();
    for held in [0, LIMIT] {
        all.extend(ipv4.hold(guest.port, held));
        all.extend(ipv6.hold(guest.port, 2 * held));
        let said = one_family(&lab);
        let [(what, advice)] = said.as_slice() else { panic!("{held} held: {said:?}") };
        assert!(what.starts_with("port 8001 is limited for IPv4 clients, whom rules"), "{what}");
        let rule = "ip6tables -I INPUT -p tcp --syn --dport 8001 -m connlimit --connlimit-above 3 \
                    --connlimit-mask 64 -j DROP";
        assert_eq!(advice, rule);
    }
    let admitted = [ipv4.admitted(guest.port, 1), ipv6.admitted(guest.port, 1)];
    assert_eq!(admitted, [0, 1], "the truth");

    let (_, advice) = one_family(&lab).remove(0);
    lab.server.run(&advice);
    assert_eq!(one_family(&lab), [], "limited for both");
    // The list is new: what is open already is not on it.
    all.extend(ipv6.hold(guest.port, LIMIT));
    assert_eq!(ipv6.admitted(guest.port, 1), 0, "the truth");
    drop((all, proxy));
}

/// The same for one container of two: what is said is said of the port that the limit is for, and where the proxy has
/// another, nothing is.
#[test]
fn a_proxy_of_a_port_that_no_limit_in_forward_is_for_is_not_named() {
    let legacy = "iptables-legacy -t nat -A PREROUTING -d 192.0.2.1 -p tcp --dport 8002 -j DNAT --to-destination";
    let native = "nft add rule ip pub c ip daddr 192.0.2.1 tcp dport 8002 dnat to";
    for publish in [&legacy.replace("-legacy", ""), legacy, native] {
        let Some(lab) = Lab::new() else { return };
        guests::limit(&lab);
        let guest = Guest::start(&lab, 1);
        let other = guests::attach(&lab, 2);
        let _server = Server::start(&other, "0.0.0.0:9000");
        lab.server.run("nft add table ip pub");
        lab.server.run("nft add chain ip pub c { type nat hook prerouting priority -100 ; }");
        lab.server.run(&format!("{publish} 10.1.2.2:9000"));
        let peer = lab.peer("198.51.100.7");
        assert_eq!(peer.admitted(8002, 2 * LIMIT), 2 * LIMIT, "{publish}: the truth");
        let _proxy = Proxy::start_for("AF_INET6", &lab, 8002, &guest);
        assert_eq!(one_family(&lab), [], "{publish}");
        let _proxy = Proxy::start_for("AF_INET6", &lab, guest.port, &guest);
        let said = one_family(&lab);
        assert!(said.len() == 1 && said[0].0.starts_with("port 8001 is limited"), "{said:?}");
    }
}
