//! Conversations about entries.

use super::*;

fn tuple() -> FourTuple {
    flow(SERVER, PEER)
}

fn key() -> EntryKey {
    EntryKey { zone: Zone::default(), orig: tuple().inverse() }
}

fn insert(flow: FourTuple) -> Insert {
    Insert {
        like: Entry::plain(flow.inverse(), Zone::default()),
        state: TcpState::CloseWait,
        status: Status::FRESH,
        timeout: Duration::from_secs(60),
    }
}

#[test]
fn the_size_of_the_table_is_read() {
    let payload = [vec![0; 4], attribute(1, &7_u32.to_be_bytes())].concat();
    let older = payload.clone();
    let mut table = Conntrack::new(obliging(move |request| {
        assert_eq!(request.kind, CT_GET_STATS);
        Ok(vec![message(CT_GET_STATS, 0, request.seq, &older)])
    }));
    let size = table.size().unwrap();
    assert_eq!((size.entries, size.maximum), (7, None));

    let newer = [payload, attribute(2, &262_144_u32.to_be_bytes())].concat();
    let mut table = Conntrack::new(obliging(move |request| {
        Ok(vec![message(CT_GET_STATS, 0, request.seq, &newer)])
    }));
    assert_eq!(table.size().unwrap().maximum, Some(262_144));
}

#[test]
fn a_kernel_without_ctnetlink_is_unavailable_and_the_module_is_named() {
    let error = Conntrack::new(obliging(|_| Err(EINVAL))).size().unwrap_err();
    assert!(error.is_unavailable(), "{error}");
    assert!(error.to_string().contains("modprobe nf_conntrack_netlink"), "{error}");
}

#[test]
fn a_missing_privilege_is_unavailable_and_no_missing_module() {
    let error = Conntrack::new(obliging(|_| Err(EPERM))).size().unwrap_err();
    assert!(error.is_missing_privilege() && error.is_unavailable(), "{error}");
    assert!(!error.to_string().contains("modprobe"), "{error}");
}

#[test]
fn a_size_without_number_is_an_error() {
    let error = Conntrack::new(obliging(|_| Ok(vec![]))).size().unwrap_err();
    assert!(is_malformed(&error), "{error}");
    let empty =
        |request: &played::Request| Ok(vec![message(CT_GET_STATS, 0, request.seq, &[0; 4])]);
    assert!(is_malformed(&Conntrack::new(obliging(empty)).size().unwrap_err()));
}

#[test]
fn entries_come_in_the_order_asked_with_none_for_the_absent() {
    let present = entry(flow(SERVER, OTHER_PEER), TcpState::CloseWait, 60);
    let mut table = Conntrack::new(obliging(move |request| match request.seq {
        2 => Ok(vec![entry_message(2, &present)]),
        _ => Err(ENOENT),
    }));
    let keys = [PEER, OTHER_PEER, PEER].map(|peer| (flow(SERVER, peer), Zone::default()));
    assert_eq!(table.get(&keys).unwrap(), [None, Some(present), None]);
}

#[test]
fn an_entry_is_found_by_either_of_its_tuples() {
    for found in [entry(tuple(), TcpState::Close, 9), reversed_entry(tuple(), TcpState::Close, 9)] {
        let mut table =
            Conntrack::new(obliging(move |request| Ok(vec![entry_message(request.seq, &found)])));
        assert_eq!(table.get(&[(tuple(), Zone::default())]).unwrap(), [Some(found)]);
    }
}

#[test]
fn an_entry_of_another_tuple_is_none() {
    let other = entry(flow(SERVER, OTHER_PEER), TcpState::CloseWait, 60);
    let mut table =
        Conntrack::new(obliging(move |request| Ok(vec![entry_message(request.seq, &other)])));
    assert_eq!(table.get(&[(tuple(), Zone::default())]).unwrap(), [None]);
}

#[test]
fn an_unanswered_question_for_an_entry_is_never_none() {
    let keys = [(tuple(), Zone::default()); 2];
    let whole = entry_message(1, &entry(tuple(), TcpState::CloseWait, 60));
    let cut = {
        let mut cut = whole[..whole.len() - 4].to_vec();
        let length = cut.len() as u32;
        cut[..4].copy_from_slice(&length.to_ne_bytes());
        cut
    };
    for (case, replies) in [
        ("silence", vec![]),
        ("half of it", datagrams([whole.clone()])),
        ("no privilege", datagrams([refusal(1, EPERM), refusal(2, EPERM)])),
        ("acknowledged without an entry", datagrams([ack(1), ack(2)])),
        ("cut entry", datagrams([cut, refusal(2, ENOENT)])),
        ("overrun", vec![Reply::Errno(ENOBUFS)]),
        ("truncated", vec![Reply::Truncated]),
    ] {
        let mut table = Conntrack::new(scripted(vec![replies]));
        let answer = table.get(&keys);
        assert!(answer.is_err(), "{case}: {answer:?}");
    }
}

#[test]
fn a_dump_has_the_tcp_entries_and_nothing_else() {
    let wanted = entry(tuple(), TcpState::CloseWait, 60);
    let mut udp = entry_message(1, &wanted);
    // CTA_PROTO_NUM of both tuples: an attribute of length 5 and type 1 with the value 6.
    let places: Vec<usize> =
        (0..udp.len() - 5).filter(|at| udp[*at..*at + 5] == [5, 0, 1, 0, 6]).collect();
    assert_eq!(places.len(), 2);
    for at in places {
        udp[at + 4] = 17;
    }
    let replies = datagrams([udp, entry_message(1, &wanted), done(1, 0)]);
    let mut table = Conntrack::new(scripted(vec![replies]));
    let all =
        table.entries(AF_INET, Filter::Tcp, |all: &mut Vec<_>, entry| all.push(*entry)).unwrap();
    assert_eq!(all, [wanted]);
}

#[test]
fn a_dump_with_an_entry_that_cannot_be_read_is_an_error_and_no_short_list() {
    let good = entry(tuple(), TcpState::CloseWait, 60);
    let bad = message(CT_NEW, NLM_F_MULTI, 1, &[2, 0, 0, 0, 3, 0, 1, 0]);
    let replies = datagrams([entry_message(1, &good), bad, done(1, 0)]);
    let mut table = Conntrack::new(scripted(vec![replies]));
    let error = table
        .entries(AF_INET, Filter::Tcp, |all: &mut Vec<_>, entry| all.push(*entry))
        .unwrap_err();
    assert!(is_malformed(&error), "{error}");
}

#[test]
fn every_change_has_its_own_result() {
    let mut table = Conntrack::new(obliging(|request| match (request.kind, request.seq) {
        // The second: a Replace whose delete finds nothing.
        (CT_DELETE, 2) => Err(ENOENT),
        // The third: a Replace whose insert meets an entry.
        (CT_NEW, 5) => Err(EEXIST),
        _ => Ok(vec![]),
    }));
    let timeout = Duration::from_secs(60);
    let replace = Change::Replace { old: key(), id: None, new: insert(tuple()) };
    let changes = [
        Change::Extend { key: key(), timeout },
        replace,
        replace,
        Change::Insert(insert(tuple())),
        Change::Delete { key: key(), id: Some(1) },
    ];
    let results = table.change(&changes).unwrap();
    let outcomes: Vec<bool> = results.iter().map(Result::is_ok).collect();
    assert_eq!(outcomes, [true, true, false, true, true]);
    assert!(results[2].as_ref().unwrap_err().is_already_there());
}

#[test]
fn a_replacement_is_never_torn_and_no_send_has_more_than_sixty_four_messages() {
    let sends = Rc::new(RefCell::new(Vec::new()));
    let seen = sends.clone();
    let mut table = Conntrack::new(script(move |datagram| {
        let requests = requests(datagram);
        seen.borrow_mut()
            .push(requests.iter().map(|request| (request.kind, request.flags)).collect::<Vec<_>>());
        datagrams(requests.iter().map(|request| ack(request.seq)))
    }));
    let extend = Change::Extend { key: key(), timeout: Duration::from_secs(60) };
    let replace = Change::Replace { old: key(), id: None, new: insert(tuple()) };
    // One message before the pairs, so that the 64th of a send would be a delete.
    let mut changes = vec![extend];
    changes.extend(vec![replace; 200]);
    let results = table.change(&changes).unwrap();
    assert_eq!(results.len(), 201);
    assert!(results.iter().all(Result::is_ok));

    let sends = sends.take();
    let create = NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE | NLM_F_EXCL;
    for send in &sends {
        assert!(send.len() <= 64);
        assert_ne!(send[send.len() - 1].0, CT_DELETE, "a delete without its insert");
    }
    let all: Vec<_> = sends.into_iter().flatten().collect();
    assert_eq!(all.len(), 401);
    for pair in all[1..].chunks(2) {
        assert_eq!(pair, [(CT_DELETE, NLM_F_REQUEST | NLM_F_ACK), (CT_NEW, create)]);
    }
}

#[test]
fn no_request_ever_names_no_entry() {
    // A delete without a tuple would flush the whole table.
    let checked = Rc::new(Cell::new(0));
    let count = checked.clone();
    let mut table = Conntrack::new(obliging(move |request| {
        let orig = played::descend(&request.body[4..], &[1, 2, 3]);
        let reply = played::descend(&request.body[4..], &[2, 2, 3]);
        assert!(orig.or(reply).is_some(), "{:#x} without a tuple", request.kind);
        count.set(count.get() + 1);
        Err(ENOENT)
    }));
    let timeout = Duration::from_secs(1);
    for zone in
        [Zone::default(), Zone::both(7), Zone { orig: 7, reply: 0 }, Zone { orig: 0, reply: 7 }]
    {
        let key = EntryKey { zone, ..key() };
        let new = Insert { like: Entry::plain(key.orig, zone), ..insert(tuple()) };
        table
            .change(&[
                Change::Extend { key, timeout },
                Change::Update { key, state: TcpState::Close, status: None, timeout },
                Change::Delete { key, id: None },
                Change::Replace { old: key, id: Some(3), new },
                Change::Insert(new),
            ])
            .unwrap();
        table.get(&[(tuple(), zone)]).unwrap();
    }
    assert_eq!(checked.get(), 4 * 7);
}
