//! Where the two tables disagree, as a report for people and programs.

pub mod classes;
pub mod cover;
pub mod doctor;
pub mod figures;
pub mod finding;
pub mod judge;
pub mod layers;
pub mod limiter;
pub mod processes;
pub mod render;
pub mod report;
pub mod saved;
pub mod sources;
