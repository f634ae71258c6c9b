//! Put back as it was: translation, zone, mark, labels and helper of an entry survive its repair,
//! be it closed or lost, and the connection behind it works on and counts.

use crate::lab;
use std::thread;
use std::time::Duration;

use crate::lab::rules::restore;
use crate::lab::{Entry, Lab, Namespace, Peer, RawConn, Server, wait_for};

const PROGRAM: &str = env!("CARGO_BIN_EXE_ctkeep");
const LIMIT: usize = 3;
const TRIES: usize = LIMIT + 2;
/// Of what is guarded behind a transparent proxy.
const PROXYS: &[&str] = &["--port", "80"];
const SOON: Duration = Duration::from_secs(10);

/// What a host does to its connections, and where that shows in `conntrack -L`.
#[derive(Clone)]
struct Site {
    source: &'static str,
    /// An address that clients ask for and no interface has.
    virtual_address: Option<&'static str>,
    /// Where the limit stands: table and chain.
    limits: &'static [(&'static str, &'static str)],
    listen: &'static str,
    container: bool,
    /// For `iptables-restore`, beside the limit.
    rules: String,
    /// For `nft -f -`.
    nft: &'static str,
    /// Words that the line of each entry has from the beginning.
    shown: &'static [&'static str],
    /// By iptables rules that match new connections, and are gone when the repair comes.
    once: Vec<&'static str>,
}

impl Default for Site {
    fn default() -> Self {
        Self {
            source: "198.51.100.7",
            virtual_address: None,
            limits: &[("filter", "INPUT"), ("filter", "FORWARD")],
            listen: "[::]:80",
            container: false,
            rules: String::new(),
            nft: "",
            shown: &[],
            once: Vec::new(),
        }
    }
}

#[derive(Clone, Copy, Debug)]
enum Harm {
    /// Closed by a stale RST.
    StaleRst,
    /// Deleted, as the kernel deletes it when its time is over.
    Deletion,
}

struct Scene {
    lab: Lab,
    container: Option<Namespace>,
    server: Server,
    peer: Peer,
    conns: Vec<RawConn>,
}

impl Scene {
    fn new(site: &Site) -> Option<Self> {
        let lab = Lab::new()?;
        let container = site.container.then(|| lab.container());
        lab.server.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0");
        if !site.rules.is_empty() {
            lab.server.feed("iptables-restore", &site.rules);
        }
        if !site.nft.is_empty() {
            lab.server.feed("nft -f -", site.nft);
        }
        lab.server.run("ip addr add 10.9.9.9/32 dev lo");
        for rule in &site.once {
            lab.server.run(&format!("iptables -t mangle -A {rule}"));
        }
        let place = container.as_ref().unwrap_or(&lab.server);
        let server = Server::start(place, site.listen);
        let peer = match site.virtual_address {
            Some(address) => {
                let neighbour = "lladdr 02:00:00:00:00:01 dev eth0";
                lab.client.run(&format!("ip neigh add {address} {neighbour}"));
                lab.peer_to(site.source, address)
            }
            None => lab.peer(site.source),
        };
        for (table, chain) in site.limits {
            let limit = format!("-t {table} -A {chain} -p tcp --syn -m connlimit");
            for (program, mask) in [("iptables", 32), ("ip6tables", 128)] {
                let mask = format!("--connlimit-mask {mask} --connlimit-above 3");
                lab.server.run(&format!("{program} {limit} {mask} -j DROP"));
            }
        }
        let mut conns = peer.hold(80, LIMIT);
        for rule in &site.once {
            lab.server.run(&format!(
                "iptables -t mangle {}",
                rule.replacen("PREROUTING", "-D PREROUTING", 1)
            ));
        }
        conns.iter_mut().for_each(RawConn::fin);
        wait_for("ACKs of the FINs", SOON, || conns.iter_mut().all(RawConn::await_ack));
        Some(Self { lab, container, server, peer, conns })
    }

    /// The entries of the connections, each in the right direction.
    fn entries(&self) -> Vec<Option<Entry>> {
        let all = self.lab.entries();
        let of = |conn: &RawConn| {
            all.iter().find(|entry| entry.orig == (conn.client, conn.server)).cloned()
        };
        self.conns.iter().map(of).collect()
    }

    /// What must outlast a repair: all but state, timeout and the entry's identity.
    fn lasting(&self) -> Vec<String> {
        let lasting = |entry: Option<Entry>| {
            let entry = entry.expect("an entry");
            let words = entry.line.split(' ');
            let lasting = words.filter(|word| *word != entry.state && !word.starts_with("id="));
            lasting.collect::<Vec<_>>().join(" ")
        };
        self.entries().into_iter().map(lasting).collect()
    }

    fn harm(&self, harm: Harm) {
        match harm {
            Harm::StaleRst => self.conns.iter().for_each(|conn| conn.stale_rst()),
            Harm::Deletion => {
                self.lab.server.run("conntrack -D -p tcp");
            }
        }
        // Throws the tuples out of the limiter's list.
        self.peer.syn_only(80).rst(0);
    }
}

fn survives(site: &Site, harm: Harm) {
    let Some(mut scene) = Scene::new(site) else { return };
    let before = scene.lasting();
    for word in site.shown {
        assert!(before.iter().all(|line| line.contains(word)), "no {word} in {before:?}");
    }
    let path = scene.container.as_ref().map(Namespace::path);
    let netns: Vec<&str> = path.iter().flat_map(|path| ["--netns", path]).collect();
    let daemon = scene.lab.daemon(PROGRAM, &netns);
    // Its first sweep is what it knows a deleted entry from.
    wait_for("a look", SOON, || daemon.log().matches(" ready ").count() > netns.len() / 2);
    daemon.stop();
    scene.harm(harm);
    daemon.cont();
    wait_for("repair", SOON, || {
        let alive = |entry: &Option<Entry>| {
            entry.as_ref().is_some_and(|entry| {
                matches!(entry.state.as_str(), "ESTABLISHED" | "CLOSE_WAIT") && entry.assured
            })
        };
        scene.entries().iter().all(alive)
    });
    assert_eq!(scene.lasting(), before, "{harm:?}:\n{}", daemon.log());

    scene.server.send_all(b"still here");
    wait_for("data of the server", SOON, || {
        scene.conns.iter_mut().all(|conn| conn.received() == b"still here".len())
    });
    assert_eq!(scene.peer.admitted(80, TRIES), 0, "{harm:?}: all three count");
}

fn survives_all(site: Site) {
    survives(&site, Harm::StaleRst);
    survives(&site, Harm::Deletion);
}

fn nat(rules: &[&str]) -> String {
    restore("nat", "PREROUTING INPUT OUTPUT POSTROUTING", rules)
}

fn raw(rules: &[&str]) -> String {
    restore("raw", "PREROUTING OUTPUT", rules)
}

#[test]
fn a_redirect_survives() {
    survives_all(Site {
        listen: "[::]:8080",
        rules: nat(&["PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 8080"]),
        shown: &["sport=8080"],
        ..Site::default()
    });
}

#[test]
fn a_translated_destination_survives() {
    survives_all(Site {
        listen: "[::]:8080",
        rules: nat(&["PREROUTING -p tcp --dport 80 -j DNAT --to-destination 10.9.9.9:8080"]),
        shown: &["src=10.9.9.9", "sport=8080"],
        ..Site::default()
    });
}

#[test]
fn a_translated_source_survives() {
    survives_all(Site {
        rules: nat(&["INPUT -p tcp --dport 80 -j SNAT --to-source 203.0.113.200"]),
        shown: &["dst=203.0.113.200"],
        ..Site::default()
    });
}

#[test]
fn a_destination_in_a_container_survives() {
    survives_all(Site {
        listen: "[::]:8080",
        container: true,
        rules: nat(&["PREROUTING -d 192.0.2.1 -p tcp --dport 80 -j DNAT --to 10.0.0.2:8080"]),
        shown: &["src=10.0.0.2", "sport=8080"],
        ..Site::default()
    });
}

/// A virtual address, as the ClusterIP of a service: no interface has it, and its packets are
/// translated to a local address or a container's. The limit stands before that, or behind.
#[test]
fn a_virtual_address_survives() {
    const ADDRESS: &str = "192.0.2.77";
    const BEFORE: &[(&str, &str)] = &[("mangle", "PREROUTING")];
    const INPUT: &[(&str, &str)] = &[("filter", "INPUT")];
    const FORWARD: &[(&str, &str)] = &[("filter", "FORWARD")];
    let sites = [(false, "192.0.2.1:8080", INPUT), (true, "10.0.0.2:8080", FORWARD)];
    for (container, to, behind) in sites {
        let rule = format!("PREROUTING -d {ADDRESS} -p tcp --dport 80 -j DNAT --to {to}");
        for limits in [BEFORE, behind] {
            let site = Site {
                virtual_address: Some(ADDRESS),
                limits,
                listen: "[::]:8080",
                container,
                rules: nat(&[&rule]),
                shown: &["sport=8080"],
                ..Site::default()
            };
            assert_gives_away(&site);
            survives(&site, if limits == BEFORE { Harm::Deletion } else { Harm::StaleRst });
        }
    }
}

/// Without ctkeep the connections are forgotten, and others get in.
fn assert_gives_away(site: &Site) {
    let Some(scene) = Scene::new(site) else { return };
    // A limit keeps what it has just added for two ticks of the kernel's clock.
    std::thread::sleep(Duration::from_millis(30));
    scene.harm(Harm::StaleRst);
    assert!(scene.peer.admitted(80, TRIES) > 0, "the stock kernel resists");
}

#[test]
fn a_masqueraded_client_of_a_container_survives() {
    survives_all(Site {
        listen: "[::]:8080",
        container: true,
        rules: nat(&[
            "PREROUTING -d 192.0.2.1 -p tcp --dport 80 -j DNAT --to 10.0.0.2:8080",
            "POSTROUTING -o cont0 -j MASQUERADE",
        ]),
        shown: &["src=10.0.0.2", "dst=10.0.0.1"],
        ..Site::default()
    });
}

#[test]
fn a_redirect_survives_over_ipv6() {
    survives_all(Site {
        source: "2001:db8:1::7",
        listen: "[::]:8080",
        nft: "table ip6 translation { chain incoming { type nat hook prerouting priority -100;\n\
              tcp dport 80 redirect to :8080\n}\n}",
        shown: &["sport=8080"],
        ..Site::default()
    });
}

#[test]
fn a_zone_of_both_directions_survives() {
    survives_all(Site {
        rules: raw(&[
            "PREROUTING -i eth0 -p tcp --dport 80 -j CT --zone 5",
            "OUTPUT -o eth0 -p tcp --sport 80 -j CT --zone 5",
        ]),
        shown: &["zone=5"],
        ..Site::default()
    });
}

#[test]
fn a_zone_of_the_original_direction_survives() {
    survives_all(Site {
        rules: raw(&["PREROUTING -i eth0 -p tcp --dport 80 -j CT --zone-orig 5"]),
        shown: &["zone-orig=5"],
        ..Site::default()
    });
}

#[test]
fn a_zone_of_the_reply_direction_survives() {
    survives_all(Site {
        rules: raw(&[
            "PREROUTING -i eth0 -p tcp --dport 80 -j CT --zone-reply 5",
            "OUTPUT -o eth0 -p tcp --sport 80 -j CT --zone-reply 5",
        ]),
        shown: &["zone-reply=5"],
        ..Site::default()
    });
}

#[test]
fn a_mark_survives() {
    survives_all(Site {
        once: vec!["PREROUTING -p tcp --dport 80 -j CONNMARK --set-mark 23"],
        shown: &["mark=23"],
        ..Site::default()
    });
}

#[test]
fn a_helper_survives() {
    survives_all(Site {
        rules: raw(&["PREROUTING -p tcp --dport 80 -j CT --helper ftp"]),
        shown: &["helper=ftp"],
        ..Site::default()
    });
}

/// `conntrack -L` does not show labels without names for them; a rule sees them.
#[test]
fn labels_survive() {
    for harm in [Harm::StaleRst, Harm::Deletion] {
        let site = Site {
            once: vec!["PREROUTING -p tcp --dport 80 -m connlabel --label 3 --set -j ACCEPT"],
            ..Site::default()
        };
        let Some(scene) = Scene::new(&site) else { return };
        let count = "-A OUTPUT -p tcp --sport 80 -m connlabel --label 3";
        scene.lab.server.run(&format!("iptables {count} -j ACCEPT"));
        let mut server = scene.server;
        let hits = |lab: &Lab| {
            let rules = lab.server.output("iptables-save -c");
            let rule = rules.lines().find(|line| line.contains("connlabel")).expect("the rule");
            let count = rule.trim_start_matches('[').split(':').next();
            count.and_then(|count| count.parse::<usize>().ok()).expect("a counter")
        };
        let daemon = scene.lab.daemon(PROGRAM, &[]);
        daemon.stop();
        match harm {
            Harm::StaleRst => scene.conns.iter().for_each(|conn| conn.stale_rst()),
            Harm::Deletion => scene.lab.server.run("conntrack -D -p tcp"),
        }
        daemon.cont();
        wait_for("repair", SOON, || {
            let log = daemon.log();
            log.matches("revive").count() + log.matches("reinsert").count() == LIMIT
        });
        let before = hits(&scene.lab);
        server.send_all(b"still here");
        wait_for("labelled data", SOON, || hits(&scene.lab) >= before + LIMIT);
    }
}

/// Two customers of a router may use the same addresses, each in a zone of its own.
#[test]
fn an_entry_of_the_same_tuple_in_another_zone_is_left_alone() {
    for harm in [Harm::StaleRst, Harm::Deletion] {
        let Some(scene) = Scene::new(&Site::default()) else { return };
        for conn in &scene.conns {
            let (client, server) = (conn.client, conn.server);
            scene.lab.server.run(&format!(
                "conntrack -I -w 7 -p tcp -s {} -d {} --sport {} --dport {} \
                 --state CLOSE --timeout 500 -u ASSURED",
                client.ip(),
                server.ip(),
                client.port(),
                server.port()
            ));
        }
        let others = || -> Vec<Entry> {
            let all = scene.lab.entries().into_iter();
            all.filter(|entry| entry.line.contains("zone=7")).collect()
        };
        let lines = || {
            let mut lines: Vec<String> = others().into_iter().map(|entry| entry.line).collect();
            lines.sort();
            lines
        };
        let before = lines();
        assert_eq!(before.len(), LIMIT, "{before:?}");
        let daemon = scene.lab.daemon(PROGRAM, &[]);
        daemon.stop();
        match harm {
            Harm::StaleRst => scene.conns.iter().for_each(|conn| conn.stale_rst()),
            Harm::Deletion => scene.lab.server.run("conntrack -D -w 0 -p tcp"),
        }
        assert_eq!(lines(), before, "the harm is done to the others only");
        daemon.cont();
        wait_for("repair", SOON, || {
            let log = daemon.log();
            log.matches("revive").count() + log.matches("reinsert").count() >= LIMIT
        });
        assert_eq!(lines(), before, "{harm:?}");
        assert!(others().iter().all(|entry| entry.timeout > 400), "{harm:?}: {:?}", others());
    }
}

/// A port that is reached directly and by a translation: each forgotten entry is put back as it
/// was, and counts.
#[test]
fn two_ways_to_one_port_are_told_apart() {
    let play = |guarded: bool| {
        let lab = Lab::new()?;
        lab.server.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0");
        let redirect = "-A PREROUTING -p tcp --dport 80 -j REDIRECT --to-ports 8080";
        lab.server.run(&format!("iptables -t nat {redirect}"));
        lab.connlimit(8080, 3);
        let _server = lab.serve("0.0.0.0:8080");
        let peers = [("198.51.100.7", 8080), ("198.51.100.8", 80)]
            .map(|(source, port)| (lab.peer(source), port));
        let held: Vec<_> = peers.iter().flat_map(|(it, port)| it.hold(*port, LIMIT)).collect();
        // Its first deep sweep sees how each of them came in.
        let daemon = guarded.then(|| {
            lab.daemon(
                PROGRAM,
                &["--port", "8080", "--sweep-interval", "200ms", "--deep-interval", "1s"],
            )
        });
        // For a tick or two of its clock the kernel counts what it cannot find any more.
        thread::sleep(Duration::from_millis(50));
        lab.server.run("conntrack -F");
        if let Some(daemon) = &daemon {
            wait_for("entries", Duration::from_secs(30), || {
                daemon.log().matches("reinsert").count() >= 2 * LIMIT
            });
        }
        let admitted: Vec<_> = peers.iter().map(|(it, port)| it.admitted(*port, TRIES)).collect();
        Some((admitted, held.iter().filter(|conn| lab.is_alive(conn)).count()))
    };
    let Some((without, _)) = play(false) else { return };
    assert_eq!(without, [LIMIT, LIMIT], "the stock kernel counts what it has forgotten");
    assert_eq!(play(true), Some((vec![0, 0], 2 * LIMIT)));
}

/// The address of a transparent proxy's socket is no address of this host: the way to its client is
/// found all the same, and the limit counts again.
#[test]
fn a_source_that_is_not_ours_does_not_hide_the_way() {
    let play = |guarded: bool| {
        let lab = Lab::new()?;
        let proxy = "-j TPROXY --on-port 50080 --tproxy-mark 1";
        for line in [
            "ip rule add fwmark 1 lookup 100",
            "ip route add local 0.0.0.0/0 dev lo table 100",
            &format!("iptables -t mangle -A PREROUTING -p tcp -d 192.0.2.77 --dport 80 {proxy}"),
        ] {
            lab.server.run(line);
        }
        lab.connlimit(80, 3);
        let _server = lab.serve("0.0.0.0:50080%transparent");
        lab.client.run("ip neigh add 192.0.2.77 lladdr 02:00:00:00:00:01 dev eth0");
        let peer = lab.peer_to("198.51.100.7", "192.0.2.77");
        let mut conns = peer.hold(80, LIMIT);
        conns.iter_mut().for_each(RawConn::fin);
        assert!(conns.iter_mut().all(RawConn::await_ack), "no ACK of a FIN");
        let daemon = guarded.then(|| lab.daemon(PROGRAM, PROXYS));
        daemon.iter().for_each(lab::Daemon::stop);
        conns.iter().for_each(|conn| conn.stale_rst());
        // The tuples are off the limit's list.
        let others = peer.hold(80, LIMIT);
        // It keeps what it has just added for two ticks of the kernel's clock.
        std::thread::sleep(Duration::from_millis(30));
        others.iter().for_each(|conn| conn.rst(0));
        if let Some(daemon) = &daemon {
            daemon.cont();
            wait_for("repair", SOON, || daemon.log().matches("revive").count() >= LIMIT);
        }
        Some(peer.admitted(80, TRIES))
    };
    let Some(without) = play(false) else { return };
    assert_eq!((without, play(true)), (LIMIT, Some(0)));
}
