//! `flow_sde`: the SDE with the same marginals as the ODE (piRL, arXiv 2510.25889, Flow-SDE).

use super::rule::NoiseRule;

/// `sigma = a sqrt(t / (1 - t))`, `std = sigma sqrt(d)`, `noise_weight = t_next - sigma^2 d / (2 t)` with `d = t - t_next`.
///
/// At `t = 1` the denominator is `1 - t_next`.
pub(super) const RULE: NoiseRule = NoiseRule {
    name: "flow_sde",
    noise: |step, level| {
        let (t, t_next) = (step.t, step.t_next);
        let d = t - t_next;
        let below_one = if t < 1.0 { t } else { t_next };
        let sigma = level * (t / (1.0 - below_one)).sqrt();
        (t_next - sigma * sigma * d / (2.0 * t), sigma * d.sqrt())
    },
    levels: Some(2.0),
    learnt: false,
};
