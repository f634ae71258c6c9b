//! A text of entries: which lines belong together, and what events leave behind. Pure.

use std::collections::{HashMap, HashSet};

use super::conntrack::{Item, Kind, is_broken_word, is_complete, is_continued_by, is_start, item};
use super::filter::Filter;
use super::lines::{Line, Text};
use super::{CUT_SHORT, Mistake, Parsed};
use crate::conntrack::{Entry, EntryKey};
use crate::flow::FourTuple;

/// A mailer breaks one line into this many at most.
const PIECES: usize = 8;

/// Entries of a text.
#[derive(Clone, Debug, Default)]
pub struct Entries {
    /// TCP entries that are in the table at the end of the text.
    pub values: Vec<Entry>,
    /// What became of the other lines.
    pub parsed: Parsed,
    /// Events alone: of a connection that they do not mention nothing is known. Holds those that
    /// they do, each as the reply tuple has it.
    pub mentioned: Option<HashSet<FourTuple>>,
    /// Entries that are listed before others begin to be listed again, and not afterwards: those
    /// that ended between two looks are among them.
    pub outdated: HashSet<EntryKey>,
    /// Lines of entries that could not be read.
    pub unread: usize,
    /// A filter has left entries out, or the text was cut off.
    pub is_part: bool,
    /// How many entries the tool says it has shown, in all runs together; of all protocols.
    pub shown: usize,
    /// How many of these are not in the text, where no `grep` of it explains that.
    pub lacking: usize,
    /// Of the commands that list them. What none of them asked for is not missing.
    pub filters: Vec<Filter>,
    /// The tool's last line says that the table is empty.
    pub is_empty_table: bool,
    /// They are those of a report: no filter has left any out, and the kernel's flags of each are known.
    pub is_of_report: bool,
    /// The tool's own words where it failed.
    pub failure: Option<(usize, String)>,
}

/// Reads entries as `conntrack -L`, `conntrack -E` and `/proc/net/nf_conntrack` print them.
pub(super) fn entries(text: &Text) -> Entries {
    let mut entries = Entries::default();
    let mut last: HashMap<EntryKey, usize> = HashMap::new();
    let mut values: Vec<Option<Entry>> = Vec::new();
    let mut mentioned = HashSet::new();
    let mut is_list = false;
    let mut again = Again::default();
    let records = records(&text.lines, &mut entries);
    let end = records.last().map(|line| line.number);
    let count = records.len();
    for line in records {
        // The last port of a line that was cut off goes on, that of a text that was may.
        let ends_in_port =
            line.text.split_whitespace().next_back().is_some_and(|it| it.starts_with("dport="));
        let is_open = text.open_end.is_some() && Some(line.number) == end;
        let is_cut = |entry: &Entry| ends_in_port && (is_open || lacks_digits(entry));
        let read = item(&line.text).and_then(|item| match item {
            Item::Tcp(_, entry) if entry.is_translated() && is_cut(&entry) => {
                Err(Mistake::new(CUT_SHORT, "the end of the reply tuple may be missing"))
            }
            item => Ok(item),
        });
        let (kind, entry) = match read {
            Ok(Item::Tcp(kind, entry)) => (kind, *entry),
            Ok(Item::Other(name)) => {
                entries.parsed.pass(protocol(&name));
                continue;
            }
            Err(mistake) => {
                entries.unread += 1;
                entries.parsed.mistaken(line.number, mistake);
                continue;
            }
        };
        mentioned.insert(entry.reply);
        let before = last.get(&entry.key()).copied();
        match kind {
            Kind::Dying => entries.parsed.pass("dying"),
            Kind::Destroyed => {
                entries.parsed.read += 1;
                if let Some(slot) = before.and_then(|at| values.get_mut(at)) {
                    *slot = None;
                }
            }
            Kind::Listed | Kind::Changed => {
                entries.parsed.read += 1;
                if kind == Kind::Listed {
                    is_list = true;
                    again.note(entry.key(), line.number);
                }
                match before.and_then(|at| values.get_mut(at)) {
                    Some(slot) => *slot = Some(entry),
                    None => {
                        last.insert(entry.key(), values.len());
                        values.push(Some(entry));
                    }
                }
            }
        }
    }
    entries.filters = text.commands.iter().filter_map(|command| Filter::of(command)).collect();
    if !entries.filters.iter().any(Filter::is_search) {
        entries.lacking = entries.shown.saturating_sub(count);
    }
    entries.is_part = text.is_shortened
        || entries.parsed.is_cut_off(end)
        || entries.filters.iter().any(|filter| filter.leaves_out);
    entries.outdated = again.outdated();
    entries.parsed.mistakes.sort_by_key(|(line, _)| *line);
    entries.values = values.into_iter().flatten().collect();
    let is_history = !is_list && !mentioned.is_empty() && !entries.is_empty_table;
    entries.mentioned = is_history.then_some(mentioned);
    entries
}

/// Whether the reply's last port is that of the client without its last digits.
fn lacks_digits(entry: &Entry) -> bool {
    let (client, last) = (entry.orig.src, entry.reply.dst);
    client.addr() == last.addr() && client.port().to_string().starts_with(&last.port().to_string())
}

/// Entries that are listed more than once: a text with several looks (a log, `watch`).
#[derive(Default)]
struct Again {
    /// The last line of each.
    last: HashMap<EntryKey, usize>,
    /// The first line that shows one again.
    first: Option<usize>,
    /// How many are shown again.
    count: usize,
}

impl Again {
    fn note(&mut self, key: EntryKey, line: usize) {
        if self.last.insert(key, line).is_some() {
            self.count += 1;
            self.first.get_or_insert(line);
        }
    }

    /// None where a few come twice, as in a dump that began a bucket of the table anew.
    fn outdated(self) -> HashSet<EntryKey> {
        let is_several = self.count * 2 >= self.last.len();
        let Some(first) = self.first.filter(|_| is_several) else { return HashSet::new() };
        self.last.into_iter().filter(|(_, line)| *line < first).map(|(key, _)| key).collect()
    }
}

/// Protocols by the names that are counted.
fn protocol(name: &str) -> &'static str {
    const NAMES: [&str; 8] = ["udp", "icmp", "icmpv6", "udplite", "sctp", "dccp", "gre", "igmp"];
    NAMES.into_iter().find(|known| *known == name).unwrap_or("of other protocols")
}

/// The number in the tool's last line: `conntrack v1.4.8 (conntrack-tools): 3 flow entries have been shown.`
fn shown(told: &str) -> usize {
    let before = told.split_once(" flow entries have been shown").map(|(before, _)| before);
    let number = before.and_then(|before| before.rsplit(' ').next()?.parse().ok());
    number.unwrap_or_default()
}

/// Puts lines together that a mailer has broken; passes over what the tool says of itself.
fn records(lines: &[Line], entries: &mut Entries) -> Vec<Line> {
    let mut records: Vec<(Line, usize)> = Vec::new();
    // The beginning of an entry that what the tool says of itself has torn apart: stdout and stderr in one
    // file, of which one waits until 4 KiB are full.
    let mut torn: Option<Line> = None;
    for line in lines {
        let head = torn.take();
        let is_whole = |text: &str| is_start(text) && is_complete(text);
        let is_torn = |head: &Line| !(is_whole(&head.text) && is_start(&line.text));
        let line = match head {
            Some(head) if is_torn(&head) => {
                let text = format!("{}{:3$}{}", head.text, "", line.text, line.indent);
                &Line { text, ..head }
            }
            head => {
                records.extend(head.map(|head| (head, 1)));
                line
            }
        };
        let text = line.text.as_str();
        if let Some((head, told)) = text.split_once("conntrack v")
            && !head.is_empty()
            && told.ends_with("flow entries have been shown.")
        {
            entries.shown += shown(told);
            torn = Some(Line { text: head.to_owned(), ..*line });
            continue;
        }
        if is_start(text) {
            records.push((line.clone(), 1));
            continue;
        }
        if text.contains("flow entries have been shown") || text.starts_with("conntrack v") {
            entries.is_empty_table |= text.contains(": 0 flow entries");
            entries.shown += shown(text);
            let failed = text.split_once("Operation failed: ").map(|(_, why)| why.to_owned());
            entries.failure = entries.failure.take().or(failed.map(|why| (line.number, why)));
            continue;
        }
        let is_broken =
            records.last().is_some_and(|(record, _)| is_broken_word(&record.text, text));
        match records.last_mut() {
            Some((record, pieces))
                if *pieces < PIECES
                    && (!is_complete(&record.text) || is_continued_by(text) || is_broken) =>
            {
                if !is_broken {
                    record.text.push(' ');
                }
                record.text.push_str(text);
                *pieces += 1;
            }
            // The end of what the tool says of itself, broken off.
            _ if text.ends_with("have been shown.") => {}
            _ => entries.parsed.mistaken(line.number, Mistake::new("not understood", "no entry")),
        }
    }
    records.extend(torn.map(|head| (head, 1)));
    records.into_iter().map(|(line, _)| line).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conntrack::{TcpState, Zone};

    fn read(text: &str) -> Entries {
        entries(&Text::of(text.as_bytes()))
    }

    fn line(head: &str, port: u16) -> String {
        format!(
            "{head} src=198.51.100.7 dst=192.0.2.1 sport={port} dport=8080 \
             src=192.0.2.1 dst=198.51.100.7 sport=8080 dport={port} [ASSURED]\n"
        )
    }

    #[test]
    fn lines_that_a_terminal_has_broken_are_put_together_whatever_its_width() {
        let text = "ipv4     2 tcp      6 431999 ESTABLISHED src=198.51.100.7 dst=192.0.2.1 sport=46569 \
            dport=80 packets=12 bytes=3456 src=192.0.2.1 dst=198.51.100.7 sport=8080 dport=46569 packets=1 \
            bytes=52 [ASSURED] mark=0 zone=3 use=1\n\
            ipv6     10 tcp      6 59 CLOSE_WAIT src=2001:db8:1::7 dst=2001:db8::1 sport=45507 dport=80 \
            src=2001:db8::1 dst=2001:db8:1::7 sport=80 dport=45507 [ASSURED] mark=0 use=1\n\
            conntrack v1.4.8 (conntrack-tools): 2 flow entries have been shown.\n";
        let whole = read(text);
        assert_eq!(whole.values.len(), 2);
        for width in 70..text.len() {
            for is_trimmed in [false, true] {
                let mut broken = String::new();
                for line in text.lines() {
                    for piece in line.as_bytes().chunks(width) {
                        let piece = std::str::from_utf8(piece).unwrap();
                        broken.push_str(if is_trimmed { piece.trim_end() } else { piece });
                        broken.push('\n');
                    }
                }
                assert_eq!(read(&broken).values, whole.values, "{width}:\n{broken}");
            }
        }
    }

    #[test]
    fn a_line_that_is_cut_in_its_last_port_is_no_translated_entry() {
        let whole = line("tcp 6 100 ESTABLISHED", 46569);
        let at = whole.find("dport=46569").unwrap();
        for digits in 1..5 {
            let cut = format!("{}\n", &whole[..at + "dport=".len() + digits]);
            let read = read(&format!("{cut}{cut}"));
            assert_eq!(read.values, [], "{cut}");
            assert!(read.parsed.mistakes.iter().all(|(_, it)| it.kind == CUT_SHORT));
        }
        let is_event = whole.replace(" [ASSURED]", "");
        assert_eq!(read(&is_event).values.len(), 1, "the control: whole, as events end");
    }

    #[test]
    fn entries_are_read_in_either_form() {
        let text = "ipv4     2 tcp      6 117 CLOSE_WAIT src=198.51.100.7 dst=192.0.2.1 sport=4000 \
            dport=80 src=192.0.2.1 dst=198.51.100.7 sport=8080 dport=4000 [ASSURED] mark=0 zone=3 use=1\n\
            tcp      6 9 CLOSE src=2001:db8:1::7 dst=2001:db8::1 sport=4000 dport=80 \
            src=2001:db8::1 dst=2001:db8:1::7 sport=80 dport=4000 mark=0 use=1\n\
            udp      17 29 src=192.0.2.2 dst=192.0.2.1 sport=1 dport=53 [UNREPLIED] src=192.0.2.1 \
            dst=192.0.2.2 sport=53 dport=1 mark=0 use=1\n\
            conntrack v1.4.8 (conntrack-tools): 3 flow entries have been shown.\n\
            tcp      6 9 HALF src=192.0.2.2 dst=192.0.2.1 sport=1 dport=53 src=192.0.2.1 \
            dst=192.0.2.2 sport=53 dport=1\n\
            tcp      6 9 CLOSE src=2001:db8:1::7 dst=2001:db8::1 sport=4000\n";
        let read = read(text);
        let [translated, plain] = read.values.as_slice() else { panic!("{read:?}") };
        assert!(translated.is_translated() && translated.zone == Zone::both(3));
        assert_eq!(plain.state(), Some(TcpState::Close));
        assert_eq!(read.parsed.passed, [("udp", 1)].into());
        let lines: Vec<_> = read.parsed.mistakes.iter().map(|(line, _)| *line).collect();
        assert_eq!(lines, [5, 6]);
        assert_eq!(read.mentioned, None);
    }

    #[test]
    fn an_entry_is_whole_wherever_the_tool_speaks_in_the_middle_of_it() {
        let [first, second, third] = [1, 2, 3].map(|port| line("tcp      6 60 CLOSE_WAIT", port));
        let told = "conntrack v1.4.8 (conntrack-tools): 3 flow entries have been shown.\n";
        for cut in 0..=second.len() {
            let (head, rest) = second.split_at(cut);
            let read = read(&format!("{first}{head}{told}{rest}{third}"));
            let ports: Vec<_> = read.values.iter().map(|entry| entry.orig.src.port()).collect();
            assert_eq!((ports, read.parsed.mistakes.len()), (vec![1, 2, 3], 0), "{head}|{rest}");
        }
    }

    #[test]
    fn the_count_of_the_tool_shows_how_many_entries_are_not_there() {
        let [one, two] = [1, 2].map(|port| line("tcp      6 60 CLOSE_WAIT", port));
        let udp = "udp 17 29 src=192.0.2.2 dst=192.0.2.1 sport=1 dport=53 [UNREPLIED] src=192.0.2.1 \
            dst=192.0.2.2 sport=53 dport=1 mark=0 use=1\n";
        let unread = one.replace("dport=8080 src", "dport=x src");
        let told =
            |n| format!("conntrack v1.4.8 (conntrack-tools): {n} flow entries have been shown.\n");
        let (head, rest) = two.split_at(40);
        for (text, lacking) in [
            (format!("{one}{two}"), 0),
            (format!("{one}{two}{}", told(2)), 0),
            (format!("{}{one}{two}", told(3)), 1),
            (format!("{one}{head}{}{rest}", told(4)), 2),
            // Of other protocols, and those that could not be read, are there.
            (format!("{one}{udp}{unread}{}", told(3)), 0),
            (format!("{one}{udp}{unread}{}", told(5)), 2),
            // Of several runs: each family, or one after the other.
            (format!("{one}{}{two}{}", told(1), told(1)), 0),
            (format!("{one}{two}{}{one}{}", told(2), told(2)), 1),
            // Events behind the list are more.
            (format!("{one}{}[UPDATE] {two}", told(1)), 0),
            // What a search for numbers has not looked for is known.
            (format!("$ conntrack -L | grep 8080\n{one}{}", told(9)), 0),
            (format!("$ conntrack -L -p tcp --dport 8080\n{one}{}", told(9)), 8),
        ] {
            assert_eq!(read(&text).lacking, lacking, "{text}");
        }
    }

    #[test]
    fn the_last_event_counts_and_an_end_removes() {
        let text = [
            line("    [NEW] tcp      6 120 SYN_SENT", 1),
            line(" [UPDATE] tcp      6 432000 ESTABLISHED", 1),
            line("    [NEW] tcp      6 120 SYN_SENT", 2),
            line(" [UPDATE] tcp      6 60 CLOSE_WAIT", 2),
            line("[DESTROY] tcp      6 CLOSE_WAIT", 2),
            line("[DESTROY] tcp      6", 3),
            line("[1748509201.118871]\t [UPDATE] tcp 6 10 CLOSE", 1),
        ];
        let read = read(&text.concat());
        let [entry] = read.values.as_slice() else { panic!("{read:?}") };
        assert_eq!((entry.orig.src.port(), entry.state()), (1, Some(TcpState::Close)));
        assert_eq!(read.mentioned.map(|flows| flows.len()), Some(3));
    }

    #[test]
    fn a_list_with_events_behind_it_is_a_list_brought_up_to_date() {
        let text = line("tcp      6 431990 ESTABLISHED", 1)
            + &line("tcp      6 431990 ESTABLISHED", 2)
            + &line("tcp      6 CLOSE", 4)
            + &line("[DESTROY] tcp      6", 2);
        let read = read(&text);
        assert_eq!(read.values.len(), 1);
        assert_eq!((read.mentioned, read.parsed.passed), (None, [("dying", 1)].into()));
    }

    #[test]
    fn lines_that_a_mailer_has_broken_are_put_together() {
        let text = line("tcp      6 431990 ESTABLISHED", 1) + &line("tcp      6 9 CLOSE", 2);
        let broken =
            text.replace(" sport", "\nsport").replace(" [ASS", "\n[ASS").replace("6 9", "6\n9");
        let read = read(&broken);
        assert_eq!(read.values.len(), 2, "{broken}");
        assert!(read.parsed.mistakes.is_empty(), "{read:?}");
    }

    #[test]
    fn what_the_tool_says_of_itself_is_heard() {
        let empty = read("conntrack v1.4.8 (conntrack-tools): 0 flow entries have been shown.\n");
        assert!(empty.is_empty_table && empty.mentioned.is_none());
        let failed =
            read("conntrack v1.4.8 (conntrack-tools): Operation failed: sorry, you must be root\n");
        assert_eq!(failed.failure, Some((1, "sorry, you must be root".to_owned())));
    }
}
