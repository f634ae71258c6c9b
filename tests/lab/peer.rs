//! A client whose every packet the test decides.
//!
//! It never answers by itself: what the server sends is read only when the test asks. Nothing is
//! ever retransmitted, so a SYN that the limiter drops is seen by it exactly once.

use std::net::{IpAddr, SocketAddr};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use super::kernel;
use super::namespace::Namespace;
use super::segment::{ACK, FIN, Frame, Kind, PSH, RST, SYN, Segment, with_tcp_options};
use super::wire::Wire;

/// How long an answer may take. It comes within microseconds unless the machine is overloaded;
/// its absence must be waited for in full.
const ANSWER: Duration = Duration::from_millis(500);

/// How often a SYN is sent that must be answered.
const ATTEMPTS: usize = 20;

/// How long a probe's answer may take: for ever, as long as the machine is alive.
const PROBE: Duration = Duration::from_secs(30);

/// What is on its way when a probe is answered has been sent by another processor.
const GRACE: Duration = Duration::from_millis(100);

/// A port where nobody listens: TCPMUX.
const PROBED_PORT: u16 = 1;

/// An address that connections come from.
pub struct Peer {
    wire: Arc<Wire>,
    source: IpAddr,
    destination: IpAddr,
    next_port: Arc<AtomicU16>,
}

impl Peer {
    pub(super) fn new(
        namespace: &Namespace,
        source: IpAddr,
        destination: IpAddr,
        next_port: &Arc<AtomicU16>,
    ) -> Self {
        let wire = Wire::open(namespace, source).expect("raw sockets");
        Self { wire: Arc::new(wire), source, destination, next_port: Arc::clone(next_port) }
    }

    /// Opens one connection; `None` when it is refused, by silence, RST or ICMP error.
    pub fn connect(&self, port: u16) -> Option<RawConn> {
        self.open(port, 1).pop()
    }

    /// Tries `count` new connections at once and returns those that were completed.
    ///
    /// All SYNs leave back to back; the limiter judges them in order, so the first are admitted.
    pub fn open(&self, port: u16, count: usize) -> Vec<RawConn> {
        let pending = (0..count).map(|_| self.syn_only(port)).collect();
        let (admitted, _) = self.answers(pending, ANSWER, None);
        admitted
    }

    /// The same, without waiting in vain: what is not admitted when the server has answered a
    /// later packet is refused, and on a busy machine nothing is refused before.
    ///
    /// That packet is a SYN with FIN to port 1: conntrack calls it invalid, so no entry comes of
    /// it, and the server's TCP answers with an RST unless a rule drops it.
    pub fn open_promptly(&self, port: u16, count: usize) -> Vec<RawConn> {
        let pending = (0..count).map(|_| self.syn_only(port)).collect();
        let (admitted, _) = self.answers(pending, PROBE, Some(self.send_probe()));
        admitted
    }

    /// Opens `count` connections that nothing refuses, however busy the machine is: a SYN that was
    /// not answered is sent again, on the same tuple.
    ///
    /// # Panics
    /// When fewer are completed.
    pub fn hold(&self, port: u16, count: usize) -> Vec<RawConn> {
        let mut pending: Vec<RawConn> = (0..count).map(|_| self.syn_only(port)).collect();
        let mut held = Vec::new();
        for _ in 0..ATTEMPTS {
            let (mut completed, unanswered) = self.answers(pending, ANSWER, None);
            held.append(&mut completed);
            pending = unanswered;
            for conn in &pending {
                conn.transmit(SYN, conn.next_seq.wrapping_sub(1), 0, &[]);
            }
        }
        assert_eq!(held.len(), count, "connections of {} to port {port}", self.source);
        held
    }

    fn send_probe(&self) -> SocketAddr {
        let source = SocketAddr::new(self.source, self.next_port.fetch_add(1, Ordering::Relaxed));
        self.send(&Segment {
            source,
            destination: SocketAddr::new(self.destination, PROBED_PORT),
            seq: 0x1000_0000,
            ack: 0,
            flags: SYN | FIN,
            payload: Vec::new(),
        });
        source
    }

    /// Waits for the answers to SYNs, or until shortly after that to a `probe`; returns the
    /// connections that were completed, and those whose SYN had no answer.
    fn answers(
        &self,
        mut pending: Vec<RawConn>,
        patience: Duration,
        mut probe: Option<SocketAddr>,
    ) -> (Vec<RawConn>, Vec<RawConn>) {
        let mut admitted = Vec::new();
        let mut deadline = Instant::now() + patience;
        while !pending.is_empty() {
            let is_last = !self.wire.wait(deadline);
            self.wire.receive();
            for mut conn in std::mem::take(&mut pending) {
                match conn.handshake() {
                    Handshake::Completed => admitted.push(conn),
                    Handshake::Refused => {}
                    Handshake::Pending => pending.push(conn),
                }
            }
            if is_last {
                break;
            }
            if probe.is_some_and(|source| !self.wire.take(source).is_empty()) {
                probe = None;
                deadline = Instant::now() + GRACE;
            }
        }
        (admitted, pending)
    }

    /// Completes what has been begun with [`Self::syn_only`]; what is not answered within
    /// `patience` counts as refused.
    pub fn complete(&self, pending: Vec<RawConn>, patience: Duration) -> Vec<RawConn> {
        self.answers(pending, patience, None).0
    }

    /// The answers to what has been begun with [`Self::syn_only`], none of which is completed yet:
    /// [`RawConn::ack`] does that.
    pub fn half_open(&self, mut pending: Vec<RawConn>, patience: Duration) -> Vec<RawConn> {
        let deadline = Instant::now() + patience;
        while pending.iter().any(|conn| conn.next_ack == 0) && self.wire.wait(deadline) {
            self.wire.receive();
            pending.iter_mut().for_each(RawConn::note_answer);
        }
        pending.retain(|conn| conn.next_ack != 0);
        pending
    }

    /// How many of `count` new connections are completed; they stay open.
    pub fn admitted(&self, port: u16, count: usize) -> usize {
        self.open(port, count).len()
    }

    /// Sends a SYN from a new port and leaves it at that. When it is admitted, the server keeps a
    /// half-open connection and repeats its SYN-ACK.
    pub fn syn_only(&self, port: u16) -> RawConn {
        self.syn_from(self.next_port.fetch_add(1, Ordering::Relaxed), port)
    }

    /// The same from a port that was used before.
    pub fn syn_from(&self, own_port: u16, port: u16) -> RawConn {
        self.syn_with(own_port, port, &[], &[])
    }

    /// A SYN from a new port that offers these TCP options, padded to whole words.
    pub fn syn_with_options(&self, port: u16, options: &[u8]) -> RawConn {
        self.syn_with(self.next_port.fetch_add(1, Ordering::Relaxed), port, options, &[])
    }

    /// A SYN from a new port that brings data along (TCP Fast Open without a cookie).
    pub fn syn_with_data(&self, port: u16, data: &[u8]) -> RawConn {
        let own_port = self.next_port.fetch_add(1, Ordering::Relaxed);
        let mut conn = self.syn_with(own_port, port, &[], data);
        let length = u32::try_from(data.len()).expect("a small segment");
        conn.next_seq = conn.next_seq.wrapping_add(length);
        conn
    }

    fn syn_with(&self, own_port: u16, port: u16, options: &[u8], data: &[u8]) -> RawConn {
        // Far from both ends of the sequence space, and different for every connection.
        let seq = 0x1000_0000 + (u32::from(own_port) << 8);
        let conn = RawConn {
            wire: Arc::clone(&self.wire),
            client: SocketAddr::new(self.source, own_port),
            server: SocketAddr::new(self.destination, port),
            next_seq: seq.wrapping_add(1),
            next_ack: 0,
            fin_seq: None,
            seen: Seen::default(),
        };
        let mut syn = conn.segment(SYN, -1);
        (syn.ack, syn.payload) = (0, data.to_vec());
        self.send_packet(&with_tcp_options(&syn.to_packet(), options));
        conn
    }

    /// Sends a packet of the test's own making, IP header included.
    pub fn send_packet(&self, packet: &[u8]) {
        self.wire.send(packet, self.destination);
    }

    /// Sends a segment of the test's own making.
    pub fn send(&self, segment: &Segment) {
        self.wire.send(&segment.to_packet(), segment.destination.ip());
    }
}

/// A connection that exists in the server's kernel and, on this side, only in these numbers.
pub struct RawConn {
    wire: Arc<Wire>,
    /// This side's address and port: the socket's remote.
    pub client: SocketAddr,
    /// The server's address and port: the socket's local.
    pub server: SocketAddr,
    next_seq: u32,
    next_ack: u32,
    fin_seq: Option<u32>,
    seen: Seen,
}

/// What the server has sent so far, as far as the test has looked.
#[derive(Default)]
struct Seen {
    /// Highest acknowledgement number.
    acked: u32,
    payload: usize,
    fin: bool,
    rst: bool,
}

enum Handshake {
    Completed,
    Refused,
    Pending,
}

impl RawConn {
    /// Half-closes: no more data from the client. Repeating it is [`Self::fin_again`].
    pub fn fin(&mut self) {
        let seq = self.next_seq;
        self.fin_seq = Some(seq);
        self.next_seq = seq.wrapping_add(1);
        self.fin_again();
    }

    /// The same FIN once more, as a retransmission is.
    ///
    /// # Panics
    /// Before the first FIN.
    pub fn fin_again(&self) {
        let seq = self.fin_seq.expect("a first FIN");
        self.transmit(FIN | ACK, seq, self.next_ack, &[]);
    }

    /// An RST whose sequence number is that of the FIN plus `offset` (of the next byte when there
    /// was no FIN). After a FIN, Linux accepts 0 and +1 and nothing else.
    pub fn rst(&self, offset: i64) {
        let base = self.fin_seq.unwrap_or(self.next_seq);
        self.transmit(RST, shifted(base, offset), 0, &[]);
    }

    /// An RST that the server's TCP ignores and conntrack believes.
    pub fn stale_rst(&self) {
        self.rst(kernel::stale_rst());
    }

    pub fn send(&mut self, data: &[u8]) {
        self.transmit(PSH | ACK, self.next_seq, self.next_ack, data);
        let length = u32::try_from(data.len()).expect("a small segment");
        self.next_seq = self.next_seq.wrapping_add(length);
    }

    /// Acknowledges what has been seen so far.
    pub fn ack(&self) {
        self.transmit(ACK, self.next_seq, self.next_ack, &[]);
    }

    /// A FIN at a sequence number `offset` away from the next one; with an offset above 0 there is
    /// a hole before it, and the server's socket stays ESTABLISHED.
    pub fn fin_at(&self, offset: i64) {
        self.transmit(FIN | ACK, shifted(self.next_seq, offset), self.next_ack, &[]);
    }

    /// A bare ACK `offset` away from the next sequence number.
    pub fn ack_at(&self, offset: i64) {
        self.transmit(ACK, shifted(self.next_seq, offset), self.next_ack, &[]);
    }

    /// An RST `offset` away from the next sequence number.
    pub fn rst_at(&self, offset: i64) {
        self.transmit(RST, shifted(self.next_seq, offset), 0, &[]);
    }

    /// A SYN on this connection's own tuple, as a client that has forgotten it would send.
    pub fn syn(&self) {
        self.transmit(SYN, self.next_seq.wrapping_add(100_000), 0, &[]);
    }

    /// Opens the same tuple anew, when the server has closed and forgotten it; false when it is
    /// refused. Sequence numbers go on far above those of before.
    pub fn reopen(&mut self) -> bool {
        let seq = self.next_seq.wrapping_add(100_000);
        self.read();
        (self.next_seq, self.fin_seq, self.seen) = (seq.wrapping_add(1), None, Seen::default());
        self.transmit(SYN, seq, 0, &[]);
        let deadline = Instant::now() + ANSWER;
        loop {
            let is_last = !self.wire.wait(deadline);
            self.wire.receive();
            match self.handshake() {
                Handshake::Completed => return true,
                Handshake::Pending if !is_last => {}
                Handshake::Pending | Handshake::Refused => return false,
            }
        }
    }

    /// A segment of this connection with these flags, `offset` away from the next sequence
    /// number: to be changed at will and sent with [`Peer::send`].
    pub fn segment(&self, flags: u8, offset: i64) -> Segment {
        Segment {
            source: self.client,
            destination: self.server,
            seq: shifted(self.next_seq, offset),
            ack: self.next_ack,
            flags,
            payload: Vec::new(),
        }
    }

    /// Waits until the server has acknowledged all that was sent, the FIN included.
    pub fn await_ack(&mut self) -> bool {
        self.watch(|conn| conn.seen.acked == conn.next_seq)
    }

    /// Waits for the server's FIN.
    pub fn await_fin(&mut self) -> bool {
        self.watch(|conn| conn.seen.fin)
    }

    /// Waits for an RST of the server.
    pub fn await_rst(&mut self) -> bool {
        self.watch(|conn| conn.seen.rst)
    }

    /// Reads everything that the server has sent and acknowledges it, its FIN included.
    pub fn ack_all(&mut self) {
        self.read();
        self.ack();
    }

    /// Bytes of data that the server has sent, as far as they were read; repetitions count.
    pub fn received(&mut self) -> usize {
        self.read();
        self.seen.payload
    }

    fn watch(&mut self, done: impl Fn(&Self) -> bool) -> bool {
        let deadline = Instant::now() + ANSWER;
        self.read();
        while !done(self) {
            let is_last = !self.wire.wait(deadline);
            self.read();
            if is_last {
                break;
            }
        }
        done(self)
    }

    /// Takes note of the server's SYN-ACK.
    fn note_answer(&mut self) {
        for frame in self.wire.take(self.client) {
            if let Kind::Tcp { flags, seq, .. } = frame.kind
                && flags & (SYN | ACK | RST) == SYN | ACK
            {
                self.next_ack = seq.wrapping_add(1);
            }
        }
    }

    fn handshake(&mut self) -> Handshake {
        for frame in self.wire.take(self.client) {
            match frame.kind {
                Kind::Tcp { flags, seq, .. } if flags & (SYN | ACK | RST) == SYN | ACK => {
                    self.next_ack = seq.wrapping_add(1);
                    self.ack();
                    return Handshake::Completed;
                }
                Kind::Tcp { flags, .. } if flags & RST == 0 => {}
                Kind::Tcp { .. } | Kind::Icmp { .. } => return Handshake::Refused,
            }
        }
        Handshake::Pending
    }

    fn read(&mut self) {
        self.wire.receive();
        for frame in self.wire.take(self.client) {
            self.note(&frame);
        }
    }

    fn note(&mut self, frame: &Frame) {
        let Kind::Tcp { flags, seq, ack, payload } = frame.kind else {
            return;
        };
        self.seen.rst |= flags & RST != 0;
        self.seen.fin |= flags & FIN != 0;
        self.seen.payload += payload;
        if flags & ACK != 0 && is_after(ack, self.seen.acked) {
            self.seen.acked = ack;
        }
        // Nothing is lost on this wire, so the end of the last segment is the next byte.
        let length = u32::try_from(payload).expect("a packet's length") + u32::from(flags & FIN);
        let end = seq.wrapping_add(length);
        if flags & (SYN | RST) == 0 && is_after(end, self.next_ack) {
            self.next_ack = end;
        }
    }

    fn transmit(&self, flags: u8, seq: u32, ack: u32, data: &[u8]) {
        let segment = Segment {
            source: self.client,
            destination: self.server,
            seq,
            ack,
            flags,
            payload: data.to_vec(),
        };
        self.wire.send(&segment.to_packet(), self.server.ip());
    }
}

/// Sequence numbers wrap: the offset is taken modulo 2^32.
fn shifted(seq: u32, offset: i64) -> u32 {
    let modulus = 1_i64 << 32;
    u32::try_from((i64::from(seq) + offset).rem_euclid(modulus)).expect("below the modulus")
}

/// Comparison of sequence numbers (RFC 9293, 3.4).
fn is_after(seq: u32, other: u32) -> bool {
    seq != other && seq.wrapping_sub(other) < 1 << 31
}
