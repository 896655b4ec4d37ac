//! From a sample to what leaves the engine: actions in the environment's units and the chunk record.

use policy::norm::NormError;
use wire::{
    array::Array,
    messages::{ActedRow, ChunkRecord},
};

use crate::{infer::Sample, policy_slot::LoadedPolicy};

/// The executed actions in the environment's units, f32 `[action_chunk, env_action_dim]`.
///
/// # Errors
/// The statistics do not fit.
pub fn actions(policy: &LoadedPolicy, sample: &Sample) -> Result<Array, NormError> {
    let manifest = &policy.manifest;
    let width = manifest.env_action_dim;
    let mut values = Vec::with_capacity(manifest.action_chunk * width);
    for row in sample
        .actions()
        .chunks(manifest.dims.action_dim)
        .take(manifest.action_chunk)
    {
        let executed = row.get(..width).unwrap_or(row);
        values.extend(manifest.env_action(executed, &sample.input.state)?);
    }
    Ok(Array::f32(&[manifest.action_chunk, width], &values))
}

/// Everything about the chunk that training needs.
pub fn chunk_record(policy: &LoadedPolicy, sample: Sample) -> ChunkRecord {
    let manifest = &policy.manifest;
    let dims = &manifest.dims;
    let size = dims.vision.image_size;
    ChunkRecord {
        key: sample.key,
        version: manifest.policy_version,
        images: Array::u8(&[dims.cameras, size, size, 3], sample.input.images),
        image_mask: sample.input.image_mask,
        prompt: sample.input.prompt,
        prompt_mask: sample.input.prompt_mask,
        state: Array::f32(&[dims.action_dim], &sample.input.state),
        denoise_steps: sample.denoise_steps.iter().map(|k| *k as u32).collect(),
        chain: Array::f32(
            &[manifest.sampling.num_steps + 1, dims.action_horizon, dims.action_dim],
            &sample.chain,
        ),
        logprob: (!sample.logprob.is_empty()).then(|| {
            let shape = [
                sample.denoise_steps.len(),
                manifest.action_chunk,
                manifest.env_action_dim,
            ];
            Array::f32(&shape, &sample.logprob)
        }),
        values: sample.values,
    }
}

/// Actions and, when asked for, the record.
///
/// # Errors
/// The statistics do not fit.
pub fn acted(policy: &LoadedPolicy, sample: Sample, record: bool) -> Result<ActedRow, NormError> {
    let actions = actions(policy, &sample)?;
    let record = record.then(|| Box::new(chunk_record(policy, sample)));
    Ok(ActedRow { actions, record })
}
