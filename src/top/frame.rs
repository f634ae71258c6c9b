//! The screen as lines of text. Pure: size and letters are arguments.

use super::model::{Model, Screen};
use super::rows::{Row, Totals};
use crate::audit::processes::Holder;

/// How a piece of a line is shown; without colours by what is left of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Look {
    /// As it is.
    Plain,
    /// Headings.
    Bold,
    /// The line of the cursor.
    Selected,
    /// Over its limit.
    Bad,
}

/// A line of the screen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Line {
    /// Its letters, none of which a terminal obeys.
    pub text: String,
    /// How it is shown.
    pub look: Look,
}

/// What the terminal has.
#[derive(Clone, Copy, Debug)]
pub struct Size {
    /// Columns.
    pub width: usize,
    /// Lines.
    pub height: usize,
    /// Its letters are of UTF-8.
    pub has_utf8: bool,
}

const BARS: [char; 8] = ['▁', '▂', '▃', '▄', '▅', '▆', '▇', '█'];
const PLAIN_BARS: [char; 8] = ['_', '.', ',', '-', '=', '+', '*', '#'];
/// Above the rows: title, totals, line of the past, headings; below: a line of keys.
const AROUND: usize = 5;

const HELP: &[&str] = &[
    "ctkeep top: who holds what on the server's side, and what the limits believe",
    "",
    "up down j k PgUp PgDn Home End   move",
    "Enter    connections of the row; in them: explain the connection",
    "Esc      back",
    "f        fold by source, network (/24, /64), port, process, container",
    "s  r     sort by the next column; the other way round",
    "/        filter by the words of ss: state close-wait and sport = :80,",
    "         dst 198.51.100.0/24, process nginx, container web, not, or, ( )",
    "p space  pause and go on",
    "a        ask the limits how many of each source their lists hold (LISTED),",
    "         by packets; asks you before it does",
    "[ ]      an earlier and a later moment, of the past (--at)",
    "q        quit",
    "",
    "OPEN     sockets of the server's side     COUNTED  entries that a limiter counts",
    "HALF     half-closed (close-wait)         WAIT     not accepted yet",
    "OLDEST   longest half-closed, where ctkeep run guards; REPAIRS of the last minute",
    "LIMIT    !50 over it, ?50 perhaps over it",
];

/// A column: heading, width, what a row has in it.
type Column = (&'static str, usize, fn(&Row) -> String);

/// In the order in which they go when the terminal is narrow: the last first.
const COLUMNS: [Column; 10] = [
    ("OPEN", 6, |row| row.open.to_string()),
    ("COUNTED", 7, |row| row.counted.to_string()),
    ("LIMIT", 6, limit),
    ("HALF", 6, |row| row.half_closed.to_string()),
    ("WAIT", 5, |row| row.waiting.to_string()),
    ("OLDEST", 7, |row| row.oldest_seconds.map_or("-".to_owned(), age)),
    ("RECV-Q", 7, |row| bytes(row.recv_queue)),
    ("SEND-Q", 7, |row| bytes(row.send_queue)),
    ("REPAIRS", 7, |row| row.repairs.map_or("-".to_owned(), |n| n.to_string())),
    ("LISTED", 6, listed),
];
/// For the name, at least.
const NAME: usize = 18;

/// The whole screen.
pub fn frame(model: &Model, size: Size) -> Vec<Line> {
    let mut lines = match &model.screen {
        Screen::Help => HELP.iter().map(|text| plain(text)).collect(),
        Screen::Text(text, first) => text
            .iter()
            .skip(*first)
            .take(size.height.saturating_sub(1))
            .map(|it| plain(it))
            .collect(),
        Screen::Details(name) => details(model, name, size),
        _ => table(model, size),
    };
    lines.truncate(size.height.saturating_sub(1));
    lines.push(foot(model));
    for line in &mut lines {
        line.text = cut(&line.text, size);
    }
    lines
}

/// Rows that fit on the screen.
pub fn page(size: Size) -> usize {
    size.height.saturating_sub(AROUND).max(1)
}

fn plain(text: &str) -> Line {
    Line { text: text.to_owned(), look: Look::Plain }
}

fn head(model: &Model, size: Size) -> Vec<Line> {
    let seen = &model.seen;
    let Totals { rows, open, counted, half_closed, waiting, over_limit } = Totals::of(&model.rows);
    let (entries, maximum) = seen.table;
    let fill = maximum.filter(|most| *most > 0).map(|most| entries * 100 / most);
    let guard = match (model.is_past, seen.is_guarded, seen.level) {
        (true, ..) => "past".to_owned(),
        (_, true, Some(level)) => format!("ctkeep run: defence {level}"),
        (_, true, None) => "ctkeep run".to_owned(),
        (_, false, _) => "no daemon".to_owned(),
    };
    let paused = if model.is_paused { "  PAUSED" } else { "" };
    let table = fill.map_or(String::new(), |fill| format!("  table {entries}, {fill}% full"));
    let fold = model.fold.name();
    vec![
        Line { text: format!("ctkeep top  {}  {guard}{table}{paused}", seen.at), look: Look::Bold },
        plain(&format!(
            "{rows} by {fold}: open {open}, counted {counted}, half-closed {half_closed}, \
             waiting {waiting}, over limit {over_limit}"
        )),
        plain(&format!("open {}", spark(&model.past, size))),
    ]
}

fn spark(past: &[usize], size: Size) -> String {
    let bars = if size.has_utf8 { BARS } else { PLAIN_BARS };
    let most = past.iter().copied().max().unwrap_or(0).max(1);
    let room = size.width.saturating_sub(20).max(1);
    let shown = past.iter().skip(past.len().saturating_sub(room));
    let bar = |open: &usize| bars.get(open * (bars.len() - 1) / most).copied().unwrap_or(' ');
    format!("{} {}", shown.map(bar).collect::<String>(), past.last().copied().unwrap_or(0))
}

/// The table for people without the screen around it: all rows, all columns.
pub fn text(rows: &[Row], fold: &str, no_header: bool) -> String {
    let names = rows.iter().map(|row| row.name.chars().count()).max().unwrap_or(0).max(NAME);
    let mut out = String::new();
    if !no_header {
        out.push_str(&format!("{}\n", heading(fold, names, COLUMNS.len(), true)));
    }
    for row in rows {
        out.push_str(format!("{}\n", line(row, names, COLUMNS.len(), true)).as_str());
    }
    out
}

fn heading(fold: &str, names: usize, columns: usize, has_process: bool) -> String {
    let mut text = format!("{:<names$}", fold.to_uppercase());
    for (heading, width, _) in COLUMNS.iter().take(columns) {
        text.push_str(&format!(" {heading:>width$}"));
    }
    if has_process {
        text.push_str("  PROCESS");
    }
    text
}

fn line(row: &Row, names: usize, columns: usize, has_process: bool) -> String {
    let mut text = format!("{:<names$}", row.name);
    for (_, width, value) in COLUMNS.iter().take(columns) {
        text.push_str(&format!(" {:>width$}", value(row)));
    }
    if has_process {
        let process = row.process.as_deref().unwrap_or("-");
        let container = row.container.as_ref().map_or(String::new(), |name| format!(" in {name}"));
        text.push_str(&format!("  {process}{container}"));
    }
    text
}

fn table(model: &Model, size: Size) -> Vec<Line> {
    let mut lines = head(model, size);
    let page = page(size);
    let first = model.at[0].saturating_sub(page.saturating_sub(1));
    let shown = || model.rows.iter().enumerate().skip(first).take(page);
    let names = shown().map(|(_, row)| row.name.chars().count()).max().unwrap_or(0).max(NAME);
    let mut room = size.width.saturating_sub(names);
    let fits = |(_, width, _): &&Column| {
        let fits = room > *width;
        room = room.saturating_sub(width + 1);
        fits
    };
    let columns = COLUMNS.iter().take_while(fits).count();
    let has_process = columns == COLUMNS.len() && room > 10;
    let text = heading(model.fold.name(), names, columns, has_process);
    lines.push(Line { text, look: Look::Bold });
    lines.extend(shown().map(|(place, row)| {
        let text = line(row, names, columns, has_process);
        let look = match row.over_limit {
            _ if place == model.at[0] => Look::Selected,
            Some(true) => Look::Bad,
            _ => Look::Plain,
        };
        Line { text, look }
    }));
    lines
}

fn details(model: &Model, name: &str, size: Size) -> Vec<Line> {
    let mut lines = head(model, size);
    let all = model.details();
    lines.pop();
    lines.push(plain(&format!("{name}: {} connections", all.len())));
    let text = format!(
        "{:<11} {:<21} {:<21} {:>7} {:>7} {}",
        "STATE", "REMOTE", "LOCAL", "RECV-Q", "SEND-Q", "ENTRY        PROCESS"
    );
    lines.push(Line { text, look: Look::Bold });
    let page = page(size);
    let first = model.at[1].saturating_sub(page.saturating_sub(1));
    for (place, connection) in all.iter().enumerate().skip(first).take(page) {
        let view = &connection.view;
        let socket = view.socket;
        let queue = |of: fn(&crate::sockdiag::Socket) -> u32| {
            socket.as_ref().map_or("-".to_owned(), |socket| bytes(of(socket).into()))
        };
        let entry = view.entry.and_then(|entry| entry.state()).map(|state| state.to_string());
        let text = format!(
            "{:<11} {:<21} {:<21} {:>7} {:>7} {:<12} {}",
            socket.map_or("-", |socket| socket.state.name()),
            view.connection.remote.to_string(),
            view.connection.local.to_string(),
            queue(|socket| socket.recv_queue),
            queue(|socket| socket.send_queue),
            entry.unwrap_or_else(|| "-".to_owned()),
            connection.holder.as_ref().map_or("-".to_owned(), Holder::process),
        );
        let look = if place == model.at[1] { Look::Selected } else { Look::Plain };
        lines.push(Line { text, look });
    }
    lines
}

fn foot(model: &Model) -> Line {
    let text = match (&model.screen, &model.complaint) {
        (Screen::Input(text), None) => format!("filter: {text}_"),
        (Screen::Input(text), Some(error)) => format!("filter: {text}_  ({error})"),
        (Screen::Question, _) => {
            "ask the limits, by packets through the host's rules? y, or any other key".to_owned()
        }
        (Screen::Help | Screen::Text(..), _) => "any other key: back".to_owned(),
        (_, Some(error)) => error.clone(),
        (Screen::Details(_), _) => "Enter explain  Esc back".to_owned(),
        (Screen::Table, _) => {
            let filter = if model.filter.0.is_empty() { "" } else { "  filter: " };
            let past = if model.is_past { "  [ ] step" } else { "  a ask" };
            format!(
                "? help  f fold  s sort: {}  / filter{past}  p pause  q quit{filter}{}",
                model.sort.name(),
                model.filter.0
            )
        }
    };
    Line { text, look: Look::Bold }
}

/// What does not fit is cut, and what a terminal would obey is no letter.
fn cut(text: &str, size: Size) -> String {
    let text = crate::audit::processes::printable(text);
    let letter = |c: char| if size.has_utf8 || c.is_ascii() { c } else { '?' };
    text.chars().take(size.width).map(letter).collect()
}

fn limit(row: &Row) -> String {
    let Some(limit) = row.limit else { return "-".to_owned() };
    match row.over_limit {
        Some(true) => format!("!{limit}"),
        None => format!("?{limit}"),
        Some(false) => limit.to_string(),
    }
}

/// `9`, and `9/10` where another limit answered than that of the column LIMIT.
fn listed(row: &Row) -> String {
    match (row.listed, row.listed_limit) {
        (None, _) => "-".to_owned(),
        (Some(count), Some(limit)) if row.limit != Some(limit) => format!("{count}/{limit}"),
        (Some(count), _) => count.to_string(),
    }
}

/// `59s`, `14m`, `3h`, `2d`
fn age(seconds: u64) -> String {
    match seconds {
        0..120 => format!("{seconds}s"),
        120..7200 => format!("{}m", seconds / 60),
        7200..172_800 => format!("{}h", seconds / 3600),
        _ => format!("{}d", seconds / 86_400),
    }
}

/// As ss shows them, until they are too many for the column.
fn bytes(bytes: u64) -> String {
    match bytes {
        0..1_000_000 => bytes.to_string(),
        1_000_000..1_000_000_000 => format!("{}M", bytes / 1_000_000),
        _ => format!("{}G", bytes / 1_000_000_000),
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::seen;
    use super::super::model::Key;
    use super::*;

    const SMALL: Size = Size { width: 80, height: 24, has_utf8: false };

    #[test]
    fn every_screen_fits_and_obeys_the_letters() {
        let mut model = Model::default();
        let mut all = seen();
        if let Some(holder) = all.connections[0].holder.as_mut() {
            holder.command = "\u{1b}[31mé".to_owned();
        }
        model.take(all);
        for size in [SMALL, Size { width: 1, height: 1, ..SMALL }, Size { width: 300, ..SMALL }] {
            for key in
                [Key::Escape, Key::Char('?'), Key::Escape, Key::Char('/'), Key::Escape, Key::Enter]
            {
                model.press(key, page(size));
                let lines = frame(&model, size);
                assert!(lines.len() <= size.height);
                for line in &lines {
                    assert!(line.text.len() <= size.width && line.text.is_ascii(), "{line:?}");
                    assert!(!line.text.contains('\u{1b}'));
                }
            }
        }
    }

    #[test]
    fn a_row_over_its_limit_shows_without_colours_too() {
        let mut model = Model::default();
        model.take(seen());
        model.rows[1].limit = Some(1);
        model.rows[1].over_limit = Some(true);
        let lines = frame(&model, SMALL);
        let row = lines.iter().find(|line| line.look == Look::Bad).unwrap();
        assert!(row.text.contains("!1"), "{}", row.text);
        assert!(lines[3].text.starts_with("SOURCE") && lines[3].text.contains("SEND-Q"));
    }
}
