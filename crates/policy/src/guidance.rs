//! Guidance of a new action chunk by the chunk that is still executed, so that a robot moves during inference without a jump.
//!
//! This is real-time chunking (Black et al. 2025, arXiv 2506.07339) in the reference's form, a correction after each ODE step.

/// Term that keeps the weight of the first step finite.
const WEIGHT_EPS: f64 = 1e-4;

/// Previous chunk that a new chunk continues, with the weights of the correction.
#[derive(Debug, Clone, PartialEq)]
pub struct Guidance {
    /// Remaining actions of the previous chunk, in model units, row-major.
    previous: Vec<f32>,
    /// Width of a row; further columns of the new chunk are unchanged.
    width: usize,
    /// Weight of each row, in `[0, 1]`.
    mask: Vec<f64>,
    /// Largest weight of the correction.
    max_weight: f64,
}

impl Guidance {
    /// Makes the guidance of a chunk of `horizon` rows by `previous`, the rows of `width` numbers remaining at the observation.
    ///
    /// The first `delay` rows are executed before the new chunk arrives and have weight 1. The weight of a later row `i` is
    /// `c (e^c - 1) / (e - 1)` with `c = (rows - i) / (rows - delay + 1)`. `max_weight` bounds the weight of each correction.
    pub fn new(previous: Vec<f32>, width: usize, horizon: usize, delay: usize, max_weight: f64) -> Self {
        let rows = (previous.len() / width.max(1)).min(horizon);
        let fixed = delay.min(rows);
        let mask = (0..rows)
            .map(|i| {
                if i < fixed {
                    return 1.0;
                }
                let c = (rows - i) as f64 / (rows - fixed + 1) as f64;
                c * c.exp_m1() / (std::f64::consts::E - 1.0)
            })
            .collect();
        Self {
            previous,
            width,
            mask,
            max_weight,
        }
    }

    /// Returns the weight of the correction after denoise step `k` of `num_steps`.
    ///
    /// The weight is `min((1 - p) / (p + eps), max_weight)` with `p = k / num_steps`.
    pub fn weight(&self, k: usize, num_steps: usize) -> f64 {
        let done = k as f64 / num_steps.max(1) as f64;
        ((1.0 - done) / (done + WEIGHT_EPS)).min(self.max_weight)
    }

    /// Corrects a chunk `x` of rows of `action_dim` after ODE step `k`: `x += weight mask (previous - x)`.
    pub fn correct(&self, x: &mut [f32], action_dim: usize, k: usize, num_steps: usize) {
        let weight = self.weight(k, num_steps);
        let rows = x.chunks_mut(action_dim.max(1));
        for ((row, previous), mask) in rows.zip(self.previous.chunks(self.width.max(1))).zip(&self.mask) {
            for (x, previous) in row.iter_mut().zip(previous) {
                *x += (weight * mask * (f64::from(*previous) - f64::from(*x))) as f32;
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_are_executed_meanwhile_count_fully_and_later_ones_less() {
        let guidance = Guidance::new(vec![0.0; 2 * 5], 2, 4, 2, 5.0);
        // four rows fit the horizon; `c` of the last two rows is 2/3 and 1/3
        let soft = |c: f64| c * (c.exp() - 1.0) / (std::f64::consts::E - 1.0);
        let want = [1.0, 1.0, soft(2.0 / 3.0), soft(1.0 / 3.0)];
        assert_eq!(guidance.mask.len(), 4);
        for (got, want) in guidance.mask.iter().zip(want) {
            assert!((got - want).abs() < 1e-12, "{:?}", guidance.mask);
        }
        assert_eq!(Guidance::new(vec![0.0; 4], 2, 4, 9, 5.0).mask, [1.0, 1.0]);
    }

    #[test]
    fn a_correction_of_weight_one_puts_fixed_rows_where_they_were() {
        let guidance = Guidance::new(vec![1.0, 2.0], 2, 4, 1, 1.0);
        let mut x = vec![9.0; 4 * 3];
        guidance.correct(&mut x, 3, 0, 4);
        assert_eq!(x[..3], [1.0, 2.0, 9.0], "a column beyond the actions is left alone");
        assert_eq!(x[3..], [9.0; 9]);
        let weights: Vec<f64> = (0..4).map(|k| guidance.weight(k, 4)).collect();
        assert!(
            weights[..2] == [1.0, 1.0] && (weights[3] - 0.25 / 0.7501).abs() < 1e-12,
            "{weights:?}"
        );
    }
}
