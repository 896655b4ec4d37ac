//! The ONNX Runtime sessions of a policy's two graphs, which depend on the tensors of the policy only.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use ort::{
    session::{Session, SessionInputValue},
    value::{DynValue, Tensor, ValueType},
};
use policy::{
    bundle::{Bundle, EXPERT_WEIGHTS, Manifest, VLM_WEIGHTS},
    dims::PolicyDims,
    flow::time_embedding,
    graph::{
        C_V, C_X, DENOISE_GRAPH, GraphContract, IMAGE_MASK, IMAGES, MEAN, PREFIX_GRAPH, PROMPT, PROMPT_MASK, STATE,
        STD, STEP_STD, TIME_EMB, TensorSpec, VALUE, X_NEXT, X_T, Z,
    },
    image::{CHANNELS, normalise_u8},
    message::one_line,
    params::{ParamSpec, expert_params},
    weights::WeightFile,
};

use super::runtime::OnnxRuntime;
use crate::device::{DeviceError, PathStep, PrefixBatch, StepOutput, StepPath, library::require};

const PREFIX: &str = "prefix";
const DENOISE: &str = "denoise";

/// Outputs of the prefix graph for a batch; every denoise step reads these.
#[derive(Debug)]
pub struct PrefixCache {
    rows: usize,
    /// Values that the denoise graph reads unchanged, by input name.
    values: Vec<(String, DynValue)>,
}

/// Digests of the files of a prefix session; bundles with equal digests can share a session.
type PrefixIdentity = Option<(String, String)>;

fn prefix_identity(bundle: &Bundle) -> PrefixIdentity {
    let digest = |name: &str| bundle.manifest.file(name).map(|f| f.sha256.clone());
    Some((digest(PREFIX_GRAPH)?, digest(VLM_WEIGHTS)?))
}

fn denoise_contract(manifest: &Manifest) -> GraphContract {
    GraphContract::denoise(&manifest.dims, &manifest.heads, manifest.weights, manifest.batch)
}

/// The prefix session, shared by all versions with the same vision-language weights.
pub(super) struct PrefixSession {
    /// Session of the prefix graph. Only the device's thread runs a serving session, so the lock is not contended.
    session: Mutex<Session>,
    identity: PrefixIdentity,
    contract: GraphContract,
    denoise: GraphContract,
    /// Pixels of an image.
    plane: usize,
    /// Inputs and outputs of the session's self-test; the next version's test with the same inputs reuses the outputs.
    tested: OnceLock<(PrefixBatch, Arc<PrefixCache>)>,
}

impl std::fmt::Debug for PrefixSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PrefixSession")
            .field("identity", &self.identity)
            .finish_non_exhaustive()
    }
}

impl PrefixSession {
    /// Loads the prefix graph of a verified bundle.
    pub(super) fn load(runtime: &OnnxRuntime, bundle: &Bundle) -> Result<Self, DeviceError> {
        let path = bundle.path(PREFIX_GRAPH);
        let session = runtime.load(&path)?;
        let manifest = &bundle.manifest;
        let contract = GraphContract::prefix(&manifest.dims, manifest.batch);
        require(&path, &session, &contract)?;
        Ok(Self {
            session: Mutex::new(session),
            identity: prefix_identity(bundle),
            contract,
            denoise: denoise_contract(manifest),
            plane: manifest.dims.vision.image_size.pow(2),
            tested: OnceLock::new(),
        })
    }

    /// Returns whether the session belongs to a bundle.
    pub(super) fn is_of(&self, bundle: &Bundle) -> bool {
        self.identity.is_some()
            && self.identity == prefix_identity(bundle)
            && self.denoise == denoise_contract(&bundle.manifest)
    }

    /// Returns the outputs of the prefix graph for a self-test's inputs, without running a serving session. The outputs of an
    /// earlier test are reused; for other inputs a session is loaded for a single run.
    pub(super) fn self_test(
        &self,
        runtime: &OnnxRuntime,
        bundle: &Bundle,
        batch: &PrefixBatch,
    ) -> Result<Arc<PrefixCache>, DeviceError> {
        match self.tested.get() {
            Some((inputs, cache)) if inputs == batch => Ok(Arc::clone(cache)),
            Some(_) => Self::load(runtime, bundle)?.run(batch.clone()),
            // no version serves with this session before the first test
            None => {
                let cache = self.run(batch.clone())?;
                let (_, cache) = self.tested.get_or_init(|| (batch.clone(), cache));
                Ok(Arc::clone(cache))
            }
        }
    }

    /// Runs the prefix graph on a batch.
    fn run(&self, batch: PrefixBatch) -> Result<Arc<PrefixCache>, DeviceError> {
        let run = |e: ort::Error| DeviceError::Run {
            graph: PREFIX,
            detail: one_line(e),
        };
        let rows = batch.rows;
        let input = |name| shape(PREFIX, &self.contract.inputs, name, rows);
        let inputs = vec![
            (
                IMAGES,
                tensor(PREFIX, &input(IMAGES)?, channels_first(&batch.images, self.plane))?,
            ),
            (IMAGE_MASK, tensor(PREFIX, &input(IMAGE_MASK)?, batch.image_mask)?),
            (PROMPT, tensor(PREFIX, &input(PROMPT)?, batch.prompt)?),
            (PROMPT_MASK, tensor(PREFIX, &input(PROMPT_MASK)?, batch.prompt_mask)?),
        ];
        let mut values = Vec::new();
        {
            // a poisoned lock means a panic in another run; the session keeps no state of that run
            let mut session = self.session.lock().unwrap_or_else(PoisonError::into_inner);
            let mut outputs = session.run(inputs).map_err(run)?;
            for output in &self.contract.outputs {
                if self.denoise.input(&output.name).is_some() {
                    let value = outputs.remove(&output.name).ok_or_else(|| DeviceError::Output {
                        graph: PREFIX,
                        name: output.name.clone(),
                        expected: 1,
                        found: 0,
                    })?;
                    values.push((output.name.clone(), value));
                }
            }
        }
        for (name, value) in &values {
            let expected = shape(PREFIX, &self.contract.outputs, name, rows)?.iter().product();
            let found = match value.dtype() {
                ValueType::Tensor { shape, .. } => shape.iter().product::<i64>().max(0) as usize,
                _ => 0,
            };
            if found != expected {
                return Err(DeviceError::Output {
                    graph: PREFIX,
                    name: name.clone(),
                    expected,
                    found,
                });
            }
        }
        if let Some(state) = self.denoise.input(STATE) {
            values.push((STATE.to_owned(), tensor(PREFIX, &state.shape(rows), batch.state)?));
        }
        Ok(Arc::new(PrefixCache { rows, values }))
    }
}

/// The two sessions of one policy version.
pub(super) struct PolicySessions {
    prefix: Arc<PrefixSession>,
    denoise: Session,
    /// Weights as graph inputs, in mode `inputs`; otherwise empty.
    weights: Vec<(String, DynValue)>,
    contract: GraphContract,
    dims: PolicyDims,
}

impl std::fmt::Debug for PolicySessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PolicySessions")
            .field("weights", &self.weights.len())
            .finish_non_exhaustive()
    }
}

impl PolicySessions {
    /// Loads the denoise graph of a verified bundle.
    pub(super) fn load(
        runtime: &OnnxRuntime,
        bundle: &Bundle,
        prefix: Arc<PrefixSession>,
    ) -> Result<Self, DeviceError> {
        let manifest = &bundle.manifest;
        let path = bundle.path(DENOISE_GRAPH);
        let denoise = runtime.load(&path)?;
        let contract = denoise_contract(manifest);
        require(&path, &denoise, &contract)?;
        let weights = if contract.weights.is_empty() {
            Vec::new()
        } else {
            weight_inputs(bundle)?
        };
        Ok(Self {
            prefix,
            denoise,
            weights,
            contract,
            dims: manifest.dims.clone(),
        })
    }

    /// Runs the prefix graph on a batch.
    pub(super) fn prefix(&self, batch: PrefixBatch) -> Result<Arc<PrefixCache>, DeviceError> {
        self.prefix.run(batch)
    }

    /// Runs all denoise steps on the batch of `cache`.
    pub(super) fn denoise(&mut self, cache: &PrefixCache, path: &StepPath) -> Result<Vec<StepOutput>, DeviceError> {
        let elements = self.dims.action_horizon * self.dims.action_dim;
        let mut outputs: Vec<StepOutput> = Vec::with_capacity(path.steps.len());
        for (k, step) in path.steps.iter().enumerate() {
            let x_t = outputs.last().map_or(&path.initial, |output| &output.x_next);
            let mut output = self.step(cache, x_t, step)?;
            for (guidance, x_next) in path.guidance.iter().zip(output.x_next.chunks_mut(elements)) {
                if let Some(guidance) = guidance {
                    guidance.correct(x_next, self.dims.action_dim, k, path.steps.len());
                }
            }
            outputs.push(output);
        }
        Ok(outputs)
    }

    fn step(&mut self, cache: &PrefixCache, x_t: &[f32], step: &PathStep) -> Result<StepOutput, DeviceError> {
        let rows = cache.rows;
        let time = time_embedding(step.t, self.dims.expert.width).repeat(rows);
        let fresh = |name, data: Vec<f32>| {
            let shape = shape(DENOISE, &self.contract.inputs, name, rows)?;
            Ok::<_, DeviceError>((name, tensor(DENOISE, &shape, data)?))
        };
        let fresh = [
            fresh(X_T, x_t.to_vec())?,
            fresh(TIME_EMB, time)?,
            fresh(C_X, step.c_x.clone())?,
            fresh(C_V, step.c_v.clone())?,
            fresh(STD, step.std.clone())?,
            fresh(Z, step.z.clone())?,
        ];
        let inputs: Vec<(&str, SessionInputValue<'_>)> = fresh
            .iter()
            .map(|(name, value)| (*name, value.into()))
            .chain(
                cache
                    .values
                    .iter()
                    .chain(&self.weights)
                    .map(|(name, value)| (name.as_str(), value.into())),
            )
            .collect();
        let outputs = self.denoise.run(inputs).map_err(|e| DeviceError::Run {
            graph: DENOISE,
            detail: one_line(e),
        })?;
        let read = |spec: &TensorSpec| floats(DENOISE, spec, outputs.get(&spec.name), rows);
        let required = |name| read(spec(DENOISE, &self.contract.outputs, name)?);
        Ok(StepOutput {
            x_next: required(X_NEXT)?,
            mean: required(MEAN)?,
            step_std: self.contract.output(STEP_STD).map(read).transpose()?,
            value: self.contract.output(VALUE).map(read).transpose()?,
        })
    }
}

/// Returns the spec of a tensor of a contract.
fn spec<'a>(graph: &'static str, specs: &'a [TensorSpec], name: &str) -> Result<&'a TensorSpec, DeviceError> {
    specs
        .iter()
        .find(|spec| spec.name == name)
        .ok_or_else(|| DeviceError::Contract {
            graph,
            name: name.to_owned(),
        })
}

/// Returns the shape of a tensor of a contract.
fn shape(graph: &'static str, specs: &[TensorSpec], name: &str, rows: usize) -> Result<Vec<usize>, DeviceError> {
    Ok(spec(graph, specs, name)?.shape(rows))
}

/// Returns images `[n, size, size, 3]` as `x / 255 * 2 - 1`, `[n, 3, size, size]`.
fn channels_first(images: &[u8], plane: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(images.len());
    for image in images.chunks_exact(plane * CHANNELS) {
        for channel in 0..CHANNELS {
            out.extend(image.iter().skip(channel).step_by(CHANNELS).map(|p| normalise_u8(*p)));
        }
    }
    out
}

fn tensor<T>(graph: &'static str, shape: &[usize], data: Vec<T>) -> Result<DynValue, DeviceError>
where
    T: ort::value::PrimitiveTensorElementType + std::fmt::Debug + Clone + 'static,
{
    Ok(Tensor::from_array((shape.to_vec(), data))
        .map_err(|e| DeviceError::Run {
            graph,
            detail: one_line(e),
        })?
        .into_dyn())
}

fn floats(
    graph: &'static str,
    spec: &TensorSpec,
    value: Option<&DynValue>,
    rows: usize,
) -> Result<Vec<f32>, DeviceError> {
    let expected = spec.shape(rows).iter().product();
    let other_size = |found| DeviceError::Output {
        graph,
        name: spec.name.clone(),
        expected,
        found,
    };
    let (_, data) = value
        .ok_or_else(|| other_size(0))?
        .try_extract_tensor::<f32>()
        .map_err(|e| DeviceError::Run {
            graph,
            detail: one_line(e),
        })?;
    if data.len() != expected {
        return Err(other_size(data.len()));
    }
    Ok(data.to_vec())
}

fn weight_inputs(bundle: &Bundle) -> Result<Vec<(String, DynValue)>, DeviceError> {
    let path = bundle.path(EXPERT_WEIGHTS);
    let bad = |source| DeviceError::Weights {
        path: path.clone(),
        source,
    };
    let table = expert_params(&bundle.manifest.dims, &bundle.manifest.heads);
    let wanted: Vec<&ParamSpec> = table.iter().collect();
    let weights = WeightFile::open(&path)
        .and_then(|file| file.read_all(&wanted))
        .map_err(bad)?;
    weights
        .into_iter()
        .map(|(name, weight)| Ok((name, tensor(DENOISE, &weight.shape, weight.data)?)))
        .collect()
}
