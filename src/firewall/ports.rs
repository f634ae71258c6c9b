//! A set of TCP ports, as rules name them.

use std::fmt;

/// Ports, as ranges in order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ports(Vec<(u16, u16)>);

impl Default for Ports {
    /// All ports.
    fn default() -> Self {
        Self(vec![(0, u16::MAX)])
    }
}

impl Ports {
    /// These ranges, both ends included.
    pub fn of(ranges: impl IntoIterator<Item = (u16, u16)>) -> Self {
        let mut ranges: Vec<_> = ranges.into_iter().filter(|(from, to)| from <= to).collect();
        ranges.sort_unstable();
        let mut merged: Vec<(u16, u16)> = Vec::new();
        for (from, to) in ranges {
            match merged.last_mut() {
                Some(last) if from <= last.1.saturating_add(1) => last.1 = last.1.max(to),
                _ => merged.push((from, to)),
            }
        }
        Self(merged)
    }

    /// Whether `port` is among them.
    pub fn contains(&self, port: u16) -> bool {
        self.0.iter().any(|(from, to)| (*from..=*to).contains(&port))
    }

    /// Whether it says nothing.
    pub fn is_all(&self) -> bool {
        *self == Self::default()
    }

    /// Whether no port is left.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Ports in both.
    #[must_use]
    pub fn and(&self, other: &Self) -> Self {
        let pairs = self.0.iter().flat_map(|a| other.0.iter().map(move |b| (a, b)));
        Self::of(pairs.map(|(a, b)| (a.0.max(b.0), a.1.min(b.1))))
    }

    /// Ports in either.
    #[must_use]
    pub fn or(&self, other: &Self) -> Self {
        Self::of(self.0.iter().chain(&other.0).copied())
    }

    /// All others.
    #[must_use]
    pub fn not(&self) -> Self {
        let mut next = Some(0_u16);
        let mut gaps = Vec::new();
        for (from, to) in &self.0 {
            if let Some(start) = next
                && let Some(end) = from.checked_sub(1)
            {
                gaps.push((start, end));
            }
            next = to.checked_add(1);
        }
        gaps.extend(next.map(|start| (start, u16::MAX)));
        Self::of(gaps)
    }
}

impl fmt::Display for Ports {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.is_all() {
            return f.write_str("any");
        }
        for (index, (from, to)) in self.0.iter().enumerate() {
            let comma = if index == 0 { "" } else { "," };
            match from == to {
                true => write!(f, "{comma}{from}")?,
                false => write!(f, "{comma}{from}-{to}")?,
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sets_of_ports_are_cut_and_turned_round() {
        let web = Ports::of([(443, 443), (80, 80), (8000, 8010)]);
        assert_eq!(web.to_string(), "80,443,8000-8010");
        assert_eq!(web.not().not(), web);
        assert_eq!(web.not().to_string(), "0-79,81-442,444-7999,8011-65535");
        assert_eq!(Ports::of([(0, 100), (50, 65535)]), Ports::default());
        assert_eq!(web.and(&Ports::of([(81, 8000)])).to_string(), "443,8000");
        assert!(web.and(&web.not()).is_empty());
        assert!(Ports::default().not().is_empty());
    }
}
