//! A plan is made from dumps, and dumps lie: what exact look-ups do not show is not done.

use super::*;

/// Plans for what the dumps said, and confirms it on a host where `now` is true.
fn confirmed(said: Vec<View>, now: Host, ledger: &Ledger) -> Confirmed {
    let evidence = Snapshot::new(said.clone()).evidence;
    let planned = plan_of(said, ledger);
    assert!(!planned.actions.is_empty(), "nothing to confirm");
    let (_, mut tables) = now.open();
    confirm(&mut tables, &planned, &evidence, &scope(), &policy(), ledger).unwrap()
}

fn closed() -> Entry {
    entry(server_to_peer(), TcpState::Close, 9)
}

fn alive() -> Entry {
    entry(server_to_peer(), TcpState::CloseWait, 60)
}

/// Some other connection of the port is tracked.
fn tracked() -> Ledger {
    let mut ledger = Ledger::default();
    ledger.set_tracked(port(80));
    ledger
}

fn host(sockets: Vec<Socket>, entries: Vec<Entry>) -> Host {
    Host { sockets, entries, ..Host::default() }
}

#[test]
fn what_is_still_so_is_confirmed() {
    let said = vec![view(Some(close_wait(1)), Some(closed()))];
    let now = host(vec![close_wait(1)], vec![closed()]);
    let confirmed = confirmed(said, now, &Ledger::default());
    assert_eq!(kinds(confirmed.actions()), [ActionKind::Revive]);
}

#[test]
fn an_empty_plan_asks_nothing() {
    let mut tables = Tables {
        conntrack: ctkeep::conntrack::Conntrack::new(played::script(|_| panic!("a send"))),
        sockets: ctkeep::sockdiag::SockDiag::new(played::script(|_| panic!("a send"))),
        homes: Vec::new(),
        tracking: None,
    };
    let ledger = Ledger::default();
    let confirmed =
        confirm(&mut tables, &Plan::default(), &Evidence::default(), &scope(), &policy(), &ledger)
            .unwrap();
    assert!(confirmed.actions().is_empty());
}

#[test]
fn nothing_is_done_for_a_socket_that_is_gone() {
    for entries in [vec![], vec![closed()], vec![alive()]] {
        for said in [None, Some(closed())] {
            let said = vec![view(Some(close_wait(1)), said)];
            let confirmed = confirmed(said, host(vec![], entries.clone()), &tracked());
            assert_eq!(confirmed.actions(), [], "{entries:?}");
        }
    }
}

#[test]
fn nothing_is_done_for_a_socket_of_which_only_the_listener_is_left() {
    let said = vec![view(Some(close_wait(1)), Some(closed()))];
    let listener = socket("0.0.0.0:80", "0.0.0.0:0", State::Listen, 9);
    let confirmed = confirmed(said, host(vec![listener], vec![closed()]), &Ledger::default());
    assert_eq!(confirmed.actions(), []);
}

#[test]
fn nothing_is_done_for_a_socket_that_has_left_the_guarded_states() {
    for state in [State::LastAck, State::FinWait1, State::TimeWait] {
        let said = vec![view(Some(close_wait(1)), Some(closed()))];
        // Its application has closed it.
        let now = host(vec![Socket { state, inode: 0, ..close_wait(1) }], vec![closed()]);
        let confirmed = confirmed(said, now, &Ledger::default());
        assert_eq!(confirmed.actions(), [], "{state}");
    }
}

#[test]
fn nothing_is_done_for_an_entry_that_was_repaired_meanwhile() {
    for said in [None, Some(closed())] {
        let said = vec![view(Some(close_wait(1)), said)];
        let now = host(vec![close_wait(1)], vec![alive()]);
        assert_eq!(confirmed(said, now, &tracked()).actions(), []);
    }
}

#[test]
fn nothing_is_done_for_a_tuple_that_a_sound_connection_has_taken_over() {
    let said = vec![view(Some(close_wait(1)), Some(closed()))];
    let fresh = entry(server_to_peer(), TcpState::Established, 432_000);
    let now = host(vec![established(2)], vec![fresh]);
    assert_eq!(confirmed(said, now, &Ledger::default()).actions(), []);
}

#[test]
fn a_younger_socket_inherits_nothing_from_the_one_that_was_seen() {
    // The old connection's entry had a mark; the new one's has not been seen.
    let mut ledger = tracked();
    ledger.remember(&close_wait(1), Entry { mark: Some(7), ..alive() });
    let said = vec![view(Some(close_wait(1)), None)];
    let confirmed = confirmed(said, host(vec![close_wait(2)], vec![]), &ledger);
    let [action] = confirmed.actions() else { panic!("one action") };
    assert_eq!(action.view.socket, Some(close_wait(2)));
    assert_eq!(action.template, Entry::plain(server_to_peer().inverse(), Zone::default()));
}

#[test]
fn a_hold_of_another_socket_is_no_reason_to_release_the_entry_of_this_one() {
    let mut ledger = Ledger::default();
    ledger.hold(close_wait(1), alive(), Instant::now());
    // The dump missed the tuple's new socket.
    let said = vec![view(None, Some(alive()))];
    let now = host(vec![established(2)], vec![alive()]);
    assert_eq!(confirmed(said, now, &ledger).actions(), []);
}

#[test]
fn a_held_entry_is_not_released_because_a_dump_missed_its_socket() {
    let mut ledger = Ledger::default();
    ledger.hold(close_wait(1), alive(), Instant::now());
    let said = vec![view(None, Some(alive()))];
    assert_eq!(kinds(&plan_of(said.clone(), &ledger).actions), [ActionKind::Release]);
    let now = host(vec![close_wait(1)], vec![alive()]);
    assert_eq!(confirmed(said, now, &ledger).actions(), []);
}

#[test]
fn the_action_follows_what_is_there_now_and_not_what_was_said() {
    let said = vec![view(Some(close_wait(1)), Some(closed()))];
    for (now, kind) in [
        (None, ActionKind::Reinsert),
        (Some(reversed_entry(server_to_peer(), TcpState::Established, 300)), ActionKind::Reverse),
        (Some(entry(server_to_peer(), TcpState::CloseWait, 3)), ActionKind::Extend),
    ] {
        let now = host(vec![close_wait(1)], now.into_iter().collect());
        let confirmed = confirmed(said.clone(), now, &Ledger::default());
        assert_eq!(kinds(confirmed.actions()), [kind]);
    }
}

#[test]
fn evidence_of_the_plan_holds_for_its_confirmation() {
    // The sibling that proves tracking is no part of the plan, so nobody asks for it again.
    let sibling = flow(SERVER, "198.51.100.8:4000");
    let said = vec![
        view(Some(close_wait(1)), None),
        View {
            connection: Connection::of_sender(sibling),
            socket: None,
            entry: Some(entry(sibling, TcpState::Established, 99)),
        },
    ];
    let now = host(vec![close_wait(1)], vec![]);
    let confirmed = confirmed(said, now, &Ledger::default());
    assert_eq!(kinds(confirmed.actions()), [ActionKind::Reinsert]);
}

#[test]
fn nothing_is_confirmed_when_a_question_stays_unanswered() {
    let planned = plan_of(vec![view(Some(close_wait(1)), Some(closed()))], &Ledger::default());
    let ledger = Ledger::default();
    for silent in [true, false] {
        let quiet = || played::script(|_| vec![]);
        let absent = || played::obliging(|_| Err(played::ENOENT));
        let mut tables = Tables {
            conntrack: ctkeep::conntrack::Conntrack::new(if silent { quiet() } else { absent() }),
            sockets: ctkeep::sockdiag::SockDiag::new(if silent { absent() } else { quiet() }),
            homes: Vec::new(),
            tracking: None,
        };
        let answer =
            confirm(&mut tables, &planned, &Evidence::default(), &scope(), &policy(), &ledger);
        assert!(answer.is_err(), "{answer:?}");
    }
}
