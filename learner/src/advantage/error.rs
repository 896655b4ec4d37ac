//! Errors of the advantage estimators.

use thiserror::Error;

/// Reason for rejecting the episodes of an estimator.
#[derive(Debug, Error)]
pub enum AdvantageError {
    /// A group has a single episode, so that the scores have no standard deviation.
    #[error("group {group} has 1 episode, a group-relative advantage needs at least 2: collect more per start state")]
    LonelyEpisode {
        /// Number of the group.
        group: u64,
    },
    /// The number of values differs from the number of chunks.
    #[error("estimator `gae` needs one value per chunk, episode {episode} has {values} for {chunks} chunks")]
    NoValues {
        /// Index of the episode in the batch.
        episode: usize,
        /// Chunks of the episode.
        chunks: usize,
        /// Values of the episode.
        values: usize,
    },
    /// The number of values differs from the number of denoise steps.
    #[error("estimator `gae` needs one value per denoise step, episode {episode} has {values} for {steps} steps")]
    NoStepValues {
        /// Index of the episode in the batch.
        episode: usize,
        /// Denoise steps of the episode.
        steps: usize,
        /// Values of the episode.
        values: usize,
    },
}

/// Result of this module.
pub type Result<T, E = AdvantageError> = std::result::Result<T, E>;
