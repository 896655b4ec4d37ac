//! What an update learns from an iteration's records: advantages, value targets, and the weight of each episode.

use policy::{
    config::{BootstrapType, RewardType},
    plan::RunPlan,
};
use wire::messages::{Reset, Trajectory};

use crate::{
    advantage::{Advantages, Episode, EstimatorSettings, LayeredEpisode, normalize},
    collect::filter::group_ids,
    error::{LearnerError, Result},
    method,
};

/// Advantages of the episodes, at the level of the rewards, not normalized. `values` are by episode and sample; a chunk has `samples`
/// of them: its denoise steps where each is a transition of its own, else 1.
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
        let of_episode = |(episode, values): (&Episode<'_>, &Vec<f32>)| {
            let episode = LayeredEpisode {
                rewards: episode.rewards,
                values,
                steps: samples,
                final_value: episode.final_value,
            };
            layered(&episode, settings)
        };
        return Ok(episodes.iter().zip(values).map(of_episode).collect());
    }
    let per_chunk = (estimator.estimate)(&episodes, settings)?;
    Ok(per_chunk.into_iter().map(|a| repeated(a, samples)).collect())
}

/// The advantage of a chunk for each of its samples.
fn repeated(chunks: Advantages, samples: usize) -> Advantages {
    let each = |v: Vec<f32>| v.into_iter().flat_map(|x| std::iter::repeat_n(x, samples)).collect();
    Advantages {
        advantages: each(chunks.advantages),
        returns: each(chunks.returns),
    }
}

/// What the episode's last observation is worth to the estimator.
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
    trajectory.final_value.ok_or_else(|| LearnerError::Record {
        env,
        episode,
        detail: format!(
            "an episode that was {} came without the value of its last observation; the env worker must report that \
             observation, or set `algorithm.bootstrap_type = \"none\"`",
            if trajectory.terminated {
                "terminated"
            } else {
                "cut by its time limit"
            }
        ),
    })
}

/// What the update learns from the samples, in their order.
pub(crate) struct Labels {
    /// `[N * width]`, 0 where a row was not executed.
    pub(crate) advantages: Vec<f32>,
    /// Advantages per record: 1, or the rows of a chunk.
    pub(crate) width: usize,
    /// Value targets `[N]`.
    pub(crate) returns: Vec<f32>,
    /// Rows that the environment executed.
    pub(crate) executed: Vec<usize>,
    /// Records of the record's episode.
    pub(crate) episode_records: Vec<f32>,
    /// Executed rows of the record's episode.
    pub(crate) episode_rows: Vec<f32>,
    /// Number of episodes.
    pub(crate) episodes: usize,
}

impl Labels {
    /// Normalises the advantages when configured, and lays them out by record.
    pub(crate) fn new(plan: &RunPlan, trajectories: &[Trajectory], estimated: &[Advantages], samples: usize) -> Self {
        let algorithm = &plan.config.algorithm;
        let mut advantages: Vec<f32> = estimated.iter().flat_map(|a| a.advantages.iter().copied()).collect();
        if algorithm.normalize_advantages {
            normalize(&mut advantages, None);
        }
        let mut labels = Self {
            advantages: Vec::new(),
            width: 1,
            returns: estimated.iter().flat_map(|a| a.returns.iter().copied()).collect(),
            executed: Vec::new(),
            episode_records: Vec::new(),
            episode_rows: Vec::new(),
            episodes: trajectories.len(),
        };
        for trajectory in trajectories {
            let chunks = trajectory.chunks.iter().map(|c| c.rewards.len());
            let executed: Vec<usize> = chunks.flat_map(|n| std::iter::repeat_n(n, samples)).collect();
            let (records, rows) = (executed.len(), executed.iter().sum::<usize>());
            labels
                .episode_records
                .extend(std::iter::repeat_n(records as f32, records));
            labels.episode_rows.extend(std::iter::repeat_n(rows as f32, records));
            labels.executed.extend(executed);
        }
        if algorithm.reward_type == RewardType::ActionLevel {
            labels.width = plan.config.actor.model.num_action_chunks;
            let mut steps = advantages.into_iter();
            for executed in &labels.executed {
                // rows that were never executed have no advantage; the mask leaves them out
                labels.advantages.extend(steps.by_ref().take(*executed));
                labels
                    .advantages
                    .extend(std::iter::repeat_n(0.0, labels.width - executed));
            }
        } else {
            labels.advantages = advantages;
        }
        labels
    }
}
