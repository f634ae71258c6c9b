//! Entries as kernels have sent them.

use super::*;

/// Decodes a captured entry, and asks for it over the captured conversation.
fn decoded(name: &str) -> Entry {
    let name = format!("entries/{name}");
    let entry = decode::entry(&first_payload(&name)).unwrap().unwrap();
    let asked = Conntrack::new(replay(&name)).get(&[(entry.reply, entry.zone)]).unwrap();
    assert_eq!(asked, [Some(entry)]);
    entry
}

/// Half-closed by a client without TCP options: conntrack has seen its FIN (0x04) and ACKs of
/// both (0x20).
const HALF_CLOSED: Tcp = Tcp { state: TcpState::CloseWait, wscale: [0, 0], flags: [0x24, 0x20] };

/// Confirmed, assured, seen both ways; the rest is that the namespace has a nat table.
const SETTLED: u32 = 0x18e;

fn half_closed(from: u16, to: u16, id: u32) -> Entry {
    let client = format!("198.51.100.7:{from}");
    let server = format!("192.0.2.1:{to}");
    Entry {
        orig: flow(&client, &server),
        reply: flow(&server, &client),
        zone: Zone::default(),
        status: Some(Status(SETTLED)),
        timeout: seconds(59),
        tcp: Some(HALF_CLOSED),
        mark: Some(0),
        id: Some(id),
        labels: None,
        helper: None,
        seq_adj: None,
        synproxy: None,
    }
}

#[test]
fn a_half_closed_connection() {
    assert_eq!(decoded("close-wait"), half_closed(20000, 80, 23748202));
}

#[test]
fn a_half_closed_connection_over_ipv6() {
    let expected = Entry {
        orig: flow("[2001:db8:1::7]:20001", "[2001:db8::1]:80"),
        reply: flow("[2001:db8::1]:80", "[2001:db8:1::7]:20001"),
        // No nat table for IPv6 here.
        status: Some(Status(0x00e)),
        ..half_closed(20001, 80, 1228810804)
    };
    assert_eq!(decoded("close-wait-ipv6"), expected);
}

#[test]
fn an_established_connection_with_window_scales_and_selective_acknowledgements() {
    let expected = Entry {
        orig: flow("192.0.2.2:36222", "192.0.2.1:80"),
        reply: flow("192.0.2.1:80", "192.0.2.2:36222"),
        timeout: seconds(431_999),
        tcp: Some(Tcp { state: TcpState::Established, wscale: [10, 10], flags: [0x23, 0x23] }),
        ..half_closed(0, 0, 4033209680)
    };
    assert_eq!(decoded("established"), expected);
    assert!(!expected.is_picked_up() && expected.is_plain());
}

#[test]
fn a_connection_to_a_redirected_port() {
    let expected = Entry {
        reply: flow("192.0.2.1:80", "198.51.100.7:20002"),
        // IPS_DST_NAT.
        status: Some(Status(SETTLED | 0x20)),
        ..half_closed(20002, 81, 2015906293)
    };
    let entry = decoded("redirected");
    assert_eq!(entry, expected);
    assert!(entry.is_translated() && !entry.is_plain());
}

#[test]
fn a_zone_of_both_directions() {
    let expected = Entry { zone: Zone::both(5), ..half_closed(20003, 82, 1171030605) };
    assert_eq!(decoded("zone"), expected);
}

#[test]
fn a_zone_of_the_original_direction_only() {
    let zone = Zone { orig: 6, reply: 0 };
    assert_eq!(decoded("zone-orig-only"), Entry { zone, ..half_closed(20004, 83, 631410600) });
}

#[test]
fn a_zone_of_the_reply_direction_only() {
    let zone = Zone { orig: 0, reply: 7 };
    let expected = Entry { zone, ..half_closed(20005, 84, 3707358619) };
    assert_eq!(decoded("zone-reply-only"), expected);
}

#[test]
fn a_connection_mark() {
    let expected = Entry { mark: Some(0xdead_beef), ..half_closed(20006, 85, 3768632965) };
    assert_eq!(decoded("mark"), expected);
}

#[test]
fn a_connection_label() {
    // Label 65: the second bit of the ninth byte.
    let labels = Some([0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0]);
    assert_eq!(decoded("labels"), Entry { labels, ..half_closed(20007, 86, 4191768194) });
}

#[test]
fn an_application_helper() {
    let entry = decoded("helper");
    assert_eq!(format!("{:?}", entry.helper), "Some(\"ftp\")");
    let expected = Entry {
        // IPS_HELPER.
        status: Some(Status(SETTLED | 0x2000)),
        ..half_closed(20008, 21, 3516208180)
    };
    assert_eq!(Entry { helper: None, ..entry }, expected);
}

#[test]
fn a_connection_behind_synproxy() {
    let expected = Entry {
        orig: flow("192.0.2.2:47692", "192.0.2.1:87"),
        reply: flow("192.0.2.1:87", "192.0.2.2:47692"),
        // IPS_SEQ_ADJUST.
        status: Some(Status(SETTLED | 0x40)),
        tcp: Some(Tcp { wscale: [10, 10], flags: [0x27, 0x23], ..HALF_CLOSED }),
        seq_adj: Some([
            SeqAdj::default(),
            SeqAdj { correction_pos: 0, offset_before: 2400267060, offset_after: 2400267060 },
        ]),
        synproxy: Some(SynProxy { isn: 3001565156, its: 3916122, tsoff: 4182225471 }),
        ..half_closed(0, 0, 1656293245)
    };
    assert_eq!(decoded("synproxy"), expected);
}

#[test]
fn an_entry_that_was_picked_up_at_a_packet_of_the_server() {
    let expected = Entry {
        orig: flow("192.0.2.1:8080", "198.51.100.7:20009"),
        reply: flow("198.51.100.7:20009", "192.0.2.1:8080"),
        status: Some(Status(0x188)),
        timeout: seconds(299),
        tcp: Some(Tcp {
            state: TcpState::Established,
            wscale: [0, 0],
            // Selective acknowledgements and liberal windows, assumed for both.
            flags: [0x0a, 0x0a],
        }),
        ..half_closed(0, 0, 1087248209)
    };
    assert_eq!(decoded("reversed"), expected);
    assert!(expected.is_picked_up());
}

#[test]
fn an_entry_that_is_not_tcp_is_none() {
    assert_eq!(decode::entry(&first_payload("entries/udp")).unwrap(), None);
}

#[test]
fn the_size_of_the_table() {
    let expected = TableSize { entries: 13, maximum: Some(262_144) };
    assert_eq!(Conntrack::new(replay("entries/stats")).size().unwrap(), expected);
    assert_eq!(decode::stats(&first_payload("entries/stats")).unwrap(), (13, Some(262_144)));
}

#[test]
fn an_absent_entry_is_none() {
    let key = (flow("192.0.2.1:80", "198.51.100.99:1"), Zone::default());
    assert_eq!(Conntrack::new(replay("entries/absent")).get(&[key]).unwrap(), [None]);
}

#[test]
fn an_insert_of_what_is_there_is_refused() {
    let like = Entry::plain(flow("198.51.100.7:20000", "192.0.2.1:80"), Zone::default());
    let insert = Insert {
        like,
        state: TcpState::CloseWait,
        status: Status::FRESH,
        timeout: Duration::from_secs(60),
    };
    let mut table = Conntrack::new(replay("entries/insert-refused"));
    let error = table.change(&[Change::Insert(insert)]).unwrap().remove(0).unwrap_err();
    assert!(error.is_already_there(), "{error}");
    assert_eq!(
        error.to_string(),
        "conntrack insert 198.51.100.7:20000 > 192.0.2.1:80: file exists (EEXIST)"
    );
}
