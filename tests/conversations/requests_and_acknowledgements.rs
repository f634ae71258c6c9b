//! One request, its answer and its acknowledgement.

use super::*;

#[test]
fn an_acknowledged_request_has_succeeded() {
    conversation(vec![datagrams([ack(1)])]).execute(&question("ask")).unwrap();
}

#[test]
fn a_request_asks_for_its_acknowledgement_and_a_dump_does_not() {
    let flags = Rc::new(RefCell::new(Vec::new()));
    let seen = flags.clone();
    let mut conversation = Conversation::new(script(move |datagram| {
        let request = requests(datagram).remove(0);
        seen.borrow_mut().push(request.flags);
        datagrams([if request.is_dump() { done(request.seq, 0) } else { ack(request.seq) }])
    }));
    conversation.execute(&Request { flags: NLM_F_CREATE, ..question("make") }).unwrap();
    numbers(&mut conversation).unwrap();
    assert_eq!(
        *flags.borrow(),
        [NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE, NLM_F_REQUEST | NLM_F_DUMP]
    );
}

#[test]
fn a_refusal_names_the_operation_and_the_errno() {
    let answers = vec![datagrams([refusal(1, EPERM)])];
    let error = conversation(answers).execute(&question("ask")).unwrap_err();
    assert_eq!(error.to_string(), "ask: operation not permitted (EPERM)");
    assert!(error.is_missing_privilege());
}

#[test]
fn the_kernels_sentence_is_read_behind_a_capped_request() {
    let answers = vec![datagrams([refusal_because(1, EINVAL, "tuple lacks a zone")])];
    let error = conversation(answers).execute(&question("ask")).unwrap_err();
    assert_eq!(error.to_string(), "ask: tuple lacks a zone (EINVAL)");
}

#[test]
fn the_kernels_sentence_is_read_behind_a_whole_request_of_any_length() {
    for length in [16, 18, 20, 300] {
        let refusal = uncapped_refusal_because(1, EINVAL, length, "no such helper");
        let error = conversation(vec![datagrams([refusal])]).execute(&question("ask")).unwrap_err();
        assert_eq!(error.to_string(), "ask: no such helper (EINVAL)", "length {length}");
    }
}

#[test]
fn a_refusal_whose_sentence_is_cut_short_still_tells_its_errno() {
    let whole = refusal_because(1, ENOENT, "not there");
    for length in (20..whole.len()).step_by(4) {
        let mut cut = whole[..length].to_vec();
        cut[..4].copy_from_slice(&(length as u32).to_ne_bytes());
        let error = conversation(vec![datagrams([cut])]).execute(&question("ask")).unwrap_err();
        assert!(error.is_absent(), "{length} bytes: {error}");
    }
}

#[test]
fn a_refused_whole_request_that_lies_about_its_length_still_tells_its_errno() {
    let mut lie = uncapped_refusal_because(1, ENOENT, 20, "not there");
    lie[20..24].copy_from_slice(&u32::MAX.to_ne_bytes());
    let error = conversation(vec![datagrams([lie])]).execute(&question("ask")).unwrap_err();
    assert!(error.is_absent(), "{error}");
}

#[test]
fn an_acknowledgement_without_room_for_an_errno_is_malformed() {
    let short = message(NLMSG_ERROR, 0, 1, &[0, 0]);
    let error = conversation(vec![datagrams([short])]).execute(&question("ask")).unwrap_err();
    assert!(is_malformed(&error), "{error}");
}

#[test]
fn no_answer_is_an_error() {
    let error = conversation(vec![vec![]]).execute(&question("ask")).unwrap_err();
    assert!(is_late(&error), "{error}");
}

#[test]
fn an_answer_without_acknowledgement_is_an_error() {
    let mut seen = 0;
    let error = conversation(vec![datagrams([part(7)])])
        .query(&question("ask"), |_| {
            seen += 1;
            Ok(())
        })
        .unwrap_err();
    assert!(is_late(&error), "{error}");
    assert_eq!(seen, 1);
}

#[test]
fn a_message_of_no_meaning_is_skipped() {
    let answers = vec![datagrams([message(NLMSG_NOOP, 0, 1, &[]), ack(1)])];
    conversation(answers).execute(&question("ask")).unwrap();
}

#[test]
fn an_empty_datagram_is_skipped() {
    conversation(vec![datagrams([vec![], ack(1)])]).execute(&question("ask")).unwrap();
}

#[test]
fn the_end_of_a_dump_that_nobody_asked_for_is_malformed() {
    let error = conversation(vec![datagrams([done(1, 0)])]).execute(&question("ask"));
    assert!(is_malformed(&error.unwrap_err()));
}

#[test]
fn late_answers_to_an_abandoned_request_are_skipped() {
    // The first request is never answered in time; its refusal arrives before the answer to
    // the second and must not be taken for it.
    let mut conversation = Conversation::new(script(|datagram| match requests(datagram)[0].seq {
        1 => vec![],
        seq => datagrams([refusal(seq - 1, EPERM), ack(seq)]),
    }));
    assert!(is_late(&conversation.execute(&question("first")).unwrap_err()));
    conversation.execute(&question("second")).unwrap();
}

#[test]
fn late_parts_of_an_abandoned_dump_are_skipped() {
    let mut conversation = Conversation::new(script(|datagram| match requests(datagram)[0].seq {
        1 => datagrams([part(1)]),
        seq => datagrams([
            message(KIND, NLM_F_MULTI, seq - 1, &[2, 0, 0, 0]),
            done(seq - 1, 0),
            message(KIND, NLM_F_MULTI, seq, &[3, 0, 0, 0]),
            done(seq, 0),
        ]),
    }));
    assert!(is_late(&numbers(&mut conversation).unwrap_err()));
    assert_eq!(numbers(&mut conversation).unwrap(), [3]);
}

#[test]
fn a_sequence_number_that_was_never_sent_is_an_error() {
    for seq in [2, 3, 1_000_000] {
        let error = conversation(vec![datagrams([ack(seq)])]).execute(&question("ask"));
        assert!(is_malformed(&error.unwrap_err()), "number {seq}");
        let error = numbers(&mut conversation(vec![datagrams([done(seq, 0)])]));
        assert!(is_malformed(&error.unwrap_err()), "number {seq}");
    }
}

#[test]
fn a_failed_send_is_an_error() {
    struct Deaf;
    impl Transport for Deaf {
        fn send(&mut self, _: &[u8]) -> io::Result<()> {
            Err(io::Error::from_raw_os_error(ENOBUFS))
        }
        fn recv(&mut self, _: &mut Vec<u8>) -> io::Result<()> {
            panic!("nothing was sent")
        }
    }
    let mut conversation = Conversation::new(Deaf);
    conversation.execute(&question("ask")).unwrap_err();
    conversation.dump(&question("count"), |(): &mut (), _| Ok(())).unwrap_err();
}
