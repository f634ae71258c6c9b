//! What it costs to keep the entries of many half-closed connections that this host opened.

#[path = "../tests/lab/mod.rs"]
mod lab;
mod report;
mod traffic;

use std::net::{SocketAddr, TcpStream};
use std::thread;
use std::time::Duration;

use ctkeep::conntrack::{Conntrack, Entry, Filter};
use ctkeep::flow::AF_INET;

use lab::{Lab, Server};
use report::Target;
use traffic::CTKEEP;

const COUNT: usize = 10_000;
/// A lease, in which each entry is extended as often as it ever is.
const TIME: Duration = Duration::from_secs(62);

fn main() {
    lab::serve_if_asked();
    let Some(lab) = Lab::new() else { return };
    // So that the table is in use.
    lab.server.run("iptables -A INPUT -m conntrack --ctstate INVALID -j DROP");
    let mut far = Server::start(&lab.client, "192.0.2.2:443");
    let address: SocketAddr = "192.0.2.2:443".parse().expect("an address");
    let near: Vec<TcpStream> = lab.server.within(|| {
        (0..COUNT).map(|_| TcpStream::connect(address).expect("a connection")).collect()
    });
    far.shutdown_all();
    report::heading("10 000 half-closed connections that this host opened");
    let mut beside = Vec::new();
    // What is kept has to be there when that begins.
    for (name, what) in [("kept", "extend"), ("left alone", "off")] {
        // The far side is no container of this host: its entries would be held for it.
        let daemon = lab.daemon(CTKEEP, &["--containers", "off", "--outgoing", what]);
        // Until each has been found, and is extended for the first time.
        thread::sleep(Duration::from_secs(35));
        let (cpu, ()) = traffic::cpu_percent(daemon.pid(), || thread::sleep(TIME));
        report::figure(&format!("CPU, {name}, idle"), cpu, "%", Target::None);
        let resident = traffic::resident(daemon.pid());
        report::figure(&format!("RSS, {name}"), resident, "MB", Target::None);
        if what == "extend" {
            report::figure("entries kept", entries(&lab), "", Target::AtLeast(10_000.0));
        }
        beside.push(cpu);
    }
    if let [kept, left] = beside.as_slice() {
        report::figure("CPU of keeping them", kept - left, "%", Target::AtMost(0.5));
    }
    drop(near);
}

fn entries(lab: &Lab) -> f64 {
    let count = |count: &mut u32, _: &Entry| *count += 1;
    let entries = lab.server.within(|| {
        let mut conntrack = Conntrack::open().expect("conntrack");
        conntrack.entries(AF_INET, Filter::Tcp, count).expect("dump")
    });
    f64::from(entries)
}
