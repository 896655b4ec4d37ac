//! The live policy: loaded aside, proven by its self-test, swapped in between batches.

use std::{
    collections::BTreeMap,
    path::Path,
    sync::{Arc, Mutex, PoisonError, RwLock, Weak},
};

use policy::{
    bundle::{Bundle, BundleError, MANIFEST, Manifest, TOKENIZER_MODEL, describe_file},
    dims::PolicyDims,
    flow::{Sampling, Schedule},
    noise::{ChunkNoise, NoiseKey},
    prompt::PromptError,
    selftest::SelfTestInput,
};

use crate::{
    backend::{Backend, BackendError, PolicySessions, prefix_identity},
    infer::{InferError, Sample, sample},
    preprocess::{ModelInput, Preprocessor},
};

/// Why a bundle does not become the live policy.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PolicyError {
    /// The bundle is broken.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// ONNX Runtime refuses it.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// Its tokenizer is not read.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// The self-test does not run.
    #[error("self-test: {0}")]
    Infer(#[from] InferError),
    /// The self-test's actions differ from the publisher's.
    #[error("self-test: action element {index} is {found}, the publisher has {expected}, tolerance {tolerance}")]
    SelfTest {
        /// Which element of `[action_horizon, action_dim]`.
        index: usize,
        /// The publisher's.
        expected: f32,
        /// Ours.
        found: f32,
        /// Largest difference that passes.
        tolerance: f32,
    },
    /// The self-test's actions are not finite.
    #[error("self-test: action element {index} is {found}")]
    NotFinite {
        /// Which element.
        index: usize,
        /// NaN or infinity.
        found: f32,
    },
    /// A reference of another size.
    #[error("self-test: the manifest has {found} reference actions, expected {expected}")]
    Reference {
        /// `action_horizon * action_dim`.
        expected: usize,
        /// What the manifest has.
        found: usize,
    },
    /// Another policy than the one that the workers were welcomed to.
    #[error("`{field}` differs from the live version's: restart the engine for another policy")]
    Other {
        /// Which part of the manifest.
        field: &'static str,
    },
}

/// A policy version ready to serve.
#[derive(Debug)]
pub struct LoadedPolicy {
    /// The manifest.
    pub manifest: Manifest,
    /// SHA-256 of every file, the manifest's among them.
    pub digests: BTreeMap<String, String>,
    /// Step tables.
    pub schedule: Schedule,
    /// Observation to model input.
    pub preprocessor: Preprocessor,
    /// On which [`PolicySessions::shared_prefix`] depends.
    prefix_identity: Option<(String, String)>,
    /// The inference thread and a self-test never run the same sessions; the lock is not contended.
    sessions: Mutex<PolicySessions>,
    /// Largest difference to the publisher's reference actions; `None` when the manifest has no reference.
    pub self_test_difference: Option<f32>,
}

/// Seed of the self-test's inputs when the manifest has no reference: then only finiteness is checked.
const SELF_TEST_SEED: u64 = 0;

impl LoadedPolicy {
    /// Opens, verifies, loads and tests the bundle in `dir`. `live` shares its prefix session when the vision-language
    /// weights are the same, and must be the same policy otherwise.
    ///
    /// # Errors
    /// The first check that fails.
    pub fn load(backend: &Backend, dir: &Path, live: Option<&Self>) -> Result<Self, PolicyError> {
        let bundle = Bundle::open(dir)?;
        if let Some(live) = live {
            same_policy(&live.manifest, &bundle.manifest)?;
        }
        bundle.verify()?;
        let identity = prefix_identity(&bundle);
        let shared = live
            .filter(|live| identity.is_some() && live.prefix_identity == identity)
            .map(|live| live.with_sessions(|sessions| sessions.shared_prefix()));
        let sessions = PolicySessions::load(backend, &bundle, shared)?;
        let manifest = bundle.manifest.clone();
        let mut digests: BTreeMap<String, String> = manifest
            .files
            .iter()
            .map(|f| (f.name.clone(), f.sha256.clone()))
            .collect();
        digests.insert(MANIFEST.to_owned(), describe_file(&bundle.path(MANIFEST))?.sha256);
        let schedule = Schedule::of(&manifest.sampling);
        let preprocessor = Preprocessor::new(&manifest, dir)?;
        let mut policy = Self {
            manifest,
            digests,
            schedule,
            preprocessor,
            prefix_identity: identity,
            sessions: Mutex::new(sessions),
            self_test_difference: None,
        };
        policy.self_test_difference = policy.self_test()?;
        Ok(policy)
    }

    /// Count of published updates.
    pub fn version(&self) -> u64 {
        self.manifest.policy_version
    }

    /// Runs `f` with the sessions.
    pub fn with_sessions<T>(&self, f: impl FnOnce(&mut PolicySessions) -> T) -> T {
        // after a panic in a run the sessions are as before: a run changes nothing in them
        f(&mut self.sessions.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// An ODE pass on drawn inputs: finite, and within the tolerance of the publisher's actions.
    fn self_test(&self) -> Result<Option<f32>, PolicyError> {
        let dims = &self.manifest.dims;
        let reference = self.manifest.self_test.as_ref();
        let (input, initial) = drawn_input(dims, reference.map_or(SELF_TEST_SEED, |r| r.seed));
        let draw = ChunkNoise {
            initial,
            steps: Vec::new(),
        };
        let key = NoiseKey {
            seed: 0,
            env: 0,
            episode: 0,
            chunk: 0,
        };
        let samples = sample(self, vec![(input, draw, key)])?.samples;
        let actions = samples.first().map(Sample::actions).unwrap_or_default();
        if let Some((index, found)) = actions.iter().enumerate().find(|(_, v)| !v.is_finite()) {
            return Err(PolicyError::NotFinite { index, found: *found });
        }
        let Some(reference) = reference else { return Ok(None) };
        if reference.actions.len() != actions.len() {
            return Err(PolicyError::Reference {
                expected: actions.len(),
                found: reference.actions.len(),
            });
        }
        let mut largest = 0.0f32;
        for (index, (found, expected)) in actions.iter().zip(&reference.actions).enumerate() {
            let difference = (found - expected).abs();
            // written so that a NaN in the manifest fails too
            if difference.is_nan() || difference > reference.tolerance {
                return Err(PolicyError::SelfTest {
                    index,
                    expected: *expected,
                    found: *found,
                    tolerance: reference.tolerance,
                });
            }
            largest = largest.max(difference);
        }
        Ok(Some(largest))
    }
}

/// An observation in model units and its initial noise, `[action_horizon, action_dim]`, drawn from a seed.
pub(crate) fn drawn_input(dims: &PolicyDims, seed: u64) -> (ModelInput, Vec<f32>) {
    let drawn = SelfTestInput::draw(dims, seed);
    let input = ModelInput {
        images: drawn.images,
        image_mask: vec![true; dims.cameras],
        prompt: drawn.prompt,
        prompt_mask: drawn.prompt_mask,
        state: drawn.state,
    };
    (input, drawn.noise)
}

/// Checks that a new version means the same by an observation and an action as the live one: it may have other weights and another
/// noise level, nothing else.
fn same_policy(live: &Manifest, new: &Manifest) -> Result<(), PolicyError> {
    let sampling = Sampling {
        noise_level: new.sampling.noise_level,
        ..live.sampling.clone()
    };
    let tokenizer_model = |manifest: &Manifest| manifest.file(TOKENIZER_MODEL).map(|file| file.sha256.clone());
    let fields = [
        ("dims", live.dims == new.dims),
        ("heads", live.heads == new.heads),
        ("sampling", sampling == new.sampling),
        ("action_chunk", live.action_chunk == new.action_chunk),
        ("env_action_dim", live.env_action_dim == new.env_action_dim),
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

/// Where the live policy is; a swap is one pointer.
#[derive(Debug, Default)]
pub struct PolicySlot(RwLock<Slot>);

#[derive(Debug, Default)]
struct Slot {
    live: Option<Arc<LoadedPolicy>>,
    before: Weak<LoadedPolicy>,
}

impl PolicySlot {
    /// The live policy; who holds the returned pointer keeps that version until it is dropped.
    pub fn live(&self) -> Option<Arc<LoadedPolicy>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).live.clone()
    }

    /// Whether a policy is the live one or the one before: older ones are not kept in memory.
    pub fn is_recent(&self, policy: &Arc<LoadedPolicy>) -> bool {
        let slot = self.0.read().unwrap_or_else(PoisonError::into_inner);
        let is = |other: &Arc<LoadedPolicy>| Arc::ptr_eq(policy, other);
        slot.live.as_ref().is_some_and(is) || slot.before.upgrade().as_ref().is_some_and(is)
    }

    /// Makes `policy` live and returns the one before.
    pub fn swap(&self, policy: Arc<LoadedPolicy>) -> Option<Arc<LoadedPolicy>> {
        let mut slot = self.0.write().unwrap_or_else(PoisonError::into_inner);
        let before = slot.live.replace(policy);
        slot.before = before.as_ref().map(Arc::downgrade).unwrap_or_default();
        before
    }
}
