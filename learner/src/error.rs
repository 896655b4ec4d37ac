//! What can end a command of the learner.

use std::path::{Path, PathBuf};

use policy::{
    bundle::BundleError,
    config::{ConfigError, Origins},
    prompt::PromptError,
    weights::WeightsError,
};
use wire::{array::ArrayError, socket::SocketError};

use crate::{advantage::AdvantageError, loss::LossError, model::ModelError, optim::OptimError};

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
    #[error("weights `{path}`: {source}")]
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
    /// An array of a trajectory.
    #[error("trajectory of env {env}, episode {episode}: {source}")]
    Trajectory {
        /// Environment.
        env: u32,
        /// Episode.
        episode: u64,
        /// What is wrong.
        source: RecordError,
    },
    /// A record that cannot be used.
    #[error("trajectory of env {env}, episode {episode}: {detail}")]
    Record {
        /// Environment.
        env: u32,
        /// Episode.
        episode: u64,
        /// Expected and found.
        detail: String,
    },
    /// A data set.
    #[error("data set `{path}`: {detail}")]
    Dataset {
        /// Which file.
        path: PathBuf,
        /// Expected and found.
        detail: String,
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
    #[error("{action} `{path}`: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// A child process.
    #[error("{name} {what}; the end of its log `{log}`:\n{tail}")]
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
    /// Something that a command needs is not there.
    #[error("{0}")]
    Missing(String),
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

/// A chunk record that does not fit the plan.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// An array.
    #[error(transparent)]
    Array(#[from] ArrayError),
    /// Another field.
    #[error("`{0}` does not fit the policy: {1}")]
    Field(&'static str, String),
}

/// Result of the learner.
pub type Result<T, E = LearnerError> = std::result::Result<T, E>;

/// Adds what was attempted, on which file, to an IO error.
pub fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> LearnerError {
    let path = path.to_owned();
    move |source| LearnerError::Io { action, path, source }
}
