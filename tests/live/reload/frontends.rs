//! Reloads by ufw and firewalld.

use super::*;

/// ufw itself, where `CTKEEP_UFW` names an unpacked package (docs/testing.md). Its files are copied,
/// so that nothing of the machine's own is read or changed.
#[test]
fn the_limit_holds_over_a_reload_of_ufw() {
    let Ok(package) = std::env::var("CTKEEP_UFW") else {
        eprintln!("SKIPPED: CTKEEP_UFW names no unpacked package of ufw");
        return;
    };
    let root = tempfile::tempdir().expect("a directory");
    let root = root.path().to_str().expect("a path");
    let run = |line: String| {
        let done = Command::new("sh").args(["-ec", &line]).status().expect("sh");
        assert!(done.success(), "{line}");
    };
    run(format!(
        "cp -a {package}/. {root} && cd {root}/etc/ufw && rm -f *.rules *.init ufw.conf && \
         cp {root}/usr/share/ufw/iptables/*.rules {root}/usr/share/ufw/*.init \
            {root}/usr/share/ufw/ufw.conf . && \
         sed -i 's|^IPT_SYSCTL=.*|IPT_SYSCTL=|' {root}/etc/default/ufw"
    ));
    let rules = format!("{root}/etc/ufw/before.rules");
    let before = std::fs::read_to_string(&rules).expect("rules");
    let limit = limit(HERE).replacen("INPUT", "-A ufw-before-input", 1);
    let (head, _) = before.rsplit_once("COMMIT").expect("a table");
    std::fs::write(&rules, format!("{head}{limit}\nCOMMIT\n")).expect("rules");
    let ufw = |server: &Namespace, what: &str| {
        let library = format!("PYTHONPATH={root}/usr/lib/python3/dist-packages");
        let program = format!("{root}/usr/sbin/ufw --rootdir={root} --datadir={root}");
        server.run(&format!("env {library} python3 {program} {what}"));
    };
    let load = |server: &Namespace| {
        ufw(server, "--force enable");
        ufw(server, "allow 80/tcp");
    };
    holds_over(HERE, load, |server| ufw(server, "reload"));
}

/// A bus of its own for firewalld: anybody may do anything on it.
const BUS: &str = "<busconfig><type>system</type><auth>EXTERNAL</auth>\
    <listen>unix:path=DIRECTORY/bus</listen><policy context=\"default\">\
    <allow send_destination=\"*\" eavesdrop=\"true\"/><allow eavesdrop=\"true\"/>\
    <allow own=\"*\"/><allow user=\"*\"/></policy></busconfig>";

/// firewalld itself, where `CTKEEP_FIREWALLD` names its unpacked packages (docs/testing.md), with the
/// limit as a direct rule: it runs with a bus and a configuration of its own.
#[test]
fn the_limit_holds_over_a_reload_of_firewalld() {
    let Ok(package) = std::env::var("CTKEEP_FIREWALLD") else {
        eprintln!("SKIPPED: CTKEEP_FIREWALLD names no unpacked packages of firewalld");
        return;
    };
    let root = tempfile::tempdir().expect("a directory");
    let root = root.path().to_str().expect("a path");
    let rule = limit(HERE).replacen("INPUT ", "", 1);
    let direct = format!(
        "<direct><rule priority=\"0\" table=\"filter\" ipv=\"ipv4\" chain=\"INPUT\">{rule}</rule></direct>"
    );
    for (name, text) in [("direct.xml", direct), ("bus.conf", BUS.replace("DIRECTORY", root))] {
        std::fs::write(format!("{root}/{name}"), text).expect("a file");
    }
    let library = format!("{package}/usr/lib/x86_64-linux-gnu");
    let start = |server: &Namespace, program: &str, arguments: String| {
        let mut command = Command::new(program);
        command
            .args(arguments.split(' '))
            .env("PYTHONPATH", format!("{package}/usr/lib/python3/dist-packages"))
            .env("LD_LIBRARY_PATH", &library)
            .env("GI_TYPELIB_PATH", format!("{library}/girepository-1.0"))
            .env("DBUS_SYSTEM_BUS_ADDRESS", format!("unix:path={root}/bus"));
        server.spawn(&command).expect(program)
    };
    const PYTHON: &str = "/usr/bin/python3";
    let tell = |server: &Namespace, what: &str| {
        let told =
            start(server, PYTHON, format!("{package}/usr/bin/firewall-cmd -q {what}")).wait();
        told.expect("firewall-cmd").success()
    };
    // They die with their namespace.
    let running = RefCell::new(Vec::new());
    let load = |server: &Namespace| {
        let _ = std::fs::remove_file(format!("{root}/bus"));
        let bus = format!("--config-file={root}/bus.conf --nofork --nopidfile");
        running.borrow_mut().push(start(server, "dbus-daemon", bus));
        wait_for("a bus", SOON, || std::path::Path::new(&format!("{root}/bus")).exists());
        let program = format!("{package}/usr/sbin/firewalld --nofork --nopid --log-target console");
        let own = format!("--system-config {root} --default-config {package}/usr/lib/firewalld");
        running.borrow_mut().push(start(server, PYTHON, format!("{program} {own}")));
        wait_for("firewalld", SOON * 2, || tell(server, "--state"));
        assert!(tell(server, "--permanent --add-port 80/tcp") && tell(server, "--reload"));
    };
    holds_over(HERE, load, |server| assert!(tell(server, "--reload")));
    for mut child in running.into_inner() {
        child.wait().expect("its end");
    }
}
