//! The learner: supervised stages, then online RL on what the rollout engine records, a new policy bundle per iteration.
//!
//! Modules stand in the data's order: what is used stands above what uses it.

mod digits;
mod progress;
// Which policy versions may have made a chunk.
mod versions;
// What the learners of one run exchange.
pub mod ranks;
// The network: pi0 and pi0.5 with their heads, and its weights.
pub mod model;
// The optimizer and its learning-rate schedules.
pub mod optim;
// Advantage estimators.
pub mod advantage;
// Losses on probability ratios.
pub mod loss;
// Losses on the velocity.
pub mod velocity;
pub mod error;
pub mod exit;
pub mod method;
pub mod metrics;
// Engines and env workers around the learner.
pub mod ring;
// Episodes: which are ordered, and their arrival.
pub mod collect;
// Episodes become tensors.
pub mod batch;
// The updates of an iteration.
pub mod update;
// Pre-training and SFT on data sets.
pub mod supervised;
// The HTML page about finished runs.
pub mod report;
// Online RL and evaluation, and what they write down.
pub mod run;
// What a configuration amounts to.
pub mod inspect;
pub mod bench;
