//! Normalisation of state and actions.
use serde::{Deserialize, Serialize};
/// Statistics of one array.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DimStats {
    /// Mean per dimension.
    pub mean: Vec<f64>,
    /// Standard deviation per dimension.
    pub std: Vec<f64>,
    /// 1 % quantile per dimension.
    pub q01: Option<Vec<f64>>,
    /// 99 % quantile per dimension.
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
    /// (x - mean) / (std + 1e-6).
    ZScore,
    /// To [-1, 1] between the 1 % and 99 % quantiles.
    Quantile,
}
