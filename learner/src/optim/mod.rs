//! The optimizer and its learning-rate schedules.

mod adamw;
mod schedule;

use tch::TchError;
use thiserror::Error;

use crate::ranks::RanksError;

pub use self::{
    adamw::{AdamW, AdamWSettings, ParamGroup, StepReport},
    schedule::{Decay, Schedule},
};

/// What can go wrong in building, stepping or restoring an optimizer.
#[derive(Debug, Error)]
pub enum OptimError {
    /// Two parameters have one name.
    #[error("parameter `{name}` is registered twice")]
    Duplicate {
        /// The name.
        name: String,
    },
    /// A setting is outside its range.
    #[error("optimizer setting `{name}` must be {range}, found {found}")]
    Setting {
        /// Which.
        name: &'static str,
        /// The range in words.
        range: &'static str,
        /// What was given.
        found: f64,
    },
    /// The saved state lacks a tensor.
    #[error("optimizer state has no tensor `{name}`: the checkpoint belongs to another set of parameters")]
    MissingState {
        /// Its name.
        name: String,
    },
    /// The saved state has a tensor that belongs to no parameter.
    #[error("optimizer state has the unknown tensor `{name}`: the checkpoint belongs to another set of parameters")]
    UnknownState {
        /// Its name.
        name: String,
    },
    /// A saved tensor has another type or shape.
    #[error("optimizer state `{name}` needs {expected}, found {found}")]
    StateShape {
        /// Its name.
        name: String,
        /// Type and shape of ours.
        expected: String,
        /// Type and shape saved.
        found: String,
    },
    /// A tensor operation failed.
    #[error("failed to update parameter `{name}`")]
    Update {
        /// The parameter.
        name: String,
        /// What libtorch said.
        source: TchError,
    },
    /// A norm or a gradient could not be computed, or a tensor not be made.
    #[error("failed to compute on optimizer tensors")]
    Torch(#[from] TchError),
    /// Gradients could not be summed.
    #[error(transparent)]
    Ranks(#[from] RanksError),
}

/// Result of this module.
pub type Result<T, E = OptimError> = std::result::Result<T, E>;
