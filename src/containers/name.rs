//! How a container is called: by the host name that its processes see, and by the runtime and the
//! short id in the path of its control group. No runtime is asked.

use std::fs::{self, File};
use std::path::Path;
use std::thread;

use nix::sched::{CloneFlags, setns};
use nix::sys::utsname::uname;

use super::find;
use crate::host::netns::Namespace;

/// Digits of an id that people read: as `docker ps` shows it.
const SHORT: usize = 12;
/// Digits of an id in full.
const ID: usize = 64;

/// The container that a process is in; `None` where its network namespace is that of the calling
/// thread.
pub fn of(pid: i32) -> Option<String> {
    let process = Path::new("/proc").join(pid.to_string());
    let namespace = Namespace::Named(process.join("ns/net").to_str()?.to_owned());
    let (_, inode) = namespace.identity()?;
    if Namespace::Own.identity().is_none_or(|(_, own)| own == inode) {
        return None;
    }
    let runtime = fs::read_to_string(process.join("cgroup")).ok().and_then(|text| runtime(&text));
    let host = host_name(&process);
    Some(match (host, runtime) {
        (Some(host), Some(runtime)) if runtime.ends_with(&host) => runtime,
        (Some(host), Some(runtime)) => format!("{host} ({runtime})"),
        (Some(name), None) | (None, Some(name)) => name,
        (None, None) => name_of(inode).unwrap_or_else(|| format!("net:[{inode}]")),
    })
}

/// The name that somebody has given the namespace.
fn name_of(inode: u64) -> Option<String> {
    let path = find::named().remove(&inode)?;
    Some(path.file_name()?.to_str()?.to_owned())
}

/// The host name of a process that has one of its own.
fn host_name(process: &Path) -> Option<String> {
    let path = process.join("ns/uts");
    if fs::read_link(&path).ok()? == fs::read_link("/proc/self/ns/uts").ok()? {
        return None;
    }
    let file = File::open(path).ok()?;
    // A thread of its own, which ends with it.
    let name = thread::spawn(move || {
        setns(file, CloneFlags::CLONE_NEWUTS).ok()?;
        Some(uname().ok()?.nodename().to_str()?.to_owned())
    });
    name.join().ok().flatten()
}

/// Runtime and short id, or the name that is in their place, of `/proc/PID/cgroup`.
fn runtime(cgroup: &str) -> Option<String> {
    cgroup.lines().filter_map(|line| line.splitn(3, ':').nth(2)).find_map(|path| {
        let parts: Vec<&str> = path.split('/').collect();
        parts.iter().enumerate().rev().find_map(|(place, part)| {
            let part = part.strip_suffix(".scope").unwrap_or(part);
            if let Some(name) = part.strip_prefix("lxc.payload.") {
                return Some(format!("lxc {name}"));
            }
            if let Some(name) = part.strip_prefix("machine-") {
                return Some(format!("nspawn {name}"));
            }
            // `docker-ID`, `cri-containerd-ID`, `libpod-ID`; or `docker/ID`, `kubepods/.../ID`.
            let (prefix, id) = part.rsplit_once('-').unwrap_or(("", part));
            let is_id = id.len() == ID && id.bytes().all(|digit| digit.is_ascii_hexdigit());
            let before = place.checked_sub(1).and_then(|place| parts.get(place)).copied();
            match (is_id, prefix, before) {
                (false, _, Some("lxc")) => Some(format!("lxc {part}")),
                (false, ..) => None,
                (true, "", Some("docker")) => Some(format!("docker {}", id.get(..SHORT)?)),
                (true, "", _) => Some(format!("container {}", id.get(..SHORT)?)),
                (true, "libpod", _) => Some(format!("podman {}", id.get(..SHORT)?)),
                (true, "cri-containerd", _) => Some(format!("containerd {}", id.get(..SHORT)?)),
                (true, runtime, _) => Some(format!("{runtime} {}", id.get(..SHORT)?)),
            }
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_of_a_control_group_names_runtime_and_container() {
        let id = "0123456789abcdef".repeat(4);
        for (path, name) in [
            (format!("/system.slice/docker-{id}.scope"), "docker 0123456789ab"),
            (format!("/docker/{id}"), "docker 0123456789ab"),
            (format!("/docker/{id}/init"), "docker 0123456789ab"),
            (format!("/machine.slice/libpod-{id}.scope/container"), "podman 0123456789ab"),
            (
                format!("/kubepods.slice/kubepods-pod1.slice/cri-containerd-{id}.scope"),
                "containerd 0123456789ab",
            ),
            (format!("/kubepods/besteffort/pod1/{id}"), "container 0123456789ab"),
            (format!("/kubepods.slice/crio-{id}.scope"), "crio 0123456789ab"),
            ("/lxc/web".to_owned(), "lxc web"),
            ("/lxc.payload.web/system.slice".to_owned(), "lxc web"),
            ("/machine.slice/machine-web.scope/payload".to_owned(), "nspawn web"),
        ] {
            let text = format!("12:pids:/\n0::{path}\n");
            assert_eq!(runtime(&text).as_deref(), Some(name), "{path}");
        }
        assert_eq!(runtime("0::/system.slice/ssh.service\n"), None);
        assert_eq!(runtime("nonsense\n"), None);
    }
}
