//! What may not be shown to a limit that logs or bans what exceeds it.

use std::collections::{HashMap, HashSet};
use std::net::IpAddr;

use ipnet::IpNet;

use super::Keeper;
use crate::error::Result;
use crate::netlink::Transport;
use crate::reconcile::groups::{Group, Groups, Member};
use crate::reconcile::plan::Action;
use crate::reconcile::uncounted::net;
use crate::recount::Recount;
use crate::sockdiag::{Cookie, Socket};

impl<T: Transport, R: Recount> Keeper<T, R> {
    /// Connections that may not be shown to a limit, since they would exceed it and it logs or writes to
    /// a set what does: beyond what it counts together with them already. They wait until others end.
    pub(super) fn withheld(&mut self, actions: &[Action]) -> Result<HashSet<Cookie>> {
        let mut withheld = HashSet::new();
        if !self.checks.are_told_of() {
            return Ok(withheld);
        }
        let known = self.checks.known();
        let mut groups = Groups::new(&known);
        let mut wanted = Vec::new();
        let mut places: HashMap<Group, usize> = HashMap::new();
        // Of whom others may be counted together with these; `None` is everybody.
        let mut near: Option<HashSet<IpNet>> = Some(HashSet::new());
        for action in actions.iter().filter(|action| action.kind.needs_recount()) {
            let Some(socket) = action.view.socket else { continue };
            let syn = self.syn(socket.connection(), Some(&action.template), &groups)?;
            let members = groups.of(&syn);
            for member in members.iter().filter(|member| member.rule.tells) {
                places.extend(member.group.clone().map(|group| (group, 0)));
                near = match (near, net(member.rule, syn.source)) {
                    (Some(mut near), Some(net)) => {
                        near.insert(net);
                        Some(near)
                    }
                    _ => None,
                };
            }
            wanted.push((socket.cookie, members));
        }
        if wanted.iter().all(|(_, members)| members.iter().all(|member| !member.rule.tells)) {
            return Ok(withheld);
        }
        let is_near = |peer: IpAddr| {
            near.as_ref().is_none_or(|near| near.iter().any(|net| net.contains(&peer)))
        };
        let sockets = self.guarded()?;
        let shown: HashSet<_> = wanted.iter().map(|(cookie, _)| *cookie).collect();
        let is_counted = |socket: &&Socket| {
            !shown.contains(&socket.cookie) && self.ledger.uncounted(socket).is_none()
        };
        let counted = sockets.iter().filter(is_counted).map(Socket::connection);
        // A list has what is ending until its entry is given back.
        let open: HashSet<_> = sockets.iter().map(|socket| socket.cookie).collect();
        let held = self.ledger.held().filter(|held| !open.contains(&held.cookie));
        let ending = held.map(|held| held.lookup.connection);
        let all: Vec<_> = counted.chain(ending).filter(|it| is_near(it.remote.addr())).collect();
        for connection in all {
            let syn = self.syn(connection, None, &groups)?;
            for group in groups.of(&syn).iter().filter_map(|member| member.group.as_ref()) {
                if let Some(taken) = places.get_mut(group) {
                    *taken += 1;
                }
            }
        }
        for (cookie, members) in wanted {
            let telling = || members.iter().filter(|member| member.rule.tells);
            let taken = |member: &Member<'_>| places.get(member.group.as_ref()?).copied();
            if telling().all(|member| taken(member).is_some_and(|taken| taken < member.limit)) {
                for group in telling().filter_map(|member| member.group.clone()) {
                    *places.entry(group).or_default() += 1;
                }
            } else {
                withheld.insert(cookie);
            }
        }
        Ok(withheld)
    }
}
