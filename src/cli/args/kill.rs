//! What can be typed behind `ctkeep kill`. No file: what is closed is typed.

use std::collections::HashSet;
use std::time::Duration;

use clap::Args;
use clap::builder::TypedValueParser;
use ipnet::IpNet;

use super::values::{duration, network, port};
use super::{Output, namespaces};
use crate::error::Result;
use crate::host::netns::Namespace;
use crate::kill::choose::Which;
use crate::reconcile::policy::Policy;
use crate::sockdiag::{State, States};

/// Closes sockets of the server's side (as ss -K does): their processes get ECONNABORTED, their
/// peers an RST, or nothing where both sides have closed already. Prints which, and closes them with
/// --yes.
#[derive(Debug, Args)]
pub(crate) struct Kill {
    #[command(flatten)]
    pub meant: Meant,

    /// No peers in this network (repeatable); wins over --source
    #[arg(long, value_name = "CIDR", value_delimiter = ',', value_parser = network)]
    pub exempt: Vec<IpNet>,

    /// Close at most so many, the oldest first
    #[arg(long, value_name = "N", default_value_t = 100)]
    pub max: usize,

    /// Close them; without it only print which
    #[arg(long)]
    pub yes: bool,

    /// Network namespace by its name or path (repeatable), instead of the one that ctkeep runs in
    #[arg(long, value_name = "NAME|PATH", value_delimiter = ',')]
    pub netns: Vec<String>,

    #[command(flatten)]
    pub output: Output,
}

/// At least one of these is to be typed; a socket is meant when all that are typed fit.
#[derive(Debug, Args)]
#[group(required = true, multiple = true)]
#[command(next_help_heading = "Which")]
pub(crate) struct Meant {
    /// In this state (repeatable) [default: every state in which an application can have it]
    #[arg(long = "state", value_name = "STATE", value_delimiter = ',', value_parser = state())]
    pub states: Vec<State>,

    /// Half-closed (close-wait), or else open, for at least so long: by the daemon where one runs,
    /// else by the least that its own silence proves
    #[arg(long, value_name = "TIME", value_parser = duration)]
    pub older_than: Option<Duration>,

    /// Of a peer in this network (repeatable) [default: all but loopback]
    #[arg(long = "source", value_name = "CIDR", value_delimiter = ',', value_parser = network)]
    pub sources: Vec<IpNet>,

    /// At this local port (repeatable) [default: every listening port]
    #[arg(long = "port", value_name = "PORT", value_delimiter = ',', value_parser = port)]
    pub ports: Vec<u16>,

    /// Held by this process; of several that hold it the one with the lowest id counts
    #[arg(long, value_name = "NAME|PID")]
    pub process: Option<String>,

    /// Held by a process in this container
    #[arg(long, value_name = "NAME")]
    pub container: Option<String>,

    /// Too many for a limit in the rules: of each source over it as many as bring it back to it,
    /// half-closed ones first
    #[arg(long)]
    pub over_limit: bool,
}

impl Kill {
    pub(crate) fn which(&self) -> Which {
        let Meant { states, older_than, process, container, over_limit, .. } = &self.meant;
        let states: States = states.iter().copied().collect();
        Which {
            states: if states == States::NONE { States::open() } else { states },
            older_than: *older_than,
            process: process.clone(),
            container: container.clone(),
            over_limit: *over_limit,
            max: self.max,
        }
    }

    pub(crate) fn policy(&self) -> Policy {
        Policy {
            ports: self.meant.ports.iter().copied().collect::<HashSet<_>>(),
            sources: self.meant.sources.clone(),
            exempt: self.exempt.clone(),
            ..Policy::default()
        }
    }

    /// # Errors
    /// One of the namespaces does not exist: a usage error.
    pub(crate) fn namespaces(&self) -> Result<Vec<Namespace>> {
        namespaces(&self.netns)
    }
}

/// Anything that has a peer.
fn state() -> impl TypedValueParser<Value = State> {
    let parse = |text: String| match text.parse::<State>() {
        Ok(state) if state != State::Close && States::connected().contains(state) => Ok(state),
        Ok(state) => Err(format!("a socket in {state} has no peer")),
        Err(error) => Err(error.to_string()),
    };
    clap::builder::StringValueParser::new().try_map(parse)
}
