//! Which connections the shield of a running daemon covers, and why not. Pure.

use std::fmt;

use crate::host::instance::Shielded;
use crate::reconcile::snapshot::View;

/// How the shield stands to one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Coverage {
    /// Conntrack sees of it what TCP acts on, and nothing else that could close the entry.
    Covered,
    /// It is, if it comes in by a device that the shield is at; it is not at all of them.
    PerhapsCovered,
    /// No daemon with a shield guards the namespace.
    NoShield,
    /// The daemon guards other ports.
    OtherPort,
    /// On the wire it has another tuple than its socket, which is therefore not found.
    Translated,
    /// It stays on this host.
    Loopback,
}

impl Coverage {
    /// The cover of a connection by what the daemon says of its shield.
    pub fn of(shield: Option<&Shielded>, view: &View) -> Self {
        match shield {
            None => Self::NoShield,
            Some(shield) if !shield.ports.contains(&view.connection.local.port()) => {
                Self::OtherPort
            }
            Some(_) if view.entry.is_some_and(|entry| entry.is_translated()) => Self::Translated,
            Some(_) if is_local(view) => Self::Loopback,
            Some(shield) if !shield.is_whole => Self::PerhapsCovered,
            Some(_) => Self::Covered,
        }
    }

    /// Whether it is covered for certain.
    pub fn is_certain(self) -> bool {
        self == Self::Covered
    }
}

fn is_local(view: &View) -> bool {
    view.connection.remote.addr().is_loopback()
        || view.connection.remote.addr() == view.connection.local.addr()
}

impl fmt::Display for Coverage {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Covered => "covers it",
            Self::PerhapsCovered => "covers it unless its device has no shield (see the log)",
            Self::NoShield => "none",
            Self::OtherPort => "not this port",
            Self::Translated => "not this connection: its address or port is translated",
            Self::Loopback => "not this connection: it stays on this host",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::conntrack::{Entry, Zone};
    use crate::flow::Connection;

    #[test]
    fn what_the_wire_shows_of_a_guarded_port_is_covered() {
        let connection = |local: &str, remote: &str| {
            Connection::new(local.parse().unwrap(), remote.parse().unwrap())
        };
        let plain = connection("192.0.2.1:80", "198.51.100.7:4000");
        let view = |connection, entry| View { connection, socket: None, entry };
        let shield = Shielded { ports: [80].into(), is_whole: true };
        let partly = Shielded { is_whole: false, ..shield.clone() };
        let of = |view| Coverage::of(Some(&shield), &view);
        assert_eq!(of(view(plain, None)), Coverage::Covered);
        assert_eq!(Coverage::of(Some(&partly), &view(plain, None)), Coverage::PerhapsCovered);
        assert_eq!(Coverage::of(None, &view(plain, None)), Coverage::NoShield);
        assert_eq!(
            of(view(connection("192.0.2.1:81", "198.51.100.7:4000"), None)),
            Coverage::OtherPort
        );
        assert_eq!(
            of(view(connection("127.0.0.1:80", "127.0.0.1:4000"), None)),
            Coverage::Loopback
        );
        let redirected = Entry {
            reply: connection("192.0.2.1:8080", "198.51.100.7:4000").sent(),
            ..Entry::plain(plain.received(), Zone::default())
        };
        assert_eq!(of(view(plain, Some(redirected))), Coverage::Translated);
    }
}
