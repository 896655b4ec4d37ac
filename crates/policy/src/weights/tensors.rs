//! Named f32 tensors in memory, and the trait for sources that return one tensor at a time.

use std::{borrow::Cow, collections::BTreeMap, fmt::Debug};

use super::error::WeightsError;
use crate::params::ParamSpec;

/// Shape and values of an f32 tensor in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// Size of each axis.
    pub shape: Vec<usize>,
    /// Row-major values.
    pub data: Vec<f32>,
}

/// Source of weights that returns one tensor at a time, so that memory for all tensors is not necessary.
pub trait Weights: Debug {
    /// Returns the row-major values of one tensor.
    ///
    /// # Errors
    /// The tensor is missing, or has another shape or an unsupported type.
    fn values(&self, spec: &ParamSpec) -> Result<Cow<'_, [f32]>, WeightsError>;
}

impl Weights for BTreeMap<String, Weight> {
    fn values(&self, spec: &ParamSpec) -> Result<Cow<'_, [f32]>, WeightsError> {
        let weight = self
            .get(&spec.name)
            .ok_or_else(|| WeightsError::Missing(spec.name.clone()))?;
        if weight.shape != spec.shape {
            return Err(WeightsError::Shape {
                name: spec.name.clone(),
                expected: spec.shape.clone(),
                found: weight.shape.clone(),
            });
        }
        Ok(Cow::Borrowed(&weight.data))
    }
}

/// Number of values checked for finiteness at once; without a branch per value the check is several times faster.
const BLOCK: usize = 4096;

/// Rejects NaN and infinity among `values`, which `value` converts to f32.
pub(super) fn check_finite<T: Copy>(name: &str, values: &[T], value: impl Fn(T) -> f32) -> Result<(), WeightsError> {
    let finite = |block: &[T]| block.iter().fold(true, |all, v| all & value(*v).is_finite());
    let Some(number) = values.chunks(BLOCK).position(|block| !finite(block)) else {
        return Ok(());
    };
    let mut rest = values.iter().copied().map(value).enumerate().skip(number * BLOCK);
    match rest.find(|(_, v)| !v.is_finite()) {
        Some((index, value)) => Err(WeightsError::NotFinite {
            name: name.to_owned(),
            index,
            value: value.to_string(),
        }),
        None => Ok(()),
    }
}
