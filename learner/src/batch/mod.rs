//! Episodes as tensors: observations, labels, and the rows of an optimizer step.

pub mod observation;
pub mod minibatch;
pub mod prefix_store;
mod labels;
mod rows;
mod rollout;

pub use self::rollout::{EpisodeLengths, RolloutBatch, WholeBatch};
