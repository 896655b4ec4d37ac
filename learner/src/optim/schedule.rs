//! Learning-rate schedules: a linear rise, then a constant or half a cosine.

/// Learning-rate schedule after the warm-up.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Decay {
    /// Factor 1.
    Constant,
    /// Half a cosine from 1 at the end of the warm-up to `min_factor` at `total_steps`, and `min_factor` afterwards.
    Cosine {
        /// Steps of the whole run, warm-up included.
        total_steps: u64,
        /// Floor as a factor of the group's learning rate, in [0, 1].
        min_factor: f64,
    },
}

/// Factor of the learning rate as a function of the optimizer step.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Schedule {
    /// Steps of linear rise.
    pub warmup_steps: u64,
    /// Factor of the first step of the rise, in [0, 1]. With 0 the first step has no effect.
    pub warmup_start: f64,
    /// Schedule after the warm-up.
    pub decay: Decay,
}

impl Schedule {
    /// Creates a schedule with a linear rise over `warmup_steps` steps from `1 / (warmup_steps + 1)`, so that the first step has
    /// an effect.
    pub fn warmup(warmup_steps: u64, decay: Decay) -> Self {
        Self {
            warmup_steps,
            warmup_start: 1.0 / (warmup_steps as f64 + 1.0),
            decay,
        }
    }

    /// Returns the factor of the learning rate at optimizer step `step`, counted from 0.
    pub fn factor(&self, step: u64) -> f64 {
        if step < self.warmup_steps {
            let progress = step as f64 / self.warmup_steps as f64;
            return self.warmup_start + (1.0 - self.warmup_start) * progress;
        }
        match self.decay {
            Decay::Constant => 1.0,
            Decay::Cosine {
                total_steps,
                min_factor,
            } => {
                let span = total_steps.saturating_sub(self.warmup_steps).max(1);
                let progress = ((step - self.warmup_steps) as f64 / span as f64).min(1.0);
                min_factor + (1.0 - min_factor) * 0.5 * (1.0 + (std::f64::consts::PI * progress).cos())
            }
        }
    }
}
