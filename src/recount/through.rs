//! Tries a recount through the host's own rules, with a connection that only conntrack knows: an
//! entry of an unused port of a client. No other entry and no socket is touched.

use std::time::{Duration, Instant};

use super::{Question, Recipe, Recount, Recounter, Room, Route};
use crate::conntrack::{Change, Entry, Insert, Status, TcpState};
use crate::error::{Error, Result};
use crate::flow::{Endpoint, FourTuple};

/// Of the trial's entry; it is deleted long before.
const TIMEOUT: Duration = Duration::from_secs(10);

/// What came of it.
#[derive(Debug)]
pub enum Through {
    /// The limit has one connection more on its list than before.
    Counted {
        /// The way of the nudge.
        route: Route,
        /// Why it could not be sealed, if it could not.
        seal: Option<Error>,
    },
    /// It has as many as before.
    NotCounted {
        /// The way of the nudge.
        route: Route,
    },
    /// The source has no place left for a trial, or no limit stops it, or it was another number each
    /// time.
    Untold,
}

impl Recounter {
    /// Has a limit count a connection that only conntrack knows, asks before and after, and takes
    /// it away again. `socket` is where such a connection gets to: another endpoint than the one that is
    /// asked for, where rules translate.
    ///
    /// # Errors
    /// The client cannot be asked for; no way reaches the rules; a broken conversation.
    pub fn try_through(
        &mut self,
        question: Question,
        socket: Endpoint,
        most: u32,
        now: Instant,
    ) -> Result<Through> {
        let Room::For { more: before, .. } = Self::room(self, question, most, now)? else {
            return Ok(Through::Untold);
        };
        if before == 0 {
            return Ok(Through::Untold);
        }
        let port = self.unused_port(question, now)?;
        let client = Endpoint::new(question.client, port);
        let plain = Entry::plain(FourTuple::new(client, question.server), question.zone);
        let like = Entry { reply: FourTuple::new(socket, client), ..plain };
        let shown = self.show(like, now);
        let after = match &shown {
            Ok(_) => Self::room(self, question, most, now),
            Err(_) => Ok(Room::Unsteady),
        };
        // Whatever has happened.
        let gone = self.change(&[Change::Delete { key: like.key(), id: None }]);
        let (route, seal) = shown?;
        gone?;
        Ok(match after? {
            Room::For { more, .. } if more + 1 == before => Through::Counted { route, seal },
            Room::For { more, .. } if more == before => Through::NotCounted { route },
            _ => Through::Untold,
        })
    }

    /// As a repair does it.
    fn show(&mut self, like: Entry, now: Instant) -> Result<(Route, Option<Error>)> {
        let way = self.way(&like, now)?;
        let key = like.key();
        let insert = |state, status| Insert { like, state, status, timeout: TIMEOUT };
        let (state, assured) = (TcpState::Established, Status::ASSURED);
        match way.recipe {
            Recipe::Replace => {
                self.change(&[Change::Insert(insert(TcpState::CloseWait, Status::FRESH))])?;
                self.nudge(&like, way.route, now)?;
                let status = Some(assured);
                self.change(&[Change::Update { key, state, status, timeout: TIMEOUT }])?;
            }
            Recipe::Fresh => {
                self.nudge(&like, way.route, now)?;
                let new = insert(state, assured);
                self.change(&[Change::Replace { old: key, id: None, new }])?;
            }
        }
        Ok((way.route, self.seal(&like, now).err()))
    }
}
