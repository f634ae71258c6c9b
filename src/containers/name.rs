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

/// Runtime and short id, or the name that is in their place, of `/proc/PID/cgroup`. The innermost counts:
/// a container may hold others.
fn runtime(cgroup: &str) -> Option<String> {
    cgroup.lines().filter_map(|line| line.splitn(3, ':').nth(2)).find_map(|path| {
        let parts: Vec<&str> = path.split('/').collect();
        (0..parts.len()).rev().find_map(|place| {
            let before = place.checked_sub(1).and_then(|place| parts.get(place)).copied();
            of_part(parts.get(place)?, before)
        })
    })
}

/// What one part of the path says, behind the one before it.
fn of_part(part: &str, before: Option<&str>) -> Option<String> {
    let unit = part.strip_suffix(".scope").unwrap_or(part);
    // `docker-ID`, `libpod-ID`, `libpod-payload-ID` (podman under systemd), `crio-ID`, `...:cri-containerd:ID`; or
    // `docker/ID`, `kubepods/.../ID`.
    let (prefix, id) = unit.rsplit_once(['-', ':']).unwrap_or(("", unit));
    if id.len() == ID && id.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        let runtime = match prefix.rsplit(':').next()? {
            "" if before == Some("docker") => "docker",
            "" => "container",
            "cri-containerd" => "containerd",
            prefix if prefix.starts_with("libpod") => "podman",
            prefix => prefix,
        };
        return Some(format!("{runtime} {}", id.get(..SHORT)?));
    }
    if let Some(name) = unit.strip_prefix("lxc.payload.") {
        return Some(format!("lxc {name}"));
    }
    if matches!(before, Some("lxc" | "lxc.payload")) {
        return Some(format!("lxc {part}"));
    }
    let scope = part.strip_suffix(".scope").and_then(|unit| unit.strip_prefix("machine-"));
    let service = || part.strip_suffix(".service")?.strip_prefix("systemd-nspawn@");
    let name = scope.or_else(service)?.replace("\\x2d", "-");
    let is_libvirts = name.starts_with("qemu-") || name.starts_with("lxc-");
    Some(format!("{} {name}", if is_libvirts { "libvirt" } else { "nspawn" }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_path_of_a_control_group_names_runtime_and_container() {
        let id = "0123456789abcdef".repeat(4);
        for (path, name) in [
            // Docker: systemd, cgroupfs, rootless, one in another, under Kubernetes.
            ("/system.slice/docker-ID.scope", "docker 0123456789ab"),
            ("/docker/ID", "docker 0123456789ab"),
            ("/docker/ID/init", "docker 0123456789ab"),
            (
                "/user.slice/user-1000.slice/user@1000.service/user.slice/docker-ID.scope",
                "docker 0123456789ab",
            ),
            ("/lxc.payload.ci/docker/ID", "docker 0123456789ab"),
            ("/kubepods/burstable/pod1b2c/docker-ID.scope", "docker 0123456789ab"),
            // podman: systemd, cgroupfs, rootless, in a pod, as a unit of systemd.
            ("/machine.slice/libpod-ID.scope/container", "podman 0123456789ab"),
            ("/libpod_parent/libpod-ID", "podman 0123456789ab"),
            (
                "/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-ID.scope/container",
                "podman 0123456789ab",
            ),
            ("/machine.slice/machine-libpod_pod_ID.slice/libpod-ID.scope", "podman 0123456789ab"),
            ("/system.slice/web.service/libpod-payload-ID", "podman 0123456789ab"),
            // containerd: Kubernetes by systemd, with runc's name for it, and by cgroupfs; nerdctl.
            (
                "/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod1b2c_3d.slice/cri-containerd-ID.scope",
                "containerd 0123456789ab",
            ),
            (
                "/system.slice/containerd.service/kubepods-besteffort-pod1b2c.slice:cri-containerd:ID",
                "containerd 0123456789ab",
            ),
            ("/kubepods/besteffort/pod1b2c-3d/ID", "container 0123456789ab"),
            ("/../../kubepods-pod1b2c.slice/cri-containerd-ID.scope", "containerd 0123456789ab"),
            ("/system.slice/nerdctl-ID.scope", "nerdctl 0123456789ab"),
            ("/default/ID", "container 0123456789ab"),
            // CRI-O: systemd, with a group of its own below, and cgroupfs.
            ("/kubepods.slice/kubepods-besteffort.slice/crio-ID.scope", "crio 0123456789ab"),
            ("/kubepods.slice/kubepods-pod1b2c.slice/crio-ID.scope/container", "crio 0123456789ab"),
            ("/kubepods/besteffort/pod1b2c/crio-ID", "crio 0123456789ab"),
            // LXC 2, 3, and 4 with LXD and Incus; Proxmox.
            ("/lxc/web", "lxc web"),
            ("/lxc.payload/web", "lxc web"),
            ("/lxc.payload.web", "lxc web"),
            ("/lxc.payload.web-1/system.slice/nginx.service", "lxc web-1"),
            ("/lxc/101/ns/system.slice/nginx.service", "lxc 101"),
            // nspawn, by hand and as a unit; libvirt.
            ("/machine.slice/machine-web.scope", "nspawn web"),
            (
                "/machine.slice/machine-my\\x2dweb.scope/payload/system.slice/a.service",
                "nspawn my-web",
            ),
            ("/machine.slice/systemd-nspawn@web.service/payload", "nspawn web"),
            ("/machine.slice/machine-lxc\\x2d7\\x2dweb.scope", "libvirt lxc-7-web"),
        ] {
            let path = path.replace("ID", &id);
            // Version 2; version 1, a line for each controller; both.
            for text in [
                format!("0::{path}\n"),
                format!("12:pids:{path}\n3:net_cls,net_prio:{path}\n1:name=systemd:{path}\n"),
                format!("12:pids:/\n1:name=systemd:{path}\n0::/\n"),
            ] {
                assert_eq!(runtime(&text).as_deref(), Some(name), "{text}");
            }
        }
        for path in ["/", "/system.slice/machine-shop.service", "/machine.slice/machine-a.slice/b"]
        {
            assert_eq!(runtime(&format!("0::{path}\n")), None, "{path}");
        }
        assert_eq!(runtime("0::/system.slice/ssh.service\n"), None);
        assert_eq!(runtime("nonsense\n"), None);
    }
}
