//! The command line, and the file that it names.

#![no_main]

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;

use ctkeep::cli;
use libfuzzer_sys::fuzz_target;

// Arguments, one a line, up to a zero; then the file.
fuzz_target!(|bytes: &[u8]| {
    let mut parts = bytes.splitn(2, |byte| *byte == 0);
    let typed = parts.next().unwrap_or_default();
    let file = String::from_utf8_lossy(parts.next().unwrap_or_default());
    let args = || {
        let typed =
            typed.split(|byte| *byte == b'\n').map(|line| OsString::from_vec(line.to_vec()));
        std::iter::once("ctkeep".into()).chain(typed)
    };
    let check = || cli::check(args(), |_| Ok(file.to_string())).map(|meant| format!("{meant:?}"));
    match (check(), check()) {
        (Ok(one), Ok(other)) => assert_eq!(one, other),
        (Err(one), Err(other)) => {
            assert!(!one.to_string().trim().is_empty());
            assert_eq!(one.to_string(), other.to_string());
        }
        (one, other) => panic!("{one:?} and {other:?}"),
    }
});
