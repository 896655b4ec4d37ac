//! The policy bundle: a directory that holds one policy version, never changed after its rename.
//!
//! `manifest.json` is written last and names every other file with its size and SHA-256. A writer fills a folder next to the
//! target, syncs, and renames; a reader rejects every mismatch.

mod error;
mod file;
mod manifest;
mod verified;
mod read;
mod atomic;
mod publish;

pub use self::{
    atomic::{write_atomic, write_weights},
    error::BundleError,
    file::{BundleFile, describe_file, plain_name},
    manifest::{BUNDLE_VERSION, EXPERT_WEIGHTS, FLOW_TIME, MANIFEST, Manifest, SelfTest, TOKENIZER_MODEL, VLM_WEIGHTS},
    publish::{Source, publish},
    read::Bundle,
    verified::VerifiedFiles,
};
