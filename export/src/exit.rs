//! Exit-code classes of the errors of the program `export`.

use std::{error::Error, path::PathBuf, process::ExitStatus};

use process::exit::Class;

use crate::{bundle::ExportError, check::CheckError};

/// A command that cannot be executed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CommandError {
    /// The checkpoint lacks the configured value head.
    #[error(
        "checkpoint `{0}` holds no value head, but `actor.model.value_head` asks for one: pass a checkpoint of RL, or \
         `--without-value-head` for evaluation only"
    )]
    NoValueHead(PathBuf),
    /// The engine for the golden run is missing.
    #[error(
        "{checked}: good so far, but the golden run was not done: `rollout-engine` is not beside `export` in `{folder}` \
         (build it, or pass `--no-run`)"
    )]
    NoEngine {
        /// Summary of the passed checks.
        checked: String,
        /// Folder in which the engine is expected.
        folder: PathBuf,
    },
    /// The golden run failed.
    #[error("{checked}: the golden run failed ({status}): {said}")]
    GoldenRun {
        /// Summary of the passed checks.
        checked: String,
        /// Exit status of the engine.
        status: ExitStatus,
        /// The last line that the engine wrote.
        said: String,
    },
}

/// Returns the class of one error; `None` where the type of the error determines no class.
pub fn class(error: &(dyn Error + 'static)) -> Option<Class> {
    if error.is::<CheckError>() {
        return Some(Class::Data);
    }
    let command = error.downcast_ref().map(|error| match error {
        CommandError::NoValueHead(_) => Class::Data,
        CommandError::NoEngine { .. } => Class::Other,
        CommandError::GoldenRun { status, .. } => Class::of_code(status.code()),
    });
    command.or_else(|| error.downcast_ref().map(of_export))
}

fn of_export(error: &ExportError) -> Class {
    match error {
        ExportError::Dims(_) | ExportError::Tokenizer(_) | ExportError::Cuda(_) | ExportError::CudaWeights => {
            Class::Usage
        }
        ExportError::Bundle(error) => process::exit::class(error, |_| None),
        ExportError::Graph(_) => Class::Other,
        ExportError::Weights { .. }
        | ExportError::Layout { .. }
        | ExportError::Reuse { .. }
        | ExportError::Contract(_)
        | ExportError::Prompt(_)
        | ExportError::Vocabulary { .. } => Class::Data,
    }
}
