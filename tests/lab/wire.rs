//! Raw sockets at the client's end of the cable: any packet out, every answer in.
//!
//! Packets leave through raw IP sockets, so that the kernel finds the way and the link header.
//! Answers are taken from packet sockets, before the client's IP layer drops them as not its own.

use std::collections::VecDeque;
use std::io::{self, ErrorKind, Read};
use std::net::{IpAddr, SocketAddr};
use std::os::fd::AsFd;
use std::sync::{Mutex, MutexGuard};
use std::thread;
use std::time::{Duration, Instant};

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, SockAddr, SockFilter, Socket, Type};

use super::namespace::Namespace;
use super::segment::{Frame, Kind};

/// linux/if_ether.h. A packet socket of one protocol does not see what its own host sends.
const ETH_P_IP: u16 = 0x0800;
const ETH_P_IPV6: u16 = 0x86dd;

/// Protocol 255: the header is included (raw(7), ipv6(7)).
const IPPROTO_RAW: i32 = 255;

/// Frames that nobody asked for are forgotten, oldest first, beyond this number.
const INBOX: usize = 20_000;

/// Delivery across a veth is part of sending; only a busy machine puts it off.
const SETTLE: Duration = Duration::from_millis(50);

/// One address of the client network, as a packet sees it.
pub struct Wire {
    outgoing: Socket,
    incoming: Socket,
    inbox: Mutex<VecDeque<Frame>>,
}

impl Wire {
    /// Opens the sockets for `address` inside `namespace`.
    pub fn open(namespace: &Namespace, address: IpAddr) -> io::Result<Self> {
        namespace.within(|| {
            let (domain, protocol) = match address {
                IpAddr::V4(_) => (Domain::IPV4, ETH_P_IP),
                IpAddr::V6(_) => (Domain::IPV6, ETH_P_IPV6),
            };
            let raw = Protocol::from(IPPROTO_RAW);
            let outgoing = Socket::new(domain, Type::RAW, Some(raw))?;
            if matches!(address, IpAddr::V6(v6) if v6.is_unicast_link_local()) {
                // Its route is that of a device.
                outgoing.bind_device(Some(b"eth0"))?;
            }
            let incoming = packet_socket(protocol)?;
            incoming.attach_filter(&only_to(address))?;
            Ok(Self { outgoing, incoming, inbox: Mutex::default() })
        })
    }

    /// Sends a whole IP packet.
    pub fn send(&self, packet: &[u8], to: IpAddr) {
        // The port of a raw destination means a protocol: none.
        let to = SockAddr::from(SocketAddr::new(to, 0));
        let sent = self.outgoing.send_to(packet, &to).expect("raw packet");
        assert_eq!(sent, packet.len(), "a raw packet cut short");
    }

    /// Puts everything that has arrived into the inbox. What arrives later wakes [`Self::wait`].
    pub fn receive(&self) {
        let mut inbox = self.inbox();
        inbox.extend(drain(&self.incoming));
        let surplus = inbox.len().saturating_sub(INBOX);
        inbox.drain(..surplus);
    }

    /// Takes what the inbox has for `client`, in order.
    pub fn take(&self, client: SocketAddr) -> Vec<Frame> {
        let mut inbox = self.inbox();
        let (wanted, others) = inbox.drain(..).partition(|frame| concerns(frame, client));
        *inbox = others;
        Vec::from(wanted)
    }

    /// Waits until anything more has arrived for this address; false at the deadline.
    pub fn wait(&self, deadline: Instant) -> bool {
        let left = deadline.saturating_duration_since(Instant::now());
        // Rounded up: a last wait of no milliseconds would spin.
        let left = u16::try_from(left.as_millis() + 1).unwrap_or(u16::MAX);
        let mut ready = [PollFd::new(self.incoming.as_fd(), PollFlags::POLLIN)];
        let found = poll(&mut ready, PollTimeout::from(left));
        found.is_ok_and(|count| count > 0) && Instant::now() < deadline
    }

    fn inbox(&self) -> MutexGuard<'_, VecDeque<Frame>> {
        self.inbox.lock().expect("no panic while frames are sorted")
    }
}

/// All that arrives in `namespace` while `action` runs.
pub fn capture(namespace: &Namespace, action: impl FnOnce()) -> Vec<Frame> {
    let sockets = namespace.within(|| {
        [ETH_P_IP, ETH_P_IPV6].map(|protocol| packet_socket(protocol).expect("packet socket"))
    });
    action();
    thread::sleep(SETTLE);
    let frames = sockets.iter().flat_map(drain);
    frames.filter(|frame| !frame.is_housekeeping()).collect()
}

/// A packet socket that yields IP packets without link header.
fn packet_socket(protocol: u16) -> io::Result<Socket> {
    let protocol = Protocol::from(i32::from(protocol.to_be()));
    let socket = Socket::new(Domain::PACKET, Type::DGRAM, Some(protocol))?;
    socket.set_recv_buffer_size(1 << 20)?;
    socket.set_nonblocking(true)?;
    Ok(socket)
}

/// Everything that a packet socket has queued and that is TCP or ICMP.
fn drain(socket: &Socket) -> Vec<Frame> {
    let mut buffer = vec![0; 1 << 16];
    let mut frames = Vec::new();
    let mut reader = socket;
    loop {
        match reader.read(&mut buffer) {
            Ok(length) => frames.extend(buffer.get(..length).and_then(Frame::parse)),
            Err(error) if error.kind() == ErrorKind::WouldBlock => return frames,
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => panic!("packet socket: {error}"),
        }
    }
}

/// Classic BPF: keep packets whose destination is `address`. Without it every peer's buffer would
/// fill with the answers to all the others.
fn only_to(address: IpAddr) -> Vec<SockFilter> {
    const LOAD_WORD: u16 = 0x20; // BPF_LD | BPF_W | BPF_ABS
    const JUMP_EQUAL: u16 = 0x15; // BPF_JMP | BPF_JEQ | BPF_K
    const RETURN: u16 = 0x06; // BPF_RET | BPF_K
    let (offset, octets) = match address {
        IpAddr::V4(address) => (16, address.octets().to_vec()),
        IpAddr::V6(address) => (24, address.octets().to_vec()),
    };
    let mut program = Vec::new();
    for (index, word) in (0_u32..).zip(octets.chunks_exact(4)) {
        let word = u32::from_be_bytes(word.try_into().expect("four octets"));
        program.push(SockFilter::new(LOAD_WORD, 0, 0, offset + 4 * index));
        program.push(SockFilter::new(JUMP_EQUAL, 1, 0, word));
        program.push(SockFilter::new(RETURN, 0, 0, 0));
    }
    program.push(SockFilter::new(RETURN, 0, 0, u32::MAX));
    program
}

fn concerns(frame: &Frame, client: SocketAddr) -> bool {
    match &frame.kind {
        Kind::Tcp { .. } => frame.destination == client,
        Kind::Icmp { about, .. } => about.is_some_and(|(source, _)| source == client),
    }
}
