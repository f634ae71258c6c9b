//! Refreshes the captured files from the running kernel, in a throw-away network namespace.

use std::net::{TcpStream, UdpSocket};

use super::*;
use crate::lab::{Lab, Namespace, Peer, RawConn, SERVER_V4, Server, wait_for};

/// Keeps a copy of everything that arrives.
struct Recorder {
    socket: KernelSocket,
    datagrams: Rc<RefCell<Vec<Vec<u8>>>>,
}

impl Recorder {
    fn open(family: isize) -> (Self, Rc<RefCell<Vec<Vec<u8>>>>) {
        let socket = KernelSocket::open(ctkeep::Op::new("capture"), family).unwrap();
        let datagrams = Rc::default();
        (Self { socket, datagrams: Rc::clone(&datagrams) }, datagrams)
    }
}

impl Transport for Recorder {
    fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        self.socket.send(datagram)
    }

    fn recv(&mut self, datagram: &mut Vec<u8>) -> io::Result<()> {
        self.socket.recv(datagram)?;
        self.datagrams.borrow_mut().push(datagram.clone());
        Ok(())
    }
}

const NETLINK_SOCK_DIAG: isize = 4;
const NETLINK_NETFILTER: isize = 12;

/// Records one conversation about conntrack in a namespace.
fn record<R: Send>(
    namespace: &Namespace,
    name: &str,
    words: &str,
    talk: impl FnOnce(&mut Conntrack<Recorder>) -> R + Send,
) -> R {
    let (result, datagrams) = namespace.within(|| {
        let (recorder, datagrams) = Recorder::open(NETLINK_NETFILTER);
        let result = talk(&mut Conntrack::new(recorder));
        (result, datagrams.take())
    });
    hex::write(name, &[&kernel(), words], &datagrams);
    result
}

/// The same about sockets.
fn record_sockets(
    namespace: &Namespace,
    name: &str,
    words: &str,
    talk: impl FnOnce(&mut SockDiag<Recorder>) + Send,
) {
    let datagrams = namespace.within(|| {
        let (recorder, datagrams) = Recorder::open(NETLINK_SOCK_DIAG);
        talk(&mut SockDiag::new(recorder));
        datagrams.take()
    });
    hex::write(name, &[&kernel(), words], &datagrams);
}

fn kernel() -> String {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    // Without the name that its builder gave it.
    format!("Linux {}", release.trim().split('-').next().unwrap())
}

/// The line of an administrator's tool that has all of `needles`.
fn line(output: &str, needles: &[&str]) -> String {
    let mut lines = output.lines().filter(|line| needles.iter().all(|n| line.contains(n)));
    lines.next().unwrap_or_else(|| panic!("no line with {needles:?} in\n{output}")).to_owned()
}

fn conntrack_line(lab: &Lab, flow: FourTuple) -> String {
    let family = if flow.is_ipv4() { "ipv4" } else { "ipv6" };
    let list = format!("conntrack -L -f {family} -o extended,id,labels");
    line(&lab.server.output(&list), &[&format!("sport={} ", flow.dst.port()), "tcp"])
}

fn ss_line(lab: &Lab, options: &str, needle: &str) -> String {
    let line = line(&lab.server.output(&format!("ss -Htan{options}")), &[needle]);
    line.split_whitespace().collect::<Vec<_>>().join(" ")
}

fn server_to_peer(conn: &RawConn, server_port: u16) -> FourTuple {
    let server = ctkeep::flow::Endpoint::new(conn.server.ip(), server_port);
    FourTuple::new(server, ctkeep::flow::Endpoint::new(conn.client.ip(), conn.client.port()))
}

/// Captures the entry of a connection; then deletes it, puts it back from what was decoded,
/// and checks that it is as it was.
fn entry(lab: &Lab, name: &str, flow: FourTuple, zone: Zone) {
    let words = conntrack_line(lab, flow);
    let name = format!("entries/{name}");
    let found = record(&lab.server, &name, &words, |table| table.get(&[(flow, zone)]).unwrap());
    let was = found[0].unwrap_or_else(|| panic!("{name}: no entry"));
    lab.server.within(|| {
        let mut table = Conntrack::open().unwrap();
        let new = Insert {
            like: was,
            state: was.state().unwrap(),
            status: Status::ASSURED,
            timeout: was.timeout.unwrap(),
        };
        let replace = Change::Replace { old: was.key(), id: was.id, new };
        table.change(&[replace]).unwrap().remove(0).unwrap_or_else(|e| panic!("{name}: {e}"));
        let is = table.get(&[(flow, zone)]).unwrap()[0].unwrap();
        // Of these a new entry has its own.
        let comparable = |entry: Entry| Entry {
            id: None,
            status: None,
            timeout: None,
            tcp: entry.tcp.map(|tcp| Tcp { flags: [0; 2], ..tcp }),
            // The kernel gives one to every entry made by request, with zeros.
            synproxy: entry.synproxy.filter(|state| *state != SynProxy::default()),
            ..entry
        };
        assert_eq!(comparable(is), comparable(was), "{name} put back");
    });
}

/// One way of tracking for each port.
const RULES: &str = "\
    *raw\n\
    -A PREROUTING -p tcp --dport 82 -j CT --zone 5\n\
    -A OUTPUT -p tcp --sport 82 -j CT --zone 5\n\
    -A PREROUTING -p tcp --dport 83 -j CT --zone-orig 6\n\
    -A PREROUTING -p tcp --dport 84 -j CT --zone-reply 7\n\
    -A OUTPUT -p tcp --sport 84 -j CT --zone 7\n\
    -A PREROUTING -p tcp --dport 21 -j CT --helper ftp\n\
    -A PREROUTING -p tcp --syn --dport 87 -j CT --notrack\n\
    COMMIT\n\
    *nat\n\
    -A PREROUTING -p tcp --dport 81 -j REDIRECT --to-ports 80\n\
    COMMIT\n\
    *mangle\n\
    -A PREROUTING -p tcp --dport 85 -j CONNMARK --set-mark 0xdeadbeef\n\
    -A PREROUTING -p tcp --dport 86 -m connlabel --label 65 --set\n\
    COMMIT\n\
    *filter\n\
    -A INPUT -p tcp --dport 87 -m conntrack --ctstate INVALID,UNTRACKED \
        -j SYNPROXY --sack-perm --timestamp --wscale 7 --mss 1460\n\
    -A INPUT -m conntrack --ctstate INVALID -j DROP\n\
    COMMIT\n";

#[test]
#[ignore = "rewrites tests/golden from the running kernel"]
fn capture() {
    let lab = Lab::new().expect("a kernel to capture from");
    lab.server.feed("iptables-restore", RULES);
    lab.server.run("ip6tables -A INPUT -m conntrack --ctstate INVALID -j DROP");
    let ports: Vec<String> =
        [80, 82, 83, 84, 85, 86, 87, 21].iter().map(|port| format!("[::]:{port}")).collect();
    let mut server = lab.serve(&format!("{} 0.0.0.0:8080", ports.join(" ")));
    let peer = lab.peer("198.51.100.7");

    let v4 = half_closed(&peer, 80);
    entry_of(&lab, "close-wait", &v4, 80, Zone::default());
    let v6 = over_ipv6(&lab);
    by_rules(&lab, &peer);
    by_a_whole_tcp(&lab);
    let lost = picked_up(&lab, &peer, &mut server);
    not_tcp(&lab);
    size_and_refusals(&lab, server_to_peer(&v4, 80));
    events(&lab, &peer);
    look_ups(&lab, &v4, &v6, &lost);
    dumps();
}

fn half_closed(peer: &Peer, port: u16) -> RawConn {
    let mut conn = peer.connect(port).unwrap_or_else(|| panic!("port {port} refuses"));
    conn.fin();
    assert!(conn.await_ack(), "port {port}: no ACK for the FIN");
    conn
}

fn entry_of(lab: &Lab, name: &str, conn: &RawConn, socket_port: u16, zone: Zone) {
    entry(lab, name, server_to_peer(conn, socket_port), zone);
}

fn over_ipv6(lab: &Lab) -> RawConn {
    let peer_v6 = lab.peer("2001:db8:1::7");
    let mut v6 = peer_v6.connect(80).unwrap();
    lab.half_close(&mut v6);
    assert!(v6.await_ack());
    entry_of(lab, "close-wait-ipv6", &v6, 80, Zone::default());
    v6
}

/// Entries, one way of being one after the other.
fn by_rules(lab: &Lab, peer: &Peer) {
    let none = Zone::default();
    for (name, port, socket_port, zone) in [
        ("redirected", 81, 80, none),
        ("zone", 82, 82, Zone::both(5)),
        ("zone-orig-only", 83, 83, Zone { orig: 6, reply: 0 }),
        ("zone-reply-only", 84, 84, Zone { orig: 0, reply: 7 }),
        ("mark", 85, 85, none),
        ("labels", 86, 86, none),
        ("helper", 21, 21, none),
    ] {
        entry_of(lab, name, &half_closed(peer, port), socket_port, zone);
    }
}

/// A client with a TCP of its own: window scales, selective acknowledgements, and the patience
/// that SYNPROXY asks for.
fn by_a_whole_tcp(lab: &Lab) {
    let none = Zone::default();
    let connect = |port: u16| {
        let stream = lab.client.within(|| TcpStream::connect((SERVER_V4, port)).unwrap());
        let client = stream.local_addr().unwrap().to_string();
        (stream, played::flow(&format!("192.0.2.1:{port}"), &client))
    };
    let has_state = |flow: FourTuple, state: &str| {
        wait_for(state, Duration::from_secs(5), || conntrack_line(lab, flow).contains(state));
    };
    let (_established, flow) = connect(80);
    has_state(flow, "ESTABLISHED");
    entry(lab, "established", flow, none);
    // SYNPROXY must see the third packet of a handshake as INVALID.
    let loose = "net/netfilter/nf_conntrack_tcp_loose";
    lab.server.sysctl(loose, "0");
    let (proxied, flow) = connect(87);
    has_state(flow, "ESTABLISHED");
    proxied.shutdown(std::net::Shutdown::Write).unwrap();
    has_state(flow, "CLOSE_WAIT");
    entry(lab, "synproxy", flow, none);
    lab.server.sysctl(loose, "1");
}

/// Forgotten, and picked up at a packet of the server.
fn picked_up(lab: &Lab, peer: &Peer, server: &mut Server) -> RawConn {
    let mut lost = half_closed(peer, 8080);
    lab.server.run(&format!("conntrack -D -p tcp --sport {}", lost.client.port()));
    server.send_all(b"data");
    wait_for("data", Duration::from_secs(5), || lost.received() > 0);
    entry_of(lab, "reversed", &lost, 8080, Zone::default());
    lost
}

fn not_tcp(lab: &Lab) {
    lab.server.within(|| {
        let socket = UdpSocket::bind((SERVER_V4, 5300)).unwrap();
        socket.send_to(b"?", "198.51.100.7:53").unwrap();
    });
    let words = line(&lab.server.output("conntrack -L -p udp -o extended,id"), &["udp"]);
    let datagrams = lab.server.within(|| {
        let (recorder, datagrams) = Recorder::open(NETLINK_NETFILTER);
        let dump = ctkeep::netlink::Request {
            op: ctkeep::Op::new("dump of everything"),
            kind: played::CT_GET,
            flags: 0,
            body: vec![AF_INET, 0, 0, 0],
            joined: false,
        };
        ctkeep::netlink::Conversation::new(recorder).dump(&dump, |(): &mut (), _| Ok(())).unwrap();
        datagrams.take()
    });
    let udp = datagrams
        .iter()
        .flat_map(|datagram| played::messages(datagram))
        .find(|message| played::descend(&message[20..], &[1, 2, 1]) == Some(&[17]));
    hex::write("entries/udp", &[&kernel(), &words], &[udp.unwrap()]);
}

/// The size of the table; no entry; and the refusal of an entry that is there.
fn size_and_refusals(lab: &Lab, there: FourTuple) {
    let none = Zone::default();
    let words = format!("conntrack -C: {}", lab.server.output("conntrack -C").trim());
    record(&lab.server, "entries/stats", &words, |table| table.size().unwrap());
    let nobody = played::flow("192.0.2.1:80", "198.51.100.99:1");
    record(&lab.server, "entries/absent", "no such entry", |table| {
        assert_eq!(table.get(&[(nobody, none)]).unwrap(), [None]);
    });
    record(&lab.server, "entries/insert-refused", "an insert of what is there", |table| {
        let like = Entry::plain(there.inverse(), none);
        let timeout = Duration::from_secs(60);
        let state = TcpState::CloseWait;
        let insert = Insert { like, state, status: Status::FRESH, timeout };
        table.change(&[Change::Insert(insert)]).unwrap().remove(0).unwrap_err();
    });
}

/// A stale RST, a change by request, a delete by request.
fn events(lab: &Lab, peer: &Peer) {
    let (datagrams, words, own) = lab.server.within(|| {
        let (recorder, datagrams) = Recorder::open(NETLINK_NETFILTER);
        for group in [2, 3] {
            recorder.socket.join(group).unwrap();
        }
        recorder.socket.set_non_blocking().unwrap();
        let mut listener = Listener::new(recorder);
        let mut table = Conntrack::open().unwrap();
        // After the listener: an entry that is older than every listener is mute.
        let victim = half_closed(peer, 80);
        let words = conntrack_line(lab, server_to_peer(&victim, 80));
        listener.drain(100, |_| ()).unwrap();
        datagrams.borrow_mut().clear();
        victim.rst(-5);
        let mut count = 0;
        wait_for("event", Duration::from_secs(5), || {
            listener.drain(10, |_| count += 1).unwrap();
            count == 1
        });
        change_and_delete(&mut table, server_to_peer(&victim, 80));
        wait_for("events", Duration::from_secs(5), || {
            listener.drain(10, |_| count += 1).unwrap();
            count == 3
        });
        (datagrams.take(), words, table.port())
    });
    let before = format!("before: {words}");
    let port = format!("netlink port of the requests: {own}");
    for (name, datagram) in ["closed-by-rst", "updated", "deleted"].iter().zip(datagrams) {
        hex::write(&format!("events/{name}"), &[&kernel(), &before, &port], &[datagram]);
    }
}

fn change_and_delete(table: &mut Conntrack, flow: FourTuple) {
    let key = EntryKey { zone: Zone::default(), orig: flow.inverse() };
    let update = Change::Update {
        key,
        state: TcpState::CloseWait,
        status: None,
        timeout: Duration::from_secs(60),
    };
    for result in table.change(&[update, Change::Delete { key, id: None }]).unwrap() {
        result.unwrap();
    }
}

fn look_ups(lab: &Lab, mapped: &RawConn, v6: &RawConn, v4: &RawConn) {
    let namespace = &lab.server;
    for (name, conn, port) in
        [("look-up-dual-stack", mapped, 80), ("look-up-ipv6", v6, 80), ("look-up", v4, 8080)]
    {
        let flow = server_to_peer(conn, port);
        let words = ss_line(lab, "eo", &format!(":{} ", conn.client.port()));
        record_sockets(namespace, &format!("sockets/{name}"), &words, |diag| {
            let found = diag
                .lookup(&[Lookup { connection: Connection::of_sender(flow), interface: 0 }])
                .unwrap();
            assert!(found[0].is_some(), "{name}");
        });
    }
    for (name, port, words) in [
        ("absent-beside-a-listener", 80, ss_line(lab, "leo", ":80 ")),
        ("absent", 7, "no such socket".to_owned()),
    ] {
        let nobody = played::flow(&format!("192.0.2.1:{port}"), "198.51.100.99:1");
        record_sockets(namespace, &format!("sockets/{name}"), &words, |diag| {
            let found = diag
                .lookup(&[Lookup { connection: Connection::of_sender(nobody), interface: 0 }])
                .unwrap();
            assert_eq!(found, [None]);
        });
    }
}

/// In a namespace of their own, so that they are short.
fn dumps() {
    let lab = Lab::new().unwrap();
    let _server = lab.serve("[::]:80 0.0.0.0:8080");
    let mut half_closed: Vec<_> = [("198.51.100.7", 80), ("198.51.100.7", 8080)]
        .iter()
        .map(|(peer, port)| lab.peer(peer).connect(*port).unwrap())
        .collect();
    half_closed.push(lab.peer("2001:db8:1::7").connect(80).unwrap());
    for conn in &mut half_closed {
        lab.half_close(conn);
    }
    let _established = lab.peer("198.51.100.8").connect(80).unwrap();
    let _half_open = lab.peer("198.51.100.9").syn_only(80);
    let words: Vec<String> = lab
        .server
        .output("ss -Htaneo")
        .lines()
        .map(|line| line.split_whitespace().collect::<Vec<_>>().join(" "))
        .collect();
    let words = words.join("\n");
    for (name, states) in [
        ("dump-of-close-wait", States::from_iter([State::CloseWait])),
        ("dump-of-listeners", States::from_iter([State::Listen])),
        ("dump-of-the-connected", States::connected()),
    ] {
        record_sockets(&lab.server, &format!("sockets/{name}"), &words, |diag| {
            assert!(!diag.sockets(states).unwrap().is_empty(), "{name}");
        });
    }
}
