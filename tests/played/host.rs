//! A host that exists only in a test: both tables as lists, and the kernel's rules for changing
//! one of them.

use std::cell::RefCell;
use std::rc::Rc;
use std::time::Duration;

use ctkeep::conntrack::{Conntrack, Entry, Status, Tcp, TcpState, Zone};
use ctkeep::flow::{Connection, Endpoint, FourTuple};
use ctkeep::netlink::Transport;
use ctkeep::reconcile::observe::Tables;
use ctkeep::sockdiag::{Cookie, SockDiag, Socket, State};

use super::{
    CT_DELETE, CT_GET, CT_GET_STATS, CT_NEW, EEXIST, EINVAL, ENOENT, ENOMEM, NLM_F_CREATE, Played,
    Request, SOCK_DIAG_BY_FAMILY, attribute, attributes, descend, dumped_states, entry_message,
    listed_socket, message, obliging, socket_message,
};

const IPS_EXPECTED: u32 = 1;
const EBUSY: i32 = 16;

/// Both tables. Change them at will between two requests.
#[derive(Clone, Debug, Default)]
pub struct Host {
    pub sockets: Vec<Socket>,
    pub entries: Vec<Entry>,
    /// The port whose sockets are in another namespace, where there is one.
    pub inside: Option<u16>,
    /// Sockets that have opened their connections themselves, by TCP's counters.
    pub opened_here: Vec<Cookie>,
    /// Sockets that dumps skip, as they do under churn; look-ups find them.
    pub skipped: Vec<Cookie>,
    /// Entries that the table has room for, where it is limited.
    pub maximum: Option<usize>,
    /// Dumps go from the last to the first.
    pub is_listed_backwards: bool,
    /// How many requests changed the table.
    pub changes: usize,
    /// How many dumps walked it.
    pub walks: usize,
    /// How many dumps asked for half-closed sockets.
    pub half_closed: usize,
    /// How many questions were about one entry or one socket.
    pub looks: usize,
}

pub type Shared = Rc<RefCell<Host>>;

impl Host {
    /// The host, and ctkeep's view of it.
    pub fn open(self) -> (Shared, Tables<Played>) {
        self.open_by(|played, _| played)
    }

    /// The same by transports of the caller's own; `true` for that of the entries.
    pub fn open_by<T: Transport>(self, way: impl Fn(Played, bool) -> T) -> (Shared, Tables<T>) {
        let host = Rc::new(RefCell::new(self));
        let tables = Self::tables(&host, way);
        (host, tables)
    }

    /// Another view of the same host.
    pub fn tables<T: Transport>(host: &Shared, way: impl Fn(Played, bool) -> T) -> Tables<T> {
        let (for_entries, for_sockets) = (host.clone(), host.clone());
        let conntrack = obliging(move |request| for_entries.borrow_mut().entries(request));
        let sockets = obliging(move |request| for_sockets.borrow_mut().sockets(request, false));
        Tables {
            conntrack: Conntrack::new(way(conntrack, true)),
            sockets: SockDiag::new(way(sockets, false)),
            homes: Vec::new(),
            tracking: None,
        }
    }

    /// The sockets of the other namespace.
    pub fn sockets_inside<T: Transport>(
        host: &Shared,
        way: impl Fn(Played, bool) -> T,
    ) -> SockDiag<T> {
        let host = host.clone();
        let sockets = obliging(move |request| host.borrow_mut().sockets(request, true));
        SockDiag::new(way(sockets, false))
    }

    /// A dump by states, or one socket by its tuple (`struct inet_diag_req_v2`).
    fn sockets(&mut self, request: &Request, inside: bool) -> Result<Vec<Vec<u8>>, i32> {
        let body = &request.body;
        let is_there = |socket: &Socket| (self.inside == Some(socket.local.port())) == inside;
        if request.is_dump() {
            let states = dumped_states(request);
            self.half_closed += usize::from(states & (1 << State::CloseWait as u8) != 0);
            let wanted = |socket: &&Socket| {
                states & (1 << socket.state as u8) != 0
                    && is_there(socket)
                    && !self.skipped.contains(&socket.cookie)
            };
            let found = self.sockets.iter().filter(wanted);
            let found = found.map(|socket| listed_socket(request.seq, socket)).collect();
            return Ok(self.listed(found));
        }
        self.looks += 1;
        let family = body[0];
        let port = |at: usize| u16::from_be_bytes([body[at], body[at + 1]]);
        let end = |at: usize, port| match family {
            2 => Endpoint::new(<[u8; 4]>::try_from(&body[at..at + 4]).unwrap().into(), port),
            _ => Endpoint::new(<[u8; 16]>::try_from(&body[at..at + 16]).unwrap().into(), port),
        };
        let asked = Connection::new(end(12, port(8)), end(28, port(10)));
        let device = u32::from_ne_bytes(body[44..48].try_into().unwrap());
        // `inet_sk_bound_dev_eq()`
        let is_by = |s: &Socket| s.interface == 0 || s.interface == device;
        let exact = |s: &&Socket| s.connection() == asked && s.state != State::Listen && is_by(s);
        let exact = self.sockets.iter().filter(|socket| is_there(socket)).find(exact);
        // The kernel falls back to whoever listens on the port.
        let listener =
            |s: &&Socket| s.state == State::Listen && s.local.port() == asked.local.port();
        let fallback = || self.sockets.iter().filter(|socket| is_there(socket)).find(listener);
        let socket = exact.or_else(fallback).ok_or(ENOENT)?;
        let mut answer = socket_message(request.seq, socket);
        // `INET_DIAG_INFO` is asked for.
        if body[2] & 2 != 0 {
            let mut info = vec![0; 232];
            let is_fin_acked = u8::from(socket.state == State::FinWait2);
            // `tcpi_bytes_acked`
            info[120] = u8::from(self.opened_here.contains(&socket.cookie)) + is_fin_acked;
            let payload = [answer.split_off(16), attribute(2, &info)].concat();
            answer = message(SOCK_DIAG_BY_FAMILY, 0, request.seq, &payload);
        }
        Ok(vec![answer])
    }

    fn entries(&mut self, request: &Request) -> Result<Vec<Vec<u8>>, i32> {
        let body = &request.body[4..];
        match request.kind {
            CT_GET if request.is_dump() => {
                self.walks += 1;
                let family = request.body[0];
                // As a kernel before 5.8, which knows no filter.
                let wanted = |e: &&Entry| family == 0 || e.orig.family() == family;
                let found = self.entries.iter().filter(wanted);
                let found = found.map(|entry| entry_message(request.seq, entry)).collect();
                Ok(self.listed(found))
            }
            CT_GET => {
                self.looks += 1;
                let index = self.find(body).ok_or(ENOENT)?;
                Ok(vec![entry_message(request.seq, &self.entries[index])])
            }
            CT_GET_STATS => {
                let count = self.entries.len() as u32;
                let payload = [vec![0; 4], attribute(1, &count.to_be_bytes())].concat();
                Ok(vec![message(CT_GET_STATS, 0, request.seq, &payload)])
            }
            CT_NEW => {
                self.changes += 1;
                match self.find(body) {
                    Some(_) if request.flags & NLM_F_CREATE != 0 => Err(EEXIST),
                    None if self.maximum.is_some_and(|most| self.entries.len() >= most) => {
                        Err(ENOMEM)
                    }
                    None if request.flags & NLM_F_CREATE == 0 => Err(ENOENT),
                    Some(index) => {
                        // `ctnetlink_change_status()`: what a helper has expected stays so.
                        let old = self.entries[index].status.map_or(0, |status| status.0);
                        let new = descend(body, &[3]).map_or(old, big_endian);
                        if (old ^ new) & IPS_EXPECTED != 0 {
                            return Err(EBUSY);
                        }
                        update(&mut self.entries[index], body);
                        Ok(Vec::new())
                    }
                    None => {
                        let orig = tuple(descend(body, &[1]).unwrap());
                        let mut entry = Entry::plain(orig, zone(body));
                        entry.id = Some(self.changes as u32);
                        update(&mut entry, body);
                        let has = |e: &Entry| e.orig == entry.reply || e.reply == entry.reply;
                        if self.entries.iter().any(|e| e.zone == entry.zone && has(e)) {
                            return Err(EEXIST);
                        }
                        self.entries.push(entry);
                        Ok(Vec::new())
                    }
                }
            }
            CT_DELETE => {
                self.changes += 1;
                let index = self.find(body).ok_or(ENOENT)?;
                let id = descend(body, &[12]).map(big_endian);
                if id.is_some_and(|id| self.entries[index].id != Some(id)) {
                    return Err(ENOENT);
                }
                self.entries.remove(index);
                Ok(Vec::new())
            }
            _ => Err(EINVAL),
        }
    }

    fn listed(&self, mut messages: Vec<Vec<u8>>) -> Vec<Vec<u8>> {
        if self.is_listed_backwards {
            messages.reverse();
        }
        messages
    }

    /// The kernel finds an entry by either of its tuples, in its zone.
    fn find(&self, body: &[u8]) -> Option<usize> {
        let asked = descend(body, &[1]).or_else(|| descend(body, &[2]))?;
        let (asked, zone) = (tuple(asked), zone(body));
        let has = |e: &Entry| e.zone == zone && (e.orig == asked || e.reply == asked);
        self.entries.iter().position(has)
    }
}

fn update(entry: &mut Entry, body: &[u8]) {
    for (kind, value) in attributes(body) {
        match kind {
            // Bits are set, never cleared.
            3 => {
                let old = entry.status.map_or(0, |status| status.0);
                entry.status = Some(Status(old | big_endian(value)));
            }
            4 => {
                let state = TcpState::from_kernel(descend(value, &[1, 1]).unwrap()[0]).unwrap();
                let old = entry.tcp.map_or([0, 0], |tcp| tcp.flags);
                // `struct nf_ct_tcp_flags`: the flags, and which of them.
                let flag = |kind, old: u8| {
                    let pair = descend(value, &[1, kind])?;
                    Some(old & !pair[1] | pair[0] & pair[1])
                };
                entry.tcp = Some(Tcp {
                    state,
                    wscale: entry.tcp.map_or([0, 0], |tcp| tcp.wscale),
                    flags: [flag(4, old[0]).unwrap_or(old[0]), flag(5, old[1]).unwrap_or(old[1])],
                });
            }
            7 => entry.timeout = Some(Duration::from_secs(big_endian(value).into())),
            8 => entry.mark = Some(big_endian(value)),
            // `CTA_NAT_SRC`, `CTA_NAT_DST`: one address and port each.
            6 => entry.reply.dst = translated(value),
            13 => entry.reply.src = translated(value),
            _ => {}
        }
    }
}

fn translated(nat: &[u8]) -> Endpoint {
    let addr = match (descend(nat, &[1]), descend(nat, &[4])) {
        (Some(bytes), _) => <[u8; 4]>::try_from(bytes).unwrap().into(),
        (_, Some(bytes)) => <[u8; 16]>::try_from(bytes).unwrap().into(),
        _ => panic!("a translation without address"),
    };
    let port = descend(nat, &[3, 1]).expect("a port");
    Endpoint::new(addr, u16::from_be_bytes([port[0], port[1]]))
}

fn zone(body: &[u8]) -> Zone {
    let id = |path: &[u16]| {
        descend(body, path).map_or(0, |value| u16::from_be_bytes([value[0], value[1]]))
    };
    match id(&[18]) {
        0 => Zone { orig: id(&[1, 3]), reply: id(&[2, 3]) },
        both => Zone::both(both),
    }
}

/// The tuple in `CTA_TUPLE_ORIG` or `CTA_TUPLE_REPLY`.
pub fn tuple(nested: &[u8]) -> FourTuple {
    let addr = |v4, v6| match (descend(nested, &[1, v4]), descend(nested, &[1, v6])) {
        (Some(bytes), _) => <[u8; 4]>::try_from(bytes).unwrap().into(),
        (_, Some(bytes)) => <[u8; 16]>::try_from(bytes).unwrap().into(),
        _ => panic!("a tuple without address"),
    };
    let port = |kind| {
        let bytes = descend(nested, &[2, kind]).expect("a port");
        u16::from_be_bytes([bytes[0], bytes[1]])
    };
    FourTuple::new(Endpoint::new(addr(1, 3), port(2)), Endpoint::new(addr(2, 4), port(3)))
}

fn big_endian(value: &[u8]) -> u32 {
    u32::from_be_bytes(value.try_into().unwrap())
}
