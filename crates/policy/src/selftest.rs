//! The inputs of a bundle's self-test: drawn from a seed, so that publisher and engine need not exchange them.

use crate::{
    dims::PolicyDims,
    noise::{Purpose, below, fill_normal, stream, uniform},
};

/// One observation in model units and its initial noise.
#[derive(Debug, Clone, PartialEq)]
pub struct SelfTestInput {
    /// Pixels, `[cameras, size, size, 3]`, 0 to 255.
    pub images: Vec<u8>,
    /// Prompt ids, `[prompt_len]`.
    pub prompt: Vec<i64>,
    /// Which of them are valid, `[prompt_len]`; at least the first.
    pub prompt_mask: Vec<bool>,
    /// State, `[action_dim]`.
    pub state: Vec<f32>,
    /// Initial noise, `[action_horizon, action_dim]`.
    pub noise: Vec<f32>,
}

impl SelfTestInput {
    /// Draws the inputs for these sizes.
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
        Self {
            images,
            prompt,
            prompt_mask,
            state,
            noise,
        }
    }
}
