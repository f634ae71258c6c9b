//! The kernel lies: any damage to valid answers, anywhere.

use proptest::prelude::*;

use super::*;
use ctkeep::firewall::nft_chains;
use ctkeep::netlink::frames;

/// One thing that goes wrong with the answers to one send.
#[derive(Clone, Debug)]
enum Damage {
    Byte {
        datagram: usize,
        at: usize,
        value: u8,
    },
    /// Most fields that matter are words at aligned places: lengths, types, numbers.
    Word {
        datagram: usize,
        at: usize,
        value: u32,
    },
    Cut {
        datagram: usize,
        length: usize,
    },
    Grow {
        datagram: usize,
        bytes: Vec<u8>,
    },
    Drop {
        datagram: usize,
    },
    Repeat {
        datagram: usize,
    },
    Swap {
        datagram: usize,
        with: usize,
    },
    Join {
        datagram: usize,
    },
    Noise {
        datagram: usize,
        bytes: Vec<u8>,
    },
    Errno {
        datagram: usize,
        errno: i32,
    },
    Truncated {
        datagram: usize,
    },
}

fn damage() -> impl Strategy<Value = Damage> {
    use Damage::*;
    let datagram = 0..8_usize;
    let words = prop_oneof![
        any::<u32>(),
        0..64_u32,
        Just(u32::MAX),
        Just(0x0006_0005),
        Just(u32::from(NLMSG_ERROR)),
        Just(u32::from(NLMSG_DONE)),
        Just(u32::from(SOCK_DIAG_BY_FAMILY)),
    ];
    let bytes = proptest::collection::vec(any::<u8>(), 1..80);
    prop_oneof![
        4 => (datagram.clone(), any::<usize>(), any::<u8>())
            .prop_map(|(datagram, at, value)| Byte { datagram, at, value }),
        4 => (datagram.clone(), any::<usize>(), words)
            .prop_map(|(datagram, at, value)| Word { datagram, at, value }),
        2 => (datagram.clone(), any::<usize>())
            .prop_map(|(datagram, length)| Cut { datagram, length }),
        1 => (datagram.clone(), bytes.clone())
            .prop_map(|(datagram, bytes)| Grow { datagram, bytes }),
        1 => datagram.clone().prop_map(|datagram| Drop { datagram }),
        1 => datagram.clone().prop_map(|datagram| Repeat { datagram }),
        1 => (datagram.clone(), datagram.clone())
            .prop_map(|(datagram, with)| Swap { datagram, with }),
        1 => datagram.clone().prop_map(|datagram| Join { datagram }),
        1 => (datagram.clone(), bytes)
            .prop_map(|(datagram, bytes)| Noise { datagram, bytes }),
        1 => (datagram.clone(), prop_oneof![Just(ENOBUFS), Just(EPERM), Just(ENOENT)])
            .prop_map(|(datagram, errno)| Errno { datagram, errno }),
        1 => datagram.prop_map(|datagram| Truncated { datagram }),
    ]
}

impl Damage {
    fn apply(&self, replies: &mut Vec<Reply>) {
        let count = replies.len();
        if count == 0 {
            return;
        }
        let place = |datagram: usize| datagram % count;
        // A change to bytes where there are some.
        let bytes = |replies: &mut Vec<Reply>, datagram: usize, f: &dyn Fn(&mut Vec<u8>)| {
            if let Reply::Datagram(bytes) = &mut replies[place(datagram)]
                && !bytes.is_empty()
            {
                f(bytes);
            }
        };
        match self {
            Self::Byte { datagram, at, value } => bytes(replies, *datagram, &|bytes| {
                let at = at % bytes.len();
                bytes[at] = *value;
            }),
            Self::Word { datagram, at, value } => bytes(replies, *datagram, &|bytes| {
                let at = at % bytes.len() / 4 * 4;
                let word = value.to_ne_bytes();
                let room = word.len().min(bytes.len() - at);
                bytes[at..at + room].copy_from_slice(&word[..room]);
            }),
            Self::Cut { datagram, length } => bytes(replies, *datagram, &|bytes| {
                bytes.truncate(length % bytes.len());
            }),
            Self::Grow { datagram, bytes: more } => bytes(replies, *datagram, &|bytes| {
                bytes.extend(more);
            }),
            Self::Drop { datagram } => drop(replies.remove(place(*datagram))),
            Self::Repeat { datagram } => {
                replies.insert(place(*datagram), replies[place(*datagram)].clone());
            }
            Self::Swap { datagram, with } => replies.swap(place(*datagram), place(*with)),
            Self::Join { datagram } => {
                let at = place(*datagram);
                if let (Some(Reply::Datagram(next)), Reply::Datagram(_)) =
                    (replies.get(at + 1).cloned(), &replies[at])
                {
                    bytes(replies, at, &|bytes| bytes.extend(&next));
                    replies.remove(at + 1);
                }
            }
            Self::Noise { datagram, bytes } => {
                replies.insert(place(*datagram), Reply::Datagram(bytes.clone()));
            }
            Self::Errno { datagram, errno } => {
                replies.insert(place(*datagram), Reply::Errno(*errno));
            }
            Self::Truncated { datagram } => {
                replies.insert(place(*datagram), Reply::Truncated);
            }
        }
    }
}

/// A kernel that means well, and damage on the way from it.
fn damaged(
    answer: impl Fn(&played::Request) -> Result<Vec<Vec<u8>>, i32> + 'static,
    damage: Vec<Damage>,
) -> Played {
    script(move |datagram| {
        let mut replies = Vec::new();
        for request in requests(datagram) {
            let end = match answer(&request) {
                Ok(messages) => {
                    replies.extend(datagrams(messages));
                    if request.is_dump() { done(request.seq, 0) } else { ack(request.seq) }
                }
                Err(errno) => refusal_because(request.seq, errno, "not there"),
            };
            replies.push(Reply::Datagram(end));
        }
        damage.iter().for_each(|damage| damage.apply(&mut replies));
        replies
    })
}

/// Four look-ups: present, gone, listener, present.
fn asked() -> [FourTuple; 4] {
    [4000, 4001, 4002, 4003].map(|port| flow(SERVER, &format!("198.51.100.7:{port}")))
}

fn socket_answer(request: &played::Request) -> Result<Vec<Vec<u8>>, i32> {
    if request.is_dump() {
        let sockets =
            asked().map(|flow| socket_message(request.seq, &close_wait(&flow.dst.to_string(), 7)));
        return Ok(sockets.to_vec());
    }
    let port = u16_at(&request.body, 10).to_be();
    match port {
        4001 => Err(ENOENT),
        4002 => {
            let listener = socket("0.0.0.0:80", "0.0.0.0:0", State::Listen, 9);
            Ok(vec![socket_message(request.seq, &listener)])
        }
        _ => {
            let peer = format!("198.51.100.7:{port}");
            Ok(vec![socket_message(request.seq, &close_wait(&peer, u64::from(port)))])
        }
    }
}

fn entry_answer(request: &played::Request) -> Result<Vec<Vec<u8>>, i32> {
    let entries = asked().map(|flow| entry(flow, TcpState::CloseWait, 60));
    if request.is_dump() {
        return Ok(entries.iter().map(|entry| entry_message(request.seq, entry)).collect());
    }
    match request.kind {
        CT_GET_STATS => {
            let payload = [vec![0; 4], attribute(1, &7_u32.to_be_bytes())].concat();
            Ok(vec![message(CT_GET_STATS, 0, request.seq, &payload)])
        }
        CT_GET => {
            let port = played::descend(&request.body[4..], &[1, 2, 3]).unwrap();
            let port = u16::from_be_bytes(port.try_into().unwrap());
            let entry = entries.iter().find(|entry| entry.reply.dst.port() == port);
            match entry {
                Some(entry) if port != 4001 => Ok(vec![entry_message(request.seq, entry)]),
                _ => Err(ENOENT),
            }
        }
        _ => Ok(vec![]),
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 1000, ..ProptestConfig::default() })]

    #[test]
    fn no_damage_makes_a_look_up_find_the_socket_of_another_tuple(
        damage in proptest::collection::vec(damage(), 1..4)
    ) {
        let mut diag = SockDiag::new(damaged(socket_answer, damage));
        let lookups = asked().map(|flow| Lookup { connection: Connection::of_sender(flow), interface: 0 });
        // The second round meets what the first has left behind.
        for _ in 0..2 {
            let Ok(found) = diag.lookup(&lookups) else { continue };
            prop_assert_eq!(found.len(), lookups.len());
            for (lookup, socket) in lookups.iter().zip(found) {
                if let Some(socket) = socket {
                    prop_assert_eq!(socket.connection(), lookup.connection);
                    prop_assert_ne!(socket.state, State::Listen);
                }
            }
        }
        let _ = diag.sockets(States::connected());
    }

    #[test]
    fn no_damage_makes_a_question_find_the_entry_of_another_tuple(
        damage in proptest::collection::vec(damage(), 1..4)
    ) {
        let mut table = Conntrack::new(damaged(entry_answer, damage));
        let keys = asked().map(|flow| (flow, Zone::default()));
        for _ in 0..2 {
            let Ok(found) = table.get(&keys) else { continue };
            prop_assert_eq!(found.len(), keys.len());
            for ((flow, _), entry) in keys.iter().zip(found) {
                if let Some(entry) = entry {
                    prop_assert!(entry.orig == *flow || entry.reply == *flow);
                }
            }
        }
        let _ = table.size();
        let _ = table.entries(AF_INET, Filter::Tcp, |all: &mut Vec<_>, e| all.push(*e));
    }

    #[test]
    fn no_damage_gives_changes_more_or_fewer_results_than_there_are_changes(
        damage in proptest::collection::vec(damage(), 1..4)
    ) {
        let mut table = Conntrack::new(damaged(entry_answer, damage));
        let changes = asked().map(|flow| {
            let key = EntryKey { zone: Zone::default(), orig: flow.inverse() };
            let like = Entry::plain(flow.inverse(), Zone::default());
            let timeout = Duration::from_secs(60);
            let state = TcpState::CloseWait;
            let new = Insert { like, state, status: Status::FRESH, timeout };
            Change::Replace { old: key, id: None, new }
        });
        if let Ok(results) = table.change(&changes) {
            prop_assert_eq!(results.len(), changes.len());
        }
    }

    #[test]
    fn no_damage_makes_the_listener_panic(
        damage in proptest::collection::vec(damage(), 1..4)
    ) {
        let event = entry(flow(SERVER, PEER), TcpState::Close, 10);
        let mut script = script(move |_| {
            let mut replies: Vec<Reply> = (0..6_u16)
                .map(|n| message_from(n.into(), [CT_NEW, CT_DELETE][usize::from(n % 2)], 0, 0,
                    &entry_payload(&event)))
                .map(Reply::Datagram)
                .collect();
            damage.iter().for_each(|damage| damage.apply(&mut replies));
            replies
        });
        script.send(&[]).unwrap();
        let _ = Listener::new(script).drain(100, |_| ());
    }
}

/// Found by the fuzz target `ruleset`: a rule whose value is said to be gigabytes long, of which each
/// word was taken for a register.
#[test]
fn a_length_without_end_in_a_rule_is_that_of_all_registers() {
    const RULES: &[u8] = include_bytes!("../../fuzz/seeds/ruleset/a-length-without-end");
    /// Each question that lists something, and the kind of its answers.
    const ANSWERS: [(u16, u16); 6] = [(1, 0), (4, 3), (7, 6), (10, 9), (13, 12), (19, 18)];
    let kernel = script(|sent| {
        let request = &played::requests(sent)[0];
        let wanted = ANSWERS.iter().find(|(asked, _)| *asked == request.kind & 0xff).unwrap().1;
        let of_kind = frames(RULES).flatten().filter(|frame| frame.kind & 0xff == wanted);
        let answer = |payload: &[u8]| message(10 << 8 | wanted, 2, request.seq, payload);
        let mut replies: Vec<Reply> =
            of_kind.map(|frame| Reply::Datagram(answer(frame.payload))).collect();
        replies.push(Reply::Datagram(done(request.seq, 0)));
        replies
    });
    let chains = nft_chains(&mut Conversation::new(kernel)).unwrap();
    assert!(!chains.is_empty());
}
