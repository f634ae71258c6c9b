//! A client that says anything to the metrics' server.

#![no_main]

use std::sync::{Arc, LazyLock};

use ctkeep::metrics::{Metrics, http};
use libfuzzer_sys::fuzz_target;
use tokio::io::{AsyncReadExt, AsyncWriteExt, duplex};
use tokio::runtime::{Builder, Runtime};

static METRICS: LazyLock<Arc<Metrics>> =
    LazyLock::new(|| Arc::new(Metrics::new(false)));
static RUNTIME: LazyLock<Runtime> =
    LazyLock::new(|| Builder::new_current_thread().enable_time().build().expect("a runtime"));

const STATUSES: [&str; 8] = ["200", "400", "404", "405", "414", "431", "501", "503"];

fuzz_target!(|bytes: &[u8]| {
    let answer = RUNTIME.block_on(async {
        let (mut client, server) = duplex(4096);
        let talk = async {
            let (mut reader, mut writer) = tokio::io::split(&mut client);
            let mut answer = Vec::new();
            let write = async {
                // A server that has enough hangs up.
                let _ = writer.write_all(bytes).await;
                let _ = writer.shutdown().await;
            };
            let (_, read) = tokio::join!(write, reader.read_to_end(&mut answer));
            read.expect("a pipe");
            answer
        };
        tokio::join!(http::converse(server, METRICS.clone()), talk).1
    });
    if answer.is_empty() {
        return;
    }
    let head = String::from_utf8_lossy(&answer[..answer.len().min(12)]);
    let (version, status) = head.split_at_checked(9).expect("a status line");
    assert!(matches!(version, "HTTP/1.1 " | "HTTP/1.0 "), "{head}");
    assert!(STATUSES.contains(&status), "{head}");
    // A request has 14 bytes at least, a page stays below 64 KiB.
    assert!(answer.len() <= (bytes.len() / 14 + 1) * 65536, "{} bytes", answer.len());
});
