//! Episodes as tensors: what was seen, what an update learns from it, and which rows an optimizer step sees.

pub mod observation;
pub mod minibatch;
pub mod prefix_store;
mod labels;
mod rows;
mod rollout;

pub use self::rollout::{EpisodeLengths, RolloutBatch, WholeBatch};
