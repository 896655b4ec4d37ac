//! Errors of the losses.

use thiserror::Error;

/// Reason for rejecting the inputs of a loss, or for a failed read of its metrics.
#[derive(Debug, Error)]
pub enum LossError {
    /// A tensor does not fit the tensor that it accompanies.
    #[error("`{name}` of shape {found:?} does not fit `{like}` of shape {expected:?}: leading sizes must be equal")]
    Shape {
        /// Name of the tensor that does not fit.
        name: &'static str,
        /// Shape of the tensor that does not fit.
        found: Vec<i64>,
        /// Name of the accompanied tensor.
        like: &'static str,
        /// Shape of the accompanied tensor.
        expected: Vec<i64>,
    },
    /// The log-probabilities do not have one entry per action element.
    #[error("`logprob` needs shape [rows, actions, action dim], found {found:?}")]
    NotElementwise {
        /// Shape found.
        found: Vec<i64>,
    },
    /// A required input is missing.
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
        /// Error of libtorch.
        source: tch::TchError,
    },
}

/// Result of this module.
pub type Result<T, E = LossError> = std::result::Result<T, E>;
