//! A policy version as a bundle on disk: weights, graphs (linked from the first bundle), manifest with a self-test.

use std::path::{Path, PathBuf};

use export::{
    BundleSpec, GraphSource, NextVersion, WeightSource, manifest_of, next_version, tokenizer_of, write_bundle,
};
use policy::{
    bundle::{Bundle, SelfTest},
    flow::Schedule,
    norm::NormStats,
    plan::RunPlan,
    selftest::SelfTestInput,
};
use tch::Tensor;

use crate::{batch::observation::ObservationBatch, error::Result, model::Pi0};

/// Largest allowed difference between the two runtimes on the self-test, f32 on CPU; about 1e-6 was measured on small policies.
const SELF_TEST_TOLERANCE: f32 = 1e-3;
/// Seed of the self-test inputs.
const SELF_TEST_SEED: u64 = 20_260_101;

/// Writer of the versions of one run.
#[derive(Debug)]
pub struct Publisher {
    dir: PathBuf,
    plan: RunPlan,
    norm_stats: Option<NormStats>,
    /// Bundle whose graphs and frozen weights later bundles link.
    first: Option<Bundle>,
    published: Vec<u64>,
}

/// Number of newest versions that are kept, in addition to the first version.
const KEEP: usize = 3;

impl Publisher {
    /// Returns a publisher into `dir`, with one folder per version.
    pub fn new(dir: &Path, plan: &RunPlan, norm_stats: Option<NormStats>) -> Self {
        Self {
            dir: dir.to_owned(),
            plan: plan.clone(),
            norm_stats,
            first: None,
            published: Vec::new(),
        }
    }

    /// Adopts the first version of a resumed run if the version is complete, and removes all other versions, which will be published
    /// again. Returns whether the first version was adopted.
    ///
    /// # Errors
    /// A folder cannot be read or removed.
    pub fn take_over(&mut self) -> Result<bool> {
        let path = self.path(0);
        let first = Bundle::open(&path).and_then(|bundle| bundle.verify().map(|()| bundle));
        match first {
            Ok(first) => {
                self.first = Some(first);
                self.published = vec![0];
            }
            Err(error) => tracing::warn!("the run's first version cannot be taken over: {error}"),
        }
        let found = self.first.is_some();
        if self.dir.exists() {
            let listing = || crate::error::io("listing the versions", &self.dir);
            for entry in std::fs::read_dir(&self.dir).map_err(listing())? {
                let old = entry.map_err(listing())?.path();
                if !(found && old == path) {
                    std::fs::remove_dir_all(&old).map_err(crate::error::io("removing the old version", &old))?;
                }
            }
        }
        Ok(found)
    }

    /// Returns the folder of a version.
    pub fn path(&self, version: u64) -> PathBuf {
        self.dir.join(format!("v{version:06}"))
    }

    /// Writes a version and removes old versions; the first version and the newest three stay.
    ///
    /// # Errors
    /// A file cannot be written, or the version exists.
    pub fn publish(&mut self, policy: &Pi0, version: u64) -> Result<Bundle> {
        let self_test = Some(self_test(policy, &self.plan)?);
        let target = self.path(version);
        let bundle = if let Some(first) = &self.first {
            next_version(
                first,
                &target,
                NextVersion {
                    policy_version: version,
                    sampling: self.plan.sampling(version),
                    expert: policy.store(),
                    self_test,
                },
            )?
        } else {
            let spec = BundleSpec {
                manifest: manifest_of(&self.plan, version, None, self.norm_stats.clone(), self_test),
                vlm: WeightSource::Weights(policy.store()),
                expert: WeightSource::Weights(policy.store()),
                graphs: GraphSource::Build,
                tokenizer: tokenizer_of(&self.plan)?,
            };
            write_bundle(&target, spec)?
        };
        if self.first.is_none() {
            self.first = Some(bundle.clone());
        }
        self.published.push(version);
        while self.published.len() > KEEP + 1 {
            // index 0 is the first version, which later versions link and the report compares with
            let version = self.published.remove(1);
            let old = self.path(version);
            std::fs::remove_dir_all(&old).map_err(crate::error::io("removing the old version", &old))?;
        }
        Ok(bundle)
    }
}

/// Returns the reference output of this policy: an ODE pass on the drawn inputs.
fn self_test(policy: &Pi0, plan: &RunPlan) -> Result<SelfTest> {
    let dims = policy.dims();
    let drawn = SelfTestInput::draw(dims, SELF_TEST_SEED);
    let batch = ObservationBatch::of(&[drawn.input], dims);
    let (cache, _) = batch.frozen_prefix(policy, 1)?;
    let device = policy.device();
    let noise = Tensor::from_slice(&drawn.noise)
        .view([1, dims.action_horizon as i64, dims.action_dim as i64])
        .to_device(device);
    let sample = policy.sample(
        &cache,
        Some(&batch.state.to_device(device)),
        &noise,
        &Schedule::of(&plan.sampling(0)),
        &[],
    )?;
    let mut actions = vec![0.0f32; drawn.noise.len()];
    let len = actions.len();
    sample.actions.contiguous().copy_data(&mut actions, len);
    Ok(SelfTest {
        seed: SELF_TEST_SEED,
        actions,
        tolerance: SELF_TEST_TOLERANCE,
    })
}
