//! Pods behind one address, by the rules that kube-proxy, the portmap plugin and Calico make: each
//! connection keeps its own pod, whatever is done for it.

use crate::lab::guests;
use std::collections::HashSet;
use std::net::SocketAddr;
use std::time::Duration;

use crate::lab::guests::{Guest, INSIDE, LIMIT};
use crate::lab::rules::restore;
use crate::lab::{Lab, Peer, RawConn, wait_for};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const SOON: Duration = Duration::from_secs(15);
const NODE: &str = "192.0.2.1";
const SERVICE: &str = "10.96.0.10";
const NODE_PORT: u16 = 30080;

/// How a node leads clients to pods.
struct Site {
    /// For `iptables-restore`, beside the limit.
    rules: String,
    /// For `nft -f -`.
    nft: String,
    asked: (&'static str, u16),
    pods: u16,
}

struct Scene {
    lab: Lab,
    pods: Vec<Guest>,
    site: Site,
}

impl Scene {
    fn new(site: Site) -> Option<Self> {
        let lab = Lab::new()?;
        guests::limit(&lab);
        lab.server.sysctl("net/netfilter/nf_conntrack_tcp_loose", "0");
        lab.client.run("ip route add 10.96.0.0/12 via 192.0.2.1");
        let pods: Vec<_> = (1..=site.pods).map(|number| Guest::start_again(&lab, number)).collect();
        for pod in &pods {
            pod.namespace.feed(
                "nft -f -",
                "table ip seen {\ncounter syns { }\nchain incoming {\n\
                 type filter hook prerouting priority -300;\n\
                 tcp flags & (syn | ack) == syn counter name syns\n}\n}\n",
            );
        }
        if !site.rules.is_empty() {
            lab.server.feed("iptables-restore --noflush", &site.rules);
        }
        if !site.nft.is_empty() {
            lab.server.feed("nft -f -", &site.nft);
        }
        Some(Self { lab, pods, site })
    }

    fn peer(&self, source: &str) -> Peer {
        self.lab.peer_to(source, self.site.asked.0)
    }

    fn gain(&self, source: &str, with_ctkeep: bool) -> usize {
        guests::gain(&self.lab, &self.peer(source), self.site.asked.1, with_ctkeep)
    }

    /// The pod of each connection, by its entry; `None` where no limit counts it.
    fn pods_of(&self, conns: &[RawConn]) -> Vec<Option<SocketAddr>> {
        let all = self.lab.entries();
        let of = |conn: &RawConn| {
            let entry = all.iter().find(|entry| entry.orig == (conn.client, conn.server))?;
            (entry.state != "CLOSE").then_some(entry.reply.0)
        };
        conns.iter().map(of).collect()
    }

    /// SYNs that each pod has seen.
    fn syns(&self) -> Vec<String> {
        let counter = "nft list counter ip seen syns";
        self.pods.iter().map(|pod| pod.namespace.output(counter)).collect()
    }

    /// Two ways to lose entries, with connections at every pod: each gets back to its own, and no
    /// pod sees a packet of it.
    fn assert_each_keeps_its_pod(&mut self, log: impl Fn() -> String) {
        let (mut peers, mut conns) = (Vec::new(), Vec::new());
        for number in 20..60 {
            let peer = self.peer(&format!("198.51.100.{number}"));
            conns.extend(guests::half_closed(&peer, self.site.asked.1));
            peers.push(peer);
            let used: HashSet<_> = self.pods_of(&conns).into_iter().collect();
            if used.len() == self.pods.len() && peers.len() > 2 {
                break;
            }
        }
        let (before, syns) = (self.pods_of(&conns), self.syns());
        assert!(before.iter().all(Option::is_some), "{before:?}");
        let is_back = |scene: &Self, conns: &[RawConn]| {
            wait_for("repairs", SOON, || scene.pods_of(conns).iter().all(Option::is_some));
            assert_eq!(scene.pods_of(conns), before, "{}", log());
        };
        conns.iter().for_each(RawConn::stale_rst);
        is_back(self, &conns);
        self.lab.server.run("conntrack -D -p tcp");
        is_back(self, &conns);
        assert_eq!(self.syns(), syns, "SYNs that pods have seen: {}", log());
        for pod in &mut self.pods {
            pod.server.send_all(b"still here");
        }
        wait_for("data of the servers", SOON, || {
            conns.iter_mut().all(|conn| conn.received() == b"still here".len())
        });
        for peer in &peers {
            assert_eq!(peer.admitted(self.site.asked.1, 2), 0, "{}", log());
        }
    }
}

fn guards(site: Site) {
    let Some(mut scene) = Scene::new(site) else { return };
    assert_eq!(scene.gain("198.51.100.7", false), LIMIT, "the control");
    let daemon = scene.lab.daemon(CTKEEP, &[]);
    assert_eq!(scene.gain("198.51.100.8", true), 0, "{}", daemon.log());
    scene.assert_each_keeps_its_pod(|| daemon.log());
    let (status, log) = daemon.term();
    assert!(status.success() && !log.contains("ERROR"), "{log}");
}

/// kube-proxy in the mode iptables: a node port and a cluster address of two pods.
fn by_iptables(masquerades: bool, affinity: bool, asked: (&'static str, u16), pods: u16) -> Site {
    let sep = |number: u16| format!("KUBE-SEP-{number}");
    let mut rules = vec![
        "PREROUTING -j KUBE-SERVICES".to_owned(),
        "POSTROUTING -j KUBE-POSTROUTING".to_owned(),
        format!("KUBE-SERVICES -d {SERVICE}/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-WEB"),
        "KUBE-SERVICES -m addrtype --dst-type LOCAL -j KUBE-NODEPORTS".to_owned(),
        format!("KUBE-NODEPORTS -p tcp -m tcp --dport {NODE_PORT} -j KUBE-EXT-WEB"),
    ];
    // externalTrafficPolicy: Cluster
    rules.extend(masquerades.then(|| "KUBE-EXT-WEB -j KUBE-MARK-MASQ".to_owned()));
    rules.extend([
        "KUBE-EXT-WEB -j KUBE-SVC-WEB".to_owned(),
        "KUBE-MARK-MASQ -j MARK --set-xmark 0x4000/0x4000".to_owned(),
        "KUBE-POSTROUTING -m mark ! --mark 0x4000/0x4000 -j RETURN".to_owned(),
        "KUBE-POSTROUTING -j MARK --set-xmark 0x4000/0x0".to_owned(),
        "KUBE-POSTROUTING -j MASQUERADE --random-fully".to_owned(),
    ]);
    if affinity {
        rules.extend((1..=pods).map(|number| {
            format!(
                "KUBE-SVC-WEB -m recent --name {0} --rcheck --seconds 10800 --reap --rsource -j {0}",
                sep(number)
            )
        }));
    }
    for number in 1..=pods {
        let left = pods - number + 1;
        let chance = match left {
            1 => String::new(),
            _ => format!("-m statistic --mode random --probability {} ", 1.0 / f64::from(left)),
        };
        rules.push(format!("KUBE-SVC-WEB {chance}-j {}", sep(number)));
        let pod = format!("10.1.{number}.2");
        rules.push(format!("{} -s {pod}/32 -j KUBE-MARK-MASQ", sep(number)));
        let remember = if affinity {
            format!("-m recent --name {} --set --rsource ", sep(number))
        } else {
            String::new()
        };
        rules.push(format!(
            "{} -p tcp {remember}-m tcp -j DNAT --to-destination {pod}:{INSIDE}",
            sep(number)
        ));
    }
    let chains: Vec<_> = (1..=pods).map(sep).collect();
    let own =
        "KUBE-SERVICES KUBE-NODEPORTS KUBE-EXT-WEB KUBE-SVC-WEB KUBE-MARK-MASQ KUBE-POSTROUTING";
    let rules: Vec<&str> = rules.iter().map(String::as_str).collect();
    let built_in = "PREROUTING INPUT OUTPUT POSTROUTING";
    Site {
        rules: custom("nat", built_in, &format!("{own} {}", chains.join(" ")), &rules),
        nft: String::new(),
        asked,
        pods,
    }
}

/// Like [`restore`], with chains of one's own.
fn custom(table: &str, built_in: &str, own: &str, rules: &[&str]) -> String {
    let text = restore(table, built_in, rules);
    let own: String = own.split_whitespace().map(|chain| format!(":{chain} - [0:0]\n")).collect();
    let (head, rest) = text.split_once("-A ").expect("a rule");
    format!("{head}{own}-A {rest}")
}

/// kube-proxy in the mode nftables.
fn by_nftables(masquerades: bool, affinity: bool, asked: (&'static str, u16)) -> Site {
    let mark = if masquerades { "jump mark-for-masquerade\n" } else { "" };
    let (sticky, remember) = if affinity {
        ("ip saddr @affinity-1 goto endpoint-1\nip saddr @affinity-2 goto endpoint-2\n", true)
    } else {
        ("", false)
    };
    let endpoint = |number: u16| {
        let update = if remember {
            format!("update @affinity-{number} {{ ip saddr }}\n")
        } else {
            String::new()
        };
        format!(
            "chain endpoint-{number} {{\nip saddr 10.1.{number}.2 jump mark-for-masquerade\n\
             {update}meta l4proto tcp dnat to 10.1.{number}.2:{INSIDE}\n}}\n"
        )
    };
    let affinity = |number: u16| {
        format!(
            "set affinity-{number} {{\ntype ipv4_addr; flags dynamic,timeout; timeout 3h;\n}}\n"
        )
    };
    let nft = format!(
        "table ip kube-proxy {{\n{}{}\
         map no-endpoint-services {{\ntype ipv4_addr . inet_proto . inet_service : verdict\n}}\n\
         chain mark-for-masquerade {{\nmark set mark or 0x4000\n}}\n{}{}\
         chain service-web {{\n{sticky}numgen random mod 2 vmap {{ 0 : goto endpoint-1, 1 : goto endpoint-2 }}\n}}\n\
         chain external-web {{\n{mark}goto service-web\n}}\n\
         map service-ips {{\ntype ipv4_addr . inet_proto . inet_service : verdict\n\
         elements = {{ {SERVICE} . tcp . 80 : goto service-web }}\n}}\n\
         map service-nodeports {{\ntype inet_proto . inet_service : verdict\n\
         elements = {{ tcp . {NODE_PORT} : goto external-web }}\n}}\n\
         chain services {{\nip daddr . meta l4proto . th dport vmap @service-ips\n\
         ip daddr {NODE} meta l4proto . th dport vmap @service-nodeports\n}}\n\
         chain nat-prerouting {{\ntype nat hook prerouting priority dstnat;\njump services\n}}\n\
         chain nat-postrouting {{\ntype nat hook postrouting priority srcnat;\n\
         mark and 0x4000 == 0 return\nmark set mark xor 0x4000\nmasquerade fully-random\n}}\n\
         chain filter-forward {{\ntype filter hook forward priority filter - 110;\n\
         ct state new ip daddr . meta l4proto . th dport vmap @no-endpoint-services\n}}\n}}\n",
        affinity(1),
        affinity(2),
        endpoint(1),
        endpoint(2)
    );
    Site { rules: String::new(), nft, asked, pods: 2 }
}

#[test]
fn a_node_port_of_iptables_for_local_endpoints() {
    guards(by_iptables(false, false, (NODE, NODE_PORT), 2));
}

#[test]
fn a_node_port_of_iptables_for_the_cluster_masquerades() {
    guards(by_iptables(true, false, (NODE, NODE_PORT), 3));
}

#[test]
fn a_cluster_address_of_iptables_with_session_affinity() {
    guards(by_iptables(false, true, (SERVICE, 80), 2));
}

#[test]
fn a_node_port_of_nftables_for_local_endpoints_with_session_affinity() {
    guards(by_nftables(false, true, (NODE, NODE_PORT)));
}

#[test]
fn a_node_port_of_nftables_for_the_cluster_masquerades() {
    guards(by_nftables(true, false, (NODE, NODE_PORT)));
}

#[test]
fn a_cluster_address_of_nftables() {
    guards(by_nftables(false, false, (SERVICE, 80)));
}

/// The portmap plugin's rules for a host port.
#[test]
fn a_host_port_of_one_pod() {
    let rules = custom(
        "nat",
        "PREROUTING INPUT OUTPUT POSTROUTING",
        "CNI-HOSTPORT-DNAT CNI-DN-1 CNI-HOSTPORT-SETMARK CNI-HOSTPORT-MASQ",
        &[
            "PREROUTING -m addrtype --dst-type LOCAL -j CNI-HOSTPORT-DNAT",
            "POSTROUTING -j CNI-HOSTPORT-MASQ",
            "CNI-HOSTPORT-DNAT -p tcp -m multiport --dports 8080,8443 -j CNI-DN-1",
            "CNI-DN-1 -s 10.1.1.0/24 -p tcp -m tcp --dport 8080 -j CNI-HOSTPORT-SETMARK",
            "CNI-DN-1 -p tcp -m tcp --dport 8080 -j DNAT --to-destination 10.1.1.2:8080",
            "CNI-HOSTPORT-SETMARK -j MARK --set-xmark 0x2000/0x2000",
            "CNI-HOSTPORT-MASQ -m mark --mark 0x2000/0x2000 -j MASQUERADE",
        ],
    );
    guards(Site { rules, nft: String::new(), asked: (NODE, 8080), pods: 1 });
}

/// Calico's marks, with a zone of their own for the pods, as other plugins give them.
#[test]
fn marks_and_zones_of_a_network_plugin() {
    let mut site = by_iptables(false, false, (NODE, NODE_PORT), 2);
    site.rules += &restore(
        "raw",
        "PREROUTING OUTPUT",
        &[
            "PREROUTING -i eth0 -j CT --zone 7",
            "PREROUTING -i guest1 -j CT --zone 7",
            "PREROUTING -i guest2 -j CT --zone 7",
        ],
    );
    site.rules += &restore(
        "mangle",
        "PREROUTING INPUT FORWARD OUTPUT POSTROUTING",
        &[
            "PREROUTING -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT",
            "PREROUTING -j MARK --set-xmark 0x10000/0x10000",
            "FORWARD -m mark --mark 0x10000/0x10000 -j CONNMARK --save-mark --mask 0xffff0000",
        ],
    );
    guards(site);
}

/// The same port is served on the host, untranslated: that says nothing of a pod's connection which
/// was forgotten before anybody looked. An untranslated entry would take its answers' place.
#[test]
fn what_was_lost_before_it_was_seen_gets_no_entry_by_the_hosts_own() {
    let Some(mut scene) = Scene::new(by_iptables(false, false, (NODE, NODE_PORT), 1)) else {
        return;
    };
    let _own = scene.lab.serve(&format!("{NODE}:{INSIDE}"));
    let seen = scene.lab.peer("198.51.100.9").hold(INSIDE, 1);
    let daemon = scene.lab.daemon(CTKEEP, &[]);
    let peer = scene.peer("198.51.100.7");
    let lost = peer.hold(NODE_PORT, 1);
    let client = lost[0].client;
    scene.lab.server.run(&format!(
        "conntrack -D -p tcp -s {} --sport {}",
        client.ip(),
        client.port()
    ));
    if let [pod, ..] = scene.pods.as_mut_slice() {
        pod.server.shutdown_all();
    }
    std::thread::sleep(Duration::from_secs(3));
    let entries = scene.lab.entries();
    assert!(entries.iter().all(|entry| entry.orig.0 != client), "{entries:?}: {}", daemon.log());
    assert!(scene.lab.is_alive(&seen[0]));
}

/// The pod sees the node in each client's place, the limit in FORWARD the client itself.
#[test]
fn clients_behind_a_masquerade_are_reported_and_measured_by_their_own_addresses() {
    let Some(scene) = Scene::new(by_iptables(true, false, (NODE, NODE_PORT), 1)) else { return };
    let held: Vec<_> = ["198.51.100.7", "198.51.100.8"]
        .iter()
        .flat_map(|source| scene.peer(source).hold(NODE_PORT, 2))
        .collect();
    let (code, out, err) = scene.lab.ctkeep(CTKEEP, &["audit", "--all", "--format", "json"]);
    let report: serde_json::Value = serde_json::from_str(&out).expect("a report");
    assert_eq!(code, 0, "{report:#}{err}");
    let list = |key: &str| report[key].as_array().expect("a list").clone();
    let mut sources: Vec<_> =
        list("sources").iter().map(|it| (it["source"].to_string(), it["held"].clone())).collect();
    sources.sort_by(|one, other| one.0.cmp(&other.0));
    let two = serde_json::json!(2);
    let wanted =
        ["\"198.51.100.7/32\"", "\"198.51.100.8/32\""].map(|it| (it.to_owned(), two.clone()));
    assert_eq!(sources, wanted);
    let clients: HashSet<_> =
        list("connections").iter().map(|it| it["client"].to_string()).collect();
    assert!(
        held.iter().all(|conn| clients.contains(&format!("\"{}\"", conn.client))),
        "{report:#}"
    );
    let (_, out, err) = scene.lab.ctkeep(CTKEEP, &["audit", "--all"]);
    assert!(!out.contains("come from"), "{out}{err}");
    assert!(out.contains(&format!("{} as 10.1.1.1:", held[0].client)), "{out}{err}");
    let (one, other) = (held[0].server.to_string(), held[0].client.to_string());
    let (code, out, err) = scene.lab.ctkeep(CTKEEP, &["explain", &one, &other]);
    assert!(
        out.contains("198.51.100.7/32 holds 2 sockets, 2 have an entry that counts"),
        "{code} {out}{err}"
    );
}

/// The socket of the pod does not show whose it is, and nobody wants the node in a set of offenders.
#[test]
fn a_node_that_masquerades_is_no_overload() {
    let Some(scene) = Scene::new(by_iptables(true, false, (NODE, NODE_PORT), 1)) else { return };
    scene.lab.client.run("ip route add 10.1.0.0/16 via 192.0.2.1");
    let args = ["--overload", "above=2 for=5s", "--sweep-interval", "200ms"];
    let daemon = scene.lab.daemon(CTKEEP, &args);
    let masqueraded = ["198.51.100.7", "198.51.100.8"].map(|it| scene.peer(it).hold(NODE_PORT, 2));
    let direct = scene.lab.peer_to("198.51.100.9", "10.1.1.2").hold(INSIDE, 3);
    wait_for("an overload", SOON, || daemon.logged("overload source=198.51.100.9"));
    assert!(!daemon.logged("overload source=10.1.1.1"), "{}", daemon.log());
    drop((masqueraded, direct));
}

/// The choice of a pod keeps no SYN from the limit; one that is dropped among rules that translate never comes to it.
#[test]
fn the_choice_of_a_pod_is_no_rate_before_the_limit() {
    let Some(scene) = Scene::new(by_iptables(false, false, (NODE, NODE_PORT), 2)) else { return };
    let seen = |id: &str| -> Vec<String> {
        let (_, out, err) = scene.lab.ctkeep(CTKEEP, &["doctor", "--format", "json"]);
        let report: serde_json::Value =
            serde_json::from_str(&out).unwrap_or_else(|error| panic!("{error}: {out}{err}"));
        let all = report["findings"].as_array().expect("a list");
        all.iter().filter(|it| it["id"] == id).map(|it| it.to_string()).collect()
    };
    // Each of them comes to the limit, whichever pod is chosen.
    scene.lab.server.feed(
        "iptables-restore",
        &restore(
            "filter",
            "FORWARD",
            &[
                "FORWARD -p tcp --syn -m conntrack --ctorigdstport 30080",
                &format!(
                    "FORWARD -p tcp --syn -m conntrack --ctorigdstport 30080 -m connlimit \
                     --connlimit-above {LIMIT} --connlimit-mask 32 -j DROP"
                ),
            ],
        ),
    );
    let held: Vec<_> = ["198.51.100.7", "198.51.100.8", "198.51.100.9", "198.51.100.10"]
        .iter()
        .flat_map(|source| scene.peer(source).hold(NODE_PORT, LIMIT))
        .collect();
    let counted = scene.lab.server.output("iptables -nvxL FORWARD 1");
    let syns = counted.split_whitespace().next().map(str::to_owned);
    assert_eq!((held.len(), syns), (4 * LIMIT, Some((4 * LIMIT).to_string())), "{counted}");
    assert_eq!(scene.peer("198.51.100.7").admitted(NODE_PORT, 2), 0, "the truth: the limit holds");
    assert_eq!(seen("rule-sees-nudges"), [""; 0]);
    scene.lab.server.feed(
        "nft -f -",
        "table ip other {\nchain c {\ntype nat hook prerouting priority -110;\n\
         meta l4proto tcp limit rate over 1/hour burst 1 packets drop\n}\n}\n",
    );
    assert_eq!(scene.peer("198.51.100.20").admitted(NODE_PORT, 2), 1, "the truth: a rate");
    let said = seen("rule-sees-nudges");
    assert!(said.len() == 1 && said[0].contains("ip other c rule 1 (limit)"), "{said:?}");
    assert!(said[0].contains("\"warn\"") && said[0].contains("put that behind ip"), "{said:?}");
}
