//! What the keeper makes of a limit's answers: nothing is claimed that was not seen. A played kernel, the
//! time by hand, and limits that answer as the test says.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

mod played;

use std::collections::{HashSet, VecDeque};
use std::time::{Duration, Instant};

use ctkeep::conntrack::{Entry, TcpState};
use ctkeep::firewall::limits::Limiter;
use ctkeep::firewall::lists::Limited;
use ctkeep::firewall::{Family, Ruleset, parse_saved};
use ctkeep::flow::{Connection, FourTuple};
use ctkeep::reconcile::checks::{Checked, Counted};
use ctkeep::reconcile::keeper::{Acted, Depth, Keeper, Settings, Trigger, Witness};
use ctkeep::reconcile::plan::Action;
use ctkeep::reconcile::policy::Policy;
use ctkeep::reconcile::pressure::Defence;
use ctkeep::recount::{Asked, Hidden, Question, Recipe, Recount, Route, Step, Trace, Way};
use ctkeep::sockdiag::{Socket, State};
use ctkeep::{Cause, Op, Result};
use played::host::{Host, Shared};
use played::{Played, entry, flow, socket};

const LIMIT: &str = "INPUT -p tcp -m tcp --dport 80 --tcp-flags FIN,SYN,RST,ACK SYN \
                     -m connlimit --connlimit-above 3 --connlimit-mask 32 --connlimit-saddr -j DROP";

/// Says what the test has put in.
#[derive(Default)]
struct Oracle(VecDeque<Result<Asked>>);

impl Recount for Oracle {
    fn admit(&mut self, _entry: &Entry, _now: Instant) -> bool {
        true
    }

    fn way(&mut self, _entry: &Entry, _now: Instant) -> Result<Way> {
        Ok(Way { route: Route::Ingress, recipe: Recipe::Replace })
    }

    fn nudge(&mut self, _entry: &Entry, _route: Route, _now: Instant) -> Result<()> {
        Ok(())
    }

    fn can_seal(&self) -> bool {
        false
    }

    fn seal(&mut self, _entry: &Entry, _now: Instant) -> Result<()> {
        Ok(())
    }

    fn hide(&mut self, _wanted: &[(FourTuple, Hidden)], _now: Instant) -> Result<()> {
        Ok(())
    }

    fn narrow_hidden(
        &mut self,
        _held: impl Iterator<Item = FourTuple>,
        _now: Instant,
    ) -> Result<()> {
        Ok(())
    }

    fn ask(&mut self, _question: Question, _now: Instant) -> Result<Asked> {
        self.0.pop_front().expect("no further question")
    }

    fn refresh(&mut self, _now: Instant) {}
}

#[derive(Default)]
struct Told(Vec<Checked>);

impl Witness for Told {
    fn seen(&mut self, _ports: &HashSet<u16>, _half_closed: Option<&[Socket]>) {}

    fn acted(&mut self, _acted: Acted) {}

    fn planned(&mut self, _actions: &[Action], _trigger: Trigger) {}

    fn checked(&mut self, checked: Checked) {
        self.0.push(checked);
    }
}

fn limited(rules: &[&str]) -> Limited {
    let rules: String = rules.iter().map(|rule| format!("-A {rule}\n")).collect();
    let text = format!("*filter\n:INPUT ACCEPT [0:0]\n{rules}COMMIT\n");
    let rules = Ruleset { chains: parse_saved(&text, Family::Ip), unread: Vec::new() };
    Limited { limits: Limiter::of(&rules).rules, rules }
}

/// The connection of a port of the peer, seen from the server.
fn of(port: u16) -> FourTuple {
    flow("192.0.2.1:80", &format!("198.51.100.7:{port}"))
}

/// Three connections at a limit of three, of which one was closed by a stale RST and repaired: the
/// limit is to be asked.
struct World {
    host: Shared,
    keeper: Keeper<Played, Oracle>,
    now: Instant,
}

impl World {
    fn new(rules: &[&str], answers: impl IntoIterator<Item = Result<Asked>>) -> Self {
        let mut sockets = vec![socket("0.0.0.0:80", "0.0.0.0:0", State::Listen, 1)];
        sockets.extend((4000..4003).map(|port: u16| {
            let Connection { local, remote } = Connection::of_sender(of(port));
            let (local, remote) = (local.to_string(), remote.to_string());
            socket(&local, &remote, State::CloseWait, u64::from(port))
        }));
        let entries = (4000..4003).map(|port| entry(of(port), TcpState::CloseWait, 60)).collect();
        let (host, tables) =
            Host { sockets, entries, ..Host::default() }.open_by(|kernel, _| kernel);
        let settings = Settings {
            policy: Policy::default(),
            sweep_interval: Duration::from_secs(1),
            deep_interval: Duration::from_secs(30),
            dry_run: false,
        };
        let (now, oracle) = (Instant::now(), Oracle(answers.into_iter().collect()));
        let mut keeper =
            Keeper::new(tables, Some(oracle), settings, Defence::Auto, now, || 150).unwrap();
        keeper.know_limits(limited(rules));
        keeper.sweep(Depth::Deep, now, &mut Told::default()).unwrap();
        host.borrow_mut().entries[0] = entry(of(4000), TcpState::Close, 10);
        keeper.sweep(Depth::Deep, now, &mut Told::default()).unwrap();
        Self { host, keeper, now }
    }

    /// The next question, where the rules are those that were read or not.
    fn ask(&mut self, are_as_read: bool) -> (Result<()>, Vec<Checked>) {
        let due = self.keeper.next_check().expect("something to ask");
        self.now = self.now.max(due);
        assert!(self.keeper.check_is_due(self.now));
        let mut told = Told::default();
        let asked = self.keeper.check(self.now, &mut || Ok(are_as_read), &mut told);
        (asked, told.0)
    }
}

/// The rule of a limit has dropped the probe.
fn stopped_by(handle: Option<u64>) -> Asked {
    let step = Step {
        family: 2,
        table: "filter".to_owned(),
        chain: "INPUT".to_owned(),
        rule: handle,
        is_drop: true,
        is_queue: false,
    };
    Asked::Stopped(Trace { steps: vec![step], lacks: None })
}

#[test]
fn what_a_limit_lets_in_is_not_counted_and_shown_again() {
    let mut world = World::new(&[LIMIT], [Ok(Asked::LetIn)]);
    let (asked, said) = world.ask(true);
    asked.unwrap();
    assert_eq!((said.len(), said[0].counted, said[0].held), (1, Counted::No, 3));
    assert!(said[0].again.is_some() && world.keeper.next_recount().is_some());
}

/// A rule that goes between the reading and the question lets everything in.
#[test]
fn of_a_rule_that_has_gone_meanwhile_nothing_is_said_and_nothing_shown() {
    for answer in [Asked::LetIn, stopped_by(Some(1))] {
        let mut world = World::new(&[LIMIT], [Ok(answer), Ok(Asked::LetIn)]);
        let (asked, said) = world.ask(false);
        asked.unwrap();
        assert_eq!((said.len(), said[0].counted), (1, Counted::Unknown));
        assert_eq!(world.keeper.next_recount(), None);
        // And when they were read anew, without the limit, nothing is to be asked.
        world.keeper.know_limits(limited(&[]));
        let (asked, said) = world.ask(true);
        asked.unwrap();
        assert!(said.is_empty(), "{said:?}");
    }
}

#[test]
fn what_another_rule_stopped_is_unknown() {
    let mut world = World::new(&[LIMIT], [Ok(stopped_by(Some(99)))]);
    let (asked, said) = world.ask(true);
    asked.unwrap();
    assert_eq!((said.len(), said[0].counted), (1, Counted::Unknown));
    assert_eq!(world.keeper.next_recount(), None);
}

#[test]
fn what_cannot_be_asked_is_said_once_with_its_reason() {
    let op = Op::new("ask the limit");
    let unavailable = Err(op.failed(Cause::Unavailable("no helper device".to_owned())));
    let mut world = World::new(&[LIMIT], [unavailable]);
    let (asked, said) = world.ask(true);
    asked.unwrap();
    assert_eq!((said.len(), said[0].counted, said[0].again), (1, Counted::Unknown, None));
    assert_eq!(said[0].why.as_deref(), Some("no helper device"));
    assert_eq!(world.keeper.next_check(), None);
}

#[test]
fn connections_that_end_while_a_limit_is_asked_are_not_missed() {
    let mut world = World::new(&[LIMIT], [Ok(Asked::LetIn)]);
    let due = world.keeper.next_check().unwrap();
    let mut told = Told::default();
    let host = world.host.clone();
    let mut as_read = || {
        // Just now.
        host.borrow_mut().sockets.pop();
        Ok(true)
    };
    world.keeper.check(due, &mut as_read, &mut told).unwrap();
    assert_eq!((told.0.len(), told.0[0].counted), (1, Counted::Unknown));
    assert_eq!(world.keeper.next_recount(), None);
}

#[test]
fn a_limit_that_tells_of_what_exceeds_it_is_not_asked() {
    let told = "INPUT -p tcp -m tcp --dport 80 --tcp-flags FIN,SYN,RST,ACK SYN -m connlimit \
                --connlimit-above 3 --connlimit-mask 32 --connlimit-saddr -j LOG";
    let mut world = World::new(&[told, LIMIT], []);
    let (asked, said) = world.ask(true);
    asked.unwrap();
    assert!(said.iter().all(|one| one.counted == Counted::Unknown && one.again.is_none()));
}
