//! Normalization of state and actions, and delta actions, by openpi's rules; computed in f64, returned as f32.

use std::{io::Read, path::Path};

use serde::{Deserialize, Serialize};

/// Term added to the denominators.
const EPS: f64 = 1e-6;
/// Largest size of a statistics file in bytes.
const MAX_FILE_BYTES: u64 = 1 << 20;
/// Widest state or action accepted.
const MAX_DIMS: usize = 1024;

/// Statistics of one array, per dimension.
///
/// Deserialization checks that all arrays have one width of 1 to 1024 and finite numbers, and that `std >= 0`. Both or neither
/// of the quantiles must be present.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawStats")]
pub struct DimStats {
    /// Mean per dimension.
    pub mean: Vec<f64>,
    /// Standard deviation per dimension, at least 0.
    pub std: Vec<f64>,
    /// 1 % quantile; required for quantile normalization.
    pub q01: Option<Vec<f64>>,
    /// 99 % quantile; required for quantile normalization.
    pub q99: Option<Vec<f64>>,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct RawStats {
    mean: Vec<f64>,
    std: Vec<f64>,
    q01: Option<Vec<f64>>,
    q99: Option<Vec<f64>>,
}

impl TryFrom<RawStats> for DimStats {
    type Error = String;

    fn try_from(raw: RawStats) -> Result<Self, String> {
        let width = raw.mean.len();
        if width == 0 || width > MAX_DIMS {
            return Err(format!("`mean` has {width} dimensions, expected 1 to {MAX_DIMS}"));
        }
        let quantiles = [("q01", &raw.q01), ("q99", &raw.q99)].map(|(name, v)| v.as_ref().map(|v| (name, v)));
        if quantiles.iter().flatten().count() == 1 {
            return Err("one of `q01` and `q99` is missing".to_owned());
        }
        for (name, values) in [("mean", &raw.mean), ("std", &raw.std)]
            .into_iter()
            .chain(quantiles.into_iter().flatten())
        {
            if values.len() != width {
                return Err(format!("`{name}` has {} dimensions, `mean` has {width}", values.len()));
            }
            if let Some(index) = values.iter().position(|v| !v.is_finite()) {
                return Err(format!("`{name}[{index}]` is not finite"));
            }
        }
        if let Some(index) = raw.std.iter().position(|v| *v < 0.0) {
            return Err(format!("`std[{index}]` is negative"));
        }
        Ok(Self {
            mean: raw.mean,
            std: raw.std,
            q01: raw.q01,
            q99: raw.q99,
        })
    }
}

/// Statistics of state and actions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NormStats {
    /// Statistics of the state.
    pub state: DimStats,
    /// Statistics of the actions.
    pub actions: DimStats,
}

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

/// Reason for rejecting statistics or a delta mask.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NormError {
    /// The file cannot be read or parsed.
    #[error("norm stats `{path}`: {detail}")]
    File {
        /// Path of the file.
        path: String,
        /// Cause.
        detail: String,
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

#[derive(Deserialize)]
struct File {
    norm_stats: NormStats,
}

impl NormStats {
    /// Reads openpi's `norm_stats.json`: `{"norm_stats": {"state": {"mean", "std", "q01", "q99"}, "actions": {..}}}`.
    ///
    /// # Errors
    /// The file is missing, above 1 MiB or of another layout, or its numbers fail the checks of [`DimStats`].
    pub fn load(path: &Path) -> Result<Self, NormError> {
        let bad = |detail: String| NormError::File {
            path: path.display().to_string(),
            detail,
        };
        let file = std::fs::File::open(path).map_err(|e| bad(e.to_string()))?;
        let mut text = String::new();
        file.take(MAX_FILE_BYTES + 1)
            .read_to_string(&mut text)
            .map_err(|e| bad(e.to_string()))?;
        if text.len() as u64 > MAX_FILE_BYTES {
            return Err(bad(format!("longer than {MAX_FILE_BYTES} bytes")));
        }
        Self::from_json(&text).map_err(|e| bad(e.to_string()))
    }

    /// Parses the text of `norm_stats.json`.
    ///
    /// # Errors
    /// Another layout, or numbers that fail the checks of [`DimStats`].
    pub fn from_json(text: &str) -> Result<Self, serde_json::Error> {
        serde_json::from_str::<File>(text).map(|f| f.norm_stats)
    }
}

impl DimStats {
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
    fn openpi_layout_is_read_and_bad_numbers_are_refused() {
        let stats = NormStats::from_json(GOOD).expect("valid");
        assert_eq!(stats.state.std, [1.0, 2.0]);
        assert_eq!(stats.actions.q01, None);
        let text = serde_json::to_string(&stats).expect("serialises");
        assert_eq!(serde_json::from_str::<NormStats>(&text).expect("round trip"), stats);
        for (from, to, reason) in [
            (
                "[1, 2], \"q01\"",
                "[1], \"q01\"",
                "`std` has 1 dimensions, `mean` has 2",
            ),
            ("[1, 2], \"q01\"", "[1, -2], \"q01\"", "`std[1]` is negative"),
            ("\"q01\": [-1, -2], ", "", "one of `q01` and `q99` is missing"),
            ("[0, 1]", "[]", "`mean` has 0 dimensions"),
            ("[0, 1]", "[0, 1e999]", "out of range"),
            ("\"std\": [1, 2]", "\"sdt\": [1, 2]", "unknown field `sdt`"),
        ] {
            let error = NormStats::from_json(&GOOD.replacen(from, to, 1))
                .expect_err(reason)
                .to_string();
            assert!(error.contains(reason), "{error} does not say {reason}");
        }
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
