//! Where the two tables disagree, as a report for people and programs.

pub mod arrivals;
pub mod asked;
pub mod beyond;
pub mod classes;
pub mod cover;
pub mod families;
pub mod figures;
pub mod finding;
pub mod fronts;
pub mod guests;

pub mod judge;
pub mod layers;
pub mod loads;
pub mod look;
pub mod plays;
pub mod processes;
pub mod proxies;
pub mod report;
pub mod saved;
pub mod sources;
pub mod survey;
pub mod ways;
pub mod whose;
