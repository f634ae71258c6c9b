//! Golden files: datagrams as text, four bytes a line, a blank line between two datagrams.
//!
//! `#` begins a comment. Four bytes are what netlink aligns to, so a changed attribute shows as a
//! few changed lines.

use std::fmt::Write as _;
use std::fs;
use std::path::{Path, PathBuf};

/// Where `name` (`entries/close-wait`) is kept.
pub fn path(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name).with_extension("hex")
}

/// The names of all golden files of a folder.
pub fn names(folder: &str) -> Vec<String> {
    let mut names: Vec<String> = fs::read_dir(path(folder).with_extension(""))
        .unwrap_or_else(|error| panic!("{folder}: {error}"))
        .map(|file| file.unwrap().path())
        .filter(|path| path.extension().is_some_and(|extension| extension == "hex"))
        .map(|path| format!("{folder}/{}", path.file_stem().unwrap().to_str().unwrap()))
        .collect();
    names.sort();
    names
}

/// The datagrams of a golden file.
pub fn read(name: &str) -> Vec<Vec<u8>> {
    let path = path(name);
    let text =
        fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    parse(&text)
}

/// The datagrams in the text of one.
pub fn parse(text: &str) -> Vec<Vec<u8>> {
    let mut datagrams = vec![Vec::new()];
    for line in text.lines() {
        let bytes = line.split('#').next().unwrap();
        if line.is_empty() && !datagrams.last().unwrap().is_empty() {
            datagrams.push(Vec::new());
        }
        let bytes = bytes.split_whitespace().map(|byte| u8::from_str_radix(byte, 16).unwrap());
        datagrams.last_mut().unwrap().extend(bytes);
    }
    datagrams.retain(|datagram| !datagram.is_empty());
    datagrams
}

/// The text of a golden file.
pub fn show(comments: &[&str], datagrams: &[Vec<u8>]) -> String {
    let mut text = String::new();
    for comment in comments.iter().flat_map(|comment| comment.lines()) {
        writeln!(text, "# {comment}").unwrap();
    }
    for (index, datagram) in datagrams.iter().enumerate() {
        if index > 0 || !comments.is_empty() {
            text.push('\n');
        }
        for four in datagram.chunks(4) {
            let bytes: Vec<String> = four.iter().map(|byte| format!("{byte:02x}")).collect();
            writeln!(text, "{}", bytes.join(" ")).unwrap();
        }
    }
    text
}

/// Writes a golden file.
pub fn write(name: &str, comments: &[&str], datagrams: &[Vec<u8>]) {
    let path = path(name);
    fs::create_dir_all(path.parent().unwrap()).unwrap();
    fs::write(&path, show(comments, datagrams)).unwrap();
}

/// Holds `datagrams` against a golden file.
///
/// With `CTKEEP_BLESS=1` it writes the file instead, for a change that is meant.
///
/// # Panics
/// When they differ, with the lines that do.
pub fn assert_golden(name: &str, comment: &str, datagrams: &[Vec<u8>]) {
    if std::env::var_os("CTKEEP_BLESS").is_some_and(|value| value == "1") {
        write(name, &[comment], datagrams);
        return;
    }
    let expected = read(name);
    assert!(
        expected == datagrams,
        "{name} differs (golden -, now +; CTKEEP_BLESS=1 accepts it):\n{}",
        difference(&show(&[], &expected), &show(&[], datagrams))
    );
}

/// Both texts line by line, lines in common once: the longest common subsequence.
fn difference(golden: &str, now: &str) -> String {
    let (golden, now): (Vec<_>, Vec<_>) = (golden.lines().collect(), now.lines().collect());
    let mut common = vec![vec![0_usize; now.len() + 1]; golden.len() + 1];
    for i in (0..golden.len()).rev() {
        for j in (0..now.len()).rev() {
            common[i][j] = if golden[i] == now[j] {
                common[i + 1][j + 1] + 1
            } else {
                common[i + 1][j].max(common[i][j + 1])
            };
        }
    }
    let (mut i, mut j) = (0, 0);
    let mut text = String::new();
    while i < golden.len() || j < now.len() {
        if i < golden.len() && j < now.len() && golden[i] == now[j] {
            writeln!(text, "  {:>4}  {}", 4 * j, now[j]).unwrap();
            (i, j) = (i + 1, j + 1);
        } else if j == now.len() || i < golden.len() && common[i + 1][j] >= common[i][j + 1] {
            writeln!(text, "- {:>4}  {}", 4 * i, golden[i]).unwrap();
            i += 1;
        } else {
            writeln!(text, "+ {:>4}  {}", 4 * j, now[j]).unwrap();
            j += 1;
        }
    }
    text
}
