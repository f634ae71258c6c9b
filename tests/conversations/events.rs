//! Events: what is read, what is lost, and what is ours.

use super::*;

/// A listener with these replies queued.
fn listener(replies: Vec<Reply>) -> Listener<Script<impl FnMut(&[u8]) -> Vec<Reply>>> {
    let mut replies = Some(replies);
    let mut script = Script::new(move |_: &[u8]| replies.take().unwrap_or_default());
    // The played kernel speaks only when spoken to.
    script.send(&[]).unwrap();
    Listener::new(script)
}

fn drain(replies: Vec<Reply>) -> (Vec<ctkeep::watch::ctnetlink::Event>, Drained) {
    let mut events = Vec::new();
    let drained = listener(replies).drain(1000, |event| events.push(event)).unwrap();
    (events, drained)
}

fn event(kind: u16, flags: u16, port: u32, entry: &Entry) -> Reply {
    Reply::Datagram(message_from(port, kind, flags, 0, &entry_payload(entry)))
}

fn closed() -> Entry {
    entry(flow(SERVER, PEER), TcpState::Close, 10)
}

#[test]
fn updates_and_ends_are_told_with_the_port_of_their_cause() {
    let (events, drained) =
        drain(vec![event(CT_NEW, 0, 0, &closed()), event(CT_DELETE, 0, 4242, &closed())]);
    assert_eq!(drained, Drained::default());
    let told: Vec<_> = events.iter().map(|event| (event.kind, event.port)).collect();
    assert_eq!(told, [(EventKind::Update, 0), (EventKind::Destroy, 4242)]);
    assert!(events.iter().all(|event| event.entry == closed()));
}

#[test]
fn new_entries_are_not_told() {
    let (events, drained) = drain(vec![event(CT_NEW, NLM_F_CREATE | NLM_F_EXCL, 0, &closed())]);
    assert_eq!((events.len(), drained), (0, Drained::default()));
}

#[test]
fn messages_of_other_kinds_are_not_told() {
    let (events, drained) = drain(vec![event(CT_GET, 0, 0, &closed())]);
    assert_eq!((events.len(), drained), (0, Drained::default()));
}

#[test]
fn an_overrun_is_told_and_the_events_behind_it_too() {
    let (events, drained) = drain(vec![Reply::Errno(ENOBUFS), event(CT_NEW, 0, 0, &closed())]);
    assert!(drained.overrun);
    assert_eq!((events.len(), drained.malformed), (1, 0));
}

#[test]
fn what_cannot_be_read_is_counted_and_does_not_hide_the_rest() {
    let mut lie = message(CT_NEW, 0, 0, &entry_payload(&closed()));
    lie[0] = 15;
    let cut = message(CT_NEW, 0, 0, &entry_payload(&closed())[..40]);
    let (events, drained) = drain(vec![
        Reply::Datagram(lie),
        Reply::Datagram(cut),
        Reply::Truncated,
        event(CT_NEW, 0, 0, &closed()),
    ]);
    assert!(!drained.overrun);
    assert_eq!((events.len(), drained.malformed), (1, 3));
}

#[test]
fn many_events_in_one_datagram_are_all_told() {
    let one = message(CT_NEW, 0, 0, &entry_payload(&closed()));
    let (events, _) = drain(vec![Reply::Datagram(one.repeat(50))]);
    assert_eq!(events.len(), 50);
}

#[test]
fn a_drain_stops_at_its_limit_and_goes_on_at_the_next() {
    let mut listener = listener((0..10).map(|_| event(CT_NEW, 0, 0, &closed())).collect());
    let mut count = 0;
    listener.drain(4, |_| count += 1).unwrap();
    assert_eq!(count, 4);
    listener.drain(100, |_| count += 1).unwrap();
    assert_eq!(count, 10);
}

#[test]
fn a_broken_socket_is_an_error() {
    const EBADF: i32 = 9;
    listener(vec![Reply::Errno(EBADF)]).drain(10, |_| ()).unwrap_err();
}
