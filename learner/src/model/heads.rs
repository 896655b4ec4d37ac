//! The value head: linear layers with ReLU between, one number out.

use policy::params::{CriticInput, ValueHeadDims};
use tch::Tensor;

use super::{ModelError, gemma::Linear, store::ParamStore};

/// Value head on one feature vector per sample.
#[derive(Debug)]
pub(super) struct ValueHead {
    layers: Vec<Linear>,
    /// What the head reads.
    pub(super) input: CriticInput,
    /// Whether the state follows the features.
    pub(super) state: bool,
}

impl ValueHead {
    pub(super) fn new(store: &ParamStore, dims: &ValueHeadDims) -> Result<Self, ModelError> {
        let layers = (0..=dims.hidden.len())
            .map(|i| Linear::new(store, &format!("value_head.mlp.{}", 2 * i)))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            layers,
            input: dims.input,
            state: dims.state,
        })
    }

    /// `[B, width]` to `[B]`.
    pub(super) fn forward(&self, feature: &Tensor) -> Tensor {
        let mut x = feature.shallow_clone();
        for (index, layer) in self.layers.iter().enumerate() {
            x = layer.forward(&x);
            if index + 1 < self.layers.len() {
                x = x.relu();
            }
        }
        x.squeeze_dim(-1)
    }
}
