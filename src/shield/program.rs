//! The packet program in the kernel: loading, attaching, its tables.

use std::borrow::Borrow;
use std::collections::HashSet;
use std::error::Error as StdError;
use std::fmt::{self, Debug};

use aya::maps::{Array, Map, MapData, PerCpuArray};
use aya::programs::tc::{
    NlOptions, SchedClassifierLinkId, TcAttachOptions, TcError, qdisc_add_clsact,
    qdisc_detach_program,
};
use aya::programs::{LinkOrder, ProgramError, SchedClassifier, TcAttachType};
use aya::util::KernelVersion;
use aya::{Ebpf, EbpfLoader, include_bytes_aligned};

use super::DECISIONS;
use crate::error::{Cause, Error, Op, Result};
use crate::host::random;

static OBJECT: &[u8] = include_bytes_aligned!(concat!(env!("OUT_DIR"), "/shield.bpf.o"));

/// Name of the program in `tc filter show` and `bpftool prog`.
const NAME: &str = "ctkeep_shield";
const PORTS: &str = "ports";
const COUNTS: &str = "decisions";
const WORD: u16 = 64;
/// Before the filters of others, where the kernel has no order of links.
const FIRST: NlOptions =
    NlOptions { priority: 1, handle: aya::programs::tc::TcHandle::AUTO_ASSIGN, classid: None };

/// The loaded program. Gone with this value; so is what is attached by TCX.
pub(crate) struct Program(Ebpf);

/// The program at one device.
#[derive(Debug)]
pub(super) struct Attached {
    id: SchedClassifierLinkId,
    how: &'static str,
}

impl Attached {
    /// How it is attached: `tcx` or `clsact`.
    pub(super) fn how(&self) -> &'static str {
        self.how
    }
}

impl Debug for Program {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Program").finish_non_exhaustive()
    }
}

impl Program {
    /// Loads the program, which marks packets by `mark`.
    ///
    /// # Errors
    /// The kernel refuses it: privileges, lockdown, age, or no BTF of its own.
    pub(crate) fn load(mark: u32) -> Result<Self> {
        let mut this = Self(
            EbpfLoader::new()
                .override_global("mark", &mark, true)
                .override_global("seed", &seed(), true)
                .load(OBJECT)
                .map_err(|error| load_failed(&error))?,
        );
        this.classifier()?.load().map_err(|error| load_failed(&error))?;
        Ok(this)
    }

    /// Whether its maps may be changed and read by who holds `CAP_BPF` alone. Since 5.19 that
    /// takes no privilege; a kernel with TCX is younger, and attaches without it too.
    pub(crate) fn needs_bpf_for_good(&self) -> bool {
        is_before_tcx()
    }

    /// Attaches it to the ingress of a device: by TCX before all others that are there, or by a
    /// filter where there is no TCX (before 6.6) or no place is left in it.
    ///
    /// # Errors
    /// The device is gone, or neither way is open.
    pub(super) fn attach(&mut self, device: &str) -> Result<Attached> {
        let classifier = self.classifier()?;
        let ingress = TcAttachType::Ingress;
        let tcx = TcAttachOptions::TcxOrder(LinkOrder::first());
        match classifier.attach_with_options(device, ingress, tcx) {
            Ok(id) => return Ok(Attached { id, how: "tcx" }),
            Err(error) => tracing::debug!(device, error = all_of(&error), "no TCX"),
        }
        // It may be there already, and then stays: its owner is not known.
        let _ = qdisc_add_clsact(device);
        let id = classifier
            .attach_with_options(device, ingress, TcAttachOptions::Netlink(FIRST))
            .map_err(|error| attach_failed(device, &error))?;
        Ok(Attached { id, how: "clsact" })
    }

    /// Takes it off a device, which may be gone already.
    pub(super) fn detach(&mut self, attached: Attached) {
        let detached = self.classifier().map(|classifier| classifier.detach(attached.id));
        if let Ok(Err(error)) = detached {
            tracing::debug!(error = all_of(&error), "a device is gone, and the shield with it");
        }
    }

    /// Guards exactly these local ports.
    ///
    /// # Errors
    /// The kernel refuses to change the map.
    pub(super) fn set_ports(&mut self, ports: &HashSet<u16>) -> Result<()> {
        let op = Op::new("shield ports");
        let map = self.0.map_mut(PORTS).ok_or_else(|| op.malformed("no map of this name"))?;
        let mut map: Array<&mut MapData, u64> = typed(op, map)?;
        let mut words = vec![0_u64; usize::from(u16::MAX / WORD) + 1];
        for port in ports {
            if let Some(word) = words.get_mut(usize::from(port / WORD)) {
                *word |= 1 << (port % WORD);
            }
        }
        for (index, word) in (0..).zip(words) {
            let old = map.get(&index, 0).map_err(|error| failed(op, &error))?;
            if old != word {
                map.set(index, word, 0).map_err(|error| failed(op, &error))?;
            }
        }
        Ok(())
    }

    /// How often it decided what, in the order of [`DECISIONS`].
    ///
    /// # Errors
    /// The kernel refuses to read the map.
    pub(super) fn counts(&self) -> Result<[u64; DECISIONS.len()]> {
        let op = Op::new("shield counters");
        let map = self.0.map(COUNTS).ok_or_else(|| op.malformed("no map of this name"))?;
        let map: PerCpuArray<&MapData, u64> = typed(op, map)?;
        let mut counts = [0; DECISIONS.len()];
        for (index, count) in (0..).zip(&mut counts) {
            let values = map.get(&index, 0).map_err(|error| failed(op, &error))?;
            *count = values.iter().sum();
        }
        Ok(counts)
    }

    fn classifier(&mut self) -> Result<&mut SchedClassifier> {
        let op = Op::new("shield program");
        let program = self.0.program_mut(NAME).ok_or_else(|| op.malformed("not in the object"))?;
        program.try_into().map_err(|error: ProgramError| failed(op, &error))
    }
}

/// Which place a connection has in the program's memory.
#[allow(clippy::cast_possible_truncation, reason = "half of the bits do")]
fn seed() -> u32 {
    random::bits() as u32
}

fn is_before_tcx() -> bool {
    KernelVersion::current().map_or(true, |version| version < KernelVersion::new(6, 6, 0))
}

/// A filter outlives the process that was killed; a link does not.
pub(super) fn remove_leftovers(device: &str) {
    match qdisc_detach_program(device, TcAttachType::Ingress, NAME) {
        Ok(()) => tracing::info!(device, "removed what another run left"),
        Err(TcError::IoError(_)) => {}
        Err(error) => tracing::debug!(device, error = all_of(&error), "no filters to remove"),
    }
}

fn typed<M, T>(op: Op, map: M) -> Result<T>
where
    M: Borrow<Map>,
    T: TryFrom<M>,
    T::Error: StdError + 'static,
{
    T::try_from(map).map_err(|error| failed(op, &error))
}

fn load_failed(error: &(dyn StdError + 'static)) -> Error {
    Op::new("shield").failed(Cause::Unavailable(format!(
        "the kernel does not take the packet program: {}; it takes CAP_BPF, CAP_PERFMON and \
         CAP_NET_ADMIN in the first user namespace, a seccomp profile that allows bpf, a kernel \
         since 5.10 with its own types in /sys/kernel/btf/vmlinux, and no lockdown of \
         confidentiality",
        all_of(error)
    )))
}

fn attach_failed(device: &str, error: &(dyn StdError + 'static)) -> Error {
    let what = format!("{device}: {}", all_of(error));
    Op::new("attach shield").failed(Cause::Unavailable(what))
}

fn failed(op: Op, error: &(dyn StdError + 'static)) -> Error {
    op.failed(Cause::Unavailable(all_of(error)))
}

/// The error and what caused it, in one line: what the verifier says is many.
fn all_of(error: &(dyn StdError + 'static)) -> String {
    let mut text = first_line(error);
    let mut source = error.source();
    while let Some(error) = source {
        let line = first_line(error);
        if !text.contains(&line) {
            text = format!("{text}: {line}");
        }
        source = error.source();
    }
    text
}

fn first_line(error: &dyn StdError) -> String {
    error.to_string().lines().next().unwrap_or_default().to_owned()
}
