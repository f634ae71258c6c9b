//! `ctkeep recount`, by hand.

use super::*;

/// By hand, where no daemon runs.
#[test]
fn recount_by_hand_makes_the_limit_hold_again() {
    let Some(lab) = Lab::new() else { return };
    connlimit(HERE)(&lab.server);
    let _server = lab.serve("[::]:80");
    let mut half_closed = Held::open(&lab, HERE, 11);
    let established = Held::open(&lab, HERE, 12);
    for conn in &mut half_closed.conns {
        lab.half_close(conn);
    }
    save_and_restore(HERE, "")(&lab.server);
    let (code, out, err) = lab.ctkeep(PROGRAM, &["recount", "--dry-run", "--no-header"]);
    assert_eq!((code, out.matches("planned").count()), (0, 2), "{out}{err}");
    let one = lab.peer("198.51.100.13");
    let source = ["recount", "--no-header", "--source", "198.51.100.11"];
    let (code, out, err) = lab.ctkeep(PROGRAM, &source);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains("198.51.100.11") && out.contains("counted"), "{out}{err}");
    assert_eq!(half_closed.peer.admitted(80, TRIES), 0, "counted");
    assert_eq!(established.peer.admitted(80, TRIES), LIMIT, "out of scope, hence the control");
    assert_eq!(one.admitted(80, TRIES), LIMIT, "nobody else pays");
    let (code, out, err) = lab.ctkeep(PROGRAM, &["recount", "--format", "json"]);
    assert_eq!(code, 0, "{out}{err}");
    assert!(out.contains(r#""open":3,"sent":3,"listed":3,"full":true"#), "{out}{err}");
}

/// Other clients' connections stand on the list of a limit that counts all together.
#[test]
fn recount_by_hand_calls_counted_what_the_limit_counts_by_itself() {
    let Some(lab) = Lab::new() else { return };
    let limit =
        "INPUT -p tcp --syn --dport 80 -m connlimit --connlimit-above 9 --connlimit-mask 0 -j DROP";
    lab.server.feed("iptables-restore", &input(&[limit]));
    let _server = lab.serve("[::]:80");
    let (_one, _other) = (Held::open(&lab, HERE, 11), Held::open(&lab, HERE, 12));
    let (code, out, err) =
        lab.ctkeep(PROGRAM, &["recount", "--no-header", "--source", "198.51.100.11"]);
    assert_eq!(code, 0, "{out}{err}");
    // Six of nine: whether three of them are these is not known.
    assert!(out.trim_end().ends_with("sent"), "{out}{err}");
}

#[test]
fn without_a_limit_there_is_nothing_to_recount() {
    let Some(lab) = Lab::new() else { return };
    let (code, out, err) = lab.ctkeep(PROGRAM, &["recount"]);
    assert_eq!((code, out.as_str()), (0, "no limit in the rules: nothing to recount\n"), "{err}");
}
