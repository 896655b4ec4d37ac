//! Comparison of a policy on two devices, on inputs drawn as for a self-test: how far bf16 on a device is from f32 on the host.

use policy::noise::NoiseKey;
use serde::Serialize;
use wire::messages::Mode;

use crate::device::{
    Device, DeviceError, StepPath,
    sampler::{ChunkInput, SampleError, Sampler, drawn_input},
    versions::Policy,
};

/// Differences over all compared chunks.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Comparison {
    /// Always `comparison`.
    pub name: &'static str,
    /// Compared chunks, each with its own observation and noise.
    pub chunks: usize,
    /// Largest magnitude of the reference's actions, in model units.
    pub magnitude: f32,
    /// Largest difference of an action, in model units.
    pub difference: f32,
    /// Smallest cosine between the chunks of the two devices.
    pub cosine: f64,
    /// Compared stochastic denoise steps.
    pub denoise_steps: usize,
    /// Largest `|log_ratio|` of a stochastic denoise step, the mean over the executed actions: the reference's log-probability of
    /// the step that the device sampled, minus the device's.
    pub log_ratio_mean: f64,
    /// Largest `|log_ratio|` of a stochastic denoise step, the sum over the executed actions.
    pub log_ratio_sum: f64,
}

/// Error of a comparison.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CompareError {
    /// The bundles hold different policies.
    #[error("the bundle and the reference have different policies: `{0}` differs")]
    Other(&'static str),
    /// A device failed to sample.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// The reference failed.
    #[error(transparent)]
    Reference(#[from] DeviceError),
}

/// Samples `chunks` training chunks on a device, and compares them with the reference.
///
/// # Errors
/// The policies differ in more than flavour and precision, or a device fails.
pub fn compare<D: Device, R: Device>(
    (device, policy): (&mut D, &Policy),
    (reference, reference_policy): (&mut R, &Policy),
    chunks: usize,
) -> Result<Comparison, CompareError> {
    let (own, other) = (policy.manifest(), reference_policy.manifest());
    let same = [
        ("dims", own.dims == other.dims),
        ("heads", own.heads == other.heads),
        ("sampling", own.sampling == other.sampling),
        ("action_chunk", own.action_chunk == other.action_chunk),
        ("env_action_dim", own.env_action_dim == other.env_action_dim),
    ];
    if let Some((key, _)) = same.into_iter().find(|(_, same)| !same) {
        return Err(CompareError::Other(key));
    }
    let mut result = Comparison {
        name: "comparison",
        chunks,
        magnitude: 0.0,
        difference: 0.0,
        cosine: 1.0,
        denoise_steps: 0,
        log_ratio_mean: 0.0,
        log_ratio_sum: 0.0,
    };
    let (sampler, reference_sampler) = (policy.sampler(), reference_policy.sampler());
    for number in 0..chunks {
        let key = NoiseKey {
            seed: 0,
            env: 0,
            episode: 0,
            chunk: number as u32,
        };
        let row = ChunkInput {
            input: drawn_input(policy.manifest(), number as u64).0,
            noise: sampler.draw(key, Mode::Train),
            key,
            guidance: None,
        };
        let of_device = sampler.sample(device, policy.slot(), vec![row.clone()], None)?.chunks;
        let of_reference = reference_sampler.sample(reference, reference_policy.slot(), vec![row.clone()], None)?;
        let (Some(chunk), Some(expected)) = (of_device.first(), of_reference.chunks.first()) else {
            return Err(SampleError::Short.into());
        };
        let (mut product, mut norm, mut expected_norm) = (0.0, 0.0, 0.0);
        for (a, b) in chunk.actions().iter().zip(expected.actions()) {
            // a difference that is not a number is kept
            let difference = (a - b).abs();
            if difference.is_nan() || difference > result.difference {
                result.difference = difference;
            }
            result.magnitude = result.magnitude.max(b.abs());
            product += f64::from(*a) * f64::from(*b);
            norm += f64::from(*a).powi(2);
            expected_norm += f64::from(*b).powi(2);
        }
        let cosine = product / (norm * expected_norm).sqrt();
        if cosine.is_nan() || cosine < result.cosine {
            result.cosine = cosine;
        }
        let prefix = reference.prefix(reference_policy.slot(), Sampler::prefix_batch(&[&row]))?;
        let path = reference_sampler.path(&[&row])?;
        let elements = chunk.actions().len();
        let executed = chunk.logprob.len() / chunk.denoise_steps.len().max(1);
        for (k, logprob) in chunk.denoise_steps.iter().zip(chunk.logprob.chunks(executed.max(1))) {
            let at = |step: usize| chunk.chain.get(step * elements..(step + 1) * elements);
            let (Some(x), Some(x_next), Some(step)) = (at(*k), at(k + 1), path.steps.get(*k)) else {
                return Err(SampleError::Short.into());
            };
            let one = StepPath {
                initial: x.to_vec(),
                steps: vec![step.clone()],
                guidance: vec![None],
            };
            let outputs = reference.denoise(reference_policy.slot(), &prefix, &one)?;
            let output = outputs.first().ok_or(SampleError::Short)?;
            let std = match &output.step_std {
                Some(std) => std.clone(),
                None => vec![step.std.first().copied().ok_or(SampleError::Short)?; elements],
            };
            let expected = reference_sampler.logprob(x_next, &output.mean, &std);
            let sum = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>();
            let log_ratio = (sum(&expected) - sum(logprob)).abs();
            result.denoise_steps += 1;
            if log_ratio.is_nan() || log_ratio > result.log_ratio_sum {
                result.log_ratio_sum = log_ratio;
                result.log_ratio_mean = log_ratio / executed.max(1) as f64;
            }
        }
    }
    Ok(result)
}
