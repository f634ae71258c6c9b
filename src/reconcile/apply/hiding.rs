//! Which packets of a connection's peer are hidden from conntrack once it is repaired.

use std::collections::HashMap;
use std::net::IpAddr;

use crate::reconcile::ledger::Ledger;
use crate::reconcile::plan::{Action, ActionKind};
use crate::reconcile::pressure::client_of;
use crate::recount::Hidden;
use crate::sockdiag::State;

/// For each of these actions, in their order: which packets of its peer are hidden from conntrack.
///
/// A peer that fools conntrack once may be the victim of a lossy line, and one of its RSTs may yet be
/// an honest one. A peer that does it again past a seal, or from several ports, is neither.
pub(super) fn hiding(actions: &[Action], ledger: &Ledger) -> Vec<Option<Hidden>> {
    let mut repairs: HashMap<IpAddr, u32> = HashMap::new();
    for action in actions.iter().filter(|action| action.reason.is_fooled()) {
        *repairs.entry(client_of(action.view.connection.remote.addr())).or_default() += 1;
    }
    actions
        .iter()
        .map(|action| {
            let socket = action.view.socket?;
            let source = action.view.connection.remote.addr();
            let more = repairs.get(&client_of(source)).copied().unwrap_or(0);
            let again = ledger.hidden(&socket).is_some() || ledger.pressure().offends(source, more);
            let had_its_fin =
                matches!(socket.state, State::CloseWait | State::LastAck | State::Closing);
            match action.kind {
                _ if action.reason.is_fooled() && again => Some(Hidden::FinsAndRsts),
                _ if action.reason.is_fooled() => Some(Hidden::Fins),
                ActionKind::Reverse | ActionKind::Seal if had_its_fin => Some(Hidden::Fins),
                _ => None,
            }
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::conntrack::{Entry, TcpState, Zone};
    use crate::flow::Connection;
    use crate::reconcile::plan::Reason;
    use crate::reconcile::snapshot::View;
    use crate::sockdiag::{Cookie, Socket};

    fn revive(port: u16) -> Action {
        let connection = Connection::new(
            "192.0.2.1:80".parse().unwrap(),
            format!("198.51.100.7:{port}").parse().unwrap(),
        );
        let socket = Socket {
            local: connection.local,
            remote: connection.remote,
            state: State::CloseWait,
            cookie: Cookie(u64::from(port)),
            inode: 1,
            uid: 0,
            interface: 0,
            recv_queue: 0,
            send_queue: 0,
        };
        let entry = Entry::plain(connection.received(), Zone::default());
        Action {
            kind: ActionKind::Revive,
            reason: Reason::EntryClosed(TcpState::Close),
            view: View { connection, socket: Some(socket), entry: Some(entry) },
            template: entry,
        }
    }

    #[test]
    fn the_first_repair_hides_fins_and_the_next_rsts_too() {
        let mut ledger = Ledger::default();
        let action = revive(4000);
        let socket = action.view.socket.unwrap();
        assert_eq!(hiding(&[action], &ledger), [Some(Hidden::Fins)]);
        ledger.hold(socket, action.template, Instant::now());
        ledger.set_hidden(&socket, Hidden::Fins);
        assert_eq!(hiding(&[action], &ledger), [Some(Hidden::FinsAndRsts)]);
    }

    #[test]
    fn a_source_of_many_repairs_is_hidden_at_once() {
        let actions: Vec<_> = (4000..4003).map(revive).collect();
        let ledger = Ledger::default();
        assert_eq!(hiding(&actions, &ledger), [Some(Hidden::FinsAndRsts); 3]);
        assert_eq!(hiding(actions.get(..2).unwrap(), &ledger), [Some(Hidden::Fins); 2]);
    }
}
