//! What can be typed. Clap only: what it means is said where it is used.

mod history;
mod kill;
mod overload;
mod report;
mod top;

use std::collections::HashSet;
use std::net::SocketAddr;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::{ArgAction, Args, Parser, Subcommand, ValueEnum};
use ipnet::IpNet;

use crate::daemon::{OnExit, ShieldMode};
use crate::error::{Error, Result};
use crate::flow::Endpoint;
use crate::host::netns::Namespace;
use crate::overload::Overload;
use crate::reconcile::policy::Policy;
use crate::reconcile::pressure::{Defence, Level};
use crate::recount::Mode;
use crate::sockdiag::State;
use crate::watch::EventSource;

pub(super) use history::{History, Kept};
pub(super) use kill::Kill;
pub(super) use report::Report;
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
    #[arg(long = "port", value_name = "PORT", value_delimiter = ',',
          value_parser = clap::value_parser!(u16).range(1..))]
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
pub(super) struct Run {
    #[command(flatten)]
    pub scope: Scope,

    /// Time from one look at half-closed sockets to the next
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = interval)]
    pub sweep_interval: Duration,

    /// Time from one look at every socket in scope to the next
    #[arg(long, value_name = "TIME", default_value = "30s", value_parser = interval)]
    pub deep_interval: Duration,

    /// How changes of entries are noticed: by a packet log (nflog), by conntrack events, or by sweeps
    /// alone (off)
    #[arg(long, value_name = "SOURCE", default_value = "auto", value_parser = event_source())]
    pub events: EventSource,

    /// NFLOG group that the event source nflog uses
    #[arg(long, value_name = "N", default_value_t = 9815)]
    pub nflog_group: u16,

    /// How the limiter is made to count a repaired connection again
    #[arg(long, value_name = "ROUTE", default_value = "auto", value_parser = recount_mode())]
    pub recount: Mode,

    /// Follow changes of the firewall's rules, and show limits that are new or were emptied what
    /// is open: where possible (auto), or off
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = auto_or_off(),
          action = ArgAction::Set)]
    pub follow_rules: bool,

    /// Guard the connections of containers in this host's table: where possible (auto), or off
    #[arg(long, value_name = "WHEN", default_value = "auto", value_parser = auto_or_off(),
          action = ArgAction::Set)]
    pub containers: bool,

    /// Keep the entries of half-closed connections that this host or its containers opened for as long as
    /// their sockets are open (extend), or leave them to the kernel (off)
    #[arg(long, value_name = "WHAT", default_value = "off", value_parser = off_or_extend(),
          action = ArgAction::Set)]
    pub outgoing: bool,

    /// Keep FINs and RSTs that TCP would not act on from conntrack: off, while under attack and
    /// where possible (auto), or always (on)
    #[arg(long, value_name = "WHEN", default_value = "off", value_parser = shield())]
    pub shield: ShieldMode,

    /// The bit of the packet mark that the shield works with
    #[arg(long, value_name = "BIT", default_value = "0x1000", value_parser = mark_bit)]
    pub shield_mark: u32,

    /// Name of the helper device and nftables table that are made for recount
    #[arg(long, value_name = "NAME", default_value = "ctkeep0", value_parser = device)]
    pub device: String,

    /// How firmly entries are held: as attacks require (auto), never more than needed (0), always as
    /// under attack (2)
    #[arg(long, value_name = "LEVEL", default_value = "auto", value_parser = defence())]
    pub defence: Defence,

    /// Remove entries of the scope that no socket has backed for this long [default: never]
    #[arg(long, value_name = "TIME", value_parser = interval)]
    pub reap: Option<Duration>,

    // Not a doc comment: rustdoc takes the brackets for a link.
    #[arg(
        long = "overload",
        value_name = "above=N [KEY=VALUE]...",
        value_parser = overload::overload,
        help = "Put sources that hold more sockets than this into an nftables set, for rules of your own \
                (repeatable; [[overload]] in a file; docs/overload.md)"
    )]
    pub overloads: Vec<Overload>,

    /// Run the workers with real-time priority (SCHED_RR); needs CAP_SYS_NICE
    #[arg(long)]
    pub realtime: bool,

    /// At the end, keep held entries for their lease, or release them at once
    #[arg(long, value_name = "WHAT", default_value = "keep", value_parser = on_exit())]
    pub on_exit: OnExit,

    /// Serve metrics, health and a status page by HTTP here, or not at all (off)
    #[arg(long, value_name = "ADDR:PORT|off", default_value = "127.0.0.1:9815",
          value_parser = listen)]
    pub metrics_listen: Listen,

    /// Write metrics to this file every few seconds, for the textfile collector of node_exporter
    #[arg(long, value_name = "PATH")]
    pub metrics_textfile: Option<PathBuf>,

    /// Keep what sources held each minute, and what was done, in this folder: that which systemd
    /// names for the service (auto: /var/lib/ctkeep), another one, or not at all (off)
    #[arg(long, value_name = "auto|off|PATH", default_value = "auto", value_parser = history::kept)]
    pub history: Kept,

    /// Room for it
    #[arg(long, value_name = "SIZE", default_value = "64MB", value_parser = history::size)]
    pub history_room: u64,

    /// Show addresses of peers on the status page
    #[arg(long)]
    pub status_addresses: bool,

    /// Observe, log and count; change nothing
    #[arg(long)]
    pub dry_run: bool,

    /// Form of the log on stderr [default: text on a terminal, journald under systemd, else json]
    #[arg(long, value_name = "FORM", value_enum)]
    pub log_format: Option<LogFormat>,
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

/// States in which an application can still have the socket.
fn guarded_state() -> impl TypedValueParser<Value = State> {
    let parse = |text: String| match text.parse::<State>() {
        Ok(state) if State::OPEN.contains(&state) => Ok(state),
        Ok(state) => Err(format!(
            "a socket in {state} cannot be guarded: no application has one; there are {}",
            State::OPEN.map(State::name).join(", ")
        )),
        Err(error) => Err(error.to_string()),
    };
    clap::builder::StringValueParser::new().try_map(parse)
}

fn endpoint(text: &str) -> std::result::Result<Endpoint, String> {
    match text.parse::<Endpoint>() {
        Ok(endpoint) if endpoint.port() > 0 => Ok(endpoint),
        _ => Err("expected an address with a port: 192.0.2.1:80 or [2001:db8::1]:80".to_owned()),
    }
}

fn network(text: &str) -> std::result::Result<IpNet, String> {
    if let Ok(addr) = text.parse::<std::net::IpAddr>() {
        return Ok(IpNet::from(addr.to_canonical()));
    }
    text.parse::<IpNet>()
        .map(|net| net.trunc())
        .map_err(|_| "expected an address or a network such as 198.51.100.0/24".to_owned())
}

fn duration(text: &str) -> std::result::Result<Duration, String> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) && !text.is_empty() {
        return Err(format!("a time needs a unit: {text}s"));
    }
    humantime::parse_duration(text).map_err(|error| format!("{error}; expected 30s, 1m, 500ms"))
}

fn interval(text: &str) -> std::result::Result<Duration, String> {
    match duration(text)? {
        time if time < Duration::from_millis(10) => Err("at least 10ms".to_owned()),
        time if time > Duration::from_secs(86_400) => Err("at most 1day".to_owned()),
        time => Ok(time),
    }
}

/// Conntrack counts whole seconds, and a lease must outlive the sweeps that renew it.
fn lease(text: &str) -> std::result::Result<Duration, String> {
    match duration(text)? {
        time if time < Duration::from_secs(2) => Err("at least 2s".to_owned()),
        time if time > Duration::from_secs(86_400) => Err("at most 1day".to_owned()),
        time => Ok(time),
    }
}

fn listen(text: &str) -> std::result::Result<Listen, String> {
    match text.parse() {
        _ if text == "off" => Ok(Listen(None)),
        Ok(address) => Ok(Listen(Some(address))),
        Err(_) => Err("expected 127.0.0.1:9815, [::1]:9815 or the like, or off".to_owned()),
    }
}

/// What the kernel takes as an interface name (`dev_valid_name()`).
fn device(text: &str) -> std::result::Result<String, String> {
    let valid = (1..=15).contains(&text.len())
        && !matches!(text, "." | "..")
        && text.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte));
    if valid { Ok(text.to_owned()) } else { Err("no name for an interface".to_owned()) }
}

fn mark_bit(text: &str) -> std::result::Result<u32, String> {
    let bit = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    bit.ok()
        .filter(|bit| bit.is_power_of_two())
        .ok_or_else(|| "expected a number with one bit set, such as 0x1000".to_owned())
}

fn shield() -> impl TypedValueParser<Value = ShieldMode> {
    PossibleValuesParser::new(["auto", "on", "off"]).map(|name| match name.as_str() {
        "auto" => ShieldMode::Auto,
        "on" => ShieldMode::On,
        _ => ShieldMode::Off,
    })
}

fn auto_or_off() -> impl TypedValueParser<Value = bool> {
    PossibleValuesParser::new(["auto", "off"]).map(|name| name == "auto")
}

fn off_or_extend() -> impl TypedValueParser<Value = bool> {
    PossibleValuesParser::new(["off", "extend"]).map(|name| name == "extend")
}

fn recount_route() -> impl TypedValueParser<Value = Mode> {
    PossibleValuesParser::new(["auto", "ingress", "loopback"]).map(|name| match name.as_str() {
        "ingress" => Mode::Ingress,
        "loopback" => Mode::Loopback,
        _ => Mode::Auto,
    })
}

fn recount_mode() -> impl TypedValueParser<Value = Mode> {
    PossibleValuesParser::new(["auto", "ingress", "loopback", "off"]).map(|name| {
        match name.as_str() {
            "ingress" => Mode::Ingress,
            "loopback" => Mode::Loopback,
            "off" => Mode::Off,
            _ => Mode::Auto,
        }
    })
}

fn event_source() -> impl TypedValueParser<Value = EventSource> {
    PossibleValuesParser::new(["auto", "nflog", "ctnetlink", "off"]).map(|name| {
        match name.as_str() {
            "nflog" => EventSource::Nflog,
            "ctnetlink" => EventSource::Ctnetlink,
            "off" => EventSource::Off,
            _ => EventSource::Auto,
        }
    })
}

fn defence() -> impl TypedValueParser<Value = Defence> {
    PossibleValuesParser::new(["auto", "0", "1", "2"]).map(|name| match name.as_str() {
        "0" => Defence::Fixed(Level::Calm),
        "1" => Defence::Fixed(Level::Alert),
        "2" => Defence::Fixed(Level::Manual),
        _ => Defence::Auto,
    })
}

fn on_exit() -> impl TypedValueParser<Value = OnExit> {
    PossibleValuesParser::new(["keep", "release"]).map(|name| match name.as_str() {
        "release" => OnExit::Release,
        _ => OnExit::Keep,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
    }

    #[test]
    fn a_bare_address_is_a_network_of_one() {
        assert_eq!(network("198.51.100.7").unwrap().to_string(), "198.51.100.7/32");
        assert_eq!(network("198.51.100.7/24").unwrap().to_string(), "198.51.100.0/24");
        assert!(network("198.51.100.0/33").is_err());
    }
}
