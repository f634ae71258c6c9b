//! Two containers of one bridge, one the client of the other: the host's rules see their packets only where
//! `br_netfilter` is told to show them.

use std::io::Read;
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

use crate::lab::guests::{self, INSIDE, LIMIT};
use crate::lab::{Lab, Namespace, Server, capture, wait_for};
use socket2::SockRef;

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const PUBLISHED: u16 = 8009;
const SOON: Duration = Duration::from_secs(15);
/// A deep sweep takes a hundredth of a core at the most: what it costs a debug build beside other tests has the next
/// one wait for half a minute.
const DEEP: Duration = Duration::from_secs(60);
/// An answer comes at once, or never: the limit drops.
const ANSWER: Duration = Duration::from_millis(800);

/// Closes by an RST.
const NOW: Option<Duration> = Some(Duration::ZERO);

struct Site {
    lab: Lab,
    client: Namespace,
    servers: [Server; 2],
    server: Namespace,
}

impl Site {
    /// With `bridge-nf-call-iptables` for all bridges.
    fn new(is_called: bool) -> Option<Self> {
        let lab = Lab::new()?;
        guests::limit(&lab);
        let setting = "net/bridge/bridge-nf-call-iptables";
        if lab.server.within(|| !std::path::Path::new("/proc/sys").join(setting).exists()) {
            crate::lab::skip("no br_netfilter");
            return None;
        }
        lab.server.sysctl(setting, if is_called { "1" } else { "0" });
        lab.server.feed(
            "ip -batch -",
            "link add br0 type bridge\nlink set br0 up\naddr add 10.1.9.1/24 dev br0\n",
        );
        let [server, client] = [2, 3].map(|number| port_of_bridge(&lab, number));
        let servers = [
            Server::start(&server, &format!("0.0.0.0:{INSIDE}")),
            Server::start(&client, "0.0.0.0:9"),
        ];
        let mut site = Self { lab, client, servers, server };
        // A bridge learns where its hosts are. By an RST nothing is left of it, and no late packet makes an entry.
        wait_for("the bridge", SOON, || {
            site.dial().is_some_and(|first| SockRef::from(&first).set_linger(NOW).is_ok())
        });
        let [server, _] = &mut site.servers;
        wait_for("the first", SOON, || server.held() > 0);
        server.close_all();
        let all = || site.client.output("ss -Htan state all exclude listening");
        wait_for("the end of the first", SOON, || all().is_empty());
        site.lab.server.run("conntrack -F");
        Some(site)
    }

    /// One more connection of the client; `None` where it is not let in.
    fn dial(&self) -> Option<TcpStream> {
        let server = SocketAddr::from(([10, 1, 9, 2], INSIDE));
        self.client.within(|| TcpStream::connect_timeout(&server, ANSWER)).ok()
    }

    fn hold(&self, count: usize) -> Vec<TcpStream> {
        (0..count).map(|_| self.dial().expect("below the limit")).collect()
    }

    /// Entries that a limit counts.
    fn counted(&self) -> usize {
        let all = self.lab.entries();
        let is_one = |state: &str| state == "ESTABLISHED" || state == "CLOSE_WAIT";
        all.iter().filter(|it| it.reply.0.port() == INSIDE && is_one(&it.state)).count()
    }

    /// The server's port by an address of the host.
    fn publish(&self) {
        self.lab.server.run(&format!(
            "iptables -t nat -A PREROUTING -d 192.0.2.1 -p tcp --dport {PUBLISHED} -j DNAT \
             --to-destination 10.1.9.2:{INSIDE}"
        ));
    }

    fn audit(&self) -> (i32, serde_json::Value) {
        let (code, out, err) = self.lab.ctkeep(CTKEEP, &["audit", "--all", "--format", "json"]);
        (code, serde_json::from_str(&out).expect(&err))
    }
}

/// A container at the bridge.
fn port_of_bridge(lab: &Lab, number: u16) -> Namespace {
    let namespace = Namespace::new().expect("namespace of a container");
    lab.server.feed(
        "ip -batch -",
        &format!(
            "link add port{number} type veth peer name eth0 netns {}\n\
             link set port{number} master br0\n\
             link set port{number} up\n",
            namespace.path()
        ),
    );
    namespace.feed(
        "ip -batch -",
        &format!(
            "link set lo up\nlink set eth0 up\naddr add 10.1.9.{number}/24 dev eth0\n\
             route add default via 10.1.9.1\n"
        ),
    );
    namespace
}

fn at(report: &serde_json::Value, place: &str) -> serde_json::Value {
    report.pointer(place).cloned().unwrap_or_default()
}

/// Nothing is left of the entries, and nobody has seen them before: the audit names what is open, and the
/// daemon puts it back, by what the client's own socket shows.
fn guards(site: &Site) {
    let mut held = site.hold(LIMIT);
    assert!(site.dial().is_none(), "the limit holds");
    let (code, report) = site.audit();
    assert_eq!((code, at(&report, "/summary/classes/agree")), (0, LIMIT.into()), "{report:#}");
    site.lab.server.run("conntrack -F");
    held.push(site.dial().expect("the control: without ctkeep one more is let in"));
    site.lab.server.run("conntrack -F");

    let (code, report) = site.audit();
    assert_eq!(
        at(&report, "/summary/classes/entry-missing"),
        serde_json::Value::from(held.len()),
        "{report:#}"
    );
    assert_eq!((code, at(&report, "/sources/0/over_limit")), (1, true.into()), "{report:#}");
    let ends = held.first().map(|it| [it.peer_addr(), it.local_addr()].map(Result::unwrap));
    let [server, client] = ends.expect("a connection").map(|end| end.to_string());
    let (code, out, err) = site.lab.ctkeep(CTKEEP, &["explain", &server, &client]);
    assert!(code == 1 && out.contains("entry-missing"), "{out}{err}");

    let mut daemon = None;
    let seen = capture(&site.client, || {
        daemon = Some(site.lab.daemon(CTKEEP, &[]));
        wait_for("what was lost", SOON, || site.counted() == held.len());
    });
    let daemon = daemon.expect("a daemon");
    // Of a nudge that goes back where it seems to come from a router may tell its source.
    assert!(seen.is_empty(), "{seen:?} {}", daemon.log());
    assert!(site.dial().is_none(), "{}", daemon.log());
    site.lab.server.run("conntrack -F");
    wait_for("what was lost again", SOON, || site.counted() == held.len());
    assert!(site.dial().is_none(), "{}", daemon.log());
}

#[test]
fn connections_across_a_bridge_that_is_filtered_are_put_back() {
    let Some(site) = Site::new(true) else { return };
    guards(&site);
}

/// As a runtime makes them: rules that translate, but not these connections.
#[test]
fn connections_across_a_bridge_beside_rules_that_translate_are_put_back() {
    let Some(site) = Site::new(true) else { return };
    site.publish();
    guards(&site);
}

/// As a runtime's own bridge: clients from outside come by the host's address, whatever the bridge shows.
#[test]
fn a_published_container_of_a_bridge_is_guarded() {
    for is_called in [false, true] {
        let Some(site) = Site::new(is_called) else { return };
        site.publish();
        let gain = |source: &str, is_guarded| {
            guests::gain(&site.lab, &site.lab.peer(source), PUBLISHED, is_guarded)
        };
        assert_eq!(gain("198.51.100.7", false), LIMIT, "the control");
        let daemon = site.lab.daemon(CTKEEP, &[]);
        assert_eq!(gain("198.51.100.8", true), 0, "{}", daemon.log());
    }
}

/// The setting of one bridge, without that for all.
#[test]
fn connections_across_the_one_bridge_that_is_filtered_are_put_back() {
    let Some(site) = Site::new(false) else { return };
    site.lab.server.run("ip link set br0 type bridge nf_call_iptables 1");
    guards(&site);
}

/// The host's conntrack never sees them, so the limit counts none, and none is made up.
#[test]
fn connections_across_a_bridge_that_is_not_filtered_are_left_alone() {
    let Some(site) = Site::new(false) else { return };
    let held = site.hold(LIMIT + 1);
    assert_eq!(site.counted(), 0, "the limit does not see them");
    let (code, report) = site.audit();
    assert_eq!((code, &report["summary"]["classes"]["entry-missing"]), (0, &0.into()));
    let daemon = site.lab.daemon(CTKEEP, &["--deep-interval", "1s"]);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(site.counted(), 0, "{}", daemon.log());
    assert!(site.dial().is_some(), "{}", daemon.log());
    drop(held);
}

/// The entry of one that came by the published port is no pattern for one that came directly: the client would
/// get its answers from an address that it does not know.
#[test]
fn a_direct_connection_is_not_put_back_as_its_translated_sibling() {
    let Some(mut site) = Site::new(true) else { return };
    site.publish();
    let _sibling = site.lab.peer("198.51.100.7").hold(PUBLISHED, 1);
    let mut lost = site.dial().expect("below the limit");
    site.lab.server.run("conntrack -D -s 10.1.9.3");
    let daemon = site.lab.daemon(CTKEEP, &[]);
    wait_for("what was lost", SOON, || site.counted() == 2);
    let [server, _] = &mut site.servers;
    server.send_all(b"here");
    lost.set_read_timeout(Some(SOON)).expect("a timeout");
    let mut data = [0; 4];
    let read = lost.read_exact(&mut data);
    assert!(read.is_ok() && data == *b"here", "{read:?} {}", daemon.log());
}

/// As that of a virtual machine at the bridge: no socket of this host shows whether it asked for the server or for the
/// published port. What siblings or an earlier look show is put back, and before that nothing.
#[test]
fn of_a_client_without_a_socket_here_nothing_is_made_up_and_what_is_known_is_put_back() {
    let Some(site) = Site::new(true) else { return };
    site.publish();
    let mut held = site.hold(1);
    site.lab.server.run("conntrack -F");
    let args = ["--containers", "off", "--netns", &site.server.path(), "--deep-interval", "1s"];
    let daemon = site.lab.daemon(CTKEEP, &args);
    std::thread::sleep(Duration::from_secs(3));
    assert_eq!(site.counted(), 0, "{}", daemon.log());
    held.extend(site.hold(LIMIT - 1));
    wait_for("what a sibling's entry shows", DEEP, || site.counted() == LIMIT);
    assert!(site.dial().is_none(), "{}", daemon.log());
    site.lab.server.run("conntrack -F");
    wait_for("what was seen", DEEP, || site.counted() == LIMIT);
    assert!(site.dial().is_none(), "{}", daemon.log());
    drop(daemon);
    site.lab.server.run("conntrack -F");
    assert!(site.dial().is_some(), "the control: without ctkeep one more is let in");
    drop(held);
}
