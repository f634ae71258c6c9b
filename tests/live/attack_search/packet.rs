//! Packets as an attacker may make them: each field drawn, and each possibly a lie.

use std::net::IpAddr;

use crate::lab::{ACK, FIN, PSH, RST, RawConn, SYN};

const URG: u8 = 0x20;
const ECE: u8 = 0x40;
const CWR: u8 = 0x80;

/// Random numbers that a seed gives again (splitmix64).
pub struct Random(pub u64);

impl Random {
    pub fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        let end = u64::try_from(end).expect("a small number");
        usize::try_from((z ^ (z >> 31)) % end).expect("a small number")
    }

    pub fn of<T: Copy>(&mut self, all: &[T]) -> T {
        *all.get(self.below(all.len())).expect("one of them")
    }

    /// Once in so many times.
    pub fn once_in(&mut self, times: usize) -> bool {
        self.below(times) == 0
    }
}

/// Who it says that it is from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum From {
    Peer,
    /// The server itself: spoofed, and against the connection's direction.
    Server,
}

/// What stands between the addresses and TCP.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Between {
    Nothing,
    /// IPv4: NOPs; IPv6: a hop-by-hop header of padding.
    Padding,
    /// IPv4: a loose source route; IPv6: a routing header of type 0.
    Route,
    /// IPv4: an option with a length of zero; IPv6: a destination option that must not be skipped.
    Malformed,
    /// IPv4: a router alert; IPv6: destination options of padding.
    Harmless,
    /// IPv6: a fragment header of a whole packet (RFC 6946); IPv4: the timestamp option.
    Atomic,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TcpOptions {
    None,
    Md5,
    /// Older than [`STAMPS`]: TCP drops such a FIN (PAWS, RFC 7323), and conntrack does not look.
    Timestamp,
    Unknown,
    BadLength,
    Sack,
}

/// What a SYN offers so that the connection has timestamps.
pub const STAMPS: [u8; 12] = [1, 1, 8, 10, 0x10, 0, 0, 0, 0, 0, 0, 0];

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Lie {
    None,
    TcpChecksum,
    IpChecksum,
    /// The packet says that it is so much longer.
    IpLength(i16),
    /// Words of the TCP header.
    DataOffset(u8),
    Reserved(u8),
}

/// How it is cut into fragments.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cut {
    Whole,
    /// Behind so many bytes of TCP.
    At(usize),
    /// The same, the last one first.
    Backwards(usize),
}

/// One packet of a history.
#[derive(Clone, Copy, Debug)]
pub struct Shot {
    /// Which of the source's connections.
    pub conn: usize,
    pub from: From,
    pub flags: u8,
    /// Away from the next byte.
    pub seq: i64,
    pub ack: i64,
    pub window: u16,
    pub payload: usize,
    pub urgent: u16,
    pub options: TcpOptions,
    pub between: Between,
    pub cut: Cut,
    pub hops: u8,
    pub lie: Lie,
    /// In a frame with a priority tag (VLAN 0).
    pub is_tagged: bool,
}

impl Shot {
    pub fn draw(random: &mut Random, conns: usize) -> Self {
        const FLAGS: [u8; 14] = [
            RST,
            RST,
            RST,
            RST | ACK,
            RST | ACK,
            FIN | ACK,
            FIN | ACK,
            FIN | ACK,
            FIN,
            ACK,
            PSH | ACK,
            SYN,
            SYN | ACK,
            RST | FIN,
        ];
        // Nothing, most often; else urgent data, or what congestion has to say.
        const BESIDE: [u8; 8] = [0, 0, 0, 0, 0, URG, ECE, CWR | ECE];
        const SEQS: [i64; 19] = [
            0,
            0,
            0,
            0,
            1,
            -1,
            -1,
            -6,
            2,
            50,
            100,
            1000,
            -1000,
            64_000,
            64_240,
            64_241,
            200_000,
            -200_000,
            1 << 31,
        ];
        let rarely = |random: &mut Random| random.once_in(4);
        let flags = if random.once_in(8) {
            u8::try_from(random.below(256)).expect("a byte")
        } else {
            random.of(&FLAGS) | random.of(&BESIDE)
        };
        let cut = if rarely(random) {
            let at = random.of(&[8, 16, 24]);
            if random.once_in(2) { Cut::At(at) } else { Cut::Backwards(at) }
        } else {
            Cut::Whole
        };
        let lie = if rarely(random) {
            random.of(&[
                Lie::TcpChecksum,
                Lie::IpChecksum,
                Lie::IpLength(-4),
                Lie::IpLength(4),
                Lie::DataOffset(4),
                Lie::DataOffset(15),
                Lie::Reserved(2),
                Lie::Reserved(4),
                Lie::Reserved(8),
                Lie::Reserved(14),
            ])
        } else {
            Lie::None
        };
        let options = [
            TcpOptions::Md5,
            TcpOptions::Timestamp,
            TcpOptions::Unknown,
            TcpOptions::BadLength,
            TcpOptions::Sack,
        ];
        let between = [
            Between::Padding,
            Between::Route,
            Between::Malformed,
            Between::Harmless,
            Between::Atomic,
        ];
        Self {
            conn: random.below(conns),
            from: if random.once_in(6) { From::Server } else { From::Peer },
            flags,
            seq: random.of(&SEQS),
            ack: random.of(&[0, 0, 0, 1, -1, -100, 1000, -1000, 1 << 31]),
            window: random.of(&[64_240, 64_240, 0, 1]),
            payload: random.of(&[0, 0, 0, 0, 1, 9, 100, 1000]),
            urgent: random.of(&[0, 0, 0, 1]),
            options: if rarely(random) { random.of(&options) } else { TcpOptions::None },
            between: if rarely(random) { random.of(&between) } else { Between::Nothing },
            cut,
            hops: if random.once_in(6) { random.of(&[1, 2, 255]) } else { 64 },
            lie,
            is_tagged: random.once_in(10),
        }
    }

    /// The frames that it is on the wire.
    pub fn frames(&self, conn: &RawConn) -> Vec<Vec<u8>> {
        let tcp = self.tcp(conn);
        let parts: Vec<(usize, bool, &[u8])> = match self.cut {
            Cut::At(at) | Cut::Backwards(at) if at < tcp.len() => {
                let (first, second) = tcp.split_at(at);
                vec![(0, true, first), (at, false, second)]
            }
            _ => vec![(0, false, &tcp)],
        };
        let is_cut = parts.len() > 1;
        let packets = parts.into_iter().map(|(offset, more, part)| {
            let packet = self.ip(conn, offset, more, is_cut, part);
            let kind: u16 = if conn.client.is_ipv4() { 0x0800 } else { 0x86dd };
            let mut frame = vec![2, 0, 0, 0, 0, 1, 2, 0, 0, 0, 0, 2];
            if self.is_tagged {
                frame.extend([0x81, 0, 0xe0, 0]);
            }
            frame.extend(kind.to_be_bytes());
            frame.extend(packet);
            frame
        });
        let mut frames: Vec<_> = packets.collect();
        if matches!(self.cut, Cut::Backwards(_)) {
            frames.reverse();
        }
        frames
    }

    fn ends(&self, conn: &RawConn) -> [std::net::SocketAddr; 2] {
        match self.from {
            From::Peer => [conn.client, conn.server],
            From::Server => [conn.server, conn.client],
        }
    }

    fn tcp(&self, conn: &RawConn) -> Vec<u8> {
        let [source, destination] = self.ends(conn);
        let segment = conn.segment(self.flags, 0);
        let (seq, ack) = match self.from {
            From::Peer => (segment.seq, segment.ack),
            From::Server => (segment.ack, segment.seq),
        };
        let moved = |number: u32, by: i64| {
            u32::try_from((i64::from(number) + by).rem_euclid(1 << 32)).expect("below the modulus")
        };
        let ack = if self.flags & ACK == 0 { 0 } else { moved(ack, self.ack) };
        let mut tcp = Vec::new();
        tcp.extend(source.port().to_be_bytes());
        tcp.extend(destination.port().to_be_bytes());
        tcp.extend(moved(seq, self.seq).to_be_bytes());
        tcp.extend(ack.to_be_bytes());
        let options: &[u8] = match self.options {
            TcpOptions::None => &[],
            TcpOptions::Md5 => &[19, 18, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 1],
            TcpOptions::Timestamp => &[1, 1, 8, 10, 0, 0, 0, 1, 0, 0, 0, 0],
            TcpOptions::Unknown => &[77, 4, 0, 0],
            TcpOptions::BadLength => &[77, 40, 0, 0],
            TcpOptions::Sack => &[1, 1, 5, 10, 0, 0, 0, 1, 0, 0, 0, 9],
        };
        let words = u8::try_from(5 + options.len() / 4).expect("a short header");
        let (words, reserved) = match self.lie {
            Lie::DataOffset(words) => (words, 0),
            Lie::Reserved(bits) => (words, bits),
            _ => (words, 0),
        };
        tcp.extend([words << 4 | reserved, self.flags]);
        tcp.extend(self.window.to_be_bytes());
        tcp.extend([0, 0]);
        tcp.extend(self.urgent.to_be_bytes());
        tcp.extend(options);
        tcp.extend(vec![b'x'; self.payload]);
        let mut pseudo = addresses(source.ip(), destination.ip());
        pseudo.extend([0, 6]);
        pseudo.extend(u16::try_from(tcp.len()).expect("short").to_be_bytes());
        let lie = u16::from(self.lie == Lie::TcpChecksum);
        let sum = checksum(&[&pseudo[..], &tcp].concat()).wrapping_add(lie);
        tcp[16..18].copy_from_slice(&sum.to_be_bytes());
        tcp
    }

    fn ip(&self, conn: &RawConn, offset: usize, more: bool, is_cut: bool, part: &[u8]) -> Vec<u8> {
        let [source, destination] = self.ends(conn);
        let addresses = addresses(source.ip(), destination.ip());
        let id = conn.client.port() ^ u16::from(self.flags) << 8;
        let IpAddr::V4(_) = source.ip() else {
            return self.ipv6(&addresses, id, offset, more, is_cut, part);
        };
        let options: &[u8] = match self.between {
            Between::Nothing => &[],
            Between::Padding => &[1, 1, 1, 0],
            Between::Route => &[131, 7, 4, 192, 0, 2, 1, 0],
            Between::Malformed => &[7, 0, 0, 0],
            Between::Harmless => &[148, 4, 0, 0],
            Between::Atomic => &[68, 12, 5, 0, 0, 0, 0, 0, 0, 0, 0, 0],
        };
        let length = 20 + options.len();
        let words = u8::try_from(length / 4).expect("a short header");
        let mut ip = vec![0x40 | words, 0];
        ip.extend(self.lied_length(length + part.len()));
        ip.extend(id.to_be_bytes());
        let place = u16::try_from(offset / 8).expect("small") | if more { 0x2000 } else { 0 };
        ip.extend(place.to_be_bytes());
        ip.extend([self.hops, 6, 0, 0]);
        ip.extend(addresses);
        ip.extend(options);
        let lie = u16::from(self.lie == Lie::IpChecksum);
        let sum = checksum(&ip).wrapping_add(lie);
        ip[10..12].copy_from_slice(&sum.to_be_bytes());
        ip.extend(part);
        ip
    }

    fn ipv6(
        &self,
        addresses: &[u8],
        id: u16,
        offset: usize,
        more: bool,
        is_cut: bool,
        part: &[u8],
    ) -> Vec<u8> {
        const HOP_BY_HOP: u8 = 0;
        const ROUTING: u8 = 43;
        const FRAGMENT: u8 = 44;
        const DESTINATION: u8 = 60;
        let mut headers: Vec<(u8, Vec<u8>)> = match self.between {
            Between::Padding => vec![(HOP_BY_HOP, vec![1, 4, 0, 0, 0, 0])],
            Between::Route => {
                let hop = addresses.get(16..).expect("a destination");
                vec![(ROUTING, [&[0, 1, 0, 0, 0, 0][..], hop].concat())]
            }
            Between::Malformed => vec![(DESTINATION, vec![0x5e, 4, 0, 0, 0, 0])],
            Between::Harmless => vec![(DESTINATION, vec![1, 4, 0, 0, 0, 0])],
            Between::Nothing | Between::Atomic => Vec::new(),
        };
        if is_cut || self.between == Between::Atomic {
            let place = u16::try_from(offset).expect("small") | u16::from(more);
            let mut rest = place.to_be_bytes().to_vec();
            rest.extend([0, 0]);
            rest.extend(id.to_be_bytes());
            headers.push((FRAGMENT, rest));
        }
        let mut next = 6;
        let mut body = part.to_vec();
        for (kind, rest) in headers.into_iter().rev() {
            let size = if kind == FRAGMENT { 0 } else { (rest.len() + 2) / 8 - 1 };
            let size = u8::try_from(size).expect("a short header");
            body = [&[next, size][..], &rest, &body].concat();
            next = kind;
        }
        let mut ip = vec![0x60, 0, 0, 0];
        ip.extend(self.lied_length(body.len()));
        ip.extend([next, self.hops]);
        ip.extend(addresses);
        ip.extend(body);
        ip
    }

    fn lied_length(&self, length: usize) -> [u8; 2] {
        let length = u16::try_from(length).expect("a small packet");
        let by = if let Lie::IpLength(by) = self.lie { by } else { 0 };
        length.wrapping_add_signed(by).to_be_bytes()
    }
}

fn addresses(source: IpAddr, destination: IpAddr) -> Vec<u8> {
    let of = |address: IpAddr| match address {
        IpAddr::V4(v4) => v4.octets().to_vec(),
        IpAddr::V6(v6) => v6.octets().to_vec(),
    };
    [of(source), of(destination)].concat()
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words = bytes.chunks(2);
    let words = words.map(|two| u32::from(two[0]) << 8 | u32::from(*two.get(1).unwrap_or(&0)));
    let mut sum: u32 = words.sum();
    while sum >> 16 != 0 {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !u16::try_from(sum).expect("folded")
}
