//! Generalised advantage estimation (Schulman et al. 2016).

use super::{AdvantageError, Advantages, Episode, EstimatorSettings, EstimatorSpec, Layout, Result, two_layer};

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

/// Generalised advantage estimation for one episode (Schulman et al. 2016, eq. 16), an advantage per step.
///
/// A value is known where an observation is: before every chunk of `chunk_len` steps. `values[t]` is the value before
/// chunk `t`, `final_value` the one after the last chunk. With `b = V_{t+1} + lambda A_{t+1}` of the next chunk's first
/// step, step `j` of a chunk of `n` has `A_{t,j} = r_j + gamma r_{j+1} + .. + gamma^{n-j} b - V_t`: rewards before a step
/// are not its merit. With one step per chunk this is the usual recursion. Both slices describe the same number of
/// chunks; surplus entries of a longer one are not read.
pub fn gae_episode(
    rewards: &[f32],
    chunk_len: usize,
    values: &[f32],
    final_value: f32,
    gamma: f64,
    lambda: f64,
) -> Vec<f32> {
    let chunks: Vec<(&[f32], f64)> = rewards
        .chunks(chunk_len.max(1))
        .zip(values.iter().map(|value| f64::from(*value)))
        .collect();
    let mut bootstrap = f64::from(final_value);
    let mut advantages = Vec::with_capacity(rewards.len());
    for (rewards, value) in chunks.into_iter().rev() {
        let mut to_go = bootstrap;
        for reward in rewards.iter().rev() {
            to_go = f64::from(*reward) + gamma * to_go;
            advantages.push((to_go - value) as f32);
        }
        bootstrap = value + lambda * (to_go - value);
    }
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

/// In the registry.
pub(super) const SPEC: EstimatorSpec = EstimatorSpec {
    name: "gae",
    estimate: episodes,
    layered: Some(two_layer::gae),
    values: true,
    groups: false,
    normalised: false,
};

/// [`gae_episode`] of every episode; the returns are `advantage + value` at the start of each chunk.
fn episodes(episodes: &[Episode<'_>], settings: EstimatorSettings) -> Result<Vec<Advantages>> {
    let one = |(index, episode): (usize, &Episode<'_>)| {
        let (chunks, values) = (episode.chunks(), episode.values.len());
        if chunks != values {
            return Err(AdvantageError::NoValues {
                episode: index,
                chunks,
                values,
            });
        }
        let advantages = gae_episode(
            episode.rewards,
            episode.chunk_len,
            episode.values,
            episode.final_value,
            settings.gamma,
            settings.gae_lambda,
        );
        let returns = advantages
            .iter()
            .step_by(episode.chunk_len.max(1))
            .zip(episode.values)
            .map(|(advantage, value)| advantage + value)
            .collect();
        Ok(Advantages { advantages, returns })
    };
    episodes.iter().enumerate().map(one).collect()
}
