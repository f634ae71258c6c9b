//! Entries, events and counts of conntrack: two decoders read them alike, and what was read is
//! written to the kernel as it was.

#![no_main]

use ctkeep::conntrack::{Change, Conntrack, Entry, Filter, Insert, Status, SynProxy, decode};
use ctkeep::netlink::frames;
use ctkeep::watch::ctnetlink::Listener;
use ctkeep_fuzz::played::crate_reader::{Common, read_by_the_crate};
use ctkeep_fuzz::played::host::Host;
use ctkeep_fuzz::played::{CT_DELETE, CT_NEW, entry_payload};
use ctkeep_fuzz::{answering, telling};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let mut entries = Vec::new();
    for frame in frames(bytes).flatten() {
        let entry = decode::entry(frame.payload);
        for kind in [CT_NEW, CT_DELETE] {
            // The two may differ in what they refuse.
            if let (Ok(ours), Ok(theirs)) = (&entry, read_by_the_crate(kind, frame.payload)) {
                assert_eq!(ours.map(Common::from), theirs);
            }
        }
        if let Ok(Some(entry)) = entry {
            written_and_read(entry);
            entries.push(entry);
        }
        let _ = decode::stats(frame.payload);
    }

    let mut told = 0;
    Listener::new(telling(bytes))
        .drain(4, |event| {
            told += 1;
            assert!(entries.contains(&event.entry));
        })
        .expect("a broken event is no broken socket");
    assert!(told <= entries.len());

    let _ = Conntrack::new(answering(bytes)).size();
    let _ = Conntrack::new(answering(bytes)).counters();
    let listed = Conntrack::new(answering(bytes)).entries(
        ctkeep::flow::AF_INET,
        Filter::Tcp,
        |all: &mut Vec<Entry>, entry| all.push(*entry),
    );
    assert!(listed.is_err() || listed.is_ok_and(|listed| listed.len() <= entries.len()));
    if let Some(entry) = entries.last() {
        let asked = (entry.orig, entry.zone);
        if let Ok(found) = Conntrack::new(answering(bytes)).get(&[asked]) {
            let [found] = found[..] else { panic!("one question, {} answers", found.len()) };
            assert!(found.is_none_or(|found| [found.orig, found.reply].contains(&asked.0)));
        }
    }
});

fn written_and_read(entry: Entry) {
    let read = decode::entry(&entry_payload(&entry)).expect("what was read").expect("TCP");
    assert_eq!(read, Entry { helper: None, ..entry });

    let (host, mut tables) = Host::default().open();
    let insert = Insert {
        like: entry,
        state: ctkeep::conntrack::TcpState::CloseWait,
        status: Status::ASSURED,
        timeout: entry.timeout.unwrap_or_default(),
    };
    tables.conntrack.change(&[Change::Insert(insert)]).expect("sent")[0].as_ref().expect("made");
    let made = host.borrow().entries[0];
    assert_eq!((made.orig, made.zone, made.mark), (entry.orig, entry.zone, entry.mark));
    assert_ne!(entry.synproxy, Some(SynProxy::default()));
}
