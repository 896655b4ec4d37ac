//! The learner: supervised stages, then online RL on what the rollout engine records, a new policy bundle per iteration.
//!
//! Modules stand in the data's order: data sets and supervised stages, the hub that talks to engines, a rollout becomes a batch,
//! advantages, minibatches, network, log-probability, loss, optimizer, update, and what is written down.

pub mod error;
pub mod native;
pub mod dataset;
pub mod observation;
pub mod model;
pub mod pretrain;
pub mod sft;
pub mod publish;
pub mod hub;
pub mod launch;
pub mod rollout;
pub mod advantage;
pub mod minibatch;
pub mod logprob;
pub mod loss;
pub mod optim;
pub mod update;
pub mod metrics;
pub mod checkpoint;
pub mod evaluate;
pub mod train;
pub mod picture;
