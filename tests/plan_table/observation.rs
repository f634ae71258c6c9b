//! How two tables become one snapshot.

use super::*;

fn views(snapshot: &Snapshot) -> Vec<View> {
    snapshot.views.iter().collect()
}

fn whole(host: Host) -> Snapshot {
    let (_, mut tables) = host.open();
    let open = States::from_iter([State::CloseWait, State::Established]);
    tables.whole(&mut scope(), &policy(), open).unwrap()
}

fn half_closed(host: Host, ledger: &Ledger) -> Snapshot {
    let (_, mut tables) = host.open();
    look_at_half_closed(&mut tables, ledger)
}

/// What a sweep looks at that has seen nothing before.
fn look_at_half_closed(tables: &mut Tables<Played>, ledger: &Ledger) -> Snapshot {
    let sockets = tables.half_closed(&scope(), &policy(), ledger).unwrap();
    let lookups = ledger.clone().compare(&sockets, false);
    tables.exactly(&lookups, ledger).unwrap().into_snapshot()
}

#[test]
fn sockets_meet_their_entries_in_both_families_and_each_remains_alone_without_the_other() {
    let v6 = flow("[2001:db8::1]:80", "[2001:db8:1::7]:4000");
    let socket_v6 = Socket { cookie: Cookie(2), ..socket_of(v6) };
    let entry_v6 = entry(v6, TcpState::CloseWait, 60);
    let alone = flow(SERVER, "198.51.100.8:4000");
    let entry_alone = entry(alone, TcpState::Established, 60);
    let host = Host {
        sockets: vec![close_wait(1), socket_v6],
        entries: vec![entry_v6, entry_alone],
        ..Host::default()
    };
    let expected = [
        view(Some(close_wait(1)), None),
        View {
            connection: Connection::of_sender(v6),
            socket: Some(socket_v6),
            entry: Some(entry_v6),
        },
        View { connection: Connection::of_sender(alone), socket: None, entry: Some(entry_alone) },
    ];
    assert_eq!(views(&whole(host)), expected);
}

fn socket_of(flow: FourTuple) -> Socket {
    socket(&flow.src.to_string(), &flow.dst.to_string(), State::CloseWait, 1)
}

#[test]
fn what_is_out_of_scope_is_left_out() {
    let other_port = flow("192.0.2.1:22", PEER);
    let loopback = flow("127.0.0.1:80", "127.0.0.1:4000");
    let host = Host {
        sockets: vec![socket_of(other_port), socket_of(loopback)],
        entries: [other_port, loopback].map(|f| entry(f, TcpState::Close, 9)).to_vec(),
        ..Host::default()
    };
    assert_eq!(views(&whole(host.clone())), []);
    assert_eq!(views(&half_closed(host, &Ledger::default())), []);
}

#[test]
fn an_entry_between_two_ports_in_scope_is_one_connection() {
    let between = flow(SERVER, "198.51.100.7:443");
    let (socket, entry) = (socket_of(between), entry(between, TcpState::CloseWait, 60));
    let host = Host { sockets: vec![socket], entries: vec![entry], ..Host::default() };
    let expected = View {
        connection: Connection::of_sender(between),
        socket: Some(socket),
        entry: Some(entry),
    };
    assert_eq!(views(&whole(host)), [expected]);
}

#[test]
fn of_two_zones_the_entry_that_the_limiter_counts_goes_first() {
    let counted = Entry { zone: Zone::both(5), ..entry(server_to_peer(), TcpState::CloseWait, 60) };
    let closed = entry(server_to_peer(), TcpState::Close, 9);
    let reversed = Entry {
        zone: Zone::both(6),
        ..reversed_entry(server_to_peer(), TcpState::Established, 300)
    };
    for entries in [[counted, closed, reversed], [reversed, closed, counted]] {
        let host =
            Host { sockets: vec![close_wait(1)], entries: entries.to_vec(), ..Host::default() };
        assert_eq!(views(&whole(host)), [view(Some(close_wait(1)), Some(counted))]);
    }
}

#[test]
fn a_sweep_of_half_closed_sockets_never_walks_the_table_of_entries() {
    let alive = entry(server_to_peer(), TcpState::CloseWait, 60);
    let ordinary = flow(SERVER, "198.51.100.8:4000");
    let host = Host {
        sockets: vec![close_wait(1), Socket { state: State::Established, ..socket_of(ordinary) }],
        entries: vec![alive, entry(ordinary, TcpState::Established, 60)],
        ..Host::default()
    };
    let (host, mut tables) = host.open();
    let snapshot = look_at_half_closed(&mut tables, &Ledger::default());
    assert_eq!(views(&snapshot), [view(Some(close_wait(1)), Some(alive))]);
    assert_eq!(host.borrow().walks, 0);
}

#[test]
fn a_held_socket_that_the_dump_lacks_is_looked_up() {
    let alive = entry(server_to_peer(), TcpState::CloseWait, 60);
    let mut ledger = Ledger::default();
    ledger.hold(close_wait(1), alive, Instant::now());
    ledger.look_at(&close_wait(1), Instant::now());
    let last_ack = Socket { state: State::LastAck, ..close_wait(1) };
    for (sockets, skipped, found) in [
        // Skipped by the dump, in another state by now, gone.
        (vec![close_wait(1)], vec![Cookie(1)], Some(close_wait(1))),
        (vec![last_ack], vec![], Some(last_ack)),
        (vec![], vec![], None),
    ] {
        let host = Host { sockets, skipped, entries: vec![alive], ..Host::default() };
        assert_eq!(views(&half_closed(host, &ledger)), [view(found, Some(alive))]);
    }
}

#[test]
fn an_entry_is_found_in_every_zone_that_was_ever_seen() {
    for zone in [Zone::both(5), Zone { orig: 6, reply: 0 }, Zone { orig: 0, reply: 7 }] {
        let there = Entry { zone, ..entry(server_to_peer(), TcpState::Close, 9) };
        let host = Host { sockets: vec![close_wait(1)], entries: vec![there], ..Host::default() };
        let mut ledger = Ledger::default();
        ledger.note(&whole(host.clone()));
        let expected = view(Some(close_wait(1)), Some(there));
        assert_eq!(views(&half_closed(host, &ledger)), [expected], "{zone:?}");
    }
}
