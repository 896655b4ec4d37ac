//! `flow_noise`: the ODE's mean with a standard deviation that a noise head learns (piRL, Flow-Noise).

use super::rule::NoiseRule;

/// The table's `std` is the factor of the noise head's.
pub(super) const RULE: NoiseRule = NoiseRule {
    name: "flow_noise",
    noise: |step, _level| (step.t_next, 1.0),
    levels: None,
    learnt: true,
};
