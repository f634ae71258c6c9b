//! Many packets in one NAPI batch: the server's kernel takes them all in before TCP sees the
//! first.
//!
//! A token bucket without tokens holds back what the client sends; given tokens, it lets all of it
//! go in one turn, and the server's end of the cable polls it as one list.

use super::{Lab, kernel};

/// The kernel polls at most 64 packets at once.
pub const MOST: usize = 64;

/// The payload that takes all tokens, and leaves too few for the smallest packet.
const PRIMER: usize = 1480;
/// RFC 3692: for experiments.
const PROTOCOL: u8 = 253;

impl Lab {
    /// From now on the server's end of the cable polls packets in batches, as hardware does.
    pub fn poll_in_batches(&self) {
        // A veth polls what a sender of large segments sends only where it has been asked to.
        self.client.run("ethtool -K eth0 tso off");
        if kernel::veths_poll() {
            self.server.run("ethtool -K eth0 gro on");
        } else {
            self.driver.get_or_init(|| self.driver_neighbour());
        }
    }

    /// Everything that `send` sends arrives in one batch.
    pub fn in_one_batch(&self, send: impl FnOnce()) {
        self.client.run("tc qdisc replace dev eth0 root tbf rate 8bit burst 1540 limit 1mb");
        let primer = self.peer("198.51.100.254");
        primer.send_packet(&filler(PRIMER));
        send();
        let open = "tc qdisc change dev eth0 root tbf rate 10gbit burst 10mb limit 1mb";
        self.client.run(open);
        // The next packet sets it going.
        primer.send_packet(&filler(0));
        self.client.run("tc qdisc del dev eth0 root");
    }
}

/// A packet that the server has no use for.
fn filler(length: usize) -> Vec<u8> {
    let payload = vec![0; length];
    let header = etherparse::Ipv4Header::new(
        u16::try_from(length).expect("a small packet"),
        64,
        etherparse::IpNumber(PROTOCOL),
        [198, 51, 100, 254],
        super::SERVER_V4.octets(),
    );
    let mut packet = Vec::new();
    header.expect("a header").write(&mut packet).expect("a packet");
    packet.extend(payload);
    packet
}
