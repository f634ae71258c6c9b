//! Golden bytes: what a running kernel has really sent, and what ctkeep sends to it.
//!
//! `entries/`, `events/` and `sockets/` were captured from Linux 6.18 by
//! [`capture`]; each file says of which entry or socket, in the words of `conntrack` and `ss`. The
//! expected values stand beside this file, written by hand from those words. `requests/` holds what
//! ctkeep asks; `CTKEEP_BLESS=1` rewrites it after a change that is meant.
//!
//! To capture again: `cargo test --test golden capture -- --ignored`, then review what changed;
//! identities, cookies and timeouts are new each time and must be carried over to these files.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod capture;
mod entries;
mod events;
#[path = "../lab/mod.rs"]
mod lab;
#[path = "../played/mod.rs"]
mod played;
mod requests;
mod sockets;

use std::cell::RefCell;
use std::io;
use std::rc::Rc;
use std::time::Duration;

use ctkeep::conntrack::{
    Change, Conntrack, Entry, EntryKey, Filter, Insert, SeqAdj, Status, SynProxy, TableSize, Tcp,
    TcpState, Zone, decode,
};
use ctkeep::flow::{AF_INET, AF_INET6, Connection, FourTuple};
use ctkeep::netlink::script::Reply;
use ctkeep::netlink::{Drained, KernelSocket, Transport, frames};
use ctkeep::sockdiag::{Cookie, Lookup, SockDiag, Socket, State, States};
use ctkeep::watch::ctnetlink::{Event, EventKind, Listener};
use played::hex::{self, assert_golden};
use played::{Played, flow, script};

/// A transport that plays a captured conversation: everything arrives after the first send.
fn replay(name: &str) -> Played {
    let mut datagrams = Some(hex::read(name));
    script(move |_| {
        let datagrams = datagrams.take().unwrap_or_default();
        datagrams.into_iter().map(Reply::Datagram).collect()
    })
}

/// The payload of the first message of a captured conversation.
fn first_payload(name: &str) -> Vec<u8> {
    let datagram = hex::read(name).remove(0);
    frames(&datagram).next().unwrap().unwrap().payload.to_vec()
}

fn seconds(seconds: u64) -> Option<Duration> {
    Some(Duration::from_secs(seconds))
}
