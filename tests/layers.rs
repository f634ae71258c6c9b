//! Holds the source to the layers of docs/architecture.md: imports go downward only, and what is
//! meant to be pure stays pure.

// A helper of a test that meets the unexpected ends by a panic.
#![allow(clippy::unwrap_used, clippy::indexing_slicing)]

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

/// From the bottom up. A module may use those of lower rows, never a neighbour in its own.
const LAYERS: [&[&str]; 11] = [
    &["flow"],
    &["error"],
    &["netlink"],
    &["conntrack", "sockdiag", "nftables", "rtnetlink", "host", "history"],
    &["firewall", "watch", "shield", "recount", "containers", "overload"],
    &["reconcile"],
    &["audit"],
    &["doctor", "kill", "report", "top"],
    &["metrics"],
    &["daemon"],
    &["cli"],
];

/// Values and decisions: no clock, no I/O, no log. Of a folder all that is in it.
const PURE: [&str; 58] = [
    "flow.rs",
    "audit/judge",
    "audit/cover.rs",
    "audit/beyond.rs",
    "audit/families.rs",
    "audit/layers",
    "audit/proxies.rs",
    "audit/report/json.rs",
    "audit/saved",
    "audit/survey.rs",
    "audit/whose.rs",
    "conntrack/decode.rs",
    "conntrack/entry.rs",
    "doctor/judge.rs",
    "firewall/ask.rs",
    "firewall/iptables_save.rs",
    "firewall/limits",
    "firewall/matches",
    "firewall/packet.rs",
    "firewall/play",
    "firewall/ports.rs",
    "firewall/published.rs",
    "firewall/rule.rs",
    "firewall/set.rs",
    "firewall/tracking.rs",
    "firewall/value.rs",
    "firewall/xt.rs",
    "history/record.rs",
    "kill/choose.rs",
    "overload/mod.rs",
    "report/anonymous.rs",
    "report/file.rs",
    "report/rules.rs",
    "report/tables.rs",
    "top/filter.rs",
    "top/frame.rs",
    "top/model.rs",
    "top/rows.rs",
    "sockdiag/decode.rs",
    "sockdiag/silence.rs",
    "sockdiag/socket.rs",
    "reconcile/agenda.rs",
    "reconcile/backoff.rs",
    "reconcile/checks.rs",
    "reconcile/deciding.rs",
    "reconcile/evidence.rs",
    "reconcile/groups.rs",
    "reconcile/ledger",
    "reconcile/outgoing/memory.rs",
    "reconcile/outgoing/plan.rs",
    "reconcile/plan.rs",
    "reconcile/policy.rs",
    "reconcile/pressure.rs",
    "reconcile/snapshot.rs",
    "reconcile/timers.rs",
    "reconcile/uncounted.rs",
    "recount/pace.rs",
    "watch/headers.rs",
];

/// What reads a clock, talks to the world, or writes a log.
const IMPURE: [&str; 19] = [
    "Instant::now",
    ".elapsed(",
    "SystemTime",
    "tracing",
    "print!",
    "println!",
    "eprintln!",
    "dbg!",
    "std::env",
    "std::fs",
    "std::io",
    "std::process",
    "std::thread",
    "std::os",
    "tokio",
    "nix::",
    "Transport",
    "KernelSocket",
    "Conversation",
];

/// Crates that only these modules may use.
const RESERVED: [(&str, &[&str]); 7] = [
    ("aya", &["shield"]),
    ("tokio", &["daemon", "metrics"]),
    ("hyper", &["metrics"]),
    ("prometheus_client", &["metrics"]),
    ("clap", &["cli"]),
    ("crossterm", &["top"]),
    ("comfy_table", &["cli"]),
];

struct Source {
    /// Relative to `src`.
    path: PathBuf,
    /// What it says of itself.
    head: String,
    /// Without comments and the contents of literals.
    code: String,
}

impl Source {
    /// The top-level module that the file belongs to.
    fn module(&self) -> String {
        let first = self.path.iter().next().unwrap();
        Path::new(first).file_stem().unwrap().to_str().unwrap().to_owned()
    }

    /// How deep its module is below the crate: 1 for `flow.rs` and `netlink/mod.rs`.
    fn depth(&self) -> usize {
        let names = self.path.with_extension("");
        names.iter().filter(|name| *name != "mod").count()
    }

    /// The top-level modules that its paths begin at.
    fn used_modules(&self) -> BTreeSet<String> {
        roots(&self.code, "crate::").iter().map(|name| owner(name)).collect()
    }
}

/// `crate::Error` and its like are re-exports of the error module.
fn owner(name: &str) -> String {
    if name.starts_with(char::is_uppercase) { "error".to_owned() } else { name.to_owned() }
}

/// The names that follow `prefix`, one by one or in braces.
fn roots(code: &str, prefix: &str) -> Vec<String> {
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    let word = |text: &str| text.chars().take_while(|c| is_word(*c)).collect::<String>();
    let mut names = Vec::new();
    for (at, _) in code.match_indices(prefix) {
        // `$crate::` is one, `xcrate::` is not.
        if code[..at].ends_with(is_word) {
            continue;
        }
        let rest = &code[at + prefix.len()..];
        let Some(group) = rest.strip_prefix('{') else {
            names.push(word(rest));
            continue;
        };
        let mut depth = 0;
        let mut begins = true;
        for (at, c) in group.char_indices() {
            match c {
                '{' => depth += 1,
                '}' if depth == 0 => break,
                '}' => depth -= 1,
                ',' if depth == 0 => begins = true,
                c if depth == 0 && begins && is_word(c) => {
                    names.push(word(&group[at..]));
                    begins = false;
                }
                _ => {}
            }
        }
    }
    names
}

fn sources() -> Vec<Source> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("src");
    let mut folders = vec![root.clone()];
    let mut sources = Vec::new();
    while let Some(folder) = folders.pop() {
        for file in fs::read_dir(folder).unwrap() {
            let path = file.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).unwrap();
                let head = text.lines().take_while(|line| line.starts_with("//!")).collect();
                let path = path.strip_prefix(&root).unwrap().to_path_buf();
                sources.push(Source { path, head, code: stripped(&text) });
            }
        }
    }
    sources
}

/// Rust code without comments and without what stands in string and character literals.
fn stripped(code: &str) -> String {
    let mut out = String::new();
    let mut rest = code;
    while let Some(c) = rest.chars().next() {
        let skip = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            rest.find("*/").map_or(rest.len(), |end| end + 2)
        } else if let Some(length) =
            raw_string(rest).filter(|_| !out.ends_with(char::is_alphanumeric))
        {
            length
        } else if c == '"' {
            1 + quoted(&rest[1..], '"')
        } else if c == '\'' {
            character(rest)
        } else {
            out.push(c);
            c.len_utf8()
        };
        rest = &rest[skip..];
    }
    out
}

/// Length of the raw string literal that `text` begins with.
fn raw_string(text: &str) -> Option<usize> {
    let hashes = text.strip_prefix('r')?;
    let count = hashes.chars().take_while(|c| *c == '#').count();
    let body = hashes[count..].strip_prefix('"')?;
    let end = format!("\"{}", "#".repeat(count));
    Some(1 + count + 1 + body.find(&end).map_or(body.len(), |at| at + end.len()))
}

/// Bytes until behind the closing quote.
fn quoted(text: &str, quote: char) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices() {
        if c == quote && !escaped {
            return at + 1;
        }
        escaped = c == '\\' && !escaped;
    }
    text.len()
}

/// Length of the character literal that `text` begins with; 1 where it is a lifetime.
fn character(text: &str) -> usize {
    let mut chars = text.char_indices().skip(1);
    match (chars.next(), chars.next()) {
        (Some((_, '\\')), _) => 1 + quoted(&text[1..], '\''),
        (Some(_), Some((at, '\''))) => at + 1,
        _ => 1,
    }
}

fn rank(module: &str) -> Option<usize> {
    LAYERS.iter().position(|layer| layer.contains(&module))
}

#[test]
fn every_module_has_its_layer() {
    for source in sources() {
        let module = source.module();
        let outside = ["lib", "main"].contains(&module.as_str());
        assert!(outside || rank(&module).is_some(), "{}: no layer", source.path.display());
    }
}

#[test]
fn imports_go_downward_only() {
    let mut seen = 0;
    for source in sources() {
        let module = source.module();
        // lib.rs names every module, and main.rs is above all.
        let Some(own) = rank(&module) else { continue };
        for used in source.used_modules() {
            let other = rank(&used)
                .unwrap_or_else(|| panic!("{} uses {used}: no layer", source.path.display()));
            assert!(
                used == module || other < own,
                "{}: {module} must not use {used}",
                source.path.display()
            );
            seen += 1;
        }
    }
    assert!(seen > 50, "only {seen} imports found: the search is broken");
}

#[test]
fn nobody_climbs_to_the_root_by_super() {
    // Such a path would be hidden from the test above.
    for source in sources() {
        // Unit tests are one module deeper.
        let code = source.code.split("#[cfg(test)]").next().unwrap();
        let climb = "super::".repeat(source.depth());
        let is_root = ["lib", "main"].contains(&source.module().as_str());
        assert!(is_root || !code.contains(&climb), "{}: {climb}", source.path.display());
    }
}

#[test]
fn what_is_pure_has_no_clock_no_io_and_no_log() {
    let sources = sources();
    for path in PURE {
        let mut of_it = sources.iter().filter(|source| source.path.starts_with(path)).peekable();
        assert!(of_it.peek().is_some(), "src/{path} is gone");
        for source in of_it {
            let path = source.path.display();
            // Tests may read a clock.
            let code = source.code.split("#[cfg(test)]").next().unwrap();
            for word in IMPURE {
                assert!(!code.contains(word), "src/{path}: {word}");
            }
            // What a daemon says of itself is a value.
            let code = code.replace("crate::host::instance::Shielded", "");
            assert!(!roots(&code, "crate::").contains(&"host".to_owned()), "src/{path} uses host");
        }
    }
}

#[test]
fn what_calls_itself_pure_is_held_to_it() {
    let is_held = |source: &Source| PURE.iter().any(|path| source.path.starts_with(path));
    let says_so = |source: &&Source| source.head.contains("Pure");
    let sources = sources();
    let unheld: Vec<_> = sources.iter().filter(says_so).filter(|it| !is_held(it)).collect();
    let unheld: Vec<_> = unheld.iter().map(|source| source.path.display()).collect();
    assert!(unheld.is_empty(), "{unheld:?}");
}

#[test]
fn metrics_publish_and_ask_the_kernel_nothing() {
    for source in sources().iter().filter(|source| source.module() == "metrics") {
        for word in ["Transport", "KernelSocket", "Tables", "sysctl"] {
            assert!(!source.code.contains(word), "{}: {word}", source.path.display());
        }
    }
}

#[test]
fn heavy_crates_stay_where_they_belong() {
    for source in sources() {
        for (name, modules) in RESERVED {
            let used = source.code.contains(&format!("{name}::"));
            assert!(
                !used || modules.contains(&source.module().as_str()),
                "{}: {name}",
                source.path.display()
            );
        }
    }
}

mod the_search_itself {
    use super::*;

    #[test]
    fn names_are_found_one_by_one_and_in_braces() {
        let code = "use crate::a::b; use crate::{c::{d, e}, f, Error}; fn x() { crate::g::h() }";
        assert_eq!(roots(code, "crate::"), ["a", "c", "f", "Error", "g"]);
        assert_eq!(owner("Error"), "error");
    }

    #[test]
    fn comments_and_literals_are_no_code() {
        let code = "a // crate::b\n/* c */ \"d \\\" e\" r#\"f \" g\"# '\"' h '\\'' i::<'j> k";
        let words: Vec<_> = stripped(code).split_whitespace().map(str::to_owned).collect();
        assert_eq!(words, ["a", "h", "i::<j>", "k"]);
    }

    #[test]
    fn depth_is_that_of_the_module() {
        for (path, depth) in [("flow.rs", 1), ("netlink/mod.rs", 1), ("audit/cover.rs", 2)] {
            let (head, code) = (String::new(), String::new());
            let source = Source { path: PathBuf::from(path), head, code };
            assert_eq!(source.depth(), depth, "{path}");
        }
    }
}
