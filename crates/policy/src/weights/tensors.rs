//! Named f32 tensors in memory, and whatever else gives them out one at a time.

use std::{borrow::Cow, collections::BTreeMap, fmt::Debug};

use super::error::WeightsError;
use crate::params::ParamSpec;

/// A named f32 tensor in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// Sizes.
    pub shape: Vec<usize>,
    /// Row-major values.
    pub data: Vec<f32>,
}

/// Weights that are given out one tensor at a time, so that nobody needs memory for all of them.
pub trait Weights: Debug {
    /// Returns the row-major values of one tensor.
    ///
    /// # Errors
    /// The tensor is missing, has another shape or a type that is not read.
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

/// Searched at once for values that are not finite: without a branch per value the search is several times faster.
const BLOCK: usize = 4096;

/// Rejects NaN and infinity among `values`, of which `value` makes numbers.
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
