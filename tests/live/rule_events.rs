//! What is heard when rules change, and which limits are found to have lost their lists: recorded
//! notifications, and the administrator's own tools on the running kernel.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use crate::lab::{Lab, Namespace};
use crate::played::hex;
use ctkeep::firewall::lists::{Lists, Loss, Since};
use ctkeep::netlink::script::{Reply, Script};
use ctkeep::netlink::{KernelSocket, Transport};
use ctkeep::watch::rules::{Heard, Listener, RuleEvents};
use netlink_sys::protocols::NETLINK_NETFILTER;

const LIMIT: &str = "-p tcp --syn --dport 80 -m connlimit --connlimit-above 3 -j DROP";

/// A limit of each kind: in a set, in the declaration of a set, and plain.
const NFT: &str = "flush ruleset
table inet fw {
    set web { type ipv4_addr; flags dynamic; }
    set declared { type ipv4_addr; ct count over 3; flags dynamic; }
    set ports { type inet_service; elements = { 80, 443 } }
    chain in {
        type filter hook input priority 0;
        tcp dport @ports ct state new add @web { ip saddr ct count over 3 } drop
        tcp dport 81 ct state new add @declared { ip saddr } drop
        tcp dport 82 ct count over 3 drop
    }
}
";

/// Name, rules before, what is done.
const RECORDED: [(&str, &str, &str); 6] = [
    ("append", "", "iptables-nft -A INPUT -p udp --dport 9 -j DROP"),
    (
        "replace",
        "iptables-nft -A INPUT -p udp --dport 9 -j DROP",
        "iptables-nft -R INPUT 1 -j DROP",
    ),
    ("restore", "iptables-nft -A INPUT -p udp --dport 9 -j DROP", "iptables-nft-restore"),
    ("flush-ruleset", "nft -f -", "nft -f -"),
    ("flush-set", "nft -f -", "nft flush set inet fw ports"),
    ("add-element", "nft -f -", "nft add element inet fw ports { 8080 }"),
];

fn heard_of(datagrams: Vec<Vec<u8>>, own: &str) -> Heard {
    let mut kernel =
        Script::new(move |_: &[u8]| datagrams.iter().cloned().map(Reply::Datagram).collect());
    kernel.send(&[]).unwrap();
    let mut heard = Heard::default();
    Listener::new(kernel).drain(own, &mut heard).unwrap();
    heard
}

fn recorded(name: &str) -> Heard {
    heard_of(hex::read(&format!("rules/{name}")), "ctkeep0")
}

fn ports() -> (u8, String, String) {
    (1, "fw".into(), "ports".into())
}

#[test]
fn recorded_notifications_say_what_has_changed() {
    assert_eq!(recorded("append"), Heard { rules: 3, ..Heard::default() });
    let replaced = recorded("replace");
    assert_eq!((replaced.rules, replaced.deleted.len()), (2, 1), "{replaced:?}");
    assert!(recorded("restore").rules > 5);
    let ruleset = recorded("flush-ruleset");
    assert!(ruleset.rules > 10 && ruleset.grown.contains(&ports()), "{ruleset:?}");
    assert_eq!(recorded("flush-set"), Heard { emptied: [ports()].into(), ..Heard::default() });
    let grown = recorded("add-element");
    assert_eq!(grown, Heard { grown: [ports()].into(), ..Heard::default() });
    assert!(!grown.is_loss() && !grown.is_nothing());
}

#[test]
fn changes_of_our_own_tables_are_not_heard() {
    assert!(heard_of(hex::read("rules/flush-set"), "fw").is_nothing());
}

#[test]
fn what_cannot_be_read_counts_as_lost() {
    let whole = hex::read("rules/flush-ruleset");
    for cut in 1..whole[0].len() {
        let heard = heard_of(vec![whole[0][..cut].to_vec()], "ctkeep0");
        assert!(heard.lost || heard.rules > 0 || heard.is_nothing(), "{cut}: {heard:?}");
    }
    let mut nameless = whole[0].clone();
    // The first attribute of the first message.
    nameless[22] = 9;
    assert!(heard_of(vec![nameless], "ctkeep0").lost);
}

#[test]
fn an_overrun_counts_as_lost() {
    let mut kernel = Script::new(|_: &[u8]| vec![Reply::Errno(105), Reply::Truncated]);
    kernel.send(&[]).unwrap();
    let mut heard = Heard::default();
    Listener::new(kernel).drain("ctkeep0", &mut heard).unwrap();
    assert!(heard.lost && heard.is_loss());
}

/// Rules, listener and last reading of one namespace.
struct Following<'a> {
    place: &'a Namespace,
    events: RuleEvents,
    lists: Lists,
}

impl<'a> Following<'a> {
    fn start(place: &'a Namespace) -> Self {
        let (events, lists) =
            place.within(|| (RuleEvents::open().unwrap(), Lists::read(None).unwrap()));
        Self { place, events, lists }
    }

    /// The losses that are found after what `change` does, by the limit's number.
    fn after(&mut self, change: impl FnOnce(&Namespace)) -> Vec<(u32, Loss)> {
        self.events.drain("ctkeep0").unwrap();
        change(self.place);
        let heard = self.events.drain("ctkeep0").unwrap();
        let before = self.lists.clone();
        let known = (!heard.is_of_nft()).then_some(&before);
        self.lists = self.place.within(|| Lists::read(known).unwrap());
        let since = Since {
            deleted: heard.deleted.clone(),
            emptied: heard.emptied.clone(),
            // Other tests of this machine share the lock.
            legacy_ran: false,
            lost: heard.lost,
        };
        let anew = self.lists.anew(&before, &since);
        assert!(anew.is_empty() || heard.is_loss() || !heard.grown.is_empty(), "{heard:?}");
        anew.into_iter().map(|anew| (anew.rule.limit.count, anew.loss)).collect()
    }
}

#[test]
fn a_change_of_iptables_nft_rules_shows_the_limits_that_it_made_anew() {
    let Some(lab) = Lab::new() else { return };
    let mut rules = Following::start(&lab.server);
    let limit = |above: u32| LIMIT.replace('3', &above.to_string());
    let append = format!("iptables-nft -A INPUT {LIMIT}");
    assert_eq!(rules.after(|place| place.run(&append)), [(3, Loss::New)]);
    let unrelated = "iptables-nft -I INPUT -p udp --dport 9 -j DROP";
    assert_eq!(rules.after(|place| place.run(unrelated)), []);
    let saved = lab.server.output("iptables-nft-save");
    let anew = rules.after(|place| drop(place.feed("iptables-nft-restore", &saved)));
    assert_eq!(anew, [(3, Loss::New)]);
    let added = rules.after(|place| drop(place.feed("iptables-nft-restore -n", &saved)));
    assert!(added.contains(&(3, Loss::New)), "{added:?}");
    let replace = format!("iptables-nft -R INPUT 2 {}", limit(4));
    assert!(rules.after(|place| place.run(&replace)).contains(&(4, Loss::New)));
    assert_eq!(rules.after(|place| place.run("iptables-nft -F INPUT")), []);
    assert_eq!(rules.after(|place| place.run(&append)), [(3, Loss::New)]);
}

#[test]
fn a_change_of_nft_rules_shows_the_limits_that_it_made_anew_or_emptied() {
    let Some(lab) = Lab::new() else { return };
    let mut rules = Following::start(&lab.server);
    let all = [(3, Loss::New), (3, Loss::New), (3, Loss::New)];
    assert_eq!(rules.after(|place| drop(place.feed("nft -f -", NFT))), all);
    assert_eq!(rules.after(|place| drop(place.feed("nft -f -", NFT))), all);
    let flush = |set: &str| {
        let element = if set == "web" { " ct count over 3" } else { "" };
        // In one transaction, so that the kernel does not throw the empty list out before.
        format!("add element inet fw {set} {{ 198.51.100.7{element} }}\nflush set inet fw {set}\n")
    };
    for set in ["web", "declared"] {
        let emptied = rules.after(|place| drop(place.feed("nft -f -", &flush(set))));
        assert_eq!(emptied, [(3, Loss::Emptied)], "{set}");
    }
    let wider = rules.after(|place| place.run("nft add element inet fw ports { 8080 }"));
    assert_eq!(wider, [(3, Loss::Wider)]);
    let changed = "nft replace rule inet fw in handle 7 tcp dport 82 ct count over 4 drop";
    let handles = lab.server.output("nft -a list chain inet fw in");
    let number = handles.lines().find(|line| line.contains("dport 82")).unwrap();
    let number = number.rsplit("handle ").next().unwrap().trim();
    let changed = changed.replace("handle 7", &format!("handle {number}"));
    assert_eq!(rules.after(|place| place.run(&changed)), [(4, Loss::New)]);
}

#[test]
fn a_table_of_iptables_legacy_that_was_replaced_is_found() {
    let Some(lab) = Lab::new() else { return };
    let mut rules = Following::start(&lab.server);
    let limit = format!("iptables-legacy -A INPUT {LIMIT}");
    assert_eq!(rules.after(|place| place.run(&limit)), [(3, Loss::New)]);
    assert_eq!(rules.after(|place| place.run("iptables-legacy -L -n")), []);
    let unrelated = "iptables-legacy -A INPUT -p udp --dport 9 -j DROP";
    assert_eq!(rules.after(|place| place.run(unrelated)), [(3, Loss::Replaced)]);
    let other_table = "iptables-legacy -t mangle -A INPUT -p udp --dport 9 -j DROP";
    assert_eq!(rules.after(|place| place.run(other_table)), []);
}

#[test]
#[ignore = "rewrites tests/golden/rules from the running kernel"]
fn capture() {
    for (name, before, done) in RECORDED {
        let lab = Lab::new().expect("a kernel to capture from");
        let text = if before.starts_with("nft") { NFT } else { "" };
        if !before.is_empty() {
            lab.server.feed(before, text);
        }
        let text = match done {
            "nft -f -" => NFT.to_owned(),
            "iptables-nft-restore" => lab.server.output("iptables-nft-save"),
            _ => String::new(),
        };
        let datagrams = lab.server.within(|| {
            let op = ctkeep::Op::new("capture");
            let mut socket = KernelSocket::open(op, NETLINK_NETFILTER).unwrap();
            socket.set_non_blocking().unwrap();
            socket.join(7).unwrap();
            lab.server.feed(done, &text);
            let mut datagrams = Vec::new();
            let mut datagram = Vec::new();
            while socket.recv(&mut datagram).is_ok() {
                datagrams.push(datagram.clone());
            }
            datagrams
        });
        let version = lab.server.output("uname -r");
        let comment = format!("What is told of `{done}`, Linux {}", version.trim());
        hex::write(&format!("rules/{name}"), &[&comment], &datagrams);
    }
}
