//! The values that options take, as they are written.

use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use ipnet::IpNet;

use super::Listen;
use crate::daemon::{OnExit, ShieldMode};
use crate::flow::Endpoint;
use crate::reconcile::pressure::{Defence, Level};
use crate::recount::Mode;
use crate::sockdiag::State;
use crate::watch::EventSource;

/// States in which an application can still have the socket.
pub(super) fn guarded_state() -> impl TypedValueParser<Value = State> {
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

pub(super) fn endpoint(text: &str) -> std::result::Result<Endpoint, String> {
    match text.parse::<Endpoint>() {
        Ok(endpoint) if endpoint.port() > 0 => Ok(endpoint),
        _ => Err("expected an address with a port: 192.0.2.1:80 or [2001:db8::1]:80".to_owned()),
    }
}

pub(super) fn port(text: &str) -> std::result::Result<u16, String> {
    match text.parse() {
        Ok(port) if port > 0 => Ok(port),
        _ => Err("expected a port, 1 to 65535".to_owned()),
    }
}

pub(super) fn network(text: &str) -> std::result::Result<IpNet, String> {
    if let Ok(addr) = text.parse::<std::net::IpAddr>() {
        return Ok(IpNet::from(addr.to_canonical()));
    }
    text.parse::<IpNet>()
        .map(|net| net.trunc())
        .map_err(|_| "expected an address or a network such as 198.51.100.0/24".to_owned())
}

pub(super) fn duration(text: &str) -> std::result::Result<Duration, String> {
    if text.bytes().all(|byte| byte.is_ascii_digit()) && !text.is_empty() {
        return Err(format!("a time needs a unit: {text}s"));
    }
    humantime::parse_duration(text).map_err(|error| format!("{error}; expected 30s, 1m, 500ms"))
}

pub(super) fn interval(text: &str) -> std::result::Result<Duration, String> {
    match duration(text)? {
        time if time < Duration::from_millis(10) => Err("at least 10ms".to_owned()),
        time if time > Duration::from_secs(86_400) => Err("at most 1day".to_owned()),
        time => Ok(time),
    }
}

/// Conntrack counts whole seconds, and a lease must outlive the sweeps that renew it.
pub(super) fn lease(text: &str) -> std::result::Result<Duration, String> {
    match duration(text)? {
        time if time < Duration::from_secs(2) => Err("at least 2s".to_owned()),
        time if time > Duration::from_secs(86_400) => Err("at most 1day".to_owned()),
        time => Ok(time),
    }
}

pub(super) fn listen(text: &str) -> std::result::Result<Listen, String> {
    match text.parse() {
        _ if text == "off" => Ok(Listen(None)),
        Ok(address) => Ok(Listen(Some(address))),
        Err(_) => Err("expected 127.0.0.1:9815, [::1]:9815 or the like, or off".to_owned()),
    }
}

/// What the kernel takes as an interface name (`dev_valid_name()`).
pub(super) fn device(text: &str) -> std::result::Result<String, String> {
    let valid = (1..=15).contains(&text.len())
        && !matches!(text, "." | "..")
        && text.bytes().all(|byte| byte.is_ascii_graphic() && !b"/:%".contains(&byte));
    if valid { Ok(text.to_owned()) } else { Err("no name for an interface".to_owned()) }
}

pub(super) fn mark_bit(text: &str) -> std::result::Result<u32, String> {
    let bit = match text.strip_prefix("0x") {
        Some(digits) => u32::from_str_radix(digits, 16),
        None => text.parse(),
    };
    bit.ok()
        .filter(|bit| bit.is_power_of_two())
        .ok_or_else(|| "expected a number with one bit set, such as 0x1000".to_owned())
}

pub(super) fn shield() -> impl TypedValueParser<Value = ShieldMode> {
    PossibleValuesParser::new(["auto", "on", "off"]).map(|name| match name.as_str() {
        "auto" => ShieldMode::Auto,
        "on" => ShieldMode::On,
        _ => ShieldMode::Off,
    })
}

pub(super) fn auto_or_off() -> impl TypedValueParser<Value = bool> {
    PossibleValuesParser::new(["auto", "off"]).map(|name| name == "auto")
}

pub(super) fn off_or_extend() -> impl TypedValueParser<Value = bool> {
    PossibleValuesParser::new(["off", "extend"]).map(|name| name == "extend")
}

pub(super) fn recount_route() -> impl TypedValueParser<Value = Mode> {
    PossibleValuesParser::new(["auto", "ingress", "loopback"]).map(|name| match name.as_str() {
        "ingress" => Mode::Ingress,
        "loopback" => Mode::Loopback,
        _ => Mode::Auto,
    })
}

pub(super) fn recount_mode() -> impl TypedValueParser<Value = Mode> {
    PossibleValuesParser::new(["auto", "ingress", "loopback", "off"]).map(|name| {
        match name.as_str() {
            "ingress" => Mode::Ingress,
            "loopback" => Mode::Loopback,
            "off" => Mode::Off,
            _ => Mode::Auto,
        }
    })
}

pub(super) fn event_source() -> impl TypedValueParser<Value = EventSource> {
    PossibleValuesParser::new(["auto", "nflog", "ctnetlink", "off"]).map(|name| {
        match name.as_str() {
            "nflog" => EventSource::Nflog,
            "ctnetlink" => EventSource::Ctnetlink,
            "off" => EventSource::Off,
            _ => EventSource::Auto,
        }
    })
}

pub(super) fn defence() -> impl TypedValueParser<Value = Defence> {
    PossibleValuesParser::new(["auto", "0", "1", "2"]).map(|name| match name.as_str() {
        "0" => Defence::Fixed(Level::Calm),
        "1" => Defence::Fixed(Level::Alert),
        "2" => Defence::Fixed(Level::Manual),
        _ => Defence::Auto,
    })
}

pub(super) fn on_exit() -> impl TypedValueParser<Value = OnExit> {
    PossibleValuesParser::new(["keep", "release"]).map(|name| match name.as_str() {
        "release" => OnExit::Release,
        _ => OnExit::Keep,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bare_address_is_a_network_of_one() {
        assert_eq!(network("198.51.100.7").unwrap().to_string(), "198.51.100.7/32");
        assert_eq!(network("198.51.100.7/24").unwrap().to_string(), "198.51.100.0/24");
        assert!(network("198.51.100.0/33").is_err());
    }
}
