//! Packet programs at the server's devices: somebody else's, and a look at all that are there.

use std::path::Path;
use std::process::Command;

use aya::programs::tc::{SchedClassifier, TcAttachOptions};
use aya::programs::{LinkOrder, TcAttachType};
use aya::{Ebpf, EbpfLoader};

use super::{Lab, Namespace};

const SOURCE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/lab/neighbour.bpf.c");

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
        let folder = tempfile::tempdir().expect("a folder");
        let object = folder.path().join("neighbour.o");
        compile(&object);
        let bytes = std::fs::read(&object).expect("an object");
        let mut program =
            EbpfLoader::new().override_global("mark", &mark, true).load(&bytes).expect("a program");
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

fn compile(object: &Path) {
    let headers = format!("/usr/include/{}-linux-gnu", std::env::consts::ARCH);
    let status = Command::new("clang")
        .args(["-target", "bpf", "-O2", "-g", "-isystem", &headers, "-c", SOURCE, "-o"])
        .arg(object)
        .status();
    assert!(status.expect("clang").success(), "neighbour.bpf.c");
}

/// The programs at a device's ingress, in order; of a kernel before TCX, its filters.
pub fn programs(namespace: &Namespace, device: &str) -> Vec<String> {
    match namespace.within(|| SchedClassifier::query_tcx(device, TcAttachType::Ingress)) {
        Ok((_, programs)) => {
            programs.iter().map(|it| it.name_as_str().unwrap_or("?").to_owned()).collect()
        }
        // "filter ... handle 0x1 NAME direct-action ..."
        Err(_) => namespace
            .try_run(&format!("tc filter show dev {device} ingress"))
            .unwrap_or_default()
            .lines()
            .filter_map(|line| line.split_once(" handle ")?.1.split(' ').nth(1))
            .map(str::to_owned)
            .collect(),
    }
}

/// Whether programs stand in an order, and go with the process that attached them (6.6).
pub fn has_tcx(namespace: &Namespace) -> bool {
    namespace.within(|| SchedClassifier::query_tcx("lo", TcAttachType::Ingress)).is_ok()
}
