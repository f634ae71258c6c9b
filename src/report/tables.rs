//! The lines of sockets and entries, in the words of ss and conntrack. Pure.

use std::net::IpAddr;

use crate::audit::processes::Holder;
use crate::conntrack::{Entry, EntryKey, Status, Zone};
use crate::firewall::packet::Interface;
use crate::flow::{Connection, FourTuple};
use crate::rtnetlink::link::Link;
use crate::sockdiag::{Cookie, Socket, State};

/// `CLOSE-WAIT 1 0 192.0.2.1:80 198.51.100.7:20000 users:(("apache2",pid=1,fd=0)) uid:33 ino:7 sk:1a`
pub fn socket(socket: &Socket, holder: Option<&Holder>) -> String {
    let state = match socket.state {
        State::Established => "ESTAB".to_owned(),
        State::Close => "UNCONN".to_owned(),
        state => state.name().to_uppercase(),
    };
    let Socket { local, remote, recv_queue, send_queue, uid, inode, cookie, .. } = socket;
    // The number of the descriptor is not asked for.
    let holder = holder
        .map(|it| format!(" users:((\"{}\",pid={},fd=0))", it.command, it.pid))
        .unwrap_or_default();
    format!(
        "{state} {recv_queue} {send_queue} {local} {remote}{holder} uid:{uid} ino:{inode} sk:{:x}",
        cookie.0
    )
}

/// `ipv4     2 tcp      6 117 CLOSE_WAIT src=... dst=... sport=... dport=... src=... [ASSURED] mark=0 use=1`
pub fn entry(entry: &Entry) -> String {
    let family = if entry.orig.src.addr().is_ipv4() { "ipv4     2" } else { "ipv6     10" };
    let (timeout, state) = match (entry.timeout, entry.state()) {
        (Some(timeout), Some(state)) => {
            let name = state.name().to_uppercase().replace('-', "_");
            (format!(" {}", timeout.as_secs()), format!(" {name}"))
        }
        // A flow table has it.
        _ => (String::new(), String::new()),
    };
    let tuple = |tuple: FourTuple| {
        let (src, dst) = (tuple.src, tuple.dst);
        format!("src={} dst={} sport={} dport={}", src.addr(), dst.addr(), src.port(), dst.port())
    };
    let has_status = |is: fn(Status) -> bool| entry.status.is_some_and(is);
    let unreplied = if has_status(Status::has_seen_reply) { "" } else { " [UNREPLIED]" };
    let assured = match () {
        () if state.is_empty() => " [OFFLOAD]",
        () if has_status(Status::is_assured) => " [ASSURED]",
        () => "",
    };
    let zone = match entry.zone {
        Zone { orig: 0, reply: 0 } => String::new(),
        Zone { orig, reply } if orig == reply => format!(" zone={orig}"),
        Zone { orig, reply: 0 } => format!(" zone-orig={orig}"),
        Zone { orig: 0, reply } => format!(" zone-reply={reply}"),
        Zone { orig, reply } => format!(" zone-orig={orig} zone-reply={reply}"),
    };
    format!(
        "{family} tcp      6{timeout}{state} {}{unreplied} {}{assured} mark={}{zone} use=1",
        tuple(entry.orig),
        tuple(entry.reply),
        entry.mark.unwrap_or(0)
    )
}

/// What neither ss nor conntrack prints of a connection.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Beside {
    /// So many processes have the socket, in this container.
    Holder(Cookie, usize, Option<String>),
    /// The kernel's flags of an entry: whether it was picked up midway, or is ctkeep's.
    Flags(EntryKey, [u8; 2]),
    /// This host has opened it.
    OpenedHere(Connection),
    /// An address of another namespace, which packets are forwarded to.
    Behind(IpAddr),
    /// A network device.
    Device(Link),
}

/// `holder 1a 3 web`, `flags 198.51.100.7:20000 192.0.2.1:80 0 0 10 10`, `opened-here LOCAL REMOTE`
pub fn beside_line(beside: &Beside) -> String {
    match beside {
        Beside::Holder(cookie, processes, container) => {
            let container = container.as_deref().unwrap_or_default();
            format!("holder {:x} {processes} {container}", cookie.0)
        }
        Beside::Flags(EntryKey { zone, orig }, [first, second]) => {
            let (src, dst) = (orig.src, orig.dst);
            format!("flags {src} {dst} {} {} {first} {second}", zone.orig, zone.reply)
        }
        Beside::OpenedHere(Connection { local, remote }) => format!("opened-here {local} {remote}"),
        Beside::Behind(addr) => format!("behind {addr}"),
        Beside::Device(link) => {
            let kind = if link.kind.is_empty() { "-" } else { &link.kind };
            let master = link.master.unwrap_or(0);
            format!("device {} {} {kind} {master} {}", link.index, link.name, link.is_loopback)
        }
    }
}

/// The same from its line.
pub(super) fn beside(line: &str) -> Option<Beside> {
    let (kind, rest) = line.split_once(' ')?;
    if kind == "holder" {
        // A name may have blanks.
        let mut parts = rest.splitn(3, ' ');
        let cookie = Cookie(u64::from_str_radix(parts.next()?, 16).ok()?);
        let processes = parts.next()?.parse().ok()?;
        let container = parts.next().filter(|name| !name.is_empty()).map(str::to_owned);
        return Some(Beside::Holder(cookie, processes, container));
    }
    if kind == "behind" {
        return Some(Beside::Behind(rest.parse().ok()?));
    }
    let mut words = rest.split(' ');
    if kind == "device" {
        let (index, name) = (words.next()?.parse().ok()?, words.next()?.to_owned());
        let kind = words.next()?.replace('-', "");
        let master = words.next()?.parse().ok().filter(|index| *index != 0);
        let is_loopback = words.next()? == "true";
        return Some(Beside::Device(Link {
            index,
            name,
            kind,
            master,
            is_loopback,
            ..Link::default()
        }));
    }
    let (one, other) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    match kind {
        "opened-here" => Some(Beside::OpenedHere(Connection::new(one, other))),
        "flags" => {
            let (orig, reply) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
            let flags = [words.next()?.parse().ok()?, words.next()?.parse().ok()?];
            let key = EntryKey { zone: Zone { orig, reply }, orig: FourTuple::new(one, other) };
            Some(Beside::Flags(key, flags))
        }
        _ => None,
    }
}

/// By which device a peer comes in: `198.51.100.7 192.0.2.1 eth0 2`
pub fn arrival_line(((peer, local), interface): (&(IpAddr, IpAddr), &Interface)) -> Option<String> {
    match interface {
        Interface::Known(name, index) => Some(format!("{peer} {local} {name} {index}\n")),
        Interface::NotLoopback | Interface::Unknown => None,
    }
}

/// The same from its line.
pub(super) fn arrival(line: &str) -> Option<((IpAddr, IpAddr), Interface)> {
    let mut words = line.split(' ');
    let (peer, local) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
    let (name, index) = (words.next()?.to_owned(), words.next()?.parse().ok()?);
    Some(((peer, local), Interface::Known(name, index)))
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::audit::saved::Saved;
    use crate::conntrack::{Tcp, TcpState};
    use crate::sockdiag::Cookie;

    fn flow(text: [&str; 2]) -> FourTuple {
        FourTuple::new(text[0].parse().unwrap(), text[1].parse().unwrap())
    }

    #[test]
    fn every_state_of_both_tables_comes_back_from_its_line() {
        let ends =
            [["192.0.2.1:80", "198.51.100.7:20000"], ["[2001:db8::1]:80", "[2001:db8:2::7]:20000"]];
        for ends in ends {
            let flow = flow(ends);
            for state in State::ALL {
                let one = Socket {
                    local: flow.src,
                    remote: flow.dst,
                    state,
                    inode: 7,
                    uid: 33,
                    cookie: Cookie(26),
                    interface: 0,
                    recv_queue: 3,
                    send_queue: 4,
                };
                let holder = Holder {
                    pid: 5,
                    command: "a b\",pid=1".to_owned(),
                    processes: 1,
                    container: None,
                };
                let line = socket(&one, Some(&holder));
                let entry = super::entry(&Entry::plain(flow.inverse(), Zone::default()));
                let saved = Saved::read(line.as_bytes(), entry.as_bytes(), None).unwrap();
                assert_eq!(saved.sockets.values, [one], "{line}");
                assert_eq!(saved.sockets.holders[&one.cookie], holder, "{line}");
            }
            for state in TcpState::ALL {
                for (status, zone) in [(0x2, 0), (0xe, 7), (0x8, 7)] {
                    let one = Entry {
                        timeout: Some(Duration::from_secs(9)),
                        tcp: Some(Tcp { state, wscale: [0; 2], flags: [0; 2] }),
                        status: Some(Status(status)),
                        ..Entry::plain(flow.inverse(), Zone { orig: zone, reply: 0 })
                    };
                    let line = entry(&one);
                    let sockets = b"ESTAB 0 0 192.0.2.1:80 198.51.100.7:1";
                    let read = Saved::read(sockets, line.as_bytes(), None);
                    let Some(read) = read.ok().and_then(|it| it.entries.values.first().copied())
                    else {
                        panic!("{line}");
                    };
                    assert_eq!((read.orig, read.reply), (one.orig, one.reply), "{line}");
                    assert_eq!((read.zone, read.timeout), (one.zone, one.timeout), "{line}");
                    assert_eq!(read.state(), one.state(), "{line}");
                    let bits = |it: Entry| {
                        it.status.map(|status| (status.has_seen_reply(), status.is_assured()))
                    };
                    assert_eq!(bits(read), bits(one), "{line}");
                }
            }
        }
    }
}
