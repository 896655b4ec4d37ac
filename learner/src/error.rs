//! Errors that end a command of the learner.

use std::path::{Path, PathBuf};

use policy::{
    bundle::BundleError,
    config::{ConfigError, Origins},
    contract::ContractError,
    norm::NormError,
    transform::ObservationError,
    weights::WeightsError,
};
use safetensors::Dtype;
use tch::TchError;
use wire::{array::ArrayError, socket::SocketError};

use crate::{
    advantage::AdvantageError, loss::LossError, model::ModelError, optim::OptimError, ranks::RanksError,
    versions::VersionError,
};

/// Error of a learner command.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LearnerError {
    /// Invalid configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// Bundle that cannot be read or written.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Failed export of the graphs.
    #[error(transparent)]
    Export(#[from] export::ExportError),
    /// Weight file that cannot be read.
    #[error("failed to read weights `{path}`")]
    Weights {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: WeightsError,
    },
    /// Failure in the network.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Advantages that cannot be computed.
    #[error(transparent)]
    Advantage(#[from] AdvantageError),
    /// Loss that cannot be computed.
    #[error(transparent)]
    Loss(#[from] LossError),
    /// Failure in the optimizer.
    #[error(transparent)]
    Optim(#[from] OptimError),
    /// Failure of the endpoint where engines connect.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// Failed exchange between ranks.
    #[error(transparent)]
    Ranks(#[from] RanksError),
    /// Failed copy of numbers from the device.
    #[error("failed to read {what} from the device")]
    FromDevice {
        /// Name of the numbers.
        what: &'static str,
        /// Error of libtorch.
        source: TchError,
    },
    /// Rejected trajectory.
    #[error("rejected the trajectory of env {env}, episode {episode}")]
    Trajectory {
        /// Number of the environment.
        env: u32,
        /// Number of the episode.
        episode: u64,
        /// Reason for the rejection.
        source: RecordError,
    },
    /// Saved weights of a reference policy that cannot be restored.
    #[error("failed to restore the reference policy")]
    Reference(#[from] ReferenceError),
    /// Data set that cannot be used.
    #[error("failed to read the data set `{path}`")]
    Dataset {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: DatasetError,
    },
    /// Checkpoint that cannot be resumed from.
    #[error("checkpoint `{path}`: {detail}")]
    Checkpoint {
        /// Folder of the checkpoint.
        path: PathBuf,
        /// Expected and found values, and the remedy.
        detail: String,
    },
    /// Failed file operation.
    #[error("{action} `{path}` failed")]
    Io {
        /// Attempted operation, like `reading the metrics`.
        action: &'static str,
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// Child process that ended.
    #[error("{name} {what}; the end of its log `{log}` follows")]
    Child {
        /// Name of the program.
        name: String,
        /// The event, like `ended with exit status: 1`.
        what: String,
        /// Path of its log.
        log: PathBuf,
        /// Last lines of the log.
        tail: String,
    },
    /// Timeout of a wait for the ring.
    #[error("{waiting_for}: nothing for {seconds} s ({state})")]
    Silence {
        /// The awaited event.
        waiting_for: String,
        /// Seconds without the event.
        seconds: u64,
        /// Last known state of the other side.
        state: String,
    },
    /// Policy version that the engine rejected.
    #[error("the engine refused policy version {version}: {reason}")]
    Refused {
        /// Number of the version.
        version: u64,
        /// The engine's reason.
        reason: String,
    },
    /// Iteration whose episodes were never ordered.
    #[error("failed to collect the episodes of iteration {}: they were not ordered", .iteration + 1)]
    NotOrdered {
        /// Number of the iteration, from 0.
        iteration: u32,
    },
    /// Missing file that a command needs.
    #[error("`{path}` is missing: {remedy}")]
    NoFile {
        /// Path of the file.
        path: PathBuf,
        /// Remedy, like the command that creates the file.
        remedy: &'static str,
    },
    /// Program that is not in the folder of this executable.
    #[error("`{name}` is not in the folder of `{own}`: build the whole workspace (scripts/setup)")]
    NoProgram {
        /// Name of the program.
        name: String,
        /// Path of this executable.
        own: PathBuf,
    },
    /// Executable outside a repository with the Python env workers.
    #[error("the folder crates/envs/python is not above this executable: run the learner inside its repository")]
    NoPython,
    /// Environment parameters that cannot be written for an env worker.
    #[error("failed to write `env.params` for the env worker")]
    Params(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// Endpoints file of an engine without the key `listen`.
    #[error("failed to read the engine's endpoints: `{0}` lacks the key `listen`")]
    Endpoints(PathBuf),
    /// End of the network thread.
    #[error("the network thread has ended, see the log above")]
    NetworkEnded,
    /// Argument that is 0 and must be at least 1.
    #[error("{what} is 0, expected at least 1")]
    Zero {
        /// Name of the argument.
        what: &'static str,
    },
    /// Measurement without an update.
    #[error("none of the {records} drawn records taught anything, so nothing was measured: use more with `--records`")]
    NothingMeasured {
        /// Number of records of the iteration.
        records: usize,
    },
    /// Checkpoint state that cannot be written as JSON.
    #[error("failed to write a checkpoint's state")]
    State(#[source] serde_json::Error),
    /// Configuration, statistics and tokenizer that contradict each other.
    #[error(transparent)]
    Contract(#[from] ContractError),
    /// Run that cannot be reported.
    #[error("run `{path}`: {detail}")]
    Run {
        /// Folder or file of the run.
        path: PathBuf,
        /// Cause and remedy.
        detail: String,
    },
    /// Picture that cannot be drawn.
    #[error("failed to draw `{path}`")]
    Picture {
        /// Path of the file.
        path: PathBuf,
        /// Cause.
        source: Box<dyn std::error::Error + Send + Sync>,
    },
}

impl LearnerError {
    /// Adds the origins of a configuration key to an error about the key.
    #[must_use]
    pub fn locate(self, origins: &Origins) -> Self {
        match self {
            Self::Config(error) => Self::Config(error.locate(origins)),
            other => other,
        }
    }
}

/// Reason for rejecting a data set or a row.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// File that cannot be read.
    #[error("the file cannot be read")]
    Read(#[source] std::io::Error),
    /// Header longer than the file or the format's limit.
    #[error(
        "the header has {found} bytes, expected at most {limit}; it is not a safetensors file, or cut: write it again"
    )]
    HeaderLength {
        /// Header length by the file's first number, in bytes.
        found: u64,
        /// Longest possible header of this file, in bytes.
        limit: u64,
    },
    /// Header that is not valid safetensors JSON, or tensors with gaps or overlaps.
    #[error("the header is invalid")]
    Header(#[source] serde_json::Error),
    /// File length that differs from the header's.
    #[error("the file has {found} bytes, its header expects {expected}; it may be cut: write it again")]
    Length {
        /// Bytes of header and tensors.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// Missing metadata key `meta`.
    #[error("the metadata key `meta` is missing, expected JSON with the list `prompts`")]
    NoMeta,
    /// Metadata without a list of prompts.
    #[error("the metadata key `meta` is invalid, expected JSON with the list `prompts`")]
    Meta(#[source] serde_json::Error),
    /// Missing tensor.
    #[error("tensor `{0}` is missing")]
    NoTensor(&'static str),
    /// Tensor of a wrong type.
    #[error("tensor `{tensor}` has type {found}, expected {expected}")]
    Type {
        /// Name of the tensor.
        tensor: &'static str,
        /// Type in the layout.
        expected: Dtype,
        /// Type in the file.
        found: Dtype,
    },
    /// Tensor of a wrong shape.
    #[error("`{field}` has shape {found:?}, expected {expected}")]
    Shape {
        /// Name of the tensor.
        field: &'static str,
        /// Shape that the policy needs.
        expected: String,
        /// Shape in the data set.
        found: Vec<usize>,
    },
    /// Data set without rows.
    #[error("found 0 rows, expected at least 1")]
    Empty,
    /// Prompt that cannot be tokenized, or has no room for the state.
    #[error(transparent)]
    Prompt(ObservationError),
    /// Row whose prompt is not in the list.
    #[error("`prompt_id` of row {row} is {found}, expected 0 to {prompts} (exclusive)")]
    PromptId {
        /// Number of the row.
        row: usize,
        /// The row's `prompt_id`.
        found: i64,
        /// Length of the list.
        prompts: usize,
    },
    /// Number that is not finite.
    #[error("`{field}` of row {row} holds {value} in column {column}, expected finite numbers")]
    NotFinite {
        /// `state`, `actions` or `keypoints`.
        field: &'static str,
        /// Number of the row.
        row: usize,
        /// Index of the number in the row, over all dimensions.
        column: usize,
        /// NaN or infinity.
        value: f32,
    },
    /// File whose length or modification time changed since it was opened.
    #[error("the file was changed while it was read; leave it alone until the stage ends")]
    Changed,
    /// Row number out of range.
    #[error("row {row} does not exist, the data set has {rows}")]
    NoRow {
        /// Number of the row.
        row: usize,
        /// Number of rows of the data set.
        rows: usize,
    },
    /// Observation that the policy cannot read.
    #[error("row {row} cannot be read by the policy")]
    Observation {
        /// Number of the row.
        row: usize,
        /// Cause.
        source: ObservationError,
    },
    /// Actions that cannot be converted into model units.
    #[error("the actions of row {row} cannot be turned into model units")]
    Actions {
        /// Number of the row.
        row: usize,
        /// Cause.
        source: NormError,
    },
}

/// Reason for rejecting an episode.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// Invalid array.
    #[error(transparent)]
    Array(#[from] ArrayError),
    /// Policy version that is not allowed for a chunk.
    #[error(transparent)]
    Version(#[from] VersionError),
    /// Training chunk without a record.
    #[error("chunk {chunk} of a training episode has no record")]
    Missing {
        /// Number of the chunk.
        chunk: usize,
    },
    /// Wrong number of rewards of a chunk.
    #[error(
        "chunk {chunk} has {found} rewards, expected {expected}, or 1 to {expected} in the last chunk of the episode"
    )]
    Rewards {
        /// Number of the chunk.
        chunk: u32,
        /// Number of rewards found.
        found: usize,
        /// Actions of a full chunk.
        expected: usize,
    },
    /// Field of a wrong length.
    #[error("`{field}` has {found} entries, expected {expected}")]
    Length {
        /// Name of the field.
        field: &'static str,
        /// Number of entries found.
        found: usize,
        /// Number of entries that the policy needs.
        expected: usize,
    },
    /// Denoise steps that the policy version does not draw.
    #[error("`denoise_steps` is {found:?}, expected {count} below {limit}")]
    DenoiseSteps {
        /// Steps found.
        found: Vec<u32>,
        /// Number of stochastic steps of a chunk.
        count: usize,
        /// Exclusive upper bound of a step.
        limit: usize,
    },
    /// Missing log-probability of stochastic steps.
    #[error("`logprob` is missing, expected that of {steps} stochastic denoise steps")]
    NoLogprob {
        /// Number of stochastic steps of the record.
        steps: usize,
    },
    /// Missing value of the last observation.
    #[error(
        "an episode that was {} came without the value of its last observation; the env worker must report that observation, or set \
         `algorithm.bootstrap_type = \"none\"`",
        if *.terminated { "terminated" } else { "cut by its time limit" }
    )]
    NoFinalValue {
        /// True for a terminated episode, false for an episode cut by its time limit.
        terminated: bool,
    },
}

/// Saved weights that do not match the reference policy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// Tensor outside the action expert and the noise head.
    #[error("tensor `{name}` is not of the action expert or the noise head")]
    Unknown {
        /// Name of the tensor.
        name: String,
    },
    /// Missing tensor.
    #[error("tensor `{name}` is missing")]
    Missing {
        /// Name of the tensor.
        name: String,
    },
    /// Tensor of a wrong shape.
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Name of the tensor.
        name: String,
        /// Saved shape.
        found: Vec<i64>,
        /// Shape of the policy's tensor.
        expected: Vec<i64>,
    },
}

/// Result of a learner function.
pub type Result<T, E = LearnerError> = std::result::Result<T, E>;

/// Adds the attempted operation and the file to an IO error.
pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> LearnerError {
    let path = path.to_owned();
    move |source| LearnerError::Io { action, path, source }
}

/// Adds the name of the read numbers to an error of libtorch.
pub(crate) fn from_device(what: &'static str) -> impl FnOnce(TchError) -> LearnerError {
    move |source| LearnerError::FromDevice { what, source }
}
