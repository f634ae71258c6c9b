//! Compiles the packet program of the shield where there is a clang for it, and leaves the shield
//! out where there is none.

use std::env;
use std::path::{Path, PathBuf};
use std::process::Command;

const SOURCE: &str = "src/shield/shield.bpf.c";

fn main() {
    println!("cargo::rustc-check-cfg=cfg(shield)");
    println!("cargo::rerun-if-changed={SOURCE}");
    println!("cargo::rerun-if-env-changed=CLANG");
    match compile() {
        Ok(()) => println!("cargo::rustc-cfg=shield"),
        Err(reason) => println!("cargo::warning=built without the shield: {reason}"),
    }
}

fn compile() -> Result<(), String> {
    let clang = env::var_os("CLANG").unwrap_or_else(|| "clang".into());
    let Some(program) = find(Path::new(&clang)) else {
        // Installing it changes one of these.
        for folder in folders() {
            println!("cargo::rerun-if-changed={}", folder.display());
        }
        return Err("no clang; Debian's packages clang and libbpf-dev have what it takes".into());
    };
    println!("cargo::rerun-if-changed={}", program.display());
    // Headers that are installed later.
    let headers = Path::new("/usr/include");
    if !headers.join("bpf/bpf_helpers.h").exists() {
        println!("cargo::rerun-if-changed={}", headers.display());
    }
    let object = PathBuf::from(env::var_os("OUT_DIR").unwrap_or_default()).join("shield.bpf.o");
    let mut command = Command::new(&program);
    command.args(["-target", "bpf", "-mcpu=v2", "-O2", "-g", "-Wall", "-Wextra", "-Werror"]);
    // Debian keeps asm/types.h in a folder of the machine's; bpf is no machine that clang knows one for.
    command.arg("-isystem").arg(headers.join(format!("{}-linux-gnu", env::consts::ARCH)));
    command.args(["-c", SOURCE, "-o"]).arg(object);
    let output = command.output().map_err(|error| format!("{}: {error}", program.display()))?;
    if output.status.success() {
        return Ok(());
    }
    let word = String::from_utf8_lossy(&output.stderr);
    let first = word.lines().find(|line| line.contains("error")).unwrap_or("clang failed");
    Err(format!("{first}; the program wants clang, libbpf-dev and linux-libc-dev"))
}

fn folders() -> Vec<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).filter(|folder| folder.starts_with("/usr") && folder.is_dir()).collect()
}

fn find(program: &Path) -> Option<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    // A name with a slash is not searched for: joining an absolute path yields that path.
    env::split_paths(&path).map(|folder| folder.join(program)).find(|file| file.is_file())
}
