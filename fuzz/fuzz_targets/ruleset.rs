//! Chains, rules and sets as nf_tables tells of them, with the xt blobs inside, and what they come
//! to.

#![no_main]

use ctkeep::firewall::limits::Limiter;
use ctkeep::firewall::{Ruleset, nft_chains};
use ctkeep::netlink::script::Reply;
use ctkeep::netlink::{Conversation, frames};
use ctkeep_fuzz::{played, played_through};
use libfuzzer_sys::fuzz_target;

/// Each question that is asked to list something, and the kind of its answers.
const ANSWERS: [(u16, u16); 6] = [(1, 0), (4, 3), (7, 6), (10, 9), (13, 12), (19, 18)];

// The messages of all dumps in one datagram: each question gets those of its kind.
fuzz_target!(|bytes: &[u8]| {
    let datagram = bytes.to_vec();
    let mut connection = Conversation::new(played::script(move |sent| {
        let request = &played::requests(sent)[0];
        let wanted = ANSWERS.iter().find(|(asked, _)| *asked == request.kind & 0xff).unwrap().1;
        let mut replies: Vec<Reply> = frames(&datagram)
            .flatten()
            .filter(|frame| frame.kind & 0xff == wanted)
            .map(|frame| played::message(10 << 8 | wanted, 2, request.seq, frame.payload))
            .map(Reply::Datagram)
            .collect();
        replies.push(Reply::Datagram(played::done(request.seq, 0)));
        replies
    }));
    let chains = nft_chains(&mut connection).expect("a rule that is not understood is no error");
    for chain in &chains {
        assert!(chain.rules.is_sorted_by_key(|rule| rule.position));
    }
    let ruleset = Ruleset { chains, unread: Vec::new() };
    played_through(&ruleset);
    let limiter = Limiter::of(&ruleset);
    for rule in &limiter.rules {
        assert!(!rule.to_string().is_empty());
        assert!(rule.source_prefix().is_none_or(|bits| bits <= 128), "{rule}");
    }
    assert!(limiter.prefix(true).is_none_or(|bits| bits <= 32));
});
