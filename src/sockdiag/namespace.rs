//! The conversation with the kernel about the sockets of one network namespace.

use std::collections::{BTreeSet, HashMap, HashSet};

use netlink_packet_core::DecodeError;
use nix::errno::Errno;

use super::mptcp::Mptcp;
use super::{Lookup, Opener, Socket, SocketSilence, State, States, decode, listener, request};
use crate::error::{Cause, Error, Op, Result};
use crate::flow::Connection;
use crate::netlink::{Conversation, Frame, Transport};

/// Devices that absent connections are asked for with, one by one: some VRFs or VLANs, as a rule
/// none. Beyond them the newest are kept.
const BOUND: usize = 64;

/// The sockets of one network namespace.
#[derive(Debug)]
pub(super) struct Sockets<T> {
    conversation: Conversation<T>,
    /// Devices that sockets of its dumps were bound to.
    bound: BTreeSet<u32>,
    mptcp: Mptcp,
    /// Listeners are asked what they are besides.
    asks_listeners: bool,
    /// Ports of listeners that take what is for other hosts.
    proxies: HashSet<u16>,
}

impl<T: Transport> Sockets<T> {
    pub(super) fn new(transport: T) -> Self {
        let conversation = Conversation::new(transport);
        Self {
            conversation,
            bound: BTreeSet::new(),
            mptcp: Mptcp::default(),
            asks_listeners: false,
            proxies: HashSet::new(),
        }
    }

    /// Asks listeners what they are besides: of Multipath TCP, or transparent.
    pub(super) fn ask_listeners(&mut self) {
        self.asks_listeners = true;
        self.mptcp.begin();
    }

    pub(super) fn uses_mptcp(&self) -> bool {
        self.mptcp.is_used()
    }

    pub(super) fn mptcp_ports(&self) -> HashSet<u16> {
        self.mptcp.ports().collect()
    }

    /// Gives back the room for answers.
    pub(super) fn rest(&mut self) {
        self.conversation.rest();
    }

    /// All sockets in these states; some perhaps twice.
    pub(super) fn dump(&mut self, states: States) -> Result<Vec<Socket>> {
        if self.asks_listeners && states == States::from_iter([State::Listen]) {
            return self.follow_listeners();
        }
        let mut all = self.dump_tcp(states)?;
        if self.asks_listeners
            && (states.contains(State::CloseWait) || states.contains(State::Listen))
        {
            self.follow_listeners()?;
        }
        if states.contains(State::CloseWait) && self.uses_mptcp() {
            all.extend(self.without_tcp()?);
        }
        Ok(all)
    }

    /// All listeners; notes what they are besides.
    fn follow_listeners(&mut self) -> Result<Vec<Socket>> {
        let listeners = listener::listeners(&mut self.conversation).map_err(or_module_missing)?;
        self.mptcp.follow(&listeners);
        let proxies = listeners.iter().filter(|listener| listener.is_transparent);
        self.proxies = proxies.map(|listener| listener.socket.local.port()).collect();
        let all: Vec<_> = listeners.into_iter().map(|listener| listener.socket).collect();
        self.note_bound(&all);
        Ok(all)
    }

    pub(super) fn proxies(&self) -> &HashSet<u16> {
        &self.proxies
    }

    /// Sockets that take, or took, what is for other hosts.
    pub(super) fn transparent(&mut self) -> Result<Vec<Socket>> {
        let request = request::with_attributes(States::open());
        self.conversation.dump(&request, |all: &mut Vec<Socket>, frame| {
            all.extend(listener::transparent(frame).map_err(|error| request.op.malformed(error))?);
            Ok(())
        })
    }

    /// Connections of Multipath TCP that have no TCP socket.
    pub(super) fn without_tcp(&mut self) -> Result<Vec<Socket>> {
        let singles = self.mptcp.singles(&mut self.conversation)?;
        let lookups: Vec<_> = singles.iter().map(Lookup::from).collect();
        let mut found = vec![None; lookups.len()];
        self.look_up_tcp(&lookups, &mut found)?;
        let alone = singles.into_iter().zip(found).filter(|(_, tcp)| tcp.is_none());
        Ok(alone.map(|(socket, _)| socket).collect())
    }

    pub(super) fn dump_tcp(&mut self, states: States) -> Result<Vec<Socket>> {
        let request = request::dump(states);
        let all = self.conversation.dump(&request, |all: &mut Vec<Socket>, frame| {
            all.extend(decode::socket(frame).map_err(|error| request.op.malformed(error))?);
            Ok(())
        });
        let all = all.map_err(or_module_missing)?;
        self.note_bound(&all);
        Ok(all)
    }

    fn note_bound(&mut self, all: &[Socket]) {
        let bound = &mut self.bound;
        bound.extend(all.iter().map(|socket| socket.interface).filter(|bound| *bound != 0));
        while bound.len() > BOUND {
            bound.pop_first();
        }
    }

    /// Looks up those of these connections that have not been found yet.
    pub(super) fn look_up(
        &mut self,
        lookups: &[Lookup],
        found: &mut [Option<Socket>],
    ) -> Result<()> {
        self.look_up_tcp(lookups, found)?;
        if self.uses_mptcp() && found.iter().any(Option::is_none) {
            let singles = self.mptcp.singles(&mut self.conversation)?;
            let known: HashMap<_, _> = singles.iter().map(|it| (it.connection(), *it)).collect();
            for (slot, lookup) in found.iter_mut().zip(lookups) {
                *slot = slot.or_else(|| known.get(&lookup.connection).copied());
            }
        }
        Ok(())
    }

    fn look_up_tcp(&mut self, lookups: &[Lookup], found: &mut [Option<Socket>]) -> Result<()> {
        let Self { conversation, bound, .. } = self;
        look_up_missing(conversation, lookups, found, |lookup| Some(*lookup))?;
        for device in bound.iter() {
            let by_it = |lookup: &Lookup| Lookup { interface: *device, ..*lookup };
            look_up_missing(conversation, lookups, found, |lookup| {
                (lookup.interface != *device).then(|| by_it(lookup))
            })?;
        }
        Ok(())
    }

    /// Finds out who has opened those of these connections of which it is not known yet.
    pub(super) fn openers(
        &mut self,
        lookups: &[Lookup],
        openers: &mut [Option<Opener>],
    ) -> Result<()> {
        self.info(lookups, openers, decode::opener)
    }

    /// Looks those of these connections up that have not been found yet, with what TCP knows of
    /// their silence.
    pub(super) fn silences(
        &mut self,
        lookups: &[Lookup],
        silences: &mut [Option<SocketSilence>],
    ) -> Result<()> {
        self.info(lookups, silences, decode::silence)
    }

    /// Looks connections up by what `read` makes of a message with TCP's own figures.
    fn info<A: Copy>(
        &mut self,
        lookups: &[Lookup],
        answers: &mut [Option<A>],
        read: impl Fn(Frame<'_>) -> std::result::Result<Option<(Connection, A)>, DecodeError>,
    ) -> Result<()> {
        let requests: Vec<_> = lookups.iter().map(request::info).collect();
        let found = self.conversation.find(&requests, "a socket", |index, op, frame| {
            let answer = read(frame).map_err(|error| op.malformed(error))?;
            let is_it =
                |connection| lookups.get(index).is_some_and(|asked| asked.connection == connection);
            Ok(answer.filter(|(flow, _)| is_it(*flow)).map(|(_, answer)| answer))
        })?;
        answers.iter_mut().zip(found).for_each(|(slot, answer)| *slot = slot.or(answer));
        Ok(())
    }

    /// Closes a socket; false where it is not here, or another one has its tuple.
    pub(super) fn destroy(&mut self, socket: &Socket) -> Result<bool> {
        let request = request::destroy(socket);
        match self.conversation.execute(&request) {
            Ok(()) => Ok(true),
            Err(error) => match error.errno() {
                Some(Errno::ENOENT | Errno::ESTALE) => Ok(false),
                Some(Errno::EOPNOTSUPP) => Err(request.op.failed(Cause::Unavailable(
                    "this kernel closes no sockets on demand (EOPNOTSUPP): it was built without \
                     CONFIG_INET_DIAG_DESTROY"
                        .to_owned(),
                ))),
                _ => Err(error),
            },
        }
    }
}

/// Asks for what is not found yet, by what `ask` makes of it.
fn look_up_missing<T: Transport>(
    conversation: &mut Conversation<T>,
    lookups: &[Lookup],
    found: &mut [Option<Socket>],
    ask: impl Fn(&Lookup) -> Option<Lookup>,
) -> Result<()> {
    let missing = found.iter_mut().zip(lookups).filter(|(socket, _)| socket.is_none());
    let asked = missing.filter_map(|(slot, lookup)| Some((slot, ask(lookup)?)));
    let (slots, asked): (Vec<_>, Vec<_>) = asked.unzip();
    for (slot, socket) in slots.into_iter().zip(lookup_in(conversation, &asked)?) {
        *slot = socket;
    }
    Ok(())
}

/// The sockets of these connections in one namespace.
fn lookup_in<T: Transport>(
    conversation: &mut Conversation<T>,
    lookups: &[Lookup],
) -> Result<Vec<Option<Socket>>> {
    let requests: Vec<_> = lookups.iter().map(request::lookup).collect();
    conversation.find(&requests, "a socket", |index, op, frame| {
        let socket = decode::socket(frame).map_err(|error| op.malformed(error))?;
        let is_it =
            |connection| lookups.get(index).is_some_and(|asked| asked.connection == connection);
        Ok(socket.filter(|socket| socket.state != State::Listen && is_it(socket.connection())))
    })
}

/// Names the module where a dump shows that it is missing: `tcp_diag`, or `inet_diag` below it.
fn or_module_missing(error: Error) -> Error {
    match error.errno() {
        Some(Errno::ENOENT | Errno::EOPNOTSUPP) => {
            Op::new("dump of TCP sockets").failed(Cause::Unavailable(format!(
                "the kernel has no TCP socket diagnosis ({:?}); load it: modprobe tcp_diag",
                Errno::ENOENT
            )))
        }
        _ => error,
    }
}
