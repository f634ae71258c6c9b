//! The terminal: draws frames, hears keys, and leaves everything as it was, however it ends.

use std::io::{self, Write};
use std::sync::mpsc::{self, RecvTimeoutError};
use std::thread;
use std::time::Duration;

use crossterm::cursor::{Hide, MoveTo, Show};
use crossterm::event::{Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers, poll, read};
use crossterm::style::{Attribute, Color, Print, SetAttribute, SetForegroundColor};
use crossterm::terminal::{
    Clear, ClearType, EnterAlternateScreen, LeaveAlternateScreen, disable_raw_mode,
    enable_raw_mode, size,
};
use crossterm::{execute, queue};

use nix::time::{ClockId, clock_gettime};

use super::frame::{Line, Look, Size, frame, page};
use super::model::{Key, Model, Screen, Wish};
use super::rows::Seen;
use crate::error::{Op, Result};
use crate::flow::Connection;

/// The program may cost a tenth of a core: after each look so many times of what has been used of a
/// processor since the last one pass until the next. Sorting and drawing are in it, too; nine times
/// were 10.1 % with 2 000 000 entries.
const REST: u32 = 10;
/// From glance to glance at what has come from the thread that looks.
const GLANCE: Duration = Duration::from_millis(100);

/// The moment that is to be looked at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// The present.
    Now,
    /// The present, with the limits asked.
    Ask,
    /// So many steps from the moment of the past that is shown.
    Step(i32),
}

/// What the terminal can show.
#[derive(Clone, Copy, Debug)]
pub struct Means {
    /// Its letters are of UTF-8.
    pub has_utf8: bool,
    /// Colours are wanted.
    pub has_colour: bool,
}

/// Runs until the operator has enough. `look` fetches what is shown, every `interval`, or only at
/// each step where there is none; `explain` writes about one connection.
///
/// # Errors
/// The terminal is gone, or the first look fails.
pub fn run(
    mut model: Model,
    means: Means,
    interval: Option<Duration>,
    mut look: impl FnMut(Order) -> Result<Seen> + Send,
    explain: impl Fn(Connection) -> Vec<String>,
) -> Result<()> {
    let op = Op::new("use the terminal");
    // Before the screen is taken: what is missing is said as everywhere.
    model.take(look(Order::Now)?);
    let mut before = used();
    let mut cost = before;
    let (orders, inbox) = mpsc::channel::<Order>();
    let (results, outbox) = mpsc::channel::<Result<Seen>>();
    thread::scope(|scope| {
        scope.spawn(move || {
            loop {
                let order = match interval {
                    Some(interval) => inbox.recv_timeout(interval.max(cost * REST)),
                    None => inbox.recv().map_err(|_| RecvTimeoutError::Disconnected),
                };
                let order = match order {
                    Ok(order) => order,
                    Err(RecvTimeoutError::Timeout) => Order::Now,
                    Err(RecvTimeoutError::Disconnected) => return,
                };
                let seen = look(order);
                let now = used();
                cost = now.saturating_sub(before);
                before = now;
                if results.send(seen).is_err() {
                    return;
                }
            }
        });
        let taken = Taken::take().map_err(|error| op.io(error));
        let ended = taken.and_then(|_taken| {
            let mut is_new = true;
            loop {
                let size = Size {
                    has_utf8: means.has_utf8,
                    ..size().map(sized).map_err(|error| op.io(error))?
                };
                while let Ok(seen) = outbox.try_recv() {
                    is_new = true;
                    match seen {
                        Ok(seen) => model.take(seen),
                        Err(error) => model.complaint = Some(error.to_string()),
                    }
                }
                if is_new {
                    draw(&frame(&model, size), means).map_err(|error| op.io(error))?;
                }
                is_new = poll(GLANCE).map_err(|error| op.io(error))?;
                let event = if is_new { Some(read().map_err(|error| op.io(error))?) } else { None };
                let Some(Event::Key(event)) = event else { continue };
                let Some(key) = key(event) else { continue };
                let wish =
                    if is_interrupt(event) { Wish::Quit } else { model.press(key, page(size)) };
                match wish {
                    Wish::Show => {}
                    Wish::Quit => return Ok(()),
                    Wish::Ask => {
                        model.complaint = Some("asking the limits".to_owned());
                        _ = orders.send(Order::Ask);
                    }
                    Wish::Step(by) => _ = orders.send(Order::Step(by)),
                    Wish::Explain(flow) => model.screen = Screen::Text(explain(flow), 0),
                }
            }
        });
        drop(orders);
        ended
    })
}

/// Time of a processor that this process has used, the kernel's on its behalf included.
fn used() -> Duration {
    clock_gettime(ClockId::CLOCK_PROCESS_CPUTIME_ID).map_or(Duration::ZERO, Duration::from)
}

fn sized((width, height): (u16, u16)) -> Size {
    Size { width: width.into(), height: height.into(), has_utf8: false }
}

/// The screen and the keys are ours as long as this lives.
struct Taken;

impl Taken {
    fn take() -> io::Result<Self> {
        enable_raw_mode()?;
        let this = Self;
        execute!(io::stdout(), EnterAlternateScreen, Hide)?;
        Ok(this)
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let _ = execute!(io::stdout(), Show, LeaveAlternateScreen);
        let _ = disable_raw_mode();
    }
}

/// In one write, line over line: nothing flickers.
fn draw(lines: &[Line], means: Means) -> io::Result<()> {
    let mut out = Vec::new();
    for (row, line) in (0..).zip(lines) {
        queue!(out, MoveTo(0, row))?;
        match line.look {
            Look::Plain => {}
            Look::Bold => queue!(out, SetAttribute(Attribute::Bold))?,
            Look::Selected => queue!(out, SetAttribute(Attribute::Reverse))?,
            Look::Bad if means.has_colour => queue!(out, SetForegroundColor(Color::Red))?,
            Look::Bad => queue!(out, SetAttribute(Attribute::Bold))?,
        }
        queue!(
            out,
            Print(&line.text),
            SetAttribute(Attribute::Reset),
            Clear(ClearType::UntilNewLine)
        )?;
    }
    let behind = u16::try_from(lines.len()).unwrap_or(u16::MAX);
    queue!(out, MoveTo(0, behind), Clear(ClearType::FromCursorDown))?;
    let mut stdout = io::stdout().lock();
    stdout.write_all(&out)?;
    stdout.flush()
}

fn is_interrupt(event: KeyEvent) -> bool {
    event.code == KeyCode::Char('c') && event.modifiers.contains(KeyModifiers::CONTROL)
}

fn key(event: KeyEvent) -> Option<Key> {
    if event.kind == KeyEventKind::Release {
        return None;
    }
    Some(match event.code {
        KeyCode::Char(letter) => Key::Char(letter),
        KeyCode::Up => Key::Up,
        KeyCode::Down => Key::Down,
        KeyCode::PageUp => Key::PageUp,
        KeyCode::PageDown => Key::PageDown,
        KeyCode::Home => Key::Home,
        KeyCode::End => Key::End,
        KeyCode::Enter => Key::Enter,
        KeyCode::Esc => Key::Escape,
        KeyCode::Backspace => Key::Backspace,
        _ => return None,
    })
}
