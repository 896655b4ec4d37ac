//! Mean, spread and normalization over all valid entries of an iteration.

/// Added to the standard deviation of the normalized advantages.
pub const NORMALIZE_EPS: f64 = 1e-5;

/// Mean and unbiased standard deviation of the valid entries; `None` with fewer than two of them.
pub fn mean_and_std(values: &[f32], mask: Option<&[bool]>) -> Option<(f64, f64)> {
    let valid = |at: usize| mask.is_none_or(|mask| mask.get(at).copied().unwrap_or(false));
    let kept = || {
        values
            .iter()
            .enumerate()
            .filter(|(at, _)| valid(*at))
            .map(|(_, value)| f64::from(*value))
    };
    let count = kept().count();
    if count < 2 {
        return None;
    }
    let mean = kept().sum::<f64>() / count as f64;
    let variance = kept().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1) as f64;
    Some((mean, variance.sqrt()))
}

/// Shifts and scales all entries by the mean and unbiased standard deviation of the valid ones, `NORMALIZE_EPS` added
/// to the latter. With fewer than two valid entries there is no spread and nothing changes.
pub fn normalize(values: &mut [f32], mask: Option<&[bool]>) {
    if let Some((mean, std)) = mean_and_std(values, mask) {
        for value in values {
            *value = ((f64::from(*value) - mean) / (std + NORMALIZE_EPS)) as f32;
        }
    }
}
