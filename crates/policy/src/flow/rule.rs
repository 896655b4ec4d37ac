//! What a noise method says of a stochastic denoise step.

/// How a stochastic denoise step adds noise: one rule of the registry.
pub struct NoiseRule {
    /// `actor.model.openpi.noise_method` of the configuration.
    pub name: &'static str,
    /// Weight of the noise estimate and standard deviation of the step between these flow times at a noise level.
    pub(super) noise: fn(StepTimes, f64) -> (f64, f64),
    /// Largest `noise_level`; `None`: the level is not read.
    pub levels: Option<f64>,
    /// Whether the standard deviation comes from a noise head, and the entropy so depends on the weights.
    pub learnt: bool,
}

/// Flow times before and after a denoise step.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepTimes {
    pub(super) t: f64,
    pub(super) t_next: f64,
}
