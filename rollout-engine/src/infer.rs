//! Sampling of action chunks: the prefix once, then the denoise steps over the step table.

use std::time::{Duration, Instant};

use policy::{
    flow::{DenoiseStep, time_embedding},
    logprob,
    noise::{ChunkNoise, NoiseKey},
    params::CriticInput,
};
use wire::messages::Mode;

use crate::{
    backend::{BackendError, PrefixCache, StepBatch},
    policy_slot::LoadedPolicy,
    preprocess::{ModelInput, batch},
};

/// Sampling that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum InferError {
    /// ONNX Runtime.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A row without a step: the schedule is shorter than the loop.
    #[error("denoise step {step} is not in the step table of {steps} steps")]
    Step {
        /// Which step.
        step: usize,
        /// Length of the table.
        steps: usize,
    },
    /// An empty batch.
    #[error("a batch needs at least one row")]
    Empty,
}

/// The stochastic denoise step of one row.
#[derive(Debug, Clone, PartialEq)]
pub struct Stochastic {
    /// Which step.
    pub step: usize,
    /// Its noise, `[action_horizon, action_dim]`.
    pub z: Vec<f32>,
}

/// The random numbers of one row.
#[derive(Debug, Clone, PartialEq)]
pub struct Draw {
    /// Initial noise, `[action_horizon, action_dim]`.
    pub initial: Vec<f32>,
    /// The stochastic step; `None`: all ODE.
    pub stochastic: Option<Stochastic>,
}

impl Draw {
    /// The numbers of the chunk named by `key`.
    pub fn new(policy: &LoadedPolicy, key: NoiseKey, mode: Mode) -> Self {
        let dims = &policy.manifest.dims;
        let noise = ChunkNoise::draw(key, dims.action_horizon * dims.action_dim, policy.schedule.drawable);
        let stochastic = match mode {
            Mode::Train => noise.stochastic_step.map(|step| Stochastic { step, z: noise.step }),
            Mode::Eval => None,
        };
        Self {
            initial: noise.initial,
            stochastic,
        }
    }
}

/// One sampled action chunk in model units.
#[derive(Debug, Clone, PartialEq)]
pub struct Sample {
    /// The input, for the record.
    pub input: ModelInput,
    /// The noise key.
    pub key: NoiseKey,
    /// `x` before each step and after the last, `[num_steps + 1, action_horizon, action_dim]`.
    pub chain: Vec<f32>,
    /// Elements of one `x`.
    pub elements: usize,
    /// The stochastic step.
    pub denoise_step: Option<usize>,
    /// Log-probability per element of the stochastic step, `[action_chunk, env_action_dim]`.
    pub logprob: Option<Vec<f32>>,
    /// Value: of the stochastic step with `V_expert`, of the prefix with `V_vlm`.
    pub value: Option<f32>,
}

impl Sample {
    /// The sampled actions, `[action_horizon, action_dim]`.
    pub fn actions(&self) -> &[f32] {
        self.chain
            .get(self.chain.len().saturating_sub(self.elements)..)
            .unwrap_or_default()
    }
}

/// Samples of a batch and how long they took.
#[derive(Debug)]
pub struct Sampled {
    /// In the order of the rows.
    pub samples: Vec<Sample>,
    /// Time of the prefix graph, batch assembly included.
    pub prefix: Duration,
    /// Time of all denoise steps.
    pub denoise: Duration,
}

/// Samples action chunks for these rows with one policy version, in one batch (padded by repeating the first row, and split,
/// when the graphs have a fixed batch size).
///
/// # Errors
/// ONNX Runtime fails.
pub fn sample(policy: &LoadedPolicy, rows: Vec<(ModelInput, Draw, NoiseKey)>) -> Result<Sampled, InferError> {
    sample_fixed(policy, rows, None)
}

/// The same in batches of exactly `fixed` rows, whatever the number of rows is; graphs with a fixed batch size keep theirs.
///
/// Matrix products of another number of rows may sum in another order. With one number of rows a row's result depends on
/// nothing but the row: neither on its neighbours nor on its place.
///
/// # Errors
/// ONNX Runtime fails.
pub fn sample_fixed(
    policy: &LoadedPolicy,
    rows: Vec<(ModelInput, Draw, NoiseKey)>,
    fixed: Option<usize>,
) -> Result<Sampled, InferError> {
    let Some(fixed) = policy.manifest.batch.or(fixed) else {
        return sample_batch(policy, rows, None);
    };
    let mut all = Sampled {
        samples: Vec::with_capacity(rows.len()),
        prefix: Duration::ZERO,
        denoise: Duration::ZERO,
    };
    let mut rest = rows.into_iter();
    loop {
        let part: Vec<_> = rest.by_ref().take(fixed.max(1)).collect();
        if part.is_empty() {
            return Ok(all);
        }
        let sampled = sample_batch(policy, part, Some(fixed))?;
        all.samples.extend(sampled.samples);
        all.prefix += sampled.prefix;
        all.denoise += sampled.denoise;
    }
}

fn sample_batch(
    policy: &LoadedPolicy,
    rows: Vec<(ModelInput, Draw, NoiseKey)>,
    fixed: Option<usize>,
) -> Result<Sampled, InferError> {
    let first = rows.first().ok_or(InferError::Empty)?;
    let count = rows.len();
    let padding = fixed.map_or(0, |n| n.saturating_sub(count));
    let inputs: Vec<&ModelInput> = rows
        .iter()
        .map(|(input, ..)| input)
        .chain(std::iter::repeat_n(&first.0, padding))
        .collect();
    let draws: Vec<&Draw> = rows
        .iter()
        .map(|(_, draw, _)| draw)
        .chain(std::iter::repeat_n(&first.1, padding))
        .collect();

    let begun = Instant::now();
    let prefix_batch = batch(&inputs, policy.manifest.dims.vision.image_size);
    let cache = policy.with_sessions(|sessions| sessions.prefix(prefix_batch))?;
    let prefix = begun.elapsed();
    let begun = Instant::now();
    let traces = denoise(policy, &draws, &cache)?;
    let denoise = begun.elapsed();

    let elements = policy.manifest.dims.action_horizon * policy.manifest.dims.action_dim;
    let samples = rows
        .into_iter()
        .zip(traces)
        .map(|((input, draw, key), trace)| Sample {
            input,
            key,
            chain: trace.chain,
            elements,
            denoise_step: draw.stochastic.map(|s| s.step),
            logprob: trace.logprob,
            value: trace.value,
        })
        .collect();
    Ok(Sampled {
        samples,
        prefix,
        denoise,
    })
}

/// What the steps leave of one row.
#[derive(Default)]
struct Trace {
    chain: Vec<f32>,
    logprob: Option<Vec<f32>>,
    value: Option<f32>,
}

fn denoise(policy: &LoadedPolicy, draws: &[&Draw], cache: &PrefixCache) -> Result<Vec<Trace>, InferError> {
    let manifest = &policy.manifest;
    let dims = &manifest.dims;
    let elements = dims.action_horizon * dims.action_dim;
    let steps = policy.schedule.num_steps();
    let value_of_prefix = manifest
        .value_head
        .as_ref()
        .is_some_and(|h| h.input == CriticInput::Vlm);

    let mut x: Vec<f32> = draws.iter().flat_map(|d| d.initial.iter().copied()).collect();
    let mut traces: Vec<Trace> = draws
        .iter()
        .map(|d| Trace {
            chain: d.initial.clone(),
            ..Trace::default()
        })
        .collect();
    for k in 0..steps {
        let missing = InferError::Step { step: k, steps };
        let table: Vec<&DenoiseStep> = draws
            .iter()
            .map(|d| policy.schedule.row(k, d.stochastic.as_ref().map(|s| s.step)))
            .collect::<Option<_>>()
            .ok_or(missing)?;
        let here = |d: &Draw| d.stochastic.as_ref().filter(|s| s.step == k).map(|s| s.z.clone());
        let step = StepBatch {
            x_t: &x,
            time_embedding: table
                .iter()
                .flat_map(|row| time_embedding(row.t, dims.expert.width))
                .collect(),
            c_x: table.iter().map(|row| row.mean_coefficients().0 as f32).collect(),
            c_v: table.iter().map(|row| row.mean_coefficients().1 as f32).collect(),
            std: table.iter().map(|row| row.std as f32).collect(),
            z: draws
                .iter()
                .flat_map(|d| here(d).unwrap_or_else(|| vec![0.0; elements]))
                .collect(),
        };
        let out = policy.with_sessions(|sessions| sessions.denoise(step, cache))?;
        let moved = out.x_next.chunks(elements).zip(out.mean.chunks(elements));
        for (i, (((trace, draw), row), (x_next, mean))) in
            traces.iter_mut().zip(draws).zip(&table).zip(moved).enumerate()
        {
            trace.chain.extend_from_slice(x_next);
            let stochastic = draw.stochastic.as_ref().is_some_and(|s| s.step == k);
            if stochastic {
                trace.logprob = Some(logprob::executed(
                    x_next,
                    mean,
                    row.std as f32,
                    dims.action_dim,
                    manifest.action_chunk,
                    manifest.env_action_dim,
                ));
            }
            if stochastic || (value_of_prefix && k == 0) {
                trace.value = out.value.as_ref().and_then(|v| v.get(i).copied());
            }
        }
        x = out.x_next;
    }
    Ok(traces)
}
