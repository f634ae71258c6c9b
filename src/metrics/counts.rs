//! Counters and histograms. All guards add to the same, so that several sum up by themselves and
//! none ever goes down.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::{counter, histogram};

use super::spec::{Count, Histogram, Spec};

/// By label values; all of them are there from the start.
type Family<M> = BTreeMap<Vec<&'static str>, M>;

/// What has happened since the start.
#[derive(Debug)]
pub(super) struct Counts {
    counters: Vec<Family<counter::Counter>>,
    histograms: Vec<Family<histogram::Histogram>>,
}

impl Default for Counts {
    /// All of them at 0.
    fn default() -> Self {
        let counter = |_: &Spec| counter::Counter::default();
        let histogram = |spec: &Spec| histogram::Histogram::new(spec.buckets.iter().copied());
        Self {
            counters: Count::ALL.iter().map(|it| family(it.spec(), counter)).collect(),
            histograms: Histogram::ALL.iter().map(|it| family(it.spec(), histogram)).collect(),
        }
    }
}

fn family<M>(spec: &Spec, new: impl Fn(&Spec) -> M) -> Family<M> {
    spec.values().into_iter().map(|labels| (labels, new(spec))).collect()
}

impl Counts {
    /// So many more.
    pub(super) fn add(&self, count: Count, labels: &[&'static str], more: u64) {
        let counter = self.counters.get(count as usize).and_then(|family| family.get(labels));
        debug_assert!(counter.is_some(), "{count:?}{labels:?}");
        if let Some(counter) = counter {
            counter.inc_by(more);
        }
    }

    /// One value.
    pub(super) fn value(&self, count: Count, labels: &[&'static str]) -> u64 {
        let counter = self.counters.get(count as usize).and_then(|family| family.get(labels));
        counter.map_or(0, counter::Counter::get)
    }

    /// One more, of this size.
    pub(super) fn observe(&self, histogram: Histogram, labels: &[&'static str], value: f64) {
        let found = self.histograms.get(histogram as usize).and_then(|family| family.get(labels));
        debug_assert!(found.is_some(), "{histogram:?}{labels:?}");
        if let Some(found) = found {
            found.observe(value);
        }
    }

    /// Writes all of them.
    pub(super) fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        fn owned<M: Clone>(family: &Family<M>) -> impl Iterator<Item = (Vec<String>, M)> {
            let owned = |labels: &Vec<&str>| labels.iter().map(|it| (*it).to_owned()).collect();
            family.iter().map(move |(labels, metric)| (owned(labels), metric.clone()))
        }
        for (count, family) in Count::ALL.iter().zip(&self.counters) {
            count.spec().encode(encoder, MetricType::Counter, owned(family))?;
        }
        for (histogram, family) in Histogram::ALL.iter().zip(&self.histograms) {
            histogram.spec().encode(encoder, MetricType::Histogram, owned(family))?;
        }
        Ok(())
    }
}
