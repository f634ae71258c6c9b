//! Events as a kernel has sent them.

use super::*;

/// The port of the socket that made the second and third event happen.
const OWN_PORT: u32 = 2463112422;

fn told(name: &str) -> Event {
    let mut transport = replay(&format!("events/{name}"));
    // The played kernel speaks only when spoken to.
    transport.send(&[]).unwrap();
    let mut events = Vec::new();
    let drained = Listener::new(transport).drain(10, |event| events.push(event)).unwrap();
    assert_eq!(drained, Drained::default());
    assert_eq!(events.len(), 1, "{name}");
    events.remove(0)
}

fn entry(state: TcpState, status: u32, timeout: u64) -> Entry {
    let there = flow("198.51.100.7:20010", "192.0.2.1:80");
    Entry {
        status: Some(Status(status)),
        timeout: seconds(timeout),
        tcp: Some(Tcp { state, wscale: [0, 0], flags: [0x24, 0x20] }),
        id: Some(2021424586),
        ..Entry::plain(there, Zone::default())
    }
}

#[test]
fn an_update_by_a_stale_rst() {
    let entry = entry(TcpState::Close, 0x18e, 10);
    assert_eq!(told("closed-by-rst"), Event { kind: EventKind::Update, entry, port: 0 });
}

#[test]
fn an_update_by_request_carries_the_port_of_the_request() {
    let entry = Entry { mark: Some(0), ..entry(TcpState::CloseWait, 0x18e, 60) };
    assert_eq!(told("updated"), Event { kind: EventKind::Update, entry, port: OWN_PORT });
}

#[test]
fn the_end_of_an_entry_tells_its_state_and_neither_flags_nor_scales() {
    // IPS_DYING.
    let alive = entry(TcpState::CloseWait, 0x18e | 0x200, 60);
    let tcp = Some(Tcp { flags: [0, 0], ..alive.tcp.unwrap() });
    let entry = Entry { tcp, ..alive };
    assert_eq!(told("deleted"), Event { kind: EventKind::Destroy, entry, port: OWN_PORT });
}
