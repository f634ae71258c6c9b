//! Conversations about sockets.

use std::collections::HashSet;
use std::time::Duration;

use nix::time::{ClockId, clock_gettime};

use super::*;

fn all() -> States {
    States::connected()
}

/// A kernel that dumps these message by message.
fn dumping(payloads: Result<Vec<Vec<u8>>, i32>) -> SockDiag<Played> {
    SockDiag::new(obliging(move |request| {
        dumped_states(request);
        let part = |payload| message(TCPDIAG_GETSOCK, NLM_F_MULTI, request.seq, payload);
        payloads.as_ref().map(|all| all.iter().map(|it| part(it)).collect()).map_err(|e| *e)
    }))
}

#[test]
fn both_families_are_dumped_at_once_with_the_states_as_the_kernels_mask() {
    let asked = Rc::new(RefCell::new(Vec::new()));
    let seen = asked.clone();
    let mut diag = SockDiag::new(obliging(move |request| {
        assert!(request.is_dump());
        seen.borrow_mut().push(dumped_states(request));
        Ok(vec![])
    }));
    diag.sockets(States::from_iter([State::CloseWait, State::Established])).unwrap();
    assert_eq!(*asked.borrow(), [1 << 8 | 1 << 1]);
}

#[test]
fn a_socket_that_a_dump_reports_twice_is_reported_once() {
    let (one, two) = (close_wait(PEER, 1), close_wait(OTHER_PEER, 2));
    let payloads = [one, two, one].map(|socket| played::socket_payload(&socket));
    let mut diag = dumping(Ok(payloads.to_vec()));
    assert_eq!(diag.sockets(all()).unwrap(), [one, two]);
}

#[test]
fn the_ipv4_peer_of_a_dual_stack_listener_has_an_ipv4_address() {
    let wanted = close_wait(PEER, 1);
    let mut diag = dumping(Ok(vec![played::mapped_socket_payload(&wanted)]));
    assert_eq!(diag.sockets(all()).unwrap(), [wanted]);
    assert_eq!(wanted.connection().sent().family(), AF_INET);
}

#[test]
fn sockets_of_both_families_are_reported() {
    let v4 = close_wait(PEER, 1);
    let v6 = socket("[2001:db8::1]:80", "[2001:db8:1::7]:4000", State::CloseWait, 2);
    let mut diag = dumping(Ok([v4, v6].iter().map(played::socket_payload).collect()));
    assert_eq!(diag.sockets(all()).unwrap(), [v4, v6]);
}

#[test]
fn a_kernel_without_tcp_diag_is_unavailable_and_the_module_is_named() {
    // Without tcp_diag, and without inet_diag below it.
    for answer in [
        dumping(Err(ENOENT)).sockets(all()).map(drop),
        dumping(Err(ENOENT)).listeners().map(drop),
        dumping(Err(ENOENT)).probe(),
        dumping(Err(EOPNOTSUPP)).probe(),
    ] {
        let error = answer.unwrap_err();
        assert!(error.is_unavailable(), "{error}");
        assert!(error.to_string().contains("tcp_diag"), "{error}");
    }
}

#[test]
fn a_refused_dump_is_an_error() {
    dumping(Err(EPERM)).sockets(all()).unwrap_err();
}

#[test]
fn a_socket_cut_short_fails_the_dump() {
    let payload = played::socket_payload(&close_wait(PEER, 1));
    let cut = payload[..60].to_vec();
    let error = dumping(Ok(vec![payload, cut])).sockets(all()).unwrap_err();
    assert!(is_malformed(&error), "{error}");
}

#[test]
fn a_state_that_only_newer_kernels_know_is_passed_over() {
    let wanted = close_wait(PEER, 1);
    let mut unknown = played::socket_payload(&close_wait(OTHER_PEER, 2));
    // TCP_BOUND_INACTIVE, since 6.8: a socket without peer.
    unknown[1] = 13;
    let mut diag = dumping(Ok(vec![unknown, played::socket_payload(&wanted)]));
    assert_eq!(diag.sockets(all()).unwrap(), [wanted]);
}

#[test]
fn a_look_up_asks_for_the_tuple_whatever_the_cookie() {
    let mut diag = SockDiag::new(obliging(|request| {
        let body = &request.body;
        assert!(!request.is_dump());
        assert_eq!((body[0], body[1]), (2, 6));
        assert_eq!(body[8..12], [0, 80, 0x0f, 0xa0]);
        assert_eq!(body[12..16], [192, 0, 2, 1]);
        assert_eq!(body[28..32], [198, 51, 100, 7]);
        assert_eq!(u32_at(body, 44), 3);
        assert_eq!(body[48..56], [0xff; 8]);
        Err(ENOENT)
    }));
    let asked = Lookup { interface: 3, ..lookup(SERVER, PEER) };
    assert_eq!(diag.lookup(&[asked]).unwrap(), [None]);
}

#[test]
fn sockets_come_in_the_order_asked_with_none_for_the_gone() {
    let present = close_wait(OTHER_PEER, 2);
    let mut diag = SockDiag::new(obliging(move |request| match request.seq {
        2 => Ok(vec![socket_message(2, &present)]),
        _ => Err(ENOENT),
    }));
    let lookups = [PEER, OTHER_PEER, PEER].map(|peer| lookup(SERVER, peer));
    assert_eq!(diag.lookup(&lookups).unwrap(), [None, Some(present), None]);
}

#[test]
fn the_listener_of_a_port_is_no_answer_for_a_connection() {
    let mut listener = socket(SERVER, "0.0.0.0:0", State::Listen, 9);
    for (local, remote) in [("0.0.0.0:80", "0.0.0.0:0"), (SERVER, PEER)] {
        // The second says LISTEN and has, by whatever error, the very tuple.
        (listener.local, listener.remote) = (played::endpoint(local), played::endpoint(remote));
        let mut diag = SockDiag::new(obliging(move |request| {
            Ok(vec![socket_message(request.seq, &listener)])
        }));
        assert_eq!(diag.lookup(&[lookup(SERVER, PEER)]).unwrap(), [None]);
    }
}

#[test]
fn a_socket_of_another_tuple_is_none() {
    for other in [
        close_wait(OTHER_PEER, 2),
        socket("192.0.2.1:81", PEER, State::CloseWait, 3),
        socket(PEER, SERVER, State::CloseWait, 4),
    ] {
        let mut diag =
            SockDiag::new(obliging(move |request| Ok(vec![socket_message(request.seq, &other)])));
        assert_eq!(diag.lookup(&[lookup(SERVER, PEER)]).unwrap(), [None]);
    }
}

#[test]
fn an_unanswered_look_up_is_never_none() {
    let lookups = [lookup(SERVER, PEER); 2];
    let whole = socket_message(1, &close_wait(PEER, 1));
    let cut = message(SOCK_DIAG_BY_FAMILY, 0, 1, &whole[16..80]);
    let foreign = message(KIND, 0, 1, &whole[16..]);
    for (case, replies) in [
        ("silence", vec![]),
        ("half of it", datagrams([whole.clone()])),
        ("first answer lost", datagrams([refusal(2, ENOENT)])),
        ("no privilege", datagrams([refusal(1, EPERM), refusal(2, EPERM)])),
        ("no privilege for one", datagrams([refusal(1, ENOENT), refusal(2, EPERM)])),
        ("acknowledged without a socket", datagrams([ack(1), ack(2)])),
        ("cut socket", datagrams([cut, refusal(2, ENOENT)])),
        ("a message of another kind", datagrams([foreign, refusal(2, ENOENT)])),
        ("overrun", vec![Reply::Errno(ENOBUFS)]),
        ("truncated", vec![Reply::Truncated]),
    ] {
        let mut diag = SockDiag::new(scripted(vec![replies]));
        let answer = diag.lookup(&lookups);
        assert!(answer.is_err(), "{case}: {answer:?}");
    }
}

#[test]
fn many_look_ups_travel_in_few_sends() {
    let sends = Rc::new(Cell::new(0));
    let count = sends.clone();
    let mut diag = SockDiag::new(script(move |datagram| {
        count.set(count.get() + 1);
        let requests = requests(datagram);
        assert!(requests.len() <= 64);
        datagrams(requests.iter().map(|request| refusal(request.seq, ENOENT)))
    }));
    let lookups = vec![lookup(SERVER, PEER); 640];
    assert_eq!(diag.lookup(&lookups).unwrap(), vec![None; 640]);
    assert_eq!(sends.get(), 10);
}

/// A namespace in which these sockets are, and nothing else.
fn namespace(sockets: Vec<Socket>) -> SockDiag<Played> {
    SockDiag::new(obliging(move |request| {
        if request.is_dump() {
            let listed = |socket| listed_socket(request.seq, socket);
            return Ok(sockets.iter().map(listed).collect());
        }
        let port = u16::from_be_bytes([request.body[10], request.body[11]]);
        let socket = sockets.iter().find(|socket| socket.remote.port() == port);
        Ok(vec![socket_message(request.seq, socket.ok_or(ENOENT)?)])
    }))
}

fn joined<T: Transport>(mut own: SockDiag<T>, other: SockDiag<T>) -> SockDiag<T> {
    own.join(7, other, HashSet::new());
    own
}

#[test]
fn a_namespace_that_is_known_to_have_an_address_is_asked_alone() {
    let here = close_wait(PEER, 1);
    let mut diag = joined(namespace(Vec::new()), namespace(vec![here]));
    // A question would be a panic.
    diag.join(8, namespace_that_is_not_asked(), ["203.0.113.1".parse().unwrap()].into());
    diag.join(7, namespace(vec![here]), [here.local.addr()].into());
    assert_eq!(diag.lookup(&[Lookup::from(&here)]).unwrap(), [Some(here)]);
    assert!(diag.is_of_member(here.local.addr()));
    diag.leave(7);
    assert!(!diag.is_of_member(here.local.addr()));
    assert_eq!(diag.members().collect::<Vec<_>>(), [8]);
}

fn namespace_that_is_not_asked() -> SockDiag<Played> {
    SockDiag::new(obliging(|_| panic!("a question")))
}

/// Of many namespaces only some are listed at one look; the half-closed sockets of the others are
/// looked up, one by one.
#[test]
fn of_many_namespaces_some_are_listed_at_a_time_and_none_is_forgotten() {
    let mut diag = namespace(Vec::new());
    let sockets: Vec<_> = (0..100_u16)
        .map(|number| close_wait(&format!("198.51.100.7:{}", 4000 + number), number.into()))
        .collect();
    for (id, socket) in (0..).zip(&sockets) {
        diag.join(id, namespace(vec![*socket]), HashSet::new());
    }
    for _ in 0..5 {
        assert_eq!(diag.sockets_lately(all()).unwrap(), sockets);
    }
}

/// Where a list is dear, fewer are listed at a look, and all of them by and by.
#[test]
fn what_lists_of_namespaces_cost_at_one_look_is_bounded() {
    let lists = Rc::new(RefCell::new(Vec::new()));
    let used = || Duration::from(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID).unwrap());
    let mut diag = namespace(Vec::new());
    for id in 0..20 {
        let lists = lists.clone();
        let dear = SockDiag::new(obliging(move |request| {
            assert!(request.is_dump());
            lists.borrow_mut().push(id);
            let before = used();
            while used() < before + Duration::from_millis(4) {}
            Ok(vec![])
        }));
        diag.join(id, dear, HashSet::new());
    }
    let mut look = || {
        diag.sockets_lately(all()).unwrap();
        lists.take()
    };
    assert_eq!(look().len(), 20, "each of them is new");
    let looks: Vec<_> = (0..5).map(|_| look()).collect();
    assert!(looks.iter().all(|listed| (4..20).contains(&listed.len())), "{looks:?}");
    let seen: HashSet<_> = looks.into_iter().flatten().collect();
    assert_eq!(seen.len(), 20);
}

#[test]
fn sockets_of_several_namespaces_are_found_in_whichever_has_them() {
    let (here, there) = (close_wait(PEER, 1), close_wait("198.51.100.7:4001", 2));
    let mut diag = joined(namespace(vec![here]), namespace(vec![there]));
    let nowhere = lookup(SERVER, "198.51.100.7:4002");
    let lookups = [nowhere, Lookup::from(&there), Lookup::from(&here)];
    assert_eq!(diag.lookup(&lookups).unwrap(), [None, Some(there), Some(here)]);
    assert_eq!(diag.sockets(all()).unwrap(), [here, there]);
}

#[test]
fn one_namespace_that_does_not_answer_fails_them_all() {
    let here = close_wait(PEER, 1);
    let silent = || SockDiag::new(script(|_| vec![]));
    let nowhere = lookup(SERVER, "198.51.100.7:4002");
    let pairs = [(namespace(vec![here]), silent()), (silent(), namespace(vec![here]))];
    for (own, other) in pairs {
        let mut diag = joined(own, other);
        diag.sockets(all()).unwrap_err();
        diag.lookup(&[nowhere]).unwrap_err();
    }
}

#[test]
fn no_look_ups_are_no_send() {
    let mut diag = SockDiag::new(script(|_| panic!("a send")));
    assert_eq!(diag.lookup(&[]).unwrap(), []);
}

/// A kernel that answers the request to close a socket so.
fn closing(answer: Result<(), i32>) -> ctkeep::Result<bool> {
    const SOCK_DESTROY: u16 = 21;
    let wanted = close_wait(PEER, 7);
    let mut diag = SockDiag::new(obliging(move |request| {
        assert_eq!((request.kind, request.flags & NLM_F_ACK), (SOCK_DESTROY, NLM_F_ACK));
        // `inet_diag_req_v2`: the cookie ends it, so no other socket of the tuple is meant.
        assert_eq!(request.body[48..56], 7_u64.to_ne_bytes());
        answer.map(|()| vec![])
    }));
    diag.destroy(&wanted)
}

#[test]
fn a_socket_is_closed_by_its_cookie_and_gone_where_another_has_its_tuple() {
    const ESTALE: i32 = 116;
    assert!(closing(Ok(())).unwrap());
    assert!(!closing(Err(ENOENT)).unwrap());
    assert!(!closing(Err(ESTALE)).unwrap());
    let error = closing(Err(EPERM)).unwrap_err();
    assert!(error.is_missing_privilege(), "{error}");
}

#[test]
fn a_kernel_that_closes_no_sockets_is_unavailable_and_the_option_is_named() {
    let error = closing(Err(EOPNOTSUPP)).unwrap_err();
    assert!(error.is_unavailable(), "{error}");
    assert!(error.to_string().contains("CONFIG_INET_DIAG_DESTROY"), "{error}");
}
