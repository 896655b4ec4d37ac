//! One file of a bundle: its name, size and digest.

use std::{fs::File, io::Read, path::Path};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::{BundleError, io};
use crate::config::hex;

/// One file of a bundle.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct BundleFile {
    /// File name, no folder in it.
    pub name: String,
    /// Size.
    pub bytes: u64,
    /// SHA-256, lower-case hexadecimal.
    pub sha256: String,
}

/// Whether a name can be a bundle's file: letters, digits, `.`, `_` and `-`, at most 128, not hidden and in no folder.
pub fn plain_name(name: &str) -> bool {
    !name.is_empty()
        && name.len() <= 128
        && !name.starts_with('.')
        && name.chars().all(|c| c.is_ascii_alphanumeric() || "._-".contains(c))
}

/// Size and SHA-256 of a file.
///
/// # Errors
/// The file cannot be read.
pub fn describe_file(path: &Path) -> Result<BundleFile, BundleError> {
    let mut file = File::open(path).map_err(io("opening", path))?;
    let mut digest = Sha256::new();
    let mut buffer = vec![0u8; 1 << 20];
    let mut bytes = 0u64;
    loop {
        let n = file.read(&mut buffer).map_err(io("reading", path))?;
        if n == 0 {
            break;
        }
        bytes += n as u64;
        digest.update(buffer.get(..n).unwrap_or_default());
    }
    let name = path
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    Ok(BundleFile {
        name,
        bytes,
        sha256: hex(&digest.finalize()),
    })
}
