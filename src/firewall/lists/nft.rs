//! What nf_tables knows tables, rules and sets by (`nf_tables_alloc_handle()`). A rule that takes
//! the place of another (`nft replace rule`, `iptables-nft -R`) takes its number too: seen on 6.18.

use std::collections::{BTreeMap, BTreeSet, HashMap};

use nix::errno::Errno;

use super::{RuleKey, SetKey, Since};
use crate::error::{Op, Result};
use crate::firewall::limits::LimitRule;
use crate::firewall::{Family, xt};
use crate::netlink::{Attributes, Conversation, NFGENMSG_LEN, Request, Transport};
use crate::nftables::uapi::{NFTA_TARGET_INFO, NFTA_TARGET_NAME};

const NFNL_SUBSYS_NFTABLES: u16 = 10;
const NFT_MSG_GETTABLE: u16 = 1;
const NFT_MSG_GETRULE: u16 = 7;
const NFT_MSG_GETSET: u16 = 10;
const NFT_MSG_GETGEN: u16 = 16;

const NFTA_TABLE_NAME: u16 = 1;
const NFTA_TABLE_HANDLE: u16 = 4;

const NFTA_RULE_TABLE: u16 = 1;
const NFTA_RULE_CHAIN: u16 = 2;
const NFTA_RULE_HANDLE: u16 = 3;
const NFTA_RULE_EXPRESSIONS: u16 = 4;

const NFTA_SET_TABLE: u16 = 1;
const NFTA_SET_NAME: u16 = 2;
const NFTA_SET_HANDLE: u16 = 16;
const NFTA_SET_EXPR: u16 = 17;
const NFTA_SET_EXPRESSIONS: u16 = 18;

const NFTA_GEN_ID: u16 = 1;

const NFTA_EXPR_NAME: u16 = 1;
const NFTA_EXPR_DATA: u16 = 2;
const NFTA_LOOKUP_SET: u16 = 1;
const NFTA_DYNSET_SET_NAME: u16 = 1;

/// What one limit's list is known by.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash)]
pub(super) struct Identity {
    table: u64,
    rule: RuleKey,
    /// Sets that the rule looks into or adds to, and that may have the lists.
    sets: BTreeSet<(SetKey, u64)>,
}

impl Identity {
    /// Whether its rule was taken away, and another one has its number.
    pub(super) fn is_deleted(&self, since: &Since) -> bool {
        since.deleted.contains(&self.rule)
    }

    /// Whether lists in one of its sets were taken away.
    pub(super) fn is_emptied(&self, since: &Since) -> bool {
        self.sets.iter().any(|(name, _)| since.emptied.contains(name))
    }
}

/// The numbers of all tables, rules and sets that bear on limits.
#[derive(Clone, Debug, Default)]
pub(super) struct Numbers {
    generation: u32,
    /// By family, table, chain and place in it.
    identities: HashMap<(Family, String, String, usize), Identity>,
    names_policy: bool,
}

impl Numbers {
    /// Reads them.
    ///
    /// # Errors
    /// The kernel refused, or a message was lost or malformed.
    pub(super) fn read<T: Transport>(conversation: &mut Conversation<T>) -> Result<Self> {
        let generation = generation(conversation)?;
        if generation == 0 {
            return Ok(Self::default());
        }
        let tables = tables(conversation)?;
        let sets = sets(conversation)?;
        let request = get("dump of nft rules", NFT_MSG_GETRULE);
        let mut places: HashMap<(u8, String, String), usize> = HashMap::new();
        let mut identities = HashMap::new();
        let mut names_policy = false;
        let rules = conversation.dump(&request, |all: &mut Vec<Rule>, frame| {
            all.extend(Rule::decode(frame.payload));
            Ok(())
        })?;
        for rule in rules {
            let Rule { family, table, chain, number, sets: named, names_policy: names } = rule;
            names_policy |= names;
            let place = places.entry((family, table.clone(), chain.clone())).or_default();
            *place += 1;
            let Some(named) = named else { continue };
            let own = tables.get(&(family, table.clone())).copied().unwrap_or_default();
            let known = named
                .into_iter()
                .filter_map(|set| {
                    let key = (family, table.clone(), set);
                    let number = *sets.get(&key)?;
                    Some((key, number))
                })
                .collect();
            let rule = (family, table.clone(), number);
            let identity = Identity { table: own, rule, sets: known };
            identities.insert((Family::from_kernel(family), table, chain, *place), identity);
        }
        Ok(Self { generation, identities, names_policy })
    }

    /// The generation that they were read in.
    pub(super) fn generation(&self) -> u32 {
        self.generation
    }

    /// Whether a rule of iptables-nft names a policy of timeouts.
    pub(super) fn names_policy(&self) -> bool {
        self.names_policy
    }

    /// What the list of a limit is known by.
    pub(super) fn identity(&self, rule: &LimitRule) -> Identity {
        let place = (rule.family, rule.table.clone(), rule.chain.clone(), rule.position);
        self.identities.get(&place).cloned().unwrap_or_default()
    }
}

/// A rule, as far as it bears on the lists of limits.
struct Rule {
    family: u8,
    table: String,
    chain: String,
    number: u64,
    /// Sets that it names; `None` for a rule without a limit and without sets.
    sets: Option<Vec<String>>,
    /// It names a policy of timeouts.
    names_policy: bool,
}

impl Rule {
    fn decode(message: &[u8]) -> Option<Self> {
        let attributes = Attributes(message.get(NFGENMSG_LEN..)?);
        let mut sets: Option<Vec<String>> = None;
        let mut names_policy = false;
        let expressions = attributes.nest(NFTA_RULE_EXPRESSIONS)?;
        for (_, expression) in expressions.iter() {
            let expression = Attributes(expression);
            let data = expression.nest(NFTA_EXPR_DATA);
            let named = match expression.value(NFTA_EXPR_NAME) {
                Some(b"connlimit\0" | b"match\0") => None,
                Some(b"lookup\0") => Some(NFTA_LOOKUP_SET),
                Some(b"dynset\0") => Some(NFTA_DYNSET_SET_NAME),
                Some(b"target\0") => {
                    names_policy |= data.is_some_and(is_of_policy);
                    continue;
                }
                _ => continue,
            };
            let set = named.and_then(|attribute| data?.text(attribute));
            sets.get_or_insert_default().extend(set);
        }
        Some(Self {
            family: *message.first()?,
            table: attributes.text(NFTA_RULE_TABLE)?,
            chain: attributes.text(NFTA_RULE_CHAIN)?,
            number: number(attributes, NFTA_RULE_HANDLE)?,
            sets,
            names_policy,
        })
    }
}

/// Whether a target of xt names a policy of timeouts.
fn is_of_policy(target: Attributes<'_>) -> bool {
    let name = target.text(NFTA_TARGET_NAME).unwrap_or_default();
    xt::names_policy(&name, target.value(NFTA_TARGET_INFO).unwrap_or_default())
}

/// The generation of the rules: each transaction makes a new one. 0 where there is no nf_tables.
pub(super) fn generation<T: Transport>(conversation: &mut Conversation<T>) -> Result<u32> {
    let request = get("nft generation", NFT_MSG_GETGEN);
    let mut generation = None;
    let answered = conversation.query(&request, |frame| {
        let attributes = Attributes(frame.payload.get(NFGENMSG_LEN..).unwrap_or_default());
        generation = attributes.number(NFTA_GEN_ID);
        Ok(())
    });
    match answered {
        Err(error) if matches!(error.errno(), Some(Errno::EINVAL | Errno::EOPNOTSUPP)) => Ok(0),
        Err(error) => Err(error),
        Ok(()) => generation.ok_or_else(|| request.op.malformed("no generation in it")),
    }
}

fn tables<T: Transport>(conversation: &mut Conversation<T>) -> Result<BTreeMap<(u8, String), u64>> {
    let request = get("dump of nft tables", NFT_MSG_GETTABLE);
    conversation.dump(&request, |all: &mut BTreeMap<_, _>, frame| {
        let table = Attributes(frame.payload.get(NFGENMSG_LEN..).unwrap_or_default());
        if let (Some(family), Some(name)) = (frame.payload.first(), table.text(NFTA_TABLE_NAME)) {
            // Kernels before 4.17 number no tables; one that is made anew looks the same there.
            all.insert((*family, name), number(table, NFTA_TABLE_HANDLE).unwrap_or_default());
        }
        Ok(())
    })
}

/// The sets in which limits may have their lists: those with `ct count` in their declaration, and
/// those that rules add to.
fn sets<T: Transport>(conversation: &mut Conversation<T>) -> Result<HashMap<SetKey, u64>> {
    const NFTA_SET_FLAGS: u16 = 3;
    const NFT_SET_EVAL: u32 = 0x20;
    let request = get("dump of nft sets", NFT_MSG_GETSET);
    conversation.dump(&request, |all: &mut HashMap<_, _>, frame| {
        let set = Attributes(frame.payload.get(NFGENMSG_LEN..).unwrap_or_default());
        let declared =
            [NFTA_SET_EXPR, NFTA_SET_EXPRESSIONS].iter().any(|kind| set.value(*kind).is_some());
        let dynamic = set.number(NFTA_SET_FLAGS).is_some_and(|flags| flags & NFT_SET_EVAL != 0);
        if let (true, Some(family), Some(table), Some(name)) = (
            declared || dynamic,
            frame.payload.first(),
            set.text(NFTA_SET_TABLE),
            set.text(NFTA_SET_NAME),
        ) {
            let number = number(set, NFTA_SET_HANDLE).unwrap_or_default();
            all.insert((*family, table, name), number);
        }
        Ok(())
    })
}

fn number(attributes: Attributes<'_>, kind: u16) -> Option<u64> {
    attributes.value(kind)?.try_into().ok().map(u64::from_be_bytes)
}

fn get(verb: &'static str, message: u16) -> Request {
    let kind = NFNL_SUBSYS_NFTABLES << 8 | message;
    Request { op: Op::new(verb), kind, flags: 0, body: vec![0; NFGENMSG_LEN], joined: false }
}
