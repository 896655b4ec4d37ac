//! The learner: supervised stages, then online RL on the rollout engine's records, with a new policy bundle per iteration.
//!
//! Modules are listed in the order of the data path: a module comes before the modules that use it.

mod digits;
mod progress;
// Policy versions that may have made a chunk.
mod versions;
// Exchange between the learners of one run.
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
// Orders and arrival of episodes.
pub mod collect;
// Conversion of episodes into tensors.
pub mod batch;
// The updates of an iteration.
pub mod update;
// Pre-training and SFT on data sets.
pub mod supervised;
// The HTML page about finished runs.
pub mod report;
// Online RL, evaluation and their output files.
pub mod run;
// Description of a configuration.
pub mod inspect;
pub mod bench;
