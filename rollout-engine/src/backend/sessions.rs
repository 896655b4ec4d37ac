//! The sessions of a policy's two graphs; of the policy they know no more than its tensors.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError},
};

use ort::{
    session::{Session, SessionInputValue},
    value::{DynValue, Tensor, ValueType},
};
use policy::{
    bundle::{Bundle, DENOISE_GRAPH, EXPERT_WEIGHTS, PREFIX_GRAPH, VLM_WEIGHTS},
    config::WeightMode,
    dims::{PolicyDims, Variant},
    message::one_line,
    params::{CriticInput, ParamSpec, Part},
    weights::WeightFile,
};

use super::{Backend, BackendError};

/// The prefix graph, shared by all versions whose vision-language weights are the same.
pub type SharedPrefix = Arc<Mutex<Session>>;

/// Observations in model units; `B` rows.
#[derive(Debug, Clone, PartialEq)]
pub struct PrefixBatch {
    /// Rows.
    pub rows: usize,
    /// `[B, cameras, 3, size, size]` in `[-1, 1]`.
    pub images: Vec<f32>,
    /// `[B, cameras]`.
    pub image_mask: Vec<bool>,
    /// `[B, prompt_len]`.
    pub prompt: Vec<i64>,
    /// `[B, prompt_len]`.
    pub prompt_mask: Vec<bool>,
    /// `[B, action_dim]`, read by pi0 only.
    pub state: Vec<f32>,
}

/// What the prefix graph made of a batch; every denoise step reads it.
pub struct PrefixCache {
    rows: usize,
    /// Values that the denoise graph takes as they are, by input name.
    values: Vec<(&'static str, DynValue)>,
}

/// One denoise step of a batch.
#[derive(Debug, Clone, PartialEq)]
pub struct StepBatch<'a> {
    /// `[B, action_horizon, action_dim]`.
    pub x_t: &'a [f32],
    /// `[B, expert.width]`.
    pub time_embedding: Vec<f32>,
    /// `[B]`: the mean is `c_x * x_t + c_v * v_t`.
    pub c_x: Vec<f32>,
    /// `[B]`.
    pub c_v: Vec<f32>,
    /// `[B]`: standard deviation of the added noise; with a noise head the factor of its own.
    pub std: Vec<f32>,
    /// `[B, action_horizon, action_dim]`.
    pub z: Vec<f32>,
}

/// What a denoise step gave.
#[derive(Debug, Clone, PartialEq)]
pub struct StepOutput {
    /// `[B, action_horizon, action_dim]`.
    pub x_next: Vec<f32>,
    /// `[B, action_horizon, action_dim]`.
    pub mean: Vec<f32>,
    /// Standard deviation of the added noise, `[B, action_horizon, action_dim]`; `None` without a noise head.
    pub step_std: Option<Vec<f32>>,
    /// `[B]`; `None` without a value head.
    pub value: Option<Vec<f32>>,
}

/// The two sessions of one policy version.
pub struct PolicySessions {
    prefix: SharedPrefix,
    denoise: Session,
    /// Weights as graph inputs, in the inputs mode.
    weights: Vec<(String, DynValue)>,
    dims: PolicyDims,
    has_value: bool,
    has_noise: bool,
    value_reads_prefix: bool,
}

impl std::fmt::Debug for PolicySessions {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PolicySessions")
            .field("weights", &self.weights.len())
            .finish_non_exhaustive()
    }
}

fn require(path: &Path, session: &Session, inputs: &[&str], outputs: &[&str]) -> Result<(), BackendError> {
    let check = |kind: &'static str, names: &[&str], there: &[ort::value::Outlet]| match names
        .iter()
        .find(|name| !there.iter().any(|o| o.name() == **name))
    {
        Some(name) => Err(BackendError::Graph {
            path: path.to_owned(),
            kind,
            name: (*name).to_owned(),
        }),
        None => Ok(()),
    };
    check("input", inputs, session.inputs())?;
    check("output", outputs, session.outputs())
}

fn tensor<T>(graph: &'static str, shape: &[usize], data: Vec<T>) -> Result<DynValue, BackendError>
where
    T: ort::value::PrimitiveTensorElementType + std::fmt::Debug + Clone + 'static,
{
    Ok(Tensor::from_array((shape.to_vec(), data))
        .map_err(|e| BackendError::Run {
            graph,
            detail: one_line(e),
        })?
        .into_dyn())
}

fn floats(
    graph: &'static str,
    name: &'static str,
    value: Option<&DynValue>,
    expected: usize,
) -> Result<Vec<f32>, BackendError> {
    let (_, data) = value
        .ok_or(BackendError::Output {
            graph,
            name,
            expected,
            found: 0,
        })?
        .try_extract_tensor::<f32>()
        .map_err(|e| BackendError::Run {
            graph,
            detail: one_line(e),
        })?;
    if data.len() != expected {
        return Err(BackendError::Output {
            graph,
            name,
            expected,
            found: data.len(),
        });
    }
    Ok(data.to_vec())
}

const PREFIX: &str = "prefix";
const DENOISE: &str = "denoise";

impl PolicySessions {
    /// Loads the graphs of a verified bundle. `shared` is the prefix session of an earlier version with the same
    /// vision-language weights.
    ///
    /// # Errors
    /// A graph cannot be loaded or lacks an input or output of this policy.
    pub fn load(backend: &Backend, bundle: &Bundle, shared: Option<SharedPrefix>) -> Result<Self, BackendError> {
        let manifest = &bundle.manifest;
        let dims = manifest.dims.clone();
        let value_reads_prefix = manifest
            .heads
            .value
            .as_ref()
            .is_some_and(|h| h.input == CriticInput::Vlm);
        let prefix = if let Some(prefix) = shared {
            prefix
        } else {
            let path = bundle.path(PREFIX_GRAPH);
            let session = backend.load(&path)?;
            let outputs = ["k", "v", "prefix_mask", "pooled"];
            require(
                &path,
                &session,
                &["images", "image_mask", "prompt", "prompt_mask"],
                &outputs,
            )?;
            Arc::new(Mutex::new(session))
        };
        let path = bundle.path(DENOISE_GRAPH);
        let denoise = backend.load(&path)?;
        let mut inputs = vec!["x_t", "time_emb", "k", "v", "prefix_mask", "c_x", "c_v", "std", "z"];
        if dims.variant == Variant::Pi0 {
            inputs.push("state");
        }
        if value_reads_prefix {
            inputs.push("pooled");
        }
        let mut outputs = vec!["x_next", "mean"];
        let (has_value, has_noise) = (manifest.heads.value.is_some(), manifest.heads.noise.is_some());
        if has_value {
            outputs.push("value");
        }
        if has_noise {
            outputs.push("step_std");
        }
        let weights = match manifest.weights {
            WeightMode::Constants => Vec::new(),
            WeightMode::Inputs => weight_inputs(bundle)?,
        };
        inputs.extend(weights.iter().map(|(name, _)| name.as_str()));
        require(&path, &denoise, &inputs, &outputs)?;
        Ok(Self {
            prefix,
            denoise,
            weights,
            dims,
            has_value,
            has_noise,
            value_reads_prefix,
        })
    }

    /// The prefix session, for the next version with the same vision-language weights.
    pub fn shared_prefix(&self) -> SharedPrefix {
        Arc::clone(&self.prefix)
    }

    /// Runs the prefix graph on a batch.
    ///
    /// # Errors
    /// ONNX Runtime fails or gives another size.
    pub fn prefix(&self, batch: PrefixBatch) -> Result<PrefixCache, BackendError> {
        let run = |e: ort::Error| BackendError::Run {
            graph: PREFIX,
            detail: one_line(e),
        };
        let (rows, dims, size) = (batch.rows, &self.dims, self.dims.vision.image_size);
        let inputs = vec![
            (
                "images",
                tensor(PREFIX, &[rows, dims.cameras, 3, size, size], batch.images)?,
            ),
            ("image_mask", tensor(PREFIX, &[rows, dims.cameras], batch.image_mask)?),
            ("prompt", tensor(PREFIX, &[rows, dims.prompt_len], batch.prompt)?),
            (
                "prompt_mask",
                tensor(PREFIX, &[rows, dims.prompt_len], batch.prompt_mask)?,
            ),
        ];
        let mut values = Vec::new();
        {
            // a poisoned lock means a panic in another run; the session itself holds no state of that run
            let mut session = self.prefix.lock().unwrap_or_else(PoisonError::into_inner);
            let mut outputs = session.run(inputs).map_err(run)?;
            let pooled = self.value_reads_prefix.then_some("pooled");
            for name in ["k", "v", "prefix_mask"].into_iter().chain(pooled) {
                let value = outputs.remove(name).ok_or(BackendError::Output {
                    graph: PREFIX,
                    name,
                    expected: 1,
                    found: 0,
                })?;
                values.push((name, value));
            }
        }
        let expected = rows * dims.prefix_len();
        let found = match values
            .iter()
            .find(|(name, _)| *name == "prefix_mask")
            .map(|(_, v)| v.dtype())
        {
            Some(ValueType::Tensor { shape, .. }) => shape.iter().product::<i64>().max(0) as usize,
            _ => 0,
        };
        if found != expected {
            return Err(BackendError::Output {
                graph: PREFIX,
                name: "prefix_mask",
                expected,
                found,
            });
        }
        if dims.variant == Variant::Pi0 {
            values.push(("state", tensor(PREFIX, &[rows, dims.action_dim], batch.state)?));
        }
        Ok(PrefixCache { rows, values })
    }

    /// Runs one denoise step on the batch of `cache`.
    ///
    /// # Errors
    /// ONNX Runtime fails or gives another size.
    pub fn denoise(&mut self, step: StepBatch<'_>, cache: &PrefixCache) -> Result<StepOutput, BackendError> {
        let (rows, dims) = (cache.rows, &self.dims);
        let actions = [rows, dims.action_horizon, dims.action_dim];
        let fresh = [
            ("x_t", tensor(DENOISE, &actions, step.x_t.to_vec())?),
            (
                "time_emb",
                tensor(DENOISE, &[rows, dims.expert.width], step.time_embedding)?,
            ),
            ("c_x", tensor(DENOISE, &[rows], step.c_x)?),
            ("c_v", tensor(DENOISE, &[rows], step.c_v)?),
            ("std", tensor(DENOISE, &[rows], step.std)?),
            ("z", tensor(DENOISE, &actions, step.z)?),
        ];
        let inputs: Vec<(&str, SessionInputValue<'_>)> = fresh
            .iter()
            .chain(&cache.values)
            .map(|(name, value)| (*name, value.into()))
            .chain(self.weights.iter().map(|(name, value)| (name.as_str(), value.into())))
            .collect();
        let outputs = self.denoise.run(inputs).map_err(|e| BackendError::Run {
            graph: DENOISE,
            detail: one_line(e),
        })?;
        let count = actions.iter().product();
        Ok(StepOutput {
            x_next: floats(DENOISE, "x_next", outputs.get("x_next"), count)?,
            mean: floats(DENOISE, "mean", outputs.get("mean"), count)?,
            step_std: self
                .has_noise
                .then(|| floats(DENOISE, "step_std", outputs.get("step_std"), count))
                .transpose()?,
            value: self
                .has_value
                .then(|| floats(DENOISE, "value", outputs.get("value"), rows))
                .transpose()?,
        })
    }
}

fn weight_inputs(bundle: &Bundle) -> Result<Vec<(String, DynValue)>, BackendError> {
    let path = bundle.path(EXPERT_WEIGHTS);
    let bad = |source| BackendError::Weights {
        path: path.clone(),
        source,
    };
    let table = bundle.manifest.params();
    let wanted: Vec<&ParamSpec> = table.iter().filter(|p| p.part != Part::Vlm).collect();
    let weights = WeightFile::open(&path)
        .and_then(|file| file.read_all(&wanted))
        .map_err(bad)?;
    weights
        .into_iter()
        .map(|(name, weight)| Ok((name, tensor(DENOISE, &weight.shape, weight.data)?)))
        .collect()
}

/// The digests on which a prefix session depends: two bundles with the same can share one.
pub fn prefix_identity(bundle: &Bundle) -> Option<(String, String)> {
    let digest = |name: &str| bundle.manifest.file(name).map(|f| f.sha256.clone());
    Some((digest(PREFIX_GRAPH)?, digest(VLM_WEIGHTS)?))
}
