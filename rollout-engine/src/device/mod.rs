//! Processors that run policy versions, at the level of an action chunk.
//!
//! A [`Loader`] reads a version without disturbing the serving versions. A [`Device`] holds versions in slots and runs these
//! versions. One thread owns the device; other threads do not call the device.

pub mod record;
pub mod versions;
pub mod sampler;
pub mod cuda;
pub mod onnx;
pub mod library;

use std::{path::PathBuf, time::Duration};

use policy::{bundle::Bundle, config::Flavour, guidance::Guidance};

/// Error of a device operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DeviceError {
    /// The library is not found.
    #[error(
        "libonnxruntime is not found: set `ORT_DYLIB_PATH` to libonnxruntime.so, or run scripts/setup, which puts it into `.deps/onnxruntime`"
    )]
    NoLibrary,
    /// The library is not usable.
    #[error("failed to load libonnxruntime `{path}`: {detail}")]
    Library {
        /// Path of the library.
        path: PathBuf,
        /// Cause.
        detail: String,
    },
    /// The provider is unavailable.
    #[error(
        "provider `{provider}` is unavailable: {detail}; install what is missing or set `rollout.provider = \"cpu\"`"
    )]
    Provider {
        /// The configuration's name of the provider.
        provider: &'static str,
        /// ONNX Runtime's reason.
        detail: String,
    },
    /// A graph cannot be loaded.
    #[error("failed to load graph `{path}`: {detail}")]
    Load {
        /// Path of the graph.
        path: PathBuf,
        /// Cause.
        detail: String,
    },
    /// A graph lacks an input or an output.
    #[error("graph `{path}` lacks the {kind} `{name}`, which the graphs of this policy have: export the bundle again")]
    Graph {
        /// Path of the graph.
        path: PathBuf,
        /// `input` or `output`.
        kind: &'static str,
        /// Name of the input or output.
        name: String,
    },
    /// An input or an output of a graph has another type or shape.
    #[error("graph `{path}` has an {kind} of {found}, expected {expected}: export the bundle again")]
    GraphType {
        /// Path of the graph.
        path: PathBuf,
        /// `input` or `output`.
        kind: &'static str,
        /// Name, type and axes in the contract.
        expected: String,
        /// Type and axes in the graph.
        found: String,
    },
    /// Weights of mode `inputs` cannot be read.
    #[error("failed to read weights `{path}`")]
    Weights {
        /// Path of the weights.
        path: PathBuf,
        /// Cause.
        source: policy::weights::WeightsError,
    },
    /// A run failed.
    #[error("failed to run the {graph} graph: {detail}")]
    Run {
        /// `prefix` or `denoise`.
        graph: &'static str,
        /// ONNX Runtime's reason.
        detail: String,
    },
    /// An output has a wrong number of elements.
    #[error("{graph} graph: output `{name}` has {found} elements, expected {expected}")]
    Output {
        /// `prefix` or `denoise`.
        graph: &'static str,
        /// Name of the output.
        name: String,
        /// Elements by the policy's sizes.
        expected: usize,
        /// Elements of the output.
        found: usize,
    },
    /// A tensor is not in the contract of its graph.
    #[error("{graph} graph: no tensor `{name}` in its contract")]
    Contract {
        /// `prefix` or `denoise`.
        graph: &'static str,
        /// Name of the tensor.
        name: String,
    },
    /// The bundle's graphs are of another flavour.
    #[error("provider `{provider}`: {detail}")]
    Flavour {
        /// The configuration's name of the provider.
        provider: &'static str,
        /// The flavour found and expected, or what the policy lacks.
        detail: String,
    },
    /// A call of the CUDA runtime failed.
    #[error("CUDA, {what}: {detail}")]
    Cuda {
        /// The operation.
        what: &'static str,
        /// The library's text.
        detail: String,
    },
    /// The device or the host has not enough memory.
    #[error(
        "no room for {bytes} bytes for {what}: free memory of the device, or export the bundle with a smaller `--batch`"
    )]
    Memory {
        /// Purpose of the memory.
        what: &'static str,
        /// Bytes that were asked for.
        bytes: usize,
    },
    /// All weight slots are in use.
    #[error("all weight slots of the device are in use: versions that were replaced still serve requests")]
    Busy,
    /// A batch has another size than the graphs.
    #[error("a batch of {found} rows, the graphs have {expected}")]
    Rows {
        /// Rows of the graphs.
        expected: usize,
        /// Rows of the batch.
        found: usize,
    },
    /// A denoise path does not belong to the version.
    #[error("a path of {found} denoise steps, the version has {expected} with other flow times")]
    Path {
        /// Steps of the version.
        expected: usize,
        /// Steps of the path.
        found: usize,
    },
    /// A row has no image.
    #[error("row {row} has no image: send at least one camera")]
    NoImage {
        /// Number of the row.
        row: usize,
    },
    /// A prefix graph does not work.
    #[error("the actions with {cameras} present cameras are not finite: export the bundle again")]
    NotFinite {
        /// Cameras that the graph reads.
        cameras: usize,
    },
    /// The device stopped working.
    #[error("the device stopped working after: {first}")]
    Lost {
        /// The error that the device did not survive.
        first: Box<Self>,
        /// The error of every later call.
        source: Box<Self>,
    },
    /// A prompt has a gap.
    #[error("token {token} of the prompt is padding, but a later one is not")]
    Prompt {
        /// First padding token.
        token: usize,
    },
    /// The outputs of a prefix are gone.
    #[error("the outputs of the prefix graph were overwritten by a later batch")]
    Prefix,
    /// A slot holds no version.
    #[error("slot {0} of the device holds no policy version")]
    Slot(u64),
    /// The device's thread has ended.
    #[error("the engine is shutting down")]
    Closed,
}

impl DeviceError {
    /// Returns the error of a bundle with graphs of another flavour than `expected`.
    fn flavour(provider: &'static str, expected: Flavour) -> Self {
        let name = |flavour| match flavour {
            Flavour::Plain => "plain",
            Flavour::Cuda => "cuda",
        };
        let found = match expected {
            Flavour::Plain => Flavour::Cuda,
            Flavour::Cuda => Flavour::Plain,
        };
        Self::Flavour {
            provider,
            detail: format!(
                "the bundle has graphs of flavour `{}`, expected `{}`: export it with `rollout.provider = \"{provider}\"`",
                name(found),
                name(expected)
            ),
        }
    }
}

/// Identifier of a policy version on a device; never reused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Slot(pub u64);

/// Observations in model units; `B` rows.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefixBatch {
    /// Number of rows `B`.
    pub rows: usize,
    /// Images, `[B, cameras, size, size, 3]`.
    pub images: Vec<u8>,
    /// Whether an image is present, `[B, cameras]`.
    pub image_mask: Vec<bool>,
    /// Token ids, `[B, prompt_len]`.
    pub prompt: Vec<i64>,
    /// Whether a token is valid, `[B, prompt_len]`.
    pub prompt_mask: Vec<bool>,
    /// State, `[B, action_dim]`, read by pi0, and by critics that read the state apart.
    pub state: Vec<f32>,
}

/// The denoise path from noise to actions, for `B` rows and `K` denoise steps.
#[derive(Debug, Clone, PartialEq)]
pub struct StepPath {
    /// `x` at `t = 1`, `[B, action_horizon, action_dim]`.
    pub initial: Vec<f32>,
    /// The denoise steps in order, `K` of them.
    pub steps: Vec<PathStep>,
    /// The chunk from which each row continues, `B` entries.
    pub guidance: Vec<Option<Guidance>>,
}

/// One denoise step of all rows: `x_next = c_x * x_t + c_v * v_t + std * z`.
#[derive(Debug, Clone, PartialEq)]
pub struct PathStep {
    /// Flow time.
    pub t: f64,
    /// Coefficient of `x_t`, `[B]`.
    pub c_x: Vec<f32>,
    /// Coefficient of the velocity, `[B]`.
    pub c_v: Vec<f32>,
    /// Standard deviation of the added noise, `[B]`; with a noise head, a factor of the head's standard deviation.
    pub std: Vec<f32>,
    /// Unit noise, `[B, action_horizon, action_dim]`.
    pub z: Vec<f32>,
}

/// The result of a denoise step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutput {
    /// `x` after the step, `[B, action_horizon, action_dim]`, corrected in rows with guidance.
    pub x_next: Vec<f32>,
    /// Mean of `x_next`, `[B, action_horizon, action_dim]`.
    pub mean: Vec<f32>,
    /// Standard deviation of the added noise, `[B, action_horizon, action_dim]`; `None` without a noise head.
    pub step_std: Option<Vec<f32>>,
    /// Values, `[B]`; `None` without a value head.
    pub value: Option<Vec<f32>>,
}

/// The inputs of a version's self-test: an ODE path of one row.
#[derive(Debug, Clone, PartialEq)]
pub struct SelfTestRun {
    /// The observation.
    pub prefix: PrefixBatch,
    /// The denoise path.
    pub path: StepPath,
}

/// Holds policy versions in slots and runs them.
pub trait Device: Send + 'static {
    /// A version that a [`Loader`] has read.
    type Staged: Send + 'static;
    /// Outputs of the prefix graph for a batch; kept on the device.
    type Prefix;

    /// Installs a version in a new slot and returns the slot with the self-test's denoise steps. On devices whose versions run on
    /// any thread, [`Loader::stage`] has already run the test, so that this call does not wait.
    ///
    /// # Errors
    /// The device has no room, or the self-test fails to run.
    fn install(&mut self, staged: Self::Staged, test: &SelfTestRun) -> Result<(Slot, Vec<StepOutput>), DeviceError>;

    /// Encodes a batch of observations.
    ///
    /// # Errors
    /// The run fails, or an output has a wrong size.
    fn prefix(&mut self, slot: Slot, batch: PrefixBatch) -> Result<Self::Prefix, DeviceError>;

    /// Runs all denoise steps on the batch of `prefix`.
    ///
    /// # Errors
    /// A run fails, or an output has a wrong size.
    fn denoise(&mut self, slot: Slot, prefix: &Self::Prefix, path: &StepPath) -> Result<Vec<StepOutput>, DeviceError>;

    /// Returns the durations of the last prefix and of the last denoise steps on the device's clock; `None` for a device that
    /// returns from both when they have ended.
    fn durations(&self) -> Option<(Duration, Duration)> {
        None
    }

    /// Frees a slot.
    fn free(&mut self, slot: Slot);
}

/// Reads policy versions for a device, on any thread, without disturbing the serving versions.
pub trait Loader: Send + Sync + 'static {
    /// The device that runs the versions.
    type Device: Device;

    /// Reads the version in a verified bundle, and runs `test` if the run disturbs no serving version.
    ///
    /// # Errors
    /// A graph or its weights are not usable.
    fn stage(&self, bundle: &Bundle, test: &SelfTestRun) -> Result<<Self::Device as Device>::Staged, DeviceError>;
}
