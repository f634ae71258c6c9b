//! The same damage in a single request, a batch and a dump.

use super::*;

/// Asks in every way, each time with `replies` in place of an answer.
fn every_way(replies: &[Reply]) -> [Error; 3] {
    let single = conversation(vec![replies.to_vec()]).execute(&question("single")).unwrap_err();
    let batch = conversation(vec![replies.to_vec()])
        .batch(&[question("batch"), question("batch")], |_, _| Ok(()))
        .unwrap_err();
    let dump = numbers(&mut conversation(vec![replies.to_vec()])).unwrap_err();
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
