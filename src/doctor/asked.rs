//! A recount through the host's own rules, and what the limit says of it.

use std::time::Instant;

use crate::audit::asked::{DEVICE, RATED, question_about};
use crate::audit::finding::Finding;
use crate::audit::loads::loads;
use crate::audit::look::Seen;
use crate::error::Result;
use crate::recount::{Mode, Recounter, Through};

/// Sources that are tried until one has room for a trial.
const SOURCES: usize = 8;
/// Of more room than this nothing is said: each probe in it takes a place for some milliseconds.
const MOST: u32 = 512;

const ID: &str = "recount-asked";

/// Tries a recount for a source that has connections, in the namespace of the calling thread.
pub(super) fn ask(seen: &Seen, now: Instant) -> Finding {
    match try_ask(seen, now) {
        Ok(finding) => finding,
        Err(error) => Finding::warn(ID, format!("not tried: {error}"), ""),
    }
}

fn try_ask(seen: &Seen, now: Instant) -> Result<Finding> {
    let mut plays = seen.plays();
    let views = || seen.snapshot.views.iter().filter(|view| !view.is_outgoing());
    let mut loads = loads(views(), &mut plays);
    let room = |held: usize, limit: u32| limit.saturating_sub(held.try_into().unwrap_or(u32::MAX));
    loads.retain(|load| load.held > 0 && (1..MOST).contains(&room(load.counted, load.limit)));
    loads.sort_by_key(|load| room(load.counted, load.limit));
    let none = "not tried: no open connection of a source that has places left under its limit";
    let mut untold = Finding::warn(ID, none, "");
    let Some(mut recounter) = Recounter::open(Mode::Auto, DEVICE, now)? else {
        return Ok(untold);
    };
    for load in loads.iter().take(SOURCES) {
        let Some(rule) = seen.limiter.rules.get(load.rule) else { continue };
        if rule.tells {
            let what = format!("not tried: {} logs or bans what exceeds it", rule.place());
            untold = Finding::warn(ID, what, "");
            continue;
        }
        let mut of_load = views().filter(|view| view.socket.is_some());
        let is_it = |met: &crate::audit::plays::Met| met.group == load.group;
        let Some(view) = of_load.find(|view| plays.met(view).iter().any(is_it)) else { continue };
        if plays.is_rated(&view, rule.at) {
            let what = format!("not tried: {}: {RATED}", rule.place());
            untold = Finding::warn(ID, what, "");
            continue;
        }
        let Some(question) = question_about(&view, &plays) else { continue };
        let (source, place) = (view.client().addr(), rule.place());
        let most = load.limit.saturating_add(1).min(MOST);
        return Ok(match recounter.try_through(question, view.connection.local, most, now) {
            Ok(Through::Counted { route, seal: None }) => Finding::ok(
                ID,
                format!(
                    "{place} counted a connection of {source} again by {route}, and it is sealed"
                ),
            ),
            Ok(Through::Counted { route, seal: Some(error) }) => Finding::warn(
                ID,
                format!(
                    "{place} counted a connection of {source} again by {route}; no seal: {}",
                    error.cause
                ),
                "modprobe nf_tables",
            ),
            Ok(Through::NotCounted { route }) => Finding::bad(
                ID,
                format!("{place} did not count a connection of {source} that was shown by {route}"),
                "a rule before it takes the packet: put the limit before what looks at SYNs or their \
                 rate",
            ),
            Ok(Through::Untold) => {
                untold = Finding::warn(ID, format!("{place} could not be asked for {source}"), "");
                continue;
            }
            Err(error) => {
                untold = Finding::warn(ID, format!("{place}, {source}: {}", error.cause), "");
                continue;
            }
        });
    }
    Ok(untold)
}
