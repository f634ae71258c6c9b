//! What the ledger remembers, and of whom.

use super::*;

fn held(socket: Socket) -> Ledger {
    let mut ledger = Ledger::default();
    let entry = entry(socket.connection().sent(), TcpState::CloseWait, 60);
    ledger.hold(socket, entry, Instant::now());
    ledger
}

#[test]
fn a_hold_belongs_to_a_socket_and_not_to_its_tuple() {
    let ledger = held(close_wait(1));
    assert!(ledger.holds(&close_wait(1)));
    assert!(!ledger.holds(&close_wait(2)));
    assert!(ledger.holds_connection(Connection::of_sender(server_to_peer())));
}

#[test]
fn a_tuple_that_is_used_again_is_held_once() {
    let mut ledger = held(close_wait(1));
    let entry = entry(server_to_peer(), TcpState::CloseWait, 60);
    ledger.hold(close_wait(2), entry, Instant::now());
    assert!(ledger.holds(&close_wait(2)));
    assert!(!ledger.holds(&close_wait(1)));
    assert_eq!(ledger.held().count(), 1);
    ledger.drop_connection(Connection::of_sender(server_to_peer()));
    assert_eq!(ledger.held().count(), 0);
}

#[test]
fn a_hold_that_is_renewed_keeps_its_age() {
    let began = Instant::now();
    let entry = entry(server_to_peer(), TcpState::CloseWait, 60);
    let mut ledger = Ledger::default();
    ledger.hold(close_wait(1), entry, began);
    ledger.hold(close_wait(1), entry, began + Duration::from_secs(30));
    assert_eq!(ledger.held().next().unwrap().since, began);
}

#[test]
fn a_hold_ends_when_the_socket_is_gone_and_its_entry_too() {
    for (entry, over) in [
        (None, true),
        (Some(entry(server_to_peer(), TcpState::Close, 9)), true),
        (Some(entry(server_to_peer(), TcpState::TimeWait, 9)), true),
        // Must be released first.
        (Some(entry(server_to_peer(), TcpState::CloseWait, 9)), false),
        (Some(entry(server_to_peer(), TcpState::Established, 9)), false),
    ] {
        let mut ledger = held(close_wait(1));
        ledger.settle(&Snapshot::new(vec![view(None, entry)]));
        assert_eq!(!ledger.holds(&close_wait(1)), over, "{entry:?}");
    }
}

#[test]
fn a_hold_lasts_while_its_socket_is_open_in_whatever_state() {
    for state in State::ALL {
        let mut ledger = held(close_wait(1));
        let socket = Socket { state, ..close_wait(1) };
        ledger.settle(&Snapshot::new(vec![view(Some(socket), None)]));
        assert!(ledger.holds(&close_wait(1)), "{state}");
    }
}

#[test]
fn a_hold_ends_when_another_socket_has_the_tuple() {
    let mut ledger = held(close_wait(1));
    let entry = entry(server_to_peer(), TcpState::Established, 9);
    ledger.settle(&Snapshot::new(vec![view(Some(established(2)), Some(entry))]));
    assert_eq!(ledger.held().count(), 0);
    assert!(!ledger.holds_connection(Connection::of_sender(server_to_peer())));
}

#[test]
fn what_was_seen_is_forgotten_with_the_socket_but_not_while_it_is_held() {
    let seen = entry(server_to_peer(), TcpState::CloseWait, 9);
    let mut ledger = held(close_wait(1));
    ledger.remember(&close_wait(2), seen);
    ledger.remember(&close_wait(3), seen);
    ledger.retain_seen(&HashSet::from([Cookie(3)]), Instant::now());
    assert!(ledger.last_entry(&close_wait(1)).is_some());
    assert!(ledger.last_entry(&close_wait(2)).is_none());
    assert!(ledger.last_entry(&close_wait(3)).is_some());
}

#[test]
fn an_ordinary_established_connection_costs_no_memory() {
    let plain = entry(server_to_peer(), TcpState::Established, 432_000);
    let marked = Entry { mark: Some(7), ..plain };
    for (socket, entry, remembered) in [
        (established(1), plain, false),
        (established(1), marked, true),
        (close_wait(1), plain, true),
    ] {
        let mut ledger = Ledger::default();
        ledger.note(&Snapshot::new(vec![view(Some(socket), Some(entry))]));
        assert_eq!(ledger.last_entry(&socket).is_some(), remembered, "{socket:?} {entry:?}");
    }
}

#[test]
fn the_default_zone_is_always_among_the_known_ones_and_once() {
    let mut ledger = Ledger::default();
    let in_zone = |zone| {
        let entry = Entry { zone, ..entry(server_to_peer(), TcpState::CloseWait, 9) };
        Snapshot::new(vec![view(Some(close_wait(1)), Some(entry))])
    };
    ledger.note(&in_zone(Zone::both(5)));
    ledger.note(&in_zone(Zone::default()));
    assert_eq!(ledger.zones().collect::<Vec<_>>(), [Zone::default(), Zone::both(5)]);
}
