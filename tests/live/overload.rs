//! Overload sets: sources that hold too many *sockets* are in an nftables set, for rules of the
//! administrator, and nobody else is.

use crate::lab;
use std::fs;
use std::process::{Command, Stdio};
use std::time::Duration;

use crate::lab::{Lab, Peer, RawConn, wait_for};
use crate::scene::{CTKEEP, SOON};
use nix::sys::signal::Signal;

const CLIENT: &str = "198.51.100.7";
const HONEST: &str = "198.51.100.8";
const EXEMPT: &str = "203.0.113.9";

/// The rule that an administrator adds to the table that ctkeep has made.
const RULE: &str = "table inet ctkeep {
    chain input {
        type filter hook input priority 0;
        ip saddr @over4 tcp flags & (syn | ack) == syn drop
        ip6 saddr @over6 tcp flags & (syn | ack) == syn drop
    }
}";

fn elements(lab: &Lab, set: &str) -> String {
    lab.server.output(&format!("nft list set {set}"))
}

fn is_in(lab: &Lab, set: &str, source: &str) -> bool {
    elements(lab, set).split([' ', ',', '\t', '\n', '=']).any(|word| word == source)
}

fn hold(peer: &Peer, count: usize) -> Vec<RawConn> {
    peer.hold(80, count)
}

/// pf's `max-src-conn 10, overload <t>`, counted by what is ESTABLISHED on the server: states of
/// connections that end do not count, as they do there.
#[test]
fn who_holds_more_sockets_than_is_wanted_is_in_the_set_until_they_are_gone() {
    let Some(lab) = Lab::new() else { return };
    let mut server = lab.serve("[::]:80");
    let file = tempfile::NamedTempFile::new().expect("a file");
    let settings = |above: u32| {
        let text = format!(
            "exempt = [\"{EXEMPT}/32\"]\nsweep-interval = \"200ms\"\n[[overload]]\n\
             ports = [80]\nabove = {above}\nstates = [\"established\"]\nfor = \"2s\"\n"
        );
        fs::write(file.path(), text).expect("a written file");
    };
    settings(10);
    let path = file.path().to_str().expect("a path");
    let daemon = lab.daemon(CTKEEP, &["--config", path]);
    wait_for("the sets", SOON, || lab.server.try_run("nft list set inet ctkeep over6").is_ok());
    lab.server.feed("nft -f -", RULE);

    let [client, honest, exempt, v6] =
        [CLIENT, HONEST, EXEMPT, "2001:db8:1::7"].map(|source| lab.peer(source));
    // Ten that the server has closed and whose clients have not: states, no connections.
    let ended = hold(&client, 10);
    wait_for("the server has them", SOON, || server.held() == 10);
    server.close_all();
    let mut conns = hold(&client, 10);
    let others = [hold(&honest, 9), hold(&exempt, 12)];
    assert!(lab.sockets("fin-wait-2") + lab.sockets("fin-wait-1") >= 10);
    assert!(!is_in(&lab, "inet ctkeep over4", CLIENT), "ten of ten");
    conns.extend(hold(&client, 1));
    let v6_conns = hold(&v6, 11);
    wait_for("eleven of ten", SOON, || is_in(&lab, "inet ctkeep over4", CLIENT));
    wait_for("IPv6", SOON, || is_in(&lab, "inet ctkeep over6", "2001:db8:1::7"));
    assert!(client.connect(80).is_none(), "the rule sees the set");
    assert!(honest.connect(80).is_some(), "the honest client");
    for source in [HONEST, EXEMPT] {
        assert!(!is_in(&lab, "inet ctkeep over4", source), "{source}");
    }
    let log = daemon.log();
    let line = log.lines().find(|line| line.contains("overload source=198.51.100.7")).expect("one");
    for field in ["port=80", "open=11", "above=10", "set=\"over4\""] {
        assert!(line.contains(field), "{line}");
    }

    // It stays as long as it is over, and the time begins anew.
    std::thread::sleep(Duration::from_millis(2_500));
    assert!(is_in(&lab, "inet ctkeep over4", CLIENT), "still over");
    // What is saved loads again, elements and all.
    let saved = lab.server.output("nft list table inet ctkeep");
    lab.client.feed("nft -f -", &saved);
    assert!(lab.client.output("nft list set inet ctkeep over4").contains(CLIENT), "{saved}");
    server.reset_all();
    wait_for("time is over", SOON, || !is_in(&lab, "inet ctkeep over4", CLIENT));
    assert!(client.connect(80).is_some());
    wait_for("said", SOON, || daemon.logged("a source is over no more"));
    assert_eq!(daemon.log().matches("overload source=198.51.100.7").count(), 1);

    // A reload takes another number up at once.
    settings(2);
    daemon.signal(Signal::SIGHUP);
    wait_for("reload", SOON, || daemon.logged("configuration reloaded"));
    let more = hold(&honest, 3);
    wait_for("thirteen of two", SOON, || is_in(&lab, "inet ctkeep over4", HONEST));
    fs::write(file.path(), "sweep-interval = \"200ms\"\n").expect("a written file");
    daemon.signal(Signal::SIGHUP);
    wait_for("out with it", SOON, || !is_in(&lab, "inet ctkeep over4", HONEST));
    drop((ended, others, v6_conns, more));
}

/// Sets of the administrator's own: networks in one with intervals, addresses in one without
/// timeouts, out of which ctkeep takes them itself; a half-close is told by an event.
#[test]
fn sets_of_the_administrator_are_filled_as_they_are() {
    let Some(lab) = Lab::new() else { return };
    let mut server = lab.serve("[::]:80");
    lab.server.feed(
        "nft -f -",
        "table inet filter {
            set nets { type ipv4_addr; flags interval, timeout; }
            set bad6 { type ipv6_addr; }
        }",
    );
    let daemon = lab.daemon(
        CTKEEP,
        &[
            "--sweep-interval",
            "200ms",
            "--overload",
            "above=2 mask=24 states=close-wait for=1s set=inet filter nets,inet filter bad6",
        ],
    );
    let [one, two, v6] =
        ["198.51.100.7", "198.51.100.200", "2001:db8:1::7"].map(|source| lab.peer(source));
    let held = [hold(&one, 2), hold(&two, 1), hold(&v6, 3)];
    let mut conns: Vec<_> = held.into_iter().flatten().collect();
    conns.iter_mut().for_each(|conn| lab.half_close(conn));
    wait_for("a network", SOON, || is_in(&lab, "inet filter nets", "198.51.100.0/24"));
    wait_for("an address", SOON, || is_in(&lab, "inet filter bad6", "2001:db8:1::7"));
    assert!(daemon.logged("overload source=198.51.100.0/24"), "{}", daemon.log());
    server.close_all();
    wait_for("the network is out", SOON, || !is_in(&lab, "inet filter nets", "198.51.100.0/24"));
    wait_for("the address is out", SOON, || !is_in(&lab, "inet filter bad6", "2001:db8:1::7"));
}

/// What the daemon has logged in one of its forms: sources of both families, and their end.
fn logged(form: &str) -> String {
    let lab = Lab::new().expect("a lab");
    let mut server = lab.serve("[::]:80");
    let log = tempfile::NamedTempFile::new().expect("a file");
    let mut command = Command::new(CTKEEP);
    command.args(["run", "--sweep-interval", "200ms", "--overload", "above=2 for=1s"]);
    command.args(["--log-format", form]);
    let spawned = lab.server.spawn_with(&command, |command| {
        command.stdin(Stdio::null()).stderr(log.reopen().expect("the file"));
    });
    let mut daemon = spawned.expect("a daemon");
    let read = || fs::read_to_string(log.path()).expect("a log");
    let conns = [CLIENT, "2001:db8:1::7"].map(|source| hold(&lab.peer(source), 3));
    wait_for("both", SOON, || ["over4", "over6"].iter().all(|set| read().contains(set)));
    server.reset_all();
    wait_for("their end", SOON, || read().matches("over no more").count() == 2);
    drop(conns);
    daemon.kill().and_then(|()| daemon.wait()).expect("its end");
    read()
}

/// fail2ban and CrowdSec themselves, Debian's, unpacked in the folder that `CTKEEP_BANS` names.
#[test]
#[ignore = "wants fail2ban and CrowdSec: make ban-test"]
fn the_real_fail2ban_and_crowdsec_ban_by_the_log_line() {
    if !lab::require() {
        return;
    }
    let root = std::env::var("CTKEEP_BANS").expect("CTKEEP_BANS");
    let packaging = concat!(env!("CARGO_MANIFEST_DIR"), "/packaging");
    let host = lab::Namespace::new().expect("a namespace");
    host.run("ip link set lo up");
    for form in ["text", "json", "journald"] {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().display();
        let text = logged(form);
        fs::write(folder.path().join("log"), &text).expect("a file");
        let found = host.output(&format!(
            "env PYTHONPATH={root}/usr/lib/python3/dist-packages /usr/bin/python3 \
             {root}/usr/bin/fail2ban-regex -o ip {path}/log {packaging}/fail2ban/ctkeep-overload.conf"
        ));
        let mut found: Vec<_> = found.lines().collect();
        found.sort_unstable();
        assert_eq!(found, [CLIENT, "2001:db8:1::7"], "{form}: {text}");

        // As syslog has it, which CrowdSec's own parser reads first.
        let lines = text.lines().map(|line| {
            // journald takes the priority off.
            let line =
                line.split_once('>').filter(|_| line.starts_with('<')).map_or(line, |it| it.1);
            format!("Nov 29 15:41:37 web ctkeep[7]: {line}\n")
        });
        fs::write(folder.path().join("syslog"), lines.collect::<String>()).expect("a file");
        let script = format!(
            "set -e; cd {path}; mkdir -p data hub parsers/s00-raw parsers/s01-parse scenarios notifications plugins
             cp -r {root}/etc/crowdsec/patterns {root}/etc/crowdsec/*.yaml .
             cp {root}/usr/share/crowdsec/hub/.index.json hub
             cp {root}/usr/share/crowdsec/hub/parsers/s00-raw/crowdsecurity/syslog-logs.yaml parsers/s00-raw
             cp {packaging}/crowdsec/ctkeep-overload-parser.yaml parsers/s01-parse
             cp {packaging}/crowdsec/ctkeep-overload-scenario.yaml scenarios
             sed -i 's,/var/lib/crowdsec,{path},; s,/etc/crowdsec/,{path}/,; s,/usr/lib/crowdsec,{path},
                 s,media: file,media: stdout,; s,: true,: false,; /online_client/d; /online_api/d' config.yaml
             touch console.yaml local_api_credentials.yaml
             {root}/usr/bin/cscli -c config.yaml machines add here -p secret --force -f local_api_credentials.yaml
             {root}/usr/bin/crowdsec -c config.yaml -no-capi -dsn file://{path}/syslog -type syslog 2>&1"
        );
        let said = host.feed("sh", &script);
        for source in [CLIENT, "2001:db8:1::7"] {
            let ban = format!("ctkeep/overload by ip {source} : 4h ban on Ip {source}");
            assert_eq!(said.matches(&ban).count(), 1, "{form}: {said}");
        }
        assert_eq!(said.matches("ctkeep/overload by ip").count(), 2, "{form}: {said}");
    }
}
