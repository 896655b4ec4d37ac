//! Reading a bundle: check of the manifest, verification of the files.

use std::{
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use super::{
    error::{BundleError, io},
    file::{BundleFile, describe, plain_name},
    manifest::{BUNDLE_VERSION, EXPERT_WEIGHTS, FLOW_TIME, MANIFEST, Manifest, VLM_WEIGHTS},
    verified::{Identity, Verified, VerifiedFiles},
};
use crate::{
    params::{ParamSpec, Part},
    weights::WeightFile,
};

/// Most bytes of a manifest that are read.
const MAX_MANIFEST_BYTES: u64 = 4 << 20;

/// Most rows of graphs with a fixed batch size.
const MAX_BATCH: usize = 4096;
/// Most bytes of one batch of observations and of the noise and actions of all its denoise steps.
const MAX_BATCH_BYTES: usize = 4 << 30;

/// Returns whether a batch of the graphs has a reasonable size: a self-test allocates it.
fn batch_fits(manifest: &Manifest) -> bool {
    let (dims, steps) = (&manifest.dims, manifest.sampling.num_steps);
    let batch = manifest.batch.unwrap_or(1);
    let product = |factors: &[usize]| factors.iter().try_fold(1usize, |all, factor| all.checked_mul(*factor));
    let side = dims.vision.image_size;
    let parts = [
        // channels of f32
        product(&[dims.cameras, side, side, 3, size_of::<f32>()]),
        product(&[dims.prompt_len, size_of::<i64>()]),
        product(&[steps + 1, dims.action_horizon, dims.action_dim, size_of::<f32>()]),
    ];
    let row = parts.into_iter().try_fold(0usize, |sum, part| sum.checked_add(part?));
    let all = row.and_then(|row| row.checked_mul(batch));
    batch <= MAX_BATCH && all.is_some_and(|bytes| bytes <= MAX_BATCH_BYTES)
}

/// A bundle on disk whose manifest has been read and checked.
#[derive(Debug, Clone)]
pub struct Bundle {
    pub(super) dir: PathBuf,
    /// Checked manifest.
    pub manifest: Manifest,
}

impl Bundle {
    /// Reads and checks the manifest; only [`Bundle::verify`] reads the other files.
    ///
    /// # Errors
    /// A missing manifest, another format version, unknown or missing keys, or sizes that do not fit, with the values expected
    /// and found.
    pub fn open(dir: &Path) -> Result<Self, BundleError> {
        let path = dir.join(MANIFEST);
        let mut text = String::new();
        let file = File::open(&path).map_err(io("opening the manifest", &path))?;
        file.take(MAX_MANIFEST_BYTES)
            .read_to_string(&mut text)
            .map_err(io("reading the manifest", &path))?;
        let bad = |detail: String| BundleError::Manifest {
            path: dir.to_owned(),
            detail,
        };
        let raw: serde_json::Value = serde_json::from_str(&text).map_err(|e| bad(format!("not JSON: {e}")))?;
        let found = raw
            .get("format_version")
            .and_then(serde_json::Value::as_u64)
            .ok_or_else(|| bad("`format_version` is missing".to_owned()))?;
        if found != u64::from(BUNDLE_VERSION) {
            return Err(BundleError::FormatVersion {
                path: dir.to_owned(),
                expected: BUNDLE_VERSION,
                found,
            });
        }
        let manifest: Manifest = serde_json::from_value(raw).map_err(|e| bad(e.to_string()))?;
        manifest.dims.check().map_err(|e| bad(e.to_string()))?;
        if manifest.flow_time != FLOW_TIME {
            return Err(bad(format!(
                "`flow_time` is `{}`, expected `{FLOW_TIME}`",
                manifest.flow_time
            )));
        }
        if manifest.action_chunk == 0
            || manifest.action_chunk > manifest.dims.action_horizon
            || manifest.env_action_dim == 0
            || manifest.env_action_dim > manifest.dims.action_dim
            || manifest.sampling.num_steps == 0
            || manifest.sampling.num_steps > 1000
            || manifest.cameras.len() != manifest.dims.cameras
        {
            return Err(bad(
                "`action_chunk`, `env_action_dim`, `num_steps` or `cameras` do not fit the sizes".to_owned(),
            ));
        }
        if manifest.batch == Some(0) || !batch_fits(&manifest) {
            return Err(bad(format!(
                "`batch` is {}, expected 1 to {MAX_BATCH} rows with at most {MAX_BATCH_BYTES} bytes of observations and actions",
                manifest.batch.unwrap_or(1)
            )));
        }
        let contradicts = |source| BundleError::Contract {
            path: dir.to_owned(),
            source,
        };
        manifest.contract().check(None).map_err(contradicts)?;
        let graphs = manifest.graph_files().map_err(|e| bad(e.to_string()))?;
        for required in graphs.iter().map(String::as_str).chain([VLM_WEIGHTS, EXPERT_WEIGHTS]) {
            if manifest.file(required).is_none() {
                return Err(bad(format!("`files` lacks `{required}`")));
            }
        }
        let named = |f: &&BundleFile| !plain_name(&f.name) || f.name == MANIFEST;
        if let Some(entry) = manifest.files.iter().find(named) {
            return Err(bad(format!(
                "`files` names `{}`, expected a plain file name",
                entry.name
            )));
        }
        Ok(Self {
            dir: dir.to_owned(),
            manifest,
        })
    }

    /// Returns the bundle's folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// Returns the path of one of the bundle's files.
    pub fn path(&self, name: &str) -> PathBuf {
        self.dir.join(name)
    }

    /// Checks that the folder holds exactly the files of the manifest, with their sizes and SHA-256.
    ///
    /// Checks in addition name, shape, type and finite values of every weight.
    ///
    /// # Errors
    /// Names the first file or weight that differs, with both values.
    pub fn verify(&self) -> Result<(), BundleError> {
        self.verify_with(&VerifiedFiles::default()).map(drop)
    }

    /// Checks the bundle as [`Bundle::verify`] does, without reading files that `known` holds with the digest in the manifest.
    ///
    /// Such files are, for instance, the frozen weights that this bundle links from the previous version. Returns the files of
    /// this bundle, for the verification of the next bundle.
    ///
    /// # Errors
    /// See [`Bundle::verify`].
    pub fn verify_with(&self, known: &VerifiedFiles) -> Result<VerifiedFiles, BundleError> {
        let entries = fs::read_dir(&self.dir).map_err(io("listing the bundle", &self.dir))?;
        for entry in entries {
            let entry = entry.map_err(io("listing the bundle", &self.dir))?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name != MANIFEST && self.manifest.file(&name).is_none() {
                return Err(self.file_error(&name, "no such file", "a file that the manifest does not name"));
            }
        }
        let (vlm, expert): (Vec<_>, Vec<_>) = self.manifest.params().into_iter().partition(|p| p.part == Part::Vlm);
        let mut files = VerifiedFiles::default();
        for entry in &self.manifest.files {
            let weights: &[ParamSpec] = match entry.name.as_str() {
                VLM_WEIGHTS => &vlm,
                EXPERT_WEIGHTS => &expert,
                _ => &[],
            };
            let (identity, verified) = self.verify_file(entry, weights, known)?;
            files.insert(identity, verified);
        }
        Ok(files)
    }

    /// Checks a file and, if `weights` is not empty, the weights in the file.
    fn verify_file(
        &self,
        entry: &BundleFile,
        weights: &[ParamSpec],
        known: &VerifiedFiles,
    ) -> Result<(Identity, Verified), BundleError> {
        let path = self.path(&entry.name);
        // one handle, so that the hashed bytes are the parsed bytes; a later write to the file changes its identity
        let file = File::open(&path).map_err(io("opening", &path))?;
        let identity = Identity::of(&file.metadata().map_err(io("opening", &path))?);
        if identity.bytes != entry.bytes {
            return Err(self.file_error(
                &entry.name,
                &format!("{} bytes", entry.bytes),
                &format!("{} bytes", identity.bytes),
            ));
        }
        let known = known.get(&identity).filter(|known| known.sha256 == entry.sha256);
        if known.is_none() {
            let found = describe(&path, &file)?;
            if found.sha256 != entry.sha256 {
                return Err(self.file_error(&entry.name, &format!("sha256 {}", entry.sha256), &found.sha256));
            }
        }
        if !weights.is_empty() && known.is_none_or(|known| known.weights != weights) {
            WeightFile::map(&file)
                .and_then(|mapped| mapped.check(&weights.iter().collect::<Vec<_>>()))
                .map_err(|source| BundleError::Weights { path, source })?;
        }
        let verified = Verified {
            sha256: entry.sha256.clone(),
            weights: weights.to_vec(),
            _open: file,
        };
        Ok((identity, verified))
    }

    fn file_error(&self, name: &str, expected: &str, found: &str) -> BundleError {
        BundleError::File {
            path: self.dir.clone(),
            name: name.to_owned(),
            expected: expected.to_owned(),
            found: found.to_owned(),
        }
    }
}
