//! Atomic file writes: write next to the target, sync, rename.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use super::{
    error::{BundleError, io},
    file::{BundleFile, Describer, file_name},
};
use crate::{
    params::ParamSpec,
    weights::{Layout, Weights, WriteError},
};

/// Returns the folder of `path`, and the temporary path that this process writes before the rename.
pub(super) fn beside(path: &Path) -> (PathBuf, PathBuf) {
    let parent = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let beside = parent.join(format!(".{}.writing.{}", file_name(path), std::process::id()));
    (parent.to_owned(), beside)
}

/// A file whose size and digest are computed during the write.
struct Described {
    file: File,
    describer: Describer,
}

impl Write for Described {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let written = self.file.write(bytes)?;
        self.describer.update(bytes.get(..written).unwrap_or_default());
        Ok(written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

impl Described {
    fn create(path: &Path) -> Result<Self, BundleError> {
        Ok(Self {
            file: File::create(path).map_err(io("creating", path))?,
            describer: Describer::default(),
        })
    }

    /// Syncs the file to disk and returns its description.
    fn finish(self, path: &Path) -> Result<BundleFile, BundleError> {
        self.file.sync_all().map_err(io("syncing", path))?;
        Ok(self.describer.finish(path))
    }
}

/// Writes a file and syncs it to disk.
pub(super) fn write_synced(path: &Path, bytes: &[u8]) -> Result<BundleFile, BundleError> {
    let mut file = Described::create(path)?;
    file.write_all(bytes).map_err(io("writing", path))?;
    file.finish(path)
}

/// Writes a weight file tensor by tensor and syncs it to disk.
pub(super) fn write_weights_synced(
    path: &Path,
    layout: &Layout,
    weights: &dyn Weights,
) -> Result<BundleFile, BundleError> {
    let mut file = Described::create(path)?;
    layout.write(weights, &mut file).map_err(|error| match error {
        WriteError::Io(error) => io("writing", path)(error),
        WriteError::Weights(source) => BundleError::Weights {
            path: path.to_owned(),
            source,
        },
    })?;
    file.finish(path)
}

/// Syncs the entries of a folder to disk.
pub(super) fn sync_dir(path: &Path) -> Result<(), BundleError> {
    File::open(path)
        .and_then(|f| f.sync_all())
        .map_err(io("syncing the folder", path))
}

/// Writes one file atomically: to a temporary file in the same folder, which is synced and renamed.
///
/// # Errors
/// A file operation fails. A failure before the rename leaves a previous file unchanged.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), BundleError> {
    replace(path, |beside| write_synced(beside, bytes)).map(drop)
}

/// Writes a safetensors file with exactly the tensors `specs` atomically, one tensor at a time, and returns its description.
///
/// # Errors
/// A tensor is missing, misshapen or not finite, or a file operation fails. A failure before the rename leaves a previous file
/// unchanged.
pub fn write_weights<'a>(
    path: &Path,
    specs: impl IntoIterator<Item = &'a ParamSpec>,
    weights: &dyn Weights,
) -> Result<BundleFile, BundleError> {
    let layout = Layout::of(specs).map_err(|source| BundleError::Weights {
        path: path.to_owned(),
        source,
    })?;
    replace(path, |beside| write_weights_synced(beside, &layout, weights))
}

/// Calls `write` with a temporary path next to `path` and renames the result to `path`.
fn replace(
    path: &Path,
    write: impl FnOnce(&Path) -> Result<BundleFile, BundleError>,
) -> Result<BundleFile, BundleError> {
    let (parent, beside) = beside(path);
    fs::create_dir_all(&parent).map_err(io("creating the folder", &parent))?;
    let done = write(&beside).and_then(|written| {
        fs::rename(&beside, path).map_err(io("renaming to", path))?;
        Ok(written)
    });
    if done.is_err() {
        // the original error is more useful than an error of the cleanup
        drop(fs::remove_file(&beside));
    }
    let written = done?;
    sync_dir(&parent)?;
    Ok(BundleFile {
        name: file_name(path),
        ..written
    })
}
