//! The library's one error: what was being done, to which connection, and the kernel's word.

use std::{fmt, io};

use nix::errno::Errno;

use crate::flow::FourTuple;

/// Result with the library's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

/// The operation that an error belongs to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Op {
    /// The request, in words of the field: `conntrack insert`.
    pub verb: &'static str,
    /// For which connection, where it is about a single one.
    pub flow: Option<FourTuple>,
}

impl Op {
    /// An operation on no single connection.
    pub const fn new(verb: &'static str) -> Self {
        Self { verb, flow: None }
    }

    /// An operation on one connection.
    pub const fn on(verb: &'static str, flow: FourTuple) -> Self {
        Self { verb, flow: Some(flow) }
    }

    /// This operation failed for `cause`.
    pub fn failed(self, cause: Cause) -> Error {
        Error { op: self, cause: Box::new(cause) }
    }

    /// This operation failed with a system call's error.
    pub fn io(self, error: io::Error) -> Error {
        self.failed(Cause::Io(error))
    }

    /// The kernel sent something that this operation cannot be answered with.
    pub fn malformed(self, what: impl fmt::Display) -> Error {
        self.failed(Cause::Malformed(what.to_string()))
    }
}

impl fmt::Display for Op {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.flow {
            Some(flow) => write!(f, "{} {flow}", self.verb),
            None => f.write_str(self.verb),
        }
    }
}

/// A failed operation.
#[derive(Debug, thiserror::Error)]
#[error("{op}: {cause}")]
pub struct Error {
    /// The operation that failed.
    pub op: Op,
    /// Why it failed.
    pub cause: Box<Cause>,
}

/// Why an operation failed.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    /// The kernel refused the request.
    #[error("{}", kernel_word(*.errno, .word.as_deref()))]
    Kernel {
        /// The error number of the reply.
        errno: Errno,
        /// The kernel's own sentence (extended ack), where it gave one.
        word: Option<String>,
    },
    /// A system call failed.
    #[error("{0}")]
    Io(io::Error),
    /// A message that breaks its own format, or does not answer what was asked.
    #[error("malformed answer: {0}")]
    Malformed(String),
    /// A message was longer than the receive buffer: the rest of it is lost.
    #[error("answer cut short by the receive buffer")]
    Truncated,
    /// The kernel dropped messages for this socket (`ENOBUFS`).
    #[error("receive buffer overrun (ENOBUFS): answers were lost")]
    Overrun,
    /// A dump kept changing under the reader (`NLM_F_DUMP_INTR`).
    #[error("the table kept changing during the dump ({attempts} attempts)")]
    Interrupted {
        /// How often it was tried.
        attempts: u32,
    },
    /// No answer came in time.
    #[error("no answer within {seconds} s")]
    Late {
        /// How long was waited.
        seconds: u64,
    },
    /// Something that the kernel or this process lacks; the text says what and what to do.
    #[error("{0}")]
    Unavailable(String),
    /// A bound of our own was reached; the text says which.
    #[error("{0}")]
    Limited(String),
    /// What the administrator wrote cannot be used; the text names the place.
    #[error("{0}")]
    Usage(String),
}

/// `table full (ENOMEM)`: what the errno means to a reader, then its name.
fn kernel_word(errno: Errno, word: Option<&str>) -> String {
    match word {
        Some(word) => format!("{word} ({errno:?})"),
        None => format!("{} ({errno:?})", errno.desc().to_lowercase()),
    }
}

impl Error {
    /// What the administrator wrote cannot be used.
    pub fn usage(verb: &'static str, what: impl Into<String>) -> Self {
        Op::new(verb).failed(Cause::Usage(what.into()))
    }

    /// The errno of a kernel reply or a failed system call.
    pub fn errno(&self) -> Option<Errno> {
        match &*self.cause {
            Cause::Kernel { errno, .. } => Some(*errno),
            Cause::Io(error) => error.raw_os_error().map(Errno::from_raw),
            _ => None,
        }
    }

    /// The entry or socket is not there.
    pub fn is_absent(&self) -> bool {
        self.errno() == Some(Errno::ENOENT)
    }

    /// An entry of this tuple exists already.
    pub fn is_already_there(&self) -> bool {
        self.errno() == Some(Errno::EEXIST)
    }

    /// The conntrack table has no room.
    pub fn is_table_full(&self) -> bool {
        self.errno() == Some(Errno::ENOMEM)
    }

    /// A privilege is missing.
    pub fn is_missing_privilege(&self) -> bool {
        matches!(self.errno(), Some(Errno::EPERM | Errno::EACCES))
    }

    /// A kernel feature or privilege is missing: nothing that a retry mends.
    pub fn is_unavailable(&self) -> bool {
        self.is_missing_privilege() || matches!(*self.cause, Cause::Unavailable(_))
    }

    /// What the administrator wrote is at fault.
    pub fn is_usage(&self) -> bool {
        matches!(*self.cause, Cause::Usage(_))
    }

    /// Every word of [`Error::reason`].
    pub const REASONS: [&'static str; 12] = [
        "absent",
        "exists",
        "table_full",
        "denied",
        "overrun",
        "kernel",
        "malformed",
        "late",
        "interrupted",
        "unavailable",
        "limited",
        "other",
    ];

    /// One word for a metric or a log field: the errno's name in lower case, or the kind of cause.
    pub fn reason(&self) -> &'static str {
        match (&*self.cause, self.errno()) {
            (_, Some(Errno::ENOENT)) => "absent",
            (_, Some(Errno::EEXIST)) => "exists",
            (_, Some(Errno::ENOMEM)) => "table_full",
            (_, Some(Errno::EPERM | Errno::EACCES)) => "denied",
            (_, Some(Errno::ENOBUFS)) | (Cause::Overrun, _) => "overrun",
            (_, Some(_)) => "kernel",
            (Cause::Malformed(_) | Cause::Truncated, _) => "malformed",
            (Cause::Late { .. }, _) => "late",
            (Cause::Interrupted { .. }, _) => "interrupted",
            (Cause::Unavailable(_), _) => "unavailable",
            (Cause::Limited(_), _) => "limited",
            _ => "other",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_error_names_the_operation_the_connection_and_the_kernels_word() {
        let flow =
            FourTuple::new("192.0.2.7:4000".parse().unwrap(), "192.0.2.1:80".parse().unwrap());
        let error = Op::on("conntrack insert", flow)
            .failed(Cause::Kernel { errno: Errno::ENOMEM, word: Some("table full".into()) });
        assert_eq!(
            error.to_string(),
            "conntrack insert 192.0.2.7:4000 > 192.0.2.1:80: table full (ENOMEM)"
        );
        assert!(error.is_table_full());
    }
}
