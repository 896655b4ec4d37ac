//! Flow time and the step table: the only module that depends on the direction of flow time.
//!
//! `t = 1` is pure noise, `t = 0` is the action (the papers write the opposite). A denoise step is one row of numbers. ODE,
//! Flow-SDE and Flow-CPS have the same row format, so that training, evaluation and hybrid sampling share one code path.

mod rule;
mod ode;
mod sde;
mod cps;
mod learnt;

use std::fmt;

use serde::{Deserialize, Deserializer, Serialize, Serializer, de::Error as _};

pub use self::rule::NoiseRule;
use self::rule::StepTimes;

/// Registry of all noise methods.
pub const NOISE_METHODS: &[NoiseMethod] = &[
    NoiseMethod(&ode::RULE),
    NoiseMethod(&sde::RULE),
    NoiseMethod(&cps::RULE),
    NoiseMethod(&learnt::RULE),
];

/// Entry of [`NOISE_METHODS`]; serialized as the method's name.
#[derive(Clone, Copy)]
pub struct NoiseMethod(&'static NoiseRule);

impl NoiseMethod {
    /// The method without noise, used by every evaluation.
    pub const ODE: Self = Self(&ode::RULE);

    /// Returns the method of this name in [`NOISE_METHODS`].
    pub fn named(name: &str) -> Option<Self> {
        NOISE_METHODS.iter().find(|method| method.0.name == name).copied()
    }
}

impl std::ops::Deref for NoiseMethod {
    type Target = NoiseRule;

    fn deref(&self) -> &NoiseRule {
        self.0
    }
}

impl PartialEq for NoiseMethod {
    fn eq(&self, other: &Self) -> bool {
        self.name == other.name
    }
}

impl Eq for NoiseMethod {}

impl fmt::Debug for NoiseMethod {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name)
    }
}

impl Serialize for NoiseMethod {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.name)
    }
}

impl<'de> Deserialize<'de> for NoiseMethod {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        let name = String::deserialize(deserializer)?;
        Self::named(&name).ok_or_else(|| {
            let known: Vec<String> = NOISE_METHODS
                .iter()
                .map(|method| format!("`{}`", method.name))
                .collect();
            D::Error::custom(format!(
                "unknown variant `{name}`, expected one of {}",
                known.join(", ")
            ))
        })
    }
}

/// Choice of the stochastic denoise steps of a chunk, and of the unit that counts as one decision of the policy.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mdp {
    /// One stochastic step per chunk, drawn for each environment; the other steps are ODE steps (piRL, hybrid ODE-SDE).
    Hybrid,
    /// All steps stochastic; a chunk is one decision with the joint likelihood of its steps.
    Joint,
    /// All steps stochastic; each denoise step is a separate transition (piRL, two-layer MDP, Eq. 10-12).
    TwoLayer,
}

/// Sampling parameters of a policy version, stored in its bundle.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Sampling {
    /// Noise method of the stochastic steps.
    pub noise_method: NoiseMethod,
    /// Noise scale, `a` of the papers.
    pub noise_level: f64,
    /// Whether the last step is deterministic.
    pub ignore_last: bool,
    /// Denoise steps per chunk.
    pub num_steps: usize,
    /// Choice of the stochastic steps.
    pub mdp: Mdp,
    /// Whether the log-probability is `-(x_next - mean)^2` instead of the Gaussian log-density.
    pub safe_logprob: bool,
}

/// Noise level that is linear in the policy version: `start + (end - start) min(version, steps) / steps`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoiseAnneal {
    /// Noise level of version 0.
    pub start: f64,
    /// Noise level from version `steps` on.
    pub end: f64,
    /// Number of versions between `start` and `end`.
    pub steps: u64,
}

impl NoiseAnneal {
    /// Returns the noise level of a policy version.
    pub fn level(&self, version: u64) -> f64 {
        let progress = version.min(self.steps) as f64 / self.steps.max(1) as f64;
        self.start + (self.end - self.start) * progress
    }
}

/// One row of the step table. With `x0 = x - t v` (action estimate) and `x1 = x + (1 - t) v` (noise estimate):
/// `x_next = action_weight * x0 + noise_weight * x1 + std * z`, `z ~ N(0, I)`.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct DenoiseStep {
    /// Flow time before the step, in `(0, 1]`.
    pub t: f64,
    /// Flow time after the step, in `[0, 1)`.
    pub t_next: f64,
    /// Weight of the action estimate.
    pub action_weight: f64,
    /// Weight of the noise estimate.
    pub noise_weight: f64,
    /// Standard deviation of the added noise; a step with 0 has no density. With Flow-Noise a factor on the standard deviation
    /// from the noise head.
    pub std: f64,
}

impl DenoiseStep {
    /// Returns the coefficients `(c_x, c_v)` of the mean written as `c_x * x + c_v * v`.
    pub fn mean_coefficients(&self) -> (f64, f64) {
        (
            self.action_weight + self.noise_weight,
            self.noise_weight * (1.0 - self.t) - self.action_weight * self.t,
        )
    }
}

/// Returns the flow times of `num_steps` denoise steps: `linspace(1, 1/K, K)` followed by 0.
pub fn flow_times(num_steps: usize) -> Vec<f64> {
    let count = num_steps as f64;
    let mut times: Vec<f64> = (0..num_steps).map(|i| (count - i as f64) / count).collect();
    times.push(0.0);
    times
}

/// Returns the rows of one method for all `num_steps` steps (`noise_level` is `a` of the papers, usually 0.1 to 0.8).
pub fn step_table(method: NoiseMethod, num_steps: usize, noise_level: f64) -> Vec<DenoiseStep> {
    let row = |pair: &[f64]| {
        let (t, t_next) = (pair[0], pair[1]);
        let (noise_weight, std) = (method.noise)(StepTimes { t, t_next }, noise_level);
        DenoiseStep {
            t,
            t_next,
            action_weight: 1.0 - t_next,
            noise_weight,
            std,
        }
    };
    flow_times(num_steps).windows(2).map(row).collect()
}

/// Choice of a chunk's stochastic steps among the steps that have a density.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum StepDraw {
    /// One of the first `of` steps.
    One {
        /// Number of steps to choose from; 0: no stochastic step.
        of: usize,
    },
    /// All of the first `of` steps.
    Every {
        /// Number of stochastic steps.
        of: usize,
    },
}

/// The two step tables of sampling and the choice of the stochastic steps.
#[derive(Debug, Clone, PartialEq)]
pub struct Schedule {
    /// Deterministic rows.
    pub ode: Vec<DenoiseStep>,
    /// Stochastic rows of the configured method.
    pub stochastic: Vec<DenoiseStep>,
    /// Number of steps from which the stochastic step is drawn. The last step is excluded if it has no density or is ignored.
    pub drawable: usize,
    /// Whether all drawable steps are stochastic, instead of one step.
    pub every: bool,
}

impl Schedule {
    /// Returns the tables of hybrid sampling. `ignore_last` keeps the last denoise step deterministic.
    pub fn new(method: NoiseMethod, num_steps: usize, noise_level: f64, ignore_last: bool) -> Self {
        let stochastic = step_table(method, num_steps, noise_level);
        let usable = stochastic.iter().take_while(|row| row.std > 0.0).count();
        let drawable = if ignore_last {
            usable.min(num_steps.saturating_sub(1))
        } else {
            usable
        };
        Self {
            ode: step_table(NoiseMethod::ODE, num_steps, 0.0),
            stochastic,
            drawable,
            every: false,
        }
    }

    /// Returns the tables for the sampling parameters of a policy version.
    pub fn of(sampling: &Sampling) -> Self {
        Self {
            every: sampling.mdp != Mdp::Hybrid,
            ..Self::new(
                sampling.noise_method,
                sampling.num_steps,
                sampling.noise_level,
                sampling.ignore_last,
            )
        }
    }

    /// Returns the number of denoise steps.
    pub fn num_steps(&self) -> usize {
        self.ode.len()
    }

    /// Returns the number of stochastic steps per chunk in training.
    pub fn stochastic_steps(&self) -> usize {
        if self.every {
            self.drawable
        } else {
            self.drawable.min(1)
        }
    }

    /// Returns the choice of a chunk's stochastic steps.
    pub fn draw(&self) -> StepDraw {
        if self.every {
            StepDraw::Every { of: self.drawable }
        } else {
            StepDraw::One { of: self.drawable }
        }
    }

    /// Returns the stochastic or deterministic row of step `k`.
    pub fn row(&self, k: usize, stochastic: bool) -> Option<&DenoiseStep> {
        if stochastic {
            self.stochastic.get(k)
        } else {
            self.ode.get(k)
        }
    }
}

/// Returns the sine-cosine embedding of the flow time, with `width` (even) elements: first the sines, then the cosines.
///
/// The periods are geometric from 4e-3 to 4 and computed in f64 (openpi, `create_sinusoidal_pos_embedding`).
pub fn time_embedding(t: f64, width: usize) -> Vec<f32> {
    let half = width / 2;
    let angle = |j: usize| {
        let fraction = if half > 1 { j as f64 / (half - 1) as f64 } else { 0.0 };
        let period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD).powf(fraction);
        t * std::f64::consts::TAU / period
    };
    let sines = (0..half).map(|j| angle(j).sin() as f32);
    let cosines = (0..half).map(|j| angle(j).cos() as f32);
    sines.chain(cosines).collect()
}

/// Shortest period of the time embedding, in units of flow time.
pub const MIN_PERIOD: f64 = 4e-3;
/// Longest period of the time embedding, in units of flow time.
pub const MAX_PERIOD: f64 = 4.0;

/// Returns a flow time for training, distributed as `0.999 * Beta(1.5, 1) + 0.001`, from a uniform number in `[0, 1)`.
///
/// The Beta sample is the inverse of the CDF `x^1.5`.
pub fn training_time(uniform: f64) -> f64 {
    0.999 * uniform.powf(1.0 / 1.5) + 0.001
}

#[cfg(test)]
mod tests {
    use super::*;

    fn named(name: &str) -> NoiseMethod {
        NoiseMethod::named(name).expect("registered")
    }

    #[test]
    fn a_method_is_written_as_its_name() {
        for method in NOISE_METHODS {
            let text = serde_json::to_string(method).expect("written");
            assert_eq!(text, format!("\"{}\"", method.name));
            assert_eq!(serde_json::from_str::<NoiseMethod>(&text).expect("read"), *method);
        }
        let error = serde_json::from_str::<NoiseMethod>("\"flow_sdee\"").expect_err("unknown");
        assert!(error.to_string().contains("`flow_sde`"), "{error}");
    }

    #[test]
    fn ode_step_is_euler_on_the_velocity() {
        for row in step_table(NoiseMethod::ODE, 7, 0.5) {
            let (c_x, c_v) = row.mean_coefficients();
            assert!((c_x - 1.0).abs() < 1e-15, "x keeps weight one");
            assert!((c_v + (row.t - row.t_next)).abs() < 1e-15, "v has weight -d");
        }
    }

    #[test]
    fn sde_step_is_euler_maruyama_with_the_score() {
        // an independent form of the step: x - d (v - sigma^2 score / 2) with score = -x1 / t
        let (x, v) = (0.37, -1.21);
        for (k, row) in step_table(named("flow_sde"), 10, 0.7).iter().enumerate().skip(1) {
            let d = row.t - row.t_next;
            let sigma2 = 0.49 * row.t / (1.0 - row.t);
            let score = -(x + (1.0 - row.t) * v) / row.t;
            let want = x - d * (v - sigma2 * score / 2.0);
            let (c_x, c_v) = row.mean_coefficients();
            assert!((c_x * x + c_v * v - want).abs() < 1e-12, "step {k}");
            assert!((row.std - (sigma2 * d).sqrt()).abs() < 1e-12, "step {k}");
        }
    }

    #[test]
    fn known_stds_of_four_steps() {
        let stds: Vec<f64> = step_table(named("flow_sde"), 4, 0.5).iter().map(|r| r.std).collect();
        for (got, want) in stds.iter().zip([0.5, 0.433_012_701_9, 0.25, 0.144_337_567_3]) {
            assert!((got - want).abs() < 1e-9, "{stds:?}");
        }
    }

    #[test]
    fn cps_never_draws_the_last_step() {
        let schedule = Schedule::new(named("flow_cps"), 5, 0.5, false);
        assert_eq!(schedule.drawable, 4);
        assert_eq!(Schedule::new(named("flow_sde"), 5, 0.5, false).drawable, 5);
        assert_eq!(Schedule::new(named("flow_sde"), 5, 0.5, true).drawable, 4);
        assert_eq!(Schedule::new(NoiseMethod::ODE, 5, 0.5, true).drawable, 0);
    }

    #[test]
    fn the_level_anneals_with_the_version() {
        let anneal = NoiseAnneal {
            start: 0.7,
            end: 0.3,
            steps: 400,
        };
        for (version, level) in [(0, 0.7), (100, 0.6), (400, 0.3), (1000, 0.3)] {
            assert!((anneal.level(version) - level).abs() < 1e-12, "version {version}");
        }
    }
}
