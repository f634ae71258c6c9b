//! The live table: who holds what now.
//!
//! [`rows`] adds up, [`filter`] chooses, [`model`] is what keys do, [`frame`] is the screen; all of it
//! pure. [`look`] reads the kernel's tables as the audit does, [`terminal`] shows.

pub mod filter;
#[cfg(test)]
mod fixture;
pub mod frame;
pub mod model;
pub mod rows;
pub mod terminal;

use std::time::{Instant, SystemTime};

use self::rows::{Seen, Shown};
use crate::audit::asked::ask_for_sources;
use crate::audit::loads::loads;
use crate::audit::look::Seen as Audited;
use crate::audit::processes::Owner;
use crate::error::Result;
use crate::reconcile::policy::Policy;

/// Looks at the namespace that the calling thread is in; `asks` the limits, too.
///
/// # Errors
/// As the audit's look.
pub fn look(netns: &str, policy: &Policy, asks: bool, clock: SystemTime) -> Result<Seen> {
    let (mut seen, _) = Audited::look(netns, policy)?;
    if asks {
        ask_for_sources(&mut seen, Instant::now(), |_| {})?;
    }
    let mut plays = seen.plays();
    let loads = loads(seen.snapshot.views.iter(), &mut plays);
    let is_mine = |view: &crate::reconcile::snapshot::View| !view.is_outgoing();
    let connections = seen.snapshot.views.iter().filter(is_mine).map(|view| Shown {
        holder: view.socket.and_then(|socket| seen.owners.holder(&socket).cloned()),
        waits: view
            .socket
            .is_some_and(|socket| socket.takes_a_slot() && seen.owners.of(&socket) == Owner::Queue),
        view,
    });
    let connections = connections.collect();
    let table = seen.figures.as_ref().map(|figures| (figures.table.entries, figures.table.maximum));
    let told = seen.told.unwrap_or_default();
    Ok(Seen {
        at: humantime::format_rfc3339_seconds(clock).to_string(),
        netns: seen.netns,
        connections,
        past: Vec::new(),
        limiter: seen.limiter,
        loads,
        asked: seen.asked.unwrap_or_default(),
        is_guarded: told.containers.is_some() || told.level.is_some(),
        half_closed: told.half_closed,
        repairs: told.repairs,
        level: told.level,
        table: table.unwrap_or_default(),
    })
}
