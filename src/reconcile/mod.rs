//! Makes conntrack follow the sockets: what is wrong, what to do, and doing it.
//!
//! [`observe`] reads, [`plan`] decides from values alone, [`confirm`] makes sure by exact
//! look-ups, [`apply`] changes the table; [`ledger`] remembers what is held. [`outgoing`] does the
//! cheap half of it for connections that this host opened.

pub mod agenda;
pub mod apply;
pub mod backoff;
pub mod behind;
pub mod bridged;
pub mod checks;
pub mod confirm;
pub mod deciding;
pub mod evidence;
pub mod groups;
pub mod keeper;
pub mod ledger;
pub mod observe;
pub mod outgoing;
pub mod plan;
pub mod policy;
pub mod pressure;
mod served;
pub mod snapshot;
pub mod timers;
mod translated;
pub mod uncounted;
pub mod whole;
