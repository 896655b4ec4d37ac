//! The learner: supervised stages, then online RL on what the rollout engine records, a new policy bundle per iteration.
//!
//! Modules stand in the data's order: data sets and supervised stages, the hub that talks to engines, a rollout becomes a batch,
//! advantages, minibatches, network, log-probability, loss, optimizer, update, and what is written down.

pub mod advantage;
pub mod ahead;
pub mod bench;
pub mod checkpoint;
mod curves;
pub mod dataset;
pub mod error;
pub mod evaluate;
pub mod filter;
pub mod hub;
pub mod inspect;
pub mod labels;
pub mod launch;
pub mod logprob;
pub mod loss;
pub mod metrics;
pub mod minibatch;
pub mod model;
pub mod native;
pub mod observation;
pub mod optim;
pub mod picture;
pub mod prefix_store;
pub mod pretrain;
pub mod publish;
pub mod records;
pub mod reference;
pub mod report;
pub mod resume;
pub mod rollout;
pub mod sampling;
pub mod sft;
mod stage;
pub mod train;
pub mod two_layer;
pub mod update;
mod update_velocity;
pub mod velocity;
