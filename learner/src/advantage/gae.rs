//! Generalized advantage estimation (Schulman et al. 2016).

use super::{AdvantageError, Advantages, Episode, EstimatorSettings, EstimatorSpec, Result, two_layer};

/// Estimates the advantage of each step of one episode (generalized advantage estimation, Schulman et al. 2016, eq. 16).
///
/// Values are known for observations only, hence before every chunk of `chunk_len` steps. `values[t]` is the value before
/// chunk `t`, `final_value` the value after the last chunk. Let `b = V_{t+1} + lambda A_{t+1}` for the first step of the next
/// chunk. Step `j` of a chunk of `n` has `A_{t,j} = r_j + gamma r_{j+1} + .. + gamma^{n-j} b - V_t`, without the rewards
/// before step `j`. With one step per chunk this is the usual recursion.
///
/// # Panics
/// `values` has fewer entries than the episode has chunks.
pub fn gae_episode(
    rewards: &[f32],
    chunk_len: usize,
    values: &[f32],
    final_value: f32,
    gamma: f64,
    lambda: f64,
) -> Vec<f32> {
    let mut bootstrap = f64::from(final_value);
    let mut advantages = Vec::with_capacity(rewards.len());
    for (chunk, rewards) in rewards.chunks(chunk_len.max(1)).enumerate().rev() {
        let value = f64::from(values[chunk]);
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

/// Registry entry of `gae`.
pub(super) const SPEC: EstimatorSpec = EstimatorSpec {
    adv_type: "gae",
    estimate: episodes,
    layered: Some(two_layer::gae),
    values: true,
    groups: false,
    normalize_advantages: false,
};

/// Applies [`gae_episode`] to every episode; the returns are `advantage + value` at the start of each chunk.
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
