//! What the operator has asked the table to show, and what each key does to it. Pure.

use super::filter::Filter;
use super::rows::{Fold, Row, Seen, Sort};
use crate::flow::Connection;

/// Looks whose sum the line at the top shows.
const LOOKS: usize = 120;

/// A key of the operator.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Key {
    /// A letter, a digit, a sign.
    Char(char),
    /// The others that are of use.
    Up,
    /// One row down.
    Down,
    /// A screen up.
    PageUp,
    /// A screen down.
    PageDown,
    /// To the first.
    Home,
    /// To the last.
    End,
    /// Into it.
    Enter,
    /// Out of it.
    Escape,
    /// Takes the last letter back.
    Backspace,
}

/// The screens.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum Screen {
    /// The rows.
    #[default]
    Table,
    /// The connections of one row.
    Details(String),
    /// A text, and its first line on the screen.
    Text(Vec<String>, usize),
    /// The keys.
    Help,
    /// A filter is being typed.
    Input(String),
    /// Whether limits are to be asked.
    Question,
}

/// What the program is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Wish {
    /// Show the screen anew.
    Show,
    /// End.
    Quit,
    /// Look at once, and ask the limits.
    Ask,
    /// Explain this connection, from the server to the peer.
    Explain(Connection),
    /// Another moment of the past: so many steps on, or back.
    Step(i32),
}

/// The table as the operator wants it.
#[derive(Debug, Default)]
pub struct Model {
    /// The newest look; the one that is shown while it is paused.
    pub seen: Seen,
    /// What rows stand for.
    pub fold: Fold,
    /// What they are sorted by.
    pub sort: Sort,
    /// The smallest first.
    pub is_reversed: bool,
    /// The filter as it was typed, and as it was read.
    pub filter: (String, Filter),
    /// New looks are not shown.
    pub is_paused: bool,
    /// The screen that is shown.
    pub screen: Screen,
    /// The row of the cursor: in the table, in the details.
    pub at: [usize; 2],
    /// What went wrong last.
    pub complaint: Option<String>,
    /// Open sockets of the last looks.
    pub past: Vec<usize>,
    /// The rows.
    pub rows: Vec<Row>,
    /// It shows the past.
    pub is_past: bool,
}

impl Model {
    /// Takes a new look in.
    pub fn take(&mut self, seen: Seen) {
        if self.is_paused {
            return;
        }
        let name = self.selected().map(|row| row.name.clone());
        self.seen = seen;
        self.sort_rows();
        // The cursor stays with its source.
        let place = name.and_then(|name| self.rows.iter().position(|row| row.name == name));
        self.at[0] = place.unwrap_or(self.at[0]);
        self.past.push(self.seen.open());
        let surplus = self.past.len().saturating_sub(LOOKS);
        self.past.drain(..surplus);
        self.complaint = None;
        self.stay_inside();
    }

    /// The row of the cursor.
    pub fn selected(&self) -> Option<&Row> {
        self.rows.get(self.at[0])
    }

    /// The connections of the row that is looked into.
    pub fn details(&self) -> Vec<&super::rows::Shown> {
        match &self.screen {
            Screen::Details(name) => self.seen.members(self.fold, &self.filter.1, name),
            _ => Vec::new(),
        }
    }

    fn sort_rows(&mut self) {
        self.rows = self.seen.rows(self.fold, &self.filter.1, self.sort, self.is_reversed);
    }

    /// Sorts, folds and filters anew.
    pub fn arrange(&mut self) {
        self.sort_rows();
        self.stay_inside();
    }

    fn stay_inside(&mut self) {
        let details = self.details().len();
        for (at, count) in self.at.iter_mut().zip([self.rows.len(), details]) {
            *at = (*at).min(count.saturating_sub(1));
        }
    }

    /// What a key does; `page` is how many rows are on the screen.
    pub fn press(&mut self, key: Key, page: usize) -> Wish {
        match std::mem::take(&mut self.screen) {
            Screen::Input(text) => self.type_in(text, key),
            Screen::Question => match key {
                Key::Char('y') => return Wish::Ask,
                _ => self.complaint = Some("nothing was asked".to_owned()),
            },
            Screen::Help => {}
            Screen::Text(lines, first) => {
                if let Some(first) = moved(key, first, lines.len(), page) {
                    self.screen = Screen::Text(lines, first);
                }
            }
            Screen::Details(name) => {
                self.screen = Screen::Details(name);
                return self.press_in_details(key, page);
            }
            Screen::Table => return self.press_in_table(key, page),
        }
        Wish::Show
    }

    fn press_in_table(&mut self, key: Key, page: usize) -> Wish {
        match key {
            Key::Char('q') => return Wish::Quit,
            Key::Char('?' | 'h') => self.screen = Screen::Help,
            Key::Char('p' | ' ') => self.is_paused = !self.is_paused,
            Key::Char('s') => self.sort = self.sort.next(),
            Key::Char('r') => self.is_reversed = !self.is_reversed,
            Key::Char('f') => self.fold = self.fold.next(),
            Key::Char('/') => self.screen = Screen::Input(self.filter.0.clone()),
            Key::Char('a') if !self.is_past => self.screen = Screen::Question,
            Key::Char('[') if self.is_past => return Wish::Step(-1),
            Key::Char(']') if self.is_past => return Wish::Step(1),
            Key::Enter => {
                if let Some(row) = self.selected() {
                    self.screen = Screen::Details(row.name.clone());
                    self.at[1] = 0;
                }
            }
            key => {
                if let Some(at) = moved(key, self.at[0], self.rows.len(), page) {
                    self.at[0] = at;
                }
            }
        }
        self.arrange();
        Wish::Show
    }

    fn press_in_details(&mut self, key: Key, page: usize) -> Wish {
        let details = self.details();
        let chosen = details.get(self.at[1]).map(|connection| connection.view.connection);
        let count = details.len();
        match (key, chosen) {
            (Key::Enter | Key::Char('e'), Some(flow)) if !self.is_past => {
                return Wish::Explain(flow);
            }
            (Key::Char('p' | ' '), _) => self.is_paused = !self.is_paused,
            (key, _) => match moved(key, self.at[1], count, page) {
                Some(at) => self.at[1] = at,
                None => self.screen = Screen::Table,
            },
        }
        Wish::Show
    }

    fn type_in(&mut self, mut text: String, key: Key) {
        match key {
            Key::Escape => return,
            Key::Enter => match Filter::parse(&text) {
                Ok(filter) => {
                    self.filter = (text, filter);
                    self.complaint = None;
                    self.arrange();
                    return;
                }
                Err(error) => self.complaint = Some(error),
            },
            Key::Backspace => drop(text.pop()),
            Key::Char(letter) => text.push(letter),
            _ => {}
        }
        self.screen = Screen::Input(text);
    }
}

/// Where a key moves a cursor among `count` lines; `None` for one that leaves.
fn moved(key: Key, at: usize, count: usize, page: usize) -> Option<usize> {
    let last = count.saturating_sub(1);
    match key {
        Key::Up | Key::Char('k') => Some(at.saturating_sub(1)),
        Key::Down | Key::Char('j') => Some((at + 1).min(last)),
        Key::PageUp => Some(at.saturating_sub(page)),
        Key::PageDown => Some((at + page).min(last)),
        Key::Home => Some(0),
        Key::End => Some(last),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::super::fixture::seen;
    use super::*;

    fn model() -> Model {
        let mut model = Model::default();
        model.take(seen());
        model
    }

    fn press(model: &mut Model, keys: &str) {
        for key in keys.chars() {
            let key = match key {
                '\n' => Key::Enter,
                '<' => Key::Escape,
                letter => Key::Char(letter),
            };
            model.press(key, 10);
        }
    }

    #[test]
    fn keys_fold_sort_filter_and_look_into_a_row() {
        let mut model = model();
        assert_eq!(model.selected().unwrap().name, "198.51.100.7/32");
        press(&mut model, "ff");
        assert_eq!((model.fold, model.selected().unwrap().name.as_str()), (Fold::Port, ":80"));
        press(&mut model, "/state close-wait\n");
        assert_eq!(model.rows.iter().map(|row| row.open).collect::<Vec<_>>(), [2]);
        press(&mut model, "\n");
        assert_eq!(model.details().len(), 2);
        assert!(matches!(model.press(Key::Enter, 10), Wish::Explain(_)));
        press(&mut model, "<");
        assert_eq!(model.screen, Screen::Table);
        press(&mut model, "/ nonsense\n");
        assert!(model.complaint.is_some() && matches!(model.screen, Screen::Input(_)));
    }

    #[test]
    fn limits_are_asked_after_a_question_and_never_about_the_past() {
        let mut model = model();
        press(&mut model, "a");
        assert_eq!(model.screen, Screen::Question);
        assert_eq!(model.press(Key::Char('n'), 10), Wish::Show);
        press(&mut model, "a");
        assert_eq!(model.press(Key::Char('y'), 10), Wish::Ask);
        model.is_past = true;
        press(&mut model, "a");
        assert_eq!(model.screen, Screen::Table);
        assert_eq!(model.press(Key::Char('['), 10), Wish::Step(-1));
    }

    #[test]
    fn a_pause_keeps_what_is_shown_and_the_cursor_stays_with_its_source() {
        let mut model = model();
        model.press(Key::Down, 10);
        let name = model.selected().unwrap().name.clone();
        let mut next = seen();
        next.connections.drain(..3);
        press(&mut model, "p");
        model.take(next);
        assert_eq!(model.rows.len(), 3);
        press(&mut model, "p");
        let mut next = seen();
        next.connections.drain(..3);
        model.take(next);
        assert_eq!((model.rows.len(), &model.selected().unwrap().name), (2, &name));
        model.take(Seen::default());
        assert!(model.selected().is_none());
        press(&mut model, "\njk");
    }
}
