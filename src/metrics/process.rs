//! The usual `process_*` figures, from `/proc/self`.

use std::fmt;

use procfs::process::{LimitValue, Process};
use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

/// Reads `/proc/self` whenever it is asked; a figure that cannot be read is left out.
#[derive(Debug)]
pub(super) struct Figures;

impl Collector for Figures {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Ok(process) = Process::myself() else { return Ok(()) };
        let mut gauge = |name, help, unit: Option<Unit>, value: f64| {
            let encoder =
                encoder.encode_descriptor(name, help, unit.as_ref(), MetricType::Gauge)?;
            ConstGauge::new(value).encode(encoder)
        };
        if let Ok(stat) = process.stat() {
            let ticks = number(procfs::ticks_per_second());
            let resident = number(stat.rss) * number(procfs::page_size());
            gauge(
                "process_virtual_memory",
                "Virtual memory.",
                Some(Unit::Bytes),
                number(stat.vsize),
            )?;
            gauge("process_resident_memory", "Resident memory.", Some(Unit::Bytes), resident)?;
            gauge("process_threads", "Threads.", None, stat.num_threads as f64)?;
            if let Ok(boot) = procfs::boot_time_secs() {
                let start = number(boot) + number(stat.starttime) / ticks;
                let help = "When the process started, since the epoch.";
                gauge("process_start_time", help, Some(Unit::Seconds), start)?;
            }
            let seconds = number(stat.utime + stat.stime) / ticks;
            let help = "Processor time used, user and system.";
            let unit = Some(Unit::Seconds);
            let encoder = encoder.encode_descriptor(
                "process_cpu",
                help,
                unit.as_ref(),
                MetricType::Counter,
            )?;
            ConstCounter::new(seconds).encode(encoder)?;
        }
        let mut gauge = |name, help, value: f64| {
            let encoder = encoder.encode_descriptor(name, help, None, MetricType::Gauge)?;
            ConstGauge::new(value).encode(encoder)
        };
        if let Ok(count) = process.fd_count() {
            gauge("process_open_fds", "Open file descriptors.", number(count as u64))?;
        }
        if let Ok(limits) = process.limits()
            && let LimitValue::Value(most) = limits.max_open_files.soft_limit
        {
            gauge("process_max_fds", "Most file descriptors that may be open.", number(most))?;
        }
        Ok(())
    }
}

fn number(value: u64) -> f64 {
    value as f64
}
