//! Batches of nf_tables: all of it, or nothing.

use super::*;

/// Three messages between a beginning and an end, over this kernel.
fn run(kernel: impl FnMut(&[u8]) -> Vec<Reply> + 'static) -> ctkeep::Result<()> {
    let mut conversation = Conversation::new(script(kernel));
    let messages = [question("one"), question("two"), question("three")];
    conversation.transaction(&question("begin"), &messages, &question("end"))
}

#[test]
fn a_transaction_is_one_send_of_which_only_the_messages_are_acknowledged() {
    run(|datagram| {
        let requests = requests(datagram);
        let flags: Vec<_> = requests.iter().map(|request| request.flags).collect();
        let acknowledged = NLM_F_REQUEST | NLM_F_ACK;
        assert_eq!(flags, [NLM_F_REQUEST, acknowledged, acknowledged, acknowledged, NLM_F_REQUEST]);
        datagrams(requests[1..4].iter().map(|request| ack(request.seq)))
    })
    .unwrap();
}

#[test]
fn one_refusal_refuses_it_all() {
    // Sequence numbers: 1 begins, 5 ends; the refusal of the whole carries that of the begin.
    for refused in [1, 2, 3, 4, 5] {
        let mut replies = vec![ack(2), ack(3), ack(4)];
        replies.insert(0, refusal(refused, EPERM));
        let error = run(move |_| datagrams(replies.clone())).unwrap_err();
        assert!(error.is_missing_privilege(), "{error}");
    }
}

#[test]
fn a_transaction_that_is_answered_in_part_is_an_error() {
    assert!(is_late(&run(|_| datagrams([ack(2), ack(3)])).unwrap_err()));
    let overrun = |_: &[u8]| vec![Reply::Datagram(ack(2)), Reply::Errno(ENOBUFS)];
    assert!(is_overrun(&run(overrun).unwrap_err()));
    assert!(is_malformed(&run(|_| datagrams([ack(2), ack(99)])).unwrap_err()));
}

#[test]
fn what_follows_a_refusal_does_not_disturb_the_next_request() {
    let mut conversation = Conversation::new(script(|datagram| match requests(datagram)[0].seq {
        1 => datagrams([refusal(2, EINVAL), refusal(3, EPERM), ack(4)]),
        seq => datagrams([ack(seq)]),
    }));
    let messages = [question("one"), question("two"), question("three")];
    let answer = conversation.transaction(&question("begin"), &messages, &question("end"));
    assert_eq!(answer.unwrap_err().errno().map(|errno| errno as i32), Some(EINVAL));
    conversation.execute(&question("next")).unwrap();
}
