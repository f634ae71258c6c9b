//! Against the running kernel: real sockets, real rules, in namespaces that each test makes.
//!
//! One program, a module for each subject: as programs of their own each would compile the lab
//! anew, and four tests at a time would run out at the end of each. One subject: `cargo test --test
//! live reload::`.

// `pub` marks what a module offers to the others.
#![allow(unreachable_pub)]

#[path = "../lab/mod.rs"]
mod lab;
#[path = "../played/mod.rs"]
mod played;

mod apache;
mod ask;
mod attack;
mod attack_search;
mod audit_report;
mod audit_rules;
mod behind;
mod beyond;
mod bound;
mod bridge;
mod browser;
mod cli;
mod containers;
mod docker;
mod doctor;
mod elements;
mod expected;
mod faults;
mod field;
mod found;
mod fronts;
mod full;
mod history;
mod honest;

mod keys;
mod kill;
mod known;
mod lacking;
mod left_out;
mod many;
mod metrics;
mod missing;
mod mptcp;
mod nat;
mod outgoing;
mod overload;
mod package;
mod play_rules;
mod podman;
mod pods;
mod prometheus;
mod recount;
mod recount_means;
mod release;
mod reload;
mod reply_filter;
mod report;
mod revive;
mod rule_cases;
mod rule_events;
mod run;
mod saved_rules;
mod scene;
mod scope;
mod seal;
mod service;
mod shield;
mod shield_life;
mod soak;
mod spoofed;
mod states;
mod stock;
mod streams;
mod top;
mod twice;
mod unaccepted;
mod unseen;
mod verdicts;
mod watch;
mod words;
