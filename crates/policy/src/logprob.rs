//! Gaussian log-probability of a denoise transition on plain slices: the oracle for both sides.

/// `ln sqrt(2 pi)`.
pub const LN_SQRT_TWO_PI: f32 = 0.918_938_5;

/// Log-density of `x_next` under `N(mean, std^2)`, per element. `std > 0`: a step without noise has no density and makes no record.
pub fn gaussian(x_next: f32, mean: f32, std: f32) -> f32 {
    let z = (x_next - mean) / std;
    -0.5 * z * z - std.ln() - LN_SQRT_TWO_PI
}

/// Per-element log-probabilities sliced to the executed part: `x_next` and `mean` are `[action_horizon, action_dim]` row-major,
/// the result is `[action_chunk, env_action_dim]`.
pub fn executed(
    x_next: &[f32],
    mean: &[f32],
    std: f32,
    action_dim: usize,
    action_chunk: usize,
    env_action_dim: usize,
) -> Vec<f32> {
    x_next
        .chunks(action_dim)
        .zip(mean.chunks(action_dim))
        .take(action_chunk)
        .flat_map(|(x_row, mean_row)| {
            x_row
                .iter()
                .zip(mean_row)
                .take(env_action_dim)
                .map(move |(x, m)| gaussian(*x, *m, std))
        })
        .collect()
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
        let got = executed(&x, &x, 1.0, 4, 2, 3);
        assert_eq!(got.len(), 6);
        assert!(got.iter().all(|v| (*v + LN_SQRT_TWO_PI).abs() < 1e-7));
    }
}
