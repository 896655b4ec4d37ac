//! Policy versions that may have made the chunks of an episode.

use std::ops::RangeInclusive;

/// Chunk of a policy version that its episode does not allow.
#[derive(Debug, thiserror::Error)]
#[error("chunk {chunk} is of version {found}, expected {}", shown(.expected))]
pub struct VersionError {
    /// Number of the chunk in its episode.
    pub chunk: u32,
    /// The version that made the chunk.
    pub found: u64,
    /// The versions that may have made the chunk.
    pub expected: RangeInclusive<u64>,
}

fn shown(versions: &RangeInclusive<u64>) -> String {
    let (oldest, newest) = (versions.start(), versions.end());
    if oldest == newest {
        newest.to_string()
    } else {
        format!("{oldest} to {newest}")
    }
}

/// Rejects chunk `chunk` unless its version `found` is in `expected`.
pub(crate) fn check_version(chunk: u32, found: u64, expected: RangeInclusive<u64>) -> Result<(), VersionError> {
    if expected.contains(&found) {
        Ok(())
    } else {
        Err(VersionError { chunk, found, expected })
    }
}
