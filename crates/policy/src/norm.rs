//! Normalization of state and actions, and delta actions, by openpi's rules; computed in f64, returned as f32.

mod stats;

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

pub use self::stats::{DimStats, NormStats, StatsError};

/// Term added to the denominators.
const EPS: f64 = 1e-6;
/// Spread of a dimension, as a part of the largest spread of the array, below which [`DimStats::near_constant`] names the dimension.
/// LIBERO's gripper has 1/60 of the largest spread, and is not constant.
const NEAR_CONSTANT: f64 = 2e-3;

/// Normalization of state and actions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalization {
    /// No normalization.
    None,
    /// `(x - mean) / (std + 1e-6)`, pi0.
    ZScore,
    /// `(x - q01) / (q99 - q01 + 1e-6) * 2 - 1`, pi0.5: maps the 1 % and 99 % quantiles to -1 and 1, without clipping.
    Quantile,
}

impl Normalization {
    /// Returns the name in a configuration.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::ZScore => "z_score",
            Self::Quantile => "quantile",
        }
    }
}

/// Reason for rejecting statistics or a delta mask.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NormError {
    /// The file cannot be read or parsed.
    #[error("failed to read norm stats `{path}`")]
    File {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: Box<StatsError>,
    },
    /// Statistics with fewer dimensions than the data.
    #[error("norm stats have {found} dimensions of `{field}`, the data has {expected}")]
    Short {
        /// Name of the statistic.
        field: &'static str,
        /// Width of the data.
        expected: usize,
        /// Width of the statistic.
        found: usize,
    },
    /// Statistics with more dimensions than the data to unnormalize.
    #[error("norm stats have {found} dimensions of `{field}`, more than the {expected} of the data to unnormalize")]
    Long {
        /// Name of the statistic.
        field: &'static str,
        /// Width of the data.
        expected: usize,
        /// Width of the statistic.
        found: usize,
    },
    /// Statistics without quantiles.
    #[error("norm stats lack `q01` and `q99`, quantile normalization needs them")]
    NoQuantiles,
    /// A delta mask wider than the state or the actions.
    #[error("delta mask has {mask} dimensions, the state {state}, the actions {actions}: expected no more than either")]
    DeltaMask {
        /// Width of the mask.
        mask: usize,
        /// Width of the state.
        state: usize,
        /// Width of an action.
        actions: usize,
    },
}

/// A dimension that was nearly constant in the training data.
#[derive(Debug, Clone, PartialEq)]
pub struct NearConstant {
    /// Dimension.
    pub index: usize,
    /// Standard deviation, or distance of the quantiles, in the robot's units.
    pub spread: f64,
    /// Largest spread of all dimensions.
    pub largest: f64,
}

impl NormStats {
    /// Reads a statistics file; see [`NormStats::from_json`] for the layouts.
    ///
    /// # Errors
    /// The file is missing, above 1 MiB or of another layout, or its numbers fail the checks of [`NormStats`].
    pub fn load(path: &Path) -> Result<Self, NormError> {
        Self::read(path).map_err(|source| NormError::File {
            path: path.to_owned(),
            source: Box::new(source),
        })
    }
}

impl DimStats {
    /// Returns the dimensions, padding excluded, whose spread is 0 or below 1/500 of the largest spread.
    ///
    /// A small deviation in such a dimension becomes a large number in model units. The formula of openpi is kept.
    pub fn near_constant(&self, normalization: Normalization) -> Vec<NearConstant> {
        let spreads: Vec<f64> = match (normalization, &self.q01, &self.q99) {
            (Normalization::ZScore, ..) => self.std.clone(),
            (Normalization::Quantile, Some(low), Some(high)) => low.iter().zip(high).map(|(l, h)| h - l).collect(),
            (Normalization::None | Normalization::Quantile, ..) => return Vec::new(),
        };
        let used = spreads.iter().copied().take(self.used());
        let largest = used.clone().fold(0.0, f64::max);
        used.enumerate()
            .filter(|(_, spread)| *spread <= NEAR_CONSTANT * largest)
            .map(|(index, spread)| NearConstant { index, spread, largest })
            .collect()
    }

    fn quantiles(&self) -> Result<(&[f64], &[f64]), NormError> {
        self.q01
            .as_deref()
            .zip(self.q99.as_deref())
            .ok_or(NormError::NoQuantiles)
    }
}

fn at_least(field: &'static str, values: &[f64], width: usize) -> Result<(), NormError> {
    if values.len() < width {
        return Err(NormError::Short {
            field,
            expected: width,
            found: values.len(),
        });
    }
    Ok(())
}

fn at_most(field: &'static str, values: &[f64], width: usize) -> Result<(), NormError> {
    if values.len() > width {
        return Err(NormError::Long {
            field,
            expected: width,
            found: values.len(),
        });
    }
    Ok(())
}

impl Normalization {
    /// Normalizes one row (one state, or one action of a chunk) that is not padded yet. Statistics longer than the row are
    /// truncated.
    ///
    /// # Errors
    /// The statistics are shorter than the row, or lack quantiles.
    pub fn normalize<T: Copy + Into<f64>>(self, stats: &DimStats, row: &[T]) -> Result<Vec<f32>, NormError> {
        let wide = row.iter().map(|v| (*v).into());
        match self {
            Self::None => Ok(wide.map(|x: f64| x as f32).collect()),
            Self::ZScore => {
                at_least("mean", &stats.mean, row.len())?;
                at_least("std", &stats.std, row.len())?;
                Ok(wide
                    .zip(stats.mean.iter().zip(&stats.std))
                    .map(|(x, (m, s))| ((x - m) / (s + EPS)) as f32)
                    .collect())
            }
            Self::Quantile => {
                let (q01, q99) = stats.quantiles()?;
                at_least("q01", q01, row.len())?;
                at_least("q99", q99, row.len())?;
                Ok(wide
                    .zip(q01.iter().zip(q99))
                    .map(|(x, (l, h))| ((x - l) / (h - l + EPS) * 2.0 - 1.0) as f32)
                    .collect())
            }
        }
    }

    /// Inverts [`Self::normalize`] on a row that may be padded.
    ///
    /// For dimensions beyond the statistics, z-score assumes mean 0 and std 1, a factor of 1.000001 as in openpi. Quantile leaves
    /// such dimensions unchanged.
    ///
    /// # Errors
    /// The statistics are longer than the row, or lack quantiles.
    pub fn unnormalize<T: Copy + Into<f64>>(self, stats: &DimStats, row: &[T]) -> Result<Vec<f32>, NormError> {
        let wide = row.iter().map(|v| (*v).into());
        match self {
            Self::None => Ok(wide.map(|x: f64| x as f32).collect()),
            Self::ZScore => {
                at_most("mean", &stats.mean, row.len())?;
                at_most("std", &stats.std, row.len())?;
                Ok(wide
                    .enumerate()
                    .map(|(i, x)| {
                        let mean = stats.mean.get(i).copied().unwrap_or(0.0);
                        let std = stats.std.get(i).copied().unwrap_or(1.0);
                        (x * (std + EPS) + mean) as f32
                    })
                    .collect())
            }
            Self::Quantile => {
                let (q01, q99) = stats.quantiles()?;
                at_most("q01", q01, row.len())?;
                at_most("q99", q99, row.len())?;
                Ok(wide
                    .enumerate()
                    .map(|(i, x)| match (q01.get(i), q99.get(i)) {
                        (Some(l), Some(h)) => (f64::midpoint(x, 1.0) * (h - l + EPS) + l) as f32,
                        _ => x as f32,
                    })
                    .collect())
            }
        }
    }
}

/// Returns the delta mask of run lengths: `n > 0` is `n` dimensions with delta actions, `n < 0` is `-n` dimensions without.
///
/// `[6, -1]` is six joints as deltas and an absolute gripper (openpi's `make_bool_mask`).
pub fn bool_mask(runs: &[i32]) -> Vec<bool> {
    runs.iter()
        .flat_map(|n| std::iter::repeat_n(*n > 0, n.unsigned_abs() as usize))
        .collect()
}

/// Returns whether run lengths contain no 0 and give a mask (see [`bool_mask`]) of 1 to `width` dimensions.
pub fn mask_fits(runs: &[i32], width: usize) -> bool {
    let dims: u64 = runs.iter().map(|n| u64::from(n.unsigned_abs())).sum();
    !runs.contains(&0) && (1..=width as u64).contains(&dims)
}

/// Converts one absolute action to the difference from the raw (not normalized) state, in the masked dimensions.
///
/// # Errors
/// The mask is wider than the state or the action.
pub fn delta_from_absolute<T: Copy + Into<f64>>(
    action: &[T],
    state: &[T],
    mask: &[bool],
) -> Result<Vec<f32>, NormError> {
    shifted(action, state, mask, -1.0)
}

/// Adds the raw state in the masked dimensions, the inverse of [`delta_from_absolute`].
///
/// # Errors
/// The mask is wider than the state or the action.
pub fn absolute_from_delta<T: Copy + Into<f64>>(
    action: &[T],
    state: &[T],
    mask: &[bool],
) -> Result<Vec<f32>, NormError> {
    shifted(action, state, mask, 1.0)
}

fn shifted<T: Copy + Into<f64>>(action: &[T], state: &[T], mask: &[bool], sign: f64) -> Result<Vec<f32>, NormError> {
    if mask.len() > state.len() || mask.len() > action.len() {
        return Err(NormError::DeltaMask {
            mask: mask.len(),
            state: state.len(),
            actions: action.len(),
        });
    }
    let shift = mask
        .iter()
        .zip(state)
        .map(|(on, s)| if *on { sign * (*s).into() } else { 0.0 });
    let shift = shift.chain(std::iter::repeat(0.0));
    Ok(action
        .iter()
        .zip(shift)
        .map(|(a, s)| ((*a).into() + s) as f32)
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    const GOOD: &str = r#"{"norm_stats": {
        "state": {"mean": [0, 1], "std": [1, 2], "q01": [-1, -2], "q99": [1, 2]},
        "actions": {"mean": [0], "std": [1], "q01": null, "q99": null}}}"#;

    #[test]
    fn padding_is_not_used_and_a_small_spread_is_named() {
        let stats = |std: &[f64]| DimStats {
            mean: vec![0.0; std.len()],
            std: std.to_vec(),
            q01: None,
            q99: None,
        };
        assert_eq!(stats(&[0.3, 0.0, 0.2, 0.0, 0.0]).used(), 3);
        assert_eq!(stats(&[0.0, 0.0]).used(), 0);
        let named = |std: &[f64]| -> Vec<usize> {
            let near = stats(std).near_constant(Normalization::ZScore);
            near.into_iter().map(|near| near.index).collect()
        };
        assert_eq!(named(&[0.3, 0.0, 0.2, 0.0, 0.0]), [1], "padding is not named");
        assert_eq!(named(&[0.3, 0.3, 0.0003, 0.3]), [2]);
        assert_eq!(named(&[0.9, 0.014, 0.1]), [0usize; 0]);
    }

    #[test]
    fn widths_that_do_not_fit_are_refused() {
        let stats = NormStats::from_json(GOOD).expect("valid");
        for kind in [Normalization::ZScore, Normalization::Quantile] {
            assert!(matches!(
                kind.normalize(&stats.state, &[0.0f32; 3]),
                Err(NormError::Short { found: 2, .. })
            ));
            assert!(matches!(
                kind.unnormalize(&stats.state, &[0.0f32; 1]),
                Err(NormError::Long { found: 2, .. })
            ));
            assert_eq!(kind.normalize(&stats.state, &[0.0f32; 1]).expect("cut").len(), 1);
        }
        assert_eq!(
            Normalization::Quantile.normalize(&stats.actions, &[0.0f32]),
            Err(NormError::NoQuantiles)
        );
        assert_eq!(
            Normalization::None.normalize(&stats.state, &[7.0f32; 3]),
            Ok(vec![7.0; 3])
        );
        let error = absolute_from_delta(&[0.0f32; 7], &[0.0; 6], &bool_mask(&[6, -1]));
        assert_eq!(
            error,
            Err(NormError::DeltaMask {
                mask: 7,
                state: 6,
                actions: 7
            })
        );
    }
}
