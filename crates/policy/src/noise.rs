//! Counter-based random numbers: the noise of a chunk is a pure function of (run seed, env, episode, chunk).
//!
//! ChaCha8 is keyed by these numbers, so that the noise has the same bits in any batch and on any host. Logarithm, sine and
//! cosine come from a pure Rust library for the same reason.

use chacha20::ChaCha8Rng;
use rand_core::{Rng, SeedableRng};
use serde::{Deserialize, Serialize};

use crate::flow::StepDraw;

/// Key of the noise of one action chunk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoiseKey {
    /// Seed of the run.
    pub seed: u64,
    /// Environment number.
    pub env: u32,
    /// Episode number of that environment.
    pub episode: u64,
    /// Chunk number in the episode.
    pub chunk: u32,
}

/// Purpose of a stream of random numbers; each purpose has a separate stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub enum Purpose {
    /// Initial noise, stochastic step and step noise of a chunk.
    Sampling = 1,
    /// Reset of an environment.
    Reset = 2,
    /// Order of minibatches.
    Minibatch = 3,
    /// Flow-matching times and noise.
    FlowMatching = 4,
    /// Initial weights.
    Init = 5,
    /// Inputs of a bundle self-test.
    SelfTest = 6,
    /// Flow times and noise of a loss on the velocity.
    Velocity = 7,
}

/// Returns the random stream for a purpose, keyed by four numbers.
pub fn stream(purpose: Purpose, seed: u64, a: u64, b: u64, c: u32) -> ChaCha8Rng {
    let mut key = [0u8; 32];
    key[0..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&a.to_le_bytes());
    key[16..24].copy_from_slice(&b.to_le_bytes());
    key[24..28].copy_from_slice(&c.to_le_bytes());
    key[28..32].copy_from_slice(&(purpose as u32).to_le_bytes());
    ChaCha8Rng::from_seed(key)
}

/// Draws a uniform number in `[0, 1)` with 53 random bits.
pub fn uniform(rng: &mut impl Rng) -> f64 {
    (rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64
}

/// Draws a uniform integer in `0..bound` (`bound > 0`), with a bias of at most 2^-53.
pub fn below(rng: &mut impl Rng, bound: usize) -> usize {
    ((uniform(rng) * bound as f64) as usize).min(bound.saturating_sub(1))
}

/// Fills `out` with standard normal numbers (Box and Muller 1958).
pub fn fill_normal(rng: &mut impl Rng, out: &mut [f32]) {
    for pair in out.chunks_mut(2) {
        // 1 - u is in (0, 1]: the logarithm is finite
        let radius = libm::sqrt(-2.0 * libm::log(1.0 - uniform(rng)));
        let angle = std::f64::consts::TAU * uniform(rng);
        for (slot, value) in pair
            .iter_mut()
            .zip([radius * libm::cos(angle), radius * libm::sin(angle)])
        {
            *slot = value as f32;
        }
    }
}

/// Noise of one stochastic denoise step.
#[derive(Debug, Clone, PartialEq)]
pub struct StepNoise {
    /// Index of the denoise step.
    pub step: usize,
    /// `z` of that step, `[action_horizon, action_dim]`.
    pub z: Vec<f32>,
}

/// All random numbers of one action chunk.
#[derive(Debug, Clone, PartialEq)]
pub struct ChunkNoise {
    /// Initial noise `x` at `t = 1`, `[action_horizon, action_dim]`.
    pub initial: Vec<f32>,
    /// Noise of the stochastic steps, in order.
    pub steps: Vec<StepNoise>,
}

impl ChunkNoise {
    /// Draws the numbers of the chunk with this `key`; `elements = action_horizon * action_dim`, `draw` is the schedule's choice.
    pub fn draw(key: NoiseKey, elements: usize, draw: StepDraw) -> Self {
        let mut rng = stream(Purpose::Sampling, key.seed, u64::from(key.env), key.episode, key.chunk);
        let mut initial = vec![0.0; elements];
        fill_normal(&mut rng, &mut initial);
        let steps = match draw {
            StepDraw::One { of: 0 } => Vec::new(),
            StepDraw::One { of } => vec![below(&mut rng, of)],
            StepDraw::Every { of } => (0..of).collect(),
        };
        let steps = steps.into_iter().map(|step| {
            let mut z = vec![0.0; elements];
            fill_normal(&mut rng, &mut z);
            StepNoise { step, z }
        });
        Self {
            initial,
            steps: steps.collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn moments_of_the_normal_stream() {
        let mut rng = stream(Purpose::Sampling, 7, 1, 2, 3);
        let mut x = vec![0.0; 200_000];
        fill_normal(&mut rng, &mut x);
        let n = x.len() as f64;
        let mean = x.iter().map(|v| f64::from(*v)).sum::<f64>() / n;
        let var = x.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>() / n;
        let kurtosis = x.iter().map(|v| f64::from(*v).powi(4)).sum::<f64>() / n;
        // five standard errors of 200,000 samples: 1/sqrt(n), sqrt(2/n), sqrt(96/n)
        assert!(mean.abs() < 0.0112, "{mean}");
        assert!((var - 1.0).abs() < 0.0158, "{var}");
        assert!((kurtosis - 3.0).abs() < 0.11, "{kurtosis}");
    }

    #[test]
    fn pinned_bits() {
        // stored chunks of earlier runs are replayed with these bits: a change of the bits is a change of the run format
        let noise = ChunkNoise::draw(
            NoiseKey {
                seed: 1,
                env: 2,
                episode: 3,
                chunk: 4,
            },
            3,
            StepDraw::One { of: 4 },
        );
        let bits: Vec<u32> = noise
            .initial
            .iter()
            .chain(&noise.steps[0].z)
            .map(|v| v.to_bits())
            .collect();
        let pinned = [
            1_061_512_408,
            3_189_976_765,
            3_202_641_846,
            3_208_276_631,
            3_210_845_872,
            3_202_542_534,
        ];
        assert_eq!(bits, pinned);
        assert_eq!(noise.steps[0].step, 2);
    }

    #[test]
    fn every_step_is_drawn_equally_often() {
        let mut counts = [0usize; 4];
        for env in 0..8000 {
            let noise = ChunkNoise::draw(
                NoiseKey {
                    seed: 5,
                    env,
                    episode: 0,
                    chunk: 0,
                },
                1,
                StepDraw::One { of: 4 },
            );
            counts[noise.steps[0].step] += 1;
        }
        // five standard errors: 5 sqrt(8000 * 1/4 * 3/4)
        assert!(counts.iter().all(|c| c.abs_diff(2000) < 194), "{counts:?}");
    }
}
