//! Updates of one RL iteration: epochs over minibatches of chunk records, PPO on actor and critic.
//!
//! [`Updater::update`] is the entry point. The loop over epochs, minibatches and micro-batches is in `updater.rs`, the pass that
//! recomputes log-probabilities in `likelihood.rs`, the clipped surrogate in [`crate::loss`].

pub mod logprob;
pub mod reference_records;
pub mod reference;
mod report;
mod tally;
mod samples;
mod likelihood;
mod velocity;
mod objective;
mod optimizers;
mod updater;

pub use self::{
    report::{CreditReport, UpdateReport},
    updater::Updater,
};
