//! Writes the seeds that the targets begin with, in `seeds/`: what was captured for the golden
//! tests, and rules and logged packets of the running kernel. In a throw-away namespace:
//!
//! `unshare --net cargo run --example seeds`

use std::cell::RefCell;
use std::fs;
use std::io::{self, Write};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::rc::Rc;
use std::time::Duration;

use ctkeep::Op;
use ctkeep::firewall::nft_chains;
use ctkeep::netlink::{Conversation, KernelSocket, Request, Transport};
use ctkeep_fuzz::played::{NLMSG_DONE, attribute, hex, messages, u16_at};

const NETLINK_NETFILTER: isize = 12;

fn main() {
    golden();
    rules();
    logged();
    texts();
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).to_path_buf()
}

fn write(target: &str, name: &str, bytes: &[u8]) {
    let folder = root().join("seeds").join(target);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join(name), bytes).unwrap();
}

/// Every golden capture; its comments are lines of `conntrack` and `ss`.
fn golden() {
    for (folder, target) in
        [("entries", "conntrack"), ("events", "conntrack"), ("sockets", "sockdiag")]
    {
        for file in fs::read_dir(root().join("../tests/golden").join(folder)).unwrap() {
            let path = file.unwrap().path();
            let name = path.file_stem().unwrap().to_str().unwrap().to_owned();
            let text = fs::read_to_string(&path).unwrap();
            let bytes = hex::parse(&text).concat();
            write(target, &name, &bytes);
            // Asked for as a dump, the messages in datagrams of their own; or as a batch.
            let way = if folder == "sockets" { [2, 0x7f, 0xff] } else { [0, 0, 0xff] };
            write("netlink", &name, &[&way, &bytes[..]].concat());
            let words: Vec<_> = text.lines().filter_map(|line| line.strip_prefix("# ")).collect();
            write("saved", &name, words.join("\n").as_bytes());
        }
    }
}

/// Keeps what arrives.
struct Recorder {
    socket: KernelSocket,
    datagrams: Rc<RefCell<Vec<u8>>>,
}

impl Transport for Recorder {
    fn send(&mut self, datagram: &[u8]) -> io::Result<()> {
        self.socket.send(datagram)
    }

    fn recv(&mut self, datagram: &mut Vec<u8>) -> io::Result<()> {
        self.socket.recv(datagram)?;
        for message in messages(datagram) {
            if u16_at(&message, 4) != NLMSG_DONE {
                self.datagrams.borrow_mut().extend(message);
            }
        }
        Ok(())
    }
}

fn recorder() -> (Conversation<Recorder>, Rc<RefCell<Vec<u8>>>) {
    let socket = KernelSocket::open(Op::new("capture"), NETLINK_NETFILTER).unwrap();
    let datagrams = Rc::<RefCell<Vec<u8>>>::default();
    (Conversation::new(Recorder { socket, datagrams: datagrams.clone() }), datagrams)
}

fn feed(tool: &str, input: &str) {
    let words: Vec<_> = tool.split(' ').collect();
    let mut child = Command::new(words[0]).args(&words[1..]).stdin(Stdio::piped()).spawn().unwrap();
    child.stdin.take().unwrap().write_all(input.as_bytes()).unwrap();
    assert!(child.wait().unwrap().success(), "{tool}");
}

const IPTABLES: &str = "*raw\n:PREROUTING ACCEPT [0:0]\n\
    -A PREROUTING -p tcp -m tcp --dport 8080 -j CT --notrack\nCOMMIT\n\
    *filter\n:INPUT DROP [0:0]\n:limits - [0:0]\n\
    -A INPUT -i lo -j ACCEPT\n\
    -A INPUT -m conntrack --ctstate ESTABLISHED,RELATED -j ACCEPT\n\
    -A INPUT -p tcp -m multiport --dports 80,443,8000:8010 -g limits\n\
    -A limits -p tcp --syn -m connlimit --connlimit-above 40 --connlimit-mask 24 \
    -m comment --comment \"at most\" -j REJECT --reject-with tcp-reset\n\
    -A limits ! -s 10.0.0.0/8 -m state --state NEW -m connlimit --connlimit-upto 5 \
    --connlimit-daddr -j ACCEPT\nCOMMIT\n";
const IP6TABLES: &str = "*filter\n:INPUT ACCEPT [0:0]\n\
    -A INPUT -p tcp --dport 443 -m connlimit --connlimit-above 16 --connlimit-mask 64 -j DROP\n\
    COMMIT\n";
const NFT: &str = "table inet filter {\n\
    set web { type inet_service; flags interval; elements = { 80, 443, 8000-8010 } }\n\
    set counted { type ipv4_addr; size 65535; flags dynamic; }\n\
    map wide { type ipv4_addr . inet_service : verdict; elements = { 192.0.2.1 . 80 : accept } }\n\
    chain hard { ip saddr 198.51.100.0/24 ct count over 9 drop; tcp dport 1-99 counter return; }\n\
    chain input { type filter hook input priority filter; policy drop;\n\
    iifname \"lo\" accept\n ct state vmap { established : accept, invalid : drop }\n\
    tcp dport @web ct state new add @counted { ip saddr & 255.255.255.0 ct count over 20 } reject\n\
    tcp flags & (fin|syn|rst|ack) == syn tcp dport vmap { 22 : accept, 25-30 : jump hard }\n\
    ip6 saddr 2001:db8::/32 meta l4proto tcp goto hard\n\
    ip saddr . tcp dport vmap @wide\n }\n\
    chain early { type filter hook prerouting priority raw; tcp dport != 53 notrack; }\n}\n";

fn rules() {
    for (name, tool, text) in [
        ("iptables", "iptables-nft-restore", IPTABLES),
        ("ip6tables", "ip6tables-nft-restore", IP6TABLES),
        ("nft", "nft -f -", NFT),
    ] {
        feed("nft -f -", "flush ruleset\n");
        feed(tool, text);
        let (mut conversation, datagrams) = recorder();
        let chains = nft_chains(&mut conversation).unwrap();
        assert!(!chains.is_empty());
        write("ruleset", name, &datagrams.borrow());
        if name != "nft" {
            write("saved", name, text.as_bytes());
        }
    }
    feed("nft -f -", "flush ruleset\n");
}

/// Packets of a connection over the loopback device.
fn logged() {
    const GROUP: u16 = 9816;
    feed("ip -batch -", "link set lo up\n");
    feed(
        "nft -f -",
        &format!(
            "table inet logged {{ chain in {{ type filter hook input priority 0; \
        log prefix \"full\" group {GROUP} snaplen 128; }}; }}\n"
        ),
    );
    let op = Op::new("capture");
    let (mut conversation, datagrams) = recorder();
    // NFULNL_MSG_CONFIG: bind the group, and each packet at once.
    for attributes in [attribute(1, &[1]), attribute(5, &1_u32.to_be_bytes())] {
        let mut body = vec![0, 0];
        body.extend(GROUP.to_be_bytes());
        body.extend(attributes);
        let bind = Request { op, kind: 4 << 8 | 1, flags: 0, body, joined: false };
        conversation.execute(&bind).unwrap();
    }
    for (name, address) in [("ipv4", "127.0.0.1:0"), ("ipv6", "[::1]:0")] {
        datagrams.borrow_mut().clear();
        let listener = TcpListener::bind(address).unwrap();
        drop(TcpStream::connect(listener.local_addr().unwrap()).unwrap());
        std::thread::sleep(Duration::from_millis(100));
        // Any request that the kernel answers behind them.
        let mut transport = conversation.into_transport();
        for _ in 0..3 {
            transport.recv(&mut Vec::new()).unwrap();
        }
        conversation = Conversation::new(transport);
        write("nflog", name, &datagrams.borrow());
    }
    feed("nft -f -", "flush ruleset\n");
}

fn texts() {
    let example = fs::read_to_string(root().join("../etc/ctkeep.toml.example")).unwrap();
    let is_option =
        |line: &&str| line.starts_with('#') && line.contains('=') && !line.contains("= TIME");
    let file: Vec<_> =
        example.lines().filter(is_option).map(|line| line.trim_start_matches('#').trim()).collect();
    write("options", "example", format!("run\n--config=f\0{}", file.join("\n")).as_bytes());
    for (name, typed) in [
        ("run", "run\n--port=80,443\n--states=close-wait\n--lease=90s\n--recount=off\n--defence=2"),
        ("audit", "audit\n--sockets=s\n--conntrack=c\n--limit=40\n--mask=24\n--format=json\n--all"),
        ("reconcile", "reconcile\n--source=198.51.100.0/24\n--exempt=2001:db8::/32\n--dry-run"),
        (
            "explain",
            "explain\n192.0.2.1:80\n[2001:db8::1]:4000\n--config=f\0port = [80]\nzone = 5\n",
        ),
        ("doctor", "doctor\n--netns=a\n-vv\n--help"),
    ] {
        write("options", name, typed.as_bytes());
    }
    for (name, request) in [
        (
            "metrics",
            "GET /metrics HTTP/1.1\r\nHost: h\r\nAccept: application/openmetrics-text; version=1.0.0;q=0.8,text/plain;q=0.5\r\n\r\n",
        ),
        ("page", "GET / HTTP/1.1\r\nHost: h\r\nConnection: close\r\n\r\n"),
        ("two", "HEAD /healthz HTTP/1.1\r\nHost: h\r\n\r\nGET /nowhere HTTP/1.0\r\n\r\n"),
        (
            "post",
            "POST /metrics HTTP/1.1\r\nHost: h\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n4\r\nbody\r\n0\r\n\r\n",
        ),
    ] {
        write("http", name, request.as_bytes());
    }
}
