//! Entries of other hosts in the table.

use std::ops::Range;
use std::time::Duration;

use ctkeep::conntrack::{Change, Conntrack, Entry, Insert, Status, TcpState, Zone};
use ctkeep::flow::{Endpoint, FourTuple};

/// Inserted at once, at most: what is to be done stands in memory before.
const AT_ONCE: usize = 100_000;

/// Inserts those with these numbers, in the namespace of the calling thread.
pub(crate) fn insert(numbers: Range<u32>) {
    let mut table = Conntrack::open().expect("conntrack");
    let change = |number: u32| {
        let client =
            Endpoint::new((0x0a00_0000 + number / 50_000).to_be_bytes().into(), port(number));
        let server = Endpoint::new([172, 16, 0, 1].into(), 443);
        let like = Entry::plain(FourTuple::new(client, server), Zone::default());
        let timeout = Duration::from_secs(24 * 3600);
        Change::Insert(Insert {
            like,
            state: TcpState::Established,
            status: Status::ASSURED,
            timeout,
        })
    };
    for begin in numbers.clone().step_by(AT_ONCE) {
        let end = begin + u32::try_from(AT_ONCE).expect("small");
        let changes: Vec<_> = (begin..end.min(numbers.end)).map(change).collect();
        let failed =
            table.change(&changes).expect("a conversation").iter().filter(|r| r.is_err()).count();
        assert_eq!(failed, 0, "of {} inserts", changes.len());
    }
}

fn port(number: u32) -> u16 {
    u16::try_from(number % 50_000 + 10_000).expect("a port")
}
