//! Which episodes an iteration trains on, ordered from the ring and collected.

pub mod filter;
pub mod evaluation;
pub mod collecting;
pub mod sampling;
pub mod ahead;
