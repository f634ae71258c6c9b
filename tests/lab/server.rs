//! A real server process that accepts connections and then does nothing, like a blocked worker.
//!
//! It never reads or closes by itself. It is the test's own program started a second time, so it
//! has a process id of its own and can be killed the hard way. A socket pair in place of its
//! stdin carries one order a line to it and one answer a line back; it ends with that pair.

use std::io::{BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use socket2::{Domain, Protocol, SockRef, Socket, Type};

use super::namespace::Namespace;

/// Set in the child: the addresses to listen on.
const LISTEN: &str = "CTKEEP_LAB_SERVER";

/// As deep as net.core.somaxconn allows by default.
const BACKLOG: i32 = 4096;

/// The child answers at once; this only ends a test that would hang.
const ANSWER: Duration = Duration::from_secs(20);

/// The test's end of the server process.
pub struct Server {
    child: Child,
    control: BufReader<UnixStream>,
}

impl Server {
    /// Starts one in either namespace; see [`super::Lab::serve`].
    pub fn start(namespace: &Namespace, listen: &str) -> Self {
        let (ours, theirs) = UnixStream::pair().expect("socket pair");
        ours.set_read_timeout(Some(ANSWER)).expect("read timeout");
        let mut command = Command::new(std::env::current_exe().expect("own program"));
        command.env(LISTEN, listen);
        // A test program runs the one test below; any other must call `serve_if_asked` first.
        command.args(["--exact", &own_test(), "--ignored", "--nocapture"]);
        let child = namespace
            .spawn_with(&command, |command| {
                command.stdin(Stdio::from(OwnedFd::from(theirs))).stdout(Stdio::null());
            })
            .expect("server process");
        let mut server = Self { child, control: BufReader::new(ours) };
        let greeting = server.answer();
        assert_eq!(greeting, "listening", "server process");
        server
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How many accepted connections the process holds: descriptors, whatever has become of
    /// their sockets.
    pub fn held(&mut self) -> usize {
        self.order("held", &[]).parse().expect("a number")
    }

    /// Closes every connection in an orderly way, with a FIN.
    pub fn close_all(&mut self) {
        self.order("close", &[]);
    }

    /// Ends its own side of every connection, and goes on to read.
    pub fn shutdown_all(&mut self) {
        self.order("shutdown", &[]);
    }

    /// Closes every connection with SO_LINGER 0, hence with an RST.
    pub fn reset_all(&mut self) {
        self.order("reset", &[]);
    }

    /// Writes `data` to every connection, as much of it as its buffer takes.
    pub fn send_all(&mut self, data: &[u8]) {
        self.order(&format!("send {}", data.len()), data);
    }

    /// Closes the listening sockets and keeps the connections.
    pub fn stop_listening(&mut self) {
        self.order("deafen", &[]);
    }

    /// Ends the process with SIGKILL; the kernel closes what it held.
    pub fn kill(mut self) {
        self.end();
    }

    fn order(&mut self, line: &str, data: &[u8]) -> String {
        let control = self.control.get_mut();
        control
            .write_all(format!("{line}\n").as_bytes())
            .and_then(|()| control.write_all(data))
            .expect("server process takes orders");
        self.answer()
    }

    fn answer(&mut self) -> String {
        let mut line = String::new();
        self.control.read_line(&mut line).expect("server's answer");
        line.trim_end().to_owned()
    }

    fn end(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.end();
    }
}

/// The name of [`the_server_process`] as the test harness knows it: without the crate.
fn own_test() -> String {
    let (_, module) = module_path!().split_once("::").expect("a module of a crate");
    format!("{module}::the_server_process")
}

#[test]
#[ignore = "not a test: the server process that tests start"]
fn the_server_process() {
    serve_if_asked();
}

/// Becomes the server process if this program was started as one, and does not return then.
pub fn serve_if_asked() {
    if let Ok(listen) = std::env::var(LISTEN) {
        Held::listen(&listen).serve();
        std::process::exit(0);
    }
}

/// What the server process holds.
struct Held {
    listeners: Vec<TcpListener>,
    streams: Vec<TcpStream>,
}

impl Held {
    fn listen(addresses: &str) -> Self {
        let listeners = addresses.split_whitespace().map(listener).collect();
        Self { listeners, streams: Vec::new() }
    }

    fn serve(mut self) {
        let stdin = std::io::stdin().as_fd().try_clone_to_owned().expect("stdin");
        let mut control = BufReader::new(UnixStream::from(stdin));
        reply(&mut control, "listening");
        loop {
            if self.wait(&control) {
                let mut line = String::new();
                if !control.read_line(&mut line).is_ok_and(|length| length > 0) {
                    return;
                }
                self.accept();
                let answer = self.obey(line.trim_end(), &mut control);
                reply(&mut control, &answer);
            } else {
                self.accept();
            }
        }
    }

    /// Waits for a connection or an order; true for an order.
    fn wait(&self, control: &BufReader<UnixStream>) -> bool {
        let sources = std::iter::once(control.get_ref().as_fd())
            .chain(self.listeners.iter().map(AsFd::as_fd));
        let mut ready: Vec<PollFd<'_>> =
            sources.map(|source| PollFd::new(source, PollFlags::POLLIN)).collect();
        poll(&mut ready, PollTimeout::NONE).expect("poll");
        ready.first().and_then(PollFd::any).unwrap_or(true)
    }

    fn accept(&mut self) {
        for listener in &self.listeners {
            loop {
                match listener.accept() {
                    Ok((stream, _)) => self.streams.push(stream),
                    Err(error) if error.kind() == ErrorKind::WouldBlock => break,
                    // Reset while it was still in the queue.
                    Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                    Err(error) => panic!("accept: {error}"),
                }
            }
        }
    }

    fn obey(&mut self, order: &str, control: &mut BufReader<UnixStream>) -> String {
        match order.split_once(' ') {
            None if order == "held" => return self.streams.len().to_string(),
            None if order == "close" => self.streams.drain(..).for_each(close),
            None if order == "shutdown" => {
                for stream in &self.streams {
                    let _ = stream.shutdown(Shutdown::Write);
                }
            }
            None if order == "deafen" => self.listeners.clear(),
            None if order == "reset" => self.streams.drain(..).for_each(reset),
            Some(("send", length)) => {
                let mut data = vec![0; length.parse().expect("a length")];
                control.read_exact(&mut data).expect("the data");
                for stream in &mut self.streams {
                    write(stream, &data);
                }
            }
            _ => panic!("unknown order: {order}"),
        }
        "done".to_owned()
    }
}

fn reply(control: &mut BufReader<UnixStream>, text: &str) {
    // When the test has gone, so does this process at the next read.
    let _ = control.get_mut().write_all(format!("{text}\n").as_bytes());
}

/// On an address and port, and after a `%` the device that the socket is bound to, `transparent`
/// where it takes what is for other hosts (TPROXY), or `mptcp` where it speaks Multipath TCP.
fn listener(address: &str) -> TcpListener {
    let (address, device) = address.split_once('%').unwrap_or((address, ""));
    let address: SocketAddr = address.parse().expect("address to listen on");
    let protocol = (device == "mptcp").then(|| Protocol::from(super::IPPROTO_MPTCP));
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, protocol).expect("socket");
    if device == "transparent" {
        socket.set_ip_transparent_v4(true).expect("transparent");
    } else if !device.is_empty() && protocol.is_none() {
        socket.bind_device(Some(device.as_bytes())).expect("bound to a device");
    }
    if address.is_ipv6() {
        socket.set_only_v6(false).expect("dual stack");
    }
    socket.set_reuse_address(true).expect("reuse address");
    socket.set_nonblocking(true).expect("non-blocking");
    socket.bind(&address.into()).expect("bind");
    socket.listen(BACKLOG).expect("listen");
    socket.into()
}

/// Linux answers a close with unread data by an RST: read first, so that it is a FIN.
fn close(mut stream: TcpStream) {
    let mut scrap = [0; 4096];
    stream.set_nonblocking(true).expect("non-blocking");
    while stream.read(&mut scrap).is_ok_and(|length| length > 0) {}
}

fn reset(stream: TcpStream) {
    SockRef::from(&stream).set_linger(Some(Duration::ZERO)).expect("linger");
}

fn write(stream: &mut TcpStream, mut data: &[u8]) {
    stream.set_nonblocking(true).expect("non-blocking");
    // A full buffer or a dead connection ends it: this server never blocks, and never closes.
    while !data.is_empty()
        && let Ok(length) = stream.write(data)
    {
        data = data.get(length..).unwrap_or_default();
    }
}
