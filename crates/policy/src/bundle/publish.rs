//! Atomic publication of a bundle.

use std::{
    fs::{self, File},
    path::{Path, PathBuf},
};

use super::{
    atomic::{beside, sync_dir, write_synced, write_weights_synced},
    error::{BundleError, io},
    file::BundleFile,
    manifest::{MANIFEST, Manifest},
    read::Bundle,
};
use crate::weights::{Layout, Weights};

/// Source of the bytes of a file in a new bundle.
#[derive(Debug)]
pub enum Source<'a> {
    /// Bytes, written unchanged.
    Bytes(Vec<u8>),
    /// Weights, written tensor by tensor to a file of this layout.
    Weights(Layout, &'a dyn Weights),
    /// A file of another bundle with the same content, hard-linked if the file system supports it, otherwise copied.
    Same(PathBuf, BundleFile),
}

/// Writes a bundle to a folder next to the target, the manifest last, syncs the files, and renames the folder once.
///
/// Replaces `manifest.files` with the entries of the written files.
///
/// # Errors
/// The target exists, a weight is missing, misshapen or not finite, or a file operation fails. A failure before the rename leaves
/// nothing at the target.
pub fn publish(dir: &Path, files: Vec<(String, Source<'_>)>, mut manifest: Manifest) -> Result<Bundle, BundleError> {
    if dir.exists() {
        return Err(BundleError::Exists(dir.to_owned()));
    }
    let (parent, beside) = beside(dir);
    fs::create_dir_all(&parent).map_err(io("creating the folder", &parent))?;
    if beside.exists() {
        fs::remove_dir_all(&beside).map_err(io("removing an earlier attempt", &beside))?;
    }
    let written = fill(&beside, files, &mut manifest).and_then(|()| {
        fs::rename(&beside, dir).map_err(io("renaming to", dir))?;
        sync_dir(&parent)
    });
    if let Err(error) = written {
        if beside.exists() {
            fs::remove_dir_all(&beside).map_err(io("removing a failed attempt", &beside))?;
        }
        return Err(error);
    }
    Ok(Bundle {
        dir: dir.to_owned(),
        manifest,
    })
}

fn fill(beside: &Path, files: Vec<(String, Source<'_>)>, manifest: &mut Manifest) -> Result<(), BundleError> {
    fs::create_dir_all(beside).map_err(io("creating the folder", beside))?;
    manifest.files.clear();
    for (name, source) in files {
        let path = beside.join(&name);
        let entry = match source {
            Source::Bytes(bytes) => write_synced(&path, &bytes)?,
            Source::Weights(layout, weights) => write_weights_synced(&path, &layout, weights)?,
            Source::Same(from, entry) => {
                if fs::hard_link(&from, &path).is_err() {
                    fs::copy(&from, &path).map_err(io("copying to", &path))?;
                    File::open(&path)
                        .and_then(|f| f.sync_all())
                        .map_err(io("syncing", &path))?;
                }
                BundleFile { name, ..entry }
            }
        };
        manifest.files.push(entry);
    }
    manifest.files.sort_by(|a, b| a.name.cmp(&b.name));
    let text = serde_json::to_vec_pretty(manifest).map_err(|e| BundleError::Manifest {
        path: beside.to_owned(),
        detail: e.to_string(),
    })?;
    write_synced(&beside.join(MANIFEST), &text)?;
    sync_dir(beside)
}
