//! Connections that a helper of conntrack expects (FTP's data) are RELATED, not NEW: what accepts those before a
//! limit keeps them from it.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::time::Duration;

use crate::lab::{Lab, SERVER_V4};

const CTKEEP: &str = env!("CARGO_BIN_EXE_ctkeep");
const RULES: &str = "*raw\n-A PREROUTING -p tcp --dport 21 -j CT --helper ftp\nCOMMIT\n\
    *filter\n-A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n\
    -A INPUT -p tcp --syn -m connlimit --connlimit-above 3 -j DROP\nCOMMIT\n";
const PATIENCE: Duration = Duration::from_secs(10);

/// One control connection, and so many of data.
fn transfers(lab: &Lab, count: usize) -> Vec<(TcpStream, TcpStream)> {
    let listen = |port| lab.server.within(|| TcpListener::bind((SERVER_V4, port)).expect("bound"));
    let connect = |port| {
        let to = (SERVER_V4, port).into();
        lab.client.within(|| TcpStream::connect_timeout(&to, PATIENCE).expect("a connection"))
    };
    let listener = listen(21);
    let mut client = connect(21);
    let (mut server, _) = listener.accept().expect("accepted");
    let mut all = Vec::new();
    for _ in 0..count {
        let data = listen(0);
        let port = data.local_addr().expect("an address").port();
        let [a, b, c, d] = SERVER_V4.octets();
        let answer =
            format!("227 Entering Passive Mode ({a},{b},{c},{d},{},{})\r\n", port >> 8, port & 255);
        server.write_all(answer.as_bytes()).expect("sent");
        let mut heard = vec![0; answer.len()];
        client.read_exact(&mut heard).expect("the answer");
        all.push((connect(port), data.accept().expect("accepted").0));
    }
    all.push((client, server));
    all
}

#[test]
fn data_that_a_helper_expects_is_over_no_limit_for_what_is_new() {
    let Some(lab) = Lab::new() else { return };
    lab.server.feed("iptables-restore", RULES);
    let held = transfers(&lab, 5);
    assert_eq!(held.len(), 6, "twice the limit, which none of the data comes to");
    let (code, out, err) = lab.ctkeep(CTKEEP, &["audit"]);
    assert_eq!((code, out.contains("over it")), (0, false), "{out}{err}");
    let (_, killed, _) = lab.ctkeep(CTKEEP, &["kill", "--over-limit"]);
    assert!(!killed.contains("would be closed"), "{killed}");
}
