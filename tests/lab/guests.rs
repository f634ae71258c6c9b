//! Containers made by hand behind the lab's server: a veth pair each, a port published by DNAT, and a
//! limit for what is forwarded.

#![allow(dead_code, unreachable_pub, reason = "each test program uses a part of it")]

use std::time::Duration;

use super::{Lab, Namespace, Peer, RawConn, Server, wait_for};

/// Connections from one address that the limit lets in.
pub const LIMIT: usize = 3;
/// Where the server of each listens, behind its published port.
pub const INSIDE: u16 = 8080;

/// A server for containers of a runtime: accepts, and holds what it has accepted.
pub const SERVER: &str = "import socket\ns = socket.create_server(('', 8080), backlog=100)\nh = []\n\
                          while True: h.append(s.accept())\n";

const SOON: Duration = Duration::from_secs(10);

/// A container with a server.
pub struct Guest {
    pub namespace: Namespace,
    pub server: Server,
    /// The port of the host that leads to it.
    pub port: u16,
    pub address: String,
}

/// Puts the limit for all guests in force.
pub fn limit(lab: &Lab) {
    lab.server.sysctl("net/ipv4/ip_forward", "1");
    lab.server.run(&format!(
        "iptables -A FORWARD -p tcp --syn --dport {INSIDE} -m connlimit --connlimit-above {LIMIT} \
         --connlimit-mask 32 -j DROP"
    ));
}

impl Guest {
    /// Number `number` of this lab, at most 250; its port is published.
    pub fn start(lab: &Lab, number: u16) -> Self {
        let guest = Self::start_again(lab, number);
        publish(lab, number);
        guest
    }

    /// The same after its end, at the same address, whose port is published still.
    pub fn start_again(lab: &Lab, number: u16) -> Self {
        let namespace = attach(lab, number);
        let server = Server::start(&namespace, &format!("0.0.0.0:{INSIDE}"));
        Self { namespace, server, port: port(number), address: address(number) }
    }

    /// Fills the limit of one address and half-closes what it holds.
    pub fn half_closed(&self, peer: &Peer) -> Vec<RawConn> {
        half_closed(peer, self.port)
    }

    /// How many more are let in after stale RSTs; with ctkeep once it has had its say.
    pub fn gain(&self, lab: &Lab, peer: &Peer, with_ctkeep: bool) -> usize {
        gain(lab, peer, self.port, with_ctkeep)
    }
}

/// The port of the host that leads to guest `number`.
pub fn port(number: u16) -> u16 {
    8000 + number
}

fn address(number: u16) -> String {
    format!("10.1.{number}.2")
}

/// Publishes the port of guest `number`.
pub fn publish(lab: &Lab, number: u16) {
    lab.server.run(&format!(
        "iptables -t nat -A PREROUTING -d 192.0.2.1 -p tcp --dport {} -j DNAT --to-destination {}:{INSIDE}",
        port(number),
        address(number)
    ));
}

/// The namespace of guest `number`, with its cable, and without a server.
pub fn attach(lab: &Lab, number: u16) -> Namespace {
    let namespace = Namespace::new().expect("namespace of a guest");
    lab.server.feed(
        "ip -batch -",
        &format!(
            "link add guest{number} type veth peer name eth0 netns {}\n\
             link set guest{number} addrgenmode none\n\
             link set guest{number} up\n\
             addr add 10.1.{number}.1/24 dev guest{number}\n",
            namespace.path()
        ),
    );
    namespace.feed(
        "ip -batch -",
        &format!(
            "link set lo up\n\
             link set eth0 addrgenmode none\n\
             link set eth0 up\n\
             addr add {}/24 dev eth0\n\
             route add default via 10.1.{number}.1\n",
            address(number)
        ),
    );
    namespace
}

/// Fills the limit of one address at a port and half-closes what it holds.
pub fn half_closed(peer: &Peer, port: u16) -> Vec<RawConn> {
    let mut conns = peer.hold(port, LIMIT);
    conns.iter_mut().for_each(RawConn::fin);
    wait_for("ACKs of the FINs", SOON, || conns.iter_mut().all(RawConn::await_ack));
    conns
}

/// How many more are let in at a port after stale RSTs; with ctkeep once it has had its say.
pub fn gain(lab: &Lab, peer: &Peer, port: u16, with_ctkeep: bool) -> usize {
    let conns = half_closed(peer, port);
    conns.iter().for_each(RawConn::stale_rst);
    let is_settled = |conn: &RawConn| is_counted(lab, conn) == with_ctkeep;
    wait_for("what comes of them", SOON, || conns.iter().all(is_settled));
    peer.admitted(port, LIMIT + 2)
}

/// The same of a source at port 80, once the server of a runtime's container listens there.
pub fn gain_of(lab: &Lab, source: &str, with_ctkeep: bool) -> usize {
    let scout = lab.peer("203.0.113.77");
    let listens = || scout.connect(80).map(|conn| conn.rst(0)).is_some();
    wait_for("the server", Duration::from_secs(60), listens);
    gain(lab, &lab.peer(source), 80, with_ctkeep)
}

/// Whether the entry is one that a limit counts for its client.
pub fn is_counted(lab: &Lab, conn: &RawConn) -> bool {
    let all = lab.entries();
    let entry = all.iter().find(|entry| entry.orig == (conn.client, conn.server));
    entry.is_some_and(|entry| entry.state != "CLOSE" && entry.state != "TIME_WAIT")
}
