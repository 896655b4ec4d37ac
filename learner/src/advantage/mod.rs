//! Advantages and returns on plain slices, one file per estimator, without a tensor library and without state.
//!
//! An estimator accepts [`Episode`]s of any length: a finished environment adds no padding rows.
//!
//! Time limits: an episode that *terminates* has value 0 after the last step. An episode that is *truncated* (time limit, cut
//! by the collector) is bootstrapped with the value of the last observation (Pardo et al. 2018, "Time Limits in
//! Reinforcement Learning", eq. 3).

mod normalize;
mod error;
mod episode;
mod spec;
mod group;
mod two_layer;
mod gae;
mod reward_to_go;
mod raw;
mod grpo;
mod reinforce_pp;

pub use episode::{Advantages, Episode, LayeredEpisode};
pub use error::{AdvantageError, Result};
pub use gae::gae_episode;
pub use normalize::{NORMALIZE_EPS, mean_and_std, normalize};
pub use spec::{Estimator, EstimatorSettings, EstimatorSpec, LayeredEstimator};

/// Registry of advantage estimators, one entry per `algorithm.adv_type`.
pub const ESTIMATORS: &[EstimatorSpec] = &[
    gae::SPEC,
    grpo::SPEC,
    reinforce_pp::SPEC,
    reinforce_pp::BASELINE,
    raw::SPEC,
];

/// Looks up an advantage estimator of [`ESTIMATORS`] by name.
pub fn estimator(name: &str) -> Option<Estimator> {
    ESTIMATORS
        .iter()
        .find(|spec| spec.adv_type == name)
        .map(|spec| spec.estimate)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Draws deterministic numbers in [-1, 1) from a linear congruential generator: the tests need varied numbers only.
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
    fn gae_is_the_sum_of_the_discounted_errors_of_the_values() {
        // Schulman et al. 2016, eq. 16; at lambda 1 the advantage is the discounted return minus the value
        for (seed, lambda) in [(1, 0.0), (2, 0.9), (3, 1.0)] {
            let (rewards, values) = (numbers(seed, 9), numbers(seed + 10, 9));
            let advantages = gae_episode(&rewards, 1, &values, 0.7, 0.97, lambda);
            let next = values[1..].iter().chain(&[0.7]);
            let errors: Vec<f64> = rewards
                .iter()
                .zip(values.iter().zip(next))
                .map(|(reward, (value, next))| f64::from(*reward) + 0.97 * f64::from(*next) - f64::from(*value))
                .collect();
            for (t, advantage) in advantages.iter().enumerate() {
                let weighted = errors[t..].iter().enumerate();
                let want: f64 = weighted.map(|(k, error)| (0.97 * lambda).powi(k as i32) * error).sum();
                assert!(
                    close(*advantage, want as f32),
                    "lambda {lambda}: {advantage} against {want}"
                );
            }
        }
    }

    #[test]
    fn the_registry_knows_its_names_and_refuses_what_it_cannot_estimate() {
        let settings = EstimatorSettings {
            gamma: 0.99,
            gae_lambda: 0.95,
        };
        assert!(estimator("reinpp_").is_none());
        let rewards = [0.0, 1.0];
        let episode = Episode {
            rewards: &rewards,
            chunk_len: 1,
            values: &[],
            final_value: 0.0,
            group: 3,
        };
        let gae = estimator("gae").unwrap();
        assert!(
            gae(&[episode], settings)
                .unwrap_err()
                .to_string()
                .contains("has 0 for 2 chunks")
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
    fn reinforce_pp_is_the_discounted_reward_to_go_or_the_score_above_the_groups() {
        let settings = EstimatorSettings {
            gamma: 0.5,
            gae_lambda: 0.95,
        };
        let episode = Episode {
            rewards: &[0.0, 1.0, 4.0],
            chunk_len: 1,
            values: &[],
            final_value: 9.0,
            group: 0,
        };
        let other = Episode {
            rewards: &[1.0],
            ..episode
        };
        let plain = estimator("reinforce_pp").unwrap()(&[episode, other], settings).unwrap();
        assert_eq!(plain[0].advantages, [1.5, 3.0, 4.0]);
        assert_eq!(plain[1].advantages, [1.0]);
        let against = estimator("reinforce_pp_baseline").unwrap();
        let grouped = against(&[episode, other], settings).unwrap();
        // scores 5 and 1, mean 3; the returns are the undiscounted rewards to go
        assert_eq!(grouped[0].advantages, [2.0, 2.0, 2.0]);
        assert_eq!(grouped[0].returns, [5.0, 5.0, 4.0]);
        assert_eq!(grouped[1].advantages, [-2.0]);
        assert!(against(&[episode], settings).is_err());
    }

    #[test]
    fn action_level_advantages_discount_within_the_chunk_and_look_at_values_between_chunks() {
        // computed by hand with gamma 0.5 and lambda 0.5: chunks of 2 actions, the last cut after 1
        let episode = Episode {
            rewards: &[1.0, 2.0, 4.0],
            chunk_len: 2,
            values: &[10.0, 20.0],
            final_value: 8.0,
            group: 0,
        };
        let settings = EstimatorSettings {
            gamma: 0.5,
            gae_lambda: 0.5,
        };
        let got = estimator("gae").unwrap()(&[episode], settings).unwrap().remove(0);
        // last chunk: 4 + 0.5 * 8 - 20 = -12; bootstrap of the first chunk: 20 + 0.5 * -12 = 14
        let want = [1.0 + 0.5 * (2.0 + 0.5 * 14.0) - 10.0, 2.0 + 0.5 * 14.0 - 10.0, -12.0];
        assert_eq!(got.advantages, want);
        assert_eq!(got.returns, [want[0] + 10.0, want[2] + 20.0]);
    }
}
