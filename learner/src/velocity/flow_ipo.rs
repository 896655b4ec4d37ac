//! `flow_ipo`: reward-directed velocity interpolation. The target is pulled from the reference's velocity towards the recorded
//! chunk's as far as the chunk's credit says.

use std::collections::BTreeMap;

use serde::Deserialize;
use tch::Tensor;

use super::{
    method::{Episodes, Velocities, VelocityLoss},
    params::{ParamsError, check_positive, check_times, parameters},
};
use crate::advantage::mean_and_std;

/// Keeps the quotient finite in episodes whose chunks are all as far from the reference.
const SPREAD_EPS: f64 = 1e-6;

/// What makes the credit of a chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Credit {
    /// `(2 R - 1) z(|a - a_ref|)`, `z` over the chunks of the episode: in a success the chunks that left the reference are kept, in
    /// a failure they are taken back (the method as published).
    Displacement,
    /// The advantage.
    Advantage,
}

/// `algorithm.velocity.params`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct FlowIpo {
    /// Sharpness of the weight `w = sigmoid(alpha credit)`.
    alpha: f64,
    t_min: f64,
    t_max: f64,
    credit: Credit,
}

/// The method with these parameters.
pub(super) fn build(params: &toml::Table) -> Result<Box<dyn VelocityLoss>, ParamsError> {
    let method: FlowIpo = parameters(params)?;
    check_positive("alpha", method.alpha)?;
    check_times(method.t_min, method.t_max)?;
    Ok(Box::new(method))
}

impl VelocityLoss for FlowIpo {
    fn reads_displacement(&self) -> bool {
        self.credit == Credit::Displacement
    }

    fn reads_advantages(&self) -> bool {
        self.credit == Credit::Advantage
    }

    fn credit(&self, episodes: &Episodes<'_>) -> Vec<f32> {
        let weight = |credit: f64| (1.0 / (1.0 + (-self.alpha * credit).exp())) as f32;
        if self.credit == Credit::Advantage {
            return episodes.advantages.iter().map(|a| weight(f64::from(*a))).collect();
        }
        let mut by_episode: BTreeMap<usize, Vec<f32>> = BTreeMap::new();
        for (episode, distance) in episodes.episode.iter().zip(episodes.displacement) {
            by_episode.entry(*episode).or_default().push(*distance);
        }
        // an entry has a chunk or more; a lone one has no neighbours to be compared with: its credit is 0
        let spread: BTreeMap<usize, (f64, f64)> = by_episode
            .into_iter()
            .map(|(episode, chunks)| {
                let lone = || (f64::from(chunks[0]), 0.0);
                (episode, mean_and_std(&chunks, None).unwrap_or_else(lone))
            })
            .collect();
        episodes
            .episode
            .iter()
            .zip(episodes.success)
            .zip(episodes.displacement)
            .map(|((episode, success), distance)| {
                // the loop above made an entry for every episode with a distance
                let (mean, std) = spread[episode];
                let sign = if *success { 1.0 } else { -1.0 };
                weight(sign * (f64::from(*distance) - mean) / (std + SPREAD_EPS))
            })
            .collect()
    }

    fn times(&self) -> (f64, f64) {
        (self.t_min, self.t_max)
    }

    /// `|v - (w u + (1 - w) v_ref)|^2`
    fn loss(&self, input: &Velocities<'_>) -> Tensor {
        let weight = input.credit.view([-1, 1, 1]);
        let target = input.target * &weight + input.reference * (1.0 - &weight);
        input.distance(input.velocity, &target)
    }
}
