//! What can be typed behind `ctkeep run`, and written into its file.

use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgAction, Args};

use super::history::{self, Kept};
use super::values::{
    auto_or_off, defence, device, event_source, interval, listen, mark_bit, off_or_extend, on_exit,
    recount_mode, shield,
};
use super::{Listen, LogFormat, Scope, overload};
use crate::daemon::{OnExit, ShieldMode};
use crate::overload::Overload;
use crate::reconcile::pressure::Defence;
use crate::recount::Mode;
use crate::watch::EventSource;

#[derive(Debug, Args)]
pub(crate) struct Run {
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
