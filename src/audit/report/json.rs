//! The report as JSON, by docs/audit.schema.json. Pure.
//!
//! Connections and sources are made while they are written, one by one: a tree of values for each of tens
//! of thousands took a quarter of the program's own time, and much of its memory.

use std::fmt;

use serde::{Serialize, Serializer};
use serde_json::{Value, json};

use super::{Report, ReportedConnection};
use crate::audit::cover::Coverage;
use crate::audit::layers::Layers;
use crate::audit::sources::Source;
use crate::conntrack::TcpState;
use crate::flow::Endpoint;
use crate::reconcile::snapshot::View;

/// A report; keys are written in this order.
#[derive(Serialize)]
struct Json<'r, C: Serialize, S: Serialize> {
    schema: u8,
    generated_at: String,
    kernel: &'r str,
    netns: &'r str,
    limit: Option<u32>,
    mask: u8,
    mask6: u8,
    summary: Value,
    outgoing: Option<Value>,
    connections: C,
    sources: S,
    layers: &'r Layers,
}

#[derive(Serialize)]
struct Connection<'r> {
    local: Text<Endpoint>,
    remote: Text<Endpoint>,
    socket_state: Option<&'static str>,
    entry_state: Option<&'static str>,
    entry_timeout_seconds: Option<u64>,
    unreplied: Option<bool>,
    zone: u16,
    other_zones: &'r [u16],
    class: &'static str,
    asked: Option<Text<Endpoint>>,
    client: Option<Text<Endpoint>>,
    container: Option<&'r str>,
    pid: Option<i32>,
    command: Option<&'r str>,
    processes: Option<usize>,
    inode: Option<u32>,
    uid: Option<u32>,
    recv_queue: Option<u32>,
    send_queue: Option<u32>,
    shielded: Option<bool>,
}

/// A value in the words that it has for people.
struct Text<T>(T);

impl<T: fmt::Display> Serialize for Text<T> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(&self.0)
    }
}

/// Rows, each of which is made when it is written.
struct Each<T, F>(Vec<T>, F);

impl<T: Copy, R: Serialize, F: Fn(T) -> R> Serialize for Each<T, F> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_seq(self.0.iter().copied().map(&self.1))
    }
}

impl Report {
    /// The report by its schema; `all` lists agreeing connections too, `top` cuts the sources.
    pub fn to_json(&self, all: bool, top: Option<usize>) -> impl Serialize {
        Json {
            schema: 1,
            generated_at: humantime::format_rfc3339_seconds(self.now).to_string(),
            kernel: &self.kernel,
            netns: &self.netns,
            limit: self.limit.map(|(limit, _)| limit),
            mask: self.mask,
            mask6: self.mask6,
            summary: json!({
                "sockets": named(self.sockets().iter().map(|(state, n)| (state.name(), *n))),
                "entries": named(self.entries.iter().map(|(state, n)| (state.name(), *n))),
                "classes": named(self.classes().into_iter().map(|(class, n)| (class.name(), n))),
            }),
            outgoing: self.outgoing.map(|outgoing| {
                json!({
                    "sockets": outgoing.sockets,
                    "translated": outgoing.translated,
                    "closing": outgoing.closing,
                    "without_entry": outgoing.without_entry,
                    "held": self.outgoing_kept.map(|[_, held, _]| held),
                    "lost": self.outgoing_kept.map(|[.., lost]| lost),
                })
            }),
            connections: Each(self.listed(all), connection),
            sources: Each(self.sources.iter().take(top.unwrap_or(usize::MAX)).collect(), source),
            layers: &self.layers,
        }
    }
}

fn source(source: &Source) -> Value {
    json!({
        "source": source.net.to_string(),
        "sockets": named(source.sockets.iter().map(|(state, n)| (state.name(), *n))),
        "held": source.held,
        "counted": source.counted,
        "uncounted": source.uncounted,
        "stale": source.stale,
        "oldest_half_close_seconds": source.oldest_half_close,
        "limit": source.limit,
        "over_limit": source.over_limit,
        "listed": source.listed.map(|listed| listed.count),
        "full": source.listed.map(|listed| listed.is_full),
        "listed_limit": source.listed.map(|listed| listed.limit),
    })
}

fn named(counts: impl IntoIterator<Item = (&'static str, usize)>) -> Value {
    Value::Object(counts.into_iter().map(|(name, n)| (name.to_owned(), n.into())).collect())
}

fn connection(connection: &ReportedConnection) -> Connection<'_> {
    let View { connection: seen, socket, entry } = connection.view;
    let holder = connection.holder.as_ref();
    let client = connection.view.client();
    Connection {
        local: Text(seen.local),
        remote: Text(seen.remote),
        socket_state: socket.map(|socket| socket.state.name()),
        entry_state: entry.and_then(|entry| entry.state()).map(TcpState::name),
        entry_timeout_seconds: entry
            .and_then(|entry| entry.timeout)
            .map(|timeout| timeout.as_secs()),
        unreplied: entry.map(|_| connection.view.is_unreplied()),
        zone: entry.map_or(0, |entry| entry.zone.id()),
        other_zones: &connection.other_zones,
        class: connection.class.name(),
        asked: entry
            .filter(|entry| entry.reply == seen.sent() && entry.is_translated())
            .map(|entry| Text(entry.orig.dst)),
        client: (client != seen.remote).then_some(Text(client)),
        container: holder.and_then(|holder| holder.container.as_deref()),
        pid: holder.map(|holder| holder.pid),
        command: holder.map(|holder| holder.command.as_str()),
        processes: holder.map(|holder| holder.processes),
        inode: socket.map(|socket| socket.inode),
        uid: socket.map(|socket| socket.uid),
        recv_queue: socket.map(|socket| socket.recv_queue),
        send_queue: socket.map(|socket| socket.send_queue),
        shielded: connection.cover.map(Coverage::is_certain),
    }
}
