//! Which of the sockets that were seen are to be closed. Pure.

use std::cmp::Reverse;
use std::collections::{HashMap, HashSet};
use std::time::Duration;

use crate::audit::loads::Load;
use crate::audit::processes::Holder;
use crate::sockdiag::{Cookie, Silence, Socket, State, States};

/// Bytes of a command's name that the kernel keeps (`TASK_COMM_LEN` without the end).
const COMM: usize = 15;

/// What a socket must be like; what is not named may be anything.
#[derive(Clone, Debug)]
pub struct Which {
    /// Its state.
    pub states: States,
    /// Its age is known to be at least this.
    pub older_than: Option<Duration>,
    /// Command name or id of the process that holds it.
    pub process: Option<String>,
    /// Name of the container that holds it.
    pub container: Option<String>,
    /// Its source holds more than a limit allows.
    pub over_limit: bool,
    /// So many at most.
    pub max: usize,
}

/// How old a socket is: half-closed for so long, or else open.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Age {
    /// At least.
    pub time: Duration,
    /// The daemon has known it for so long; else its own silence proves it.
    pub is_of_daemon: bool,
}

impl Age {
    /// The most that is known of a socket's age. `half_closed` are seconds by cookie, as a daemon has
    /// them.
    pub fn of(
        socket: &Socket,
        silence: Option<Silence>,
        half_closed: &HashMap<u64, u64>,
    ) -> Option<Self> {
        let proven = silence.map(|silence| silence.least_age(socket.state));
        let proven = proven.map(|time| Self { time, is_of_daemon: false });
        let known = half_closed.get(&socket.cookie.0).copied().map(Duration::from_secs);
        let known = known.map(|time| Self { time, is_of_daemon: true });
        proven.into_iter().chain(known).max_by_key(|age| age.time)
    }
}

/// A socket that may be meant.
#[derive(Clone, Debug)]
pub struct Candidate {
    /// The socket.
    pub socket: Socket,
    /// Its age, where anything proves one.
    pub age: Option<Age>,
    /// Who has it.
    pub holder: Option<Holder>,
}

/// The sockets that were chosen.
#[derive(Clone, Debug, Default)]
pub struct Choice {
    /// To be closed, the oldest first.
    pub chosen: Vec<Candidate>,
    /// Meant, and left out by [`Which::max`].
    pub left_out: usize,
}

impl Which {
    /// Whether a socket in this state and of this age is meant.
    pub fn is_still_meant(&self, state: State, age: Option<Age>) -> bool {
        let is_old = |least| age.is_some_and(|age| age.time >= least);
        self.states.contains(state) && self.older_than.is_none_or(is_old)
    }

    fn is_meant(&self, candidate: &Candidate) -> bool {
        let holder = candidate.holder.as_ref();
        self.is_still_meant(candidate.socket.state, candidate.age)
            && self
                .process
                .as_ref()
                .is_none_or(|name| holder.is_some_and(|it| is_process(it, name)))
            && self.container.as_ref().is_none_or(|name| {
                holder.and_then(|it| it.container.as_deref()).is_some_and(|it| is_named(it, name))
            })
    }

    /// Chooses; of sources over a limit (`overloads`) as many as they hold too much, half-closed ones
    /// first, then the oldest.
    pub fn choose(&self, candidates: Vec<Candidate>, overloads: &[(Load, Vec<Socket>)]) -> Choice {
        let mut meant: Vec<_> = candidates.into_iter().filter(|it| self.is_meant(it)).collect();
        meant.sort_by_key(|it| (Reverse(it.age.map(|age| age.time)), it.socket.connection()));
        if self.over_limit {
            let excess = excess(&meant, overloads);
            meant.retain(|it| excess.contains(&it.socket.cookie));
        }
        let left_out = meant.len().saturating_sub(self.max);
        meant.truncate(self.max);
        Choice { chosen: meant, left_out }
    }
}

fn is_process(holder: &Holder, name: &str) -> bool {
    holder.pid.to_string() == name || holder.command == name.get(..COMM).unwrap_or(name)
}

/// A container is called `name`, `docker 0123456789ab` or `name (docker 0123456789ab)`.
fn is_named(container: &str, name: &str) -> bool {
    container == name || container.split([' ', '(', ')']).any(|word| word == name)
}

/// Those that are too many, of each limit on its own.
fn excess(meant: &[Candidate], overloads: &[(Load, Vec<Socket>)]) -> HashSet<Cookie> {
    let mut by_state: Vec<_> = meant.iter().map(|it| it.socket).collect();
    by_state.sort_by_key(|socket| socket.state != State::CloseWait);
    let mut excess = HashSet::new();
    for (load, sockets) in overloads {
        let limit = usize::try_from(load.limit).unwrap_or(usize::MAX);
        let of_load: HashSet<_> = sockets.iter().map(|socket| socket.cookie).collect();
        let (chosen, free): (Vec<_>, Vec<_>) = by_state
            .iter()
            .map(|socket| socket.cookie)
            .filter(|cookie| of_load.contains(cookie))
            .partition(|cookie| excess.contains(cookie));
        let too_many = load.refused.saturating_sub(limit).saturating_sub(chosen.len());
        excess.extend(free.into_iter().take(too_many));
    }
    excess
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firewall::play::LimitAt;

    const ALL: Which = Which {
        states: States::NONE,
        older_than: None,
        process: None,
        container: None,
        over_limit: false,
        max: 100,
    };

    fn socket(cookie: u64, state: State) -> Socket {
        let port = u16::try_from(cookie).unwrap();
        Socket {
            local: "192.0.2.1:80".parse().unwrap(),
            remote: format!("198.51.100.7:{port}").parse().unwrap(),
            state,
            inode: 1,
            uid: 0,
            cookie: Cookie(cookie),
            interface: 0,
            recv_queue: 0,
            send_queue: 0,
        }
    }

    fn candidate(cookie: u64, state: State, age: Option<u64>) -> Candidate {
        let age = age.map(|age| Age { time: Duration::from_secs(age), is_of_daemon: false });
        Candidate { socket: socket(cookie, state), age, holder: None }
    }

    fn cookies(choice: &Choice) -> Vec<u64> {
        choice.chosen.iter().map(|it| it.socket.cookie.0).collect()
    }

    #[test]
    fn what_is_of_no_known_age_is_not_old_and_the_oldest_go_first() {
        let all = vec![
            candidate(1, State::CloseWait, Some(20)),
            candidate(2, State::CloseWait, None),
            candidate(3, State::CloseWait, Some(30)),
            candidate(4, State::Established, Some(90)),
            candidate(5, State::CloseWait, Some(10)),
        ];
        let states = [State::CloseWait].into_iter().collect();
        let which = Which { states, older_than: Some(Duration::from_secs(11)), ..ALL };
        assert_eq!(cookies(&which.choose(all.clone(), &[])), [3, 1]);
        let choice = Which { older_than: None, max: 3, ..which }.choose(all, &[]);
        assert_eq!((cookies(&choice), choice.left_out), (vec![3, 1, 5], 1));
    }

    #[test]
    fn of_a_source_over_its_limit_go_as_many_as_are_too_many() {
        let all = vec![
            candidate(1, State::Established, Some(90)),
            candidate(2, State::CloseWait, Some(1)),
            candidate(3, State::CloseWait, Some(2)),
            candidate(4, State::Established, Some(80)),
            candidate(5, State::CloseWait, Some(99)),
        ];
        let list = LimitAt { chain: 0, rule: 0, step: 0 };
        let load = |limit, held| Load {
            group: (list, None, None),
            client: None,
            to: None,
            port: None,
            rule: 0,
            net: "198.51.100.7/32".parse().unwrap(),
            limit,
            held,
            held_for_sure: held,
            counted: held,
            times: 1,
            only_notes: false,
            refused: held,
            passing: 0,
        };
        let of = |cookies: &[u64]| cookies.iter().map(|it| socket(*it, State::CloseWait)).collect();
        let which = Which { states: States::open(), over_limit: true, ..ALL };
        // The fifth is of no source over a limit, though the oldest.
        let overloads = [(load(1, 4), of(&[1, 2, 3, 4]))];
        assert_eq!(cookies(&which.choose(all.clone(), &overloads)), [1, 3, 2]);
        // What goes for one limit goes for the next, too.
        let overloads = [(load(3, 4), of(&[1, 2, 3, 4])), (load(1, 2), of(&[3, 4]))];
        assert_eq!(cookies(&which.choose(all, &overloads)), [3]);
    }

    #[test]
    fn processes_go_by_name_or_id_and_containers_by_any_of_their_names() {
        let holder = Holder {
            pid: 42,
            command: "a-process-with-".to_owned(),
            processes: 1,
            container: Some("web (docker 0123456789ab)".to_owned()),
        };
        for (name, is_it) in [("a-process-with-a-name", true), ("42", true), ("4", false)] {
            assert_eq!(is_process(&holder, name), is_it, "{name}");
        }
        for (name, is_it) in [("web", true), ("0123456789ab", true), ("dock", false)] {
            assert_eq!(is_named(holder.container.as_deref().unwrap(), name), is_it, "{name}");
        }
    }

    #[test]
    fn the_daemon_is_believed_where_it_knows_more() {
        let silence = Silence { acked: Duration::from_secs(5), ..Silence::default() };
        let age = |held: &[(u64, u64)]| {
            let held = held.iter().copied().collect();
            let age = Age::of(&socket(1, State::CloseWait), Some(silence), &held).unwrap();
            (age.time.as_secs(), age.is_of_daemon)
        };
        assert_eq!(age(&[(1, 60)]), (60, true));
        assert_eq!(age(&[(1, 2)]), (5, false));
        assert_eq!(age(&[(2, 60)]), (5, false));
    }
}
