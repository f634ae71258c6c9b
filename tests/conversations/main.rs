//! Scripted conversations: every way in which an answer can be late, short, cut, false or missing.
//!
//! What the callers rely on, and what is tested here: a list is whole or an error, an unanswered
//! question never looks like an absent socket or entry, and nobody gets another one's answer.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing, clippy::cast_possible_truncation)]

mod batches;
mod conntrack;
mod damage;
mod dumps;
mod events;
mod hostile;
#[path = "../played/mod.rs"]
mod played;
mod requests_and_acknowledgements;
mod sockets;
mod transactions;

use std::cell::{Cell, RefCell};
use std::io;
use std::rc::Rc;
use std::time::Duration;

use ctkeep::conntrack::{
    Change, Conntrack, Entry, EntryKey, Filter, Insert, Status, TcpState, Zone,
};
use ctkeep::flow::{AF_INET, Connection, FourTuple};
use ctkeep::netlink::script::{Reply, Script};
use ctkeep::netlink::{Conversation, Drained, Request, Transport};
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

fn conversation(answers: Vec<Vec<Reply>>) -> Conversation<Played> {
    Conversation::new(scripted(answers))
}

/// One part of a dump: a message whose payload is one number.
fn part(number: u32) -> Vec<u8> {
    message(KIND, NLM_F_MULTI, 1, &number.to_ne_bytes())
}

fn interrupted_part(number: u32) -> Vec<u8> {
    message(KIND, NLM_F_MULTI | NLM_F_DUMP_INTR, 1, &number.to_ne_bytes())
}

fn numbers(conversation: &mut Conversation<Played>) -> ctkeep::Result<Vec<u32>> {
    conversation.dump(&question("count"), |all: &mut Vec<u32>, frame| {
        all.push(u32_at(frame.payload, 0));
        Ok(())
    })
}

fn lookup(local: &str, remote: &str) -> Lookup {
    Lookup { connection: Connection::of_sender(flow(local, remote)), interface: 0 }
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
