//! Generalized advantage estimation over both layers of the two-layer MDP: env steps outside, denoise steps inside.
//!
//! Every denoise step is a transition (piRL, Eq. 10-12) whose state is the observation and the partly denoised actions. The
//! reward is 0 until the last step of the chunk, which executes the actions and receives the chunk's reward.

use super::{AdvantageError, Advantages, EstimatorSettings, LayeredEpisode, Result};

/// Estimates the advantages of every episode, from rewards per chunk and values per denoise step.
pub(super) fn gae(episodes: &[LayeredEpisode<'_>], settings: EstimatorSettings) -> Result<Vec<Advantages>> {
    let one = |(index, episode): (usize, &LayeredEpisode<'_>)| {
        let (steps, values) = (episode.rewards.len() * episode.steps, episode.values.len());
        if steps == values {
            Ok(gae_episode(episode, settings))
        } else {
            Err(AdvantageError::NoStepValues {
                episode: index,
                steps,
                values,
            })
        }
    };
    episodes.iter().enumerate().map(one).collect()
}

/// Returns advantage and return of every denoise step of an episode with a value per step.
///
/// The discount acts between chunks only. `lambda` is per chunk: each of the `steps` transitions carries its `steps`-th root, so that the
/// credit of a chunk reaches the previous chunk as in [`super::gae_episode`].
fn gae_episode(episode: &LayeredEpisode<'_>, settings: EstimatorSettings) -> Advantages {
    let LayeredEpisode {
        rewards,
        values,
        steps,
        final_value,
    } = *episode;
    let count = rewards.len() * steps;
    let decay = settings.gae_lambda.powf((steps.max(1) as f64).recip());
    let mut advantages = vec![0.0f32; count];
    let mut returns = vec![0.0f32; count];
    let (mut next_value, mut next_advantage) = (f64::from(final_value), 0.0);
    for (index, (advantage, target)) in advantages.iter_mut().zip(&mut returns).enumerate().rev() {
        let last_of_chunk = (index + 1).is_multiple_of(steps);
        let reward = if last_of_chunk {
            f64::from(rewards[index / steps])
        } else {
            0.0
        };
        let gamma = if last_of_chunk { settings.gamma } else { 1.0 };
        let value = f64::from(values[index]);
        let delta = reward + gamma * next_value - value;
        next_advantage = delta + gamma * decay * next_advantage;
        next_value = value;
        *advantage = next_advantage as f32;
        *target = (next_advantage + value) as f32;
    }
    Advantages { advantages, returns }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SETTINGS: EstimatorSettings = EstimatorSettings {
        gamma: 0.9,
        gae_lambda: 1.0,
    };

    fn episode<'a>(rewards: &'a [f32], values: &'a [f32], steps: usize, final_value: f32) -> LayeredEpisode<'a> {
        LayeredEpisode {
            rewards,
            values,
            steps,
            final_value,
        }
    }

    #[test]
    fn lambda_one_is_the_discounted_return_minus_the_value() {
        let (rewards, values) = ([0.0f32, 1.0, 0.5], [0.1f32, 0.2, 0.3, 0.4, 0.5, 0.6]);
        let got = gae_episode(&episode(&rewards, &values, 2, 2.0), SETTINGS);
        // both denoise steps of a chunk have the same discounted return
        let returns = [
            0.9 * (1.0 + 0.9 * (0.5 + 0.9 * 2.0)),
            1.0 + 0.9 * (0.5 + 0.9 * 2.0),
            0.5 + 0.9 * 2.0,
        ];
        for (index, (advantage, target)) in got.advantages.iter().zip(&got.returns).enumerate() {
            let want: f64 = returns[index / 2];
            assert!((f64::from(*target) - want).abs() < 1e-6, "{index}");
            assert!(
                (f64::from(*advantage) - (want - f64::from(values[index]))).abs() < 1e-6,
                "{index}"
            );
        }
    }

    #[test]
    fn an_episode_with_a_value_less_is_refused() {
        let error = gae(&[episode(&[0.0, 1.0], &[0.0; 3], 2, 0.0)], SETTINGS).unwrap_err();
        assert!(error.to_string().contains("episode 0 has 3 for 4 steps"), "{error}");
    }

    #[test]
    fn one_denoise_step_is_the_chunk_estimate() {
        let (rewards, values) = ([0.0f32, 0.0, 1.0], [0.2f32, 0.4, 0.7]);
        let settings = EstimatorSettings {
            gamma: 0.95,
            gae_lambda: 0.8,
        };
        let got = gae_episode(&episode(&rewards, &values, 1, 0.0), settings);
        // computed by hand: A_t = sum (gamma lambda)^k delta_{t+k}
        let next = [0.4, 0.7, 0.0];
        let delta: Vec<f64> = (0..3)
            .map(|t| f64::from(rewards[t]) + 0.95 * next[t] - f64::from(values[t]))
            .collect();
        for t in 0..3 {
            let want: f64 = (t..3).map(|k| (0.95f64 * 0.8).powi((k - t) as i32) * delta[k]).sum();
            assert!((f64::from(got.advantages[t]) - want).abs() < 1e-6);
        }
    }

    #[test]
    fn a_chunk_passes_its_credit_on_with_lambda_whatever_the_number_of_steps() {
        let settings = EstimatorSettings {
            gamma: 1.0,
            gae_lambda: 0.5,
        };
        for steps in [1, 2, 4] {
            let values = vec![0.0; 2 * steps];
            let got = gae_episode(&episode(&[0.0, 1.0], &values, steps, 0.0), settings);
            // the end of the first chunk is one chunk before the end of the second
            let (last, earlier) = (got.advantages[2 * steps - 1], got.advantages[steps - 1]);
            assert!((earlier / last - 0.5).abs() < 1e-6, "{steps} steps: {earlier} {last}");
        }
    }
}
