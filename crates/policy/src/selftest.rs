//! Inputs of a bundle's self-test, drawn from a seed, so that publisher and engine need not exchange inputs.

use crate::{
    dims::PolicyDims,
    noise::{Purpose, below, fill_normal, stream, uniform},
    transform::ModelInput,
};

/// One observation in model units, with all cameras and at least one valid prompt token, and its initial noise.
#[derive(Debug, Clone, PartialEq)]
pub struct SelfTestInput {
    /// Observation in model units.
    pub input: ModelInput,
    /// Initial noise, `[action_horizon, action_dim]`.
    pub noise: Vec<f32>,
}

impl SelfTestInput {
    /// Draws the inputs for these sizes from `seed`.
    pub fn draw(dims: &PolicyDims, seed: u64) -> Self {
        let mut rng = stream(Purpose::SelfTest, seed, 0, 0, 0);
        let size = dims.vision.image_size;
        let images = (0..dims.cameras * size * size * 3)
            .map(|_| below(&mut rng, 256) as u8)
            .collect();
        let prompt = (0..dims.prompt_len)
            .map(|_| below(&mut rng, dims.vocab) as i64)
            .collect();
        let valid = 1 + below(&mut rng, dims.prompt_len);
        let prompt_mask = (0..dims.prompt_len).map(|i| i < valid).collect();
        let state = (0..dims.action_dim)
            .map(|_| (2.0 * uniform(&mut rng) - 1.0) as f32)
            .collect();
        let mut noise = vec![0.0; dims.action_horizon * dims.action_dim];
        fill_normal(&mut rng, &mut noise);
        let input = ModelInput {
            images,
            image_mask: vec![true; dims.cameras],
            prompt,
            prompt_mask,
            state,
        };
        Self { input, noise }
    }
}
