//! `flow_ode`: Euler steps of the probability-flow ODE, no noise.

use super::rule::NoiseRule;

/// Rule of `flow_ode`.
pub(super) const RULE: NoiseRule = NoiseRule {
    name: "flow_ode",
    noise: |step, _level| (step.t_next, 0.0),
    levels: None,
    learnt: false,
};
