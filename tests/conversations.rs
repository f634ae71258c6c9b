//! Scripted conversations: every way in which an answer can be late, short, cut, false or missing.
//!
//! What the callers rely on, and what is tested here: a list is whole or an error, an unanswered
//! question never looks like an absent socket or entry, and nobody gets another one's answer.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

mod played;

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use ctkeep::conntrack::{
    Change, Conntrack, Entry, EntryKey, Filter, Insert, Status, TcpState, Zone,
};
use ctkeep::flow::{AF_INET, FourTuple};
use ctkeep::netlink::script::{Reply, Script};
use ctkeep::netlink::{Connection, Drained, Request, Transport};
use ctkeep::sockdiag::{Lookup, SockDiag, Socket, State, States};
use ctkeep::watch::ctnetlink::{EventKind, Listener};
use ctkeep::{Cause, Error, Op};
use played::{
    CT_DELETE, CT_GET, CT_GET_STATS, CT_NEW, EEXIST, EINVAL, ENOBUFS, ENOENT, EOPNOTSUPP, EPERM,
    NLM_F_ACK, NLM_F_CREATE, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_EXCL, NLM_F_MULTI, NLM_F_REQUEST,
    NLMSG_DONE, NLMSG_ERROR, NLMSG_NOOP, NLMSG_OVERRUN, Played, SOCK_DIAG_BY_FAMILY,
    TCPDIAG_GETSOCK, ack, attribute, done, done_because, dumped_states, entry, entry_message,
    entry_payload, flow, listed_socket, message, message_from, obliging, refusal, refusal_because,
    requests, reversed_entry, script, socket, socket_message, u16_at, u32_at,
    uncapped_refusal_because,
};

/// A message type that means nothing to the netlink layer.
const KIND: u16 = 0x77;

const SERVER: &str = "192.0.2.1:80";
const PEER: &str = "198.51.100.7:4000";
const OTHER_PEER: &str = "198.51.100.8:4000";

fn question(verb: &'static str) -> Request {
    Request { op: Op::new(verb), kind: KIND, flags: 0, body: vec![1, 2, 3, 4], joined: false }
}

fn datagrams(messages: impl IntoIterator<Item = Vec<u8>>) -> Vec<Reply> {
    messages.into_iter().map(Reply::Datagram).collect()
}

/// A kernel that answers the first send with the first of `answers`, and so on, with sequence
/// numbers as the request has them: a message built for number 1 gets that of the first request.
fn scripted(answers: Vec<Vec<Reply>>) -> Played {
    let mut answers = answers.into_iter();
    script(move |datagram| {
        let first = requests(datagram)[0].seq;
        let replies = answers.next().unwrap_or_default();
        replies.into_iter().map(|reply| renumbered(reply, first - 1)).collect()
    })
}

/// A datagram with `by` added to each sequence number in it.
fn renumbered(reply: Reply, by: u32) -> Reply {
    let Reply::Datagram(mut bytes) = reply else { return reply };
    let mut at = 0;
    while at + 16 <= bytes.len() {
        let seq = u32_at(&bytes, at + 8) + by;
        bytes[at + 8..at + 12].copy_from_slice(&seq.to_ne_bytes());
        at += (u32_at(&bytes, at) as usize).max(16).next_multiple_of(4);
    }
    Reply::Datagram(bytes)
}

fn connection(answers: Vec<Vec<Reply>>) -> Connection<Played> {
    Connection::new(scripted(answers))
}

/// One part of a dump: a message whose payload is one number.
fn part(number: u32) -> Vec<u8> {
    message(KIND, NLM_F_MULTI, 1, &number.to_ne_bytes())
}

fn interrupted_part(number: u32) -> Vec<u8> {
    message(KIND, NLM_F_MULTI | NLM_F_DUMP_INTR, 1, &number.to_ne_bytes())
}

fn numbers(connection: &mut Connection<Played>) -> ctkeep::Result<Vec<u32>> {
    connection.dump(&question("count"), |all: &mut Vec<u32>, frame| {
        all.push(u32_at(frame.payload, 0));
        Ok(())
    })
}

fn lookup(local: &str, remote: &str) -> Lookup {
    Lookup { flow: flow(local, remote), interface: 0 }
}

fn close_wait(remote: &str, cookie: u64) -> Socket {
    socket(SERVER, remote, State::CloseWait, cookie)
}

fn is_malformed(error: &Error) -> bool {
    matches!(*error.cause, Cause::Malformed(_))
}

fn is_late(error: &Error) -> bool {
    matches!(*error.cause, Cause::Late { .. })
}

fn is_overrun(error: &Error) -> bool {
    matches!(*error.cause, Cause::Overrun)
}

mod requests_and_acknowledgements {
    use super::*;

    #[test]
    fn an_acknowledged_request_has_succeeded() {
        connection(vec![datagrams([ack(1)])]).execute(&question("ask")).unwrap();
    }

    #[test]
    fn a_request_asks_for_its_acknowledgement_and_a_dump_does_not() {
        let flags = Rc::new(RefCell::new(Vec::new()));
        let seen = flags.clone();
        let mut connection = Connection::new(script(move |datagram| {
            let request = requests(datagram).remove(0);
            seen.borrow_mut().push(request.flags);
            datagrams([if request.is_dump() { done(request.seq, 0) } else { ack(request.seq) }])
        }));
        connection.execute(&Request { flags: NLM_F_CREATE, ..question("make") }).unwrap();
        numbers(&mut connection).unwrap();
        assert_eq!(
            *flags.borrow(),
            [NLM_F_REQUEST | NLM_F_ACK | NLM_F_CREATE, NLM_F_REQUEST | NLM_F_DUMP]
        );
    }

    #[test]
    fn a_refusal_names_the_operation_and_the_errno() {
        let answers = vec![datagrams([refusal(1, EPERM)])];
        let error = connection(answers).execute(&question("ask")).unwrap_err();
        assert_eq!(error.to_string(), "ask: operation not permitted (EPERM)");
        assert!(error.is_missing_privilege());
    }

    #[test]
    fn the_kernels_sentence_is_read_behind_a_capped_request() {
        let answers = vec![datagrams([refusal_because(1, EINVAL, "tuple lacks a zone")])];
        let error = connection(answers).execute(&question("ask")).unwrap_err();
        assert_eq!(error.to_string(), "ask: tuple lacks a zone (EINVAL)");
    }

    #[test]
    fn the_kernels_sentence_is_read_behind_a_whole_request_of_any_length() {
        for length in [16, 18, 20, 300] {
            let refusal = uncapped_refusal_because(1, EINVAL, length, "no such helper");
            let error =
                connection(vec![datagrams([refusal])]).execute(&question("ask")).unwrap_err();
            assert_eq!(error.to_string(), "ask: no such helper (EINVAL)", "length {length}");
        }
    }

    #[test]
    fn a_refusal_whose_sentence_is_cut_short_still_tells_its_errno() {
        let whole = refusal_because(1, ENOENT, "not there");
        for length in (20..whole.len()).step_by(4) {
            let mut cut = whole[..length].to_vec();
            cut[..4].copy_from_slice(&(length as u32).to_ne_bytes());
            let error = connection(vec![datagrams([cut])]).execute(&question("ask")).unwrap_err();
            assert!(error.is_absent(), "{length} bytes: {error}");
        }
    }

    #[test]
    fn a_refused_whole_request_that_lies_about_its_length_still_tells_its_errno() {
        let mut lie = uncapped_refusal_because(1, ENOENT, 20, "not there");
        lie[20..24].copy_from_slice(&u32::MAX.to_ne_bytes());
        let error = connection(vec![datagrams([lie])]).execute(&question("ask")).unwrap_err();
        assert!(error.is_absent(), "{error}");
    }

    #[test]
    fn an_acknowledgement_without_room_for_an_errno_is_malformed() {
        let short = message(NLMSG_ERROR, 0, 1, &[0, 0]);
        let error = connection(vec![datagrams([short])]).execute(&question("ask")).unwrap_err();
        assert!(is_malformed(&error), "{error}");
    }

    #[test]
    fn no_answer_is_an_error() {
        let error = connection(vec![vec![]]).execute(&question("ask")).unwrap_err();
        assert!(is_late(&error), "{error}");
    }

    #[test]
    fn an_answer_without_acknowledgement_is_an_error() {
        let mut seen = 0;
        let error = connection(vec![datagrams([part(7)])])
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
        connection(answers).execute(&question("ask")).unwrap();
    }

    #[test]
    fn an_empty_datagram_is_skipped() {
        connection(vec![datagrams([vec![], ack(1)])]).execute(&question("ask")).unwrap();
    }

    #[test]
    fn the_end_of_a_dump_that_nobody_asked_for_is_malformed() {
        let error = connection(vec![datagrams([done(1, 0)])]).execute(&question("ask"));
        assert!(is_malformed(&error.unwrap_err()));
    }

    #[test]
    fn late_answers_to_an_abandoned_request_are_skipped() {
        // The first request is never answered in time; its refusal arrives before the answer to
        // the second and must not be taken for it.
        let mut connection = Connection::new(script(|datagram| match requests(datagram)[0].seq {
            1 => vec![],
            seq => datagrams([refusal(seq - 1, EPERM), ack(seq)]),
        }));
        assert!(is_late(&connection.execute(&question("first")).unwrap_err()));
        connection.execute(&question("second")).unwrap();
    }

    #[test]
    fn late_parts_of_an_abandoned_dump_are_skipped() {
        let mut connection = Connection::new(script(|datagram| match requests(datagram)[0].seq {
            1 => datagrams([part(1)]),
            seq => datagrams([
                message(KIND, NLM_F_MULTI, seq - 1, &[2, 0, 0, 0]),
                done(seq - 1, 0),
                message(KIND, NLM_F_MULTI, seq, &[3, 0, 0, 0]),
                done(seq, 0),
            ]),
        }));
        assert!(is_late(&numbers(&mut connection).unwrap_err()));
        assert_eq!(numbers(&mut connection).unwrap(), [3]);
    }

    #[test]
    fn a_sequence_number_that_was_never_sent_is_an_error() {
        for seq in [2, 3, 1_000_000] {
            let error = connection(vec![datagrams([ack(seq)])]).execute(&question("ask"));
            assert!(is_malformed(&error.unwrap_err()), "number {seq}");
            let error = numbers(&mut connection(vec![datagrams([done(seq, 0)])]));
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
        let mut connection = Connection::new(Deaf);
        connection.execute(&question("ask")).unwrap_err();
        connection.dump(&question("count"), |(): &mut (), _| Ok(())).unwrap_err();
    }
}

/// The same damage in a single request, a batch and a dump.
mod damage {
    use super::*;

    /// Asks in every way, each time with `replies` in place of an answer.
    fn every_way(replies: &[Reply]) -> [Error; 3] {
        let single = connection(vec![replies.to_vec()]).execute(&question("single")).unwrap_err();
        let batch = connection(vec![replies.to_vec()])
            .batch(&[question("batch"), question("batch")], |_, _| Ok(()))
            .unwrap_err();
        let dump = numbers(&mut connection(vec![replies.to_vec()])).unwrap_err();
        [single, batch, dump]
    }

    #[test]
    fn a_datagram_cut_short_by_the_buffer_is_an_error() {
        for error in every_way(&[Reply::Truncated, Reply::Datagram(ack(1))]) {
            assert!(matches!(*error.cause, Cause::Truncated), "{error}");
            assert_eq!(error.reason(), "malformed");
        }
    }

    #[test]
    fn an_overrun_receive_buffer_is_an_error() {
        for error in every_way(&[Reply::Errno(ENOBUFS), Reply::Datagram(ack(1))]) {
            assert!(is_overrun(&error), "{error}");
            assert_eq!(error.reason(), "overrun");
        }
    }

    #[test]
    fn an_overrun_message_is_an_error() {
        let overrun = message(NLMSG_OVERRUN, 0, 1, &[]);
        for error in every_way(&datagrams([overrun, ack(1)])) {
            assert!(is_overrun(&error), "{error}");
        }
    }

    #[test]
    fn a_message_that_lies_about_its_length_is_an_error() {
        for length in [0_u32, 15, 37, 1 << 20, u32::MAX] {
            let mut lie = ack(1);
            assert_eq!(lie.len(), 36);
            lie[..4].copy_from_slice(&length.to_ne_bytes());
            for error in every_way(&datagrams([lie.clone(), ack(1)])) {
                assert!(is_malformed(&error), "length {length}: {error}");
            }
        }
    }

    #[test]
    fn a_datagram_that_ends_within_a_header_is_an_error() {
        for length in 1..16 {
            let short = ack(1)[..length].to_vec();
            for error in every_way(&datagrams([short, ack(1)])) {
                assert!(is_malformed(&error), "{length} bytes: {error}");
            }
        }
    }

    #[test]
    fn a_system_call_that_fails_is_an_error() {
        const ENOMEM: i32 = 12;
        for error in every_way(&[Reply::Errno(ENOMEM), Reply::Datagram(ack(1))]) {
            assert!(error.is_table_full() && matches!(*error.cause, Cause::Io(_)), "{error}");
        }
    }
}

mod dumps {
    use super::*;

    #[test]
    fn a_dump_split_over_many_datagrams_is_whole_and_in_order() {
        let mut replies = Vec::new();
        for chunk in (0..1000_u32).collect::<Vec<_>>().chunks(7) {
            replies.push(chunk.iter().flat_map(|number| part(*number)).collect::<Vec<u8>>());
        }
        replies.push(done(1, 0));
        let all = numbers(&mut connection(vec![datagrams(replies)])).unwrap();
        assert_eq!(all, (0..1000).collect::<Vec<_>>());
    }

    #[test]
    fn the_end_may_come_in_the_datagram_of_the_last_part() {
        let together = [part(1), part(2), done(1, 0)].concat();
        assert_eq!(numbers(&mut connection(vec![datagrams([together])])).unwrap(), [1, 2]);
    }

    #[test]
    fn an_end_without_status_is_an_end() {
        let end = message(NLMSG_DONE, NLM_F_MULTI, 1, &[]);
        assert_eq!(numbers(&mut connection(vec![datagrams([part(1), end])])).unwrap(), [1]);
    }

    #[test]
    fn an_interrupted_dump_is_begun_anew_and_counted() {
        let mut connection = connection(vec![
            datagrams([part(1), interrupted_part(2), part(3), done(1, 0)]),
            datagrams([part(10), done(1, 0)]),
        ]);
        // Nothing of the first attempt is left in the second.
        assert_eq!(numbers(&mut connection).unwrap(), [10]);
        assert_eq!(connection.interrupted_dumps(), 1);
    }

    #[test]
    fn a_dump_whose_end_says_interrupted_is_begun_anew() {
        let end = message(NLMSG_DONE, NLM_F_MULTI | NLM_F_DUMP_INTR, 1, &[0; 4]);
        let mut connection =
            connection(vec![datagrams([part(1), end]), datagrams([part(2), done(1, 0)])]);
        assert_eq!(numbers(&mut connection).unwrap(), [2]);
        assert_eq!(connection.interrupted_dumps(), 1);
    }

    #[test]
    fn a_dump_that_is_always_interrupted_is_an_error() {
        let sends = Rc::new(Cell::new(0_u64));
        let counted = sends.clone();
        let mut connection = Connection::new(script(move |datagram| {
            counted.set(counted.get() + 1);
            let by = requests(datagram)[0].seq - 1;
            datagrams([interrupted_part(1), done(1, 0)])
                .into_iter()
                .map(|reply| renumbered(reply, by))
                .collect()
        }));
        let error = numbers(&mut connection).unwrap_err();
        assert!(matches!(*error.cause, Cause::Interrupted { .. }), "{error}");
        assert_eq!(error.reason(), "interrupted");
        assert!(sends.get() > 1);
        assert_eq!(connection.interrupted_dumps(), sends.get());
    }

    #[test]
    fn a_dump_that_is_refused_at_once_is_an_error() {
        let error = numbers(&mut connection(vec![datagrams([refusal(1, EPERM)])])).unwrap_err();
        assert!(error.is_missing_privilege(), "{error}");
    }

    #[test]
    fn a_dump_that_ends_in_an_error_is_an_error() {
        let answers = vec![datagrams([part(1), part(2), done(1, EINVAL)])];
        let error = numbers(&mut connection(answers)).unwrap_err();
        assert_eq!(error.to_string(), "count: invalid argument (EINVAL)");
    }

    #[test]
    fn the_kernels_sentence_is_read_at_the_end_of_a_dump() {
        // There no copy of the request stands between the error number and the sentence.
        let answers = vec![datagrams([part(1), done_because(1, EINVAL, "table is gone")])];
        let error = numbers(&mut connection(answers)).unwrap_err();
        assert_eq!(error.to_string(), "count: table is gone (EINVAL)");
    }

    #[test]
    fn an_end_whose_status_is_cut_short_is_malformed() {
        let end = message(NLMSG_DONE, NLM_F_MULTI, 1, &[0, 0]);
        let error = numbers(&mut connection(vec![datagrams([part(1), end])])).unwrap_err();
        assert!(is_malformed(&error), "{error}");
    }

    #[test]
    fn a_dump_without_end_is_an_error() {
        let error = numbers(&mut connection(vec![datagrams([part(1), part(2)])])).unwrap_err();
        assert!(is_late(&error), "{error}");
    }

    #[test]
    fn a_dump_of_which_a_datagram_is_lost_is_an_error() {
        for lost in [Reply::Errno(ENOBUFS), Reply::Truncated] {
            let mut replies = datagrams([part(1), part(2)]);
            replies.push(lost);
            replies.extend(datagrams([part(4), done(1, 0)]));
            numbers(&mut connection(vec![replies])).unwrap_err();
        }
    }

    #[test]
    fn a_dump_in_which_a_message_is_malformed_is_an_error() {
        let mut lie = part(3);
        lie[0] = 15;
        let answers = vec![datagrams([part(1), [part(2), lie].concat(), done(1, 0)])];
        assert!(is_malformed(&numbers(&mut connection(answers)).unwrap_err()));
    }

    #[test]
    fn a_part_that_cannot_be_used_fails_the_dump_and_leaves_the_conversation_whole() {
        let mut connection = connection(vec![
            datagrams([part(1), part(2), part(3), done(1, 0)]),
            datagrams([part(4), done(1, 0)]),
        ]);
        let error = connection
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
        assert_eq!(numbers(&mut connection).unwrap(), [4]);
    }
}

mod batches {
    use super::*;

    fn many(count: usize) -> Vec<Request> {
        (0..count).map(|_| question("batch")).collect()
    }

    #[test]
    fn an_error_in_the_middle_does_not_stop_the_rest() {
        let mut connection = connection(vec![datagrams([ack(1), refusal(2, ENOENT), ack(3)])]);
        let outcomes = connection.batch(&many(3), |_, _| Ok(())).unwrap();
        assert!(outcomes[0].is_ok() && outcomes[2].is_ok());
        assert!(outcomes[1].as_ref().unwrap_err().is_absent());
    }

    #[test]
    fn every_answer_comes_with_the_index_of_its_question_however_many_sends_it_takes() {
        // Request n is answered by n % 3 messages.
        let mut connection = Connection::new(obliging(|request| {
            let n = request.seq - 1;
            Ok((0..n % 3).map(|_| message(KIND, 0, request.seq, &n.to_ne_bytes())).collect())
        }));
        let mut answers = vec![0; 1000];
        let outcomes = connection
            .batch(&many(1000), |index, frame| {
                assert_eq!(u32_at(frame.payload, 0) as usize, index);
                answers[index] += 1;
                Ok(())
            })
            .unwrap();
        assert_eq!(outcomes.len(), 1000);
        assert!(outcomes.iter().all(Result::is_ok));
        assert!(answers.iter().enumerate().all(|(index, count)| index % 3 == *count));
    }

    #[test]
    fn an_answer_that_cannot_be_used_fails_its_own_question_only() {
        let mut connection =
            Connection::new(obliging(|request| Ok(vec![message(KIND, 0, request.seq, &[])])));
        let outcomes = connection
            .batch(&many(3), |index, _| match index {
                1 => Err(Op::new("batch").malformed("one")),
                _ => Ok(()),
            })
            .unwrap();
        assert!(outcomes[0].is_ok() && outcomes[2].is_ok());
        assert!(is_malformed(outcomes[1].as_ref().unwrap_err()));
    }

    #[test]
    fn an_answer_that_is_missing_in_the_middle_is_an_error() {
        let error = connection(vec![datagrams([ack(1), ack(3)])])
            .batch(&many(3), |_, _| Ok(()))
            .unwrap_err();
        assert!(is_overrun(&error), "{error}");
    }

    #[test]
    fn an_answer_that_is_missing_at_the_end_is_an_error() {
        let error = connection(vec![datagrams([ack(1), ack(2)])])
            .batch(&many(3), |_, _| Ok(()))
            .unwrap_err();
        assert!(is_late(&error), "{error}");
    }

    #[test]
    fn an_acknowledgement_that_comes_twice_is_no_second_one() {
        let error = connection(vec![datagrams([ack(1), ack(1), ack(2)])])
            .batch(&many(3), |_, _| Ok(()))
            .unwrap_err();
        assert!(is_overrun(&error), "{error}");
    }

    #[test]
    fn a_batch_after_a_failed_one_is_not_disturbed_by_its_answers() {
        let mut connection = Connection::new(script(|datagram| {
            let first = requests(datagram)[0].seq;
            match first {
                1 => vec![Reply::Datagram(ack(1)), Reply::Errno(ENOBUFS)],
                _ => datagrams([refusal(2, EPERM), ack(3), ack(first), ack(first + 1)]),
            }
        }));
        assert!(is_overrun(&connection.batch(&many(3), |_, _| Ok(())).unwrap_err()));
        let outcomes = connection.batch(&many(2), |_, _| Ok(())).unwrap();
        assert!(outcomes.iter().all(Result::is_ok));
    }

    #[test]
    fn no_requests_are_no_send() {
        let mut connection = Connection::new(script(|_| panic!("a send")));
        assert!(connection.batch(&[], |_, _| Ok(())).unwrap().is_empty());
    }

    #[test]
    fn messages_of_odd_length_are_padded_but_not_prolonged() {
        let mut connection = Connection::new(script(|datagram| {
            assert_eq!(datagram.len() % 4, 0);
            let lengths: Vec<usize> =
                requests(datagram).iter().map(|request| request.body.len()).collect();
            assert_eq!(lengths, [0, 1, 2, 3, 4]);
            datagrams((1..=5).map(ack))
        }));
        let requests: Vec<_> =
            (0..5).map(|length| Request { body: vec![9; length], ..question("odd") }).collect();
        connection.batch(&requests, |_, _| Ok(())).unwrap();
    }

    /// How many messages each send had.
    fn sends(requests: &[Request]) -> Vec<Vec<Vec<u8>>> {
        let sends = Rc::new(RefCell::new(Vec::new()));
        let seen = sends.clone();
        let mut connection = Connection::new(script(move |datagram| {
            let requests = self::requests(datagram);
            let acks = datagrams(requests.iter().map(|request| ack(request.seq)));
            seen.borrow_mut().push(requests.into_iter().map(|request| request.body).collect());
            acks
        }));
        let outcomes = connection.batch(requests, |_, _| Ok(())).unwrap();
        assert_eq!(outcomes.len(), requests.len());
        sends.take()
    }

    #[test]
    fn a_send_has_at_most_sixty_four_messages() {
        let sends = sends(&many(1000));
        assert!(sends.iter().all(|send| send.len() <= 64));
        assert_eq!(sends.iter().map(Vec::len).sum::<usize>(), 1000);
        assert_eq!(sends.len(), 16);
    }

    #[test]
    fn joined_requests_travel_in_one_send_wherever_they_stand() {
        // Pairs behind 0 to 70 single requests, so that every place of a pair meets the border.
        for singles in 0..70 {
            let mut requests = many(singles);
            for _ in 0..40 {
                requests.push(Request { joined: true, body: vec![1; 4], ..question("delete") });
                requests.push(Request { body: vec![2; 4], ..question("insert") });
            }
            for send in sends(&requests) {
                assert!(send.len() <= 64);
                assert_ne!(send[0], [2; 4], "{singles} singles: an insert without its delete");
                assert_ne!(send[send.len() - 1], [1; 4], "{singles} singles: torn pair");
            }
        }
    }
}

mod transactions {
    use super::*;

    /// Three messages between a beginning and an end, over this kernel.
    fn run(kernel: impl FnMut(&[u8]) -> Vec<Reply> + 'static) -> ctkeep::Result<()> {
        let mut connection = Connection::new(script(kernel));
        let messages = [question("one"), question("two"), question("three")];
        connection.transaction(&question("begin"), &messages, &question("end"))
    }

    #[test]
    fn a_transaction_is_one_send_of_which_only_the_messages_are_acknowledged() {
        run(|datagram| {
            let requests = requests(datagram);
            let flags: Vec<_> = requests.iter().map(|request| request.flags).collect();
            let acknowledged = NLM_F_REQUEST | NLM_F_ACK;
            assert_eq!(
                flags,
                [NLM_F_REQUEST, acknowledged, acknowledged, acknowledged, NLM_F_REQUEST]
            );
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
        let mut connection = Connection::new(script(|datagram| match requests(datagram)[0].seq {
            1 => datagrams([refusal(2, EINVAL), refusal(3, EPERM), ack(4)]),
            seq => datagrams([ack(seq)]),
        }));
        let messages = [question("one"), question("two"), question("three")];
        let answer = connection.transaction(&question("begin"), &messages, &question("end"));
        assert_eq!(answer.unwrap_err().errno().map(|errno| errno as i32), Some(EINVAL));
        connection.execute(&question("next")).unwrap();
    }
}

mod conntrack {
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
        for found in
            [entry(tuple(), TcpState::Close, 9), reversed_entry(tuple(), TcpState::Close, 9)]
        {
            let mut table = Conntrack::new(obliging(move |request| {
                Ok(vec![entry_message(request.seq, &found)])
            }));
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
        let all = table
            .entries(AF_INET, Filter::Tcp, |all: &mut Vec<_>, entry| all.push(*entry))
            .unwrap();
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
            seen.borrow_mut().push(
                requests.iter().map(|request| (request.kind, request.flags)).collect::<Vec<_>>(),
            );
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
}

mod sockets {
    use super::*;

    fn all() -> States {
        States::connected()
    }

    /// A kernel that dumps these message by message.
    fn dumping(payloads: Result<Vec<Vec<u8>>, i32>) -> SockDiag<Played> {
        SockDiag::new(obliging(move |request| {
            dumped_states(request);
            let part = |payload| message(TCPDIAG_GETSOCK, NLM_F_MULTI, request.seq, payload);
            payloads.as_ref().map(|all| all.iter().map(|it| part(it)).collect()).map_err(|e| *e)
        }))
    }

    #[test]
    fn both_families_are_dumped_at_once_with_the_states_as_the_kernels_mask() {
        let asked = Rc::new(RefCell::new(Vec::new()));
        let seen = asked.clone();
        let mut diag = SockDiag::new(obliging(move |request| {
            assert!(request.is_dump());
            seen.borrow_mut().push(dumped_states(request));
            Ok(vec![])
        }));
        diag.sockets(States::from_iter([State::CloseWait, State::Established])).unwrap();
        assert_eq!(*asked.borrow(), [1 << 8 | 1 << 1]);
    }

    #[test]
    fn a_socket_that_a_dump_reports_twice_is_reported_once() {
        let (one, two) = (close_wait(PEER, 1), close_wait(OTHER_PEER, 2));
        let payloads = [one, two, one].map(|socket| played::socket_payload(&socket));
        let mut diag = dumping(Ok(payloads.to_vec()));
        assert_eq!(diag.sockets(all()).unwrap(), [one, two]);
    }

    #[test]
    fn the_ipv4_peer_of_a_dual_stack_listener_has_an_ipv4_address() {
        let wanted = close_wait(PEER, 1);
        let mut diag = dumping(Ok(vec![played::mapped_socket_payload(&wanted)]));
        assert_eq!(diag.sockets(all()).unwrap(), [wanted]);
        assert_eq!(wanted.flow().family(), AF_INET);
    }

    #[test]
    fn sockets_of_both_families_are_reported() {
        let v4 = close_wait(PEER, 1);
        let v6 = socket("[2001:db8::1]:80", "[2001:db8:1::7]:4000", State::CloseWait, 2);
        let mut diag = dumping(Ok([v4, v6].iter().map(played::socket_payload).collect()));
        assert_eq!(diag.sockets(all()).unwrap(), [v4, v6]);
    }

    #[test]
    fn a_kernel_without_tcp_diag_is_unavailable_and_the_module_is_named() {
        // Without tcp_diag, and without inet_diag below it.
        for answer in [
            dumping(Err(ENOENT)).sockets(all()).map(drop),
            dumping(Err(ENOENT)).listeners().map(drop),
            dumping(Err(ENOENT)).probe(),
            dumping(Err(EOPNOTSUPP)).probe(),
        ] {
            let error = answer.unwrap_err();
            assert!(error.is_unavailable(), "{error}");
            assert!(error.to_string().contains("tcp_diag"), "{error}");
        }
    }

    #[test]
    fn a_refused_dump_is_an_error() {
        dumping(Err(EPERM)).sockets(all()).unwrap_err();
    }

    #[test]
    fn a_socket_cut_short_fails_the_dump() {
        let payload = played::socket_payload(&close_wait(PEER, 1));
        let cut = payload[..60].to_vec();
        let error = dumping(Ok(vec![payload, cut])).sockets(all()).unwrap_err();
        assert!(is_malformed(&error), "{error}");
    }

    #[test]
    fn a_state_that_only_newer_kernels_know_is_passed_over() {
        let wanted = close_wait(PEER, 1);
        let mut unknown = played::socket_payload(&close_wait(OTHER_PEER, 2));
        // TCP_BOUND_INACTIVE, since 6.8: a socket without peer.
        unknown[1] = 13;
        let mut diag = dumping(Ok(vec![unknown, played::socket_payload(&wanted)]));
        assert_eq!(diag.sockets(all()).unwrap(), [wanted]);
    }

    #[test]
    fn a_look_up_asks_for_the_tuple_whatever_the_cookie() {
        let mut diag = SockDiag::new(obliging(|request| {
            let body = &request.body;
            assert!(!request.is_dump());
            assert_eq!((body[0], body[1]), (2, 6));
            assert_eq!(body[8..12], [0, 80, 0x0f, 0xa0]);
            assert_eq!(body[12..16], [192, 0, 2, 1]);
            assert_eq!(body[28..32], [198, 51, 100, 7]);
            assert_eq!(u32_at(body, 44), 3);
            assert_eq!(body[48..56], [0xff; 8]);
            Err(ENOENT)
        }));
        let asked = Lookup { interface: 3, ..lookup(SERVER, PEER) };
        assert_eq!(diag.lookup(&[asked]).unwrap(), [None]);
    }

    #[test]
    fn sockets_come_in_the_order_asked_with_none_for_the_gone() {
        let present = close_wait(OTHER_PEER, 2);
        let mut diag = SockDiag::new(obliging(move |request| match request.seq {
            2 => Ok(vec![socket_message(2, &present)]),
            _ => Err(ENOENT),
        }));
        let lookups = [PEER, OTHER_PEER, PEER].map(|peer| lookup(SERVER, peer));
        assert_eq!(diag.lookup(&lookups).unwrap(), [None, Some(present), None]);
    }

    #[test]
    fn the_listener_of_a_port_is_no_answer_for_a_connection() {
        let mut listener = socket(SERVER, "0.0.0.0:0", State::Listen, 9);
        for (local, remote) in [("0.0.0.0:80", "0.0.0.0:0"), (SERVER, PEER)] {
            // The second says LISTEN and has, by whatever error, the very tuple.
            (listener.local, listener.remote) = (played::endpoint(local), played::endpoint(remote));
            let mut diag = SockDiag::new(obliging(move |request| {
                Ok(vec![socket_message(request.seq, &listener)])
            }));
            assert_eq!(diag.lookup(&[lookup(SERVER, PEER)]).unwrap(), [None]);
        }
    }

    #[test]
    fn a_socket_of_another_tuple_is_none() {
        for other in [
            close_wait(OTHER_PEER, 2),
            socket("192.0.2.1:81", PEER, State::CloseWait, 3),
            socket(PEER, SERVER, State::CloseWait, 4),
        ] {
            let mut diag = SockDiag::new(obliging(move |request| {
                Ok(vec![socket_message(request.seq, &other)])
            }));
            assert_eq!(diag.lookup(&[lookup(SERVER, PEER)]).unwrap(), [None]);
        }
    }

    #[test]
    fn an_unanswered_look_up_is_never_none() {
        let lookups = [lookup(SERVER, PEER); 2];
        let whole = socket_message(1, &close_wait(PEER, 1));
        let cut = message(SOCK_DIAG_BY_FAMILY, 0, 1, &whole[16..80]);
        let foreign = message(KIND, 0, 1, &whole[16..]);
        for (case, replies) in [
            ("silence", vec![]),
            ("half of it", datagrams([whole.clone()])),
            ("first answer lost", datagrams([refusal(2, ENOENT)])),
            ("no privilege", datagrams([refusal(1, EPERM), refusal(2, EPERM)])),
            ("no privilege for one", datagrams([refusal(1, ENOENT), refusal(2, EPERM)])),
            ("acknowledged without a socket", datagrams([ack(1), ack(2)])),
            ("cut socket", datagrams([cut, refusal(2, ENOENT)])),
            ("a message of another kind", datagrams([foreign, refusal(2, ENOENT)])),
            ("overrun", vec![Reply::Errno(ENOBUFS)]),
            ("truncated", vec![Reply::Truncated]),
        ] {
            let mut diag = SockDiag::new(scripted(vec![replies]));
            let answer = diag.lookup(&lookups);
            assert!(answer.is_err(), "{case}: {answer:?}");
        }
    }

    #[test]
    fn many_look_ups_travel_in_few_sends() {
        let sends = Rc::new(Cell::new(0));
        let count = sends.clone();
        let mut diag = SockDiag::new(script(move |datagram| {
            count.set(count.get() + 1);
            let requests = requests(datagram);
            assert!(requests.len() <= 64);
            datagrams(requests.iter().map(|request| refusal(request.seq, ENOENT)))
        }));
        let lookups = vec![lookup(SERVER, PEER); 640];
        assert_eq!(diag.lookup(&lookups).unwrap(), vec![None; 640]);
        assert_eq!(sends.get(), 10);
    }

    /// A namespace in which these sockets are, and nothing else.
    fn namespace(sockets: Vec<Socket>) -> SockDiag<Played> {
        SockDiag::new(obliging(move |request| {
            if request.is_dump() {
                let listed = |socket| listed_socket(request.seq, socket);
                return Ok(sockets.iter().map(listed).collect());
            }
            let port = u16::from_be_bytes([request.body[10], request.body[11]]);
            let socket = sockets.iter().find(|socket| socket.remote.port() == port);
            Ok(vec![socket_message(request.seq, socket.ok_or(ENOENT)?)])
        }))
    }

    #[test]
    fn sockets_of_several_namespaces_are_found_in_whichever_has_them() {
        let (here, there) = (close_wait(PEER, 1), close_wait("198.51.100.7:4001", 2));
        let mut diag = namespace(vec![here]).and(namespace(vec![there]));
        let nowhere = lookup(SERVER, "198.51.100.7:4002");
        let lookups = [nowhere, Lookup::from(&there), Lookup::from(&here)];
        assert_eq!(diag.lookup(&lookups).unwrap(), [None, Some(there), Some(here)]);
        assert_eq!(diag.sockets(all()).unwrap(), [here, there]);
    }

    #[test]
    fn one_namespace_that_does_not_answer_fails_them_all() {
        let here = close_wait(PEER, 1);
        let silent = || SockDiag::new(script(|_| vec![]));
        let nowhere = lookup(SERVER, "198.51.100.7:4002");
        for mut diag in [namespace(vec![here]).and(silent()), silent().and(namespace(vec![here]))] {
            diag.sockets(all()).unwrap_err();
            diag.lookup(&[nowhere]).unwrap_err();
        }
    }

    #[test]
    fn no_look_ups_are_no_send() {
        let mut diag = SockDiag::new(script(|_| panic!("a send")));
        assert_eq!(diag.lookup(&[]).unwrap(), []);
    }
}

mod events {
    use super::*;

    /// A listener with these replies queued.
    fn listener(replies: Vec<Reply>) -> Listener<Script<impl FnMut(&[u8]) -> Vec<Reply>>> {
        let mut replies = Some(replies);
        let mut script = Script::new(move |_: &[u8]| replies.take().unwrap_or_default());
        // The played kernel speaks only when spoken to.
        script.send(&[]).unwrap();
        Listener::new(script)
    }

    fn drain(replies: Vec<Reply>) -> (Vec<ctkeep::watch::ctnetlink::Event>, Drained) {
        let mut events = Vec::new();
        let drained = listener(replies).drain(1000, |event| events.push(event)).unwrap();
        (events, drained)
    }

    fn event(kind: u16, flags: u16, port: u32, entry: &Entry) -> Reply {
        Reply::Datagram(message_from(port, kind, flags, 0, &entry_payload(entry)))
    }

    fn closed() -> Entry {
        entry(flow(SERVER, PEER), TcpState::Close, 10)
    }

    #[test]
    fn updates_and_ends_are_told_with_the_port_of_their_cause() {
        let (events, drained) =
            drain(vec![event(CT_NEW, 0, 0, &closed()), event(CT_DELETE, 0, 4242, &closed())]);
        assert_eq!(drained, Drained::default());
        let told: Vec<_> = events.iter().map(|event| (event.kind, event.port)).collect();
        assert_eq!(told, [(EventKind::Update, 0), (EventKind::Destroy, 4242)]);
        assert!(events.iter().all(|event| event.entry == closed()));
    }

    #[test]
    fn new_entries_are_not_told() {
        let (events, drained) = drain(vec![event(CT_NEW, NLM_F_CREATE | NLM_F_EXCL, 0, &closed())]);
        assert_eq!((events.len(), drained), (0, Drained::default()));
    }

    #[test]
    fn messages_of_other_kinds_are_not_told() {
        let (events, drained) = drain(vec![event(CT_GET, 0, 0, &closed())]);
        assert_eq!((events.len(), drained), (0, Drained::default()));
    }

    #[test]
    fn an_overrun_is_told_and_the_events_behind_it_too() {
        let (events, drained) = drain(vec![Reply::Errno(ENOBUFS), event(CT_NEW, 0, 0, &closed())]);
        assert!(drained.overrun);
        assert_eq!((events.len(), drained.malformed), (1, 0));
    }

    #[test]
    fn what_cannot_be_read_is_counted_and_does_not_hide_the_rest() {
        let mut lie = message(CT_NEW, 0, 0, &entry_payload(&closed()));
        lie[0] = 15;
        let cut = message(CT_NEW, 0, 0, &entry_payload(&closed())[..40]);
        let (events, drained) = drain(vec![
            Reply::Datagram(lie),
            Reply::Datagram(cut),
            Reply::Truncated,
            event(CT_NEW, 0, 0, &closed()),
        ]);
        assert!(!drained.overrun);
        assert_eq!((events.len(), drained.malformed), (1, 3));
    }

    #[test]
    fn many_events_in_one_datagram_are_all_told() {
        let one = message(CT_NEW, 0, 0, &entry_payload(&closed()));
        let (events, _) = drain(vec![Reply::Datagram(one.repeat(50))]);
        assert_eq!(events.len(), 50);
    }

    #[test]
    fn a_drain_stops_at_its_limit_and_goes_on_at_the_next() {
        let mut listener = listener((0..10).map(|_| event(CT_NEW, 0, 0, &closed())).collect());
        let mut count = 0;
        listener.drain(4, |_| count += 1).unwrap();
        assert_eq!(count, 4);
        listener.drain(100, |_| count += 1).unwrap();
        assert_eq!(count, 10);
    }

    #[test]
    fn a_broken_socket_is_an_error() {
        const EBADF: i32 = 9;
        listener(vec![Reply::Errno(EBADF)]).drain(10, |_| ()).unwrap_err();
    }
}

/// The kernel lies: any damage to valid answers, anywhere.
mod hostile {
    use proptest::prelude::*;

    use super::*;

    /// One thing that goes wrong with the answers to one send.
    #[derive(Clone, Debug)]
    enum Damage {
        Byte {
            datagram: usize,
            at: usize,
            value: u8,
        },
        /// Most fields that matter are words at aligned places: lengths, types, numbers.
        Word {
            datagram: usize,
            at: usize,
            value: u32,
        },
        Cut {
            datagram: usize,
            length: usize,
        },
        Grow {
            datagram: usize,
            bytes: Vec<u8>,
        },
        Drop {
            datagram: usize,
        },
        Repeat {
            datagram: usize,
        },
        Swap {
            datagram: usize,
            with: usize,
        },
        Join {
            datagram: usize,
        },
        Noise {
            datagram: usize,
            bytes: Vec<u8>,
        },
        Errno {
            datagram: usize,
            errno: i32,
        },
        Truncated {
            datagram: usize,
        },
    }

    fn damage() -> impl Strategy<Value = Damage> {
        use Damage::*;
        let datagram = 0..8_usize;
        let words = prop_oneof![
            any::<u32>(),
            0..64_u32,
            Just(u32::MAX),
            Just(0x0006_0005),
            Just(u32::from(NLMSG_ERROR)),
            Just(u32::from(NLMSG_DONE)),
            Just(u32::from(SOCK_DIAG_BY_FAMILY)),
        ];
        let bytes = proptest::collection::vec(any::<u8>(), 1..80);
        prop_oneof![
            4 => (datagram.clone(), any::<usize>(), any::<u8>())
                .prop_map(|(datagram, at, value)| Byte { datagram, at, value }),
            4 => (datagram.clone(), any::<usize>(), words)
                .prop_map(|(datagram, at, value)| Word { datagram, at, value }),
            2 => (datagram.clone(), any::<usize>())
                .prop_map(|(datagram, length)| Cut { datagram, length }),
            1 => (datagram.clone(), bytes.clone())
                .prop_map(|(datagram, bytes)| Grow { datagram, bytes }),
            1 => datagram.clone().prop_map(|datagram| Drop { datagram }),
            1 => datagram.clone().prop_map(|datagram| Repeat { datagram }),
            1 => (datagram.clone(), datagram.clone())
                .prop_map(|(datagram, with)| Swap { datagram, with }),
            1 => datagram.clone().prop_map(|datagram| Join { datagram }),
            1 => (datagram.clone(), bytes)
                .prop_map(|(datagram, bytes)| Noise { datagram, bytes }),
            1 => (datagram.clone(), prop_oneof![Just(ENOBUFS), Just(EPERM), Just(ENOENT)])
                .prop_map(|(datagram, errno)| Errno { datagram, errno }),
            1 => datagram.prop_map(|datagram| Truncated { datagram }),
        ]
    }

    impl Damage {
        fn apply(&self, replies: &mut Vec<Reply>) {
            let count = replies.len();
            if count == 0 {
                return;
            }
            let place = |datagram: usize| datagram % count;
            // A change to bytes where there are some.
            let bytes = |replies: &mut Vec<Reply>, datagram: usize, f: &dyn Fn(&mut Vec<u8>)| {
                if let Reply::Datagram(bytes) = &mut replies[place(datagram)]
                    && !bytes.is_empty()
                {
                    f(bytes);
                }
            };
            match self {
                Self::Byte { datagram, at, value } => bytes(replies, *datagram, &|bytes| {
                    let at = at % bytes.len();
                    bytes[at] = *value;
                }),
                Self::Word { datagram, at, value } => bytes(replies, *datagram, &|bytes| {
                    let at = at % bytes.len() / 4 * 4;
                    let word = value.to_ne_bytes();
                    let room = word.len().min(bytes.len() - at);
                    bytes[at..at + room].copy_from_slice(&word[..room]);
                }),
                Self::Cut { datagram, length } => bytes(replies, *datagram, &|bytes| {
                    bytes.truncate(length % bytes.len());
                }),
                Self::Grow { datagram, bytes: more } => bytes(replies, *datagram, &|bytes| {
                    bytes.extend(more);
                }),
                Self::Drop { datagram } => drop(replies.remove(place(*datagram))),
                Self::Repeat { datagram } => {
                    replies.insert(place(*datagram), replies[place(*datagram)].clone());
                }
                Self::Swap { datagram, with } => replies.swap(place(*datagram), place(*with)),
                Self::Join { datagram } => {
                    let at = place(*datagram);
                    if let (Some(Reply::Datagram(next)), Reply::Datagram(_)) =
                        (replies.get(at + 1).cloned(), &replies[at])
                    {
                        bytes(replies, at, &|bytes| bytes.extend(&next));
                        replies.remove(at + 1);
                    }
                }
                Self::Noise { datagram, bytes } => {
                    replies.insert(place(*datagram), Reply::Datagram(bytes.clone()));
                }
                Self::Errno { datagram, errno } => {
                    replies.insert(place(*datagram), Reply::Errno(*errno));
                }
                Self::Truncated { datagram } => {
                    replies.insert(place(*datagram), Reply::Truncated);
                }
            }
        }
    }

    /// A kernel that means well, and damage on the way from it.
    fn damaged(
        answer: impl Fn(&played::Request) -> Result<Vec<Vec<u8>>, i32> + 'static,
        damage: Vec<Damage>,
    ) -> Played {
        script(move |datagram| {
            let mut replies = Vec::new();
            for request in requests(datagram) {
                let end = match answer(&request) {
                    Ok(messages) => {
                        replies.extend(datagrams(messages));
                        if request.is_dump() { done(request.seq, 0) } else { ack(request.seq) }
                    }
                    Err(errno) => refusal_because(request.seq, errno, "not there"),
                };
                replies.push(Reply::Datagram(end));
            }
            damage.iter().for_each(|damage| damage.apply(&mut replies));
            replies
        })
    }

    /// Four look-ups: present, gone, listener, present.
    fn asked() -> [FourTuple; 4] {
        [4000, 4001, 4002, 4003].map(|port| flow(SERVER, &format!("198.51.100.7:{port}")))
    }

    fn socket_answer(request: &played::Request) -> Result<Vec<Vec<u8>>, i32> {
        if request.is_dump() {
            let sockets = asked()
                .map(|flow| socket_message(request.seq, &close_wait(&flow.dst.to_string(), 7)));
            return Ok(sockets.to_vec());
        }
        let port = u16_at(&request.body, 10).to_be();
        match port {
            4001 => Err(ENOENT),
            4002 => {
                let listener = socket("0.0.0.0:80", "0.0.0.0:0", State::Listen, 9);
                Ok(vec![socket_message(request.seq, &listener)])
            }
            _ => {
                let peer = format!("198.51.100.7:{port}");
                Ok(vec![socket_message(request.seq, &close_wait(&peer, u64::from(port)))])
            }
        }
    }

    fn entry_answer(request: &played::Request) -> Result<Vec<Vec<u8>>, i32> {
        let entries = asked().map(|flow| entry(flow, TcpState::CloseWait, 60));
        if request.is_dump() {
            return Ok(entries.iter().map(|entry| entry_message(request.seq, entry)).collect());
        }
        match request.kind {
            CT_GET_STATS => {
                let payload = [vec![0; 4], attribute(1, &7_u32.to_be_bytes())].concat();
                Ok(vec![message(CT_GET_STATS, 0, request.seq, &payload)])
            }
            CT_GET => {
                let port = played::descend(&request.body[4..], &[1, 2, 3]).unwrap();
                let port = u16::from_be_bytes(port.try_into().unwrap());
                let entry = entries.iter().find(|entry| entry.reply.dst.port() == port);
                match entry {
                    Some(entry) if port != 4001 => Ok(vec![entry_message(request.seq, entry)]),
                    _ => Err(ENOENT),
                }
            }
            _ => Ok(vec![]),
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

        #[test]
        fn no_damage_makes_a_look_up_find_the_socket_of_another_tuple(
            damage in proptest::collection::vec(damage(), 1..4)
        ) {
            let mut diag = SockDiag::new(damaged(socket_answer, damage));
            let lookups = asked().map(|flow| Lookup { flow, interface: 0 });
            // The second round meets what the first has left behind.
            for _ in 0..2 {
                let Ok(found) = diag.lookup(&lookups) else { continue };
                prop_assert_eq!(found.len(), lookups.len());
                for (lookup, socket) in lookups.iter().zip(found) {
                    if let Some(socket) = socket {
                        prop_assert_eq!(socket.flow(), lookup.flow);
                        prop_assert_ne!(socket.state, State::Listen);
                    }
                }
            }
            let _ = diag.sockets(States::connected());
        }

        #[test]
        fn no_damage_makes_a_question_find_the_entry_of_another_tuple(
            damage in proptest::collection::vec(damage(), 1..4)
        ) {
            let mut table = Conntrack::new(damaged(entry_answer, damage));
            let keys = asked().map(|flow| (flow, Zone::default()));
            for _ in 0..2 {
                let Ok(found) = table.get(&keys) else { continue };
                prop_assert_eq!(found.len(), keys.len());
                for ((flow, _), entry) in keys.iter().zip(found) {
                    if let Some(entry) = entry {
                        prop_assert!(entry.orig == *flow || entry.reply == *flow);
                    }
                }
            }
            let _ = table.size();
            let _ = table.entries(AF_INET, Filter::Tcp, |all: &mut Vec<_>, e| all.push(*e));
        }

        #[test]
        fn no_damage_gives_changes_more_or_fewer_results_than_there_are_changes(
            damage in proptest::collection::vec(damage(), 1..4)
        ) {
            let mut table = Conntrack::new(damaged(entry_answer, damage));
            let changes = asked().map(|flow| {
                let key = EntryKey { zone: Zone::default(), orig: flow.inverse() };
                let like = Entry::plain(flow.inverse(), Zone::default());
                let timeout = Duration::from_secs(60);
                let state = TcpState::CloseWait;
                let new = Insert { like, state, status: Status::FRESH, timeout };
                Change::Replace { old: key, id: None, new }
            });
            if let Ok(results) = table.change(&changes) {
                prop_assert_eq!(results.len(), changes.len());
            }
        }

        #[test]
        fn no_damage_makes_the_listener_panic(
            damage in proptest::collection::vec(damage(), 1..4)
        ) {
            let event = entry(flow(SERVER, PEER), TcpState::Close, 10);
            let mut script = script(move |_| {
                let mut replies: Vec<Reply> = (0..6_u16)
                    .map(|n| message_from(n.into(), [CT_NEW, CT_DELETE][usize::from(n % 2)], 0, 0,
                        &entry_payload(&event)))
                    .map(Reply::Datagram)
                    .collect();
                damage.iter().for_each(|damage| damage.apply(&mut replies));
                replies
            });
            script.send(&[]).unwrap();
            let _ = Listener::new(script).drain(100, |_| ());
        }
    }
}
