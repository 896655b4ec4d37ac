//! What can be wrong with the episodes given to an estimator.

use thiserror::Error;

/// What can be wrong with the episodes given to an estimator.
#[derive(Debug, Error)]
pub enum AdvantageError {
    /// A group has a single episode, so that it has no spread.
    #[error("group {group} has 1 episode, a group-relative advantage needs at least 2: collect more per start state")]
    LonelyEpisode {
        /// The group's id.
        group: u64,
    },
    /// The estimator needs values and the episode has none.
    #[error("estimator `gae` needs one value per chunk, episode {episode} has {values} for {chunks} chunks")]
    NoValues {
        /// Index of the episode in the batch.
        episode: usize,
        /// Chunks of the episode.
        chunks: usize,
        /// Values given.
        values: usize,
    },
    /// The estimator needs the values of all denoise steps and the episode has another number.
    #[error("estimator `gae` needs one value per denoise step, episode {episode} has {values} for {steps} steps")]
    NoStepValues {
        /// Index of the episode in the batch.
        episode: usize,
        /// Denoise steps of the episode.
        steps: usize,
        /// Values given.
        values: usize,
    },
}

/// Result of this module.
pub type Result<T, E = AdvantageError> = std::result::Result<T, E>;
