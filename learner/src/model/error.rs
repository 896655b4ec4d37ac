//! Errors of the network.

use policy::{dims::DimsError, weights::WeightsError};
use tch::Tensor;

/// Reason for rejecting sizes, weights or inputs of the network.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// The sizes of the policy are invalid.
    #[error(transparent)]
    Dims(#[from] DimsError),
    /// A weight file does not fit the policy.
    #[error("weights: {0}")]
    Weights(#[from] WeightsError),
    /// The policy does not have a tensor of this name.
    #[error("no parameter `{0}` in this policy")]
    NoParam(String),
    /// The number of elements differs from the tensor of the policy.
    #[error("`{name}` has {found} elements, expected {expected}")]
    Elements {
        /// Name of the tensor.
        name: String,
        /// Elements of the tensor.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// A tensor has another shape than expected.
    #[error("`{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Name of the tensor.
        name: &'static str,
        /// Shape that fits the policy and the batch.
        expected: Vec<i64>,
        /// Shape given.
        found: Vec<i64>,
    },
    /// The state, which pi0 requires, is missing.
    #[error("pi0 needs the `state`, which is missing")]
    NoState,
    /// A value was requested from a policy without a value head.
    #[error("this policy has no value head, configure `actor.model.value_head`")]
    NoValueHead,
    /// The denoise step is outside the table or deterministic.
    #[error("denoise step {found} has no log-probability, expected 0 to {limit} (exclusive)")]
    Step {
        /// Step given.
        found: i64,
        /// Number of usable steps.
        limit: usize,
    },
}

/// Checks a shape against the expected one.
pub(crate) fn check_shape(name: &'static str, tensor: &Tensor, expected: &[i64]) -> Result<(), ModelError> {
    let found = tensor.size();
    if found == expected {
        Ok(())
    } else {
        Err(ModelError::Shape {
            name,
            expected: expected.to_vec(),
            found,
        })
    }
}
