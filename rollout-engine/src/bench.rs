//! Chunk latency by batch size, on inputs drawn as for a self-test.

use std::time::Instant;

use policy::noise::NoiseKey;
use serde::Serialize;
use wire::messages::Mode;

use crate::device::{
    Device,
    sampler::{ChunkInput, SampleError, drawn_input},
    versions::Policy,
};

/// Latency of action chunks at one batch size.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Latency {
    /// Always `chunk_latency`.
    pub name: &'static str,
    /// Rows of a batch.
    pub batch: usize,
    /// Number of measured batches.
    pub batches: usize,
    /// Median milliseconds of a batch.
    pub p50_ms: f64,
    /// 99th percentile of a batch, in milliseconds.
    pub p99_ms: f64,
    /// Median milliseconds of the prefix graph, per batch.
    pub prefix_p50_ms: f64,
    /// Median milliseconds of all denoise steps, per batch.
    pub denoise_p50_ms: f64,
    /// Action chunks per second at the median.
    pub chunks_per_second: f64,
}

/// Measures `batches` batches of `rows` rows in training mode, after three warm-up batches.
///
/// # Errors
/// The device fails.
pub fn chunk_latency<D: Device>(
    device: &mut D,
    policy: &Policy,
    rows: usize,
    batches: usize,
) -> Result<Latency, SampleError> {
    let sampler = policy.sampler();
    let inputs: Vec<_> = (0..rows as u64)
        .map(|seed| drawn_input(policy.manifest(), seed).0)
        .collect();
    let warm_up = 3;
    let (mut whole, mut prefix, mut denoise) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..batches + warm_up {
        let batch = inputs
            .iter()
            .enumerate()
            .map(|(env, input)| {
                let key = NoiseKey {
                    seed: 0,
                    env: env as u32,
                    episode: 0,
                    chunk: round as u32,
                };
                ChunkInput {
                    input: input.clone(),
                    noise: sampler.draw(key, Mode::Train),
                    key,
                    guidance: None,
                }
            })
            .collect();
        let begun = Instant::now();
        let sampled = sampler.sample(device, policy.slot(), batch, None)?;
        if round >= warm_up {
            whole.push(begun.elapsed().as_secs_f64() * 1e3);
            prefix.push(sampled.prefix.as_secs_f64() * 1e3);
            denoise.push(sampled.denoise.as_secs_f64() * 1e3);
        }
    }
    let p50_ms = quantile(&mut whole, 0.5);
    Ok(Latency {
        name: "chunk_latency",
        batch: rows,
        batches,
        p50_ms,
        p99_ms: quantile(&mut whole, 0.99),
        prefix_p50_ms: quantile(&mut prefix, 0.5),
        denoise_p50_ms: quantile(&mut denoise, 0.5),
        chunks_per_second: rows as f64 * 1e3 / p50_ms,
    })
}

/// Returns the smallest value that is at least as large as the fraction `q` of the values; NaN without values.
fn quantile(values: &mut [f64], q: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (q * values.len() as f64).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn quantiles_of_a_hundred() {
        let mut values: Vec<f64> = (1..=100).rev().map(f64::from).collect();
        assert_eq!((quantile(&mut values, 0.5), quantile(&mut values, 0.99)), (50.0, 99.0));
        assert!(quantile(&mut [], 0.5).is_nan());
    }
}
