//! What can end a command of the learner.

use std::path::{Path, PathBuf};

use policy::{
    bundle::BundleError,
    config::{ConfigError, Origins},
    norm::NormError,
    prompt::PromptError,
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

/// An error of the learner.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum LearnerError {
    /// The configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// A bundle.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// Writing the graphs.
    #[error(transparent)]
    Export(#[from] export::ExportError),
    /// A weight file.
    #[error("failed to read weights `{path}`")]
    Weights {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: WeightsError,
    },
    /// The network.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// Advantages.
    #[error(transparent)]
    Advantage(#[from] AdvantageError),
    /// The loss.
    #[error(transparent)]
    Loss(#[from] LossError),
    /// The optimizer.
    #[error(transparent)]
    Optim(#[from] OptimError),
    /// Prompt tokens.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// The endpoint.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// An exchange between ranks.
    #[error(transparent)]
    Ranks(#[from] RanksError),
    /// Numbers could not be copied from the device.
    #[error("failed to read {what} from the device")]
    FromDevice {
        /// Which numbers.
        what: &'static str,
        /// What libtorch said.
        source: TchError,
    },
    /// An episode that cannot be used.
    #[error("rejected the trajectory of env {env}, episode {episode}")]
    Trajectory {
        /// Environment.
        env: u32,
        /// Episode.
        episode: u64,
        /// What is wrong.
        source: RecordError,
    },
    /// The saved weights of a reference policy.
    #[error("failed to restore the reference policy")]
    Reference(#[from] ReferenceError),
    /// A data set.
    #[error("failed to read the data set `{path}`")]
    Dataset {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: DatasetError,
    },
    /// A checkpoint that cannot be resumed from.
    #[error("checkpoint `{path}`: {detail}")]
    Checkpoint {
        /// Which folder.
        path: PathBuf,
        /// Expected and found, and what to do.
        detail: String,
    },
    /// A file operation.
    #[error("{action} `{path}` failed")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A child process.
    #[error("{name} {what}; the end of its log `{log}` follows")]
    Child {
        /// Which program.
        name: String,
        /// What happened.
        what: String,
        /// Its log file.
        log: PathBuf,
        /// The last lines of it.
        tail: String,
    },
    /// No answer from the ring.
    #[error("{waiting_for}: nothing for {seconds} s ({state})")]
    Silence {
        /// What was awaited.
        waiting_for: String,
        /// How long.
        seconds: u64,
        /// What is known of the other side.
        state: String,
    },
    /// A version that the engine refused.
    #[error("the engine refused policy version {version}: {reason}")]
    Refused {
        /// Which version.
        version: u64,
        /// Its reason.
        reason: String,
    },
    /// An iteration whose episodes nobody ordered.
    #[error("failed to collect the episodes of iteration {}: they were not ordered", .iteration + 1)]
    NotOrdered {
        /// Number of the iteration, from 0.
        iteration: u32,
    },
    /// A file that a command needs.
    #[error("`{path}` is missing: {remedy}")]
    NoFile {
        /// Which file.
        path: PathBuf,
        /// How to get it.
        remedy: &'static str,
    },
    /// A program that is not beside this one.
    #[error("`{name}` is not in the folder of `{own}`: build the whole workspace (scripts/setup)")]
    NoProgram {
        /// Which program.
        name: String,
        /// This executable.
        own: PathBuf,
    },
    /// The Python env workers are not in the repository of this executable.
    #[error("the folder crates/envs/python is not above this executable: run the learner inside its repository")]
    NoPython,
    /// Parameters that a worker cannot read.
    #[error("failed to write `env.params` for the env worker")]
    Params(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// An engine's endpoints.
    #[error("failed to read the engine's endpoints: `{0}` lacks the key `listen`")]
    Endpoints(PathBuf),
    /// The network thread.
    #[error("the network thread has ended, see the log above")]
    NetworkEnded,
    /// A command without work.
    #[error("{what} is 0, expected at least 1")]
    Zero {
        /// Which argument.
        what: &'static str,
    },
    /// A measurement of updates that change nothing.
    #[error("none of the {records} drawn records taught anything, so nothing was measured: use more with `--records`")]
    NothingMeasured {
        /// Records of the iteration.
        records: usize,
    },
    /// State that cannot be written as JSON.
    #[error("failed to write a checkpoint's state")]
    State(#[source] serde_json::Error),
    /// Statistics.
    #[error(transparent)]
    Norm(#[from] NormError),
    /// A run that cannot be reported.
    #[error("run `{path}`: {detail}")]
    Run {
        /// Its folder or file.
        path: PathBuf,
        /// What is wrong and what to do.
        detail: String,
    },
    /// A picture cannot be drawn.
    #[error("drawing `{path}`: {detail}")]
    Picture {
        /// Which file.
        path: PathBuf,
        /// Why.
        detail: String,
    },
}

impl LearnerError {
    /// Completes an error of a configuration key by the origins of that key.
    #[must_use]
    pub fn locate(self, origins: &Origins) -> Self {
        match self {
            Self::Config(error) => Self::Config(error.locate(origins)),
            other => other,
        }
    }
}

/// A data set that cannot be read, or a row of it that the policy cannot be trained on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DatasetError {
    /// The file cannot be read.
    #[error("the file cannot be read")]
    Read(#[source] std::io::Error),
    /// The header is longer than the file or the format's limit.
    #[error(
        "the header has {found} bytes, expected at most {limit}; it is not a safetensors file, or cut: write it again"
    )]
    HeaderLength {
        /// Bytes by the file's first number.
        found: u64,
        /// Most that this file can have.
        limit: u64,
    },
    /// The header is not one of the format, or its tensors do not lie one after another.
    #[error("the header is invalid")]
    Header(#[source] serde_json::Error),
    /// The tensors do not fill the file.
    #[error("the file has {found} bytes, its header expects {expected}; it may be cut: write it again")]
    Length {
        /// Bytes of header and tensors.
        expected: u64,
        /// Bytes of the file.
        found: u64,
    },
    /// No prompts.
    #[error("the metadata key `meta` is missing, expected JSON with the list `prompts`")]
    NoMeta,
    /// Metadata without a list of prompts.
    #[error("the metadata key `meta` is invalid, expected JSON with the list `prompts`")]
    Meta(#[source] serde_json::Error),
    /// A tensor is missing.
    #[error("tensor `{0}` is missing")]
    NoTensor(&'static str),
    /// A tensor of another type.
    #[error("tensor `{tensor}` has type {found}, expected {expected}")]
    Type {
        /// Its name.
        tensor: &'static str,
        /// The type of the layout.
        expected: Dtype,
        /// The type in the file.
        found: Dtype,
    },
    /// A tensor of another shape.
    #[error("`{field}` has shape {found:?}, expected {expected}")]
    Shape {
        /// Its name.
        field: &'static str,
        /// What the policy needs.
        expected: String,
        /// The shape in the data set.
        found: Vec<usize>,
    },
    /// No rows.
    #[error("found 0 rows, expected at least 1")]
    Empty,
    /// A prompt that cannot be tokenized.
    #[error(transparent)]
    Prompt(PromptError),
    /// A row whose prompt is not in the list.
    #[error("`prompt_id` of row {row} is {found}, expected 0 to {prompts} (exclusive)")]
    PromptId {
        /// Which row.
        row: usize,
        /// Its number.
        found: i64,
        /// Length of the list.
        prompts: usize,
    },
    /// NaN or infinity.
    #[error("`{field}` of row {row} holds {value} in column {column}, expected finite numbers")]
    NotFinite {
        /// `state`, `actions` or `keypoints`.
        field: &'static str,
        /// Which row.
        row: usize,
        /// Which of the row's numbers, counted over all its dimensions.
        column: usize,
        /// NaN or infinity.
        value: f32,
    },
    /// Another length or time of change than when the file was opened.
    #[error("the file was changed while it was read; leave it alone until the stage ends")]
    Changed,
    /// A row that the data set does not have.
    #[error("row {row} does not exist, the data set has {rows}")]
    NoRow {
        /// Which row.
        row: usize,
        /// Rows of the data set.
        rows: usize,
    },
    /// An observation that the policy cannot read.
    #[error("row {row} cannot be read by the policy")]
    Observation {
        /// Which row.
        row: usize,
        /// Why.
        source: ObservationError,
    },
    /// Actions that cannot be turned into model units.
    #[error("the actions of row {row} cannot be turned into model units")]
    Actions {
        /// Which row.
        row: usize,
        /// Why.
        source: NormError,
    },
}

/// An episode whose records do not fit the plan.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// An array.
    #[error(transparent)]
    Array(#[from] ArrayError),
    /// The policy version of a chunk.
    #[error(transparent)]
    Version(#[from] VersionError),
    /// A training episode has chunks without record.
    #[error("chunk {chunk} of a training episode has no record")]
    Missing {
        /// Which chunk.
        chunk: usize,
    },
    /// A chunk has another number of executed actions.
    #[error(
        "chunk {chunk} has {found} rewards, expected {expected}, or 1 to {expected} in the last chunk of the episode"
    )]
    Rewards {
        /// Which chunk.
        chunk: u32,
        /// Rewards given.
        found: usize,
        /// Actions of a full chunk.
        expected: usize,
    },
    /// A field of another length.
    #[error("`{field}` has {found} entries, expected {expected}")]
    Length {
        /// Which field.
        field: &'static str,
        /// Entries given.
        found: usize,
        /// Entries of the policy.
        expected: usize,
    },
    /// Denoise steps that the policy version does not draw.
    #[error("`denoise_steps` is {found:?}, expected {count} below {limit}")]
    DenoiseSteps {
        /// Steps given.
        found: Vec<u32>,
        /// Stochastic steps of a chunk.
        count: usize,
        /// Steps that can be drawn.
        limit: usize,
    },
    /// Stochastic steps without log-probability.
    #[error("`logprob` is missing, expected that of {steps} stochastic denoise steps")]
    NoLogprob {
        /// Stochastic steps of the record.
        steps: usize,
    },
    /// The value of the last observation is missing.
    #[error(
        "an episode that was {} came without the value of its last observation; the env worker must report that observation, or set \
         `algorithm.bootstrap_type = \"none\"`",
        if *.terminated { "terminated" } else { "cut by its time limit" }
    )]
    NoFinalValue {
        /// How the episode ended.
        terminated: bool,
    },
}

/// Saved weights that are not those of the reference policy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReferenceError {
    /// A tensor too much.
    #[error("tensor `{name}` is not of the action expert or the noise head")]
    Unknown {
        /// Its name.
        name: String,
    },
    /// A tensor too few.
    #[error("tensor `{name}` is missing")]
    Missing {
        /// Its name.
        name: String,
    },
    /// A tensor of another shape.
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Its name.
        name: String,
        /// Shape saved.
        found: Vec<i64>,
        /// Shape of the policy.
        expected: Vec<i64>,
    },
}

/// Result of the learner.
pub type Result<T, E = LearnerError> = std::result::Result<T, E>;

/// Adds what was attempted, on which file, to an IO error.
pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> LearnerError {
    let path = path.to_owned();
    move |source| LearnerError::Io { action, path, source }
}

/// Adds which numbers were read to an error of libtorch.
pub(crate) fn from_device(what: &'static str) -> impl FnOnce(TchError) -> LearnerError {
    move |source| LearnerError::FromDevice { what, source }
}
