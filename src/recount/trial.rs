//! Finds out by trial how a limit of this kernel can be made to count a connection again.
//!
//! The limit, the tuple and the table are our own, and the trial's packets are dropped right behind
//! conntrack: no rule behind it sees them, no wire, no socket. What counts is what the kernel does,
//! never its version: distributions carry fixes back.

use std::thread;
use std::time::Duration;

use super::ingress::Ingress;
use super::loopback::RawSockets;
use super::packet::{self, DropBy, Purpose, Shape};
use super::{Recipe, Route, Tried, Verdict};
use crate::conntrack::{Change, Conntrack, Entry, EntryKey, Insert, Status, TcpState, Zone};
use crate::error::{Op, Result};
use crate::flow::{Endpoint, FourTuple};
use crate::host::random;
use crate::nftables::{ChainSpec, Expr, Hook, SetSpec, Table, TableSpec, hidden, key};

const IPPROTO_TCP: u8 = 6;
const NFPROTO_IPV4: u8 = 2;
const TCP_SEQ: u32 = 4;
/// Sets of the trials that arrived, of those that were counted, and of those that could be written to.
const SEEN: &str = "seen";
const COUNTED: &str = "counted";
const WRITTEN: &str = "written";
const AFTER_CONNTRACK: i32 = -199;
/// A packet may wait for another processor.
const TRIES: u32 = 20;
const PAUSE: Duration = Duration::from_millis(1);
/// Of the trial's entry; it is deleted long before.
const TIMEOUT: Duration = Duration::from_secs(5);

/// What was shown.
#[derive(Debug, Default)]
pub(super) struct Shown {
    /// The recipes by each route.
    pub tried: Vec<Tried>,
    /// Whether nf_tables writes what hides a packet; `None` where no trial arrived.
    pub hides: Option<bool>,
}

/// One way to try.
struct Attempt {
    route: Route,
    recipe: Recipe,
    flow: FourTuple,
    seq: u32,
}

/// Tries the recipes by each route, the gentler one first; where that is counted the other one is
/// not tried. `name` is that of the trial's table.
///
/// # Errors
/// The kernel has no `ct count` or no conntrack.
pub(super) fn run(
    name: &str,
    ingress: Option<&Ingress>,
    loopback: Option<&RawSockets>,
) -> Result<Shown> {
    let mut attempts = Vec::new();
    if ingress.is_some() {
        attempts.extend(Recipe::ALL.map(|recipe| Attempt::new(Route::Ingress, recipe)));
    }
    if loopback.is_some() {
        attempts.extend(Recipe::ALL.map(|recipe| Attempt::new(Route::Loopback, recipe)));
    }
    let mut table = Table::create(name, &layout(&attempts))?;
    let mut conntrack = Conntrack::open()?;
    let mut shown = Shown::default();
    for attempt in &attempts {
        let Attempt { route, recipe, flow, .. } = *attempt;
        let mut of_route = shown.tried.iter().filter(|one| one.route == route);
        if of_route.any(|one| one.verdict == Verdict::Counted) {
            continue;
        }
        let verdict = attempt.make(&mut table, &mut conntrack, ingress, loopback)?;
        if verdict != Verdict::Unseen {
            shown.hides = Some(table.contains(WRITTEN, &[key::of(flow)])?.contains(&true));
        }
        shown.tried.push(Tried { route, recipe, verdict });
    }
    Ok(shown)
}

impl Attempt {
    fn new(route: Route, recipe: Recipe) -> Self {
        let bits = random::bits().to_be_bytes();
        let [a, b, c, d, e, f, ..] = bits;
        // Of no host: the dummy address of RFC 7600, and its neighbour.
        let (client, server) = match route {
            Route::Ingress => ([192, 0, 0, 8], [192, 0, 0, 9]),
            Route::Loopback => ([127, 0, 0, 2], [127, 0, 0, 1]),
        };
        let port = 32_768 + (u16::from_be_bytes([e, f]) >> 2);
        // The discard port: no server is asked for anything.
        let flow =
            FourTuple::new(Endpoint::new(client.into(), port), Endpoint::new(server.into(), 9));
        Self { route, recipe, flow, seq: u32::from_be_bytes([a, b, c, d]) }
    }

    fn make(
        &self,
        table: &mut Table,
        conntrack: &mut Conntrack,
        ingress: Option<&Ingress>,
        loopback: Option<&RawSockets>,
    ) -> Result<Verdict> {
        let like = Entry::plain(self.flow, Zone::default());
        if self.recipe == Recipe::Replace {
            let (state, status) = (TcpState::CloseWait, Status::FRESH);
            let insert = Insert { like, state, status, timeout: TIMEOUT };
            conntrack.change(&[Change::Insert(insert)])?.into_iter().collect::<Result<()>>()?;
        }
        let op = Op::new("try recount");
        let sent = match (self.route, ingress, loopback) {
            (Route::Ingress, Some(ingress), _) => {
                let packet = self.packet(op, DropBy::None)?;
                // No interface's identification: it comes in by the device itself.
                ingress.send(op, &packet, None)
            }
            (Route::Loopback, _, Some(raw)) => {
                let packet = self.packet(op, DropBy::WrongChecksum)?;
                raw.send(&packet, self.flow.dst.addr()).map_err(|error| op.io(error))
            }
            _ => Ok(()),
        };
        let key = [key::of(self.flow)];
        let mut verdict = Verdict::Unseen;
        if sent.is_ok() {
            for _ in 0..TRIES {
                if table.contains(SEEN, &key)?.contains(&true) {
                    let counted = table.contains(COUNTED, &key)?.contains(&true);
                    verdict = if counted { Verdict::Counted } else { Verdict::NotCounted };
                    break;
                }
                thread::sleep(PAUSE);
            }
        }
        let key = EntryKey { zone: Zone::default(), orig: self.flow };
        // That of a packet that was dropped before it was confirmed is not there.
        drop(conntrack.change(&[Change::Delete { key, id: None }])?);
        Ok(verdict)
    }

    fn packet(&self, op: Op, drop_by: DropBy) -> Result<Vec<u8>> {
        let shape = Shape { seq: self.seq, purpose: Purpose::Nudge, id: 0, routed: false, drop_by };
        packet::syn(self.flow, shape).ok_or_else(|| op.malformed("addresses of two families"))
    }
}

/// For each attempt: `ct count over 0` and note that it was counted; write and note that it could be
/// written; note that it arrived, last, as the others are read when it has; drop.
fn layout(attempts: &[Attempt]) -> TableSpec {
    let mut rules = Vec::new();
    for attempt in attempts {
        let mut this = vec![
            Expr::transport(TCP_SEQ, 4),
            Expr::Equals(attempt.seq.to_be_bytes().to_vec()),
            Expr::L4Proto,
            Expr::Equals(vec![IPPROTO_TCP]),
            Expr::NfProto,
            Expr::Equals(vec![NFPROTO_IPV4]),
        ];
        let note = |set| [&key::load_v4()[..], &[Expr::Add(set)]].concat();
        rules.push([&this[..], &[Expr::CountOver(0)], &note(COUNTED)].concat());
        rules.push([&this[..], &hidden::tried(), &note(WRITTEN)].concat());
        rules.push([&this[..], &note(SEEN)].concat());
        this.push(Expr::Drop);
        rules.push(this);
    }
    let sets = [SEEN, COUNTED, WRITTEN].map(|name| SetSpec {
        name,
        key: key::TUPLE_V4,
        size: Some(16),
        timeout: Some(Duration::from_secs(60)),
        elements: Vec::new(),
    });
    let chain =
        ChainSpec { name: "trial", hook: Hook::Prerouting, priority: AFTER_CONNTRACK, rules };
    TableSpec { sets: sets.into(), chains: vec![chain], ..TableSpec::default() }
}
