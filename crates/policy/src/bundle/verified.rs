//! Files that were verified already and need not be read again.

use std::{
    collections::BTreeMap,
    fs::{File, Metadata},
    os::unix::fs::MetadataExt,
};

use crate::params::ParamSpec;

/// Files of a verified bundle, with identity, digest and the weights found in each file.
///
/// Two files are the same if device, inode, size and modification time are equal. A hard link is the same file, a copy is not.
/// The comparison requires that bundles are never changed in place.
#[derive(Debug, Default)]
pub struct VerifiedFiles(BTreeMap<Identity, Verified>);

impl VerifiedFiles {
    pub(super) fn insert(&mut self, identity: Identity, file: Verified) {
        self.0.insert(identity, file);
    }

    pub(super) fn get(&self, identity: &Identity) -> Option<&Verified> {
        self.0.get(identity)
    }
}

/// Identity of a file, which changes with each write to the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    pub(super) bytes: u64,
    /// Modification time in seconds and nanoseconds.
    modified: (i64, i64),
}

impl Identity {
    pub(super) fn of(file: &Metadata) -> Self {
        Self {
            device: file.dev(),
            inode: file.ino(),
            bytes: file.len(),
            modified: (file.mtime(), file.mtime_nsec()),
        }
    }
}

/// Result of the verification of a file.
#[derive(Debug)]
pub(super) struct Verified {
    pub(super) sha256: String,
    /// Weights found in the file, all finite; empty: the file holds no weights.
    pub(super) weights: Vec<ParamSpec>,
    /// Open handle, which keeps the inode from being reused even if the file is removed.
    pub(super) _open: File,
}
