//! Selection, order and collection of an iteration's episodes.

pub mod filter;
pub mod evaluation;
pub mod collecting;
pub mod sampling;
pub mod ahead;
