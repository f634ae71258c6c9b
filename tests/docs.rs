//! Every link from one of our pages leads to a file, and to a heading of it; every source that one
//! names is there.

use std::collections::HashSet;
use std::fs;
use std::path::{Path, PathBuf};

#[test]
fn every_link_leads_somewhere() {
    let mut dead = Vec::new();
    for page in pages() {
        let text = fs::read_to_string(&page).expect("a page");
        for link in links(&text) {
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let beside = page.parent().expect("a folder").join(file);
            let target = if file.is_empty() { page.clone() } else { beside };
            let leads =
                target.exists() && (heading.is_empty() || headings(&target).contains(heading));
            if !leads {
                dead.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(dead.is_empty(), "dead links:\n{}", dead.join("\n"));
}

#[test]
fn every_source_that_is_named_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut seen, mut gone) = (0, Vec::new());
    for page in pages() {
        let text = fs::read_to_string(&page).expect("a page");
        // The changelog names what was there.
        let is_history = page.ends_with("CHANGELOG.md");
        for name in text.split('`').skip(1).step_by(2).filter(|_| !is_history) {
            if name.contains('/') && name.ends_with(".rs") {
                seen += 1;
                if !root.join(name).exists() && !root.join("src").join(name).exists() {
                    gone.push(format!("{}: {name}", page.display()));
                }
            }
        }
    }
    assert!(gone.is_empty(), "gone:\n{}", gone.join("\n"));
    assert!(seen > 50, "only {seen} names found: the search is broken");
}

fn pages() -> Vec<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let folders = [root.to_owned(), root.join("docs"), root.join("docs/adr")];
    let files = folders.iter().flat_map(|folder| fs::read_dir(folder).expect("a folder"));
    let files = files.map(|file| file.expect("a file").path());
    files.filter(|file| file.extension().is_some_and(|end| end == "md")).collect()
}

/// `[text](target)`, those of the web left out; a text may be broken over lines.
fn links(text: &str) -> impl Iterator<Item = &str> {
    let ends = text.split("](").skip(1).filter_map(|rest| rest.split_once(')'));
    ends.map(|(target, _)| target).filter(|target| !target.contains("://"))
}

/// Anchors of a page as GitHub makes them.
fn headings(page: &Path) -> HashSet<String> {
    let text = fs::read_to_string(page).unwrap_or_default();
    let titles = text.lines().filter(|line| line.starts_with('#'));
    let titles = titles.map(|line| line.trim_start_matches('#').trim().to_lowercase());
    let kept = |letter: &char| letter.is_alphanumeric() || "-_ ".contains(*letter);
    titles.map(|title| title.chars().filter(kept).collect::<String>().replace(' ', "-")).collect()
}
