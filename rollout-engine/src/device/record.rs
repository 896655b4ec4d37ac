//! The chunk record: the data of a sampled chunk that training needs.

use policy::bundle::Manifest;
use wire::{array::Array, messages::ChunkRecord};

use super::sampler::SampledChunk;

/// Returns the record of a chunk.
pub fn chunk_record(manifest: &Manifest, chunk: SampledChunk) -> ChunkRecord {
    let dims = &manifest.dims;
    let size = dims.vision.image_size;
    ChunkRecord {
        key: chunk.key,
        version: manifest.policy_version,
        images: Array::u8(&[dims.cameras, size, size, 3], chunk.input.images),
        image_mask: chunk.input.image_mask,
        prompt: chunk.input.prompt,
        prompt_mask: chunk.input.prompt_mask,
        state: Array::f32(&[dims.action_dim], &chunk.input.state),
        denoise_steps: chunk.denoise_steps.iter().map(|k| *k as u32).collect(),
        chain: Array::f32(
            &[manifest.sampling.num_steps + 1, dims.action_horizon, dims.action_dim],
            &chunk.chain,
        ),
        logprob: (!chunk.logprob.is_empty()).then(|| {
            let shape = [
                chunk.denoise_steps.len(),
                manifest.action_chunk,
                manifest.env_action_dim,
            ];
            Array::f32(&shape, &chunk.logprob)
        }),
        values: chunk.values,
    }
}
