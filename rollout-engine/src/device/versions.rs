//! Policy versions: loaded in the background, checked by the self-test, swapped between batches.

use std::{
    collections::BTreeMap,
    fmt,
    path::Path,
    sync::{Arc, PoisonError, RwLock, Weak},
};

use policy::{
    bundle::{Bundle, BundleError, MANIFEST, Manifest, TOKENIZER_MODEL, VerifiedFiles, describe_file},
    config::Precision,
    flow::Sampling,
    prompt::PromptError,
    transform::Transform,
};

use super::{
    Device, DeviceError, Loader, SelfTestRun, Slot, StepOutput,
    sampler::{SampleError, Sampler},
};

/// Reason for rejecting a bundle.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// The bundle is invalid.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// The device rejects the bundle.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The tokenizer is not readable.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// The inputs of the self-test cannot be assembled.
    #[error("self-test: {0}")]
    Sample(#[from] SampleError),
    /// The self-test's actions differ from the publisher's.
    #[error("self-test: action element {index} is {found}, the publisher has {expected}, tolerance {tolerance}")]
    SelfTest {
        /// Index of the element in `[action_horizon, action_dim]`.
        index: usize,
        /// The publisher's action.
        expected: f32,
        /// The engine's action.
        found: f32,
        /// Maximum allowed difference.
        tolerance: f32,
    },
    /// The self-test's actions are not finite.
    #[error("self-test: action element {index} is {found}")]
    NotFinite {
        /// Index of the element in `[action_horizon, action_dim]`.
        index: usize,
        /// NaN or infinity.
        found: f32,
    },
    /// The reference has a wrong number of actions.
    #[error("self-test: the manifest has {found} reference actions, expected {expected}")]
    Reference {
        /// `action_horizon * action_dim`.
        expected: usize,
        /// Reference actions in the manifest.
        found: usize,
    },
    /// The bundle has another policy than the live version, to which workers are registered.
    #[error("`{field}` differs from the live version's: restart the engine for another policy")]
    Other {
        /// The differing key of the manifest.
        field: &'static str,
    },
}

/// Function that frees a slot of the device.
pub type Free = Arc<dyn Fn(Slot) + Send + Sync>;

/// Function that loads the bundle in a folder onto the device; the second argument is the live version, to be replaced.
pub type LoadPolicy = Arc<dyn Fn(&Path, Option<&Policy>) -> Result<Policy, PolicyError> + Send + Sync>;

/// A version's slot, freed when the last reference to the version is dropped.
struct Held {
    slot: Slot,
    free: Free,
}

impl Drop for Held {
    fn drop(&mut self) {
        (self.free)(self.slot);
    }
}

/// A policy version that is ready to serve.
pub struct Policy {
    sampler: Sampler,
    /// SHA-256 of every file by name, including the manifest.
    pub digests: BTreeMap<String, String>,
    /// Conversion between the robot's units and the model's.
    pub transform: Arc<Transform>,
    /// Largest difference to the publisher's reference actions; `None` when the manifest has no reference.
    pub self_test_difference: Option<f32>,
    /// Verified files, which the next version need not verify again.
    verified: VerifiedFiles,
    held: Held,
}

impl fmt::Debug for Policy {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Policy")
            .field("version", &self.version())
            .field("slot", &self.slot())
            .finish_non_exhaustive()
    }
}

/// Seed of the self-test's inputs without a reference in the manifest; the self-test then checks only that actions are finite.
const SELF_TEST_SEED: u64 = 0;

/// Largest difference of an action in bf16 to the publisher's in f32, as a part of the largest action. bf16 rounds to 2^-9; over the
/// layers and steps of a chunk that grows to about 1e-2, and a wrong tensor gives differences near 1.
const BF16_TOLERANCE: f32 = 0.05;

impl Policy {
    /// Opens, verifies, loads and tests the bundle in `dir`. `live` is the version to be replaced, which must have the same policy.
    /// `install` calls [`Device::install`] on the thread that owns the device.
    ///
    /// # Errors
    /// The first failed check.
    pub fn load<L: Loader>(
        loader: &L,
        dir: &Path,
        live: Option<&Self>,
        install: impl FnOnce(<L::Device as Device>::Staged, SelfTestRun) -> Result<(Slot, Vec<StepOutput>), DeviceError>,
        free: Free,
    ) -> Result<Self, PolicyError> {
        let bundle = Bundle::open(dir)?;
        if let Some(live) = live {
            same_policy(live.manifest(), &bundle.manifest)?;
        }
        let verified = match live {
            Some(live) => bundle.verify_with(&live.verified)?,
            None => bundle.verify_with(&VerifiedFiles::default())?,
        };
        let manifest = bundle.manifest.clone();
        let mut digests: BTreeMap<String, String> = manifest
            .files
            .iter()
            .map(|f| (f.name.clone(), f.sha256.clone()))
            .collect();
        digests.insert(MANIFEST.to_owned(), describe_file(&bundle.path(MANIFEST))?.sha256);
        let transform = match live {
            Some(live) => Arc::clone(&live.transform),
            None => Arc::new(Transform::of_bundle(&manifest, dir)?),
        };
        let sampler = Sampler::new(manifest);
        let reference = bundle.manifest.self_test.as_ref();
        let test = sampler.self_test(reference.map_or(SELF_TEST_SEED, |r| r.seed))?;
        let staged = loader.stage(&bundle, &test)?;
        let (slot, steps) = install(staged, test)?;
        let held = Held { slot, free };
        Ok(Self {
            self_test_difference: check_self_test(&bundle.manifest, &steps)?,
            sampler,
            digests,
            transform,
            verified,
            held,
        })
    }

    /// Returns the sampler.
    pub fn sampler(&self) -> &Sampler {
        &self.sampler
    }

    /// Returns the manifest.
    pub fn manifest(&self) -> &Manifest {
        self.sampler.manifest()
    }

    /// Returns the policy version: the number of published updates.
    pub fn version(&self) -> u64 {
        self.manifest().policy_version
    }

    /// Returns the slot on the device.
    pub fn slot(&self) -> Slot {
        self.held.slot
    }
}

/// Checks that the actions of a self-test are finite and within the tolerance of the publisher's, in every row of the batch: all rows
/// have the same inputs. Returns the largest difference.
fn check_self_test(manifest: &Manifest, steps: &[StepOutput]) -> Result<Option<f32>, PolicyError> {
    let elements = manifest.dims.action_horizon * manifest.dims.action_dim;
    let last = steps.last().map(|step| step.x_next.as_slice()).unwrap_or_default();
    if let Some((index, found)) = last.iter().enumerate().find(|(_, v)| !v.is_finite()) {
        return Err(PolicyError::NotFinite {
            index: index % elements,
            found: *found,
        });
    }
    let Some(reference) = &manifest.self_test else {
        return Ok(None);
    };
    if reference.actions.len() != elements {
        return Err(PolicyError::Reference {
            expected: elements,
            found: reference.actions.len(),
        });
    }
    let magnitude = reference.actions.iter().fold(0.0f32, |largest, a| largest.max(a.abs()));
    let tolerance = match manifest.precision {
        Precision::F32 => reference.tolerance,
        Precision::Bf16 => reference.tolerance.max(BF16_TOLERANCE * magnitude),
    };
    let mut largest = 0.0f32;
    let rows = last.chunks(elements);
    let pairs = rows.flat_map(|row| row.iter().zip(&reference.actions).enumerate());
    for (index, (found, expected)) in pairs {
        let difference = (found - expected).abs();
        // the comparison also rejects a NaN in the manifest
        if difference.is_nan() || difference > tolerance {
            return Err(PolicyError::SelfTest {
                index,
                expected: *expected,
                found: *found,
                tolerance,
            });
        }
        largest = largest.max(difference);
    }
    Ok(Some(largest))
}

/// Checks that a new version has the same observations and actions as the live version. Only the weights and the noise level may
/// differ.
fn same_policy(live: &Manifest, new: &Manifest) -> Result<(), PolicyError> {
    let sampling = Sampling {
        noise_level: new.sampling.noise_level,
        ..live.sampling.clone()
    };
    let tokenizer_model = |manifest: &Manifest| manifest.file(TOKENIZER_MODEL).map(|file| file.sha256.clone());
    let fields = [
        ("flavour", live.flavour == new.flavour),
        ("precision", live.precision == new.precision),
        ("batch", live.batch == new.batch),
        ("dims", live.dims == new.dims),
        ("heads", live.heads == new.heads),
        ("sampling", sampling == new.sampling),
        ("action_chunk", live.action_chunk == new.action_chunk),
        ("env_action_dim", live.env_action_dim == new.env_action_dim),
        ("env_state_dim", live.env_state_dim == new.env_state_dim),
        ("cameras", live.cameras == new.cameras),
        ("tokenizer", live.tokenizer == new.tokenizer),
        (TOKENIZER_MODEL, tokenizer_model(live) == tokenizer_model(new)),
        ("normalization", live.normalization == new.normalization),
        ("norm_stats", live.norm_stats == new.norm_stats),
        ("delta_actions", live.delta_actions == new.delta_actions),
        (
            "discrete_state_input",
            live.discrete_state_input == new.discrete_state_input,
        ),
    ];
    match fields.into_iter().find(|(_, same)| !same) {
        Some((field, _)) => Err(PolicyError::Other { field }),
        None => Ok(()),
    }
}

/// The live version and its predecessor; a swap replaces one pointer.
#[derive(Debug, Default)]
pub struct Versions(RwLock<Recent>);

#[derive(Debug, Default)]
struct Recent {
    live: Option<Arc<Policy>>,
    before: Weak<Policy>,
}

impl Versions {
    /// Returns the live policy. The version is kept until the returned pointer is dropped.
    pub fn live(&self) -> Option<Arc<Policy>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).live.clone()
    }

    /// Returns whether a policy is the live one or its predecessor; older versions are not kept in memory.
    pub fn is_recent(&self, policy: &Arc<Policy>) -> bool {
        let recent = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let is = |other: &Arc<Policy>| Arc::ptr_eq(policy, other);
        recent.live.as_ref().is_some_and(is) || recent.before.upgrade().as_ref().is_some_and(is)
    }

    /// Makes `policy` live.
    pub fn swap(&self, policy: Arc<Policy>) {
        let mut recent = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let before = recent.live.replace(policy);
        recent.before = before.as_ref().map(Arc::downgrade).unwrap_or_default();
        drop(recent);
        // the slot is freed outside of the lock, when no batch uses the version
        drop(before);
    }
}
