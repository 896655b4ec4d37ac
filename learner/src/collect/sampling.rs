//! Episodes that an iteration trains on: the ordered resets, and new groups in place of filtered groups.

use policy::{
    config::{FilterConfig, FilterMode},
    plan::RunPlan,
};
use wire::messages::{Mode, Reset, Trajectory};

use super::{
    collecting::{CollectReport, Collected, collect, failure_rate, success_rate},
    filter::{Kept, keep},
};
use crate::{
    error::Result,
    ring::{hub::Hub, launch::Children},
};

/// Episodes of an iteration that the update reads.
#[derive(Debug)]
pub struct Sampled {
    /// The episodes.
    pub trajectories: Vec<Trajectory>,
    /// Statistics of the ordered episodes, without the episodes.
    pub report: SampleReport,
}

/// Statistics of an iteration's ordered episodes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct SampleReport {
    /// Sums over all orders; `reload_seconds` is of the first order.
    pub collect: CollectReport,
    /// Success rate of the first order, before any filter.
    pub success: f64,
    /// Share of the first order's episodes that ended by themselves without success.
    pub failure: f64,
    /// Number of episodes of all orders.
    pub episodes: usize,
    /// Number of executed env steps of all orders.
    pub env_steps: usize,
    /// Number of orders.
    pub rounds: u32,
    /// Number of groups in the update.
    pub groups: usize,
}

/// Returns the number of groups of a training iteration (of episodes, for group size 1).
pub fn group_count(plan: &RunPlan) -> usize {
    let train = &plan.config.env.train;
    train.total_num_envs / plan.config.algorithm.group_size * train.rollout_epoch
}

/// Returns the resets of the first `groups` groups of an order: the environments in groups on the same start, `rollout_epoch` times.
/// No start and no episode number repeats within a run, over all iterations and rounds.
pub fn training_resets(plan: &RunPlan, iteration: u32, round: u32, groups: usize) -> Vec<Reset> {
    let train = &plan.config.env.train;
    let size = plan.config.algorithm.group_size;
    let rounds = plan.config.algorithm.filter_rewards.and_then(|f| f.max_rounds);
    let per_env = train.rollout_epoch as u64;
    let first = (u64::from(iteration) * u64::from(rounds.unwrap_or(1)) + u64::from(round)) * per_env;
    let per_epoch = train.total_num_envs / size;
    let of_round = group_count(plan) * round as usize;
    (0..train.total_num_envs)
        .flat_map(|env| (0..train.rollout_epoch).map(move |epoch| (env, epoch)))
        .filter(|(env, epoch)| env / size + epoch * per_epoch < groups)
        .map(|(env, epoch)| {
            let (group, episode) = (env / size, first + epoch as u64);
            Reset {
                seed: plan.config.runner.seed,
                env: env as u32,
                episode,
                reset_state: (size > 1).then_some(episode << 24 | group as u64),
                task: None,
                group: (size > 1).then_some((group + epoch * per_epoch + of_round) as u32),
                video: false,
            }
        })
        .collect()
}

/// Orders an iteration's episodes from `version`. A filter that resamples orders a new group for every group outside the bounds, in
/// at most `max_rounds` orders.
///
/// # Errors
/// See [`collect`].
pub fn sample(hub: &Hub, children: &mut Children, plan: &RunPlan, iteration: u32, version: u64) -> Result<Sampled> {
    let label = label(plan, iteration);
    let mut order = |round: u32, groups: usize| {
        let resets = training_resets(plan, iteration, round, groups);
        collect(hub, children, version, Mode::Train, resets, &label)
    };
    let first = order(0, group_count(plan))?;
    sample_from(plan, first, order)
}

/// Returns the label of the progress bar for an iteration's episodes.
pub(crate) fn label(plan: &RunPlan, iteration: u32) -> String {
    format!("iteration {}/{}: rollout", iteration + 1, plan.config.runner.max_epochs)
}

/// Like [`sample`], from the episodes of a first order. `order` gets the number of an order and the number of groups to order.
pub(crate) fn sample_from(
    plan: &RunPlan,
    mut got: Collected,
    mut order: impl FnMut(u32, usize) -> Result<Collected>,
) -> Result<Sampled> {
    let wanted = group_count(plan);
    let filter = plan.config.algorithm.filter_rewards;
    let mut report = SampleReport {
        collect: CollectReport {
            reload_seconds: got.report.reload_seconds,
            ..CollectReport::default()
        },
        success: success_rate(&got.trajectories),
        failure: failure_rate(&got.trajectories),
        episodes: 0,
        env_steps: 0,
        rounds: 1,
        groups: wanted,
    };
    report.count(&got);
    let Some(filter) = filter else {
        let trajectories = got.trajectories;
        return Ok(Sampled { trajectories, report });
    };
    report.groups = 0;
    let mut used = Vec::new();
    let mut outside = (0, 0);
    loop {
        let Kept {
            trajectories,
            groups,
            outside: (below, above),
        } = keep(got.trajectories, &filter);
        used.extend(trajectories);
        report.groups += groups;
        outside = (outside.0 + below, outside.1 + above);
        let again = filter.mode == FilterMode::Resample && report.groups < wanted;
        if !again || filter.max_rounds.is_none_or(|most| report.rounds >= most) {
            break;
        }
        got = order(report.rounds, wanted - report.groups)?;
        report.rounds += 1;
        report.count(&got);
    }
    report.log(&filter, wanted, outside);
    Ok(Sampled {
        trajectories: used,
        report,
    })
}

impl SampleReport {
    fn count(&mut self, order: &Collected) {
        self.collect.seconds += order.report.seconds;
        self.collect.waited += order.report.waited;
        self.collect.stale += order.report.stale;
        self.episodes += order.trajectories.len();
        let chunks = order.trajectories.iter().flat_map(|t| &t.chunks);
        self.env_steps += chunks.map(|c| c.rewards.len()).sum::<usize>();
    }

    fn log(&self, filter: &FilterConfig, wanted: usize, (below, above): (usize, usize)) {
        let text = format!(
            "{} of {wanted} groups have a mean return in {} to {} after {} order(s); {below} were below, {above} above",
            self.groups, filter.lower, filter.upper, self.rounds
        );
        if self.groups < wanted && filter.mode == FilterMode::Resample {
            tracing::warn!("{text}: the update uses fewer");
        } else {
            tracing::info!("{text}");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::{collections::BTreeSet, path::Path};

    use policy::config::RunConfig;

    use super::*;

    fn plan(overrides: &[&str]) -> RunPlan {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/tabletop_grpo.toml");
        let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
        RunPlan::new(RunConfig::load(&path, &overrides).expect("configuration")).expect("plan")
    }

    #[test]
    fn every_round_of_every_iteration_has_its_own_starts_and_noise() {
        let plan = plan(&["env.train.total_num_envs=16", "env.train.rollout_epoch=3"]);
        let size = plan.config.algorithm.group_size;
        let (mut keys, mut starts, mut groups) = (BTreeSet::new(), BTreeSet::new(), BTreeSet::new());
        assert_eq!(group_count(&plan), 6);
        for iteration in 0..3 {
            for round in 0..4 {
                let resets = training_resets(&plan, iteration, round, 5);
                assert_eq!(resets.len(), 5 * size);
                for reset in &resets {
                    assert!(keys.insert((reset.env, reset.episode)), "episode {reset:?} comes twice");
                    starts.insert(reset.reset_state);
                    groups.insert((iteration, reset.group));
                }
            }
        }
        assert_eq!((starts.len(), groups.len()), (3 * 4 * 5, 3 * 4 * 5));
    }
}
