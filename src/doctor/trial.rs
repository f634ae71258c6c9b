//! Tries every route on a real limit, in a network namespace of its own.

use std::net::{Ipv4Addr, TcpListener};
use std::thread;
use std::time::{Duration, Instant};

use tun_rs::SyncDevice;

use crate::conntrack::{Change, Conntrack, Entry, Insert, Status, TcpState, Zone};
use crate::error::{Cause, Op, Result};
use crate::flow::{Endpoint, FourTuple};
use crate::nftables::{ChainSpec, Expr, Hook, SetSpec, Table, TableSpec, key};
use crate::recount::{Mode, Recipe, Recount, Recounter, Route, tap};
use crate::rtnetlink::link::set_up;

/// `lo` is the first device of every namespace.
const LOOPBACK: u32 = 1;
const IPPROTO_TCP: u8 = 6;
const NFPROTO_IPV4: u8 = 2;
const PORT: u16 = 80;
/// The limit's table, and its set of connections that were counted.
const LIMIT: &str = "limit";
const COUNTED: &str = "counted";
/// A packet may wait for another processor.
const TRIES: u32 = 100;
const PAUSE: Duration = Duration::from_millis(2);
/// The entry of the trial; the namespace lives shorter.
const TIMEOUT: Duration = Duration::from_secs(60);

/// What became of a nudge by each route.
#[derive(Debug)]
pub(super) struct Trial {
    /// Whether a limit counted the connection after the nudge, and what was shown of it then.
    pub routes: [(Route, Result<Counted>); 2],
}

/// Of a connection that was counted.
#[derive(Debug)]
pub(super) struct Counted {
    /// Whether it could be sealed.
    pub sealed: Result<()>,
    /// Whether its packets could be hidden from conntrack; `None` where that was not seen.
    pub hides: Option<bool>,
}

impl Trial {
    /// Sends a nudge by each route past a limit. The calling thread must be in a namespace of its
    /// own: devices, rules and entries are made there.
    ///
    /// # Errors
    /// The namespace cannot be furnished: a privilege, conntrack or `ct count` is missing.
    pub(super) fn run(now: Instant) -> Result<Self> {
        set_up(LOOPBACK)?;
        let op = Op::new("listen in trial namespace");
        // As on the host: the server's port is open, and its TCP drops the nudge in silence.
        let _server = TcpListener::bind(("0.0.0.0", PORT)).map_err(|error| op.io(error))?;
        drop(limit()?);
        let by_ingress = || {
            let _client = interface_of_client()?;
            try_out(Mode::Ingress, [198, 51, 100, 7], [198, 51, 100, 1], now)
        };
        let by_loopback = || try_out(Mode::Loopback, [127, 0, 0, 2], [127, 0, 0, 1], now);
        Ok(Self { routes: [(Route::Ingress, by_ingress()), (Route::Loopback, by_loopback())] })
    }
}

/// Makes an entry as a repair does, nudges, and asks the limit.
fn try_out(mode: Mode, client: [u8; 4], server: [u8; 4], now: Instant) -> Result<Counted> {
    let (client, server) = (Endpoint::new(client.into(), 1024), Endpoint::new(server.into(), PORT));
    let flow = FourTuple::new(client, server);
    let op = Op::on("recount", flow);
    let unavailable = |what: &str| op.failed(Cause::Unavailable(what.to_owned()));
    let mut limit = limit()?;
    let mut recounter =
        Recounter::open(mode, "ctkeep", now)?.ok_or_else(|| unavailable("no route"))?;
    let like = Entry::plain(flow, Zone::default());
    let mut conntrack = Conntrack::open()?;
    let mut insert = |status| -> Result<()> {
        let insert = Insert { like, state: TcpState::Established, status, timeout: TIMEOUT };
        conntrack.change(&[Change::Insert(insert)])?.into_iter().collect()
    };
    let way = recounter.way(&like, now)?;
    match way.recipe {
        Recipe::Replace => {
            insert(Status::FRESH)?;
            recounter.nudge(&like, way.route, now)?;
        }
        Recipe::Fresh => {
            recounter.nudge(&like, way.route, now)?;
            insert(Status::ASSURED)?;
        }
    }
    for _ in 0..TRIES {
        // An element that is not there cannot be removed.
        match limit.remove(COUNTED, &[key::of(flow)]) {
            Ok(()) => {
                let (sealed, hides) = (recounter.seal(&like, now), recounter.hides());
                return Ok(Counted { sealed, hides });
            }
            Err(error) if error.is_absent() => thread::sleep(PAUSE),
            Err(error) => return Err(error),
        }
    }
    Err(unavailable("sent, and the limit did not count it"))
}

/// `ct count over 0 add @counted { ip saddr . tcp sport . ip daddr . tcp dport }`: what the limit
/// counts leaves its name. Each limit counts from zero.
fn limit() -> Result<Table> {
    let mut rule = vec![Expr::NfProto, Expr::Equals(vec![NFPROTO_IPV4])];
    rule.extend([Expr::L4Proto, Expr::Equals(vec![IPPROTO_TCP]), Expr::CountOver(0)]);
    rule.extend(key::load_v4());
    rule.push(Expr::Add(COUNTED));
    let counted = SetSpec {
        name: COUNTED,
        key: key::TUPLE_V4,
        size: Some(16),
        timeout: Some(TIMEOUT),
        elements: Vec::new(),
    };
    let chain = ChainSpec { name: "input", hook: Hook::Input, priority: 0, rules: vec![rule] };
    Table::create(
        LIMIT,
        &TableSpec { sets: vec![counted], chains: vec![chain], ..TableSpec::default() },
    )
}

/// The device that the client is reached by.
fn interface_of_client() -> Result<SyncDevice> {
    let op = Op::new("create interface of trial");
    let device = tap(op, "client")?;
    let device = device.ipv4(Ipv4Addr::new(198, 51, 100, 1), 24, None).enable(true).build_sync();
    device.map_err(|error| op.failed(Cause::Unavailable(format!("{error} (modprobe tun)"))))
}
