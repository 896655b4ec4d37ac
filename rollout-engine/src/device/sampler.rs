//! Sampling of action chunks: rows become a batch with its denoise path, the results of the denoise steps become chunks.

use std::time::{Duration, Instant};

use policy::{
    bundle::Manifest,
    flow::{DenoiseStep, Mdp, Schedule, StepDraw},
    guidance::Guidance,
    logprob,
    noise::{ChunkNoise, NoiseKey, StepNoise},
    params::{CriticInput, ValueSteps},
    selftest::SelfTestInput,
    transform::ModelInput,
};
use wire::messages::Mode;

use super::{Device, DeviceError, PathStep, PrefixBatch, SelfTestRun, Slot, StepOutput, StepPath};

/// Error of sampling.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SampleError {
    /// The device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The noise has a step outside the step table.
    #[error("denoise step {step} is not in the step table of {steps} steps")]
    Step {
        /// Index of the step.
        step: usize,
        /// Steps of the table.
        steps: usize,
    },
    /// The batch has no rows.
    #[error("a batch needs at least one row")]
    Empty,
    /// The device returned fewer numbers than the batch has rows.
    #[error("the device returned fewer numbers than the batch has rows")]
    Short,
}

/// Inputs of one action chunk.
#[derive(Debug, Clone, PartialEq)]
pub struct ChunkInput {
    /// The observation in model units.
    pub input: ModelInput,
    /// Initial noise, and noise of the stochastic steps.
    pub noise: ChunkNoise,
    /// Key of the noise.
    pub key: NoiseKey,
    /// The chunk to continue from; only allowed without stochastic steps.
    pub guidance: Option<Guidance>,
}

/// One sampled action chunk in model units.
#[derive(Debug, Clone, PartialEq)]
pub struct SampledChunk {
    /// The observation in model units, for the record.
    pub input: ModelInput,
    /// Key of the noise.
    pub key: NoiseKey,
    /// `x` before each step and after the last, `[num_steps + 1, action_horizon, action_dim]`.
    pub chain: Vec<f32>,
    /// Elements of one `x`: `action_horizon * action_dim`.
    elements: usize,
    /// The stochastic steps in order, `S` of them.
    pub denoise_steps: Vec<usize>,
    /// Log-probability per element of each stochastic step, `[S, action_chunk, env_action_dim]`.
    pub logprob: Vec<f32>,
    /// Values: one per stochastic step with `V_expert` at these steps, one with `V_vlm` or `V_expert` over the path; empty without
    /// a critic.
    pub values: Vec<f32>,
}

impl SampledChunk {
    /// Returns the sampled actions, `[action_horizon, action_dim]`.
    pub fn actions(&self) -> &[f32] {
        let (_, actions) = self.chain.split_at(self.chain.len().saturating_sub(self.elements));
        actions
    }

    /// Returns the value of the observation: the first step's value for a two-layer MDP, otherwise the mean over steps.
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

/// Chunks of a batch, with durations.
#[derive(Debug, Default)]
pub struct Sampled {
    /// Chunks in the order of the rows.
    pub chunks: Vec<SampledChunk>,
    /// Duration of the prefix graph, including batch assembly.
    pub prefix: Duration,
    /// Duration of all denoise steps.
    pub denoise: Duration,
}

/// The denoise steps whose values are kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum ValueAt {
    None,
    First,
    Stochastic,
    /// Every step; the mean is kept.
    Path,
}

/// Sampler of one policy version.
#[derive(Debug)]
pub struct Sampler {
    manifest: Manifest,
    schedule: Schedule,
    value_at: ValueAt,
}

impl Sampler {
    /// Returns the sampler of a policy version.
    pub fn new(manifest: Manifest) -> Self {
        let value_at = match &manifest.heads.value {
            None => ValueAt::None,
            Some(head) if head.input == CriticInput::Vlm => ValueAt::First,
            Some(head) if head.steps == ValueSteps::Path => ValueAt::Path,
            Some(_) => ValueAt::Stochastic,
        };
        Self {
            schedule: Schedule::of(&manifest.sampling),
            manifest,
            value_at,
        }
    }

    /// Returns the manifest of the version.
    pub fn manifest(&self) -> &Manifest {
        &self.manifest
    }

    /// Returns the elements of one `x`.
    fn elements(&self) -> usize {
        self.manifest.dims.action_horizon * self.manifest.dims.action_dim
    }

    /// Draws the noise of the chunk identified by `key`; evaluation draws the initial noise only.
    pub fn draw(&self, key: NoiseKey, mode: Mode) -> ChunkNoise {
        let steps = match mode {
            Mode::Train => self.schedule.draw(),
            Mode::Eval => StepDraw::Every { of: 0 },
        };
        ChunkNoise::draw(key, self.elements(), steps)
    }

    /// Draws the inputs of a self-test from a seed.
    ///
    /// # Errors
    /// The step table is empty.
    pub fn self_test(&self, seed: u64) -> Result<SelfTestRun, SampleError> {
        let (input, initial) = drawn_input(&self.manifest, seed);
        let row = ChunkInput {
            input,
            noise: ChunkNoise {
                initial,
                steps: Vec::new(),
            },
            key: NoiseKey {
                seed: 0,
                env: 0,
                episode: 0,
                chunk: 0,
            },
            guidance: None,
        };
        let rows = vec![&row; self.manifest.batch.unwrap_or(1)];
        Ok(SelfTestRun {
            prefix: Self::prefix_batch(&rows),
            path: self.path(&rows)?,
        })
    }

    /// Samples action chunks for `rows` on the version in `slot`. With `fixed`, every batch has exactly `fixed` rows, padded by
    /// repeating the first row; graphs with a fixed batch size keep their size.
    ///
    /// Matrix products over different numbers of rows may sum in a different order. With a fixed number of rows, a row's result
    /// depends on the row only, neither on the other rows nor on its position.
    ///
    /// # Errors
    /// The device fails.
    pub fn sample<D: Device>(
        &self,
        device: &mut D,
        slot: Slot,
        rows: Vec<ChunkInput>,
        fixed: Option<usize>,
    ) -> Result<Sampled, SampleError> {
        let Some(fixed) = self.manifest.batch.or(fixed) else {
            return self.sample_batch(device, slot, rows, 0);
        };
        let mut all = Sampled::default();
        let mut rest = rows.into_iter();
        loop {
            let part: Vec<_> = rest.by_ref().take(fixed.max(1)).collect();
            if part.is_empty() {
                return Ok(all);
            }
            let padding = fixed.saturating_sub(part.len());
            let sampled = self.sample_batch(device, slot, part, padding)?;
            all.chunks.extend(sampled.chunks);
            all.prefix += sampled.prefix;
            all.denoise += sampled.denoise;
        }
    }

    fn sample_batch<D: Device>(
        &self,
        device: &mut D,
        slot: Slot,
        rows: Vec<ChunkInput>,
        padding: usize,
    ) -> Result<Sampled, SampleError> {
        let first = rows.first().ok_or(SampleError::Empty)?;
        let padded: Vec<&ChunkInput> = rows.iter().chain(std::iter::repeat_n(first, padding)).collect();
        let begun = Instant::now();
        let prefix = device.prefix(slot, Self::prefix_batch(&padded))?;
        let prefix_time = begun.elapsed();
        let begun = Instant::now();
        let path = self.path(&padded)?;
        let steps = device.denoise(slot, &prefix, &path)?;
        let chunks = self.chunks(rows, &path, &steps)?;
        let (prefix, denoise) = device.durations().unwrap_or((prefix_time, begun.elapsed()));
        Ok(Sampled {
            chunks,
            prefix,
            denoise,
        })
    }

    /// Assembles a batch.
    pub(crate) fn prefix_batch(rows: &[&ChunkInput]) -> PrefixBatch {
        PrefixBatch {
            rows: rows.len(),
            images: rows.iter().flat_map(|row| row.input.images.iter().copied()).collect(),
            image_mask: rows
                .iter()
                .flat_map(|row| row.input.image_mask.iter().copied())
                .collect(),
            prompt: rows.iter().flat_map(|row| row.input.prompt.iter().copied()).collect(),
            prompt_mask: rows
                .iter()
                .flat_map(|row| row.input.prompt_mask.iter().copied())
                .collect(),
            state: rows.iter().flat_map(|row| row.input.state.iter().copied()).collect(),
        }
    }

    /// Returns the denoise steps of a batch; a row is stochastic at the steps for which it has noise.
    pub(crate) fn path(&self, rows: &[&ChunkInput]) -> Result<StepPath, SampleError> {
        let (steps, elements) = (self.schedule.num_steps(), self.elements());
        let step = |k: usize| {
            let missing = SampleError::Step { step: k, steps };
            let table: Vec<&DenoiseStep> = rows
                .iter()
                .map(|row| self.schedule.row(k, noise_at(&row.noise, k).is_some()))
                .collect::<Option<_>>()
                .ok_or(missing)?;
            Ok(PathStep {
                // both tables have the same flow times
                t: table.first().ok_or(SampleError::Empty)?.t,
                c_x: table.iter().map(|row| row.mean_coefficients().0 as f32).collect(),
                c_v: table.iter().map(|row| row.mean_coefficients().1 as f32).collect(),
                std: table.iter().map(|row| row.std as f32).collect(),
                z: rows
                    .iter()
                    .flat_map(|row| noise_at(&row.noise, k).map_or_else(|| vec![0.0; elements], |s| s.z.clone()))
                    .collect(),
            })
        };
        Ok(StepPath {
            initial: rows.iter().flat_map(|row| row.noise.initial.iter().copied()).collect(),
            steps: (0..steps).map(step).collect::<Result<_, SampleError>>()?,
            guidance: rows.iter().map(|row| row.guidance.clone()).collect(),
        })
    }

    /// Cuts the device's denoise steps into chunks, without the padding rows.
    fn chunks(
        &self,
        rows: Vec<ChunkInput>,
        path: &StepPath,
        steps: &[StepOutput],
    ) -> Result<Vec<SampledChunk>, SampleError> {
        let elements = self.elements();
        let of_row = |all: &[f32], i: usize| all.get(i * elements..(i + 1) * elements).map(<[f32]>::to_vec);
        let mut chunks = Vec::with_capacity(rows.len());
        for (i, row) in rows.into_iter().enumerate() {
            let (mut chain, mut logprob, mut values) = (row.noise.initial.clone(), Vec::new(), Vec::new());
            for (k, (output, step)) in steps.iter().zip(&path.steps).enumerate() {
                let x_next = of_row(&output.x_next, i).ok_or(SampleError::Short)?;
                let stochastic = noise_at(&row.noise, k).is_some();
                if stochastic {
                    let mean = of_row(&output.mean, i).ok_or(SampleError::Short)?;
                    // the noise head's standard deviation per element, otherwise the table's
                    let std = match &output.step_std {
                        Some(all) => of_row(all, i).ok_or(SampleError::Short)?,
                        None => vec![*step.std.get(i).ok_or(SampleError::Short)?; elements],
                    };
                    logprob.extend(self.logprob(&x_next, &mean, &std));
                }
                let kept = match self.value_at {
                    ValueAt::None => false,
                    ValueAt::First => k == 0,
                    ValueAt::Stochastic => stochastic,
                    ValueAt::Path => true,
                };
                if kept {
                    let value = output.value.as_ref().and_then(|values| values.get(i));
                    values.push(*value.ok_or(SampleError::Short)?);
                }
                chain.extend(x_next);
            }
            if self.value_at == ValueAt::Path {
                values = vec![mean(&values)];
            }
            chunks.push(SampledChunk {
                input: row.input,
                key: row.key,
                chain,
                elements,
                denoise_steps: row.noise.steps.into_iter().map(|s| s.step).collect(),
                logprob,
                values,
            });
        }
        Ok(chunks)
    }

    /// Returns the log-probability of a stochastic step, `[action_chunk, env_action_dim]`; all arguments are `[action_horizon,
    /// action_dim]`.
    pub(crate) fn logprob(&self, x_next: &[f32], mean: &[f32], std: &[f32]) -> Vec<f32> {
        let (manifest, safe) = (&self.manifest, self.manifest.sampling.safe_logprob);
        logprob::executed(
            x_next,
            mean,
            manifest.dims.action_dim,
            manifest.action_chunk,
            manifest.env_action_dim,
            |at, x, mean| {
                if safe {
                    logprob::negative_square(x, mean)
                } else {
                    // `at` is an index into `x_next`, which has the same length
                    logprob::gaussian(x, mean, std[at])
                }
            },
        )
    }
}

/// Returns the noise of step `k`; `None` if the step is not stochastic.
fn noise_at(noise: &ChunkNoise, k: usize) -> Option<&StepNoise> {
    noise.steps.iter().find(|s| s.step == k)
}

/// Draws an observation in model units and its initial noise, `[action_horizon, action_dim]`, from a seed.
pub fn drawn_input(manifest: &Manifest, seed: u64) -> (ModelInput, Vec<f32>) {
    let SelfTestInput { input, noise } = SelfTestInput::draw(&manifest.dims, seed);
    (input, noise)
}
