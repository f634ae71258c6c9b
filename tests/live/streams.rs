//! Not a byte lost: a server that still sends after the client's half-close is repaired in the
//! middle of its stream, and the stream arrives whole, with no packet that conntrack calls INVALID.
//!
//! Both ends are real sockets. A shaper makes the megabyte take long enough; the rules drop what
//! is INVALID in every chain and count it.

use std::io::{ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::thread;
use std::time::Duration;

use crate::lab::rules::restore;
use crate::lab::{Daemon, Lab, Namespace, Peer, RST, Segment, holds_within, wait_for};
use socket2::SockRef;

const PROGRAM: &str = env!("CARGO_BIN_EXE_ctkeep");
const SOON: Duration = Duration::from_secs(20);

/// What the server sends after the client's FIN.
const LENGTH: usize = 1 << 20;
/// How much the client has when it happens.
const MIDDLE: usize = LENGTH / 4;
/// Until all windows are full and the server can send no more.
const REST: Duration = Duration::from_millis(150);

/// Where the client connects to and where the server is.
#[derive(Clone, Copy)]
enum Site {
    Plain,
    Ipv6,
    Redirect,
    Container,
}

/// What is done to the entry in the middle of the stream, and what repairs it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Harm {
    /// A stale RST closes the entry while the stream flows.
    StaleRst,
    /// The entry is deleted while the stream rests, and found missing.
    Deletion,
    /// The entry is deleted while the stream rests, and the server's next packet makes one in the
    /// wrong direction.
    Reversal,
}

impl Harm {
    fn repair(self) -> &'static str {
        match self {
            Self::StaleRst => "revive",
            Self::Deletion => "reinsert",
            Self::Reversal => "reverse",
        }
    }
}

impl Site {
    fn target(self) -> &'static str {
        match self {
            Self::Plain | Self::Redirect | Self::Container => "192.0.2.1:80",
            Self::Ipv6 => "[2001:db8::1]:80",
        }
    }

    fn listen(self) -> &'static str {
        match self {
            Self::Plain | Self::Ipv6 => "[::]:80",
            Self::Redirect | Self::Container => "[::]:8080",
        }
    }

    /// Counts and drops INVALID packets everywhere; translates addresses as the site wants it.
    fn rules(self) -> String {
        let translation = match self {
            Self::Plain | Self::Ipv6 => return drop_invalid(),
            Self::Redirect => "-j REDIRECT --to-ports 8080",
            Self::Container => "-d 192.0.2.1 -j DNAT --to-destination 10.0.0.2:8080",
        };
        let rule = format!("PREROUTING -p tcp --dport 80 {translation}");
        drop_invalid() + &restore("nat", "PREROUTING", &[&rule])
    }

    fn restore(self) -> &'static str {
        if matches!(self, Self::Ipv6) { "ip6tables-restore" } else { "iptables-restore" }
    }
}

fn drop_invalid() -> String {
    let drop = "-m conntrack --ctstate INVALID -j DROP";
    let rules = ["INPUT", "FORWARD", "OUTPUT"].map(|chain| format!("{chain} {drop}"));
    restore("filter", "INPUT FORWARD OUTPUT", &rules.each_ref().map(String::as_str))
}

/// Different at every place, so that a byte lost, repeated or moved is seen.
fn content() -> Vec<u8> {
    (0..LENGTH).map(|index| index.wrapping_mul(2_654_435_761).to_be_bytes()[5]).collect()
}

struct Scene {
    lab: Lab,
    container: Option<Namespace>,
    site: Site,
    daemon: Daemon,
    /// Sends packets in anybody's name.
    forger: Peer,
}

impl Scene {
    fn new(site: Site, recount: &str) -> Option<Self> {
        let lab = Lab::new()?;
        let container = matches!(site, Site::Container).then(|| lab.container());
        lab.server.feed(site.restore(), &site.rules());
        // 1 MiB in half a second.
        lab.server.run("tc qdisc add dev eth0 root tbf rate 16mbit burst 16kb latency 200ms");
        let path = container.as_ref().map(Namespace::path);
        // Conntrack's own events tell of a deletion at once; a sweep, of the port that is new.
        let mut args = vec!["--recount", recount, "--events", "ctnetlink"];
        args.extend(["--sweep-interval", "100ms"]);
        if let Some(path) = &path {
            args.extend(["--netns", path]);
        }
        let daemon = lab.daemon(PROGRAM, &args);
        let address = if matches!(site, Site::Ipv6) { "2001:db8:1::9" } else { "198.51.100.9" };
        let forger = lab.peer(address);
        Some(Self { lab, container, site, daemon, forger })
    }

    /// A server that answers each half-closed connection with the content, and closes.
    fn serve(&self, streams: usize) -> thread::JoinHandle<()> {
        let place = self.container.as_ref().unwrap_or(&self.lab.server);
        let listener = place.within(|| TcpListener::bind(self.site.listen()).expect("listener"));
        thread::spawn(move || {
            let served: Vec<_> = (0..streams)
                .map(|_| {
                    let (mut stream, _) = listener.accept().expect("a connection");
                    thread::spawn(move || {
                        SockRef::from(&stream).set_send_buffer_size(1 << 15).expect("buffer");
                        let mut request = Vec::new();
                        stream.read_to_end(&mut request).expect("the request");
                        assert_eq!(request, b"all of it, please");
                        stream.write_all(&content()).expect("the stream");
                    })
                })
                .collect();
            served.into_iter().for_each(|stream| stream.join().expect("the server's stream"));
        })
    }

    /// One stream from the client's side, with `harm` in its middle.
    fn stream(&self, harm: Harm) {
        let target: SocketAddr = self.site.target().parse().expect("an address");
        let mut stream = self.lab.client.within(|| TcpStream::connect(target).expect("connect"));
        SockRef::from(&stream).set_recv_buffer_size(1 << 15).expect("buffer");
        stream.set_read_timeout(Some(SOON)).expect("timeout");
        let client = stream.local_addr().expect("own address");
        stream.write_all(b"all of it, please").expect("the request");
        stream.shutdown(Shutdown::Write).expect("half-close");

        let mut bytes = vec![0; LENGTH + 1];
        let (first, _) = bytes.split_at_mut(MIDDLE);
        stream.read_exact(first).expect("the first part");
        self.harm(harm, client, target);
        let mut end = MIDDLE;
        // One byte more would be read too.
        while let Some(rest) = bytes.get_mut(end..) {
            match stream.read(rest) {
                Ok(0) => break,
                Ok(count) => end += count,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => panic!("the stream goes on: {error}"),
            }
        }
        bytes.truncate(end);
        assert_eq!(end, LENGTH, "{harm:?}:\n{}", self.daemon.log());
        assert!(bytes == content(), "{harm:?}: the bytes are other ones");
        assert!(self.is_logged(harm.repair(), client), "{harm:?}:\n{}", self.daemon.log());
        drop(stream);
        self.assert_ended(client, harm);
        assert_eq!(self.invalid(), Vec::<String>::new(), "{harm:?}:\n{}", self.daemon.log());
    }

    fn harm(&self, harm: Harm, client: SocketAddr, server: SocketAddr) {
        let repaired = || self.is_logged(harm.repair(), client);
        match harm {
            // Any number but the exact one: conntrack does not look at it after a FIN.
            Harm::StaleRst => self.forger.send(&Segment {
                source: client,
                destination: server,
                seq: 77,
                ack: 0,
                flags: RST,
                payload: Vec::new(),
            }),
            // Where nothing is picked up, a lost entry stays lost until it is inserted again.
            Harm::Deletion => {
                self.lab.server.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0");
                thread::sleep(REST);
                self.delete(client);
                wait_for("repair", SOON, repaired);
                // A packet of the server that came before the repair was rightly called INVALID.
                self.lab.server.run(&format!("{} -Z", self.site.restore().replace("-restore", "")));
                self.lab.server.sysctl("net/netfilter/nf_conntrack_tcp_loose", "1");
            }
            Harm::Reversal => {
                thread::sleep(REST);
                self.daemon.stop();
                self.delete(client);
                // The probe of a closed window; or, if the client's answer to an earlier one comes
                // first, an entry that no SYN began: it is replaced likewise.
                wait_for("an entry that was picked up", SOON, || {
                    let entries = self.lab.entries();
                    entries.iter().any(|entry| entry.orig.1 == client || entry.orig.0 == client)
                });
                self.daemon.cont();
                wait_for("repair", SOON, repaired);
            }
        }
    }

    fn delete(&self, client: SocketAddr) {
        let (src, port) = (client.ip(), client.port());
        let family = if src.is_ipv6() { "ipv6" } else { "ipv4" };
        let which = format!("-f {family} -p tcp --orig-src {src} --orig-port-src {port}");
        self.lab.server.run(&format!("conntrack -D {which}"));
    }

    fn is_logged(&self, repair: &str, client: SocketAddr) -> bool {
        let client = client.to_string();
        let log = self.daemon.log();
        log.lines().any(|line| line.contains(repair) && line.contains(&client))
    }

    /// The entry of a connection that is over counts no longer, as without ctkeep.
    fn assert_ended(&self, client: SocketAddr, harm: Harm) {
        let left = || {
            let mut entries = self.lab.entries().into_iter();
            entries.find(|entry| entry.orig.0 == client || entry.reply.1 == client)
        };
        let ended = holds_within(Duration::from_secs(5), || {
            left().is_none_or(|entry| matches!(entry.state.as_str(), "TIME_WAIT" | "CLOSE"))
        });
        assert!(ended, "{harm:?}: {:?}\n{}", left(), self.daemon.log());
        assert!(left().is_none_or(|entry| entry.timeout <= 120), "{harm:?}: {:?}", left());
    }

    fn invalid(&self) -> Vec<String> {
        let save = self.site.restore().replace("restore", "save");
        let rules = self.lab.server.output(&format!("{save} -c"));
        let hit = rules.lines().filter(|rule| rule.contains("INVALID"));
        hit.filter(|rule| !rule.starts_with("[0:0]")).map(str::to_owned).collect()
    }
}

fn arrives_whole(site: Site, recount: &str) {
    let Some(scene) = Scene::new(site, recount) else { return };
    let mut harms = vec![Harm::StaleRst, Harm::Deletion];
    // Behind address translation a packet of the server that finds no entry goes out under a name
    // that the client does not know: its answer ends the connection, with ctkeep or without.
    if matches!(site, Site::Plain | Site::Ipv6) {
        harms.push(Harm::Reversal);
    }
    let server = scene.serve(harms.len());
    for harm in harms {
        scene.stream(harm);
    }
    server.join().expect("the server");
}

#[test]
fn a_stream_arrives_whole_with_recount_by_ingress() {
    arrives_whole(Site::Plain, "ingress");
}

#[test]
fn a_stream_arrives_whole_with_recount_by_loopback() {
    arrives_whole(Site::Plain, "loopback");
}

#[test]
fn a_stream_arrives_whole_without_recount() {
    arrives_whole(Site::Plain, "off");
}

#[test]
fn a_stream_arrives_whole_over_ipv6_with_recount_by_ingress() {
    arrives_whole(Site::Ipv6, "ingress");
}

#[test]
fn a_stream_arrives_whole_over_ipv6_with_recount_by_loopback() {
    arrives_whole(Site::Ipv6, "loopback");
}

#[test]
fn a_stream_arrives_whole_over_ipv6_without_recount() {
    arrives_whole(Site::Ipv6, "off");
}

#[test]
fn a_redirected_stream_arrives_whole_with_recount_by_ingress() {
    arrives_whole(Site::Redirect, "ingress");
}

#[test]
fn a_redirected_stream_arrives_whole_with_recount_by_loopback() {
    arrives_whole(Site::Redirect, "loopback");
}

#[test]
fn a_redirected_stream_arrives_whole_without_recount() {
    arrives_whole(Site::Redirect, "off");
}

#[test]
fn a_stream_of_a_container_arrives_whole_with_recount_by_ingress() {
    arrives_whole(Site::Container, "ingress");
}

#[test]
fn a_stream_of_a_container_arrives_whole_without_recount() {
    arrives_whole(Site::Container, "off");
}
