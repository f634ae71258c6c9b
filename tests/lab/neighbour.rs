//! Packet programs at the server's devices: somebody else's, and a look at all that are there.

use std::process::Command;

use aya::programs::tc::{SchedClassifier, TcAttachOptions};
use aya::programs::{LinkOrder, TcAttachType, Xdp, XdpMode};
use aya::{Ebpf, EbpfLoader};

use super::{Lab, Namespace};

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lab/neighbour.bpf.c");

/// `bpf_mprog_max()` in linux/bpf_mprog.h.
const PLACES: usize = 63;

/// Attached as long as this value lives.
pub struct Neighbour(#[allow(dead_code, reason = "its drop takes it off")] Ebpf);

/// Where it stands among those that are attached.
#[derive(Clone, Copy, Debug)]
pub enum Place {
    First,
    Last,
}

impl Lab {
    /// Puts a program before or behind all others at the server's eth0. Without a mark it lets
    /// every packet pass at once, and none behind it sees any.
    pub fn neighbour(&self, place: Place, mark: u32) -> Neighbour {
        self.neighbours(1, place, mark).pop().expect("one")
    }

    /// Takes all places that there are for programs at the server's eth0. These put this mark on
    /// every packet, and leave all else to others.
    pub fn all_neighbours(&self, mark: u32) -> Vec<Neighbour> {
        self.neighbours(PLACES, Place::First, mark)
    }

    fn neighbours(&self, count: usize, place: Place, mark: u32) -> Vec<Neighbour> {
        let object = compiled();
        // One for all: it reads the types of the whole kernel.
        let mut loader = EbpfLoader::new();
        loader.override_global("mark", &mark, true);
        (0..count).map(|_| self.attach(loader.load(&object).expect("a program"), place)).collect()
    }

    /// A program at the driver of the server's eth0 that lets every packet pass.
    pub fn driver_neighbour(&self) -> Neighbour {
        let mut program = Ebpf::load(&compiled()).expect("a program");
        self.server.within(|| {
            let driver = program.program_mut("driver").expect("the program");
            let driver: &mut Xdp = driver.try_into().expect("a program of a driver");
            driver.load().expect("a verified program");
            driver.attach("eth0", XdpMode::Driver).expect("a driver that takes it");
        });
        Neighbour(program)
    }

    fn attach(&self, mut program: Ebpf, place: Place) -> Neighbour {
        self.server.within(|| {
            let classifier = program.program_mut("neighbour").expect("the program");
            let classifier: &mut SchedClassifier = classifier.try_into().expect("a classifier");
            classifier.load().expect("a verified program");
            let order = match place {
                Place::First => LinkOrder::first(),
                Place::Last => LinkOrder::last(),
            };
            let options = TcAttachOptions::TcxOrder(order);
            classifier
                .attach_with_options("eth0", TcAttachType::Ingress, options)
                .expect("a place at eth0");
        });
        Neighbour(program)
    }
}

fn compiled() -> Vec<u8> {
    let headers = format!("/usr/include/{}-linux-gnu", std::env::consts::ARCH);
    let output = Command::new("clang")
        .args(["-target", "bpf", "-O2", "-g", "-isystem", &headers, "-c", SOURCE, "-o", "-"])
        .output()
        .expect("clang");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

/// The programs at a device's ingress, in order; of a kernel before TCX, its filters.
pub fn programs(namespace: &Namespace, device: &str) -> Vec<String> {
    match namespace.within(|| SchedClassifier::query_tcx(device, TcAttachType::Ingress)) {
        Ok((_, programs)) => {
            programs.iter().map(|it| it.name_as_str().unwrap_or("?").to_owned()).collect()
        }
        Err(_) => filters(namespace, device),
    }
}

/// The filters at a device's ingress, which every kernel has, in order.
pub fn filters(namespace: &Namespace, device: &str) -> Vec<String> {
    // "filter ... handle 0x1 NAME direct-action ..."
    namespace
        .try_run(&format!("tc filter show dev {device} ingress"))
        .unwrap_or_default()
        .lines()
        .filter_map(|line| line.split_once(" handle ")?.1.split(' ').nth(1))
        .map(str::to_owned)
        .collect()
}

/// Whether programs stand in an order, and go with the process that attached them (6.6).
pub fn has_tcx(namespace: &Namespace) -> bool {
    namespace.within(|| SchedClassifier::query_tcx("lo", TcAttachType::Ingress)).is_ok()
}
