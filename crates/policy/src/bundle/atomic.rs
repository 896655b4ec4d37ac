//! Files that appear whole or not at all: written beside, synced, renamed.

use std::{
    fs::{self, File},
    io::Write,
    path::{Path, PathBuf},
};

use super::{BundleError, io};

/// The folder that `path` lies in, and where this process writes it before the rename.
pub(super) fn beside(path: &Path) -> (PathBuf, PathBuf) {
    let parent = path
        .parent()
        .filter(|p| !p.as_os_str().is_empty())
        .unwrap_or(Path::new("."));
    let name = path
        .file_name()
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default();
    let beside = parent.join(format!(".{name}.writing.{}", std::process::id()));
    (parent.to_owned(), beside)
}

/// Writes a file and waits until it is on disk.
pub(super) fn write_synced(path: &Path, bytes: &[u8]) -> Result<(), BundleError> {
    let mut file = File::create(path).map_err(io("creating", path))?;
    file.write_all(bytes).map_err(io("writing", path))?;
    file.sync_all().map_err(io("syncing", path))
}

/// Waits until the names in a folder are on disk.
pub(super) fn sync_dir(path: &Path) -> Result<(), BundleError> {
    File::open(path)
        .and_then(|f| f.sync_all())
        .map_err(io("syncing the folder", path))
}

/// Writes one file atomically: beside it, synced, renamed.
///
/// # Errors
/// A file operation fails; then the old file, if any, is untouched.
pub fn write_atomic(path: &Path, bytes: &[u8]) -> Result<(), BundleError> {
    let (parent, beside) = beside(path);
    fs::create_dir_all(&parent).map_err(io("creating the folder", &parent))?;
    let done = write_synced(&beside, bytes).and_then(|()| fs::rename(&beside, path).map_err(io("renaming to", path)));
    if done.is_err() {
        // the error at hand says more than one of the tidying-up would
        drop(fs::remove_file(&beside));
    }
    done?;
    sync_dir(&parent)
}
