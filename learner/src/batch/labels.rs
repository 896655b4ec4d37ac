//! Labels of an iteration's samples: advantages, value targets, and lengths of the episodes.

use policy::{
    config::{BootstrapType, RewardType},
    plan::RunPlan,
};
use wire::messages::{Reset, Trajectory};

use crate::{
    advantage::{Advantages, Episode, EstimatorSettings, LayeredEpisode, normalize},
    collect::filter::group_ids,
    error::{LearnerError, RecordError, Result},
    method,
    ranks::Ranks,
};

/// Estimates the advantages of the episodes at the level of the rewards, not normalized. `values` are by episode and sample. A chunk
/// has `samples` values: one per denoise step for a two-layer MDP, otherwise 1.
pub(crate) fn estimate(
    plan: &RunPlan,
    trajectories: &[Trajectory],
    values: &[Vec<f32>],
    samples: usize,
) -> Result<Vec<Advantages>> {
    let algorithm = &plan.config.algorithm;
    let estimator = method::estimator(plan)?;
    let critic = plan.heads.value.is_some();
    let by_action = algorithm.reward_type == RewardType::ActionLevel;
    let rewards = |trajectory: &Trajectory| -> Vec<f32> {
        let chunks = trajectory.chunks.iter();
        if by_action {
            chunks.flat_map(|c| c.rewards.iter().copied()).collect()
        } else {
            chunks.map(|c| c.rewards.iter().sum()).collect()
        }
    };
    let rewards: Vec<Vec<f32>> = trajectories.iter().map(rewards).collect();
    let groups = group_ids(trajectories.iter().map(|t| &t.reset));
    let of_chunks: Vec<Vec<f32>> = values
        .iter()
        .map(|v| v.iter().copied().step_by(samples.max(1)).collect())
        .collect();
    let episodes: Vec<Episode<'_>> = trajectories
        .iter()
        .zip(&groups)
        .zip(rewards.iter().zip(&of_chunks))
        .map(|((trajectory, group), (rewards, values))| {
            Ok(Episode {
                rewards,
                chunk_len: if by_action {
                    plan.config.actor.model.num_action_chunks
                } else {
                    1
                },
                values: if critic { values } else { &[] },
                final_value: final_value(trajectory, algorithm.bootstrap_type)?,
                group: *group,
            })
        })
        .collect::<Result<_>>()?;
    let settings = EstimatorSettings {
        gamma: algorithm.gamma,
        gae_lambda: algorithm.gae_lambda,
    };
    if samples > 1
        && let Some(layered) = estimator.layered
    {
        let layers: Vec<LayeredEpisode<'_>> = episodes
            .iter()
            .zip(values)
            .map(|(episode, values)| LayeredEpisode {
                rewards: episode.rewards,
                values,
                steps: samples,
                final_value: episode.final_value,
            })
            .collect();
        return Ok(layered(&layers, settings)?);
    }
    let per_chunk = (estimator.estimate)(&episodes, settings)?;
    Ok(per_chunk.into_iter().map(|a| repeated(a, samples)).collect())
}

/// Repeats each chunk's advantage and return for every sample of the chunk.
fn repeated(chunks: Advantages, samples: usize) -> Advantages {
    let each = |v: Vec<f32>| v.into_iter().flat_map(|x| std::iter::repeat_n(x, samples)).collect();
    Advantages {
        advantages: each(chunks.advantages),
        returns: each(chunks.returns),
    }
}

/// Returns the value of the episode's last observation, or 0 where `bootstrap` does not use the value.
fn final_value(trajectory: &Trajectory, bootstrap: BootstrapType) -> Result<f32> {
    let wanted = match bootstrap {
        BootstrapType::None => false,
        BootstrapType::Truncation => !trajectory.terminated,
        BootstrapType::Always => true,
    };
    if !wanted {
        return Ok(0.0);
    }
    let Reset { env, episode, .. } = trajectory.reset;
    trajectory.final_value.ok_or(LearnerError::Trajectory {
        env,
        episode,
        source: RecordError::NoFinalValue {
            terminated: trajectory.terminated,
        },
    })
}

/// Labels of `N` samples, in their order.
#[derive(Debug, Default)]
pub(crate) struct Labels {
    /// Advantages `[N * width]`; 0 for a row that was not executed.
    pub(crate) advantages: Vec<f32>,
    /// Advantages per sample: 1, or the rows of a chunk.
    pub(crate) width: usize,
    /// Value targets `[N]`.
    pub(crate) returns: Vec<f32>,
    /// Index of each sample's episode.
    pub(crate) episode: Vec<usize>,
    /// Success of each sample's episode.
    pub(crate) success: Vec<bool>,
    /// Number of executed rows of each sample.
    pub(crate) executed: Vec<usize>,
    /// Number of samples of each sample's episode.
    pub(crate) episode_records: Vec<f32>,
    /// Number of executed rows of each sample's episode.
    pub(crate) episode_rows: Vec<f32>,
    /// Number of episodes.
    pub(crate) episodes: usize,
}

impl Labels {
    /// Normalizes the advantages over all ranks when configured, and lays out the labels by sample.
    ///
    /// # Errors
    /// The exchange between ranks failed.
    pub(crate) fn new(
        plan: &RunPlan,
        trajectories: &[Trajectory],
        estimated: &[Advantages],
        samples: usize,
        ranks: &dyn Ranks,
    ) -> Result<Self> {
        let algorithm = &plan.config.algorithm;
        let mut advantages: Vec<f32> = estimated.iter().flat_map(|a| a.advantages.iter().copied()).collect();
        if algorithm.normalize_advantages {
            normalize(&mut advantages, None, ranks)?;
        }
        let mut labels = Self {
            width: 1,
            returns: estimated.iter().flat_map(|a| a.returns.iter().copied()).collect(),
            episodes: trajectories.len(),
            ..Self::default()
        };
        for (index, trajectory) in trajectories.iter().enumerate() {
            labels.push_episode(index, trajectory, samples);
        }
        if algorithm.reward_type == RewardType::ActionLevel {
            labels.width = plan.config.actor.model.num_action_chunks;
            let mut rest = advantages.as_slice();
            for executed in &labels.executed {
                let (own, later) = rest.split_at(*executed);
                // rows that were not executed have no advantage; the mask excludes these rows
                labels.advantages.extend(own);
                labels
                    .advantages
                    .extend(std::iter::repeat_n(0.0, labels.width - executed));
                rest = later;
            }
        } else {
            labels.advantages = advantages;
        }
        Ok(labels)
    }

    fn push_episode(&mut self, index: usize, trajectory: &Trajectory, samples: usize) {
        let chunks = trajectory.chunks.iter().map(|c| c.rewards.len());
        let executed: Vec<usize> = chunks.flat_map(|n| std::iter::repeat_n(n, samples)).collect();
        let (records, rows) = (executed.len(), executed.iter().sum::<usize>());
        self.episode.extend(std::iter::repeat_n(index, records));
        self.success.extend(std::iter::repeat_n(trajectory.success, records));
        self.episode_records
            .extend(std::iter::repeat_n(records as f32, records));
        self.episode_rows.extend(std::iter::repeat_n(rows as f32, records));
        self.executed.extend(executed);
    }
}
