//! A program behind NFQUEUE that holds each packet up, and then lets it pass.

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use netlink_sys::Socket;
use netlink_sys::protocols::NETLINK_NETFILTER;

use super::Namespace;

const NFNL_SUBSYS_QUEUE: u16 = 3;
const NFQNL_MSG_VERDICT: u16 = 1;
const NFQNL_MSG_CONFIG: u16 = 2;
const NFQA_CFG_CMD: u16 = 1;
const NFQA_CFG_PARAMS: u16 = 2;
const NFQA_PACKET_HDR: usize = 1;
const NFQA_VERDICT_HDR: u16 = 2;
const NF_ACCEPT: u32 = 1;
/// `struct nlmsghdr` and `struct nfgenmsg`.
const HEADERS: usize = 20;

/// Queue 0 of a namespace, for as long as this lives.
pub struct Queue {
    is_over: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Queue {
    /// Each packet passes after `delay`.
    pub fn hold_up(place: &Namespace, delay: Duration) -> Self {
        let socket = place.within(|| {
            let mut socket = Socket::new(NETLINK_NETFILTER).expect("a socket");
            socket.bind_auto().expect("a port");
            socket.set_non_blocking(true).expect("not blocking");
            // Bind; then no more of each packet than what is said of it.
            for (attribute, value) in
                [(NFQA_CFG_CMD, &[1, 0, 0, 0][..]), (NFQA_CFG_PARAMS, &[0, 0, 0, 0, 1])]
            {
                socket.send(&message(NFQNL_MSG_CONFIG, attribute, value), 0).expect("configured");
            }
            socket
        });
        let is_over = Arc::new(AtomicBool::new(false));
        let until = Arc::clone(&is_over);
        let thread = thread::spawn(move || {
            let mut held = VecDeque::new();
            while !until.load(Ordering::Relaxed) {
                while let Ok((datagram, _)) = socket.recv_from_full() {
                    held.extend(packet(&datagram).map(|id| (id, Instant::now() + delay)));
                }
                while held.front().is_some_and(|(_, due)| *due <= Instant::now())
                    && let Some((id, _)) = held.pop_front()
                {
                    let verdict = [NF_ACCEPT.to_be_bytes(), id].concat();
                    socket
                        .send(&message(NFQNL_MSG_VERDICT, NFQA_VERDICT_HDR, &verdict), 0)
                        .expect("a verdict");
                }
                thread::sleep(Duration::from_millis(1));
            }
        });
        Self { is_over, thread: Some(thread) }
    }
}

impl Drop for Queue {
    fn drop(&mut self) {
        self.is_over.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

fn message(kind: u16, attribute: u16, value: &[u8]) -> Vec<u8> {
    let short = |length: usize| u16::try_from(length).expect("short").to_ne_bytes();
    let attribute = [&short(4 + value.len())[..], &attribute.to_ne_bytes(), value].concat();
    let length = HEADERS + attribute.len().next_multiple_of(4);
    let mut bytes = u32::try_from(length).expect("short").to_ne_bytes().to_vec();
    bytes.extend((NFNL_SUBSYS_QUEUE << 8 | kind).to_ne_bytes());
    // NLM_F_REQUEST
    bytes.extend(1_u16.to_ne_bytes());
    // Of any number, from any port; of any family, in version 0, for queue 0.
    bytes.resize(HEADERS, 0);
    bytes.extend(attribute);
    bytes.resize(length, 0);
    bytes
}

/// The number of a packet, which is what the answer names it by.
fn packet(datagram: &[u8]) -> Option<[u8; 4]> {
    let mut rest = datagram.get(HEADERS..)?;
    loop {
        let length = usize::from(u16::from_ne_bytes([*rest.first()?, *rest.get(1)?]));
        if usize::from(*rest.get(2)?) == NFQA_PACKET_HDR {
            return rest.get(4..8)?.try_into().ok();
        }
        rest = rest.get(length.max(4).next_multiple_of(4)..)?;
    }
}
