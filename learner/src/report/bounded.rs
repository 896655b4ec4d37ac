//! Bounded reads of the files of a run, because a folder may contain arbitrary files.

use std::{
    fs::File,
    io::{ErrorKind, Read},
    path::Path,
};

use crate::error::{LearnerError, Result, io};

/// Reads a file of at most `limit` bytes; `None` if the file does not exist.
pub(super) fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other.map_err(io("opening", path))?,
    };
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(io("reading", path))?;
    if bytes.len() as u64 > limit {
        return Err(LearnerError::Run {
            path: path.to_owned(),
            detail: format!("it has more than {limit} bytes, so it is not a file of a run"),
        });
    }
    Ok(Some(bytes))
}
