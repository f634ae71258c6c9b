//! The program that prints the rules of iptables-legacy.

use std::path::Path;
use std::process::{Command, Stdio};
use std::{fs, io};

use super::Family;

/// Where it is looked for beside PATH: the PATH of a service or of an ordinary user may leave
/// these out.
const FOLDERS: [&str; 4] = ["/usr/sbin", "/sbin", "/usr/local/sbin", "/usr/bin"];

/// What it prints of a family; `None` where the kernel has no such tables. It reads only tables
/// that exist, so it makes none.
///
/// # Errors
/// There are some, and no such program is there, or it failed.
pub fn read(family: Family, arguments: &[&str]) -> Result<Option<String>, String> {
    let (names, tool) = match family {
        Family::Ip6 => ("/proc/thread-self/net/ip6_tables_names", "ip6tables"),
        _ => ("/proc/thread-self/net/ip_tables_names", "iptables"),
    };
    let tables = match fs::read_to_string(names) {
        Ok(tables) if !tables.trim().is_empty() => tables,
        // The kernel has them, and only root and its group may know which.
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => {
            return Err(format!("{names}: {error}"));
        }
        _ => return Ok(None),
    };
    let Some(program) = find(tool) else {
        let tables: Vec<_> = tables.split_whitespace().collect();
        return Err(format!(
            "legacy rules in table {}: no {tool}-legacy-save, nor an {tool}-save of that kind; \
             install iptables",
            tables.join(", ")
        ));
    };
    match run(&program, arguments) {
        Ok(output) if output.status.success() => {
            Ok(Some(String::from_utf8_lossy(&output.stdout).into_owned()))
        }
        Ok(output) => Err(format!("legacy rules: {program}: {}", output.status)),
        Err(error) => Err(format!("legacy rules: {program}: {error}")),
    }
}

/// By its own name, or by the common one where that is not the build for nf_tables.
fn find(tool: &str) -> Option<String> {
    let legacy = format!("{tool}-legacy-save");
    if let Some(program) = candidates(&legacy).into_iter().find(|program| answers(program)) {
        return Some(program);
    }
    candidates(&format!("{tool}-save")).into_iter().find(|program| {
        run(program, &["-V"]).is_ok_and(|output| {
            let version = String::from_utf8_lossy(&output.stdout);
            // Builds from before there were two say no kind at all.
            output.status.success() && version.contains(" v") && !version.contains("nf_tables")
        })
    })
}

fn answers(program: &str) -> bool {
    run(program, &["-V"]).is_ok_and(|output| output.status.success())
}

fn candidates(name: &str) -> Vec<String> {
    let there = FOLDERS.iter().map(|folder| format!("{folder}/{name}"));
    let there = there.filter(|path| Path::new(path).exists());
    std::iter::once(name.to_owned()).chain(there).collect()
}

fn run(program: &str, arguments: &[&str]) -> io::Result<std::process::Output> {
    Command::new(program).args(arguments).stdin(Stdio::null()).stderr(Stdio::null()).output()
}
