//! `ctkeep explain`: what both tables say of one connection, and what ctkeep would do.

use serde_json::json;

use super::Exit;
use super::args::{Explain, Format};
use crate::audit::render;
use crate::conntrack::Entry;
use crate::error::{Error, Result};
use crate::flow::FourTuple;
use crate::reconcile::ledger::Ledger;
use crate::reconcile::observe::Tables;
use crate::reconcile::plan::{Cell, Verdict, cell, decide};
use crate::reconcile::snapshot::{Direction, View};
use crate::sockdiag::{Lookup, State, States};

pub(super) fn run(args: &Explain) -> Result<Exit> {
    let policy = args.scope.policy();
    let flow = FourTuple::new(args.local, args.remote);
    if flow.src.addr().is_ipv4() != flow.dst.addr().is_ipv4() {
        return Err(Error::usage("explain", format!("{flow}: addresses of two families")));
    }
    let (view, cell, in_scope) = args.scope.namespace()?.run(|| {
        let mut tables = Tables::open()?;
        let scope = tables.scope(&policy)?;
        // Siblings of the same port tell whether it is tracked, and in which zones.
        let mut siblings = scope.clone();
        siblings.ports = std::iter::once(flow.src.port()).collect();
        let open = States::from_iter([State::Established, State::CloseWait]);
        let around = tables.whole(&siblings, &policy, open)?;
        let mut ledger = Ledger::default();
        ledger.note(&around);
        let interface = around
            .views
            .iter()
            .find(|view| view.flow == flow)
            .and_then(|view| view.socket)
            .map_or(0, |socket| socket.interface);
        let mut snapshot = tables.exactly(&[Lookup { flow, interface }], &ledger)?;
        snapshot.tracked.extend(around.tracked);
        let view =
            snapshot.views.first().copied().unwrap_or(View { flow, socket: None, entry: None });
        let cell = cell(&view, &snapshot, &scope, &policy, &ledger);
        Ok((view, cell, scope.contains(&policy, flow)))
    })?;
    match args.output.format {
        Format::Json => render::line(&to_json(&view, &cell, in_scope))?,
        Format::Table => render::text(&to_text(&view, &cell, in_scope))?,
    }
    Ok(match decide(cell) {
        Verdict::Act(..) => Exit::Disagreement,
        Verdict::Leave(_) => Exit::Done,
    })
}

fn to_text(view: &View, cell: &Cell, in_scope: bool) -> String {
    let socket = match view.socket {
        Some(socket) => format!(
            "{}, inode {}, uid {}, cookie {:x}, {} bytes unread, {} bytes unsent",
            socket.state,
            socket.inode,
            socket.uid,
            socket.cookie.0,
            socket.recv_queue,
            socket.send_queue
        ),
        None => "none".to_owned(),
    };
    let entry = match view.entry {
        Some(entry) => describe(&entry),
        None => "none".to_owned(),
    };
    let (verdict, reason) = match decide(*cell) {
        Verdict::Act(kind, reason) => (kind.to_string(), reason.to_string()),
        Verdict::Leave(rest) => ("nothing".to_owned(), rest.to_string()),
    };
    format!(
        "connection  {} (server) with {} (peer)\n\
         socket      {socket}\n\
         entry       {entry}\n\
         direction   {}\n\
         counted     {}\n\
         in scope    {}\n\
         tracked     {}\n\
         would do    {verdict}\n\
         because     {reason}\n",
        view.flow.src,
        view.flow.dst,
        direction(cell),
        yes(view.is_counted()),
        yes(in_scope),
        yes(cell.tracked),
    )
}

fn describe(entry: &Entry) -> String {
    let state = entry.state().map_or("unknown", |state| state.name());
    let timeout = entry.timeout.map_or(0, |timeout| timeout.as_secs());
    let mut text = format!("{state}, expires in {timeout} s, {}", entry.orig);
    if entry.is_translated() {
        text.push_str(&format!(", translated to {}", entry.reply.inverse()));
    }
    if entry.zone.id() != 0 {
        text.push_str(&format!(", zone {}", entry.zone.id()));
    }
    if entry.status.is_some_and(|status| status.is_assured()) {
        text.push_str(", assured");
    }
    if entry.is_picked_up() {
        text.push_str(", without its handshake");
    }
    text
}

fn direction(cell: &Cell) -> &'static str {
    match cell.entry {
        Some((Direction::FromPeer, _)) => "the peer opened it",
        Some((Direction::Reversed, _)) => {
            "reversed: picked up in its middle, not counted for the peer"
        }
        Some((Direction::Outgoing, _)) => "this host opened it",
        None => "unknown",
    }
}

fn to_json(view: &View, cell: &Cell, in_scope: bool) -> serde_json::Value {
    let (action, reason) = match decide(*cell) {
        Verdict::Act(kind, reason) => (Some(kind.name()), reason.to_string()),
        Verdict::Leave(rest) => (None, rest.to_string()),
    };
    json!({
        "schema": 1,
        "local": view.flow.src.to_string(),
        "remote": view.flow.dst.to_string(),
        "socket_state": view.socket.map(|socket| socket.state.name()),
        "entry_state": view.entry.and_then(|entry| entry.state()).map(|state| state.name()),
        "entry_timeout_seconds":
            view.entry.and_then(|entry| entry.timeout).map(|timeout| timeout.as_secs()),
        "zone": view.entry.map(|entry| entry.zone.id()),
        "counted": view.is_counted(),
        "in_scope": in_scope,
        "tracked": cell.tracked,
        "action": action,
        "reason": reason,
    })
}

fn yes(is: bool) -> &'static str {
    if is { "yes" } else { "no" }
}
