//! `flow_cps`: coefficient-preserving sampling (arXiv 2509.05952).

use super::rule::NoiseRule;

/// `noise_weight = t_next cos(pi a / 2)`, `std = t_next sin(pi a / 2)`.
///
/// At `a = 1` all noise is fresh; above 1 the weight of the old noise would be negative. The last step has no density, because
/// its `t_next` is exactly 0.
pub(super) const RULE: NoiseRule = NoiseRule {
    name: "flow_cps",
    noise: |step, level| {
        let angle = std::f64::consts::FRAC_PI_2 * level;
        (step.t_next * angle.cos(), step.t_next * angle.sin())
    },
    levels: Some(1.0),
    learnt: false,
};
