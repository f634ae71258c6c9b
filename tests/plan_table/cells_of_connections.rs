//! How values become a cell.

use super::*;

fn verdict_of(socket: Option<Socket>, entry: Option<Entry>, ledger: &Ledger) -> Verdict {
    let view = view(socket, entry);
    let snapshot = Snapshot::new(vec![view]);
    ctkeep::reconcile::plan::verdict(&view, &snapshot.evidence, &scope(), &policy(), ledger)
}

#[test]
fn an_entry_is_expiring_below_half_a_lease() {
    let lease = policy().lease.as_secs();
    for (seconds, expected) in [
        (0, Verdict::Act(ActionKind::Extend, Reason::EntryExpiring)),
        (lease / 2 - 1, Verdict::Act(ActionKind::Extend, Reason::EntryExpiring)),
        (lease / 2, Verdict::Leave(NoAction::Agree)),
        (lease, Verdict::Leave(NoAction::Agree)),
    ] {
        let entry = entry(server_to_peer(), TcpState::CloseWait, seconds);
        let verdict = verdict_of(Some(close_wait(1)), Some(entry), &Ledger::default());
        assert_eq!(verdict, expected, "{seconds} s");
    }
}

#[test]
fn an_idle_entry_is_extended_before_the_kernel_forgets_it() {
    let (below, timeout) = (Duration::from_secs(60), Duration::from_secs(3600));
    let mut ledger = Ledger::default();
    ledger.set_idle(Some(Idle { below, timeout }));
    let extend = Verdict::Act(ActionKind::Extend, Reason::EntryIdle(timeout));
    let agree = Verdict::Leave(NoAction::Agree);
    let entry_of = |seconds| entry(server_to_peer(), TcpState::Established, seconds);
    for (seconds, expected) in [(0, extend), (59, extend), (60, agree), (432_000, agree)] {
        let verdict = verdict_of(Some(established(1)), Some(entry_of(seconds)), &ledger);
        assert_eq!(verdict, expected, "{seconds} s");
    }
    // By nobody who has not been asked, of no socket that is not guarded, and of none that is
    // gone; what is held has its lease.
    let nobody = Ledger::default();
    assert_eq!(verdict_of(Some(established(1)), Some(entry_of(1)), &nobody), agree);
    let handshake = Socket { state: State::SynRecv, inode: 0, ..established(1) };
    let unguarded = verdict_of(Some(handshake), Some(entry_of(1)), &ledger);
    assert_eq!(unguarded, Verdict::Leave(NoAction::NotGuarded));
    assert_eq!(verdict_of(None, Some(entry_of(1)), &ledger), Verdict::Leave(NoAction::OverCount));
    ledger.hold(established(1), entry_of(1), Instant::now());
    let held = verdict_of(Some(established(1)), Some(entry_of(1)), &ledger);
    assert_eq!(held, Verdict::Act(ActionKind::Extend, Reason::EntryExpiring));
}

#[test]
fn a_connection_out_of_scope_is_guarded_only_while_it_is_held() {
    let closed = entry(server_to_peer(), TcpState::Close, 9);
    let out_of_scope = Policy { exempt: vec!["198.51.100.7/32".parse().unwrap()], ..policy() };
    let view = view(Some(close_wait(1)), Some(closed));
    let mut ledger = Ledger::default();
    let plan_now =
        |ledger: &Ledger| plan(&Snapshot::new(vec![view]), &scope(), &out_of_scope, ledger);
    assert!(plan_now(&ledger).actions.is_empty());
    ledger.hold(close_wait(1), closed, Instant::now());
    assert_eq!(kinds(&plan_now(&ledger).actions), [ActionKind::Revive]);
}

#[test]
fn a_state_that_the_policy_does_not_name_is_not_guarded() {
    let closed = entry(server_to_peer(), TcpState::Close, 9);
    let only_half_closed = Policy { states: States::from_iter([State::CloseWait]), ..policy() };
    for (socket, count) in [(close_wait(1), 1), (established(1), 0)] {
        let snapshot = Snapshot::new(vec![view(Some(socket), Some(closed))]);
        let plan = plan(&snapshot, &scope(), &only_half_closed, &Ledger::default());
        assert_eq!(plan.actions.len(), count, "{}", socket.state);
    }
}

#[test]
fn a_missing_entry_is_put_back_only_with_evidence_that_the_port_is_tracked() {
    let missing = Some(close_wait(1));
    let mut ledger = Ledger::default();
    let reinsert = Verdict::Act(ActionKind::Reinsert, Reason::EntryMissing);
    assert_eq!(verdict_of(missing, None, &ledger), Verdict::Leave(NoAction::Untracked));

    // This connection had an entry.
    ledger.remember(&close_wait(1), entry(server_to_peer(), TcpState::CloseWait, 9));
    assert_eq!(verdict_of(missing, None, &ledger), reinsert);
    // Another one with the same tuple, which a younger socket does not inherit.
    let younger = Some(close_wait(2));
    assert_eq!(verdict_of(younger, None, &ledger), Verdict::Leave(NoAction::Untracked));

    // Another connection of the port had one.
    let mut ledger = Ledger::default();
    ledger.set_tracked(port(443));
    assert_eq!(verdict_of(missing, None, &ledger), Verdict::Leave(NoAction::Untracked));
    ledger.set_tracked([TrackedPort { is_ipv4: false, number: 80 }].into());
    assert_eq!(verdict_of(missing, None, &ledger), Verdict::Leave(NoAction::Untracked));
    ledger.set_tracked(port(80));
    assert_eq!(verdict_of(missing, None, &ledger), reinsert);

    // Another connection of the port has one in this very snapshot.
    let sibling = flow(SERVER, "198.51.100.8:4000");
    let sibling = View {
        connection: Connection::of_sender(sibling),
        socket: None,
        entry: Some(entry(sibling, TcpState::TimeWait, 9)),
    };
    let plan_now = plan_of(vec![view(missing, None), sibling], &Ledger::default());
    assert_eq!(kinds(&plan_now.actions), [ActionKind::Reinsert]);

    // By force.
    let forced = Policy { force: true, ..policy() };
    let snapshot = Snapshot::new(vec![view(missing, None)]);
    let plan_now = plan(&snapshot, &scope(), &forced, &Ledger::default());
    assert_eq!(kinds(&plan_now.actions), [ActionKind::Reinsert]);
}

#[test]
fn the_direction_is_told_by_the_reply_tuple_and_the_flags_of_loose_pick_up() {
    let (flow, state) = (server_to_peer(), TcpState::Established);
    for (entry, direction) in [
        (entry(flow, state, 9), Direction::FromPeer),
        (reversed_entry(flow, state, 9), Direction::Reversed),
        (outgoing_entry(flow, state, 9), Direction::Outgoing),
    ] {
        assert_eq!(view(None, Some(entry)).entry_side(), Some((direction, state)));
    }
}

#[test]
fn what_this_host_opened_stays_so_when_its_entry_is_forgotten() {
    let mut ledger = Ledger::default();
    ledger.set_tracked(port(80));
    let outgoing = outgoing_entry(server_to_peer(), TcpState::Established, 9);
    ledger.remember(&close_wait(1), outgoing);
    let verdict = verdict_of(Some(close_wait(1)), None, &ledger);
    assert_eq!(verdict, Verdict::Leave(NoAction::Outgoing));
}

/// With the flag that only ctkeep gives.
fn inserted(state: TcpState, seconds: u64) -> Entry {
    let entry = entry(server_to_peer(), state, seconds);
    Entry { tcp: entry.tcp.map(|tcp| Tcp { flags: [0x88, 0x88], ..tcp }), ..entry }
}

/// The last step assures an entry; until then it has not been shown to a limit, perhaps.
#[test]
fn what_a_broken_off_repair_has_left_is_recounted() {
    let nobody = Ledger::default();
    let recount = Verdict::Act(ActionKind::Recount, Reason::BrokenOff);
    for (socket, state) in [
        (established(1), TcpState::Established),
        (close_wait(1), TcpState::Established),
        (close_wait(1), TcpState::CloseWait),
    ] {
        let fresh = Entry { status: Some(Status::FRESH), ..inserted(state, 60) };
        assert_eq!(verdict_of(Some(socket), Some(fresh), &nobody), recount);
        let whole = Entry { status: Some(Status::ASSURED), ..fresh };
        assert_eq!(verdict_of(Some(socket), Some(whole), &nobody), Verdict::Leave(NoAction::Agree));
        let kernels = Entry { status: Some(Status::FRESH), ..entry(server_to_peer(), state, 60) };
        let verdict = verdict_of(Some(socket), Some(kernels), &nobody);
        assert_eq!(verdict, Verdict::Leave(NoAction::Agree));
    }
}

/// `nft_flow_offload_eval()` makes entries liberal both ways.
#[test]
fn what_a_flow_table_has_had_is_neither_ours_nor_picked_up() {
    let of_a_handshake = |state| {
        let entry = entry(server_to_peer(), state, 100);
        Entry { tcp: entry.tcp.map(|tcp| Tcp { flags: [0x2b, 0x2b], ..tcp }), ..entry }
    };
    let nobody = Ledger::default();
    let alive = of_a_handshake(TcpState::Established);
    assert_eq!(verdict_of(None, Some(alive), &nobody), Verdict::Leave(NoAction::OverCount));
    let agree = Verdict::Leave(NoAction::Agree);
    assert_eq!(verdict_of(Some(established(1)), Some(alive), &nobody), agree);
    let half_closed = of_a_handshake(TcpState::CloseWait);
    assert_eq!(verdict_of(Some(close_wait(1)), Some(half_closed), &nobody), agree);
    // Of a connection that this host, or a container that is guarded, has opened.
    let outgoing = Entry { orig: alive.reply, reply: alive.orig, ..alive };
    let verdict = verdict_of(Some(established(1)), Some(outgoing), &nobody);
    assert_eq!(verdict, Verdict::Leave(NoAction::Outgoing));
}

#[test]
fn what_a_former_life_inserted_is_given_back_when_its_socket_is_gone() {
    let release = Verdict::Act(ActionKind::Release, Reason::SocketGone);
    let nobody = Ledger::default();
    for (entry, expected) in [
        (inserted(TcpState::CloseWait, 50), release),
        (inserted(TcpState::Established, 50), release),
        // What the kernel itself or another program made is not ours to take away.
        (entry(server_to_peer(), TcpState::CloseWait, 50), Verdict::Leave(NoAction::OverCount)),
        (
            Entry {
                tcp: reversed_entry(server_to_peer(), TcpState::CloseWait, 50).tcp,
                ..entry(server_to_peer(), TcpState::CloseWait, 50)
            },
            Verdict::Leave(NoAction::OverCount),
        ),
    ] {
        assert_eq!(verdict_of(None, Some(entry), &nobody), expected, "{entry:?}");
    }
}

#[test]
fn an_inserted_entry_that_a_packet_has_lengthened_is_brought_back_to_its_lease() {
    let extend = Verdict::Act(ActionKind::Extend, Reason::EntryExpiring);
    let agree = Verdict::Leave(NoAction::Agree);
    let lease = policy().lease.as_secs();
    let kernels_own = entry(server_to_peer(), TcpState::Established, 432_000);
    for (socket, entry, expected) in [
        (close_wait(1), inserted(TcpState::Established, lease), agree),
        (close_wait(1), inserted(TcpState::Established, lease + 1), extend),
        (close_wait(1), inserted(TcpState::Established, 432_000), extend),
        (close_wait(1), kernels_own, agree),
        // Traffic flows: its timeout is the kernel's.
        (established(1), inserted(TcpState::Established, 432_000), agree),
    ] {
        let verdict = verdict_of(Some(socket), Some(entry), &Ledger::default());
        assert_eq!(verdict, expected, "{} {entry:?}", socket.state);
    }
}

#[test]
fn what_was_closed_during_its_repair_is_repaired_again_however_well_it_looks() {
    let well = inserted(TcpState::CloseWait, 60);
    let mut ledger = Ledger::default();
    ledger.hold(close_wait(1), well, Instant::now());
    let revive = Verdict::Act(ActionKind::Revive, Reason::EntryClosed(TcpState::Close));
    ledger.distrust(&close_wait(1));
    assert_eq!(verdict_of(Some(close_wait(1)), Some(well), &ledger), revive);
    // Until it has been.
    ledger.hold(close_wait(1), well, Instant::now());
    let agree = Verdict::Leave(NoAction::Agree);
    assert_eq!(verdict_of(Some(close_wait(1)), Some(well), &ledger), agree);
}

#[test]
fn the_handshake_of_a_tuple_that_is_used_again_is_not_disturbed() {
    let mut ledger = Ledger::default();
    let last = entry(server_to_peer(), TcpState::CloseWait, 60);
    ledger.hold(close_wait(1), last, Instant::now());
    for state in [TcpState::SynSent, TcpState::SynRecv] {
        let handshake = entry(server_to_peer(), state, 60);
        let verdict = verdict_of(None, Some(handshake), &ledger);
        assert_eq!(verdict, Verdict::Leave(NoAction::Handshake), "{state}");
    }
}

#[test]
fn a_translated_connection_is_matched_by_its_answers() {
    // Port 80 redirected to 8080: the socket knows only the latter.
    let server = flow("192.0.2.1:8080", PEER);
    let redirected = Entry { orig: flow(PEER, SERVER), ..entry(server, TcpState::Close, 9) };
    let policy = Policy { ports: HashSet::from([8080]), ..policy() };
    let socket = socket("192.0.2.1:8080", PEER, State::CloseWait, 1);
    let view = View {
        connection: Connection::of_sender(server),
        socket: Some(socket),
        entry: Some(redirected),
    };
    let plan = plan(&Snapshot::new(vec![view]), &policy.scope(&[]), &policy, &Ledger::default());
    assert_eq!(kinds(&plan.actions), [ActionKind::Revive]);
    // And is put back as it was.
    assert_eq!(plan.actions[0].template, redirected);
}

#[test]
fn a_lost_entry_is_put_back_as_it_was_last_seen() {
    let marked = Entry {
        mark: Some(7),
        zone: Zone::both(3),
        ..entry(server_to_peer(), TcpState::CloseWait, 9)
    };
    let mut ledger = Ledger::default();
    ledger.remember(&close_wait(1), marked);
    let plan = plan_of(vec![view(Some(close_wait(1)), None)], &ledger);
    assert_eq!(plan.actions[0].template, marked);
}

#[test]
fn a_reversed_entry_is_turned_round_in_its_own_zone() {
    let reversed =
        Entry { zone: Zone::both(3), ..reversed_entry(server_to_peer(), TcpState::Established, 9) };
    let plan = plan_of(vec![view(Some(close_wait(1)), Some(reversed))], &Ledger::default());
    assert_eq!(kinds(&plan.actions), [ActionKind::Reverse]);
    let template = plan.actions[0].template;
    assert_eq!((template.reply, template.zone), (server_to_peer(), Zone::both(3)));
}
