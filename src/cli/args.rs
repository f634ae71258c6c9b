//! What can be typed. Clap only: what it means is said where it is used.

mod history;
mod kill;
mod overload;
mod report;
mod run;
mod top;
mod values;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

use self::values::{endpoint, guarded_state, lease, network, port, recount_mode, recount_route};
use crate::error::{Error, Result};
use crate::flow::Endpoint;
use crate::host::netns::Namespace;
use crate::reconcile::policy::Policy;
use crate::recount::Mode;
use crate::sockdiag::State;

pub(super) use history::History;
pub(super) use kill::Kill;
pub(super) use report::Report;
pub(super) use run::Run;
pub(super) use top::{Moment, Top};

/// Keeps half-closed TCP connections counted: makes conntrack, and with it connlimit and
/// `ct count`, follow the kernel's sockets.
#[derive(Debug, Parser)]
#[command(name = "ctkeep", version, max_term_width = 100, arg_required_else_help = true)]
pub(super) struct Cli {
    #[command(subcommand)]
    pub command: Command,

    /// Log more: -v debug, -vv trace (CTKEEP_LOG takes a tracing filter)
    #[arg(short, long, global = true, action = ArgAction::Count)]
    pub verbose: u8,
}

#[derive(Debug, Subcommand)]
pub(super) enum Command {
    /// Show where sockets and conntrack disagree; changes nothing
    Audit(Audit),
    /// Repair once what disagrees now
    Reconcile(Reconcile),
    /// Make each limit count its open connections again, as after a reload of the rules
    Recount(Recount),
    /// Guard connections until told to stop
    Run(Run),
    /// Show what both tables say of one connection, and what ctkeep would do
    Explain(Explain),
    /// Examine whether this host is set up so that limits work; changes nothing
    Doctor(Doctor),
    /// Show live who holds what: sources, their sockets, what limits count of them
    Top(Top),
    /// Show what sources held, minute by minute, and what the daemon did
    History(History),
    /// Close sockets by state, age, source, port, process or container; prints which, unless --yes
    Kill(Kill),
    /// Write one file for a bug report to stdout: tables, rules, settings, the last hour
    Report(Report),
    /// Check a configuration file as run reads it; changes nothing
    Check(Check),
    /// Write a completion script for a shell to stdout
    Completions(Completions),
    /// Write a manual page to stdout, or the example of a configuration file
    Man(Man),
}

#[derive(Debug, Args)]
pub(super) struct Check {
    /// The file
    pub file: PathBuf,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Scope")]
pub(super) struct Scope {
    /// TCP port to guard: a socket's or a published one (repeatable) [default: every listening port]
    #[arg(long = "port", value_name = "PORT", value_delimiter = ',', value_parser = port)]
    pub ports: Vec<u16>,

    /// Socket states to guard, while an application has the socket open
    #[arg(long, value_name = "STATE", value_delimiter = ',',
          default_value = "established,syn-recv,fin-wait-1,fin-wait-2,close-wait,last-ack,closing",
          value_parser = guarded_state())]
    pub states: Vec<State>,

    /// Only peers in this network (repeatable) [default: all but loopback]
    #[arg(long = "source", value_name = "CIDR", value_delimiter = ',', value_parser = network)]
    pub sources: Vec<IpNet>,

    /// No peers in this network (repeatable); wins over --source
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = network)]
    pub exempt: Vec<IpNet>,

    /// Network namespace by its name or path (repeatable): `run` guards it beside the one that ctkeep
    /// runs in, other commands look at it instead
    #[arg(long, value_name = "NAME|PATH", value_delimiter = ',')]
    pub netns: Vec<String>,

    /// Timeout given to held entries; renewed before half of it has passed
    #[arg(long, value_name = "TIME", default_value = "60s", value_parser = lease)]
    pub lease: Duration,

    /// Conntrack zone of an entry that is put back, where no other entry of its port shows one
    #[arg(long, value_name = "ZONE", default_value_t = 0)]
    pub zone: u16,

    /// Read options from this TOML file; flags win
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
}

#[derive(Debug, Args)]
pub(super) struct Audit {
    #[command(flatten)]
    pub scope: Scope,

    #[command(flatten)]
    pub output: Output,

    /// The limit for each source [default: what the rules say]
    #[arg(long, value_name = "N")]
    pub limit: Option<NonZeroU32>,

    /// Prefix length that IPv4 sources are counted by [default: that of the rules, else 32]
    #[arg(long, value_name = "BITS", value_parser = clap::value_parser!(u8).range(0..=32))]
    pub mask: Option<u8>,

    /// Prefix length that IPv6 sources are counted by [default: that of the rules, else 128]
    #[arg(long, value_name = "BITS", value_parser = clap::value_parser!(u8).range(0..=128))]
    pub mask6: Option<u8>,

    /// Show only the N worst sources
    #[arg(long, value_name = "N")]
    pub top: Option<usize>,

    /// List connections on which both tables agree too
    #[arg(long)]
    pub all: bool,

    /// Ask the limits how many connections of each source their lists hold, by packets: SYNs of
    /// unused ports of the source that pass the host's rules and end behind the last of them. Rules
    /// that count, rate or log SYNs see them (limit, hashlimit, recent, LOG, sets); limits that log or
    /// write to a set what exceeds them are not asked. The source's own SYNs may find the limit full
    /// meanwhile, for some milliseconds
    #[arg(long, conflicts_with = "sockets")]
    pub ask: bool,

    /// Read sockets from this file, as `ss -tanoiep` or `netstat -tanp` prints them, instead of the
    /// kernel
    #[arg(long, value_name = "FILE", requires = "conntrack", conflicts_with = "netns")]
    pub sockets: Option<PathBuf>,

    /// Read entries from this file, as `conntrack -L -o extended` prints them
    #[arg(long, value_name = "FILE", requires = "sockets", conflicts_with = "netns")]
    pub conntrack: Option<PathBuf>,

    /// Read tables and rules from this file, as `ctkeep report` writes it, instead of the kernel
    #[arg(long, value_name = "FILE", conflicts_with_all = ["sockets", "conntrack", "netns", "ask"])]
    pub report: Option<PathBuf>,

    /// State of the sockets in a file without State column (`ss` with a filter for one state)
    #[arg(long, value_name = "STATE", requires = "sockets")]
    pub socket_state: Option<State>,
}

#[derive(Debug, Args)]
pub(super) struct Reconcile {
    #[command(flatten)]
    pub scope: Scope,

    #[command(flatten)]
    pub output: Output,

    /// Print the plan and change nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Re-insert entries without a sign that the connection was ever tracked
    #[arg(long)]
    pub force: bool,

    /// How the limiter is made to count a repaired connection again
    #[arg(long, value_name = "ROUTE", default_value = "auto", value_parser = recount_mode())]
    pub recount: Mode,
}

#[derive(Debug, Args)]
pub(super) struct Recount {
    #[command(flatten)]
    pub scope: Scope,

    #[command(flatten)]
    pub output: Output,

    /// Print which connections would be shown, and change nothing
    #[arg(long)]
    pub dry_run: bool,

    /// How the limiter is made to count a connection again
    #[arg(long, value_name = "ROUTE", default_value = "auto", value_parser = recount_route())]
    pub recount: Mode,
}

#[derive(Debug, Args)]
pub(super) struct Explain {
    // Not a doc comment: rustdoc takes the brackets for a link.
    #[arg(
        value_name = "LOCAL",
        value_parser = endpoint,
        help = "The server's end of the connection: 192.0.2.1:80 or [2001:db8::1]:80"
    )]
    pub local: Endpoint,

    /// The peer's end
    #[arg(value_name = "REMOTE", value_parser = endpoint)]
    pub remote: Endpoint,

    /// Ask the limit how many more connections of the peer it would let in, and which rule decides,
    /// by packets as `ctkeep audit --ask` sends them, one of which exceeds the limit: a rule that logs
    /// or bans what does will do so
    #[arg(long)]
    pub ask: bool,

    #[command(flatten)]
    pub scope: Scope,

    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub(super) struct Doctor {
    #[command(flatten)]
    pub scope: Scope,

    /// Try a recount and a seal through the host's own rules, with an entry of an unused port of a
    /// client that has a connection, and ask its limit before and after, by packets as `ctkeep audit
    /// --ask` sends them
    #[arg(long)]
    pub ask: bool,

    #[command(flatten)]
    pub output: Output,
}

#[derive(Debug, Args)]
pub(super) struct Man {
    /// Which page: ctkeep is of section 8, ctkeep.toml of section 5
    #[arg(value_enum, default_value_t = Page::Ctkeep)]
    pub page: Page,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Page {
    Ctkeep,
    #[value(name = "ctkeep.toml")]
    Configuration,
    #[value(name = "ctkeep.toml.example")]
    Example,
}

#[derive(Debug, Args)]
pub(super) struct Completions {
    /// The shell that will read it
    #[arg(value_enum)]
    pub shell: clap_complete::Shell,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Output")]
pub(super) struct Output {
    /// Form of the output
    #[arg(long, value_enum, default_value_t = Format::Table)]
    pub format: Format,

    /// Leave table headings out
    #[arg(long)]
    pub no_header: bool,
}

/// Where to listen, if at all.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Listen(pub Option<SocketAddr>);

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum Format {
    Table,
    Json,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub(super) enum LogFormat {
    Text,
    Json,
    /// Text with the priorities that systemd's journal reads
    Journald,
}

impl Scope {
    /// The policy that these flags mean.
    pub(super) fn policy(&self) -> Policy {
        Policy {
            ports: self.ports.iter().copied().collect::<HashSet<_>>(),
            states: self.states.iter().copied().collect(),
            sources: self.sources.clone(),
            exempt: self.exempt.clone(),
            lease: self.lease,
            force: false,
            zone: self.zone,
            reap: None,
            own_port: None,
        }
    }

    /// The namespaces that they name, in order, each spelling once; they need not exist.
    pub(super) fn named(&self) -> Vec<Namespace> {
        named(&self.netns)
    }

    /// The namespaces to look at, each once and each known to exist: those that they name, else the
    /// one that ctkeep runs in.
    ///
    /// # Errors
    /// One of them does not exist: a usage error.
    pub(super) fn namespaces(&self) -> Result<Vec<Namespace>> {
        namespaces(&self.netns)
    }

    /// The one namespace of a command that looks at one.
    ///
    /// # Errors
    /// There are several, or it does not exist: a usage error.
    pub(super) fn namespace(&self) -> Result<Namespace> {
        let mut all = self.namespaces()?;
        match (all.pop(), all.is_empty()) {
            (Some(namespace), true) => Ok(namespace),
            _ => Err(Error::usage("--netns", "this command looks at one namespace at a time")),
        }
    }
}

fn named(names: &[String]) -> Vec<Namespace> {
    let mut all = Vec::new();
    for name in names {
        let namespace = Namespace::Named(name.clone());
        if !all.contains(&namespace) {
            all.push(namespace);
        }
    }
    all
}

fn namespaces(names: &[String]) -> Result<Vec<Namespace>> {
    let mut all: Vec<Namespace> = Vec::new();
    for namespace in named(names) {
        namespace.check()?;
        if all.iter().all(|other| other.identity() != namespace.identity()) {
            all.push(namespace);
        }
    }
    if all.is_empty() {
        all.push(Namespace::Own);
    }
    Ok(all)
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }
}
