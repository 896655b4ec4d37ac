//! What can be wrong with the tensors given to a loss.

use thiserror::Error;

/// What can be wrong with the tensors given to a loss.
#[derive(Debug, Error)]
pub enum LossError {
    /// A tensor does not fit the one it accompanies.
    #[error("`{name}` of shape {found:?} does not fit `{like}` of shape {expected:?}: leading sizes must be equal")]
    Shape {
        /// The tensor that does not fit.
        name: &'static str,
        /// Its shape.
        found: Vec<i64>,
        /// The tensor it accompanies.
        like: &'static str,
        /// That one's shape.
        expected: Vec<i64>,
    },
    /// The log-probabilities are not per action element.
    #[error("`logprob` needs shape [rows, actions, action dim], found {found:?}")]
    NotElementwise {
        /// Shape found.
        found: Vec<i64>,
    },
    /// The loss needs an input that is not there.
    #[error("policy loss `{loss}` needs the `{input}` input")]
    Missing {
        /// Name of the loss.
        loss: &'static str,
        /// Missing part of [`super::PolicyInput`].
        input: &'static str,
    },
    /// The metrics could not be read from the device.
    #[error("reading the loss metrics: {source}")]
    Metrics {
        /// What libtorch said.
        source: tch::TchError,
    },
}

/// Result of this module.
pub type Result<T, E = LossError> = std::result::Result<T, E>;
