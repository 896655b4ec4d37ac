//! Gaussian log-probability of a denoise transition on plain slices, the reference for engine and learner.

/// `ln sqrt(2 pi)`.
pub const LN_SQRT_TWO_PI: f32 = 0.918_938_5;

/// Returns the log-density of one element `x_next` under `N(mean, std^2)`.
///
/// `std` must be above 0: a step without noise has no density and makes no record.
pub fn gaussian(x_next: f32, mean: f32, std: f32) -> f32 {
    let z = (x_next - mean) / std;
    -0.5 * z * z - std.ln() - LN_SQRT_TWO_PI
}

/// Returns the reference's safe log-probability `-(x_next - mean)^2`, without scale and constant.
pub fn negative_square(x_next: f32, mean: f32) -> f32 {
    -(x_next - mean) * (x_next - mean)
}

/// Returns the log-probability of each executed element, `[action_chunk, env_action_dim]`.
///
/// `x_next` and `mean` are `[action_horizon, action_dim]`, row-major. `density` returns the log-probability of one element from
/// its flat index, `x_next` and `mean`.
///
/// # Panics
/// `x_next` or `mean` is smaller than the executed part, since each executed element needs a log-probability.
pub fn executed(
    x_next: &[f32],
    mean: &[f32],
    action_dim: usize,
    action_chunk: usize,
    env_action_dim: usize,
    density: impl Fn(usize, f32, f32) -> f32,
) -> Vec<f32> {
    (0..action_chunk)
        .flat_map(|row| {
            let row_of = |chunk| executed_row(chunk, row, action_dim, env_action_dim);
            row_of(x_next)
                .iter()
                .zip(row_of(mean))
                .enumerate()
                .map(move |(column, elements)| (row * action_dim + column, elements))
        })
        .map(|(at, (x_next, mean))| density(at, *x_next, *mean))
        .collect()
}

#[expect(
    clippy::expect_used,
    reason = "plans and bundles are rejected unless action_chunk <= action_horizon and env_action_dim <= action_dim, and callers give whole chunks"
)]
fn executed_row(chunk: &[f32], row: usize, action_dim: usize, env_action_dim: usize) -> &[f32] {
    chunk
        .get(row * action_dim..(row + 1) * action_dim)
        .and_then(|row| row.get(..env_action_dim))
        .expect("a chunk at least as large as its executed part")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn density_integrates_to_one() {
        let (mean, std) = (0.3, 0.25);
        let step = 1e-3;
        let total: f64 = (-4000..4000)
            .map(|i| f64::from(gaussian(i as f32 * step, mean, std)).exp() * f64::from(step))
            .sum();
        assert!((total - 1.0).abs() < 1e-3, "{total}");
    }

    #[test]
    fn slices_to_the_executed_part() {
        let x: Vec<f32> = (0..12).map(|i| i as f32).collect();
        let got = executed(&x, &x, 4, 2, 3, |_, x, m| gaussian(x, m, 1.0));
        assert_eq!(got.len(), 6);
        assert!(got.iter().all(|v| (*v + LN_SQRT_TWO_PI).abs() < 1e-7));
    }

    #[test]
    #[should_panic(expected = "as large as its executed part")]
    fn a_chunk_that_is_too_small_has_no_shorter_log_probability() {
        drop(executed(&[0.0; 12], &[0.0; 11], 4, 3, 3, |_, x, _| x));
    }
}
