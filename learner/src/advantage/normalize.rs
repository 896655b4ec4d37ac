//! Mean, standard deviation and normalization over all valid entries of an iteration.

use std::convert::Infallible;

use crate::ranks::{Ranks, RanksError};

/// Summand of the standard deviation in the normalization of advantages, against division by zero.
pub const NORMALIZE_EPS: f64 = 1e-5;

/// Returns mean and unbiased standard deviation of the valid entries; `None` for fewer than two valid entries. The mask has one
/// entry per value.
pub fn mean_and_std(values: &[f32], mask: Option<&[bool]>) -> Option<(f64, f64)> {
    let Ok(spread) = spread(values, mask, Ok::<_, Infallible>);
    spread
}

/// Normalizes all entries to `(value - mean) / (std + NORMALIZE_EPS)` with the mean and unbiased standard deviation of the valid
/// entries of all ranks. With fewer than two valid entries the values are unchanged. The mask has one entry per value.
///
/// # Errors
/// The exchange between ranks failed.
pub fn normalize(values: &mut [f32], mask: Option<&[bool]>, ranks: &dyn Ranks) -> Result<(), RanksError> {
    if let Some((mean, std)) = spread(values, mask, |sum| ranks.sum_numbers([sum]).map(|[sum]| sum))? {
        for value in values {
            *value = ((f64::from(*value) - mean) / (std + NORMALIZE_EPS)) as f32;
        }
    }
    Ok(())
}

/// Computes mean and standard deviation in two passes; `total` turns a sum over these values into the sum over all ranks.
fn spread<E>(
    values: &[f32],
    mask: Option<&[bool]>,
    total: impl Fn(f64) -> Result<f64, E>,
) -> Result<Option<(f64, f64)>, E> {
    let valid = |at: usize| mask.is_none_or(|mask| mask[at]);
    let kept = || {
        values
            .iter()
            .enumerate()
            .filter(|(at, _)| valid(*at))
            .map(|(_, value)| f64::from(*value))
    };
    let count = total(kept().count() as f64)?;
    if count < 2.0 {
        return Ok(None);
    }
    let mean = total(kept().sum())? / count;
    let squares = total(kept().map(|value| (value - mean).powi(2)).sum())?;
    Ok(Some((mean, (squares / (count - 1.0)).sqrt())))
}
