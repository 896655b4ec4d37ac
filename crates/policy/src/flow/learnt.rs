//! `flow_noise`: the mean of the ODE step with a standard deviation from a learned noise head (piRL, Flow-Noise).

use super::rule::NoiseRule;

/// Rule of `flow_noise`; its `std` is a factor on the standard deviation from the noise head.
pub(super) const RULE: NoiseRule = NoiseRule {
    name: "flow_noise",
    noise: |step, _level| (step.t_next, 1.0),
    levels: None,
    learnt: true,
};
