//! `ctkeep explain`: what both tables say of one connection, and what ctkeep would do.

mod limits;

use std::time::Instant;

use serde_json::json;

use self::limits::{Limits, limits};
use super::Exit;
use super::args::{Explain, Format};
use super::output;
use crate::audit::arrivals::arrivals;
use crate::audit::asked::{Answer, Asker};
use crate::audit::classes::Class;
use crate::audit::cover::Coverage;
use crate::audit::look::behind;
use crate::audit::plays::Plays;
use crate::audit::processes::{Owner, Owners};
use crate::audit::ways::Ways;
use crate::conntrack::{Entry, Zone};
use crate::containers;
use crate::error::{Error, Result};
use crate::firewall::Ruleset;
use crate::firewall::limits::Limiter;
use crate::flow::Connection;
use crate::host::instance;
use crate::reconcile::ledger::Ledger;
use crate::reconcile::observe::Tables;
use crate::reconcile::outgoing::plan::is_candidate;
use crate::reconcile::plan::{Cell, Verdict, cell, verdict};
use crate::reconcile::pressure::Defence;
use crate::reconcile::snapshot::{Direction, View, Views};
use crate::reconcile::whole::Over;
use crate::sockdiag::{Lookup, Socket, States};

pub(super) fn run(args: &Explain) -> Result<Exit> {
    let policy = args.scope.policy();
    let connection = Connection::new(args.local, args.remote);
    if connection.local.addr().is_ipv4() != connection.remote.addr().is_ipv4() {
        return Err(Error::usage("explain", format!("{connection}: addresses of two families")));
    }
    let found = args.scope.namespace()?.run(|| {
        let mut tables = Tables::open()?;
        containers::join(&mut tables.sockets)?;
        // Either form: what the client asked for, or where its packets get to.
        let asked =
            tables.conntrack.get(&[(connection.received(), Zone::both(policy.zone))])?.pop();
        let translated = asked.flatten().filter(|entry| entry.orig == connection.received());
        let connection = translated.map_or(connection, |entry| Connection::of_sender(entry.reply));
        let rules = Ruleset::read();
        tables.follow_tracking(&rules);
        let mut scope = tables.scope(&policy)?;
        let sockets = tables.sockets.sockets(States::open())?;
        let behind_connection = match translated {
            Some(_) => None,
            None => behind_it(&mut tables, connection, &sockets)?,
        };
        let connection = behind_connection.unwrap_or(connection);
        scope.ports.extend(tables.served_without_listener(&sockets, &scope, &policy)?);
        // What tells whether it is tracked, and in which zones, and what limits count together with it.
        let mut siblings = scope.clone();
        siblings.ports.insert(connection.local.port());
        let mut around = tables.with_entries(sockets, &mut siblings, &policy, Over::Each)?;
        let mut ledger = Ledger::new(Defence::Auto, policy.zone);
        ledger.note(&around);
        let interface = around
            .views
            .iter()
            .find(|view| view.connection == connection)
            .and_then(|view| view.socket)
            .map_or(0, |socket| socket.interface);
        let snapshot = tables.exactly(&[Lookup { connection, interface }], &ledger)?;
        around.evidence.opened_here.clone_from(&snapshot.evidence.opened_here);
        around.evidence.untracked.clone_from(&snapshot.evidence.untracked);
        around.evidence.direct.extend(&snapshot.evidence.direct);
        around.evidence.direct_and_limited.extend(&snapshot.evidence.direct_and_limited);
        snapshot.views.iter().filter_map(|view| view.entry).for_each(|entry| {
            scope.learn(&policy, &entry);
        });
        let view =
            snapshot.views.iter().next().unwrap_or(View { connection, socket: None, entry: None });
        let daemon = instance::ask("ctkeep");
        let held_for = view.socket.and_then(|socket| daemon.ages.get(&socket.cookie.0)).copied();
        if let (Some(_), Some(socket)) = (held_for, view.socket) {
            let plain = Entry::plain(connection.received(), Zone::both(policy.zone));
            ledger.hold(socket, view.entry.unwrap_or(plain), Instant::now());
        }
        let cell = cell(&view, &around.evidence, &scope, &policy, &ledger);
        let verdict = verdict(&view, &around.evidence, &scope, &policy, &ledger);
        let swapped =
            Lookup { connection: Connection::of_sender(connection.received()), interface: 0 };
        let is_swapped = view.socket.is_none()
            && tables.exactly(&[swapped], &ledger)?.views.iter().any(|view| view.socket.is_some());
        let owners = Owners::look(view.socket.into_iter(), &tables.sockets.listeners()?);
        let limiter = Limiter::of(&rules);
        let views = around.views.iter().chain(std::iter::once(view));
        let behind = behind(&tables, &around);
        let arrivals = arrivals(&rules, views, &behind)?;
        let plays = || {
            Plays::new(&limiter, &rules)
                .arriving(&arrivals)
                .behind(&behind)
                .beside(&around.evidence)
        };
        let mut ways = Ways::open()?;
        let mut is_ours = |view: &View| ways.are_ours(view, &behind, &mut plays());
        let class = Class::of(&view, cell, &around.evidence)
            .beside_limits(|| is_ours(&view) && plays().is_limited(&view));
        let of = |view: &View| {
            let cell = self::cell(view, &around.evidence, &scope, &policy, &ledger);
            Class::of(view, cell, &around.evidence)
        };
        let together: Views = around
            .views
            .iter()
            .filter(|other| other.connection != connection)
            .filter(|other| of(other) != Class::Untracked || is_ours(other))
            .chain(std::iter::once(view))
            .collect();
        let asked = args.ask.then(|| {
            let now = Instant::now();
            Asker::open(&rules, &limiter, plays(), now)?.come_what_may().ask(&view, now)
        });
        let answer = asked.as_ref().and_then(|asked| asked.as_ref().ok());
        let left_out = plays().left_out(&view).filter(|_| view.entry.is_none());
        let is_left_out = left_out.is_some();
        let limits = limits(plays(), &limiter, &view, &together, answer, is_left_out);
        let others = around.others.remove(&connection).unwrap_or_default();
        let in_scope = scope.contains(&policy, connection);
        let cover = Coverage::of(daemon.shield.as_ref(), &view);
        Ok(Found {
            view,
            others,
            cell,
            class,
            verdict,
            held_for,
            in_scope,
            outgoing: outgoing(&view, cell, daemon.outgoing.is_some()),
            cover,
            left_out,
            is_swapped,
            is_behind: behind_connection.is_some(),
            owners,
            limits,
            asked: asked.map(|asked| asked.map_err(|error: Error| error.cause.to_string())),
        })
    })?;
    match args.output.format {
        Format::Json => output::line(&to_json(&found))?,
        Format::Table => output::text(&to_text(&found))?,
    }
    Ok(match found.verdict {
        Verdict::Act(..) => Exit::Disagreement,
        Verdict::Leave(_) if found.limits.is_lacking => Exit::Disagreement,
        Verdict::Leave(_) => Exit::Done,
    })
}

/// The connection behind the one that was asked about, as its socket has it: where its entry is gone nothing shows
/// how it was translated, but the socket of that very peer does, if it is the only one and has no entry either.
fn behind_it(
    tables: &mut Tables,
    asked: Connection,
    sockets: &[Socket],
) -> Result<Option<Connection>> {
    let mut of_peer = sockets.iter().filter(|socket| socket.remote == asked.remote);
    let (Some(socket), None) = (of_peer.next(), of_peer.next()) else { return Ok(None) };
    if socket.local == asked.local {
        return Ok(None);
    }
    let looked = tables.exactly(&[Lookup::from(socket)], &Ledger::default())?;
    let is_lost = looked.views.iter().any(|view| view.socket.is_some() && view.entry.is_none());
    Ok(is_lost.then(|| socket.connection()))
}

/// All that is known of one connection.
struct Found {
    view: View,
    /// Entries that it has in other zones.
    others: Vec<Entry>,
    cell: Cell,
    class: Class,
    /// What the daemon would do, as far as it can be known outside of it.
    verdict: Verdict,
    /// For how many seconds a running daemon has held the entry.
    held_for: Option<u64>,
    in_scope: bool,
    /// The rule that surely keeps it out of conntrack.
    left_out: Option<String>,
    /// Of one that this host opened: whether its entry is kept.
    outgoing: Option<&'static str>,
    /// The addresses were given the other way round.
    is_swapped: bool,
    /// It is not the connection that was asked about, but the one of that peer behind this host.
    is_behind: bool,
    owners: Owners,
    cover: Coverage,
    limits: Limits,
    /// What the limit said, or why it could not be asked; `None` where it was not.
    asked: Option<std::result::Result<Answer, String>>,
}

/// What becomes of the entry of a connection that this host opened.
fn outgoing(view: &View, cell: Cell, is_kept: bool) -> Option<&'static str> {
    let is_outgoing = matches!(cell.entry, Some((Direction::Outgoing, _)));
    let is_half_closed = view.socket.as_ref().is_some_and(is_candidate);
    match (is_outgoing, is_half_closed, is_kept) {
        (false, ..) => None,
        (true, false, _) => Some("left to the kernel: not half-closed"),
        (true, true, false) => {
            Some("left to the kernel: ctkeep run does not keep it (outgoing = \"extend\")")
        }
        (true, true, true) => Some("kept as long as its socket is half-closed"),
    }
}

fn to_text(found: &Found) -> String {
    let Found { view, cell, in_scope, .. } = found;
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
    let others: String = found
        .others
        .iter()
        .map(|it| format!("also        {}\n", described_with_zone(it)))
        .collect();
    let (verdict, reason) = match found.verdict {
        Verdict::Act(kind, reason) => (kind.to_string(), reason.to_string()),
        Verdict::Leave(rest) => ("nothing".to_owned(), rest.to_string()),
    };
    let holder = match view.socket.map(|socket| found.owners.of(&socket)) {
        Some(Owner::Process(holder)) if holder.processes > 1 => {
            let more = holder.processes - 1;
            format!("{} ({} and {more} more){}", holder.command, holder.pid, holder.place())
        }
        Some(Owner::Process(holder)) => {
            format!("{} ({}){}", holder.command, holder.pid, holder.place())
        }
        Some(Owner::Queue) => "waiting to be accepted".to_owned(),
        Some(Owner::Unseen) => format!("process unknown{}", found.owners.why_unseen()),
        Some(Owner::Descriptorless | Owner::Kernel) | None => "none".to_owned(),
    };
    let limits = match found.limits.words.as_slice() {
        [] => "none".to_owned(),
        some => some.join("\n            "),
    };
    let kept = match found.held_for {
        Some(seconds) => format!("by ctkeep run for {seconds} s"),
        None => "no".to_owned(),
    };
    let asked = match &found.asked {
        None => String::new(),
        Some(answer) => format!("asked       {}\n", in_words(answer)),
    };
    let outgoing = found.outgoing.map_or(String::new(), |how| format!("outgoing    {how}\n"));
    let hint = match (found.is_swapped, found.is_behind) {
        (true, _) => "hint        the other way round there is one: the server's end comes first\n",
        (_, true) => {
            "hint        the entry that would show it is gone: this is the peer's only socket here\n"
        }
        _ if found.limits.is_lacking => {
            "hint        the list of the limit lacks connections of this source: ctkeep recount shows it what \
             is open\n"
        }
        _ if view.socket.is_none() && view.entry.is_none() => {
            "hint        neither table has it: it is over, or was never here\n"
        }
        _ => "",
    };
    format!(
        "connection  {} (server) with {} (peer)\n\
         socket      {socket}\n\
         held by     {holder}\n\
         entry       {entry}\n\
         {others}\
         direction   {}\n\
         counted     {}\n\
         in scope    {}\n\
         tracked     {}\n\
         class       {}\n\
         kept        {kept}\n\
         limits      {limits}\n\
         {outgoing}\
         {asked}\
         shield      {}\n\
         cell        {}\n\
         would do    {verdict}\n\
         because     {reason}\n\
         {hint}",
        view.connection.local,
        view.connection.remote,
        direction(cell),
        yes(view.is_counted()),
        yes(*in_scope),
        tracked(found),
        found.class,
        found.cover,
        named(cell),
    )
}

/// `2 of 3 on the list of ip filter INPUT rule 1: 1 more would be let in`
fn in_words(answer: &std::result::Result<Answer, String>) -> String {
    let answer = match answer {
        Ok(answer) => answer,
        Err(why) => return format!("not answered: {why}"),
    };
    let decides = &answer.decides;
    let more = match (answer.more, answer.at_least) {
        (Some(0), _) => "no further one would be let in".to_owned(),
        (Some(more), _) => format!("{more} more would be let in"),
        (None, Some(least)) => {
            return format!("at least {least} more would be let in: {decides}");
        }
        (None, None) => return format!("no answer: {decides}"),
    };
    match (answer.listed(), answer.limit) {
        (Some(listed), Some((_, limit))) => {
            let at_least = if answer.is_full() { "at least " } else { "" };
            format!("{more}: {at_least}{listed} of {limit} on the list of {}", answer.decides)
        }
        _ => format!("{more}: {} decides", answer.decides),
    }
}

/// Whether conntrack has the connection, as far as that can be told.
fn tracked(found: &Found) -> String {
    match &found.left_out {
        Some(place) => format!("no: {place} leaves it out"),
        None if found.cell.tracked => "yes".to_owned(),
        None => "no sign of it".to_owned(),
    }
}

/// The cell of the action table (docs/reconcile.md).
fn named(cell: &Cell) -> String {
    let socket = match (cell.socket, cell.guarded) {
        (Some(state), true) => format!("guarded socket in {state}"),
        (Some(state), false) => format!("unguarded socket in {state}"),
        (None, _) => "no socket".to_owned(),
    };
    let entry = match cell.entry {
        Some((_, state)) if cell.expiring => format!("entry in {state}, expiring"),
        Some((_, state)) => format!("entry in {state}"),
        None => "no entry".to_owned(),
    };
    format!("{socket}, {entry}")
}

fn describe(entry: &Entry) -> String {
    // A flow table has an entry without a state.
    let mut text = entry.state().map_or("in a flow table", |state| state.name()).to_owned();
    if let Some(timeout) = entry.timeout {
        text.push_str(&format!(", expires in {} s", timeout.as_secs()));
    }
    text.push_str(&format!(", {}", entry.orig));
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

/// Of another zone, the default one by its number too.
fn described_with_zone(entry: &Entry) -> String {
    let zone = if entry.zone.id() == 0 { ", zone 0" } else { "" };
    format!("{}{zone}", describe(entry))
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

fn to_json(found: &Found) -> serde_json::Value {
    let Found { view, cell, in_scope, .. } = found;
    let holder = view.socket.and_then(|socket| found.owners.holder(&socket).cloned());
    let (action, reason) = match found.verdict {
        Verdict::Act(kind, reason) => (Some(kind.name()), reason.to_string()),
        Verdict::Leave(rest) => (None, rest.to_string()),
    };
    json!({
        "schema": 1,
        "local": view.connection.local.to_string(),
        "remote": view.connection.remote.to_string(),
        "socket_state": view.socket.map(|socket| socket.state.name()),
        "entry_state": view.entry.and_then(|entry| entry.state()).map(|state| state.name()),
        "entry_timeout_seconds":
            view.entry.and_then(|entry| entry.timeout).map(|timeout| timeout.as_secs()),
        "zone": view.entry.map(|entry| entry.zone.id()),
        "other_zones": found.others.iter().map(|entry| entry.zone.id()).collect::<Vec<_>>(),
        "counted": view.is_counted(),
        "in_scope": in_scope,
        "tracked": cell.tracked && found.left_out.is_none(),
        "class": found.class.name(),
        "held_seconds": found.held_for,
        "outgoing": found.outgoing,
        "pid": holder.as_ref().map(|holder| holder.pid),
        "command": holder.as_ref().map(|holder| &holder.command),
        "limits": found.limits.words,
        "asked": found.asked.as_ref().map(|asked| match asked {
            Ok(answer) => json!({
                "listed": answer.listed(), "limit": answer.limit.map(|(_, limit)| limit),
                "more": answer.more, "at_least": answer.at_least, "full": answer.more.map(|more| more == 0),
                "decides": answer.decides, "error": null,
            }),
            Err(why) => json!({
                "listed": null, "limit": null, "more": null, "at_least": null, "full": null,
                "decides": null, "error": why,
            }),
        }),
        "shielded": found.cover.is_certain(),
        "cell": named(cell),
        "action": action,
        "reason": reason,
    })
}

fn yes(is: bool) -> &'static str {
    if is { "yes" } else { "no" }
}
