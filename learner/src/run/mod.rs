//! Online RL from its first iteration to its last, evaluation, and what a run leaves in its folder.

pub mod publish;
pub mod checkpoint;
pub mod resume;
pub mod film;
pub mod evaluate;
mod iteration;
pub mod train;
