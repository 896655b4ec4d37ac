//! Groups of episodes with the same task and reset state, and the filter of groups by their mean reward.

use std::collections::BTreeMap;

use policy::config::FilterConfig;
use wire::messages::{Reset, Trajectory};

/// Returns the group number of each reset: two episodes have the same number exactly if they have the same task and the same reset
/// state. An episode without a reset state is a group of its own.
pub fn group_ids<'a>(resets: impl IntoIterator<Item = &'a Reset>) -> Vec<u64> {
    let mut known: BTreeMap<(Option<u32>, u64), u64> = BTreeMap::new();
    let mut next = 0;
    let mut fresh = || {
        next += 1;
        next - 1
    };
    resets
        .into_iter()
        .map(|reset| match reset.reset_state {
            Some(state) => *known.entry((reset.task, state)).or_insert_with(&mut fresh),
            None => fresh(),
        })
        .collect()
}

/// Returns for every score whether the mean of its group is in `[low, high]`. Both slices have the same length.
pub fn keep_members(scores: &[f32], groups: &[u64], low: f64, high: f64) -> Vec<bool> {
    let mut sums: BTreeMap<u64, (f64, f64)> = BTreeMap::new();
    for (score, group) in scores.iter().zip(groups) {
        let (sum, count) = sums.entry(*group).or_default();
        *sum += f64::from(*score);
        *count += 1.0;
    }
    groups
        .iter()
        .map(|group| {
            // the loop above made an entry for every group: there is a score for each
            let (sum, count) = sums[group];
            (low..=high).contains(&(sum / count))
        })
        .collect()
}

/// Episodes of groups inside the bounds.
#[derive(Debug, Default)]
pub struct Kept {
    /// Episodes of these groups, in the given order.
    pub trajectories: Vec<Trajectory>,
    /// Number of groups inside the bounds.
    pub groups: usize,
    /// Number of groups below `lower` (failures) and above `upper` (solved).
    pub outside: (usize, usize),
}

/// Returns the sum of an episode's rewards, undiscounted.
pub fn score(trajectory: &Trajectory) -> f32 {
    let rewards = trajectory.chunks.iter().flat_map(|chunk| &chunk.rewards);
    rewards.map(|reward| f64::from(*reward)).sum::<f64>() as f32
}

/// Drops the episodes whose group's mean score is outside the bounds.
pub fn keep(trajectories: Vec<Trajectory>, filter: &FilterConfig) -> Kept {
    let groups = group_ids(trajectories.iter().map(|t| &t.reset));
    let scores: Vec<f32> = trajectories.iter().map(score).collect();
    let count = |wanted: &[bool]| {
        let ids: std::collections::BTreeSet<u64> = groups
            .iter()
            .zip(wanted)
            .filter(|(_, keep)| **keep)
            .map(|(group, _)| *group)
            .collect();
        ids.len()
    };
    let inside = keep_members(&scores, &groups, filter.lower, filter.upper);
    let below: Vec<bool> = keep_members(&scores, &groups, filter.lower, f64::INFINITY)
        .into_iter()
        .map(|not_below| !not_below)
        .collect();
    let above: Vec<bool> = keep_members(&scores, &groups, f64::NEG_INFINITY, filter.upper)
        .into_iter()
        .map(|not_above| !not_above)
        .collect();
    Kept {
        groups: count(&inside),
        outside: (count(&below), count(&above)),
        trajectories: trajectories
            .into_iter()
            .zip(inside)
            .filter_map(|(trajectory, keep)| keep.then_some(trajectory))
            .collect(),
    }
}

#[cfg(test)]
mod tests {
    use policy::config::FilterMode;
    use wire::messages::{Mode, TrajectoryChunk};

    use super::*;

    fn episode(env: u32, task: Option<u32>, state: Option<u64>, reward: f32) -> Trajectory {
        Trajectory {
            id: u64::from(env),
            engine: "e".to_owned(),
            order: 1,
            reset: Reset {
                seed: 1,
                env,
                episode: 0,
                reset_state: state,
                task,
                group: None,
                video: false,
            },
            mode: Mode::Train,
            prompt: String::new(),
            chunks: vec![
                TrajectoryChunk {
                    record: None,
                    rewards: vec![0.0, reward],
                    frames: Vec::new(),
                };
                2
            ],
            terminated: true,
            success: reward > 0.0,
            final_value: None,
        }
    }

    #[test]
    fn a_group_is_one_task_and_one_reset_state() {
        let episodes = [
            episode(0, None, Some(5), 0.0),
            episode(1, Some(1), Some(5), 0.0),
            episode(2, None, Some(5), 0.0),
            episode(3, None, None, 0.0),
            episode(4, None, None, 0.0),
            episode(5, Some(1), Some(5), 0.0),
        ];
        assert_eq!(group_ids(episodes.iter().map(|t| &t.reset)), [0, 1, 0, 2, 3, 1]);
    }

    #[test]
    fn groups_outside_the_bounds_are_left_out_and_counted() {
        let filter = FilterConfig {
            lower: 0.1,
            upper: 0.9,
            mode: FilterMode::Mask,
            max_rounds: None,
        };
        // scores are twice the reward: the means are 0, 0.5 and 1
        let rewards = [(0, 0.0), (0, 0.0), (1, 0.0), (1, 0.5), (2, 0.5), (2, 0.5)];
        let episodes = rewards
            .iter()
            .enumerate()
            .map(|(env, (group, reward))| episode(env as u32, None, Some(*group), *reward))
            .collect();
        let kept = keep(episodes, &filter);
        let envs: Vec<u32> = kept.trajectories.iter().map(|t| t.reset.env).collect();
        assert_eq!((kept.groups, kept.outside, envs), (1, (1, 1), vec![2, 3]));
    }
}
