//! One file of a bundle: its name, size and digest.

use std::{fs::File, io::Read, path::Path};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::error::{BundleError, io};
use crate::config::hex;

/// One file of a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundleFile {
    /// File name without a folder.
    pub name: String,
    /// Size in bytes.
    pub bytes: u64,
    /// SHA-256, lower-case hexadecimal.
    pub sha256: String,
}

/// Returns whether a name is allowed in a bundle: 1 to 128 ASCII letters, digits, `.`, `_` and `-`, not beginning with `.`.
pub fn plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 128
        && !name.starts_with('.')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

/// Returns the last component of a path, or an empty name.
pub(super) fn file_name(path: &Path) -> String {
    path.file_name()
        .map(|name| name.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// Incremental size and SHA-256 of a stream of bytes.
#[derive(Default)]
pub(super) struct Describer {
    bytes: u64,
    digest: Sha256,
}

impl Describer {
    pub(super) fn update(&mut self, bytes: &[u8]) {
        self.bytes += bytes.len() as u64;
        self.digest.update(bytes);
    }

    /// Returns the entry of the file at `path` that holds the bytes.
    pub(super) fn finish(self, path: &Path) -> BundleFile {
        BundleFile {
            name: file_name(path),
            bytes: self.bytes,
            sha256: hex(&self.digest.finalize()),
        }
    }
}

/// Computes the size and SHA-256 of a file.
///
/// # Errors
/// The file cannot be read.
pub fn describe_file(path: &Path) -> Result<BundleFile, BundleError> {
    describe(path, &File::open(path).map_err(io("opening", path))?)
}

/// Computes the size and SHA-256 of the open file at `path`.
pub(super) fn describe(path: &Path, mut file: &File) -> Result<BundleFile, BundleError> {
    let mut describer = Describer::default();
    let mut buffer = vec![0u8; 1 << 20];
    loop {
        let n = file.read(&mut buffer).map_err(io("reading", path))?;
        if n == 0 {
            return Ok(describer.finish(path));
        }
        describer.update(buffer.get(..n).unwrap_or_default());
    }
}
