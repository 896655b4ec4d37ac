//! Errors of reading and writing a bundle.

use std::path::{Path, PathBuf};

use crate::contract::ContractError;

/// Reason why a bundle cannot be written, or is rejected.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// A file operation failed.
    #[error("{action} `{path}`: {source}")]
    Io {
        /// Attempted operation.
        action: &'static str,
        /// File of the operation.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The target folder exists already.
    #[error("bundle `{0}` exists already and bundles are never changed: choose another folder")]
    Exists(PathBuf),
    /// The manifest does not parse.
    #[error("manifest of bundle `{path}`: {detail}")]
    Manifest {
        /// Folder of the bundle.
        path: PathBuf,
        /// Description of the fault.
        detail: String,
    },
    /// What the policy reads and commands contradicts itself.
    #[error("bundle `{path}` contradicts itself")]
    Contract {
        /// Folder of the bundle.
        path: PathBuf,
        /// First contradiction.
        source: ContractError,
    },
    /// A format version that this program does not read.
    #[error(
        "bundle `{path}` has format version {found}, this program reads {expected}: export it again with a matching `export`"
    )]
    FormatVersion {
        /// Folder of the bundle.
        path: PathBuf,
        /// Version that this program reads.
        expected: u32,
        /// Version in the manifest.
        found: u64,
    },
    /// A file differs from its entry in the manifest.
    #[error("file `{name}` of bundle `{path}`: expected {expected}, found {found}")]
    File {
        /// Folder of the bundle.
        path: PathBuf,
        /// Name of the file.
        name: String,
        /// Size or digest in the manifest.
        expected: String,
        /// Size or digest on disk.
        found: String,
    },
    /// Weights that do not fit the policy.
    #[error("weights `{path}`: {source}")]
    Weights {
        /// Weight file.
        path: PathBuf,
        /// Cause.
        source: crate::weights::WeightsError,
    },
}

/// Returns a function that adds the attempted operation and the file to an IO error.
pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BundleError {
    let path = path.to_owned();
    move |source| BundleError::Io { action, path, source }
}
