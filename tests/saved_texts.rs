//! Texts as people send them: what `ctkeep audit --sockets FILE --conntrack FILE` makes of them.
//!
//! The files of tests/texts are in the form of reports from the field, with addresses of the
//! documentation ranges. The server is 192.0.2.1, its port 8080.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::indexing_slicing)]

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;

/// What a run said.
struct Said {
    code: i32,
    out: String,
    err: String,
}

impl Said {
    fn report(&self) -> Value {
        serde_json::from_str(&self.out)
            .unwrap_or_else(|error| panic!("{error}: {}{}", self.out, self.err))
    }

    /// Classes that are not empty.
    fn classes(&self) -> BTreeMap<String, u64> {
        let report = self.report();
        let classes = report["summary"]["classes"].as_object().expect("classes").clone();
        let counts = classes.into_iter().map(|(class, n)| (class, n.as_u64().expect("a count")));
        counts.filter(|(_, count)| *count > 0).collect()
    }
}

fn file(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/texts").join(name)
}

fn audit(sockets: &Path, entries: &Path, args: &[&str]) -> Said {
    let output = Command::new(env!("CARGO_BIN_EXE_ctkeep"))
        .arg("audit")
        .arg("--sockets")
        .arg(sockets)
        .arg("--conntrack")
        .arg(entries)
        .args(args)
        .output()
        .expect("ctkeep");
    let text = |bytes| String::from_utf8(bytes).expect("UTF-8");
    Said {
        code: output.status.code().expect("an exit code"),
        out: text(output.stdout),
        err: text(output.stderr),
    }
}

/// As JSON, agreeing connections too.
fn of(sockets: &str, entries: &str, args: &[&str]) -> Said {
    audit(&file(sockets), &file(entries), &[&["--format=json", "--all"], args].concat())
}

/// The same with a text of sockets that is made here.
fn of_text(sockets: impl AsRef<[u8]>, entries: &str) -> Said {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("sockets");
    std::fs::write(&path, sockets).expect("a file");
    audit(&path, &file(entries), &["--format=json", "--all"])
}

fn counts(expected: &[(&str, u64)]) -> BTreeMap<String, u64> {
    expected.iter().map(|(class, count)| ((*class).to_owned(), *count)).collect()
}

const PLAIN: [(&str, u64); 2] = [("agree", 2), ("entry-closed", 1)];

fn read(name: &str) -> String {
    std::fs::read_to_string(file(name)).expect(name)
}

#[test]
fn the_same_sockets_are_found_in_every_dress() {
    let plain = read("ss-plain.txt");
    let indented = plain.replace('\n', "\n    ");
    let dressed = [
        plain.clone(),
        read("ss-indented-markdown.txt"),
        format!("\u{feff}{plain}"),
        plain.replace('\n', "\r\n"),
        format!("We see this:\n\n```\n{plain}```\n\nThanks\n"),
        format!("root@web:~# ss -tan\n{plain}root@web:~#\n"),
        format!("> {}\n", plain.trim_end().replace('\n', "\n> ")),
        format!("    {indented}"),
        plain.replace("          198.51", "\n198.51"),
        plain.replace("ESTAB", "\u{1b}[1;32mESTAB\u{1b}[0m"),
        // Its last column is headed so by iproute2 6.1.
        plain.replace("Address:Port Process", "Address:PortProcess"),
    ];
    for text in dressed {
        let said = of_text(&text, "ct-plain.txt");
        assert_eq!((said.code, said.classes()), (1, counts(&PLAIN)), "{text}\n{}", said.err);
    }
    let utf16: Vec<u8> =
        format!("\u{feff}{plain}").encode_utf16().flat_map(u16::to_le_bytes).collect();
    assert_eq!(of_text(utf16, "ct-plain.txt").classes(), counts(&PLAIN));
    for name in ["netstat.txt", "ss-netid.txt"] {
        let said = of(name, "ct-plain.txt", &[]);
        assert_eq!((said.code, said.classes()), (1, counts(&PLAIN)), "{name}: {}", said.err);
    }
}

#[test]
fn netstat_tells_states_in_other_languages_and_processes() {
    let said = of("netstat-localised.txt", "ct-plain.txt", &[]);
    let report = said.report();
    assert_eq!(report["summary"]["sockets"]["established"], 1);
    assert_eq!(report["summary"]["sockets"]["listening"], 1);
    let report = of("netstat.txt", "ct-plain.txt", &[]).report();
    let connections = report["connections"].as_array().expect("connections");
    let named: Vec<_> = connections.iter().map(|it| (&it["pid"], &it["command"])).collect();
    let worker = (&Value::from(902), &Value::from("httpd: worker p"));
    assert_eq!((named[1], named[2]), (worker, (&Value::Null, &Value::Null)));
}

#[test]
fn a_file_that_cannot_be_read_is_never_an_all_clear() {
    let directory = tempfile::tempdir().expect("a directory");
    let empty = directory.path().join("empty");
    std::fs::write(&empty, "").expect("a file");
    let (plain, entries) = (file("ss-plain.txt"), file("ct-plain.txt"));
    let made = |name: &str, text: String| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).expect(name);
        path
    };
    let listening = made("listening", "$ ss -tulpn\n".to_owned() + &read("ss-listeners-only.txt"));
    let searched =
        read("ct-plain.txt").replace("tcp ", "log.txt:tcp ").replace("udp ", "log.txt:udp ");
    let searched = made("searched", searched);
    let joined = made("joined", read("ct-plain.txt").replace('\n', " "));
    let udp = read("ct-plain.txt").lines().filter(|line| line.starts_with("udp")).collect();
    let without_tcp = made("udp", udp);
    for (sockets, entries, said) in [
        (&empty, &entries, "--sockets: "),
        (&plain, &empty, "--conntrack: "),
        (&entries, &plain, "swapped"),
        (&entries, &entries, "ct-plain.txt:1: these are conntrack entries"),
        (&plain, &plain, "ss-plain.txt:2: these are sockets"),
        (&file("ss-names-of-services.txt"), &entries, ":2: '*:https' is no numeric address"),
        (&file("ss-state-filter.txt"), &entries, ":2: no State column"),
        (&listening, &entries, "listening sockets alone (-l)"),
        (&plain, &searched, ":1: no entry"),
        (&plain, &joined, ":1: several entries in one line"),
        (&plain, &without_tcp, "no TCP entry, but others"),
    ] {
        let run = audit(sockets, entries, &[]);
        assert_eq!((run.code, run.out.as_str()), (2, ""), "{said}: {}", run.err);
        assert!(run.err.contains(said) && run.err.lines().count() == 1, "{said}: {}", run.err);
    }
}

/// `netstat -c`, a log of `ss` every minute, the output of `watch`.
#[test]
fn of_a_text_of_several_looks_the_last_counts() {
    let plain = read("ss-plain.txt");
    let earlier = plain.clone() + "ESTAB 0 0 192.0.2.1:8080 203.0.113.9:5000\n";
    let said = of_text(earlier.clone() + &plain, "ct-plain.txt");
    assert_eq!(said.classes(), counts(&PLAIN), "{}", said.err);
    assert!(said.err.contains("of 9 lines: 5 of an earlier look"), "{}", said.err);
    // Both families, one after the other, are one look.
    let six = plain.lines().next().expect("a heading").to_owned()
        + "\nCLOSE-WAIT 1 0 [2001:db8::1]:8080 [2001:db8::7]:5000\n";
    let said = of_text(earlier + &six, "ct-plain.txt");
    assert_eq!(said.report()["summary"]["sockets"]["established"], 2, "{}", said.err);
    assert!(!said.err.contains("earlier"), "{}", said.err);
}

/// A log that was cut off, a filter, a line that cannot be read: what may stand there is no finding.
#[test]
fn what_may_stand_in_lines_that_are_not_there_is_left_out() {
    let (sockets, entries) = (read("ss-plain.txt"), read("ct-plain.txt"));
    let directory = tempfile::tempdir().expect("a directory");
    let made = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).expect(name);
        path
    };
    let last = entries.lines().rfind(|line| line.starts_with("tcp")).expect("an entry");
    let half = &last[..last.len() / 2];
    let without = entries.replace(&format!("{last}\n"), "");
    let orphan = last.replace("sport=41003", "sport=5000").replace("dport=41003", "dport=5000");
    let more = entries.clone() + &orphan + "\n";
    let six = "CLOSE-WAIT 1 0 [2001:db8::1]:8080 [2001:db8::7]:5000\n";
    for (sockets, entries, left_out, of_whole) in [
        (sockets.clone(), without.clone() + half, "1 sockets without an entry", "entry-missing"),
        (
            sockets.clone(),
            format!("# conntrack -L | grep CLOSE\n{without}"),
            "1 sockets without an entry",
            "entry-missing",
        ),
        (sockets.clone() + six, entries.clone(), "not one entry of ipv6", "entry-missing"),
        (
            sockets.clone() + "ESTAB 0 0 192.0.2.1:8080",
            more.clone(),
            "1 entries without a socket",
            "socket-missing",
        ),
        (sockets.clone(), more + &entries, "listed more than once: 1", "socket-missing"),
    ] {
        let paths = (made("sockets", &sockets), made("entries", &entries));
        let said = audit(&paths.0, &paths.1, &["--format=json"]);
        assert_eq!(said.classes().get(of_whole), None, "{left_out}: {}{}", said.out, said.err);
        assert!(said.err.contains(left_out), "{left_out}: {}", said.err);
    }
    // A whole text with the same gap is a finding.
    let said = audit(&made("sockets", &sockets), &made("entries", &without), &["--format=json"]);
    assert_eq!(said.classes().get("entry-missing"), Some(&1), "{}", said.err);
}

#[test]
fn the_state_that_a_filter_leaves_out_is_named_by_the_user() {
    let said = of("ss-state-filter.txt", "ct-plain.txt", &["--socket-state", "close-wait"]);
    let expected = counts(&[("agree", 1), ("entry-closed", 1), ("entry-missing", 1)]);
    assert_eq!((said.code, said.classes()), (1, expected.clone()), "{}", said.err);
    assert!(said.err.contains("8080 (3 sockets)"), "{}", said.err);
    assert!(said.err.contains("1 entries without a socket are left out"), "{}", said.err);
    let prompted = format!("$ ss -tan state close-wait\n{}", read("ss-state-filter.txt"));
    assert_eq!(of_text(prompted, "ct-plain.txt").classes(), expected);
    let bare = read("ss-state-filter.txt").lines().skip(1).collect::<Vec<_>>().join("\n");
    assert_eq!(of_text(&bare, "ct-plain.txt").code, 2);
    let named = ["--socket-state", "close-wait", "--port", "9000"];
    assert_eq!(of("ss-state-filter.txt", "ct-plain.txt", &named).classes(), counts(&[]));
}

#[test]
fn lines_that_are_passed_over_are_counted_in_one_line() {
    let said = of("ss-netid.txt", "ct-plain.txt", &[]);
    let lines: Vec<_> = said.err.lines().collect();
    let [sockets, entries] = lines.as_slice() else { panic!("{}", said.err) };
    assert!(sockets.ends_with("ss-netid.txt: passed over 1 of 5 lines: 1 udp"), "{sockets}");
    assert!(entries.ends_with("ct-plain.txt: passed over 1 of 4 lines: 1 udp"), "{entries}");
    let odd = read("ss-plain.txt") + "HALF-SHUT 0 0 192.0.2.1:8080 203.0.113.9:5002\nwords\n";
    let said = of_text(odd, "ct-plain.txt");
    let expected = ":6: unknown state 'HALF-SHUT'; passed over 2 of 6 lines: 1 not understood, 1 \
                    with an unknown state";
    assert!(said.err.contains(expected), "{}", said.err);
}

#[test]
fn subflows_are_taken_and_the_mptcp_lines_are_not() {
    let said = of("ss-mptcp.txt", "ct-plain.txt", &[]);
    let report = said.report();
    let open = &report["summary"]["sockets"];
    assert_eq!((&open["established"], &open["close-wait"]), (&1.into(), &0.into()));
    assert!(said.err.contains("3 mptcp"), "{}", said.err);
    // The application still has a connection of which no TCP line is left.
    assert_eq!((said.code, said.classes()), (0, counts(&[("agree", 2)])), "{}", said.out);
    assert!(said.err.contains("1 entries without a TCP socket"), "{}", said.err);
}

#[test]
fn what_a_filter_of_entries_has_not_looked_for_is_not_missing() {
    let directory = tempfile::tempdir().expect("a directory");
    let entries = directory.path().join("entries");
    let only = |port: &str| {
        let plain = read("ct-plain.txt");
        plain
            .lines()
            .find(|line| line.contains(port))
            .map(|line| format!("{line}\n"))
            .expect("a line")
    };
    let empty = "conntrack v1.4.7 (conntrack-tools): 0 flow entries have been shown.\n";
    for (command, text, code, classes) in [
        ("$ conntrack -L | grep 41002", only("41002"), 0, &[("agree", 1)][..]),
        ("# conntrack -L --sport 41003", only("41003"), 1, &[("entry-closed", 1)][..]),
        ("# conntrack -L -s 198.51.100.20", empty.to_owned(), 0, &[][..]),
        ("# conntrack -L -f ipv6", empty.to_owned(), 0, &[][..]),
        (
            "# conntrack -L\n# conntrack -L -f ipv6",
            empty.to_owned(),
            1,
            &[("entry-missing", 3)][..],
        ),
        ("# conntrack -L -p tcp --dport 80", empty.to_owned(), 0, &[][..]),
        ("# conntrack -L -p tcp --dport 8080", empty.to_owned(), 1, &[("entry-missing", 3)][..]),
        ("$ conntrack -L | grep 8080", only("41002"), 1, &[("agree", 1), ("entry-missing", 2)][..]),
    ] {
        std::fs::write(&entries, format!("{command}\n{text}")).expect("a file");
        let said = audit(&file("ss-plain.txt"), &entries, &["--format=json", "--all"]);
        assert_eq!((said.code, said.classes()), (code, counts(classes)), "{command}: {}", said.err);
    }
}

#[test]
fn what_is_no_disagreement_stands_in_no_row() {
    let directory = tempfile::tempdir().expect("a directory");
    let entries = directory.path().join("entries");
    let offloaded = read("ct-plain.txt").replacen("6 3412 ESTABLISHED", "6", 1);
    std::fs::write(&entries, offloaded.replacen("[ASSURED]", "[OFFLOAD]", 1)).expect("a file");
    let rows = |args: &[&str]| {
        let said = audit(&file("ss-plain.txt"), &entries, args);
        said.out.lines().filter(|line| line.starts_with("offloaded ")).count()
    };
    assert_eq!((rows(&[]), rows(&["--all"])), (0, 1));
}

#[test]
fn a_name_of_a_process_is_never_taken_for_a_field() {
    let said = of("ss-names.txt", "ct-plain.txt", &[]);
    let report = said.report();
    let connections = report["connections"].as_array().expect("connections").clone();
    let held: Vec<_> = connections.iter().filter(|it| it["inode"] != Value::Null).collect();
    let inodes: Vec<_> = held.iter().map(|it| it["inode"].as_u64().expect("an inode")).collect();
    assert_eq!(inodes, [3001, 3002, 3003, 3004, 3005, 3006]);
    assert!(held.iter().all(|it| it["uid"] == 33), "{held:#?}");
    let names: Vec<_> = held.iter().map(|it| it["command"].as_str().expect("a name")).collect();
    let expected = [
        "node /srv/app a",
        "Web Content (x)",
        "nginx: worker p",
        "a ino:7 sk:9 b",
        "c sk:9 uid:0",
        "say \"hi\"",
    ];
    assert_eq!(names, expected);
    assert_eq!(held[1]["processes"], 2);
}

#[test]
fn nothing_in_a_file_reaches_the_terminal_as_a_command() {
    let name = "evil\u{1b}]0;x\u{7}\u{9b}31m\u{202e}";
    let rows = format!(
        "LISTEN 0 128 0.0.0.0:8080 0.0.0.0:*\n\
         CLOSE-WAIT 1 0 192.0.2.1:8080 198.51.100.7:41003 users:((\"{name}\",pid=9,fd=9))\n\
         \u{1b}[2J{name} 0 0 192.0.2.1:8080 198.51.100.7:41004\n"
    );
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("sockets");
    std::fs::write(&path, rows).expect("a file");
    for format in ["--format=json", "--format=table"] {
        let said = audit(&path, &file("ct-plain.txt"), &[format]);
        let text = format!("{}{}", said.out, said.err);
        let commands = |letter: char| letter.is_control() && letter != '\n' || letter == '\u{202e}';
        assert!(!text.contains(commands), "{text:?}");
        assert!(text.contains("evil"), "{text}");
    }
}

#[test]
fn connections_that_wait_to_be_accepted_belong_to_no_process() {
    let said = of("ss-unaccepted.txt", "ct-plain.txt", &[]);
    let report = said.report();
    assert_eq!(report["layers"]["listen"][0]["waiting"], 6);
    let application = report["layers"]["application"].as_array().expect("rows");
    let rows: Vec<_> = application.iter().map(|row| (&row["kind"], &row["pid"])).collect();
    assert_eq!(rows, [(&"process".into(), &77.into()), (&"queue".into(), &Value::Null)]);
    assert_eq!(application[1]["sockets"]["close-wait"], 3);
    let table = audit(&file("ss-unaccepted.txt"), &file("ct-plain.txt"), &[]).out;
    assert!(table.contains("waiting to be accepted: 3 of 4"), "{table}");
    // Without inodes the text says nothing of processes.
    let report = of("ss-plain.txt", "ct-plain.txt", &[]).report();
    assert_eq!(report["layers"]["application"][0]["kind"], "unseen");
}

#[test]
fn connections_outlive_their_listener_in_the_report() {
    let said = of("ss-listener-gone.txt", "ct-plain.txt", &[]);
    assert_eq!((said.code, said.classes()), (1, counts(&[("entry-missing", 2)])), "{}", said.err);
    assert!(
        said.err.contains("no listener any more, but served: 8443 (2 sockets)"),
        "{}",
        said.err
    );
    // What this host dials is not served.
    let dialled = "LISTEN 0 128 0.0.0.0:8080 0.0.0.0:*\n\
        ESTAB 0 0 192.0.2.1:40001 203.0.113.5:443\nESTAB 0 0 192.0.2.1:40002 203.0.113.5:443\n";
    assert_eq!(of_text(dialled, "ct-plain.txt").report()["summary"]["sockets"]["established"], 0);
}

/// A source that holds as much as the named limit allows, and of which nothing is counted.
#[test]
fn a_named_limit_that_counts_nothing_does_not_hold() {
    let socket =
        |client: u8, port: u16| format!("ESTAB 0 0 192.0.2.1:8080 198.51.100.{client}:{port}\n");
    let entry = |client: u8, port: u16, state: &str| {
        format!(
            "tcp 6 300 {state} src=198.51.100.{client} dst=192.0.2.1 sport={port} dport=8080 \
             src=192.0.2.1 dst=198.51.100.{client} sport=8080 dport={port} [ASSURED] mark=0 use=1\n"
        )
    };
    let all = || (7..9).flat_map(|client| (0..3).map(move |at| (client, 40_000 + at)));
    let listener = "LISTEN 0 128 0.0.0.0:8080 0.0.0.0:*\n".to_owned();
    let sockets = listener + &all().map(|(client, port)| socket(client, port)).collect::<String>();
    // Of another state, so that no filter is suspected.
    let more = entry(9, 40_009, "TIME_WAIT");
    for (of, code, verdict) in [(7..9, 0, "ok"), (8..9, 1, "bad")] {
        let entries = all().filter(|(client, _)| of.contains(client));
        let entries: String =
            entries.map(|(client, port)| entry(client, port, "ESTABLISHED")).collect();
        let directory = tempfile::tempdir().expect("a directory");
        let [one, other] = ["sockets", "entries"].map(|name| directory.path().join(name));
        std::fs::write(&one, &sockets).expect("a file");
        std::fs::write(&other, entries + &more).expect("a file");
        let said = audit(&one, &other, &["--limit", "3"]);
        let row = said.out.lines().find(|line| line.starts_with("--limit")).expect("a row");
        let got = row.split_whitespace().nth(1).expect("a verdict");
        assert_eq!((said.code, got), (code, verdict), "{}", said.out);
        let named =
            said.out.contains("198.51.100.7/32: 3 sockets, limit 3, 0 have an entry that counts");
        assert_eq!(named, code == 1, "{}", said.out);
    }
}

#[test]
fn entries_of_an_idle_service_are_found() {
    let only = of("ss-listeners-only.txt", "ct-ghosts.txt", &["--limit", "3"]);
    let control = read("ss-listeners-only.txt") + "ESTAB 0 0 192.0.2.1:9000 203.0.113.5:443\n";
    for said in [only, of_text(control, "ct-ghosts.txt")] {
        assert_eq!((said.code, said.classes()), (1, counts(&[("socket-missing", 4)])));
        let report = said.report();
        let sources = report["sources"].as_array().expect("sources").iter();
        let mut stale: Vec<_> =
            sources.map(|it| (it["source"].as_str().unwrap_or(""), &it["stale"])).collect();
        stale.sort_unstable_by_key(|(source, _)| *source);
        assert_eq!(stale, [("198.51.100.20/32", &1.into()), ("198.51.100.7/32", &3.into())]);
        let unreplied = report["connections"].as_array().expect("connections").iter();
        assert_eq!(unreplied.filter(|it| it["unreplied"] == true).count(), 1);
    }
    let table = audit(&file("ss-listeners-only.txt"), &file("ct-ghosts.txt"), &[]);
    assert!(table.out.contains("established/unreplied"), "{}", table.out);
    assert!(table.err.contains("only listening sockets"), "{}", table.err);
    // A host that forwards the port elsewhere, or serves it on another address alone.
    let elsewhere = read("ss-listeners-only.txt").replace("0.0.0.0:8080", "192.0.2.9:8080");
    let elsewhere = elsewhere.replace("[::]:8080", "[2001:db8::9]:8080");
    assert_eq!(of_text(elsewhere, "ct-ghosts.txt").classes(), counts(&[]));
}

#[test]
fn a_text_never_claims_who_began_a_connection() {
    let said = of("ss-libp2p.txt", "ct-libp2p.txt", &[]);
    assert_eq!((said.code, said.classes()), (0, counts(&[("agree", 4)])), "{}", said.out);
    assert!(said.err.contains("3 connections were begun from a served port"), "{}", said.err);
    let report = said.report();
    let sources = report["sources"].as_array().expect("sources");
    assert_eq!((sources.len(), &sources[0]["held"]), (1, &1.into()), "dialled ones are no load");
    // A peer's port that is one of ours says nothing either.
    let said = of("ss-sameport.txt", "ct-sameport.txt", &["--port", "179,8080"]);
    assert_eq!((said.code, said.classes()), (0, counts(&[("agree", 2)])), "{}", said.out);
    // An established entry without an answer was begun by the server's own packet.
    let reversed = "tcp 6 300 ESTABLISHED src=192.0.2.1 dst=198.51.100.7 sport=8080 dport=41003 \
        [UNREPLIED] src=198.51.100.7 dst=192.0.2.1 sport=41003 dport=8080 mark=0 use=1\n";
    let directory = tempfile::tempdir().expect("a directory");
    let entries = directory.path().join("entries");
    std::fs::write(&entries, read("ct-plain.txt").replace("6 4 CLOSE", "6 4 SYN_SENT") + reversed)
        .expect("a file");
    let said = audit(&file("ss-plain.txt"), &entries, &["--format=json"]);
    assert_eq!(said.report()["summary"]["classes"]["entry-reversed"], 0, "the right one is there");
    let line = read("ct-plain.txt").lines().find(|line| line.contains("41003")).map(str::to_owned);
    let without = read("ct-plain.txt").replace(&line.expect("a line"), "") + reversed;
    std::fs::write(&entries, without).expect("a file");
    let said = audit(&file("ss-plain.txt"), &entries, &["--format=json"]);
    assert_eq!(said.report()["summary"]["classes"]["entry-reversed"], 1, "{}", said.out);
}

#[test]
fn events_are_read_for_what_they_tell() {
    for name in ["ct-events.txt", "ct-events-timestamp.txt"] {
        let said = of("ss-plain.txt", name, &[]);
        assert_eq!((said.code, said.classes()), (1, counts(&[("entry-missing", 1)])), "{name}");
        assert_eq!(said.report()["connections"][0]["remote"], "198.51.100.7:41002");
        assert!(said.err.contains("2 of 3 connections do not appear"), "{}", said.err);
    }
    // A list with events behind it is brought up to date by them.
    let directory = tempfile::tempdir().expect("a directory");
    let entries = directory.path().join("entries");
    std::fs::write(&entries, read("ct-plain.txt") + &read("ct-events.txt")).expect("a file");
    let said = audit(&file("ss-plain.txt"), &entries, &["--format=json"]);
    let expected = counts(&[("agree", 1), ("entry-closed", 1), ("entry-missing", 1)]);
    assert_eq!(said.classes(), expected, "{}", said.err);
}

/// A text that ends inside its last line, anywhere behind the server's end: what is left of the line is no other
/// connection.
#[test]
fn a_text_that_is_cut_inside_its_last_line_claims_nothing_of_it() {
    let socket = |port: u16| format!("ESTAB 0 0 192.0.2.1:8080 198.51.100.7:{port}\n");
    let entry = |port: u16| {
        format!(
            "tcp 6 9999 ESTABLISHED src=198.51.100.7 dst=192.0.2.1 sport={port} dport=8080 src=192.0.2.1 \
             dst=198.51.100.7 sport=8080 dport={port} [ASSURED] mark=0 use=1\n"
        )
    };
    let listener = "LISTEN 0 128 0.0.0.0:8080 0.0.0.0:*\n";
    let sockets = format!("{listener}{}{}", socket(41001), socket(41002));
    let entries = entry(41001) + &entry(41002);
    let directory = tempfile::tempdir().expect("a directory");
    let made = |name: &str, text: &str| {
        let path = directory.path().join(name);
        std::fs::write(&path, text).expect(name);
        path
    };
    let whole = (made("sockets", &sockets), made("entries", &entries));
    let classes = |said: Said| (said.code, said.classes());
    assert_eq!(
        classes(audit(&whole.0, &whole.1, &["--format", "json", "--all"])),
        (0, counts(&[("agree", 2)]))
    );
    let last = socket(41002).len();
    for cut in 1..last - "ESTAB 0 0 192.0.2.1:8080 ".len() {
        let text = made("cut", &sockets[..sockets.len() - cut]);
        let said = audit(&text, &whole.1, &["--format", "json", "--all"]);
        let agree = if cut == 1 { 2 } else { 1 };
        let text = &sockets[sockets.len() - last..sockets.len() - cut];
        assert_eq!((said.code, said.classes()), (0, counts(&[("agree", agree)])), "{text}");
        let is_said = said.out.contains(r#""id":"saved-text""#);
        assert!(cut == 1 || is_said, "{text}: {}", said.out);
    }
    let last = entry(41002).len();
    for cut in 1..last - "tcp 6 9999 ESTABLISHED src=198.51.100.7".len() {
        let text = made("cut", &entries[..entries.len() - cut]);
        let said = audit(&whole.0, &text, &["--format", "json", "--all"]);
        let text = &entries[entries.len() - last..entries.len() - cut];
        let agree = if text.contains(" dport=41002") { 2 } else { 1 };
        assert_eq!((said.code, said.classes()), (0, counts(&[("agree", agree)])), "{text}");
    }
}

/// Of a text with `...` in it nobody knows what was left out.
#[test]
fn a_text_that_was_shortened_by_hand_lacks_nothing_for_certain() {
    for mark in ["...", "\u{2026}", "  [snip]"] {
        let shorten = |name: &str, keep: usize| {
            let text = read(name);
            let lines: Vec<_> = text.lines().collect();
            let end = lines.len() - 1;
            format!("{}\n{mark}\n{}\n", lines[..keep].join("\n"), lines[end])
        };
        let sockets = of_text(shorten("ss-plain.txt", 2), "ct-plain.txt");
        assert!(!sockets.classes().contains_key("socket-missing"), "{mark}: {}", sockets.out);
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("entries");
        std::fs::write(&path, shorten("ct-plain.txt", 2)).expect("a file");
        let args = ["--format", "json", "--all"];
        let entries = audit(&file("ss-plain.txt"), &path, &args);
        assert!(!entries.classes().contains_key("entry-missing"), "{mark}: {}", entries.out);
    }
}

/// A text of which every line is cut inside the peer's port, as `cut -c` leaves it: no port is another's.
#[test]
fn a_text_that_is_cut_at_one_column_claims_nothing_of_what_stands_there() {
    let whole = read("ss-plain.txt");
    let end = whole.lines().nth(2).expect("a socket").len();
    for width in end - 4..=end {
        let lines: Vec<_> = whole.lines().map(|line| &line[..line.len().min(width)]).collect();
        let said = of_text(lines.join("\n") + "\n", "ct-plain.txt");
        let classes = said.classes();
        let told = said.err.contains("end where the longest line of the text does");
        if width == end {
            let agree = counts(&[("agree", 2), ("entry-closed", 1)]);
            assert_eq!((classes, told), (agree, false), "{}", said.err);
        } else {
            assert_eq!((classes, told, said.code), (counts(&[]), true, 0), "{width}: {}", said.err);
        }
    }
    // The control: a socket of a short port that no entry goes on from lacks its entry.
    let short = whole.replace(":41003", ":5200").replace("Process", "");
    let expected = counts(&[("agree", 3), ("entry-missing", 1)]);
    assert_eq!(of_text(short, "ct-plain.txt").classes(), expected);
}

/// More sockets lack an entry than lines could not be read: which of them do is not claimed.
#[test]
fn what_may_stand_in_lines_that_were_not_read_is_said() {
    let socket = |port: u16| format!("ESTAB 0 0 192.0.2.1:8080 198.51.100.7:{port}\n");
    let more: String = (42001..42004).map(socket).collect();
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("entries");
    let entry = read("ct-plain.txt").lines().next().expect("an entry").replace("41001", "42001");
    let broken = entry.replace("dport=8080 src", "dport=eighty src") + "\n";
    std::fs::write(&path, broken + &read("ct-plain.txt")).expect("a file");
    let sockets = directory.path().join("sockets");
    std::fs::write(&sockets, read("ss-plain.txt") + &more).expect("a file");
    let said = audit(&sockets, &path, &["--format=json", "--all"]);
    assert_eq!(said.classes().get("entry-missing"), Some(&3), "{}", said.err);
    let told = "of 3 sockets without an entry 1 may be in lines that could not be read";
    assert!(said.err.contains(told), "{}", said.err);
}

/// The tool's own count stands below fewer entries: a filter has left some out, whichever it was.
#[test]
fn a_text_that_lacks_entries_which_the_tool_has_counted_is_a_part() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("entries");
    let plain = read("ct-plain.txt");
    let filtered: String = plain
        .lines()
        .filter(|line| !line.contains("CLOSE_WAIT"))
        .map(|it| format!("{it}\n"))
        .collect();
    let told =
        |n: u32| format!("conntrack v1.4.7 (conntrack-tools): {n} flow entries have been shown.\n");
    let sockets = read("ss-plain.txt") + "ESTAB 0 0 192.0.2.1:8080 198.51.100.8:41009\n";
    let socket_path = directory.path().join("sockets");
    std::fs::write(&socket_path, &sockets).expect("a file");
    let left_out = "the text has 3 of the 4 entries that conntrack says it has shown (a filter, grep): 2 sockets \
                    without an entry are left out; at least 1 of them have none";
    for (text, missing, is_said) in [
        (told(4) + &filtered, None, true),
        (filtered.clone() + &told(4), None, true),
        // The controls: nothing was left out.
        (told(3) + &filtered, Some(2), false),
        (told(4) + &plain, Some(1), false),
        (format!("{plain}{}{filtered}{}", told(4), told(3)), Some(1), false),
    ] {
        std::fs::write(&path, &text).expect("a file");
        let said = audit(&socket_path, &path, &["--format=json", "--all"]);
        assert_eq!(said.classes().get("entry-missing"), missing.as_ref(), "{text}{}", said.err);
        assert_eq!(said.err.contains(left_out), is_said, "{text}{}", said.err);
    }
}

/// `ss -4` beside a listener for both families shows neither it nor its clients of IPv4.
#[test]
fn entries_of_what_the_sockets_were_not_asked_for_are_said() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("entries");
    let entry = |client: &str, server: &str, client_port: u16, port: u16| {
        format!(
            "tcp 6 300 ESTABLISHED src={client} dst={server} sport={client_port} dport={port} src={server} \
             dst={client} sport={port} dport={client_port} [ASSURED] mark=0 use=1\n"
        )
    };
    let v4 = entry("198.51.100.8", "192.0.2.1", 5000, 80)
        + &entry("198.51.100.8", "192.0.2.1", 5001, 80);
    let v6 = entry("2001:db8:1::8", "2001:db8::1", 5002, 80);
    // Dialled by this host, and to a host behind it.
    let others = entry("192.0.2.1", "203.0.113.5", 40000, 443)
        + &entry("198.51.100.8", "203.0.113.6", 5003, 80);
    let of_v4 =
        "2 entries are of connections to port 80 of this host, of which the text has neither";
    let of_v6 = "not one socket of ipv6 in the text (ss -4, ss -6): 1 entries";
    let dual = "LISTEN 0 128 *:80 *:*\nESTAB 0 0 [::ffff:192.0.2.1]:80 [::ffff:198.51.100.8]:5000\n\
                ESTAB 0 0 [::ffff:192.0.2.1]:80 [::ffff:198.51.100.8]:5001\n\
                ESTAB 0 0 [2001:db8::1]:80 [2001:db8:1::8]:5002\n";
    for (more, entries, is_of_v4, is_of_v6) in [
        ("", format!("{v4}{v6}"), true, true),
        ("", v4.clone(), true, false),
        // The controls: all there, or none of this host's.
        (dual, format!("{v4}{v6}"), false, false),
        ("", others, false, false),
    ] {
        std::fs::write(&path, read("ct-plain.txt") + &entries).expect("a file");
        let sockets = directory.path().join("sockets");
        std::fs::write(&sockets, read("ss-plain.txt") + more).expect("a file");
        let said = audit(&sockets, &path, &["--format=json"]);
        let told = (said.err.contains(of_v4), said.err.contains(of_v6));
        assert_eq!(told, (is_of_v4, is_of_v6), "{entries}{}", said.err);
        assert_eq!(
            said.err.matches("left out").count(),
            usize::from(told.0) + usize::from(told.1),
            "{}",
            said.err
        );
        assert_eq!(said.classes().get("socket-missing"), None, "{}", said.out);
    }
    // With the port named, and the command seen: the same are no leftovers.
    std::fs::write(&path, read("ct-plain.txt") + &v4).expect("a file");
    let sockets = directory.path().join("sockets");
    for (prompt, missing) in [("$ ss -tan4\n", None), ("$ ss -tan\n", Some(2))] {
        std::fs::write(&sockets, prompt.to_owned() + &read("ss-plain.txt")).expect("a file");
        let said = audit(&sockets, &path, &["--format=json", "--port", "80,8080"]);
        assert_eq!(said.classes().get("socket-missing"), missing.as_ref(), "{prompt}{}", said.err);
    }
}
