//! Kernel modules that are missing: which package of this distribution brings them.

use std::fs;
use std::path::Path;

/// What to do where `modprobe` finds no such module, in one line.
#[must_use]
pub fn advice() -> String {
    let release = nix::sys::utsname::uname()
        .map(|name| name.release().to_string_lossy().into_owned())
        .unwrap_or_default();
    let installed = Path::new("/lib/modules").join(&release).exists();
    let os = fs::read_to_string("/etc/os-release").unwrap_or_default();
    line(&release, installed, &os)
}

fn line(release: &str, installed: bool, os: &str) -> String {
    if !installed {
        return format!(
            "the modules of the running kernel are not here (/lib/modules/{release}): after an \
             upgrade of the kernel reboot; in a container load them on the host"
        );
    }
    match package(release, os) {
        Some(package) => format!("a module that is not found is in the package {package}"),
        None => format!("a module that is not found is in another package of kernel {release}"),
    }
}

/// By the distribution itself, else by the one that it says it is like.
fn package(release: &str, os: &str) -> Option<String> {
    let ids = ["ID=", "ID_LIKE="].into_iter().flat_map(|key| {
        let value = os.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default();
        value.trim_matches('"').split(' ')
    });
    ids.filter_map(|id| match id {
        "ubuntu" => Some(format!("linux-modules-extra-{release}")),
        "debian" => Some(format!("linux-image-{release}")),
        // It brings kernel-modules with it.
        "fedora" | "rhel" | "centos" => Some(format!("kernel-modules-extra-{release}")),
        "suse" | "opensuse" => Some("kernel-default (not kernel-default-base)".to_owned()),
        _ => None,
    })
    .next()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_package_is_that_of_the_distribution_or_of_the_one_it_is_like() {
        let of = |os: &str| package("6.8.0-31", os);
        assert_eq!(of("NAME=x\nID=debian\n").as_deref(), Some("linux-image-6.8.0-31"));
        let ubuntu = of("ID=ubuntu\nID_LIKE=debian\n");
        assert_eq!(ubuntu.as_deref(), Some("linux-modules-extra-6.8.0-31"));
        let rocky = of("ID=\"rocky\"\nID_LIKE=\"rhel centos fedora\"\n");
        assert_eq!(rocky.as_deref(), Some("kernel-modules-extra-6.8.0-31"));
        assert_eq!(of("ID=arch\n"), None);
        assert!(line("6.8.0-31", false, "ID=debian\n").contains("reboot"));
    }
}
