//! Weights: safetensors files read strictly, and written one tensor at a time with bytes that depend on nothing but the content.

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
