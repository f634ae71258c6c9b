//! Names what a look has shown, and adds it up.

mod json;

use std::collections::{BTreeMap, HashSet};
use std::net::IpAddr;
use std::sync::Arc;
use std::time::SystemTime;

use ipnet::IpNet;

use super::asked::listed;
use super::classes::Class;
use super::cover::Coverage;
use super::families::{self, Reached};
use super::finding::{Finding, Verdict, worst};
use super::fronts::Front;
use super::judge;
use super::judge::sockets::WithoutEntry;
use super::layers::{Inputs, Layers, seems_to_be_for_containers};
use super::loads::loads;
use super::look::Seen;
use super::processes::Holder;
use super::proxies::{self, Led};
use super::sources::{Measure, Source, sources};
use crate::conntrack::TcpState;
use crate::firewall::limits::LimitRule;
use crate::firewall::published::published;
use crate::firewall::{Hook, Ruleset};
use crate::flow::Connection;
use crate::reconcile::outgoing::Survey;
use crate::reconcile::plan::cell;
use crate::reconcile::policy::{Policy, Scope};
use crate::reconcile::snapshot::View;
use crate::reconcile::whole::Others;
use crate::sockdiag::{Socket, State};

/// The questions of an audit beyond the scope.
#[derive(Clone, Copy, Debug)]
pub struct Request {
    /// The limit of the rules, where the administrator names it.
    pub limit: Option<u32>,
    /// Prefix length of IPv4 sources; by default that of the rules, else 32.
    pub mask: Option<u8>,
    /// Prefix length of IPv6 sources; by default that of the rules, else 128.
    pub mask6: Option<u8>,
    /// When the look is taken.
    pub now: SystemTime,
}

/// One connection of the report.
#[derive(Clone, Debug)]
pub struct ReportedConnection {
    /// Both tables' view, after an exact look-up where they disagree.
    pub view: View,
    /// How they stand to each other.
    pub class: Class,
    /// Zones in which it has entries beside that one.
    pub other_zones: Vec<u16>,
    /// Who holds the socket.
    pub holder: Option<Arc<Holder>>,
    /// How the shield stands to it; `None` for saved tables.
    pub cover: Option<Coverage>,
}

/// The report of one namespace.
#[derive(Clone, Debug)]
pub struct Report {
    netns: String,
    kernel: String,
    /// As the administrator named it, with the verdict on it.
    limit: Option<(u32, Verdict)>,
    mask: u8,
    mask6: u8,
    now: SystemTime,
    sockets: BTreeMap<State, usize>,
    entries: BTreeMap<TcpState, usize>,
    /// Every connection of the scope.
    pub connections: Vec<ReportedConnection>,
    /// Sources, those that hurt most first.
    pub sources: Vec<Source>,
    /// What a connection passes on its way in.
    pub layers: Layers,
    /// Limits were asked what their lists hold.
    pub is_asked: bool,
    /// Half-closed connections that this host opened; `None` for saved tables.
    pub outgoing: Option<Survey>,
    /// How many of these a daemon looks after, how many of their entries it keeps, and how many are lost.
    pub outgoing_kept: Option<[usize; 3]>,
}

impl Report {
    /// Names and adds up what was seen. Pure.
    pub fn of(seen: Seen, scope: &Scope, policy: &Policy, request: Request) -> Self {
        let Seen { snapshot, ledger, limiter, .. } = &seen;
        let told = seen.told.clone().unwrap_or_default();
        let in_scope = |socket: &&Socket| scope.has_port(socket.local.port());
        let listeners: Vec<Socket> = seen.listeners.iter().filter(in_scope).copied().collect();
        let mut sockets: BTreeMap<_, _> = State::ALL.map(|state| (state, 0)).into();
        let mut entries: BTreeMap<_, _> = TcpState::ALL.map(|state| (state, 0)).into();
        sockets.insert(State::Listen, listeners.len());
        for view in snapshot.views.iter() {
            if let Some(socket) = view.socket {
                *sockets.entry(socket.state).or_default() += 1;
            }
            if let Some(state) = view.entry.and_then(|entry| entry.state()) {
                *entries.entry(state).or_default() += 1;
            }
        }
        let measure = Measure {
            mask: request.mask.or_else(|| limiter.prefix(true)).unwrap_or(32),
            mask6: request.mask6.or_else(|| limiter.prefix(false)).unwrap_or(128),
            limit: request.limit,
            limiter,
        };
        let mut plays = seen.plays();
        let loads = loads(snapshot.views.iter(), &mut plays);
        let others = seen.listeners.iter().filter(|socket| !in_scope(socket));
        let left_out = others.filter(|socket| !socket.local.addr().is_loopback());
        let left_out = left_out.map(|socket| socket.local.port()).collect();
        let mut unlimited = Vec::new();
        if limiter.rules.iter().any(seems_to_be_for_containers) {
            let is_open = |view: &View| view.socket.is_some_and(|it| it.takes_a_slot());
            let is_forwarded = |view: &View| seen.behind.contains(&view.connection.local.addr());
            let held = snapshot.views.iter().filter(|view| is_open(view) && is_forwarded(view));
            unlimited.extend(held.filter(|view| !view.is_outgoing() && !plays.is_limited(view)));
        }
        let published = match limiter.rules.is_empty() {
            true => [None, None],
            false => [true, false].map(|ipv4| published(plays.player(), ipv4)),
        };
        let mut layers = Layers::of(Inputs {
            figures: seen.figures.as_ref(),
            player: plays.player(),
            limiter,
            links: &seen.links,
            loads: &loads,
            left_out: &left_out,
            is_limit_named: request.limit.is_some(),
            listeners: &listeners,
            guests: &seen.guests,
            published: &published,
            views: &snapshot.views,
            unlimited: &unlimited,
            proxied: &seen.proxied,
            proxies: &seen.proxies,
            owners: &seen.owners,
        });
        let holder = |view: &View| seen.owners.shared(&view.socket?).cloned();
        // A limit makes the kernel track what it is for. Of saved tables the rules may not be known.
        let are_rules_open = seen.figures.is_none() && !limiter.unread.is_empty();
        let mut is_limited = |view: &View| {
            let is_open = are_rules_open || request.limit.is_some();
            plays.is_limited(view) || is_open && plays.of(view).tracked != Some(false)
        };
        let mut class = |view: &View| {
            let cell = cell(view, &snapshot.evidence, scope, policy, ledger);
            Class::of(view, cell, &snapshot.evidence).beside_limits(|| is_limited(view))
        };
        let connections: Vec<_> = snapshot
            .views
            .iter()
            .map(|view| ReportedConnection {
                class: class(&view),
                holder: holder(&view),
                other_zones: other_zones(&snapshot.others, view.connection),
                cover: seen.told.as_ref().map(|told| Coverage::of(told.shield.as_ref(), &view)),
                view,
            })
            .collect();
        let mut sources = sources(snapshot.views.iter(), measure, &loads, &told.ages);
        let asked = seen.asked.as_deref().unwrap_or_default();
        sources.iter_mut().for_each(|source| source.listed = listed(source.net, asked));
        layers.limiter.asked(asked);
        let of_named = request.limit.map_or(Vec::new(), |limit| {
            let lost = connections.iter().filter(|connection| {
                connection.class.is_disagreement() && connection.view.socket.is_some()
            });
            let lost = lost.map(|it| measure.net(it.view.client().addr())).collect();
            against_named(limit, &sources, &lost)
        });
        layers.limiter.extend(of_named.iter().cloned());
        // A limit, for whatever port, makes conntrack see all packets of its family.
        let families = [true, false].map(|ipv4| limiter.rules.iter().any(|it| it.is_of(ipv4)));
        let mut without: BTreeMap<WithoutEntry, Vec<View>> = BTreeMap::new();
        let of_class = |it: &&ReportedConnection| it.class == Class::Untracked;
        for view in connections.iter().filter(of_class).map(|connection| connection.view) {
            let [ipv4, ipv6] = families;
            let is_seen = if view.connection.local.addr().is_ipv4() { ipv4 } else { ipv6 };
            let why = match plays.left_out(&view) {
                Some(place) => WithoutEntry::LeftOut(place),
                None if is_seen && plays.of(&view).tracked != Some(false) => WithoutEntry::Seen,
                None => WithoutEntry::Unseen,
            };
            without.entry(why).or_default().push(view);
        }
        layers.limiter.extend(judge::reach::unseen(
            limiter,
            &seen.rules,
            seen.namespaces,
            seen.unseen,
            seen.told.as_ref().and_then(|told| told.containers),
        ));
        let has_limit = |front: &Front| {
            let by_source = |rule: &LimitRule| rule.source_prefix().is_some();
            // What a proxy opens to a container does not come in here.
            let covers = |rule: &LimitRule| {
                rule.covers(front.from, front.port)
                    && (front.behind.is_none() || rule.hook != Hook::Input)
            };
            request.limit.is_some() || limiter.rules.iter().any(|it| by_source(it) && covers(it))
        };
        let fronts = seen.fronts.iter().copied().filter(has_limit);
        layers.limiter.extend(fronts.map(judge::sockets::clients_as_one));
        // A saved text may leave the listeners out.
        if seen.figures.is_some() {
            let open = |view: &View| {
                view.socket.is_some_and(|socket| socket.takes_a_slot())
                    && !seen.proxied.contains(&view.connection)
            };
            let open = snapshot.views.iter().filter(open).map(|view| view.connection.local.port());
            layers.limiter.extend(judge::sockets::listener_gone(&seen.listeners, open));
            let unheard = policy.unheard(&seen.listeners, scope, &seen.rules);
            layers.limiter.extend(judge::reach::unheard(&unheard));
        }
        for (why, views) in &without {
            let all = views.iter().map(|view| family(view.connection));
            layers.limiter.extend(judge::sockets::untracked(all, why));
        }
        if let (Some(outgoing), Some(layer)) = (seen.outgoing, layers.conntrack.as_mut()) {
            let timeout = layer.figures.timeout_close_wait;
            layer.extend(judge::sockets::outgoing(
                outgoing,
                told.outgoing,
                timeout,
                are_sources_translated(&seen.rules),
            ));
        }
        if let (Some(told), Some(layer)) = (&seen.told, layers.conntrack.as_mut())
            && !limiter.rules.is_empty()
        {
            layer.extend(judge::figures::idle(&layer.figures, told.level.is_some()));
        }
        let reached = Reached {
            // Of saved tables what is open shows it.
            by_ipv6: seen.has_ipv6
                || snapshot.views.iter().any(|view| is_global_ipv6(view.connection)),
            by_ipv4: snapshot
                .views
                .iter()
                .map(|view| family(view.connection))
                .filter_map(|(port, ipv4)| ipv4.then_some(port))
                .collect(),
        };
        let player = plays.player();
        layers.limiter.extend(families::one_sided(limiter, player, &listeners, &reached));
        let guests = (&seen.guests, &led(snapshot.views.iter()));
        layers
            .limiter
            .extend(proxies::passing(limiter, player, &listeners, &published, guests, &reached));
        Self {
            limit: request.limit.map(|limit| (limit, worst(&of_named))),
            mask: measure.mask,
            mask6: measure.mask6,
            now: request.now,
            sockets,
            entries,
            connections,
            sources,
            layers,
            is_asked: seen.asked.is_some(),
            outgoing: seen.outgoing,
            outgoing_kept: told.outgoing,
            netns: seen.netns,
            kernel: seen.kernel,
        }
    }

    /// The same, where a text cannot tell this, or was not read for so much.
    #[must_use]
    pub fn of_text(mut self, notes: &[String]) -> Self {
        let note = |note: &String| Finding::warn("saved-text", note.clone(), "");
        self.layers.limiter.extend(notes.iter().map(note));
        self
    }

    /// Whether the tables disagree anywhere, or a limit does not hold.
    pub fn has_disagreements(&self) -> bool {
        let Layers { conntrack, limiter, .. } = &self.layers;
        self.connections.iter().any(|connection| connection.class.is_disagreement())
            || limiter.verdict == Verdict::Bad
            || conntrack.as_ref().is_some_and(|layer| layer.verdict == Verdict::Bad)
    }

    /// How many connections are in each class.
    pub fn classes(&self) -> BTreeMap<Class, usize> {
        let mut classes: BTreeMap<_, _> = Class::ALL.map(|class| (class, 0)).into();
        for connection in &self.connections {
            *classes.entry(connection.class).or_default() += 1;
        }
        classes
    }

    /// The limit that the administrator named, the prefix lengths of what it counts together, and
    /// whether it holds.
    pub fn named_limit(&self) -> Option<(u32, [u8; 2], Verdict)> {
        let (limit, verdict) = self.limit?;
        Some((limit, [self.mask, self.mask6], verdict))
    }

    /// Sockets by state.
    pub fn sockets(&self) -> &BTreeMap<State, usize> {
        &self.sockets
    }

    /// The connections that are shown, in their order: those that disagree, or all.
    pub fn listed(&self, all: bool) -> Vec<&ReportedConnection> {
        let wanted = |connection: &&ReportedConnection| all || connection.class != Class::Agree;
        let mut listed: Vec<_> = self.connections.iter().filter(wanted).collect();
        listed.sort_by_key(|connection| connection.view.connection);
        listed
    }
}

/// Who holds more than the limit that the administrator named, and of whom it cannot count what is open:
/// the worst of each. `lost` are the sources with sockets whose entry is missing or not counted.
fn against_named(limit: u32, sources: &[Source], lost: &HashSet<IpNet>) -> Vec<Finding> {
    let over = sources.iter().find(|source| source.over_limit == Some(true));
    let over = over.map(|it| judge::sockets::over(it.net, it.held, limit, it.counted));
    // Of those that are over it, that says how many are counted.
    let uncounted = sources.iter().filter(|source| {
        source.over_limit != Some(true)
            && source.counted < source.held
            && lost.contains(&source.net)
    });
    let uncounted = uncounted.max_by_key(|source| source.held - source.counted);
    let uncounted =
        uncounted.map(|it| judge::sockets::uncounted(it.net, it.held, true, limit, it.counted));
    over.into_iter().chain(uncounted).collect()
}

/// The local port of a connection, and whether it is of IPv4.
fn family(connection: Connection) -> (u16, bool) {
    (connection.local.port(), connection.local.addr().is_ipv4())
}

/// Where ports lead to, as entries show.
fn led(views: impl Iterator<Item = View>) -> Led {
    let mut all = Led::new();
    for entry in views.filter_map(|view| view.entry).filter(|it| it.orig.dst != it.reply.src) {
        all.entry(entry.orig.dst.port()).or_default().insert(entry.reply.src);
    }
    all
}

fn is_global_ipv6(connection: Connection) -> bool {
    match connection.local.addr() {
        IpAddr::V6(addr) => !addr.is_loopback() && !addr.is_unicast_link_local(),
        IpAddr::V4(_) => false,
    }
}

/// Zones in which a connection has entries beside the one that is looked at.
fn other_zones(others: &Others, connection: Connection) -> Vec<u16> {
    others.get(&connection).into_iter().flatten().map(|entry| entry.zone.id()).collect()
}

/// Whether rules may translate what this host or its containers open.
fn are_sources_translated(rules: &Ruleset) -> bool {
    rules.chains.iter().any(|chain| {
        let base = chain.base.as_ref().filter(|base| base.is_nat);
        base.is_some_and(|base| base.hook == Hook::Postrouting) && !chain.rules.is_empty()
    })
}
