//! What holds for every snapshot.

use proptest::prelude::*;
use proptest::sample::select;

use super::*;

/// A connection of some peer with one of our ports, or a port out of scope.
fn any_flow() -> impl Strategy<Value = FourTuple> {
    (select(vec![80_u16, 443, 22]), 1..6_u8, 4000..4004_u16).prop_map(|(port, host, remote)| {
        flow(&format!("192.0.2.1:{port}"), &format!("198.51.100.{host}:{remote}"))
    })
}

fn any_socket(flow: FourTuple) -> impl Strategy<Value = Socket> {
    let connected: Vec<_> = States::connected().iter().collect();
    (select(connected), 1..4_u64).prop_map(move |(state, cookie)| Socket {
        state,
        ..socket(&flow.src.to_string(), &flow.dst.to_string(), State::CloseWait, cookie)
    })
}

/// As this program makes them.
fn inserted_entry(flow: FourTuple, state: TcpState, seconds: u64) -> Entry {
    let entry = entry(flow, state, seconds);
    Entry { tcp: entry.tcp.map(|tcp| Tcp { flags: [0x88, 0x88], ..tcp }), ..entry }
}

fn any_entry(flow: FourTuple) -> impl Strategy<Value = Entry> {
    let make = select(vec![entry, inserted_entry, reversed_entry, outgoing_entry]);
    let zones = vec![Zone::default(), Zone::both(2), Zone { orig: 2, reply: 0 }];
    (make, select(TcpState::ALL.to_vec()), 0..120_u64, select(zones))
        .prop_map(move |(make, state, seconds, zone)| Entry { zone, ..make(flow, state, seconds) })
}

fn any_view() -> impl Strategy<Value = View> {
    any_flow().prop_flat_map(|flow| {
        (
            Just(flow),
            proptest::option::weighted(0.8, any_socket(flow)),
            proptest::option::weighted(0.8, any_entry(flow)),
        )
            .prop_map(|(flow, socket, entry)| View {
                connection: Connection::of_sender(flow),
                socket,
                entry,
            })
    })
}

/// Each connection once.
fn any_views() -> impl Strategy<Value = Vec<View>> {
    proptest::collection::vec(any_view(), 0..12).prop_map(|mut views| {
        views.sort_by_key(|view| view.connection);
        views.dedup_by_key(|view| view.connection);
        // A cookie belongs to one socket.
        for (view, cookie) in views.iter_mut().zip(1..) {
            if let Some(socket) = &mut view.socket {
                socket.cookie = Cookie(cookie);
            }
        }
        views
    })
}

/// A ledger that holds, or has seen, some of these connections.
fn any_ledger(views: &[View]) -> impl Strategy<Value = Ledger> + use<> {
    let views = views.to_vec();
    let count = views.len();
    (proptest::collection::vec(0..4_u8, count), any::<bool>()).prop_map(
        move |(choices, tracked)| {
            let mut ledger = Ledger::default();
            for (view, choice) in views.iter().zip(choices) {
                let gone = socket(
                    &view.connection.local.to_string(),
                    &view.connection.remote.to_string(),
                    State::CloseWait,
                    99,
                );
                let socket = view.socket.unwrap_or(gone);
                let last = entry(view.connection.sent(), TcpState::CloseWait, 60);
                match choice {
                    0 => ledger.hold(socket, view.entry.unwrap_or(last), Instant::now()),
                    1 => ledger.remember(&socket, last),
                    _ => {}
                }
            }
            if tracked {
                ledger.set_tracked(port(80));
            }
            ledger
        },
    )
}

fn any_situation() -> impl Strategy<Value = (Vec<View>, Ledger)> {
    any_views().prop_flat_map(|views| {
        let ledger = any_ledger(&views);
        (Just(views), ledger)
    })
}

/// A connection about which both tables agree.
fn agreeing_view() -> impl Strategy<Value = View> {
    let live = vec![TcpState::Established, TcpState::FinWait, TcpState::CloseWait];
    let opening = vec![TcpState::SynSent, TcpState::SynRecv, TcpState::SynSent2];
    let closing = vec![TcpState::LastAck, TcpState::TimeWait, TcpState::Close];
    let rules: Vec<(Vec<Option<State>>, Vec<TcpState>)> = vec![
        (vec![Some(State::CloseWait), Some(State::Established)], live),
        (vec![Some(State::SynRecv)], opening),
        (vec![None, Some(State::LastAck), Some(State::TimeWait), Some(State::FinWait2)], closing),
    ];
    let closing_states = [State::LastAck, State::TimeWait, State::FinWait2];
    (any_flow(), select(rules)).prop_flat_map(move |(flow, (sockets, states))| {
        (select(sockets), select(states), 30..400_u64).prop_map(
            move |(state, entry_state, seconds)| View {
                connection: Connection::of_sender(flow),
                socket: state.map(|state| {
                    let (local, remote) = (flow.src.to_string(), flow.dst.to_string());
                    let socket = socket(&local, &remote, state, 1);
                    // What is closing has been closed by its application.
                    let inode = if closing_states.contains(&state) { 0 } else { socket.inode };
                    Socket { inode, ..socket }
                }),
                entry: Some(entry(flow, entry_state, seconds)),
            },
        )
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    #[test]
    fn a_plan_does_not_depend_on_the_order_of_the_snapshot(
        ((views, ledger), order) in any_situation().prop_flat_map(|(views, ledger)| {
            let order = Just(views.clone()).prop_shuffle();
            ((Just(views), Just(ledger)), order)
        })
    ) {
        let sorted = |mut plan: Plan| {
            plan.actions.sort_by_key(|action| action.view.connection);
            plan
        };
        prop_assert_eq!(sorted(plan_of(views, &ledger)), sorted(plan_of(order, &ledger)));
    }

    #[test]
    fn nothing_is_planned_for_what_is_neither_guarded_nor_held(
        (views, ledger) in any_situation()
    ) {
        for action in plan_of(views, &ledger).actions {
            let View { connection, socket, .. } = action.view;
            match socket {
                Some(socket) => {
                    prop_assert!(policy().states.contains(socket.state));
                    prop_assert!(scope().contains(&policy(), connection) || ledger.holds(&socket));
                }
                None => {
                    let inserted = action.view.entry.is_some_and(|entry| entry.is_ours());
                    prop_assert!(inserted || ledger.holds_connection(connection));
                }
            }
        }
    }

    #[test]
    fn nothing_is_planned_where_both_tables_agree(
        views in proptest::collection::vec(agreeing_view(), 0..12)
    ) {
        prop_assert_eq!(plan_of(views, &Ledger::default()).actions, []);
    }

    #[test]
    fn nothing_is_planned_for_a_connection_that_this_host_opened(
        (views, ledger) in any_situation()
    ) {
        for action in plan_of(views, &ledger).actions {
            let side = action.view.entry_side();
            prop_assert!(!matches!(side, Some((Direction::Outgoing, _))), "{action:?}");
        }
    }

    #[test]
    fn an_open_socket_is_never_released_and_a_gone_one_never_repaired(
        (views, ledger) in any_situation()
    ) {
        for action in plan_of(views, &ledger).actions {
            let release = action.kind == ActionKind::Release;
            prop_assert_eq!(release, action.view.socket.is_none());
        }
    }

    #[test]
    fn what_is_put_back_runs_from_the_peer_to_the_server(
        (views, ledger) in any_situation()
    ) {
        for action in plan_of(views, &ledger).actions {
            prop_assert_eq!(action.template.reply, action.view.connection.sent());
        }
    }

    #[test]
    fn one_connection_gets_one_action_at_most((views, ledger) in any_situation()) {
        let actions = plan_of(views, &ledger).actions;
        let flows: HashSet<_> = actions.iter().map(|action| action.view.connection).collect();
        prop_assert_eq!(flows.len(), actions.len());
    }

    /// Observed, planned, confirmed, carried out: then there is nothing left to do, and
    /// whatever was not in a plan is as it was.
    #[test]
    fn a_plan_that_is_carried_out_leaves_nothing_to_do((views, ledger) in any_situation()) {
        let mut ledger = ledger;
        // Zones that nobody has seen are not asked for.
        for view in &views {
            ledger.note(&Snapshot::new(vec![*view]));
        }
        let before = Host {
            sockets: views.iter().filter_map(|view| view.socket).collect(),
            entries: views.iter().filter_map(|view| view.entry).collect(),
            ..Host::default()
        };
        let (host, mut tables) = before.clone().open();
        let (scope, policy) = (scope(), policy());
        let mut touched = HashSet::new();
        for round in 0.. {
            let changes = host.borrow().changes;
            let snapshot = tables.whole(&mut scope.clone(), &policy, States::connected()).unwrap();
            let planned = plan(&snapshot, &scope, &policy, &ledger);
            if planned.actions.is_empty() {
                break;
            }
            // An entry that was put back is evidence that its port is tracked, so connections
            // that were left alone for want of it follow in a second round, the last one.
            prop_assert!(round < 2, "{:?}", planned.actions);
            let reinserts =
                planned.actions.iter().all(|action| action.kind == ActionKind::Reinsert);
            prop_assert!(round == 0 || reinserts, "{:?}", planned.actions);

            let confirmed =
                confirm(&mut tables, &planned, &snapshot.evidence, &scope, &policy, &ledger).unwrap();
            // Nothing has changed in between.
            prop_assert_eq!(kinds(confirmed.actions()), kinds(&planned.actions));
            prop_assert_eq!(host.borrow().changes, changes, "looking changes nothing");

            let outcomes =
                apply(&mut tables, &mut None::<Recounter>, &confirmed, &Known::default(), &policy, &mut ledger, Instant::now())
                    .unwrap();
            for outcome in &outcomes {
                prop_assert!(outcome.result.is_ok(), "{:?}", outcome);
            }
            touched.extend(planned.actions.iter().map(|action| action.view.connection.sent()));
        }
        let untouched = |host: &Host| {
            let of_nobody = |entry: &&Entry| {
                !touched.contains(&entry.reply) && !touched.contains(&entry.orig)
            };
            let mut rest: Vec<_> = host.entries.iter().copied().filter(|e| of_nobody(&e))
                .collect();
            rest.sort_by_key(Entry::key);
            rest
        };
        prop_assert_eq!(untouched(&before), untouched(&host.borrow()));
    }
}
