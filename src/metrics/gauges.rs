//! What a guard knows of the present: one value for each gauge and its labels, and how the values of
//! several guards become one.

use std::collections::BTreeMap;
use std::fmt;

use prometheus_client::encoding::DescriptorEncoder;
use prometheus_client::metrics::MetricType;
use prometheus_client::metrics::gauge::ConstGauge;

use super::spec::{Gauge, Merge};

/// Values by gauge and label values; what is not there is 0.
#[derive(Clone, Debug, Default)]
pub(super) struct Gauges(BTreeMap<Gauge, BTreeMap<Vec<String>, f64>>);

impl Gauges {
    /// Sets one value.
    pub(super) fn set(&mut self, gauge: Gauge, labels: &[&str], value: f64) {
        let labels = labels.iter().map(|label| (*label).to_owned()).collect();
        self.0.entry(gauge).or_default().insert(labels, value);
    }

    /// Takes all values of these gauges instead of its own.
    pub(super) fn replace(&mut self, other: Self) {
        self.0.extend(other.0);
    }

    /// One value.
    pub(super) fn value(&self, gauge: Gauge, labels: &[&str]) -> f64 {
        let values = self.0.get(&gauge);
        let found = values.and_then(|values| values.iter().find(|(key, _)| *key == labels));
        found.map_or(0.0, |(_, value)| *value)
    }

    /// All values of a gauge added up.
    pub(super) fn sum(&self, gauge: Gauge) -> f64 {
        self.0.get(&gauge).map_or(0.0, |values| values.values().sum())
    }

    /// Takes another guard's values in; `is_own` where that is the guard of the own namespace.
    pub(super) fn merge(&mut self, other: &Self, is_own: bool) {
        for (gauge, values) in &other.0 {
            let own = self.0.entry(*gauge).or_default();
            for (labels, value) in values {
                let merged = own.entry(labels.clone()).or_insert(match gauge.spec().merge {
                    Merge::Sum | Merge::Own => 0.0,
                    Merge::Largest | Merge::Smallest => *value,
                });
                *merged = match gauge.spec().merge {
                    Merge::Sum => *merged + value,
                    Merge::Own if is_own => *value,
                    Merge::Own => *merged,
                    Merge::Largest => merged.max(*value),
                    Merge::Smallest => merged.min(*value),
                };
            }
        }
    }

    /// Writes all gauges, those without a value as 0.
    pub(super) fn encode(&self, encoder: &mut DescriptorEncoder<'_>) -> fmt::Result {
        for gauge in Gauge::ALL {
            let spec = gauge.spec();
            let owned = |labels: Vec<&str>| labels.into_iter().map(str::to_owned).collect();
            let mut values: BTreeMap<Vec<String>, f64> =
                spec.values().into_iter().map(|labels| (owned(labels), 0.0)).collect();
            if let Some(known) = self.0.get(gauge) {
                values.extend(known.iter().map(|(labels, value)| (labels.clone(), *value)));
            }
            let values = values.into_iter().map(|(labels, value)| (labels, ConstGauge::new(value)));
            spec.encode(encoder, MetricType::Gauge, values)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn guards_add_up_and_the_worst_of_them_counts() {
        let mut total = Gauges::default();
        for (held, level, sweep) in [(3.0, 0.0, 70.0), (4.0, 1.0, 60.0)] {
            let mut guard = Gauges::default();
            guard.set(Gauge::Held, &["ipv4"], held);
            guard.set(Gauge::DefenceLevel, &[], level);
            guard.set(Gauge::LastSweep, &[], sweep);
            total.merge(&guard, false);
        }
        assert_eq!(total.value(Gauge::Held, &["ipv4"]), 7.0);
        assert_eq!(total.value(Gauge::DefenceLevel, &[]), 1.0);
        assert_eq!(total.value(Gauge::LastSweep, &[]), 60.0);
    }
}
