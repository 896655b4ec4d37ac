//! Optimizer and its learning-rate schedules.

mod adamw;
mod schedule;

use tch::TchError;
use thiserror::Error;

use crate::ranks::RanksError;

pub use self::{
    adamw::{AdamW, AdamWSettings, ParamGroup, StepReport},
    schedule::{Decay, Schedule},
};

/// Error in building, stepping or restoring an optimizer.
#[derive(Debug, Error)]
pub enum OptimError {
    /// Two parameters have the same name.
    #[error("parameter `{name}` is registered twice")]
    Duplicate {
        /// Name of both parameters.
        name: String,
    },
    /// A setting is outside its range.
    #[error("optimizer setting `{name}` must be {range}, found {found}")]
    Setting {
        /// Name of the setting.
        name: &'static str,
        /// Valid range in words.
        range: &'static str,
        /// Value found.
        found: f64,
    },
    /// A tensor is missing from the saved state.
    #[error("optimizer state has no tensor `{name}`: the checkpoint belongs to another set of parameters")]
    MissingState {
        /// Name of the tensor.
        name: String,
    },
    /// The saved state has a tensor that does not belong to any parameter.
    #[error("optimizer state has the unknown tensor `{name}`: the checkpoint belongs to another set of parameters")]
    UnknownState {
        /// Name of the tensor.
        name: String,
    },
    /// A saved tensor has another type or shape.
    #[error("optimizer state `{name}` needs {expected}, found {found}")]
    StateShape {
        /// Name of the tensor.
        name: String,
        /// Type and shape of the optimizer.
        expected: String,
        /// Type and shape saved.
        found: String,
    },
    /// A tensor operation failed.
    #[error("failed to update parameter `{name}`")]
    Update {
        /// Name of the parameter.
        name: String,
        /// Error of libtorch.
        source: TchError,
    },
    /// A norm or a gradient could not be computed, or a tensor could not be created.
    #[error("failed to compute on optimizer tensors")]
    Torch(#[from] TchError),
    /// The gradients could not be summed over the ranks.
    #[error(transparent)]
    Ranks(#[from] RanksError),
}

/// Result of this module.
pub type Result<T, E = OptimError> = std::result::Result<T, E>;
