//! Weights: strict reading of safetensors files, and writing one tensor at a time, with bytes that depend only on the content.

mod error;
mod tensors;
mod layout;
mod file;

pub(crate) use self::layout::WriteError;
pub use self::{
    error::WeightsError,
    file::WeightFile,
    layout::{Layout, Location},
    tensors::{Weight, Weights},
};
