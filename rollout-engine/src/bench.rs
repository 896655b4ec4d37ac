//! Chunk latency by batch size and during reloads, on inputs drawn as for a self-test.

use std::{
    path::Path,
    sync::{Arc, Mutex, PoisonError, mpsc},
    thread,
    time::Instant,
};

use policy::noise::NoiseKey;
use serde::Serialize;
use wire::messages::Mode;

use crate::device::{
    Device, DeviceError, Loader, Slot,
    sampler::{ChunkInput, SampleError, drawn_input},
    versions::{Free, Policy, PolicyError},
};

/// Latency of action chunks at one batch size.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Latency {
    /// Always `chunk_latency`.
    pub name: &'static str,
    /// Rows of a batch.
    pub batch: usize,
    /// Present cameras of a row.
    pub cameras: usize,
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

/// Rows of one batch size with the same observations in every batch; the first `cameras` cameras are present.
fn batch_of(policy: &Policy, (rows, cameras): (usize, usize), round: usize) -> Vec<ChunkInput> {
    (0..rows)
        .map(|row| {
            let key = NoiseKey {
                seed: 0,
                env: row as u32,
                episode: 0,
                chunk: round as u32,
            };
            let mut input = drawn_input(policy.manifest(), row as u64).0;
            for present in input.image_mask.iter_mut().skip(cameras) {
                *present = false;
            }
            ChunkInput {
                input,
                noise: policy.sampler().draw(key, Mode::Train),
                key,
                guidance: None,
            }
        })
        .collect()
}

/// Measures `batches` batches of rows with some present cameras in training mode, after three warm-up batches.
///
/// # Errors
/// The device fails.
pub fn chunk_latency<D: Device>(
    device: &mut D,
    policy: &Policy,
    (rows, cameras): (usize, usize),
    batches: usize,
) -> Result<Latency, SampleError> {
    let warm_up = 3;
    let (mut whole, mut prefix, mut denoise) = (Vec::new(), Vec::new(), Vec::new());
    for round in 0..batches + warm_up {
        let batch = batch_of(policy, (rows, cameras), round);
        let begun = Instant::now();
        let sampled = policy.sampler().sample(device, policy.slot(), batch, None)?;
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
        cameras,
        batches,
        p50_ms,
        p99_ms: quantile(&mut whole, 0.99),
        prefix_p50_ms: quantile(&mut prefix, 0.5),
        denoise_p50_ms: quantile(&mut denoise, 0.5),
        chunks_per_second: rows as f64 * 1e3 / p50_ms,
    })
}

/// Latency of action chunks while versions are loaded one after another.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ReloadLatency {
    /// Always `reload_latency`.
    pub name: &'static str,
    /// Number of loaded versions.
    pub reloads: usize,
    /// Number of measured chunks.
    pub chunks: usize,
    /// Median milliseconds of a chunk, including the work between chunks.
    pub p50_ms: f64,
    /// 99th percentile of a chunk, in milliseconds.
    pub p99_ms: f64,
    /// Longest chunk in milliseconds: the largest gap that a client sees.
    pub longest_ms: f64,
    /// Median milliseconds from the start of a load, verification included, until the version serves.
    pub live_p50_ms: f64,
    /// Longest load in milliseconds.
    pub live_longest_ms: f64,
}

/// Error of a measurement during reloads.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ReloadError {
    /// The device failed to sample.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// A version was rejected.
    #[error(transparent)]
    Policy(#[from] PolicyError),
}

/// Samples chunks without a pause while another thread loads the bundles of `dirs` in turn, `reloads` times. `freed` are the slots
/// that `free` returns.
///
/// # Errors
/// The device fails or rejects a version.
pub fn reload_latency<L: Loader>(
    loader: &L,
    device: &mut L::Device,
    policy: Arc<Policy>,
    (free, freed): (&Free, &mpsc::Receiver<Slot>),
    dirs: [&Path; 2],
    reloads: usize,
) -> Result<ReloadLatency, ReloadError> {
    let live = &Mutex::new(policy);
    let serving = || Arc::clone(&live.lock().unwrap_or_else(PoisonError::into_inner));
    let (work, waiting) = mpsc::channel();
    let (mut gaps, mut loads) = (Vec::new(), Vec::new());
    let loaded = thread::scope(|scope| {
        // dropped at an error, so that the loader does not wait for an answer
        let waiting = waiting;
        let load = scope.spawn(move || {
            let mut seconds = Vec::with_capacity(reloads);
            for dir in dirs.into_iter().cycle().skip(1).take(reloads) {
                let begun = Instant::now();
                let install = |staged, test| {
                    let (reply, installed) = mpsc::sync_channel(1);
                    work.send((staged, test, reply)).map_err(|_ended| DeviceError::Closed)?;
                    installed.recv().map_err(|_ended| DeviceError::Closed)?
                };
                let next = Policy::load(loader, dir, Some(&serving()), install, Arc::clone(free))?;
                *live.lock().unwrap_or_else(PoisonError::into_inner) = Arc::new(next);
                seconds.push(begun.elapsed().as_secs_f64() * 1e3);
            }
            Ok::<_, PolicyError>(seconds)
        });
        let mut round = 0;
        while !load.is_finished() {
            let batch = {
                let policy = serving();
                let manifest = policy.manifest();
                batch_of(&policy, (manifest.batch.unwrap_or(1), manifest.dims.cameras), round)
            };
            round += 1;
            let begun = Instant::now();
            for slot in freed.try_iter() {
                device.free(slot);
            }
            for (staged, test, reply) in waiting.try_iter() {
                // a loader that has ended wants no answer
                let _ended = reply.send(device.install(staged, &test));
            }
            let policy = serving();
            policy.sampler().sample(device, policy.slot(), batch, None)?;
            gaps.push(begun.elapsed().as_secs_f64() * 1e3);
        }
        #[expect(clippy::expect_used, reason = "a panic of the loader goes on in the caller")]
        let seconds = load.join().expect("the loading thread")?;
        Ok::<_, ReloadError>(seconds)
    });
    loads.extend(loaded?);
    Ok(ReloadLatency {
        name: "reload_latency",
        reloads,
        chunks: gaps.len(),
        p50_ms: quantile(&mut gaps, 0.5),
        p99_ms: quantile(&mut gaps, 0.99),
        longest_ms: quantile(&mut gaps, 1.0),
        live_p50_ms: quantile(&mut loads, 0.5),
        live_longest_ms: quantile(&mut loads, 1.0),
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
