//! What ctkeep asks, byte by byte.

use super::*;

/// Every send while `talk` runs; the kernel refuses everything.
fn sends(talk: impl FnOnce(Played)) -> Vec<Vec<u8>> {
    let sends = Rc::new(RefCell::new(Vec::new()));
    let seen = Rc::clone(&sends);
    talk(script(move |datagram| {
        seen.borrow_mut().push(datagram.to_vec());
        let requests = played::requests(datagram);
        let refusals = requests.iter().map(|request| played::refusal(request.seq, played::ENOENT));
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
    change("insert-translated-ipv6", "source and destination", Change::Insert(insert_like(both)));
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
        ("dump-asked-of", "--orig-port-dst 80", AF_INET, Filter::AskedOf(80)),
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
    let sends = self::sends(|transport| drop(SockDiag::new(transport).listeners().unwrap_err()));
    assert_golden("requests/listeners", "ss -tl", &sends);
}

#[test]
fn look_ups_travel_together() {
    let lookups = [
        Lookup { connection: Connection::of_receiver(client()), interface: 0 },
        Lookup { connection: Connection::of_receiver(client_v6()), interface: 3 },
    ];
    let sends = sends(|transport| {
        assert_eq!(SockDiag::new(transport).lookup(&lookups).unwrap(), [None, None]);
    });
    assert_golden("requests/look-ups", "IPv4; IPv6 on interface 3", &sends);
}
