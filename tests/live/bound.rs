//! Sockets that are bound to a device, and those of link-local peers, which always are: an exact
//! look-up finds them by that device alone.

use std::thread;
use std::time::Duration;

use crate::lab::{Daemon, Lab, Peer, RawConn, wait_for};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const PORT: u16 = 80;
const SOON: Duration = Duration::from_secs(10);
const TRIES: usize = 10;

/// Three connections, the limit, whose stale RSTs conntrack takes: how many more the limit admits.
/// Sweeps come too seldom to help.
fn fooled(lab: &Lab, peer: &Peer, events: Option<&str>) -> usize {
    let daemon = events.map(|events| {
        let args = ["--events", events, "--sweep-interval", "20s", "--deep-interval", "60s"];
        lab.daemon(CTKEEP, &args)
    });
    let mut conns = peer.hold(PORT, 3);
    // A limit keeps what it has just added for two ticks, entry or none.
    thread::sleep(Duration::from_millis(50));
    conns.iter_mut().for_each(RawConn::fin);
    for conn in &mut conns {
        assert!(conn.await_ack(), "no ACK for the FIN of {}", conn.client);
    }
    conns.iter().for_each(RawConn::stale_rst);
    if let Some(daemon) = &daemon {
        let repairs = |daemon: &Daemon| daemon.log().matches("trigger=Event").count();
        wait_for("repairs by event", SOON, || repairs(daemon) >= 3);
        assert!(!daemon.logged("trigger=Sweep"), "{}", daemon.log());
    }
    let admitted = peer.open_promptly(PORT, TRIES).len();
    assert!(daemon.is_none() || lab.all_sockets().len() >= 3, "a connection was cut");
    admitted
}

fn bound_to_a_device(events: Option<&str>) -> Option<usize> {
    let lab = Lab::new()?;
    lab.connlimit(PORT, 3);
    let _server = lab.serve("0.0.0.0:80%eth0");
    Some(fooled(&lab, &lab.peer("198.51.100.7"), events))
}

fn link_local(events: Option<&str>) -> Option<usize> {
    let lab = Lab::new()?;
    lab.connlimit(PORT, 3);
    let _server = lab.serve("[::]:80");
    Some(fooled(&lab, &lab.link_local_peer(), events))
}

#[test]
fn a_socket_that_is_bound_to_a_device_is_repaired_at_its_event() {
    let Some(admitted) = bound_to_a_device(None) else { return };
    assert_eq!(admitted, 3, "the stock kernel resists");
    assert_eq!(bound_to_a_device(Some("nflog")), Some(0), "nflog");
    assert_eq!(bound_to_a_device(Some("ctnetlink")), Some(0), "ctnetlink");
}

#[test]
fn a_link_local_peer_is_repaired_at_its_event() {
    let Some(admitted) = link_local(None) else { return };
    assert_eq!(admitted, 3, "the stock kernel resists");
    assert_eq!(link_local(Some("nflog")), Some(0), "nflog");
}

/// Three connections of a link-local peer on a host whose other device has the first route to such addresses;
/// then the limit gets a new list: how many more it admits.
fn new_list_beside_another_device(with_ctkeep: bool) -> Option<usize> {
    let lab = Lab::new()?;
    lab.server.feed(
        "ip -batch -",
        "link add before type veth peer name behind\n\
         link set before addrgenmode none\n\
         link set behind addrgenmode none\n\
         addr add fe80::9/64 dev before nodad\n\
         link set before up\n\
         link set behind up\n",
    );
    lab.connlimit(PORT, 3);
    let _server = lab.serve("[::]:80");
    let peer = lab.link_local_peer();
    let daemon = with_ctkeep.then(|| lab.daemon(CTKEEP, &[]));
    let conns = peer.hold(PORT, 3);
    assert_eq!(peer.admitted(PORT, 1), 0, "the limit holds before");
    let limit = "-p tcp --syn --dport 80 -m connlimit --connlimit-above 3 --connlimit-mask 128";
    lab.server.run(&format!("ip6tables -R INPUT 1 {limit} -j DROP"));
    if let Some(daemon) = &daemon {
        wait_for("three nudges", SOON, || daemon.log().matches("action=\"recount\"").count() >= 3);
    }
    let admitted = peer.admitted(PORT, TRIES);
    drop(conns);
    Some(admitted)
}

#[test]
fn a_link_local_peer_is_counted_again_by_its_own_device() {
    let Some(admitted) = new_list_beside_another_device(false) else { return };
    assert_eq!(admitted, 3, "the stock kernel has a new list");
    assert_eq!(new_list_beside_another_device(true), Some(0));
}
