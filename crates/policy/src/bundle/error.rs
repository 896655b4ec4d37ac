//! What can be wrong with a bundle.

use std::path::{Path, PathBuf};

/// A bundle that cannot be written or must not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BundleError {
    /// A file operation failed.
    #[error("{action} `{path}`: {source}")]
    Io {
        /// What was attempted.
        action: &'static str,
        /// On which file.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// The target is there already.
    #[error("bundle `{0}` exists already and bundles are never changed: choose another folder")]
    Exists(PathBuf),
    /// The manifest does not parse.
    #[error("manifest of bundle `{path}`: {detail}")]
    Manifest {
        /// Which bundle.
        path: PathBuf,
        /// What is wrong.
        detail: String,
    },
    /// Another format version.
    #[error(
        "bundle `{path}` has format version {found}, this program reads {expected}: export it again with a matching `export`"
    )]
    FormatVersion {
        /// Which bundle.
        path: PathBuf,
        /// What this program reads.
        expected: u32,
        /// What the manifest says.
        found: u64,
    },
    /// A file differs from its entry.
    #[error("file `{name}` of bundle `{path}`: expected {expected}, found {found}")]
    File {
        /// Which bundle.
        path: PathBuf,
        /// Which file.
        name: String,
        /// What the manifest says.
        expected: String,
        /// What is there.
        found: String,
    },
    /// Weights that do not fit.
    #[error("weights `{path}`: {source}")]
    Weights {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: crate::weights::WeightsError,
    },
}

/// Adds what was attempted, on which file, to an IO error.
pub(crate) fn io(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> BundleError {
    let path = path.to_owned();
    move |source| BundleError::Io { action, path, source }
}
