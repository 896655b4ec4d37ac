//! The records of an iteration's episodes, laid out as one batch.

use policy::{
    config::{JointLogprob, LogprobType},
    flow::{Mdp, Schedule},
    logprob,
    params::{CriticInput, ValueSteps},
    plan::RunPlan,
};
use tch::{Device, Kind, Tensor};
use wire::messages::{ChunkRecord, Reset, Trajectory};

use super::{
    labels::{Labels, estimate},
    observation::ObservationBatch,
};
use crate::error::{LearnerError, RecordError, Result};

/// All chunk records of an iteration, and the decisions to train on: `M` samples, each of one record.
///
/// A sample is a whole chunk, or a single denoise step of one when every step is a transition of its own (`mdp = "two_layer"`).
#[derive(Debug)]
pub struct RolloutBatch {
    /// What was seen, `N` records.
    pub observations: ObservationBatch,
    /// `x` before each denoise step and after the last, f32 `[N, K + 1, H, A]`.
    pub chain: Tensor,
    /// Which record, i64 `[M]`.
    pub record: Tensor,
    /// Which stochastic denoise steps, i64 `[M, S]`; `S` is above 1 for joint likelihoods only.
    pub step: Tensor,
    /// Log-probability at rollout per executed element (joined over the `S` steps), f32 `[M, action_chunk, env_action_dim]`.
    pub old_logprob: Tensor,
    /// Policy version that made the chunk, i64 `[M]`.
    pub version: Tensor,
    /// Which episode each sample is of, `[M]`.
    pub episode: Vec<usize>,
    /// Whether that episode succeeded, `[M]`.
    pub success: Vec<bool>,
    /// Rows that the environment executed of each sample, `[M]`.
    pub executed: Vec<usize>,
    /// Version of the weights that these records train: one after the version that they are read at.
    pub trained_version: u64,
    /// Mean number of versions that the samples are older than the one that they are read at; 0 in synchronous training.
    pub staleness_mean: f64,
    /// The largest.
    pub staleness_max: u64,
    /// Elements that count in the policy loss, bool: `[M]` with one ratio per sample, else `[M, action_chunk]`: the rows that the
    /// environment executed before the episode ended.
    pub mask: Tensor,
    /// How many of them each sample has.
    pub valid: Vec<u32>,
    /// Lengths of the samples' episodes in elements of `mask`.
    pub policy_episodes: EpisodeLengths,
    /// Lengths of the samples' episodes in samples.
    pub value_episodes: EpisodeLengths,
    /// Value at rollout, f32 `[M]`; zeros without a critic.
    pub old_value: Tensor,
    /// Advantages, normalized when configured, f32 `[M]`, or `[M, action_chunk]` where rewards are at the action level.
    pub advantages: Tensor,
    /// Whether any advantage differs from 0.
    pub informative: bool,
    /// Value targets, f32 `[M]`.
    pub returns: Tensor,
    /// Mean magnitude of the executed actions.
    pub action_magnitude: f64,
}

/// What gives every episode the same weight in a mean over samples.
#[derive(Debug)]
pub struct EpisodeLengths {
    /// Valid elements of the sample's episode, f32 `[M]`.
    pub len: Tensor,
    /// Elements per episode on average, valid or not.
    pub steps: f64,
}

#[derive(Default)]
struct Rows {
    images: Vec<u8>,
    image_mask: Vec<bool>,
    prompt: Vec<i64>,
    prompt_mask: Vec<bool>,
    state: Vec<f32>,
    chain: Vec<f32>,
    records: i64,
    record: Vec<i64>,
    step: Vec<i64>,
    logprob: Vec<f32>,
    /// Values of the samples.
    value: Vec<f32>,
    version: Vec<i64>,
    episode: Vec<usize>,
    success: Vec<bool>,
    magnitude: f64,
}

impl RolloutBatch {
    /// Checks every record against the plan and estimates the advantages. The weights are at `version`; records are of it, or
    /// up to `rollout.max_staleness` versions older.
    ///
    /// # Errors
    /// Names the episode whose record does not fit.
    pub fn new(plan: &RunPlan, trajectories: &[Trajectory], version: u64) -> Result<Self> {
        let mut rows = Rows::default();
        let mut values: Vec<Vec<f32>> = Vec::with_capacity(trajectories.len());
        for (index, trajectory) in trajectories.iter().enumerate() {
            let from = rows.value.len();
            let Reset { env, episode, .. } = trajectory.reset;
            for at in 0..trajectory.chunks.len() {
                let record = checked(plan, trajectory, at, version)?;
                rows.push(plan, record)
                    .map_err(|source| LearnerError::Trajectory { env, episode, source })?;
            }
            values.push(rows.value.get(from..).unwrap_or_default().to_vec());
            rows.episode.resize(rows.value.len(), index);
            rows.success.resize(rows.value.len(), trajectory.success);
        }
        // samples per chunk: its denoise steps, where each is a transition of its own
        let inner = rows.record.len() / (rows.records as usize).max(1);
        let estimated = estimate(plan, trajectories, &values, inner)?;
        let labels = Labels::new(plan, trajectories, &estimated, inner);
        Ok(rows.into_batch(plan, labels, version))
    }

    /// The same on the device that trains on it; pixels and prompts stay where they are, their rows move as they are encoded.
    #[must_use]
    pub fn to_device(mut self, device: Device) -> Self {
        let lengths = [&mut self.policy_episodes.len, &mut self.value_episodes.len];
        let own = [
            &mut self.observations.state,
            &mut self.chain,
            &mut self.record,
            &mut self.step,
            &mut self.old_logprob,
            &mut self.version,
            &mut self.mask,
            &mut self.old_value,
            &mut self.advantages,
            &mut self.returns,
        ];
        for tensor in own.into_iter().chain(lengths) {
            *tensor = tensor.to_device(device);
        }
        self
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.record.numel()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The record of chunk `at`, of a version that may be read and of an episode whose chunks are full but for the last.
fn checked<'a>(plan: &RunPlan, trajectory: &'a Trajectory, at: usize, version: u64) -> Result<&'a ChunkRecord> {
    let Reset { env, episode, .. } = trajectory.reset;
    let refuse = |detail: String| LearnerError::Record { env, episode, detail };
    let chunk = trajectory.chunks.get(at);
    let record = chunk.and_then(|chunk| chunk.record.as_deref());
    let record = record.ok_or_else(|| refuse("a training episode came without its chunk records".to_owned()))?;
    let oldest = plan.oldest(version);
    if !(oldest..=version).contains(&record.version) {
        let expected = if oldest == version {
            version.to_string()
        } else {
            format!("{oldest} to {version}")
        };
        return Err(refuse(format!(
            "chunk {} is of version {}, expected {expected}",
            record.key.chunk, record.version
        )));
    }
    let full = plan.config.actor.model.num_action_chunks;
    let executed = chunk.map_or(0, |chunk| chunk.rewards.len());
    let last = at + 1 == trajectory.chunks.len();
    if executed == 0 || executed > full || (executed < full && !last) {
        return Err(refuse(format!(
            "chunk {} has {executed} rewards, expected {full}, or 1 to {full} in the last chunk of the episode",
            record.key.chunk
        )));
    }
    Ok(record)
}

impl Rows {
    fn push(&mut self, plan: &RunPlan, record: &ChunkRecord) -> Result<(), RecordError> {
        let dims = &plan.dims;
        let model = &plan.config.actor.model;
        let (side, horizon, width) = (dims.vision.image_size, dims.action_horizon, dims.action_dim);
        let images = record.images.as_u8("images", Some(&[dims.cameras, side, side, 3]))?;
        let state = record.state.to_f32("state", Some(&[width]))?;
        let chain = record
            .chain
            .to_f32("chain", Some(&[model.num_steps + 1, horizon, width]))?;
        let (rows, cols) = (model.num_action_chunks, model.env_action_dim);
        let lengths = (record.image_mask.len(), record.prompt.len(), record.prompt_mask.len());
        if lengths != (dims.cameras, dims.prompt_len, dims.prompt_len) {
            return Err(RecordError::Field("masks and prompt", format!("lengths {lengths:?}")));
        }
        let elements = horizon * width;
        let at = |k: usize| &chain[k * elements..(k + 1) * elements];
        let schedule = Schedule::of(&plan.sampling(record.version));
        let steps: Vec<i64> = record.denoise_steps.iter().map(|s| i64::from(*s)).collect();
        if steps.len() != schedule.stochastic_steps() || steps.iter().any(|s| *s >= schedule.drawable as i64) {
            return Err(RecordError::Field("denoise_steps", format!("{steps:?}")));
        }
        let logprob = match &record.logprob {
            // an ODE sample has no density
            None if steps.is_empty() => Vec::new(),
            None => return Err(RecordError::Field("logprob", "none".to_owned())),
            Some(logprob) => logprob.to_f32("logprob", Some(&[steps.len(), rows, cols]))?,
        };
        let values = match &plan.heads.value {
            None => vec![0.0],
            Some(head) => {
                let one = head.input == CriticInput::Vlm || head.steps == ValueSteps::Path;
                let expected = if one { 1 } else { steps.len() };
                if record.values.len() != expected {
                    return Err(RecordError::Field(
                        "values",
                        format!("{} of {expected}", record.values.len()),
                    ));
                }
                record.values.clone()
            }
        };
        match model.openpi.mdp {
            Mdp::TwoLayer => {
                for (s, step) in steps.iter().enumerate() {
                    self.record.push(self.records);
                    self.version.push(record.version as i64);
                    self.step.push(*step);
                    self.value.extend(values.get(s).or(values.first()));
                }
                self.logprob.extend(&logprob);
            }
            Mdp::Hybrid | Mdp::Joint => {
                self.record.push(self.records);
                self.version.push(record.version as i64);
                self.value.push(values.iter().sum::<f32>() / values.len().max(1) as f32);
                let initial = logprob::executed(at(0), at(0), width, rows, cols, |_, x, _| {
                    logprob::gaussian(x, 0.0, 1.0)
                });
                let joined = joint(model.openpi.joint_logprob, &logprob, model.num_steps, &initial);
                self.step.extend(steps);
                self.logprob.extend(joined);
            }
        }
        self.records += 1;
        self.images.extend_from_slice(images);
        self.image_mask.extend(&record.image_mask);
        self.prompt.extend(&record.prompt);
        self.prompt_mask.extend(&record.prompt_mask);
        self.state.extend(state);
        self.chain.extend_from_slice(&chain);
        let executed = at(model.num_steps);
        let sum: f32 = executed
            .chunks(width)
            .take(rows)
            .flat_map(|r| r.iter().take(cols))
            .map(|v| v.abs())
            .sum();
        self.magnitude += f64::from(sum) / (rows * cols) as f64;
        Ok(())
    }

    fn into_batch(self, plan: &RunPlan, labels: Labels, version: u64) -> RolloutBatch {
        let dims = &plan.dims;
        let model = &plan.config.actor.model;
        let (n, m) = (self.records, self.record.len() as i64);
        let (side, cameras) = (dims.vision.image_size as i64, dims.cameras as i64);
        let (horizon, action_dim) = (dims.action_horizon as i64, dims.action_dim as i64);
        let (rows, cols) = (model.num_action_chunks as i64, model.env_action_dim as i64);
        let observations = ObservationBatch {
            images: Tensor::from_slice(&self.images).view([n, cameras, side, side, 3]),
            image_mask: Tensor::from_slice(&self.image_mask).view([n, cameras]),
            prompt: Tensor::from_slice(&self.prompt).view([n, dims.prompt_len as i64]),
            prompt_mask: Tensor::from_slice(&self.prompt_mask).view([n, dims.prompt_len as i64]),
            state: Tensor::from_slice(&self.state).view([n, action_dim]),
        };
        let by_chunk = plan.config.algorithm.logprob_type == LogprobType::ChunkLevel;
        let (mask, valid, lengths, width) = if by_chunk {
            let mask = Tensor::ones([m], (Kind::Bool, Device::Cpu));
            (mask, vec![1; labels.executed.len()], &labels.episode_records, 1)
        } else {
            let flags: Vec<bool> = labels
                .executed
                .iter()
                .flat_map(|executed| (0..rows as usize).map(move |row| row < *executed))
                .collect();
            let valid = labels.executed.iter().map(|executed| *executed as u32).collect();
            (
                Tensor::from_slice(&flags).view([m, rows]),
                valid,
                &labels.episode_rows,
                rows,
            )
        };
        let per_episode = m as f64 / (labels.episodes.max(1)) as f64;
        let mut advantages = Tensor::from_slice(&labels.advantages);
        if labels.width > 1 {
            advantages = advantages.view([m, labels.width as i64]);
        }
        let steps = if m == 0 { 1 } else { self.step.len() as i64 / m };
        let staleness = |of: &i64| version - (*of as u64).min(version);
        RolloutBatch {
            observations,
            chain: Tensor::from_slice(&self.chain).view([n, model.num_steps as i64 + 1, horizon, action_dim]),
            record: Tensor::from_slice(&self.record),
            step: Tensor::from_slice(&self.step).view([m, steps]),
            old_logprob: Tensor::from_slice(&self.logprob).view([m, rows, cols]),
            version: Tensor::from_slice(&self.version),
            episode: self.episode,
            success: self.success,
            executed: labels.executed,
            trained_version: version + 1,
            staleness_mean: self.version.iter().map(staleness).sum::<u64>() as f64 / (m.max(1)) as f64,
            staleness_max: self.version.iter().map(staleness).max().unwrap_or(0),
            mask,
            valid,
            policy_episodes: EpisodeLengths {
                len: Tensor::from_slice(lengths),
                steps: per_episode * width as f64,
            },
            value_episodes: EpisodeLengths {
                len: Tensor::from_slice(&labels.episode_records),
                steps: per_episode,
            },
            old_value: Tensor::from_slice(&self.value),
            informative: labels.advantages.iter().any(|advantage| *advantage != 0.0),
            advantages,
            returns: Tensor::from_slice(&labels.returns),
            action_magnitude: self.magnitude / (n.max(1)) as f64,
        }
    }
}

/// The log-probability per element of one decision from those of its stochastic steps, `logprob` `[steps, elements]`, and of the initial
/// noise, `[elements]`. A mean is over all `num_steps` and the noise, where a step without density has none, as in the reference. Without
/// a rule there is one step.
fn joint(rule: Option<JointLogprob>, logprob: &[f32], num_steps: usize, initial: &[f32]) -> Vec<f32> {
    let elements = initial.len();
    (0..elements)
        .map(|e| {
            let sum: f32 = logprob.iter().skip(e).step_by(elements.max(1)).sum();
            match rule {
                Some(JointLogprob::Mean) => (sum + initial.get(e).copied().unwrap_or(0.0)) / (num_steps + 1) as f32,
                Some(JointLogprob::Sum) | None => sum,
            }
        })
        .collect()
}
