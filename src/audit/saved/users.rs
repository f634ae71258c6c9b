//! What `ss` prints behind the addresses: processes, timer, owner, inode, cookie. Pure.
//!
//! A process gives itself any name of 15 bytes, also one that looks like a field of ss
//! (`a ino:7 sk:9 b`), so the names are cut out before any field is looked for.

use std::collections::BTreeMap;

use crate::audit::processes::Holder;

/// The fields behind the addresses. `None`: not printed.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Extras {
    /// Who holds the socket (`-p`).
    pub holder: Option<Holder>,
    /// Owner (`-e`; root's is not printed).
    pub uid: Option<u32>,
    /// Inode (`-e`).
    pub inode: Option<u32>,
    /// Cookie (`-e`).
    pub cookie: Option<u64>,
}

const USERS: &str = "users:((";
/// The last field whose value may hold anything: the path of a control group.
const CGROUP: &str = "cgroup:";

/// Whether a line that begins so goes on with a socket, as mailers break them.
pub(super) fn is_continued_by(line: &str) -> bool {
    line.starts_with("users:(") || line.split_whitespace().next().is_some_and(is_field)
}

/// Reads the fields.
pub(super) fn extras(rest: &str) -> Extras {
    let mut extras = Extras::default();
    let fields = match users(rest) {
        Some((before, users, after)) => {
            extras.holder = holder(users);
            format!("{before} {after}")
        }
        None => rest.to_owned(),
    };
    for word in fields.split_whitespace().take_while(|word| !word.starts_with(CGROUP)) {
        let value = |key: &str| word.strip_prefix(key);
        if let Some(text) = value("uid:") {
            extras.uid = extras.uid.or(text.parse().ok());
        } else if let Some(text) = value("ino:") {
            extras.inode = extras.inode.or(text.parse().ok());
        } else if let Some(text) = value("sk:") {
            extras.cookie = extras.cookie.or(u64::from_str_radix(text, 16).ok());
        }
    }
    extras
}

/// What stands before the group of processes, the group without its brackets, what stands behind.
fn users(rest: &str) -> Option<(&str, &str, &str)> {
    let start = rest.find(USERS)?;
    let before = rest.get(..start)?;
    if before.contains(CGROUP) {
        return None;
    }
    let group = rest.get(start + USERS.len()..)?;
    let ends = group.match_indices("))").map(|(at, _)| at).filter(|at| {
        group.get(..*at).is_some_and(|inside| inside.ends_with(|c: char| c.is_ascii_digit()))
    });
    let after = |at: usize| group.get(at + 2..).unwrap_or_default();
    // A name may end the group before its end; only behind the true one are fields alone.
    let end = ends.clone().find(|at| are_fields(after(*at))).or_else(|| ends.clone().last())?;
    Some((before, group.get(..end)?, after(end)))
}

fn are_fields(text: &str) -> bool {
    let mut words = text.split_whitespace().take_while(|word| !word.starts_with(CGROUP));
    (text.is_empty() || text.starts_with(' ')) && !text.contains('"') && words.all(is_field)
}

fn is_field(word: &str) -> bool {
    let is = |key: &str, letters: fn(&char) -> bool| {
        word.strip_prefix(key).is_some_and(|value| value.chars().all(|letter| letters(&letter)))
    };
    is("uid:", char::is_ascii_digit)
        || is("ino:", char::is_ascii_digit)
        || is("sk:", char::is_ascii_hexdigit)
        || is("fwmark:0x", char::is_ascii_hexdigit)
        || is("v6only:", char::is_ascii_digit)
        || word.starts_with("timer:(") && word.ends_with(')')
        || word.starts_with(CGROUP)
        // Which directions are shut down.
        || matches!(word, "<->" | "-->" | "<--" | "---")
}

/// `"httpd",pid=902,fd=9),("httpd",pid=903,fd=9`, or `"httpd",902,9` as older ones print it.
fn holder(users: &str) -> Option<Holder> {
    let mut processes: BTreeMap<i32, String> = BTreeMap::new();
    let mut rest = users.strip_prefix('"');
    while let Some(text) = rest {
        let found = text.match_indices("\",").find_map(|(at, _)| {
            let behind = text.get(at + 2..)?;
            let (pid, behind) = number(behind.strip_prefix("pid=").unwrap_or(behind))?;
            behind.starts_with(',').then_some((at, pid, behind))
        });
        let Some((at, pid, behind)) = found else { break };
        processes.entry(pid).or_insert_with(|| text.get(..at).unwrap_or_default().to_owned());
        rest = behind.split_once("),(\"").map(|(_, next)| next);
    }
    let count = processes.len();
    let (pid, command) = processes.into_iter().next()?;
    Some(Holder { pid, command, processes: count, container: None })
}

fn number(text: &str) -> Option<(i32, &str)> {
    let end = text.find(|letter: char| !letter.is_ascii_digit()).unwrap_or(text.len());
    Some((text.get(..end)?.parse().ok()?, text.get(end..)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(rest: &str) -> (String, i32, usize) {
        let holder = extras(rest).holder.unwrap_or_else(|| panic!("no holder in {rest}"));
        (holder.command, holder.pid, holder.processes)
    }

    #[test]
    fn a_name_is_never_taken_for_a_field() {
        for name in [
            "node /srv/app a",
            "nginx: worker p",
            "a ino:7 sk:9 b",
            "c sk:9 uid:0",
            "say \"hi\"",
            "\",pid=1,fd=2))",
            "\",pid=1,fd=2)) ",
            ")) ino:7 sk:9",
            "1)) ino:7 sk:9",
            "users:((\"x\"",
            "cgroup:/x",
            "1)) cgroup:",
        ] {
            let rest =
                format!("users:((\"{name}\",pid=35,fd=9)) uid:33 ino:3004 sk:5 cgroup:/a b <->");
            let read = extras(&rest);
            assert_eq!(
                (read.inode, read.uid, read.cookie),
                (Some(3004), Some(33), Some(5)),
                "{rest}"
            );
            let old = format!("users:((\"{name}\",35,9)) uid:33 ino:3004 sk:5");
            assert_eq!(extras(&old).inode, Some(3004), "{old}");
        }
    }

    #[test]
    fn processes_are_counted_once_and_named_by_the_lowest() {
        let two = "users:((\"Web Content (x)\",pid=33,fd=9),(\"Web Content (x)\",pid=32,fd=9),\
            (\"Web Content (x)\",pid=32,fd=10))";
        assert_eq!(named(two), ("Web Content (x)".to_owned(), 32, 2));
        assert_eq!(
            named("timer:(keepalive,9sec,0) users:((\"sshd\",1234,3))"),
            ("sshd".to_owned(), 1234, 1)
        );
        assert_eq!(extras("users:((").holder, None);
        assert_eq!(extras("cgroup:/users:((\"x\",pid=1,fd=2)) ino:3").inode, None);
    }
}
