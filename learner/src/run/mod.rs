//! Online RL, evaluation, and the files of a run's folder.

pub mod publish;
pub mod checkpoint;
pub mod resume;
pub mod film;
pub mod evaluate;
mod iteration;
pub mod train;
