//! Files that were verified, so that the same files need not be read again.

use std::{
    collections::BTreeMap,
    fs::{File, Metadata},
    os::unix::fs::MetadataExt,
};

use crate::params::ParamSpec;

/// Files of a verified bundle: which files they are, their digests, and the weights that were found in them.
///
/// A file is the same when device, inode, size and time of the last change are: a hard link is, a copy is not. This rests on
/// bundles never being changed in place.
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

/// Which file it is, and that it was not written to since.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Identity {
    device: u64,
    inode: u64,
    pub(super) bytes: u64,
    /// Seconds and nanoseconds.
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

/// What was verified of a file.
#[derive(Debug)]
pub(super) struct Verified {
    pub(super) sha256: String,
    /// Weights that were found, each finite; empty: it holds none.
    pub(super) weights: Vec<ParamSpec>,
    /// No other file gets the inode for as long as this one is open, removed or not.
    pub(super) _open: File,
}
