//! The learner: supervised stages, then online RL on what the rollout engine records, a new policy bundle per iteration.
//!
//! Modules stand in the data's order: data sets, network and supervised stages, the hub that talks to engines, episodes become a batch,
//! advantages, minibatches, log-probability, loss, update, and what is written down.

pub mod error;
mod digits;
pub mod native;
pub mod launch;
mod prepare;
pub mod dataset;
pub mod model;
pub mod observation;
pub mod optim;
mod stage;
pub mod pretrain;
pub mod sft;
pub mod supervised;
pub mod method;
pub mod hub;
mod ring;
pub mod filter;
pub mod rollout;
pub mod sampling;
pub mod ahead;
pub mod records;
pub mod advantage;
pub mod labels;
pub mod minibatch;
pub mod prefix_store;
pub mod reference;
pub mod logprob;
pub mod loss;
pub mod velocity;
mod update_likelihood;
mod update_velocity;
pub mod update;
pub mod publish;
pub mod checkpoint;
pub mod resume;
pub mod metrics;
mod iteration;
pub mod film;
pub mod evaluate;
pub mod train;
pub mod report;
pub mod inspect;
pub mod bench;
