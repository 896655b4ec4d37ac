//! Records of an iteration's episodes, laid out as one batch.

use policy::{config::LogprobType, plan::RunPlan};
use tch::{Device, Kind, Tensor};
use wire::messages::{Reset, Trajectory};

use super::{
    labels::{Labels, estimate},
    observation::ObservationBatch,
    rows::{Rows, check_chunk},
};
use crate::{
    error::{LearnerError, RecordError, Result},
    ranks::Ranks,
};

/// All chunk records of a rank in an iteration, and the `M` samples to train on, each of one record.
///
/// A sample is a whole chunk, or a single denoise step of a chunk for a two-layer MDP (`mdp = "two_layer"`).
#[derive(Debug)]
pub struct RolloutBatch {
    /// Observations of `N` records.
    pub observations: ObservationBatch,
    /// `x` before each denoise step and after the last, f32 `[N, K + 1, H, A]`.
    pub chain: Tensor,
    /// Index of each sample's record, `[M]`.
    pub record: Vec<i64>,
    /// Stochastic denoise steps of each sample, i64 `[M, S]`; `S` is above 1 only for joint likelihoods.
    pub step: Tensor,
    /// Log-probability at rollout per executed element (joined over the `S` steps), f32 `[M, action_chunk, env_action_dim]`.
    pub old_logprob: Tensor,
    /// Policy version that made the chunk, i64 `[M]`.
    pub version: Tensor,
    /// Index of each sample's episode, `[M]`.
    pub episode: Vec<usize>,
    /// Success of each sample's episode, `[M]`.
    pub success: Vec<bool>,
    /// Number of rows of each sample that the environment executed, `[M]`.
    pub executed: Vec<usize>,
    /// Version of the weights that these records train: the current version plus 1.
    pub trained_version: u64,
    /// Elements that count in the policy loss: the rows that the environment executed before the episode ended. Bool, `[M]` with one
    /// ratio per sample, otherwise `[M, action_chunk]`.
    pub mask: Tensor,
    /// Number of elements of each sample that count in the policy loss, `[M]`.
    pub valid: Vec<u32>,
    /// Lengths of the samples' episodes in elements of `mask`.
    pub policy_episodes: EpisodeLengths,
    /// Lengths of the samples' episodes in samples.
    pub value_episodes: EpisodeLengths,
    /// Value at rollout, f32 `[M]`; zeros without a critic.
    pub old_value: Tensor,
    /// Advantages, normalized over the ranks when configured, f32 `[M]`, or `[M, action_chunk]` for rewards at the action level.
    pub advantages: Tensor,
    /// Value targets, f32 `[M]`.
    pub returns: Tensor,
    /// Totals over the batches of all ranks.
    pub whole: WholeBatch,
}

/// Episode lengths that give every episode the same weight in a mean over samples.
#[derive(Debug)]
pub struct EpisodeLengths {
    /// Valid elements of the sample's episode, f32 `[M]`.
    pub len: Tensor,
    /// Mean number of elements per episode over all ranks, valid or not.
    pub steps: f64,
}

/// Totals over the batches of all ranks in an iteration.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct WholeBatch {
    /// Number of records.
    pub records: usize,
    /// Number of samples.
    pub samples: usize,
    /// Number of samples of the ranks before this rank.
    pub samples_before: usize,
    /// Mean number of samples per episode.
    pub samples_per_episode: f64,
    /// Whether any advantage differs from 0.
    pub informative: bool,
    /// Mean staleness of the samples, in versions; 0 in synchronous training.
    pub staleness_mean: f64,
    /// Largest staleness of a sample, in versions.
    pub staleness_max: u64,
    /// Mean magnitude of the executed actions.
    pub action_magnitude: f64,
}

impl WholeBatch {
    fn new(rows: &Rows, labels: &Labels, version: u64, ranks: &dyn Ranks) -> Result<Self> {
        let staleness = || rows.version.iter().map(|of| version - *of as u64);
        let samples_by_rank = ranks.gather(rows.record.len() as f64)?;
        let [records, episodes, informative, staleness_sum, magnitude] = ranks.sum_numbers([
            rows.records as f64,
            labels.episodes as f64,
            labels.advantages.iter().filter(|advantage| **advantage != 0.0).count() as f64,
            staleness().sum::<u64>() as f64,
            rows.magnitude,
        ])?;
        let staleness_max = ranks.largest(staleness().max().unwrap_or(0) as f64)?;
        let samples: f64 = samples_by_rank.iter().sum();
        Ok(Self {
            records: records as usize,
            samples: samples as usize,
            samples_before: samples_by_rank[..ranks.rank()].iter().sum::<f64>() as usize,
            samples_per_episode: samples / episodes.max(1.0),
            informative: informative > 0.0,
            staleness_mean: staleness_sum / samples.max(1.0),
            staleness_max: staleness_max as u64,
            action_magnitude: magnitude / records.max(1.0),
        })
    }
}

impl RolloutBatch {
    /// Checks every record against the plan and estimates the advantages. The weights are at `version`; records are of `version` or up
    /// to `rollout.max_staleness` versions older. A record is freed as soon as it is laid out.
    ///
    /// # Errors
    /// A record does not fit (the error names its episode), or the exchange between ranks failed.
    pub fn new(plan: &RunPlan, mut trajectories: Vec<Trajectory>, version: u64, ranks: &dyn Ranks) -> Result<Self> {
        let records = trajectories.iter().map(|trajectory| trajectory.chunks.len()).sum();
        let mut rows = Rows::new(plan, records);
        // by episode and sample
        let mut values: Vec<Vec<f32>> = Vec::with_capacity(trajectories.len());
        for trajectory in &mut trajectories {
            let from = rows.value.len();
            push_records(plan, trajectory, version, &mut rows)?;
            values.push(rows.value[from..].to_vec());
        }
        // samples per chunk: its denoise steps for a two-layer MDP, otherwise 1
        let inner = rows.record.len() / records.max(1);
        let estimated = estimate(plan, &trajectories, &values, inner)?;
        let labels = Labels::new(plan, &trajectories, &estimated, inner, ranks)?;
        let whole = WholeBatch::new(&rows, &labels, version, ranks)?;
        Ok(lay_out(plan, rows, labels, whole, version))
    }

    /// Moves the batch to the device that trains. Pixels and prompts stay; each prefix pass moves its own rows.
    #[must_use]
    pub fn to_device(mut self, device: Device) -> Self {
        let lengths = [&mut self.policy_episodes.len, &mut self.value_episodes.len];
        let own = [
            &mut self.observations.state,
            &mut self.chain,
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

    /// Returns the number of samples of this rank.
    pub fn len(&self) -> usize {
        self.record.len()
    }

    /// Returns whether this rank has 0 samples.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// Adds the records of an episode, whose chunks are full except the last. Takes the records out, so that the images are freed at once.
fn push_records(plan: &RunPlan, trajectory: &mut Trajectory, version: u64, rows: &mut Rows) -> Result<()> {
    let Reset { env, episode, .. } = trajectory.reset;
    let chunks = trajectory.chunks.len();
    for (at, chunk) in trajectory.chunks.iter_mut().enumerate() {
        let (executed, last) = (chunk.rewards.len(), at + 1 == chunks);
        let record = chunk.record.take().ok_or(RecordError::Missing { chunk: at });
        record
            .and_then(|record| {
                check_chunk(plan, &record, executed, last, version)?;
                rows.push(plan, &record)
            })
            .map_err(|source| LearnerError::Trajectory { env, episode, source })?;
    }
    Ok(())
}

/// Converts rows into tensors.
fn lay_out(plan: &RunPlan, rows: Rows, labels: Labels, whole: WholeBatch, version: u64) -> RolloutBatch {
    let dims = &plan.dims;
    let model = &plan.config.actor.model;
    let (n, m) = (rows.records, rows.record.len() as i64);
    let (horizon, action_dim) = (dims.action_horizon as i64, dims.action_dim as i64);
    let (chunk, width) = (model.num_action_chunks as i64, model.env_action_dim as i64);
    let observations = ObservationBatch {
        images: rows.images,
        image_mask: Tensor::from_slice(&rows.image_mask).view([n, dims.cameras as i64]),
        prompt: Tensor::from_slice(&rows.prompt).view([n, dims.prompt_len as i64]),
        prompt_mask: Tensor::from_slice(&rows.prompt_mask).view([n, dims.prompt_len as i64]),
        state: Tensor::from_slice(&rows.state).view([n, action_dim]),
    };
    let (mask, valid, policy_len, elements) = match plan.config.algorithm.logprob_type {
        LogprobType::ChunkLevel => {
            let mask = Tensor::ones([m], (Kind::Bool, Device::Cpu));
            (mask, vec![1; labels.executed.len()], &labels.episode_records, 1)
        }
        LogprobType::ActionLevel | LogprobType::TokenLevel => {
            let executed = labels.executed.iter();
            let flags: Vec<bool> = executed
                .flat_map(|executed| (0..chunk as usize).map(move |row| row < *executed))
                .collect();
            let valid = labels.executed.iter().map(|executed| *executed as u32).collect();
            (
                Tensor::from_slice(&flags).view([m, chunk]),
                valid,
                &labels.episode_rows,
                chunk,
            )
        }
    };
    let mut advantages = Tensor::from_slice(&labels.advantages);
    if labels.width > 1 {
        advantages = advantages.view([m, labels.width as i64]);
    }
    let steps = if m == 0 { 1 } else { rows.step.len() as i64 / m };
    RolloutBatch {
        observations,
        chain: Tensor::from_slice(&rows.chain).view([n, model.num_steps as i64 + 1, horizon, action_dim]),
        record: rows.record,
        step: Tensor::from_slice(&rows.step).view([m, steps]),
        old_logprob: Tensor::from_slice(&rows.logprob).view([m, chunk, width]),
        version: Tensor::from_slice(&rows.version),
        trained_version: version + 1,
        mask,
        valid,
        policy_episodes: EpisodeLengths {
            len: Tensor::from_slice(policy_len),
            steps: whole.samples_per_episode * elements as f64,
        },
        value_episodes: EpisodeLengths {
            len: Tensor::from_slice(&labels.episode_records),
            steps: whole.samples_per_episode,
        },
        episode: labels.episode,
        success: labels.success,
        executed: labels.executed,
        old_value: Tensor::from_slice(&rows.value),
        advantages,
        returns: Tensor::from_slice(&labels.returns),
        whole,
    }
}
