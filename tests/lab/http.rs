//! A client of HTTP that keeps to itself what it is told.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use super::namespace::Namespace;

pub struct Answer {
    pub status: u16,
    pub head: String,
    pub body: String,
}

impl Answer {
    pub fn has(&self, name: &str, value: &str) -> bool {
        self.head.lines().any(|line| line == format!("{name}: {value}"))
    }
}

/// Connects to an address of the namespace.
pub fn connect(namespace: &Namespace, address: &str) -> Option<TcpStream> {
    let stream = namespace.within(|| TcpStream::connect(address)).ok()?;
    stream.set_read_timeout(Some(Duration::from_secs(20))).ok()?;
    Some(stream)
}

/// Asks once; `headers` end with a line's end each. `None` when nobody listens.
pub fn ask(namespace: &Namespace, address: &str, request: &str, headers: &str) -> Option<Answer> {
    let mut stream = connect(namespace, address)?;
    // Of version 1.0 is answered in one piece.
    let request = format!("{request} HTTP/1.0\r\nHost: x\r\n{headers}\r\n");
    stream.write_all(request.as_bytes()).expect("a request");
    let mut answer = String::new();
    stream.read_to_string(&mut answer).expect("an answer");
    let (head, body) = answer.split_once("\r\n\r\n").expect("a head");
    let status = head.split(' ').nth(1).expect("a status").parse().expect("a number");
    Some(Answer { status, head: head.to_owned(), body: body.to_owned() })
}

/// Samples of an exposition by name and labels, as they are written.
pub fn samples(text: &str) -> std::collections::HashMap<String, f64> {
    text.lines()
        .filter(|line| !line.starts_with('#'))
        .map(|line| {
            let (name, value) = line.rsplit_once(' ').expect("a sample");
            (name.to_owned(), value.parse().expect("a number"))
        })
        .collect()
}
