//! A text of sockets: which lines belong together, and what each of them is. Pure.

use std::collections::{HashMap, HashSet};

use super::address::is_endpoint;
use super::lines::{Line, Text};
use super::ss::Row;
use super::{CUT_SHORT, EARLIER, Mistake, Parsed, Read, netstat, ss, users};
use crate::audit::processes::Holder;
use crate::flow::Connection;
use crate::sockdiag::{Cookie, Socket, State};

/// A mailer breaks one line into this many at most.
const PIECES: usize = 4;

/// Sockets of a text.
#[derive(Clone, Debug, Default)]
pub struct Sockets {
    /// TCP sockets, in the order of the text.
    pub values: Vec<Socket>,
    /// What became of the other lines.
    pub parsed: Parsed,
    /// Who holds them, as far as the text says.
    pub holders: HashMap<Cookie, Holder>,
    /// Whether the text has inodes, so that 0 means that no process has the socket.
    pub has_inodes: bool,
    /// Lines of TCP sockets whose state only a filter says that is not in the text.
    pub without_state: Vec<usize>,
    /// Lines of TCP sockets that could not be read.
    pub unread: usize,
    /// Connections that a line of Multipath TCP shows; their TCP lines may be there or not.
    pub multipath: HashSet<Connection>,
    /// The peer's end of this one ends the text, without the end of a line: its address and port may go on.
    pub doubtful: Option<Connection>,
    /// The peer's end of these ends where the longest line does: `cut -c`, or a narrow terminal, may have cut
    /// their port.
    pub at_edge: HashSet<Connection>,
    /// A filter has left sockets out, or the text was cut off.
    pub is_part: bool,
}

/// One record: a line, with what a mailer has broken off.
struct Record {
    line: Line,
    pieces: usize,
    /// The number of its last line.
    last: usize,
    /// How many headings stand before it: each run of the tool prints one.
    look: usize,
}

/// Reads sockets as `ss -tan` or `netstat -tan` prints them. `filter` is the state of all those
/// that show none.
pub(super) fn sockets(text: &Text, filter: Option<State>) -> Sockets {
    let is_part = text.commands.iter().any(|command| leaves_out(command));
    let mut sockets = Sockets { is_part, ..Sockets::default() };
    let filter = filter.or_else(|| text.commands.iter().find_map(|command| filtered(command)));
    let is_wide = text.lines.iter().any(|line| netstat::is_wide(&words(&line.text)));
    let edge = text.lines.iter().map(Line::end).max();
    let mut looks = Vec::new();
    let records = records(&text.lines, &mut sockets.parsed);
    let last = records.last().map(|record| record.line.number);
    for record in records {
        let number = record.line.number;
        match read(&record.line.text, is_wide) {
            Ok(Some(row)) => {
                sockets.is_part |= row.state.is_none();
                let is_last = text.open_end == Some(record.last);
                let ends_in_peer = row.remote.port() != 0 && ends_in_an_address(&record.line.text);
                let connection = Connection::new(row.local, row.remote);
                if ends_in_peer && record.pieces == 1 && Some(record.line.end()) == edge {
                    sockets.at_edge.insert(connection);
                }
                sockets.doubtful =
                    Some(connection).filter(|_| is_last && ends_in_peer).or(sockets.doubtful);
                match row.state.or(filter) {
                    Some(state) => {
                        looks.push(record.look);
                        sockets.take(number, state, row);
                    }
                    None => sockets.without_state.push(number),
                }
            }
            Ok(None) => {
                let first = record.line.text.split_whitespace().next().unwrap_or_default();
                let other = ss::other(first).unwrap_or_default();
                sockets.parsed.pass(other);
                if other == "mptcp"
                    && let Ok(row) = ss::row(&record.line.text.replacen("mptcp", "tcp", 1))
                {
                    sockets.multipath.insert(Connection::new(row.local, row.remote));
                }
            }
            Err(mistake) => {
                let is_open = text.open_end == Some(record.last) && last == Some(number);
                let kind = if is_open { CUT_SHORT } else { mistake.kind };
                let mistake = Mistake { kind, ..mistake };
                let is_socket = is_whole(&words(&record.line.text)) || mistake.kind == CUT_SHORT;
                sockets.unread += usize::from(is_socket);
                sockets.parsed.mistaken(number, mistake);
            }
        }
    }
    sockets.is_part |=
        text.is_shortened || sockets.parsed.is_cut_off(last) || ends_in_details(text);
    sockets.keep_last(&looks);
    sockets.parsed.mistakes.sort_by_key(|(line, _)| *line);
    sockets
}

impl Sockets {
    /// Whether sockets of the host may be missing from the text: a filter shows in it, or all
    /// sockets are in one state, as `grep CLOSE-WAIT` leaves them.
    pub fn is_partial(&self) -> bool {
        let first = self.values.first().map(|socket| socket.state);
        let is_one_state = self.values.iter().all(|socket| Some(socket.state) == first);
        self.is_part || is_one_state && first != Some(State::Listen)
    }

    /// Of a text with several looks (`netstat -c`, a log) the last counts: of each connection its
    /// last line, and nothing before the heading of a look that shows a connection again.
    fn keep_last(&mut self, looks: &[usize]) {
        let mut newest: HashMap<Connection, (usize, usize)> = HashMap::new();
        let mut begin = 0;
        let connected = |socket: &Socket| socket.state != State::Listen;
        for (at, (socket, look)) in self.values.iter().zip(looks).enumerate() {
            if connected(socket)
                && let Some((_, before)) = newest.insert(socket.connection(), (at, *look))
                && before < *look
            {
                begin = *look;
            }
        }
        let mut looks = looks.iter().enumerate();
        let all = self.values.len();
        self.values.retain(|socket| {
            looks.next().is_some_and(|(at, look)| {
                let is_last = newest.get(&socket.connection()).is_none_or(|(last, _)| *last == at);
                *look >= begin && (!connected(socket) || is_last)
            })
        });
        let earlier = all - self.values.len();
        if earlier > 0 {
            self.parsed.read -= earlier;
            self.parsed.passed.insert(EARLIER, earlier);
        }
    }

    fn take(&mut self, number: usize, state: State, row: Row) {
        // Without -e any number that no other line has.
        let cookie = row.extras.cookie.unwrap_or(number as u64 | 1 << 63);
        let socket = Socket {
            local: row.local,
            remote: row.remote,
            state,
            inode: row.extras.inode.unwrap_or(0),
            uid: row.extras.uid.unwrap_or(0),
            cookie: Cookie(cookie),
            interface: 0,
            recv_queue: row.recv_queue,
            send_queue: row.send_queue,
        };
        self.has_inodes |= row.extras.inode.is_some();
        self.holders.extend(row.extras.holder.map(|holder| (socket.cookie, holder)));
        self.values.push(socket);
        self.parsed.read += 1;
    }
}

fn words(text: &str) -> Vec<&str> {
    text.split_whitespace().collect()
}

/// A socket, or `None` for one that is not of TCP.
fn read(text: &str, is_wide: bool) -> Read<Option<Row>> {
    let words = words(text);
    if words.first().is_some_and(|first| ss::other(first).is_some()) {
        return Ok(None);
    }
    if netstat::is_row(&words) { netstat::row(text, is_wide) } else { ss::row(text) }.map(Some)
}

fn is_start(words: &[&str]) -> bool {
    let Some(first) = words.first() else { return false };
    netstat::is_row(words) || ss::before_queues(words).is_some() || {
        // Not a word of a sentence: a column follows that is no word.
        ss::other(first).is_some()
            && words.get(1).is_some_and(|word| word.len() > 1 || is_number(word))
    }
}

fn is_number(word: &str) -> bool {
    word.parse::<u32>().is_ok()
}

fn is_whole(words: &[&str]) -> bool {
    netstat::is_row(words)
        || ss::is_complete(words)
        || words.first().is_some_and(|first| ss::other(first).is_some())
}

/// Puts lines together that a mailer has broken; passes over headings and lines of details.
fn records(lines: &[Line], parsed: &mut Parsed) -> Vec<Record> {
    let mut records: Vec<Record> = Vec::new();
    let mut in_details = false;
    let mut stray: Option<&Line> = None;
    let mut look = 0;
    for line in lines {
        let words = words(&line.text);
        if is_heading(&words) {
            // What stands right before a heading is its title, in any language.
            stray = None;
            in_details = false;
            look += 1;
            continue;
        }
        if let Some(line) = stray.take() {
            parsed.mistaken(line.number, Mistake::no_socket(&line.text));
        }
        let is_detail = is_detail(line, records.last(), in_details);
        let open = records.last_mut().filter(|record| record.pieces < PIECES);
        let is_open = |record: &Record| !is_whole(&self::words(&record.line.text));
        match open {
            Some(record)
                if is_open(record)
                    && !is_whole(&words)
                    && !in_details
                    && !ss::has_state(&words) =>
            {
                join(record, line);
            }
            _ if is_start(&words) => {
                in_details = false;
                let last = line.number;
                records.push(Record { line: line.clone(), pieces: 1, last, look });
            }
            Some(record) if users::is_continued_by(&line.text) => join(record, line),
            _ if is_detail => in_details = true,
            _ => stray = Some(line),
        }
    }
    if let Some(line) = stray {
        parsed.mistaken(line.number, Mistake::no_socket(&line.text));
    }
    records
}

fn join(record: &mut Record, line: &Line) {
    record.line.text.push(' ');
    record.line.text.push_str(&line.text);
    record.pieces += 1;
    record.last = line.number;
}

/// Whether nothing stands behind the peer's end.
fn ends_in_an_address(text: &str) -> bool {
    text.split_whitespace().next_back().is_some_and(is_endpoint)
}

/// What `-i`, `-m` or `-o` add in lines of their own.
fn is_detail(line: &Line, record: Option<&Record>, in_details: bool) -> bool {
    let has_values = || line.text.split_whitespace().any(|word| word.contains(':'));
    record.is_some_and(|record| line.indent > record.line.indent || in_details && has_values())
        || line.text.contains("rto:") && line.text.contains("cwnd:")
}

/// Whether the text ends in the middle of what `-i` or `-m` add: its last line has no end, and ends in another
/// word than all others of the kind.
fn ends_in_details(text: &Text) -> bool {
    let is_detail = |line: &&Line| line.indent > 0 && !is_start(&words(&line.text));
    let name = |line: &Line| {
        let word = line.text.split_whitespace().next_back()?;
        Some(word.split(':').next()?.to_owned())
    };
    let Some(last) = text.lines.last().filter(|last| text.open_end == Some(last.number)) else {
        return false;
    };
    let mut others = text.lines.iter().rev().skip(1).filter(is_detail).peekable();
    is_detail(&last) && others.peek().is_some() && others.all(|other| name(other) != name(last))
}

/// A heading, also one that a mailer has broken.
fn is_heading(words: &[&str]) -> bool {
    const NAMES: [&str; 21] = [
        "Netid",
        "State",
        "Recv-Q",
        "Send-Q",
        "Local",
        "Address",
        "Address:Port",
        "Peer",
        "Process",
        "Address:PortProcess",
        "Port",
        "Proto",
        "Foreign",
        "User",
        "Inode",
        "PID/Program",
        "name",
        "Timer",
        "Users",
        "RefCnt",
        "Flags",
    ];
    let is_first = |names: &[&str]| words.first().is_some_and(|word| names.contains(word));
    words.iter().all(|word| NAMES.contains(word))
        || is_first(&["Proto"]) && words.len() > 3
        || is_first(&["State", "Netid", "Recv-Q"]) && words.contains(&"Send-Q")
}

/// The one state that `ss -tan state close-wait` asks for, after which `ss` prints no such column.
fn filtered(command: &str) -> Option<State> {
    let words = words(command);
    let at = words.iter().position(|word| *word == "state")?;
    let named = |words: &[&str]| ss::state(words.get(1)?);
    if words.iter().skip(at + 1).any(|word| *word == "state") {
        return None;
    }
    named(words.get(at..)?)
}

/// Whether a command shows a part of the sockets only. Ports are no part: entries are looked at by
/// port. One family is: of a listener for both it leaves out the clients of the other.
fn leaves_out(command: &str) -> bool {
    const FILTERS: [&str; 9] =
        ["state", "exclude", "dst", "src", "dport", "grep", "egrep", "head", "tail"];
    const FAMILIES: [&str; 5] = ["--ipv4", "--ipv6", "--inet", "--inet6", "-f"];
    let is_family = |word: &str| {
        let is_short = word.starts_with('-') && !word.starts_with("--");
        FAMILIES.contains(&word) || is_short && word.contains(['4', '6'])
    };
    let of_tool = command.split('|').next().unwrap_or_default();
    command.split_whitespace().any(|word| FILTERS.contains(&word))
        || of_tool.split_whitespace().any(is_family)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Sockets {
        sockets(&Text::of(text.as_bytes()), None)
    }

    fn lines(sockets: &Sockets) -> Vec<usize> {
        sockets.parsed.mistakes.iter().map(|(line, _)| *line).collect()
    }

    #[test]
    fn sockets_are_read_with_and_without_details() {
        let text = "State      Recv-Q Send-Q Local Address:Port  Peer Address:Port Process\n\
            LISTEN     0      511    *:80                *:*\n\
            CLOSE-WAIT 422    0      [::ffff:192.0.2.1]:80 [::ffff:198.51.100.7]:4000 \
            users:((\"apache2\",pid=12,fd=9)) uid:33 ino:4711 sk:1a <->\n\
            \t cubic rto:204 mss:1448\n\
            ESTAB      0      0      192.0.2.1%eth0:443  203.0.113.9:5000\n\
            FIN-WAIT-2 0      0      192.0.2.1:http      203.0.113.9:5001\n\
            HALF-SHUT  0      0      192.0.2.1:80        203.0.113.9:5002\n";
        let read = read(text);
        let [listener, half, open] = read.values.as_slice() else { panic!("{read:?}") };
        assert_eq!((listener.state, listener.local.port()), (State::Listen, 80));
        assert_eq!(half.connection().to_string(), "192.0.2.1:80 > 198.51.100.7:4000");
        assert_eq!(
            (half.inode, half.uid, half.cookie, half.recv_queue),
            (4711, 33, Cookie(26), 422)
        );
        assert_eq!(read.holders.get(&half.cookie).map(|holder| holder.pid), Some(12));
        assert_eq!(open.local.to_string(), "192.0.2.1:443");
        assert_eq!(lines(&read), [6, 7]);
    }

    #[test]
    fn lines_that_a_mailer_has_broken_are_put_together() {
        let text = "State      Recv-Q Send-Q        Local Address:Port          Peer\n\
            Address:Port Process\n\
            CLOSE-WAIT 1      0                 192.0.2.1:8080\n\
            198.51.100.7:41002 users:((\"httpd\",pid=902,fd=10)) uid:33\n\
            ino:4711 sk:1a <->\n\
            CLOSE-WAIT 1      0      192.0.2.1:8080 198.51.100.7:41003\n\
            users:((\"httpd\",pid=902,fd=11)) ino:4712 sk:1b\n\
            ESTAB      0      0\n\
            192.0.2.1:8080 198.51.100.7:41004\n";
        let read = read(text);
        let found: Vec<_> =
            read.values.iter().map(|socket| (socket.remote.port(), socket.inode)).collect();
        assert_eq!(found, [(41002, 4711), (41003, 4712), (41004, 0)]);
        assert!(lines(&read).is_empty() && read.holders.len() == 2, "{read:?}");
    }

    #[test]
    fn only_tcp_is_taken_and_the_rest_is_counted() {
        let text = "Netid State  Recv-Q Send-Q Local Address:Port Peer Address:Port\n\
            udp   UNCONN 0 0 0.0.0.0:53 0.0.0.0:*\n\
            u_str ESTAB  0 0 * 1234 * 1235\n\
            tcp   ESTAB  0 0 192.0.2.1:8080 198.51.100.7:41001\n\
            \t cubic tcp-ulp-mptcp flags:Mec token:0000(id:0)/7f31aa02(id:0)\n\
            mptcp CLOSE-WAIT 1 0 192.0.2.1:8080 198.51.100.7:41002\n\
            \t subflows:1 token:7f31aa02\n\
            tcp   1 0 192.0.2.1:8080 198.51.100.7:41003\n";
        let read = read(text);
        assert_eq!(read.values.len(), 1);
        assert_eq!(read.parsed.passed, [("mptcp", 1), ("udp", 1), ("unix", 1)].into());
        assert_eq!(read.without_state, [8]);
    }

    #[test]
    fn the_state_of_a_filter_is_taken_from_the_prompt() {
        let rows = "Recv-Q Send-Q Local Address:Port Peer Address:Port\n\
            1 0 192.0.2.1:8080 198.51.100.7:41002\n33 0 192.0.2.1:8080 198.51.100.20:50110\n";
        let prompted = read(&format!("# ss -tan state close-wait '( sport = :8080 )'\n{rows}"));
        assert!(prompted.values.iter().all(|socket| socket.state == State::CloseWait));
        assert_eq!(prompted.values.len(), 2);
        for command in
            ["ss -tan", "ss -tan state connected", "ss -tan state established state close-wait"]
        {
            assert_eq!(read(&format!("$ {command}\n{rows}")).without_state, [3, 4], "{command}");
        }
        let named = sockets(&Text::of(rows.as_bytes()), Some(State::Established));
        assert!(named.values.iter().all(|socket| socket.state == State::Established));
    }

    #[test]
    fn a_text_that_ends_inside_of_details_is_a_part() {
        let row = |port: u16| {
            format!(
                "ESTAB 0 0 192.0.2.1:80 198.51.100.7:{port} users:((\"a\",pid=5,fd=9)) ino:7 sk:1 cgroup:/ <->\n\
                 \t ts sack bbr wscale:7,7 rto:201 rtt:0.05/0.02 cwnd:10 minrtt:0.014 snd_wnd:64512"
            )
        };
        let listener =
            "LISTEN 0 512 0.0.0.0:80 0.0.0.0:* ino:8 sk:2 cgroup:/ <->\n\t bbr cwnd:10\n";
        let text = format!("{listener}{}\n{}", row(4000), row(4001));
        let is_part = |text: &str| sockets(&Text::of(text.as_bytes()), None).is_part;
        assert!(!is_part(&text), "whole, but for the end of its last line");
        for end in ["minrtt:0.0", "rtt:0.05/0", "wsca", "rto"] {
            let at = text.rfind(end).unwrap() + end.len();
            assert!(is_part(&text[..at]), "{end}");
            assert!(!is_part(&format!("{}\n", &text[..at])), "{end}: the control, with its end");
        }
    }

    #[test]
    fn lines_that_are_cut_at_an_edge_are_no_pieces_of_one() {
        let text = "State      Recv-Q Send-Q        Local Address:Port          Pee\n\
            LISTEN     0      128                 0.0.0.0:8080\n\
            ESTAB      0      0                 192.0.2.1:8080\n\
            CLOSE-WAIT 1      0                 192.0.2.1:8080\n";
        let read = read(text);
        assert!(read.parsed.mistakes.iter().all(|(_, it)| it.kind == CUT_SHORT), "{read:?}");
        assert_eq!(lines(&read), [2, 3, 4]);
    }

    #[test]
    fn a_title_of_netstat_is_none_of_its_sockets() {
        let text = "Aktive Internetverbindungen (Server und stehende Verbindungen)\n\
            Proto Recv-Q Send-Q Local Address           Foreign Address         State\n\
            tcp        0      0 0.0.0.0:8080            0.0.0.0:*               LISTEN\n\
            tcp        1      0 192.0.2.1:8080          198.51.100.7:41002      CLOSE_WAIT\n\
            Thank you\n";
        let read = read(text);
        assert_eq!((read.values.len(), lines(&read)), (2, vec![5]));
    }
}
