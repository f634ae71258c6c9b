//! Where the two tables disagree, as a report for people and programs.

pub mod classes;
pub mod limiter;
pub mod processes;
pub mod render;
pub mod report;
pub mod sources;
