//! Sampling of action chunks: the prefix once, then the denoise steps over the step table.

use std::time::{Duration, Instant};

use policy::{
    flow::{DenoiseStep, Mdp, StepDraw, time_embedding},
    guidance::Guidance,
    logprob,
    noise::{ChunkNoise, NoiseKey, StepNoise},
    params::{CriticInput, ValueSteps},
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

/// The numbers of the chunk named by `key`; evaluation takes the initial noise alone.
pub fn draw(policy: &LoadedPolicy, key: NoiseKey, mode: Mode) -> ChunkNoise {
    let dims = &policy.manifest.dims;
    let steps = match mode {
        Mode::Train => policy.schedule.draw(),
        Mode::Eval => StepDraw::Every { of: 0 },
    };
    ChunkNoise::draw(key, dims.action_horizon * dims.action_dim, steps)
}

/// What one action chunk is sampled from.
#[derive(Debug, Clone, PartialEq)]
pub struct Wanted {
    /// What is seen.
    pub input: ModelInput,
    /// Its noise.
    pub noise: ChunkNoise,
    /// Key of the noise.
    pub key: NoiseKey,
    /// The chunk that it goes on from; only where no step is stochastic.
    pub guidance: Option<Guidance>,
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
    /// The stochastic steps in order, `S` of them.
    pub denoise_steps: Vec<usize>,
    /// Log-probability per element of each stochastic step, `[S, action_chunk, env_action_dim]`.
    pub logprob: Vec<f32>,
    /// Values: one per stochastic step with `V_expert` read there, one with `V_vlm` or over the path; none without a critic.
    pub values: Vec<f32>,
}

impl Sample {
    /// The sampled actions, `[action_horizon, action_dim]`.
    pub fn actions(&self) -> &[f32] {
        self.chain
            .get(self.chain.len().saturating_sub(self.elements)..)
            .unwrap_or_default()
    }

    /// The value of the observation: where every denoise step is a transition of its own that of the first, else the mean.
    pub fn value(&self, mdp: Mdp) -> Option<f32> {
        let first = self.values.first().copied()?;
        Some(match mdp {
            Mdp::TwoLayer => first,
            Mdp::Hybrid | Mdp::Joint => mean(&self.values),
        })
    }
}

fn mean(values: &[f32]) -> f32 {
    values.iter().sum::<f32>() / values.len().max(1) as f32
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
pub fn sample(policy: &LoadedPolicy, rows: Vec<(ModelInput, ChunkNoise, NoiseKey)>) -> Result<Sampled, InferError> {
    let wanted = |(input, noise, key)| Wanted {
        input,
        noise,
        key,
        guidance: None,
    };
    sample_fixed(policy, rows.into_iter().map(wanted).collect(), None)
}

/// The same in batches of exactly `fixed` rows, whatever the number of rows is; graphs with a fixed batch size keep theirs.
///
/// Matrix products of another number of rows may sum in another order. With one number of rows a row's result depends on
/// nothing but the row: neither on its neighbours nor on its place.
///
/// # Errors
/// ONNX Runtime fails.
pub fn sample_fixed(policy: &LoadedPolicy, rows: Vec<Wanted>, fixed: Option<usize>) -> Result<Sampled, InferError> {
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

fn sample_batch(policy: &LoadedPolicy, rows: Vec<Wanted>, fixed: Option<usize>) -> Result<Sampled, InferError> {
    let first = rows.first().ok_or(InferError::Empty)?;
    let count = rows.len();
    let padding = fixed.map_or(0, |n| n.saturating_sub(count));
    let batched: Vec<&Wanted> = rows.iter().chain(std::iter::repeat_n(first, padding)).collect();
    let inputs: Vec<&ModelInput> = batched.iter().map(|row| &row.input).collect();

    let begun = Instant::now();
    let prefix_batch = batch(&inputs, policy.manifest.dims.vision.image_size);
    let cache = policy.with_sessions(|sessions| sessions.prefix(prefix_batch))?;
    let prefix = begun.elapsed();
    let begun = Instant::now();
    let traces = denoise(policy, &batched, &cache)?;
    let denoise = begun.elapsed();

    let elements = policy.manifest.dims.action_horizon * policy.manifest.dims.action_dim;
    let samples = rows
        .into_iter()
        .zip(traces)
        .map(|(row, trace)| Sample {
            input: row.input,
            key: row.key,
            chain: trace.chain,
            elements,
            denoise_steps: row.noise.steps.into_iter().map(|s| s.step).collect(),
            logprob: trace.logprob,
            values: trace.values,
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
    logprob: Vec<f32>,
    values: Vec<f32>,
}

/// At which denoise steps a value is kept.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Keep {
    None,
    First,
    Stochastic,
    /// At every step; the mean is what remains.
    Path,
}

/// The noise of step `k`, when it is stochastic.
fn noise_at(draw: &ChunkNoise, k: usize) -> Option<&StepNoise> {
    draw.steps.iter().find(|s| s.step == k)
}

fn denoise(policy: &LoadedPolicy, rows: &[&Wanted], cache: &PrefixCache) -> Result<Vec<Trace>, InferError> {
    let draws: Vec<&ChunkNoise> = rows.iter().map(|row| &row.noise).collect();
    let manifest = &policy.manifest;
    let (dims, sampling) = (&manifest.dims, &manifest.sampling);
    let elements = dims.action_horizon * dims.action_dim;
    let steps = policy.schedule.num_steps();
    let keep = match &manifest.heads.value {
        None => Keep::None,
        Some(head) if head.input == CriticInput::Vlm => Keep::First,
        Some(head) if head.steps == ValueSteps::Path => Keep::Path,
        Some(_) => Keep::Stochastic,
    };

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
            .map(|d| policy.schedule.row(k, noise_at(d, k).is_some()))
            .collect::<Option<_>>()
            .ok_or(missing)?;
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
                .flat_map(|d| noise_at(d, k).map_or_else(|| vec![0.0; elements], |s| s.z.clone()))
                .collect(),
        };
        let mut out = policy.with_sessions(|sessions| sessions.denoise(step, cache))?;
        for (row, x_next) in rows.iter().zip(out.x_next.chunks_mut(elements)) {
            if let Some(guidance) = &row.guidance {
                guidance.correct(x_next, dims.action_dim, k, steps);
            }
        }
        let moved = out.x_next.chunks(elements).zip(out.mean.chunks(elements));
        for (i, (((trace, draw), row), (x_next, mean))) in
            traces.iter_mut().zip(&draws).zip(&table).zip(moved).enumerate()
        {
            trace.chain.extend_from_slice(x_next);
            let stochastic = noise_at(draw, k).is_some();
            if stochastic {
                // the noise head's standard deviation of each element, else the table's
                let std = |at: usize| match &out.step_std {
                    Some(all) => all.get(i * elements + at).copied().unwrap_or(f32::NAN),
                    None => row.std as f32,
                };
                trace.logprob.extend(logprob::executed(
                    x_next,
                    mean,
                    dims.action_dim,
                    manifest.action_chunk,
                    manifest.env_action_dim,
                    |at, x, mean| {
                        if sampling.safe_logprob {
                            logprob::negative_square(x, mean)
                        } else {
                            logprob::gaussian(x, mean, std(at))
                        }
                    },
                ));
            }
            let wanted = match keep {
                Keep::None => false,
                Keep::First => k == 0,
                Keep::Stochastic => stochastic,
                Keep::Path => true,
            };
            if wanted {
                trace.values.extend(out.value.as_ref().and_then(|v| v.get(i).copied()));
            }
        }
        x = out.x_next;
    }
    if keep == Keep::Path {
        for trace in &mut traces {
            trace.values = vec![mean(&trace.values)];
        }
    }
    Ok(traces)
}
