//! Entries of connections that do not end here: what fills a table.

use std::net::Ipv4Addr;
use std::ops::Range;
use std::time::Duration;

use ctkeep::conntrack::{Change, Conntrack, Entry, Insert, Status, TcpState, Zone};
use ctkeep::flow::{Endpoint, FourTuple};

use super::{Lab, wait_for};

/// The server's table gets as many that the kernel does not drop early as it has places for.
pub fn fill_up(lab: &Lab, maximum: usize) {
    let count = || lab.server.output("conntrack -C").trim().parse::<usize>().expect("a count");
    let mut next = 0;
    // Entries of closed connections expire meanwhile.
    wait_for("a full table", Duration::from_secs(120), || {
        let free = maximum.saturating_sub(count());
        lab.server.within(|| {
            fill(&mut Conntrack::open().expect("conntrack"), next..next + free);
        });
        next += free;
        count() >= maximum
    });
}

/// Puts them into the table, those that it has a place for.
pub fn fill(conntrack: &mut Conntrack, numbers: Range<usize>) {
    // Some may be there already.
    drop(conntrack.change(&entries(numbers)).expect("inserts"));
}

/// Entries of connections that do not end here, each number one.
pub fn entries(numbers: Range<usize>) -> Vec<Change> {
    const PORTS: usize = 20_000;
    numbers
        .map(|number| {
            let host = u32::try_from(number / PORTS).expect("a small number");
            let source = Ipv4Addr::from(u32::from(Ipv4Addr::new(10, 0, 0, 0)) + host);
            let port = u16::try_from(PORTS + number % PORTS).expect("a port");
            let flow = FourTuple::new(
                Endpoint::new(source.into(), port),
                Endpoint::new(Ipv4Addr::new(203, 0, 113, 9).into(), 443),
            );
            Change::Insert(Insert {
                like: Entry::plain(flow, Zone::default()),
                state: TcpState::Established,
                status: Status::ASSURED,
                timeout: Duration::from_secs(3_600),
            })
        })
        .collect()
}
