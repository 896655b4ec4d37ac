//! Advantages and returns on plain slices: generalised advantage estimation, group-relative scores, raw returns, and
//! the masks and reward layouts that go before them. No tensor library and no state.
//!
//! Two forms of the same mathematics live here. The *ragged* form ([`gae_episode`], [`estimator`]) takes one slice per
//! episode and is what the learner uses: a finished environment leaves no rows behind. The *grid* form ([`gae`],
//! [`loss_mask`], [`group_relative_grid`]) takes row-major `[steps, envs]` arrays with masks, as lock-step rollouts
//! record them.
//!
//! Time limits: an episode that *terminates* has value 0 after its last step; one that is *truncated* (time limit, cut
//! by the collector) is bootstrapped with the value of its last observation (Pardo et al. 2018, "Time Limits in
//! Reinforcement Learning", eq. 3).

use std::collections::BTreeMap;

use thiserror::Error;

/// Added to the standard deviation of the normalised advantages.
pub const NORMALIZE_EPS: f64 = 1e-5;
/// Added to the standard deviation of a group's scores.
pub const GROUP_EPS: f64 = 1e-6;

/// What can be wrong with the arrays given to an estimator.
#[derive(Debug, Error)]
pub enum AdvantageError {
    /// An array does not have the size its layout asks for.
    #[error("`{name}` needs {expected} elements, found {found}")]
    Length {
        /// Which array.
        name: &'static str,
        /// Elements the layout asks for.
        expected: usize,
        /// Elements given.
        found: usize,
    },
    /// Scores cannot be compared within groups of this size.
    #[error("a group needs at least 2 members and {scores} scores must divide into groups of {group_size}")]
    Group {
        /// Number of scores given.
        scores: usize,
        /// Members per group asked for.
        group_size: usize,
    },
    /// A group has a single episode, so that it has no spread.
    #[error("group {group} has 1 episode, a group-relative advantage needs at least 2: collect more per start state")]
    LonelyEpisode {
        /// The group's id.
        group: u64,
    },
    /// The estimator needs values and the episode has none.
    #[error("estimator `gae` needs one value per step, episode {episode} has {values} for {steps} steps")]
    NoValues {
        /// Index of the episode in the batch.
        episode: usize,
        /// Steps of the episode.
        steps: usize,
        /// Values given.
        values: usize,
    },
}

/// Result of this module.
pub type Result<T, E = AdvantageError> = std::result::Result<T, E>;

/// Sizes of a row-major `[steps, envs]` array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Time steps (chunks or primitive steps), outermost.
    pub steps: usize,
    /// Environments, innermost.
    pub envs: usize,
}

impl Layout {
    /// Number of elements of a `[steps, envs]` array.
    pub fn len(self) -> usize {
        self.steps * self.envs
    }

    /// Whether the array has no element.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    fn check(self, name: &'static str, found: usize, extra_rows: usize) -> Result<()> {
        let expected = (self.steps + extra_rows) * self.envs;
        if found == expected {
            Ok(())
        } else {
            Err(AdvantageError::Length { name, expected, found })
        }
    }
}

/// Advantages and the value targets that belong to them, same layout as the rewards.
#[derive(Debug, Clone, PartialEq)]
pub struct Advantages {
    /// How much better the taken action was than the value said.
    pub advantages: Vec<f32>,
    /// `advantages + values`: what the critic is trained towards.
    pub returns: Vec<f32>,
}

/// What [`gae`] reads. Index `t` of an end flag says how step `t` ended.
#[derive(Debug, Clone, Copy)]
pub struct GaeGrid<'a> {
    /// Sizes of `rewards`.
    pub layout: Layout,
    /// `[steps, envs]`: reward of step `t`.
    pub rewards: &'a [f32],
    /// `[steps + 1, envs]`: value of the observation before step `t`; the last row closes the buffer.
    pub values: &'a [f32],
    /// `[steps, envs]`: the task ended in this step; nothing is worth anything after it.
    pub terminated: &'a [bool],
    /// `[steps, envs]`: the episode was cut in this step (time limit) and would have gone on.
    pub truncated: &'a [bool],
    /// `[steps, envs]`: value of the true last observation, read where `truncated`. Without it the next row of
    /// `values` is taken, which is right only where environments do not reset by themselves.
    pub final_values: Option<&'a [f32]>,
}

/// Generalised advantage estimation over a grid (Schulman et al. 2016, eq. 11 and 16):
/// `A_t = delta_t + gamma lambda A_{t+1}`, `delta_t = r_t + gamma V_{t+1} - V_t`; the recursion stops where an episode
/// ends, `V_{t+1}` is 0 after a terminal step and the final observation's value after a truncated one.
pub fn gae(input: &GaeGrid<'_>, gamma: f64, lambda: f64) -> Result<Advantages> {
    let Layout { steps, envs } = input.layout;
    input.layout.check("rewards", input.rewards.len(), 0)?;
    input.layout.check("values", input.values.len(), 1)?;
    input.layout.check("terminated", input.terminated.len(), 0)?;
    input.layout.check("truncated", input.truncated.len(), 0)?;
    if let Some(final_values) = input.final_values {
        input.layout.check("final_values", final_values.len(), 0)?;
    }
    let mut advantages = vec![0.0; input.layout.len()];
    let mut returns = vec![0.0; input.layout.len()];
    for env in 0..envs {
        let mut next_advantage = 0.0;
        for step in (0..steps).rev() {
            let at = step * envs + env;
            let value = f64::from(input.values[at]);
            let next_value = match (input.terminated[at], input.truncated[at], input.final_values) {
                (true, _, _) => 0.0,
                (false, true, Some(final_values)) => f64::from(final_values[at]),
                _ => f64::from(input.values[at + envs]),
            };
            let goes_on = f64::from(u8::from(!input.terminated[at] && !input.truncated[at]));
            let delta = f64::from(input.rewards[at]) + gamma * next_value - value;
            next_advantage = delta + gamma * lambda * goes_on * next_advantage;
            advantages[at] = next_advantage as f32;
            returns[at] = (next_advantage + value) as f32;
        }
    }
    Ok(Advantages { advantages, returns })
}

/// Generalised advantage estimation for one episode of `rewards.len()` chunks (Schulman et al. 2016, eq. 16).
///
/// `values[t]` is the value of the observation before chunk `t`; `final_value` is the value of the observation after
/// the last chunk: 0 for a terminated episode, the critic's value for a truncated one. The returns are
/// `advantage + value`. Both slices have the same length; surplus entries of a longer one are not read.
pub fn gae_episode(rewards: &[f32], values: &[f32], final_value: f32, gamma: f64, lambda: f64) -> Vec<f32> {
    let mut next_value = f64::from(final_value);
    let mut next_advantage = 0.0;
    let mut advantages: Vec<f32> = rewards
        .iter()
        .zip(values)
        .rev()
        .map(|(reward, value)| {
            let value = f64::from(*value);
            let delta = f64::from(*reward) + gamma * next_value - value;
            next_advantage = delta + gamma * lambda * next_advantage;
            next_value = value;
            next_advantage as f32
        })
        .collect();
    advantages.reverse();
    advantages
}

/// Undiscounted sum of the rewards from each step to the end of its episode, `[steps, envs]`: what is left of GAE
/// without a critic (`V = 0`, `gamma = lambda = 1`).
pub fn reward_to_go(layout: Layout, rewards: &[f32], ended: &[bool]) -> Result<Vec<f32>> {
    let zeros = vec![0.0; layout.len() + layout.envs];
    let open = vec![false; layout.len()];
    let input = GaeGrid {
        layout,
        rewards,
        values: &zeros,
        terminated: ended,
        truncated: &open,
        final_values: None,
    };
    Ok(gae(&input, 1.0, 1.0)?.advantages)
}

/// Which rows of a lock-step rollout are part of each environment's first episode, and how many there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LossMask {
    /// `[steps, envs]`: the step began before the first end of the environment, so the ending step is in.
    pub valid: Vec<bool>,
    /// `[envs]`: number of valid steps.
    pub episode_len: Vec<usize>,
}

/// Marks the first episode of every environment. `dones` is `[steps + 1, envs]`; its row 0 is the state before the
/// first step.
pub fn loss_mask(layout: Layout, dones: &[bool]) -> Result<LossMask> {
    layout.check("dones", dones.len(), 1)?;
    let mut valid = vec![false; layout.len()];
    let mut episode_len = vec![0; layout.envs];
    for (env, len) in episode_len.iter_mut().enumerate() {
        for step in 0..layout.steps {
            let at = step * layout.envs + env;
            if dones[at] {
                break;
            }
            valid[at] = true;
            *len += 1;
        }
    }
    Ok(LossMask { valid, episode_len })
}

/// Mean and unbiased standard deviation of the valid entries; `None` with fewer than two of them.
pub fn mean_and_std(values: &[f32], mask: Option<&[bool]>) -> Option<(f64, f64)> {
    let valid = |at: usize| mask.is_none_or(|mask| mask.get(at).copied().unwrap_or(false));
    let kept = || {
        values
            .iter()
            .enumerate()
            .filter(|(at, _)| valid(*at))
            .map(|(_, value)| f64::from(*value))
    };
    let count = kept().count();
    if count < 2 {
        return None;
    }
    let mean = kept().sum::<f64>() / count as f64;
    let variance = kept().map(|value| (value - mean).powi(2)).sum::<f64>() / (count - 1) as f64;
    Some((mean, variance.sqrt()))
}

/// Shifts and scales all entries by the mean and unbiased standard deviation of the valid ones, `NORMALIZE_EPS` added
/// to the latter. With fewer than two valid entries there is no spread and nothing changes.
pub fn normalize(values: &mut [f32], mask: Option<&[bool]>) {
    if let Some((mean, std)) = mean_and_std(values, mask) {
        for value in values {
            *value = ((f64::from(*value) - mean) / (std + NORMALIZE_EPS)) as f32;
        }
    }
}

/// Score of every environment: the undiscounted reward of its first episode in the buffer.
/// `rewards` is `[steps, envs]`, `dones` `[steps + 1, envs]` (row 0 before the first step, not read).
pub fn episode_scores(layout: Layout, rewards: &[f32], dones: &[bool]) -> Result<Vec<f32>> {
    layout.check("rewards", rewards.len(), 0)?;
    layout.check("dones", dones.len(), 1)?;
    let score = |env: usize| {
        let mut score = 0.0;
        for step in 0..layout.steps {
            let at = step * layout.envs + env;
            score += f64::from(rewards[at]);
            if dones[at + layout.envs] {
                break;
            }
        }
        score as f32
    };
    Ok((0..layout.envs).map(score).collect())
}

/// Group-relative advantage of consecutive groups (Shao et al. 2024, section 4.1.2):
/// `(s - mean) / (std + GROUP_EPS)` within each group of `group_size`, unbiased standard deviation. Equal scores give 0.
pub fn group_relative(scores: &[f32], group_size: usize) -> Result<Vec<f32>> {
    if group_size < 2 || !scores.len().is_multiple_of(group_size) {
        return Err(AdvantageError::Group {
            scores: scores.len(),
            group_size,
        });
    }
    let mut advantages = Vec::with_capacity(scores.len());
    for group in scores.chunks_exact(group_size) {
        // two members at least, so the spread exists
        let (mean, std) = mean_and_std(group, None).unwrap_or((0.0, 0.0));
        advantages.extend(
            group
                .iter()
                .map(|score| ((f64::from(*score) - mean) / (std + GROUP_EPS)) as f32),
        );
    }
    Ok(advantages)
}

/// One number per environment spread over its valid steps, `[steps, envs]`; 0 where masked.
pub fn spread(layout: Layout, per_env: &[f32], mask: &[bool]) -> Result<Vec<f32>> {
    if per_env.len() != layout.envs {
        return Err(AdvantageError::Length {
            name: "per_env",
            expected: layout.envs,
            found: per_env.len(),
        });
    }
    layout.check("mask", mask.len(), 0)?;
    let columns = per_env.iter().cycle();
    Ok(mask
        .iter()
        .zip(columns)
        .map(|(valid, value)| if *valid { *value } else { 0.0 })
        .collect())
}

/// [`group_relative`] of the environments' scores, spread over the valid steps of a grid.
pub fn group_relative_grid(layout: Layout, scores: &[f32], group_size: usize, mask: &[bool]) -> Result<Vec<f32>> {
    spread(layout, &group_relative(scores, group_size)?, mask)
}

/// Environments whose whole group is kept: the group's mean score is in `[low, high]`. Groups in which everything
/// succeeds or fails teach nothing to a group-relative estimator.
pub fn keep_groups(scores: &[f32], group_size: usize, low: f64, high: f64) -> Result<Vec<bool>> {
    if group_size == 0 || !scores.len().is_multiple_of(group_size) {
        return Err(AdvantageError::Group {
            scores: scores.len(),
            group_size,
        });
    }
    let mut keep = Vec::with_capacity(scores.len());
    for group in scores.chunks_exact(group_size) {
        let mean = group.iter().map(|score| f64::from(*score)).sum::<f64>() / group_size as f64;
        keep.extend(std::iter::repeat_n(mean >= low && mean <= high, group_size));
    }
    Ok(keep)
}

/// Sizes of a row-major `[chunks, envs, chunk_len]` array: what a chunked policy records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkLayout {
    /// Action chunks in time, outermost.
    pub chunks: usize,
    /// Environments.
    pub envs: usize,
    /// Executed actions per chunk, innermost.
    pub chunk_len: usize,
}

impl ChunkLayout {
    /// The grid of whole chunks.
    pub fn chunk_grid(self) -> Layout {
        Layout {
            steps: self.chunks,
            envs: self.envs,
        }
    }

    /// The grid of primitive steps.
    pub fn step_grid(self) -> Layout {
        Layout {
            steps: self.chunks * self.chunk_len,
            envs: self.envs,
        }
    }

    fn check(self, name: &'static str, found: usize) -> Result<()> {
        let expected = self.chunks * self.envs * self.chunk_len;
        if found == expected {
            Ok(())
        } else {
            Err(AdvantageError::Length { name, expected, found })
        }
    }
}

/// Chunk-level reward: the undiscounted sum over each chunk, `[chunks, envs, chunk_len]` to `[chunks, envs]`.
pub fn chunk_sum(layout: ChunkLayout, rewards: &[f32]) -> Result<Vec<f32>> {
    layout.check("rewards", rewards.len())?;
    let chunk_len = layout.chunk_len.max(1);
    Ok(rewards
        .chunks_exact(chunk_len)
        .map(|chunk| chunk.iter().map(|r| f64::from(*r)).sum::<f64>() as f32)
        .collect())
}

/// Chunk-level flag: whether it is set anywhere in the chunk, `[chunks, envs, chunk_len]` to `[chunks, envs]`.
pub fn chunk_any(layout: ChunkLayout, flags: &[bool]) -> Result<Vec<bool>> {
    layout.check("flags", flags.len())?;
    Ok(flags
        .chunks_exact(layout.chunk_len.max(1))
        .map(|chunk| chunk.contains(&true))
        .collect())
}

/// Action-level layout: `[chunks, envs, chunk_len]` to `[chunks * chunk_len, envs]`, time running through each chunk.
pub fn steps_from_chunks<T: Copy>(layout: ChunkLayout, data: &[T]) -> Result<Vec<T>> {
    layout.check("data", data.len())?;
    let ChunkLayout {
        chunks,
        envs,
        chunk_len,
    } = layout;
    let mut steps = Vec::with_capacity(data.len());
    for chunk in 0..chunks {
        for step in 0..chunk_len {
            steps.extend((0..envs).map(|env| data[(chunk * envs + env) * chunk_len + step]));
        }
    }
    Ok(steps)
}

/// Inverse of [`steps_from_chunks`].
pub fn chunks_from_steps<T: Copy>(layout: ChunkLayout, data: &[T]) -> Result<Vec<T>> {
    layout.check("data", data.len())?;
    let ChunkLayout {
        chunks,
        envs,
        chunk_len,
    } = layout;
    let mut rows = Vec::with_capacity(data.len());
    for chunk in 0..chunks {
        for env in 0..envs {
            rows.extend((0..chunk_len).map(|step| data[(chunk * chunk_len + step) * envs + env]));
        }
    }
    Ok(rows)
}

/// Puts rollout epochs that were recorded one after the other side by side:
/// `[epochs * rows, envs * width]` to `[rows, epochs * envs * width]`.
pub fn stack_epochs<T: Copy>(epochs: usize, rows: usize, row_len: usize, data: &[T]) -> Result<Vec<T>> {
    let expected = epochs * rows * row_len;
    if data.len() != expected {
        return Err(AdvantageError::Length {
            name: "data",
            expected,
            found: data.len(),
        });
    }
    let mut stacked = Vec::with_capacity(expected);
    for row in 0..rows {
        for epoch in 0..epochs {
            let start = (epoch * rows + row) * row_len;
            stacked.extend_from_slice(&data[start..start + row_len]);
        }
    }
    Ok(stacked)
}

/// One episode as an estimator of the registry sees it.
#[derive(Debug, Clone, Copy)]
pub struct Episode<'a> {
    /// Reward of each chunk.
    pub rewards: &'a [f32],
    /// Value of the observation before each chunk; empty where no critic is trained.
    pub values: &'a [f32],
    /// Value of the observation after the last chunk: 0 if the episode terminated.
    pub final_value: f32,
    /// Episodes of one group started from the same state.
    pub group: u64,
}

impl Episode<'_> {
    /// Undiscounted reward of the whole episode.
    pub fn score(&self) -> f32 {
        self.rewards.iter().map(|reward| f64::from(*reward)).sum::<f64>() as f32
    }
}

/// What the configuration says about estimating advantages.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct EstimatorSettings {
    /// Discount per chunk, in (0, 1].
    pub gamma: f64,
    /// GAE's bias-variance trade-off, in [0, 1].
    pub gae_lambda: f64,
}

/// Estimates the advantages of a batch of episodes; the outputs have the episodes' lengths and are not normalised.
pub type Estimator = fn(&[Episode<'_>], EstimatorSettings) -> Result<Vec<Advantages>>;

/// The one table of advantage estimators.
pub const ESTIMATORS: [(&str, Estimator); 3] = [("gae", gae_episodes), ("grpo", grpo_episodes), ("raw", raw_episodes)];

/// The advantage estimator of this name (`algorithm.adv_type` of the configuration); see [`ESTIMATORS`].
pub fn estimator(name: &str) -> Option<Estimator> {
    ESTIMATORS
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, estimator)| *estimator)
}

fn gae_episodes(episodes: &[Episode<'_>], settings: EstimatorSettings) -> Result<Vec<Advantages>> {
    let one = |(index, episode): (usize, &Episode<'_>)| {
        let (steps, values) = (episode.rewards.len(), episode.values.len());
        if steps != values {
            return Err(AdvantageError::NoValues {
                episode: index,
                steps,
                values,
            });
        }
        let advantages = gae_episode(
            episode.rewards,
            episode.values,
            episode.final_value,
            settings.gamma,
            settings.gae_lambda,
        );
        let returns = advantages
            .iter()
            .zip(episode.values)
            .map(|(advantage, value)| advantage + value)
            .collect();
        Ok(Advantages { advantages, returns })
    };
    episodes.iter().enumerate().map(one).collect()
}

fn grpo_episodes(episodes: &[Episode<'_>], _settings: EstimatorSettings) -> Result<Vec<Advantages>> {
    let mut groups: BTreeMap<u64, Vec<f32>> = BTreeMap::new();
    for episode in episodes {
        groups.entry(episode.group).or_default().push(episode.score());
    }
    let mut spreads = BTreeMap::new();
    for (group, scores) in &groups {
        let spread = mean_and_std(scores, None).ok_or(AdvantageError::LonelyEpisode { group: *group })?;
        spreads.insert(*group, spread);
    }
    let one = |episode: &Episode<'_>| {
        let (mean, std) = spreads.get(&episode.group).copied().unwrap_or((0.0, 0.0));
        constant(
            episode,
            ((f64::from(episode.score()) - mean) / (std + GROUP_EPS)) as f32,
        )
    };
    Ok(episodes.iter().map(one).collect())
}

#[expect(clippy::unnecessary_wraps, reason = "every estimator of the table has one signature")]
fn raw_episodes(episodes: &[Episode<'_>], _settings: EstimatorSettings) -> Result<Vec<Advantages>> {
    Ok(episodes
        .iter()
        .map(|episode| constant(episode, episode.score()))
        .collect())
}

/// The same advantage for every chunk; the returns are the undiscounted rewards to go.
fn constant(episode: &Episode<'_>, advantage: f32) -> Advantages {
    let zeros = vec![0.0; episode.rewards.len()];
    let returns = gae_episode(episode.rewards, &zeros, 0.0, 1.0, 1.0);
    Advantages {
        advantages: vec![advantage; episode.rewards.len()],
        returns,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A small deterministic stream: the tests need varied numbers, not good ones.
    fn numbers(seed: u64, count: usize) -> Vec<f32> {
        let mut state = seed.wrapping_mul(2_862_933_555_777_941_757).wrapping_add(3_037_000_493);
        let mut next = || {
            state = state
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            ((state >> 40) as f32) / 8_388_608.0 - 1.0
        };
        (0..count).map(|_| next()).collect()
    }

    fn close(got: f32, want: f32) -> bool {
        (got - want).abs() <= 1e-5
    }

    #[test]
    fn ragged_and_grid_gae_agree() {
        // property: episodes of any length and any kind of end, laid out one after the other in each grid column
        for seed in 0..64u64 {
            let layout = Layout {
                steps: 2 + (seed % 13) as usize,
                envs: 1 + (seed % 5) as usize,
            };
            let rewards = numbers(seed, layout.len());
            let values = numbers(seed + 1000, layout.len() + layout.envs);
            let final_values = numbers(seed + 2000, layout.len());
            let kind = numbers(seed + 3000, layout.len());
            let terminated: Vec<bool> = kind.iter().map(|k| *k > 0.6).collect();
            let truncated: Vec<bool> = kind.iter().map(|k| *k < -0.6).collect();
            let input = GaeGrid {
                layout,
                rewards: &rewards,
                values: &values,
                terminated: &terminated,
                truncated: &truncated,
                final_values: Some(&final_values),
            };
            let grid = gae(&input, 0.97, 0.9).unwrap();
            for env in 0..layout.envs {
                let mut start = 0;
                for step in 0..layout.steps {
                    let at = step * layout.envs + env;
                    let last = step + 1 == layout.steps;
                    if !(terminated[at] || truncated[at] || last) {
                        continue;
                    }
                    let column =
                        |data: &[f32]| -> Vec<f32> { (start..=step).map(|t| data[t * layout.envs + env]).collect() };
                    let final_value = match (terminated[at], truncated[at]) {
                        (true, _) => 0.0,
                        (false, true) => final_values[at],
                        (false, false) => values[at + layout.envs],
                    };
                    let ragged = gae_episode(&column(&rewards), &column(&values), final_value, 0.97, 0.9);
                    for (got, want) in ragged.iter().zip(column(&grid.advantages)) {
                        assert!(close(*got, want), "seed {seed}: {got} against {want}");
                    }
                    start = step + 1;
                }
            }
        }
    }

    #[test]
    fn gae_with_lambda_one_is_discounted_return_minus_value() {
        let (rewards, values) = (numbers(1, 9), numbers(2, 9));
        let advantages = gae_episode(&rewards, &values, 0.7, 0.9, 1.0);
        for (t, advantage) in advantages.iter().enumerate() {
            let mut total = 0.7 * 0.9f64.powi((9 - t) as i32);
            for (k, reward) in rewards[t..].iter().enumerate() {
                total += f64::from(*reward) * 0.9f64.powi(k as i32);
            }
            assert!(close(*advantage, (total - f64::from(values[t])) as f32));
        }
    }

    #[test]
    fn a_time_limit_is_bootstrapped_and_a_terminal_is_not() {
        let grid = |terminated: bool| {
            let input = GaeGrid {
                layout: Layout { steps: 1, envs: 1 },
                rewards: &[0.0],
                values: &[0.0, -5.0],
                terminated: &[terminated],
                truncated: &[!terminated],
                final_values: Some(&[2.0]),
            };
            gae(&input, 0.5, 0.95).unwrap().advantages[0]
        };
        assert!(close(grid(true), 0.0));
        assert!(close(grid(false), 1.0));
    }

    #[test]
    fn the_registry_knows_its_names_and_refuses_what_it_cannot_estimate() {
        let settings = EstimatorSettings {
            gamma: 0.99,
            gae_lambda: 0.95,
        };
        assert!(estimator("reinpp").is_none());
        let rewards = [0.0, 1.0];
        let episode = Episode {
            rewards: &rewards,
            values: &[],
            final_value: 0.0,
            group: 3,
        };
        let gae = estimator("gae").unwrap();
        assert!(
            gae(&[episode], settings)
                .unwrap_err()
                .to_string()
                .contains("has 0 for 2 steps")
        );
        let grpo = estimator("grpo").unwrap();
        assert!(
            grpo(&[episode], settings)
                .unwrap_err()
                .to_string()
                .contains("group 3 has 1 episode")
        );
        let failed = Episode {
            rewards: &[0.0],
            ..episode
        };
        let both = grpo(&[episode, failed], settings).unwrap();
        assert!(close(both[0].advantages[1], std::f32::consts::FRAC_1_SQRT_2));
        assert!(close(both[1].advantages[0], -std::f32::consts::FRAC_1_SQRT_2));
        let raw = estimator("raw").unwrap();
        assert_eq!(raw(&[episode], settings).unwrap()[0].advantages, vec![1.0, 1.0]);
    }

    #[test]
    fn wrong_sizes_are_named() {
        let error = loss_mask(Layout { steps: 2, envs: 3 }, &[false; 6]).unwrap_err();
        assert_eq!(error.to_string(), "`dones` needs 9 elements, found 6");
    }
}
