//! Golden bytes: what a running kernel has really sent, and what ctkeep sends to it.
//!
//! `golden/entries`, `golden/events` and `golden/sockets` were captured from Linux 6.18 by
//! [`capture`]; each file says of which entry or socket, in the words of `conntrack` and `ss`. The
//! expected values stand here, written by hand from those words. `golden/requests` holds what
//! ctkeep asks; `CTKEEP_BLESS=1` rewrites it after a change that is meant.
//!
//! To capture again: `cargo test --test golden capture -- --ignored`, then review what changed;
//! identities, cookies and timeouts are new each time and must be carried over to this file.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod lab;
mod played;

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use ctkeep::conntrack::{
    Change, Conntrack, Entry, EntryKey, Filter, Insert, SeqAdj, Status, SynProxy, TableSize, Tcp,
    TcpState, Zone, decode,
};
use ctkeep::flow::{AF_INET, AF_INET6, FourTuple};
use ctkeep::netlink::script::Reply;
use ctkeep::netlink::{Drained, KernelSocket, Transport, frames};
use ctkeep::sockdiag::{Cookie, Lookup, SockDiag, Socket, State, States};
use ctkeep::watch::ctnetlink::{Event, EventKind, Listener};
use played::hex::{self, assert_golden};
use played::{Played, flow, script};

/// A transport that plays a captured conversation: everything arrives after the first send.
fn replay(name: &str) -> Played {
    let mut datagrams = Some(hex::read(name));
    script(move |_| {
        let datagrams = datagrams.take().unwrap_or_default();
        datagrams.into_iter().map(Reply::Datagram).collect()
    })
}

/// The payload of the first message of a captured conversation.
fn first_payload(name: &str) -> Vec<u8> {
    let datagram = hex::read(name).remove(0);
    frames(&datagram).next().unwrap().unwrap().payload.to_vec()
}

fn seconds(seconds: u64) -> Option<Duration> {
    Some(Duration::from_secs(seconds))
}

mod entries {
    use super::*;

    /// Decodes a captured entry, and asks for it over the captured conversation.
    fn decoded(name: &str) -> Entry {
        let name = format!("entries/{name}");
        let entry = decode::entry(&first_payload(&name)).unwrap().unwrap();
        let asked = Conntrack::new(replay(&name)).get(&[(entry.reply, entry.zone)]).unwrap();
        assert_eq!(asked, [Some(entry)]);
        entry
    }

    /// Half-closed by a client without TCP options: conntrack has seen its FIN (0x04) and ACKs of
    /// both (0x20).
    const HALF_CLOSED: Tcp =
        Tcp { state: TcpState::CloseWait, wscale: [0, 0], flags: [0x24, 0x20] };

    /// Confirmed, assured, seen both ways; the rest is that the namespace has a nat table.
    const SETTLED: u32 = 0x18e;

    fn half_closed(from: u16, to: u16, id: u32) -> Entry {
        let client = format!("198.51.100.7:{from}");
        let server = format!("192.0.2.1:{to}");
        Entry {
            orig: flow(&client, &server),
            reply: flow(&server, &client),
            zone: Zone::default(),
            status: Some(Status(SETTLED)),
            timeout: seconds(59),
            tcp: Some(HALF_CLOSED),
            mark: Some(0),
            id: Some(id),
            labels: None,
            helper: None,
            seq_adj: None,
            synproxy: None,
        }
    }

    #[test]
    fn a_half_closed_connection() {
        assert_eq!(decoded("close-wait"), half_closed(20000, 80, 23748202));
    }

    #[test]
    fn a_half_closed_connection_over_ipv6() {
        let expected = Entry {
            orig: flow("[2001:db8:1::7]:20001", "[2001:db8::1]:80"),
            reply: flow("[2001:db8::1]:80", "[2001:db8:1::7]:20001"),
            // No nat table for IPv6 here.
            status: Some(Status(0x00e)),
            ..half_closed(20001, 80, 1228810804)
        };
        assert_eq!(decoded("close-wait-ipv6"), expected);
    }

    #[test]
    fn an_established_connection_with_window_scales_and_selective_acknowledgements() {
        let expected = Entry {
            orig: flow("192.0.2.2:36222", "192.0.2.1:80"),
            reply: flow("192.0.2.1:80", "192.0.2.2:36222"),
            timeout: seconds(431_999),
            tcp: Some(Tcp { state: TcpState::Established, wscale: [10, 10], flags: [0x23, 0x23] }),
            ..half_closed(0, 0, 4033209680)
        };
        assert_eq!(decoded("established"), expected);
        assert!(!expected.is_picked_up() && expected.is_plain());
    }

    #[test]
    fn a_connection_to_a_redirected_port() {
        let expected = Entry {
            reply: flow("192.0.2.1:80", "198.51.100.7:20002"),
            // IPS_DST_NAT.
            status: Some(Status(SETTLED | 0x20)),
            ..half_closed(20002, 81, 2015906293)
        };
        let entry = decoded("redirected");
        assert_eq!(entry, expected);
        assert!(entry.is_translated() && !entry.is_plain());
    }

    #[test]
    fn a_zone_of_both_directions() {
        let expected = Entry { zone: Zone::both(5), ..half_closed(20003, 82, 1171030605) };
        assert_eq!(decoded("zone"), expected);
    }

    #[test]
    fn a_zone_of_the_original_direction_only() {
        let zone = Zone { orig: 6, reply: 0 };
        assert_eq!(decoded("zone-orig-only"), Entry { zone, ..half_closed(20004, 83, 631410600) });
    }

    #[test]
    fn a_zone_of_the_reply_direction_only() {
        let zone = Zone { orig: 0, reply: 7 };
        let expected = Entry { zone, ..half_closed(20005, 84, 3707358619) };
        assert_eq!(decoded("zone-reply-only"), expected);
    }

    #[test]
    fn a_connection_mark() {
        let expected = Entry { mark: Some(0xdead_beef), ..half_closed(20006, 85, 3768632965) };
        assert_eq!(decoded("mark"), expected);
    }

    #[test]
    fn a_connection_label() {
        // Label 65: the second bit of the ninth byte.
        let labels = Some([0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(decoded("labels"), Entry { labels, ..half_closed(20007, 86, 4191768194) });
    }

    #[test]
    fn an_application_helper() {
        let entry = decoded("helper");
        assert_eq!(format!("{:?}", entry.helper), "Some(\"ftp\")");
        let expected = Entry {
            // IPS_HELPER.
            status: Some(Status(SETTLED | 0x2000)),
            ..half_closed(20008, 21, 3516208180)
        };
        assert_eq!(Entry { helper: None, ..entry }, expected);
    }

    #[test]
    fn a_connection_behind_synproxy() {
        let expected = Entry {
            orig: flow("192.0.2.2:47692", "192.0.2.1:87"),
            reply: flow("192.0.2.1:87", "192.0.2.2:47692"),
            // IPS_SEQ_ADJUST.
            status: Some(Status(SETTLED | 0x40)),
            tcp: Some(Tcp { wscale: [10, 10], flags: [0x27, 0x23], ..HALF_CLOSED }),
            seq_adj: Some([
                SeqAdj::default(),
                SeqAdj { correction_pos: 0, offset_before: 2400267060, offset_after: 2400267060 },
            ]),
            synproxy: Some(SynProxy { isn: 3001565156, its: 3916122, tsoff: 4182225471 }),
            ..half_closed(0, 0, 1656293245)
        };
        assert_eq!(decoded("synproxy"), expected);
    }

    #[test]
    fn an_entry_that_was_picked_up_at_a_packet_of_the_server() {
        let expected = Entry {
            orig: flow("192.0.2.1:8080", "198.51.100.7:20009"),
            reply: flow("198.51.100.7:20009", "192.0.2.1:8080"),
            status: Some(Status(0x188)),
            timeout: seconds(299),
            tcp: Some(Tcp {
                state: TcpState::Established,
                wscale: [0, 0],
                // Selective acknowledgements and liberal windows, assumed for both.
                flags: [0x0a, 0x0a],
            }),
            ..half_closed(0, 0, 1087248209)
        };
        assert_eq!(decoded("reversed"), expected);
        assert!(expected.is_picked_up());
    }

    #[test]
    fn an_entry_that_is_not_tcp_is_none() {
        assert_eq!(decode::entry(&first_payload("entries/udp")).unwrap(), None);
    }

    #[test]
    fn the_size_of_the_table() {
        let expected = TableSize { entries: 13, maximum: Some(262_144) };
        assert_eq!(Conntrack::new(replay("entries/stats")).size().unwrap(), expected);
        assert_eq!(decode::stats(&first_payload("entries/stats")).unwrap(), (13, Some(262_144)));
    }

    #[test]
    fn an_absent_entry_is_none() {
        let key = (flow("192.0.2.1:80", "198.51.100.99:1"), Zone::default());
        assert_eq!(Conntrack::new(replay("entries/absent")).get(&[key]).unwrap(), [None]);
    }

    #[test]
    fn an_insert_of_what_is_there_is_refused() {
        let like = Entry::plain(flow("198.51.100.7:20000", "192.0.2.1:80"), Zone::default());
        let insert = Insert {
            like,
            state: TcpState::CloseWait,
            status: Status::FRESH,
            timeout: Duration::from_secs(60),
        };
        let mut table = Conntrack::new(replay("entries/insert-refused"));
        let error = table.change(&[Change::Insert(insert)]).unwrap().remove(0).unwrap_err();
        assert!(error.is_already_there(), "{error}");
        assert_eq!(
            error.to_string(),
            "conntrack insert 198.51.100.7:20000 > 192.0.2.1:80: file exists (EEXIST)"
        );
    }
}

mod events {
    use super::*;

    /// The port of the socket that made the second and third event happen.
    const OWN_PORT: u32 = 2463112422;

    fn told(name: &str) -> Event {
        let mut transport = replay(&format!("events/{name}"));
        // The played kernel speaks only when spoken to.
        transport.send(&[]).unwrap();
        let mut events = Vec::new();
        let drained = Listener::new(transport).drain(10, |event| events.push(event)).unwrap();
        assert_eq!(drained, Drained::default());
        assert_eq!(events.len(), 1, "{name}");
        events.remove(0)
    }

    fn entry(state: TcpState, status: u32, timeout: u64) -> Entry {
        let there = flow("198.51.100.7:20010", "192.0.2.1:80");
        Entry {
            status: Some(Status(status)),
            timeout: seconds(timeout),
            tcp: Some(Tcp { state, wscale: [0, 0], flags: [0x24, 0x20] }),
            id: Some(2021424586),
            ..Entry::plain(there, Zone::default())
        }
    }

    #[test]
    fn an_update_by_a_stale_rst() {
        let entry = entry(TcpState::Close, 0x18e, 10);
        assert_eq!(told("closed-by-rst"), Event { kind: EventKind::Update, entry, port: 0 });
    }

    #[test]
    fn an_update_by_request_carries_the_port_of_the_request() {
        let entry = Entry { mark: Some(0), ..entry(TcpState::CloseWait, 0x18e, 60) };
        assert_eq!(told("updated"), Event { kind: EventKind::Update, entry, port: OWN_PORT });
    }

    #[test]
    fn the_end_of_an_entry_tells_its_state_and_neither_flags_nor_scales() {
        // IPS_DYING.
        let alive = entry(TcpState::CloseWait, 0x18e | 0x200, 60);
        let tcp = Some(Tcp { flags: [0, 0], ..alive.tcp.unwrap() });
        let entry = Entry { tcp, ..alive };
        assert_eq!(told("deleted"), Event { kind: EventKind::Destroy, entry, port: OWN_PORT });
    }
}

mod sockets {
    use super::*;

    fn found(name: &str, server: &str, peer: &str) -> Option<Socket> {
        let lookup = Lookup { flow: flow(server, peer), interface: 0 };
        let name = format!("sockets/{name}");
        SockDiag::new(replay(&name)).lookup(&[lookup]).unwrap().remove(0)
    }

    fn socket(local: &str, remote: &str, state: State, inode: u32, cookie: u64) -> Socket {
        Socket {
            local: played::endpoint(local),
            remote: played::endpoint(remote),
            state,
            inode,
            uid: 0,
            cookie: Cookie(cookie),
            interface: 0,
            recv_queue: 0,
            send_queue: 0,
        }
    }

    /// One byte unread, which the FIN counts as; four sent and not yet acknowledged.
    fn half_closed(local: &str, remote: &str, inode: u32, cookie: u64) -> Socket {
        let socket = socket(local, remote, State::CloseWait, inode, cookie);
        Socket { recv_queue: 1, send_queue: 4, ..socket }
    }

    #[test]
    fn a_look_up_finds_the_socket() {
        let (server, peer) = ("192.0.2.1:8080", "198.51.100.7:20009");
        let expected = half_closed(server, peer, 420184, 0x2db6);
        assert_eq!(found("look-up", server, peer), Some(expected));
    }

    #[test]
    fn a_look_up_finds_the_ipv4_socket_of_a_dual_stack_listener() {
        let (server, peer) = ("192.0.2.1:80", "198.51.100.7:20000");
        let expected = half_closed(server, peer, 420055, 0x2db5);
        assert_eq!(found("look-up-dual-stack", server, peer), Some(expected));
    }

    #[test]
    fn a_look_up_finds_the_ipv6_socket() {
        let (server, peer) = ("[2001:db8::1]:80", "[2001:db8:1::7]:20001");
        let expected = half_closed(server, peer, 420070, 0x2db4);
        assert_eq!(found("look-up-ipv6", server, peer), Some(expected));
    }

    #[test]
    fn an_absent_socket_is_none_beside_a_listener_and_without() {
        let peer = "198.51.100.99:1";
        assert_eq!(found("absent-beside-a-listener", "192.0.2.1:80", peer), None);
        assert_eq!(found("absent", "192.0.2.1:7", peer), None);
    }

    fn dumped(name: &str, states: States) -> Vec<Socket> {
        SockDiag::new(replay(&format!("sockets/{name}"))).sockets(states).unwrap()
    }

    fn close_wait() -> [Socket; 3] {
        [
            ("192.0.2.1:8080", "198.51.100.7:20001", 133_652_441, 0x2b_88f6),
            ("192.0.2.1:80", "198.51.100.7:20000", 133_652_437, 0x2b_88f8),
            ("[2001:db8::1]:80", "[2001:db8:1::7]:20002", 133_652_443, 0x2b_88f9),
        ]
        .map(|(local, remote, inode, cookie)| Socket {
            send_queue: 0,
            ..half_closed(local, remote, inode, cookie)
        })
    }

    #[test]
    fn a_dump_of_half_closed_sockets_of_both_families() {
        let states = States::from_iter([State::CloseWait]);
        assert_eq!(dumped("dump-of-close-wait", states), close_wait());
    }

    #[test]
    fn a_dump_of_listeners() {
        let expected = [
            socket("0.0.0.0:8080", "0.0.0.0:0", State::Listen, 133_652_434, 0x2b_88f5),
            socket("[::]:80", "[::]:0", State::Listen, 133_652_433, 0x2b_88f7),
        ]
        // The length of its queue.
        .map(|socket| Socket { send_queue: 4096, ..socket });
        let states = States::from_iter([State::Listen]);
        assert_eq!(dumped("dump-of-listeners", states), expected);
        let listeners = SockDiag::new(replay("sockets/dump-of-listeners")).listeners().unwrap();
        assert_eq!(listeners, expected);
    }

    #[test]
    fn a_dump_of_everything_that_has_a_peer() {
        let mut expected = close_wait().to_vec();
        expected.extend([
            socket(
                "192.0.2.1:80",
                "198.51.100.8:20003",
                State::Established,
                133_652_964,
                0x2b_88fa,
            ),
            // A request that waits for the third packet has no file.
            socket("192.0.2.1:80", "198.51.100.9:20004", State::SynRecv, 0, 0x2b_88fb),
        ]);
        assert_eq!(dumped("dump-of-the-connected", States::connected()), expected);
    }
}

/// What ctkeep asks, byte by byte.
mod requests {
    use super::*;

    /// Every send while `talk` runs; the kernel refuses everything.
    fn sends(talk: impl FnOnce(Played)) -> Vec<Vec<u8>> {
        let sends = Rc::new(RefCell::new(Vec::new()));
        let seen = Rc::clone(&sends);
        talk(script(move |datagram| {
            seen.borrow_mut().push(datagram.to_vec());
            let requests = played::requests(datagram);
            let refusals =
                requests.iter().map(|request| played::refusal(request.seq, played::ENOENT));
            refusals.map(Reply::Datagram).collect()
        }));
        sends.take()
    }

    fn change(name: &str, words: &str, change: Change) {
        let sends = sends(|transport| {
            Conntrack::new(transport).change(&[change]).unwrap();
        });
        assert_golden(&format!("requests/{name}"), words, &sends);
    }

    const LEASE: Duration = Duration::from_secs(60);

    fn client() -> FourTuple {
        flow("198.51.100.7:4000", "192.0.2.1:80")
    }

    fn client_v6() -> FourTuple {
        flow("[2001:db8:1::7]:4000", "[2001:db8::1]:80")
    }

    fn key(orig: FourTuple, zone: Zone) -> EntryKey {
        EntryKey { zone, orig }
    }

    fn insert_like(like: Entry) -> Insert {
        Insert { like, state: TcpState::CloseWait, status: Status::FRESH, timeout: LEASE }
    }

    fn plain() -> Entry {
        Entry::plain(client(), Zone::default())
    }

    /// What a dump said of an entry.
    fn captured(name: &str) -> Entry {
        decode::entry(&first_payload(&format!("entries/{name}"))).unwrap().unwrap()
    }

    #[test]
    fn extend() {
        let key_v4 = key(client(), Zone::default());
        change("extend", "timeout 60 s", Change::Extend { key: key_v4, timeout: LEASE });
        let key_v6 = key(client_v6(), Zone::default());
        // The kernel takes whole seconds: rounded up.
        let timeout = Duration::from_millis(59_001);
        change("extend-ipv6", "timeout 59.001 s", Change::Extend { key: key_v6, timeout });
    }

    #[test]
    fn extend_in_a_zone() {
        for (name, words, zone) in [
            ("extend-in-zone", "zone 5", Zone::both(5)),
            ("extend-in-zone-orig-only", "zone-orig 6", Zone { orig: 6, reply: 0 }),
            ("extend-in-zone-reply-only", "zone-reply 7", Zone { orig: 0, reply: 7 }),
        ] {
            change(name, words, Change::Extend { key: key(client(), zone), timeout: LEASE });
        }
    }

    #[test]
    fn update() {
        let key = key(client(), Zone::default());
        let (state, timeout) = (TcpState::CloseWait, LEASE);
        let status = Some(Status::ASSURED);
        change("update", "close-wait, assured", Change::Update { key, state, status, timeout });
        let (state, timeout, status) = (TcpState::Close, Duration::from_secs(10), None);
        change("update-to-close", "release", Change::Update { key, state, status, timeout });
    }

    #[test]
    fn insert() {
        change("insert", "plain, fresh", Change::Insert(insert_like(plain())));
        let like = Entry::plain(client_v6(), Zone::default());
        change("insert-ipv6", "plain, fresh", Change::Insert(insert_like(like)));
        let settled = Insert {
            state: TcpState::Established,
            status: Status::ASSURED,
            ..insert_like(captured("established"))
        };
        change("insert-established", "with scales and flags", Change::Insert(settled));
    }

    #[test]
    fn insert_of_a_translated_connection() {
        let redirected = insert_like(captured("redirected"));
        change("insert-redirected", "port 81 to 80", Change::Insert(redirected));
        let both = Entry {
            reply: flow("[2001:db8::80]:8080", "[2001:db8::2]:5000"),
            ..Entry::plain(client_v6(), Zone::default())
        };
        change(
            "insert-translated-ipv6",
            "source and destination",
            Change::Insert(insert_like(both)),
        );
    }

    #[test]
    fn insert_in_a_zone() {
        for (name, captured_name) in [
            ("insert-in-zone", "zone"),
            ("insert-in-zone-orig-only", "zone-orig-only"),
            ("insert-in-zone-reply-only", "zone-reply-only"),
        ] {
            let like = captured(captured_name);
            change(name, captured_name, Change::Insert(insert_like(like)));
        }
    }

    #[test]
    fn insert_with_everything_that_an_entry_may_have() {
        for name in ["mark", "labels", "helper", "synproxy"] {
            let like = captured(name);
            change(&format!("insert-with-{name}"), name, Change::Insert(insert_like(like)));
        }
    }

    #[test]
    fn replace_is_delete_and_insert_in_one_send() {
        let old = key(client(), Zone::default());
        let new = insert_like(plain());
        change("replace", "delete and insert", Change::Replace { old, id: Some(0x1234_5678), new });
    }

    #[test]
    fn delete() {
        let key = key(client(), Zone::default());
        change("delete", "by tuple", Change::Delete { key, id: None });
        let id = Some(0x1234_5678);
        change("delete-by-identity", "by tuple and id", Change::Delete { key, id });
    }

    #[test]
    fn get() {
        for (name, flow, zone) in [
            ("get", client().inverse(), Zone::default()),
            ("get-ipv6", client_v6().inverse(), Zone::default()),
            ("get-in-zone", client().inverse(), Zone::both(5)),
            ("get-in-zone-orig-only", client().inverse(), Zone { orig: 6, reply: 0 }),
            ("get-in-zone-reply-only", client().inverse(), Zone { orig: 0, reply: 7 }),
        ] {
            let sends = sends(|transport| {
                Conntrack::new(transport).get(&[(flow, zone)]).unwrap();
            });
            assert_golden(&format!("requests/{name}"), "entry of a tuple", &sends);
        }
    }

    #[test]
    fn size() {
        let sends = sends(|transport| drop(Conntrack::new(transport).size().unwrap_err()));
        assert_golden("requests/stats", "size of the table", &sends);
    }

    #[test]
    fn dumps_of_entries_are_filtered_in_the_kernel() {
        for (name, words, family, filter) in [
            ("dump-tcp", "-p tcp", AF_INET, Filter::Tcp),
            ("dump-tcp-ipv6", "-p tcp", AF_INET6, Filter::Tcp),
            ("dump-answered-from", "--reply-port-src 80", AF_INET, Filter::AnsweredFrom(80)),
            ("dump-begun-from", "--orig-port-src 80", AF_INET6, Filter::BegunFrom(80)),
        ] {
            let sends = sends(|transport| {
                let answer = Conntrack::new(transport).entries(family, filter, |(): &mut (), _| ());
                drop(answer.unwrap_err());
            });
            assert_golden(&format!("requests/{name}"), words, &sends);
        }
    }

    #[test]
    fn dumps_of_sockets_are_filtered_in_the_kernel() {
        let sends = sends(|transport| {
            let states = States::from_iter([State::CloseWait]);
            drop(SockDiag::new(transport).sockets(states).unwrap_err());
        });
        assert_golden("requests/sockets-in-close-wait", "ss -t state close-wait", &sends);
        let sends =
            self::sends(|transport| drop(SockDiag::new(transport).listeners().unwrap_err()));
        assert_golden("requests/listeners", "ss -tl", &sends);
    }

    #[test]
    fn look_ups_travel_together() {
        let lookups = [
            Lookup { flow: client().inverse(), interface: 0 },
            Lookup { flow: client_v6().inverse(), interface: 3 },
        ];
        let sends = sends(|transport| {
            assert_eq!(SockDiag::new(transport).lookup(&lookups).unwrap(), [None, None]);
        });
        assert_golden("requests/look-ups", "IPv4; IPv6 on interface 3", &sends);
    }
}

/// Refreshes the captured files from the running kernel, in a throw-away network namespace.
mod capture {
    use std::net::{TcpStream, UdpSocket};

    use super::*;
    use crate::lab::{Lab, Namespace, RawConn, SERVER_V4, wait_for};

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

    #[test]
    #[ignore = "rewrites tests/golden from the running kernel"]
    fn capture() {
        let lab = Lab::new().expect("a kernel to capture from");
        let rules = "\
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
        lab.server.feed("iptables-restore", rules);
        lab.server.run("ip6tables -A INPUT -m conntrack --ctstate INVALID -j DROP");
        let ports: Vec<String> =
            [80, 82, 83, 84, 85, 86, 87, 21].iter().map(|port| format!("[::]:{port}")).collect();
        let server = lab.serve(&format!("{} 0.0.0.0:8080", ports.join(" ")));
        let peer = lab.peer("198.51.100.7");
        let peer_v6 = lab.peer("2001:db8:1::7");
        let none = Zone::default();

        // Entries, one way of being one after the other.
        let half_closed = |port: u16| {
            let mut conn = peer.connect(port).unwrap_or_else(|| panic!("port {port} refuses"));
            conn.fin();
            assert!(conn.await_ack(), "port {port}: no ACK for the FIN");
            conn
        };
        let entry_of = |name: &str, conn: &RawConn, socket_port: u16, zone: Zone| {
            entry(&lab, name, server_to_peer(conn, socket_port), zone);
        };
        let v4 = half_closed(80);
        entry_of("close-wait", &v4, 80, none);
        let mut v6 = peer_v6.connect(80).unwrap();
        lab.half_close(&mut v6);
        assert!(v6.await_ack());
        entry_of("close-wait-ipv6", &v6, 80, none);
        entry_of("redirected", &half_closed(81), 80, none);
        entry_of("zone", &half_closed(82), 82, Zone::both(5));
        entry_of("zone-orig-only", &half_closed(83), 83, Zone { orig: 6, reply: 0 });
        entry_of("zone-reply-only", &half_closed(84), 84, Zone { orig: 0, reply: 7 });
        entry_of("mark", &half_closed(85), 85, none);
        entry_of("labels", &half_closed(86), 86, none);
        entry_of("helper", &half_closed(21), 21, none);

        // A client with a TCP of its own: window scales, selective acknowledgements, and the
        // patience that SYNPROXY asks for.
        let connect = |port: u16| {
            let stream = lab.client.within(|| TcpStream::connect((SERVER_V4, port)).unwrap());
            let client = stream.local_addr().unwrap().to_string();
            (stream, played::flow(&format!("192.0.2.1:{port}"), &client))
        };
        let has_state = |flow: FourTuple, state: &str| {
            wait_for(state, Duration::from_secs(5), || conntrack_line(&lab, flow).contains(state));
        };
        let (_established, flow) = connect(80);
        has_state(flow, "ESTABLISHED");
        entry(&lab, "established", flow, none);
        // SYNPROXY must see the third packet of a handshake as INVALID.
        let loose = "net/netfilter/nf_conntrack_tcp_loose";
        lab.server.sysctl(loose, "0");
        let (proxied, flow) = connect(87);
        has_state(flow, "ESTABLISHED");
        proxied.shutdown(std::net::Shutdown::Write).unwrap();
        has_state(flow, "CLOSE_WAIT");
        entry(&lab, "synproxy", flow, none);
        lab.server.sysctl(loose, "1");

        // Forgotten, and picked up at a packet of the server.
        let mut lost = half_closed(8080);
        lab.server.run(&format!("conntrack -D -p tcp --sport {}", lost.client.port()));
        let mut server = server;
        server.send_all(b"data");
        wait_for("data", Duration::from_secs(5), || lost.received() > 0);
        entry_of("reversed", &lost, 8080, none);

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
            ctkeep::netlink::Connection::new(recorder)
                .dump(&dump, |(): &mut (), _| Ok(()))
                .unwrap();
            datagrams.take()
        });
        let udp = datagrams
            .iter()
            .flat_map(|datagram| played::messages(datagram))
            .find(|message| played::descend(&message[20..], &[1, 2, 1]) == Some(&[17]));
        hex::write("entries/udp", &[&kernel(), &words], &[udp.unwrap()]);

        // The size of the table, and refusals.
        let words = format!("conntrack -C: {}", lab.server.output("conntrack -C").trim());
        record(&lab.server, "entries/stats", &words, |table| table.size().unwrap());
        let nobody = played::flow("192.0.2.1:80", "198.51.100.99:1");
        record(&lab.server, "entries/absent", "no such entry", |table| {
            assert_eq!(table.get(&[(nobody, none)]).unwrap(), [None]);
        });
        record(&lab.server, "entries/insert-refused", "an insert of what is there", |table| {
            let like = Entry::plain(server_to_peer(&v4, 80).inverse(), none);
            let timeout = Duration::from_secs(60);
            let state = TcpState::CloseWait;
            let insert = Insert { like, state, status: Status::FRESH, timeout };
            table.change(&[Change::Insert(insert)]).unwrap().remove(0).unwrap_err();
        });

        // Events: a stale RST, a change by request, a delete by request.
        let (datagrams, words, own) = lab.server.within(|| {
            let (recorder, datagrams) = Recorder::open(NETLINK_NETFILTER);
            for group in [2, 3] {
                recorder.socket.join(group).unwrap();
            }
            recorder.socket.set_non_blocking().unwrap();
            let mut listener = Listener::new(recorder);
            let mut table = Conntrack::open().unwrap();
            // After the listener: an entry that is older than every listener is mute.
            let victim = half_closed(80);
            let words = conntrack_line(&lab, server_to_peer(&victim, 80));
            listener.drain(100, |_| ()).unwrap();
            datagrams.borrow_mut().clear();
            victim.rst(-5);
            let mut count = 0;
            wait_for("event", Duration::from_secs(5), || {
                listener.drain(10, |_| count += 1).unwrap();
                count == 1
            });
            let key = EntryKey { zone: none, orig: server_to_peer(&victim, 80).inverse() };
            let update = Change::Update {
                key,
                state: TcpState::CloseWait,
                status: None,
                timeout: Duration::from_secs(60),
            };
            for result in table.change(&[update, Change::Delete { key, id: None }]).unwrap() {
                result.unwrap();
            }
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

        sockets(&lab, &v4, &v6, &lost);
    }

    fn sockets(lab: &Lab, mapped: &RawConn, v6: &RawConn, v4: &RawConn) {
        let namespace = &lab.server;
        for (name, conn, port) in
            [("look-up-dual-stack", mapped, 80), ("look-up-ipv6", v6, 80), ("look-up", v4, 8080)]
        {
            let flow = server_to_peer(conn, port);
            let words = ss_line(lab, "eo", &format!(":{} ", conn.client.port()));
            record_sockets(namespace, &format!("sockets/{name}"), &words, |diag| {
                let found = diag.lookup(&[Lookup { flow, interface: 0 }]).unwrap();
                assert!(found[0].is_some(), "{name}");
            });
        }
        for (name, port, words) in [
            ("absent-beside-a-listener", 80, ss_line(lab, "leo", ":80 ")),
            ("absent", 7, "no such socket".to_owned()),
        ] {
            let nobody = played::flow(&format!("192.0.2.1:{port}"), "198.51.100.99:1");
            record_sockets(namespace, &format!("sockets/{name}"), &words, |diag| {
                let found = diag.lookup(&[Lookup { flow: nobody, interface: 0 }]).unwrap();
                assert_eq!(found, [None]);
            });
        }
        // A namespace of its own, so that the dump is short.
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
}
