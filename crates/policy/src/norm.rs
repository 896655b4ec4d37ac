//! Normalisation of state and actions, by openpi's rules.

use std::path::Path;

use serde::{Deserialize, Serialize};

/// Statistics of one array, per dimension.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DimStats {
    /// Mean.
    pub mean: Vec<f64>,
    /// Standard deviation.
    pub std: Vec<f64>,
    /// 1 % quantile; needed for quantile normalisation.
    pub q01: Option<Vec<f64>>,
    /// 99 % quantile; needed for quantile normalisation.
    pub q99: Option<Vec<f64>>,
}

/// Statistics of state and actions.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NormStats {
    /// State.
    pub state: DimStats,
    /// Actions.
    pub actions: DimStats,
}

/// How state and actions are normalised.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Normalization {
    /// As they are.
    None,
    /// `(x - mean) / (std + 1e-6)`, pi0.
    ZScore,
    /// To `[-1, 1]` between the 1 % and 99 % quantiles, pi0.5; dimensions beyond the statistics pass unchanged.
    Quantile,
}

/// Statistics that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum NormError {
    /// The file cannot be read or parsed.
    #[error("norm stats `{path}`: {detail}")]
    File {
        /// Which file.
        path: String,
        /// Why.
        detail: String,
    },
    /// Too few dimensions.
    #[error("norm stats have {found} dimensions of `{field}`, the data has {expected}")]
    Short {
        /// Which statistic.
        field: &'static str,
        /// Width of the data.
        expected: usize,
        /// Width of the statistic.
        found: usize,
    },
    /// No quantiles.
    #[error("norm stats lack `q01` and `q99`, quantile normalisation needs them")]
    NoQuantiles,
}

/// Guard of the denominators.
const EPS: f64 = 1e-6;
const MAX_FILE_BYTES: u64 = 1 << 20;

#[derive(Deserialize)]
struct File {
    norm_stats: NormStats,
}

impl NormStats {
    /// Reads openpi's `norm_stats.json`.
    ///
    /// # Errors
    /// The file is missing, too long or of another layout.
    pub fn load(path: &Path) -> Result<Self, NormError> {
        let bad = |detail: String| NormError::File { path: path.display().to_string(), detail };
        let size = std::fs::metadata(path).map_err(|e| bad(e.to_string()))?.len();
        if size > MAX_FILE_BYTES {
            return Err(bad(format!("{size} bytes, expected at most {MAX_FILE_BYTES}")));
        }
        let text = std::fs::read_to_string(path).map_err(|e| bad(e.to_string()))?;
        serde_json::from_str::<File>(&text).map(|f| f.norm_stats).map_err(|e| bad(e.to_string()))
    }
}

impl DimStats {
    fn quantiles(&self) -> Result<(&[f64], &[f64]), NormError> {
        self.q01.as_deref().zip(self.q99.as_deref()).ok_or(NormError::NoQuantiles)
    }
}

fn at_least(field: &'static str, values: &[f64], width: usize) -> Result<(), NormError> {
    if values.len() < width {
        return Err(NormError::Short { field, expected: width, found: values.len() });
    }
    Ok(())
}

impl Normalization {
    /// Normalises one row; statistics longer than the row are cut.
    ///
    /// # Errors
    /// The statistics are shorter than the row, or lack quantiles.
    pub fn normalize(self, stats: &DimStats, row: &[f32]) -> Result<Vec<f32>, NormError> {
        let wide = row.iter().map(|v| f64::from(*v));
        match self {
            Self::None => Ok(row.to_vec()),
            Self::ZScore => {
                at_least("mean", &stats.mean, row.len())?;
                at_least("std", &stats.std, row.len())?;
                Ok(wide.zip(stats.mean.iter().zip(&stats.std)).map(|(x, (m, s))| ((x - m) / (s + EPS)) as f32).collect())
            }
            Self::Quantile => {
                let (q01, q99) = stats.quantiles()?;
                at_least("q01", q01, row.len())?;
                at_least("q99", q99, row.len())?;
                Ok(wide.zip(q01.iter().zip(q99)).map(|(x, (l, h))| ((x - l) / (h - l + EPS) * 2.0 - 1.0) as f32).collect())
            }
        }
    }

    /// The inverse. Dimensions beyond the statistics: z-score treats them as mean 0 and std 1 (so they scale by 1.000001, as in
    /// openpi), quantile leaves them as they are.
    ///
    /// # Errors
    /// The statistics lack quantiles.
    pub fn unnormalize(self, stats: &DimStats, row: &[f32]) -> Result<Vec<f32>, NormError> {
        let wide = row.iter().enumerate().map(|(i, v)| (i, f64::from(*v)));
        match self {
            Self::None => Ok(row.to_vec()),
            Self::ZScore => Ok(wide
                .map(|(i, x)| {
                    let mean = stats.mean.get(i).copied().unwrap_or(0.0);
                    let std = stats.std.get(i).copied().unwrap_or(1.0);
                    (x * (std + EPS) + mean) as f32
                })
                .collect()),
            Self::Quantile => {
                let (q01, q99) = stats.quantiles()?;
                Ok(wide
                    .map(|(i, x)| match (q01.get(i), q99.get(i)) {
                        (Some(l), Some(h)) => ((x + 1.0) / 2.0 * (h - l + EPS) + l) as f32,
                        _ => x as f32,
                    })
                    .collect())
            }
        }
    }
}
