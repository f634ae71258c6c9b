//! Lists: whole, or an error.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use super::*;

#[test]
fn a_dump_split_over_many_datagrams_is_whole_and_in_order() {
    let mut replies = Vec::new();
    for chunk in (0..1000_u32).collect::<Vec<_>>().chunks(7) {
        replies.push(chunk.iter().flat_map(|number| part(*number)).collect::<Vec<u8>>());
    }
    replies.push(done(1, 0));
    let all = numbers(&mut conversation(vec![datagrams(replies)])).unwrap();
    assert_eq!(all, (0..1000).collect::<Vec<_>>());
}

/// The watchdog waits half a minute at most, and a dump of millions takes longer.
#[test]
fn each_datagram_of_a_dump_is_a_sign_of_life() {
    let replies: Vec<_> = (0..50).map(part).chain([done(1, 0)]).collect();
    let mut conversation = conversation(vec![datagrams(replies)]);
    let signs = Arc::new(AtomicU32::new(0));
    let counted = signs.clone();
    conversation.on_answer(move || _ = counted.fetch_add(1, Ordering::Relaxed));
    assert_eq!(numbers(&mut conversation).unwrap().len(), 50);
    assert_eq!(signs.load(Ordering::Relaxed), 51);
}

#[test]
fn the_end_may_come_in_the_datagram_of_the_last_part() {
    let together = [part(1), part(2), done(1, 0)].concat();
    assert_eq!(numbers(&mut conversation(vec![datagrams([together])])).unwrap(), [1, 2]);
}

#[test]
fn an_end_without_status_is_an_end() {
    let end = message(NLMSG_DONE, NLM_F_MULTI, 1, &[]);
    assert_eq!(numbers(&mut conversation(vec![datagrams([part(1), end])])).unwrap(), [1]);
}

#[test]
fn an_interrupted_dump_is_begun_anew_and_counted() {
    let mut conversation = conversation(vec![
        datagrams([part(1), interrupted_part(2), part(3), done(1, 0)]),
        datagrams([part(10), done(1, 0)]),
    ]);
    // Nothing of the first attempt is left in the second.
    assert_eq!(numbers(&mut conversation).unwrap(), [10]);
    assert_eq!(conversation.interrupted_dumps(), 1);
}

#[test]
fn a_dump_whose_end_says_interrupted_is_begun_anew() {
    let end = message(NLMSG_DONE, NLM_F_MULTI | NLM_F_DUMP_INTR, 1, &[0; 4]);
    let mut conversation =
        conversation(vec![datagrams([part(1), end]), datagrams([part(2), done(1, 0)])]);
    assert_eq!(numbers(&mut conversation).unwrap(), [2]);
    assert_eq!(conversation.interrupted_dumps(), 1);
}

#[test]
fn a_dump_that_is_always_interrupted_is_an_error() {
    let sends = Rc::new(Cell::new(0_u64));
    let counted = sends.clone();
    let mut conversation = Conversation::new(script(move |datagram| {
        counted.set(counted.get() + 1);
        let by = requests(datagram)[0].seq - 1;
        datagrams([interrupted_part(1), done(1, 0)])
            .into_iter()
            .map(|reply| renumbered(reply, by))
            .collect()
    }));
    let error = numbers(&mut conversation).unwrap_err();
    assert!(matches!(*error.cause, Cause::Interrupted { .. }), "{error}");
    assert_eq!(error.reason(), "interrupted");
    assert!(sends.get() > 1);
    assert_eq!(conversation.interrupted_dumps(), sends.get());
}

#[test]
fn a_dump_that_is_refused_at_once_is_an_error() {
    let error = numbers(&mut conversation(vec![datagrams([refusal(1, EPERM)])])).unwrap_err();
    assert!(error.is_missing_privilege(), "{error}");
}

#[test]
fn a_dump_that_ends_in_an_error_is_an_error() {
    let answers = vec![datagrams([part(1), part(2), done(1, EINVAL)])];
    let error = numbers(&mut conversation(answers)).unwrap_err();
    assert_eq!(error.to_string(), "count: invalid argument (EINVAL)");
}

#[test]
fn the_kernels_sentence_is_read_at_the_end_of_a_dump() {
    // There no copy of the request stands between the error number and the sentence.
    let answers = vec![datagrams([part(1), done_because(1, EINVAL, "table is gone")])];
    let error = numbers(&mut conversation(answers)).unwrap_err();
    assert_eq!(error.to_string(), "count: table is gone (EINVAL)");
}

#[test]
fn an_end_whose_status_is_cut_short_is_malformed() {
    let end = message(NLMSG_DONE, NLM_F_MULTI, 1, &[0, 0]);
    let error = numbers(&mut conversation(vec![datagrams([part(1), end])])).unwrap_err();
    assert!(is_malformed(&error), "{error}");
}

#[test]
fn a_dump_without_end_is_an_error() {
    let error = numbers(&mut conversation(vec![datagrams([part(1), part(2)])])).unwrap_err();
    assert!(is_late(&error), "{error}");
}

#[test]
fn a_dump_of_which_a_datagram_is_lost_is_an_error() {
    for lost in [Reply::Errno(ENOBUFS), Reply::Truncated] {
        let mut replies = datagrams([part(1), part(2)]);
        replies.push(lost);
        replies.extend(datagrams([part(4), done(1, 0)]));
        numbers(&mut conversation(vec![replies])).unwrap_err();
    }
}

#[test]
fn a_dump_in_which_a_message_is_malformed_is_an_error() {
    let mut lie = part(3);
    lie[0] = 15;
    let answers = vec![datagrams([part(1), [part(2), lie].concat(), done(1, 0)])];
    assert!(is_malformed(&numbers(&mut conversation(answers)).unwrap_err()));
}

#[test]
fn a_part_that_cannot_be_used_fails_the_dump_and_leaves_the_conversation_whole() {
    let mut conversation = conversation(vec![
        datagrams([part(1), part(2), part(3), done(1, 0)]),
        datagrams([part(4), done(1, 0)]),
    ]);
    let error = conversation
        .dump(&question("count"), |all: &mut Vec<u32>, frame| {
            let number = u32_at(frame.payload, 0);
            if number == 2 {
                return Err(Op::new("count").malformed("two"));
            }
            all.push(number);
            Ok(())
        })
        .unwrap_err();
    assert!(is_malformed(&error), "{error}");
    assert_eq!(numbers(&mut conversation).unwrap(), [4]);
}
