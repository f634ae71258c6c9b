//! Namespaces behind this one that are no process behind a published port: routed as they are, known by a name alone,
//! and at their end while they are entered.

use std::fs;
use std::net::{Shutdown, TcpListener};
use std::path::Path;
use std::time::{Duration, Instant};

use socket2::SockRef;

use crate::faults::{Failing, has_strace};
use crate::found::wrapped;
use crate::lab::guests::{self, Guest, INSIDE, LIMIT};
use crate::lab::{Lab, Server, process, wait_for};
use crate::scene::CTKEEP;

const SOON: Duration = Duration::from_secs(20);

#[test]
fn a_container_that_is_routed_is_guarded_over_both_families() {
    let Some(lab) = Lab::new() else { return };
    guests::limit(&lab);
    lab.server.run(&format!(
        "ip6tables -A FORWARD -p tcp --syn --dport {INSIDE} -m connlimit --connlimit-above {LIMIT} \
         --connlimit-mask 128 -j DROP"
    ));
    let container = lab.container();
    lab.client.run("ip route add 10.0.0.0/24 via 192.0.2.1");
    lab.client.run("ip -6 route add fd00::/64 via 2001:db8::1");
    let _server = Server::start(&container, &format!("[::]:{INSIDE}"));
    let gain = |number: u8, is_guarded| {
        let ways = [
            (format!("198.51.100.{number}"), "10.0.0.2"),
            (format!("2001:db8:1::{number}"), "fd00::2"),
        ];
        ways.map(|(source, to)| guests::gain(&lab, &lab.peer_to(&source, to), INSIDE, is_guarded))
    };
    assert_eq!(gain(7, false), [LIMIT; 2], "the control");
    let daemon = lab.daemon(CTKEEP, &[]);
    assert_eq!(gain(8, true), [0; 2], "{}", daemon.log());
}

/// The process that has its sockets is elsewhere, and none runs in it.
#[test]
fn a_namespace_without_a_process_is_found_by_its_name() {
    for folder in [None, Some("/run/netns"), Some("/run/docker/netns")] {
        let Some(lab) = Lab::new() else { return };
        guests::limit(&lab);
        let namespace = guests::attach(&lab, 1);
        guests::publish(&lab, 1);
        let listener = namespace.within(|| TcpListener::bind(("0.0.0.0", INSIDE)).expect("a port"));
        let ours = listener.try_clone().expect("a descriptor");
        let accepting = std::thread::spawn(move || {
            listener.incoming().map_while(Result::ok).collect::<Vec<_>>()
        });
        let name = folder.map_or_else(String::new, |folder| {
            let path = namespace.path();
            format!(
                "mkdir -p {folder} && touch {folder}/web && mount --bind {path} {folder}/web && "
            )
        });
        // Only this daemon sees the name.
        let before = format!(
            "exec unshare --mount sh -c 'mount -t tmpfs tmpfs /run && {name}exec \"$0\" \"$@\"'"
        );
        let (_folder, daemon) = wrapped(&lab, &before);
        let (is_found, peer) = (folder.is_some(), lab.peer("198.51.100.7"));
        let gained = guests::gain(&lab, &peer, guests::port(1), is_found);
        // Without a name it is the control.
        assert_eq!(gained, if is_found { 0 } else { LIMIT }, "{folder:?}: {}", daemon.log());
        SockRef::from(&ours).shutdown(Shutdown::Both).expect("the end of the listener");
        accepting.join().expect("its connections");
    }
}

/// The namespace that a thread of the daemon is about to enter, if it is held there: its inode's link.
fn entering(pid: u32) -> Option<String> {
    /// `setns` of x86-64 and of what has the table that newer ones share.
    const SETNS: &str = if cfg!(target_arch = "x86_64") { "308" } else { "268" };
    let process = Path::new("/proc").join(pid.to_string());
    fs::read_dir(process.join("task")).ok()?.flatten().find_map(|task| {
        // The call's number, and its arguments.
        let call = fs::read_to_string(task.path().join("syscall")).ok()?;
        let mut words = call.split(' ');
        let is_it = words.next() == Some(SETNS);
        let descriptor = words.next().filter(|_| is_it)?.strip_prefix("0x")?;
        let descriptor = u32::from_str_radix(descriptor, 16).ok()?;
        let link = fs::read_link(process.join(format!("fd/{descriptor}"))).ok()?;
        Some(link.to_str()?.to_owned())
    })
}

/// `strace` holds the daemon before it enters, and its processes end meanwhile. The daemon alone keeps it then, and
/// its sockets are of no process.
#[test]
fn a_namespace_whose_processes_end_while_it_is_entered_is_let_go() {
    let Some(lab) = Lab::new() else { return };
    if !has_strace() {
        return;
    }
    guests::limit(&lab);
    let bystander = Guest::start(&lab, 1);
    let daemon = lab.daemon(CTKEEP, &[]);
    let pid = daemon.pid();
    assert_eq!(bystander.gain(&lab, &lab.peer("198.51.100.7"), true), 0, "{}", daemon.log());
    wait_for("a question", SOON, || daemon.log().contains("source=198.51.100.7"));
    let open = process::descriptors_at_rest(pid);
    let threads = process::status(pid).remove("Threads");

    let slow = Failing::attach_to_each(pid, "setns", "delay_enter=1500000");
    let Guest { namespace, server, .. } = Guest::start(&lab, 2);
    let link = format!("/proc/{}/ns/net", server.pid());
    let link = fs::read_link(link).expect("its namespace").to_str().map(str::to_owned);
    assert!(link.is_some());
    wait_for("the daemon before it", SOON, || entering(pid) == link);
    server.kill();
    drop(namespace);
    let ended = Instant::now();
    assert_eq!(entering(pid), link, "it is held there still");
    wait_for("its entry", SOON, || entering(pid).is_none());
    slow.detach();
    wait_for("its end in the daemon", SOON, || process::descriptors(pid) <= open);
    // The kernel takes the device away with the namespace, once nobody keeps that.
    wait_for("its end", SOON, || lab.server.try_run("ip link show guest2").is_err());
    eprintln!("let go after {:?}", ended.elapsed());
    assert_eq!(process::status(pid).remove("Threads"), threads, "threads");

    // At the same address, in another namespace.
    let again = Guest::start_again(&lab, 2);
    for (guest, source) in [(&bystander, "198.51.100.8"), (&again, "198.51.100.9")] {
        assert_eq!(guest.gain(&lab, &lab.peer(source), true), 0, "{}", daemon.log());
    }
    let (status, log) = daemon.term();
    assert!(status.success() && !log.contains("ERROR") && !log.contains("WARN"), "{log}");
}
