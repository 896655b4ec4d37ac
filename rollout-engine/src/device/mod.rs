//! Processors that run policy versions, at the level of an action chunk.
//!
//! A [`Loader`] reads a version aside from what serves; a [`Device`] holds versions in slots and runs them. One thread owns the
//! device; nothing else calls it.

pub mod record;
pub mod versions;
pub mod sampler;
pub mod onnx;

use std::path::PathBuf;

use policy::{bundle::Bundle, guidance::Guidance};

/// An operation of a device that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// No library.
    #[error(
        "libonnxruntime is not found: set `ORT_DYLIB_PATH` to libonnxruntime.so, or run scripts/setup, which puts it into `.deps/onnxruntime`"
    )]
    NoLibrary,
    /// The library cannot be used.
    #[error("failed to load libonnxruntime `{path}`: {detail}")]
    Library {
        /// Which file.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// The provider is unavailable.
    #[error(
        "provider `{provider}` is unavailable: {detail}; install what is missing or set `rollout.provider = \"cpu\"`"
    )]
    Provider {
        /// Its name in a configuration.
        provider: &'static str,
        /// ONNX Runtime's reason.
        detail: String,
    },
    /// A graph cannot be loaded.
    #[error("failed to load graph `{path}`: {detail}")]
    Load {
        /// Which file.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// A graph with other inputs or outputs.
    #[error("graph `{path}` lacks the {kind} `{name}`, which the graphs of this policy have: export the bundle again")]
    Graph {
        /// Which file.
        path: PathBuf,
        /// `input` or `output`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// Weights of the inputs mode.
    #[error("failed to read weights `{path}`")]
    Weights {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: policy::weights::WeightsError,
    },
    /// A run failed.
    #[error("failed to run the {graph} graph: {detail}")]
    Run {
        /// Which graph.
        graph: &'static str,
        /// ONNX Runtime's reason.
        detail: String,
    },
    /// An output of another size.
    #[error("{graph} graph: output `{name}` has {found} elements, expected {expected}")]
    Output {
        /// Which graph.
        graph: &'static str,
        /// Which output.
        name: String,
        /// What the sizes give.
        expected: usize,
        /// Elements of the output.
        found: usize,
    },
    /// A tensor that is not in the contract of its graph.
    #[error("{graph} graph: no tensor `{name}` in its contract")]
    Contract {
        /// Which graph.
        graph: &'static str,
        /// Which tensor.
        name: String,
    },
    /// A slot that holds no version.
    #[error("slot {0} of the device holds no policy version")]
    Slot(u64),
    /// The device's thread has ended.
    #[error("the engine is shutting down")]
    Closed,
}

/// Place of a policy version on a device; never used twice.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(pub u64);

/// Observations in model units; `B` rows.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefixBatch {
    /// Rows.
    pub rows: usize,
    /// `[B, cameras, 3, size, size]` in `[-1, 1]`.
    pub images: Vec<f32>,
    /// `[B, cameras]`.
    pub image_mask: Vec<bool>,
    /// `[B, prompt_len]`.
    pub prompt: Vec<i64>,
    /// `[B, prompt_len]`.
    pub prompt_mask: Vec<bool>,
    /// `[B, action_dim]`, read by pi0 only.
    pub state: Vec<f32>,
}

/// The way from noise to actions, for `B` rows and `K` denoise steps.
#[derive(Debug, Clone, PartialEq)]
pub struct StepPath {
    /// `x` at `t = 1`, `[B, action_horizon, action_dim]`.
    pub initial: Vec<f32>,
    /// The denoise steps in order, `K` of them.
    pub steps: Vec<PathStep>,
    /// The chunk that each row continues from, `B` of them.
    pub guidance: Vec<Option<Guidance>>,
}

/// One denoise step of all rows: `x_next = c_x * x_t + c_v * v_t + std * z`.
#[derive(Debug, Clone, PartialEq)]
pub struct PathStep {
    /// Flow time.
    pub t: f64,
    /// `[B]`.
    pub c_x: Vec<f32>,
    /// `[B]`.
    pub c_v: Vec<f32>,
    /// `[B]`: standard deviation of the added noise; with a noise head the factor of its own.
    pub std: Vec<f32>,
    /// `[B, action_horizon, action_dim]`.
    pub z: Vec<f32>,
}

/// The result of a denoise step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutput {
    /// `[B, action_horizon, action_dim]`, corrected where a row has guidance.
    pub x_next: Vec<f32>,
    /// `[B, action_horizon, action_dim]`.
    pub mean: Vec<f32>,
    /// Standard deviation of the added noise, `[B, action_horizon, action_dim]`; `None` without a noise head.
    pub step_std: Option<Vec<f32>>,
    /// `[B]`; `None` without a value head.
    pub value: Option<Vec<f32>>,
}

/// The inputs of a version's self-test: an ODE path of one row.
#[derive(Debug, Clone, PartialEq)]
pub struct SelfTestRun {
    /// The observation.
    pub prefix: PrefixBatch,
    /// The path.
    pub path: StepPath,
}

/// Holds policy versions in slots and runs them.
pub trait Device: Send + 'static {
    /// A version that a [`Loader`] has read.
    type Staged: Send + 'static;
    /// What the prefix graph made of a batch; it stays on the device.
    type Prefix;

    /// Puts a version into a slot of its own and returns the slot with the self-test's denoise steps. Devices whose versions can
    /// run on any thread have run the test in [`Loader::stage`], so that nothing waits here.
    ///
    /// # Errors
    /// There is no room, or the self-test does not run.
    fn install(&mut self, staged: Self::Staged, test: &SelfTestRun) -> Result<(Slot, Vec<StepOutput>), DeviceError>;

    /// Encodes a batch of observations.
    ///
    /// # Errors
    /// The run fails or gives another size.
    fn prefix(&mut self, slot: Slot, batch: PrefixBatch) -> Result<Self::Prefix, DeviceError>;

    /// Runs all denoise steps on the batch of `prefix`.
    ///
    /// # Errors
    /// A run fails or gives another size.
    fn denoise(&mut self, slot: Slot, prefix: &Self::Prefix, path: &StepPath) -> Result<Vec<StepOutput>, DeviceError>;

    /// Frees a slot.
    fn free(&mut self, slot: Slot);
}

/// Reads policy versions for a device, on any thread, without touching what serves.
pub trait Loader: Send + Sync + 'static {
    /// The device.
    type Device: Device;

    /// Reads the version in a verified bundle. `test` is run here where that disturbs nothing that serves.
    ///
    /// # Errors
    /// A graph or its weights cannot be used.
    fn stage(&self, bundle: &Bundle, test: &SelfTestRun) -> Result<<Self::Device as Device>::Staged, DeviceError>;
}
