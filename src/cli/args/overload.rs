//! `--overload`, which a file has as `[[overload]]`: pairs of key and value.

use std::collections::BTreeSet;
use std::time::Duration;

use super::values::{interval, port};
use crate::overload::{Overload, Place};
use crate::sockdiag::State;

/// `ports=80,443 above=50 states=established,close-wait mask=32 mask6=128 for=10m set=inet t s`
pub(super) fn overload(text: &str) -> Result<Overload, String> {
    let mut this = Overload {
        ports: BTreeSet::new(),
        above: 0,
        states: [State::Established, State::CloseWait].into_iter().collect(),
        mask: 32,
        mask6: 128,
        time: Duration::from_secs(600),
        sets: Vec::new(),
    };
    for (key, value) in pairs(text)? {
        let list = || value.split(',').map(str::trim);
        let wrong = |error: String| format!("{key}: '{value}': {error}");
        let number = |most: u8| match value.parse() {
            Ok(bits) if bits <= most => Ok(bits),
            _ => Err(wrong(format!("a prefix length up to {most} is expected"))),
        };
        match key.as_str() {
            "ports" => {
                let port =
                    |text: &str| port(text).map_err(|_| wrong("ports are expected".to_owned()));
                this.ports = list().map(port).collect::<Result<_, _>>()?;
            }
            "above" => {
                this.above = value.parse().map_err(|_| wrong("a number is expected".to_owned()))?;
            }
            "states" => {
                let state = |text: &str| match text.parse::<State>() {
                    Ok(state) if State::OPEN.contains(&state) => Ok(state),
                    Ok(state) => Err(wrong(format!("no application has a socket in {state}"))),
                    Err(error) => Err(wrong(error.to_string())),
                };
                this.states = list().map(state).collect::<Result<_, _>>()?;
            }
            "mask" => this.mask = number(32)?,
            "mask6" => this.mask6 = number(128)?,
            "for" => this.time = interval(&value).map_err(wrong)?,
            "set" => {
                this.sets = list().map(|it| place(it).map_err(wrong)).collect::<Result<_, _>>()?;
            }
            _ => {
                return Err(format!(
                    "unknown key '{key}'; there are ports, above, states, mask, mask6, for, set"
                ));
            }
        }
    }
    match this.above {
        0 => Err("above is missing: how many sockets a source may hold".to_owned()),
        _ if this.time < Duration::from_secs(1) => Err("for: at least 1s".to_owned()),
        _ => Ok(this),
    }
}

/// A word without an equals sign belongs to the value before it: `set=inet filter bad`.
fn pairs(text: &str) -> Result<Vec<(String, String)>, String> {
    let mut pairs: Vec<(String, String)> = Vec::new();
    for word in text.split_whitespace() {
        match (word.split_once('='), pairs.last_mut()) {
            (Some((key, value)), _) => pairs.push((key.to_owned(), value.to_owned())),
            (None, Some((_, value))) => {
                value.push(' ');
                value.push_str(word);
            }
            (None, None) => return Err(format!("'{word}': expected key=value")),
        }
    }
    Ok(pairs)
}

fn place(text: &str) -> Result<Place, String> {
    let words: Vec<_> = text.split_whitespace().map(str::to_owned).collect();
    let family = words.first().map(String::as_str).unwrap_or_default();
    match <[String; 3]>::try_from(words.clone()) {
        Ok([family, table, set]) if ["inet", "ip", "ip6", "netdev"].contains(&family.as_str()) => {
            Ok(Place { family, table, set })
        }
        Ok(_) => Err(format!("'{family}' is no family of nft tables: inet, ip, ip6, netdev")),
        Err(_) => Err("expected family, table and set: inet filter bad".to_owned()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_overload_is_read_and_what_is_wrong_is_named() {
        let text = "ports=80,443 above=10 states=established mask=24 for=5m set=inet filter bad, \
                    inet filter bad6";
        let read = overload(text).unwrap();
        assert_eq!(
            (read.ports, read.above, read.mask, read.mask6),
            ([80, 443].into(), 10, 24, 128)
        );
        assert_eq!(read.sets.len(), 2);
        assert_eq!(read.sets[1].set, "bad6");
        assert_eq!(overload("above=3").unwrap().time, Duration::from_secs(600));
        for (text, word) in [
            ("ports=80", "above"),
            ("above=3 abve=2", "abve"),
            ("above=3 states=time-wait", "time-wait"),
            ("above=3 set=bad", "family"),
            ("above=3 set=bridge a b", "bridge"),
            ("above=3 mask=33", "32"),
            ("above=3 ports=0", "ports"),
        ] {
            let error = overload(text).unwrap_err();
            assert!(error.contains(word), "{text}: {error}");
        }
    }
}
