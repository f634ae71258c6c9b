//! Addresses as `ss` and `netstat` print them. Pure.

use super::Mistake;
use crate::flow::Endpoint;

/// `192.0.2.1:80`, `[2001:db8::1]:80`, `2001:db8::1:80` (netstat, old ss), `*:80`, `0.0.0.0:*`,
/// a device behind `%`.
pub(super) fn endpoint(text: &str) -> Result<Endpoint, Mistake> {
    let wrong =
        || Mistake::new("without numbers", format!("'{text}' is no numeric address and port"));
    let (address, port) = text.rsplit_once(':').ok_or_else(wrong)?;
    let address = address.split('%').next().unwrap_or(address);
    let address = match address.trim_start_matches('[').trim_end_matches(']') {
        "*" => "::",
        address => address,
    };
    let port = if port == "*" { 0 } else { port.parse().map_err(|_| wrong())? };
    Ok(Endpoint::new(address.parse().map_err(|_| wrong())?, port))
}

/// Whether a word has the form of an address with a port, numeric or not.
pub(super) fn is_endpoint(word: &str) -> bool {
    word.rsplit_once(':').is_some_and(|(address, port)| !address.is_empty() && !port.is_empty())
        && !word.contains(['(', '"', '='])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_form_of_an_address_is_read() {
        for (text, read) in [
            ("192.0.2.1:80", "192.0.2.1:80"),
            ("192.0.2.1%eth0:443", "192.0.2.1:443"),
            ("[::ffff:192.0.2.1]:80", "192.0.2.1:80"),
            ("::ffff:192.0.2.1:80", "192.0.2.1:80"),
            ("[fe80::1%eth0]:80", "[fe80::1]:80"),
            ("[fe80::1]%eth0:80", "[fe80::1]:80"),
            ("*:80", "[::]:80"),
            (":::8081", "[::]:8081"),
            ("0.0.0.0:*", "0.0.0.0:0"),
        ] {
            assert_eq!(endpoint(text).unwrap().to_string(), read, "{text}");
        }
        for text in ["192.0.2.1:https", "host.example:80", "192.0.2.1", "192.0.2.1:70000", ":80"] {
            assert!(endpoint(text).is_err(), "{text}");
        }
    }
}
