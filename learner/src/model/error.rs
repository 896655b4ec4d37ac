//! What the network can refuse.

use policy::{dims::DimsError, weights::WeightsError};
use tch::Tensor;

/// What the network can refuse.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ModelError {
    /// Sizes that cannot be a policy.
    #[error(transparent)]
    Dims(#[from] DimsError),
    /// A weight file that does not fit.
    #[error("weights: {0}")]
    Weights(#[from] WeightsError),
    /// No tensor of this name.
    #[error("no parameter `{0}` in this policy")]
    NoParam(String),
    /// Another number of elements.
    #[error("`{name}` has {found} elements, expected {expected}")]
    Elements {
        /// Which array.
        name: String,
        /// Elements of the policy.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// A tensor of another shape.
    #[error("`{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Which tensor.
        name: &'static str,
        /// The shape that fits the policy and the batch.
        expected: Vec<i64>,
        /// The shape given.
        found: Vec<i64>,
    },
    /// pi0 reads the state.
    #[error("pi0 needs the `state` and none was given")]
    NoState,
    /// A value was asked of a policy without a value head.
    #[error("this policy has no value head, configure `actor.model.value_head`")]
    NoValueHead,
    /// A denoise step that the table has not, or that has no density.
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
