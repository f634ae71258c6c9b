//! In place of the packet program where ctkeep was built without clang.

use std::collections::HashSet;
use std::convert::Infallible;

use super::DECISIONS;
use crate::error::{Cause, Op, Result};

/// There is none.
#[derive(Debug)]
pub(crate) struct Program(Infallible);

#[derive(Debug)]
pub(super) struct Attached(Infallible);

pub(super) fn remove_leftovers(_device: &str) {}

impl Attached {
    pub(super) fn how(&self) -> &'static str {
        match self.0 {}
    }
}

impl Program {
    pub(crate) fn load(_mark: u32) -> Result<Self> {
        Err(Op::new("shield").failed(Cause::Unavailable(
            "this ctkeep was built without it: there was no clang".to_owned(),
        )))
    }

    pub(crate) fn needs_bpf_for_good(&self) -> bool {
        match self.0 {}
    }

    pub(super) fn attach(&mut self, _device: &str) -> Result<Attached> {
        match self.0 {}
    }

    pub(super) fn detach(&mut self, _attached: Attached) {
        match self.0 {}
    }

    pub(super) fn set_ports(&mut self, _ports: &HashSet<u16>) -> Result<()> {
        match self.0 {}
    }

    pub(super) fn counts(&self) -> Result<[u64; DECISIONS.len()]> {
        match self.0 {}
    }
}
