//! Interface of a noise method.

/// Rule for the noise of a stochastic denoise step, an entry of the registry.
pub struct NoiseRule {
    /// Value of the configuration key `actor.model.openpi.noise_method`.
    pub name: &'static str,
    /// Returns the weight of the noise estimate and the standard deviation, from the step's flow times and the noise level.
    pub(super) noise: fn(StepTimes, f64) -> (f64, f64),
    /// Largest `noise_level`; `None`: the method does not read the level.
    pub levels: Option<f64>,
    /// Whether the standard deviation comes from a noise head, so that the entropy depends on the weights.
    pub learnt: bool,
}

/// Flow times before and after a denoise step.
#[derive(Debug, Clone, Copy)]
pub(super) struct StepTimes {
    pub(super) t: f64,
    pub(super) t_next: f64,
}
