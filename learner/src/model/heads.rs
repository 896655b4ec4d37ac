//! The value head (linear layers with ReLU between, one number out) and the noise head of Flow-Noise (tanh, a standard deviation out).

use policy::params::{NoiseHeadDims, ValueHeadDims, noise_layer};
use tch::Tensor;

use super::{ModelError, gemma::Linear, store::ParamStore};

/// Value head on one feature vector per sample.
#[derive(Debug)]
pub(super) struct ValueHead {
    layers: Vec<Linear>,
    /// What the head reads.
    pub(super) dims: ValueHeadDims,
}

impl ValueHead {
    pub(super) fn new(store: &ParamStore, dims: &ValueHeadDims) -> Result<Self, ModelError> {
        let layers = (0..=dims.hidden.len())
            .map(|i| Linear::new(store, &format!("value_head.mlp.{}", 2 * i)))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            layers,
            dims: dims.clone(),
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

/// Noise head: the standard deviation of every action element from the expert's output of its token.
#[derive(Debug)]
pub(super) struct NoiseHead {
    pub(super) dims: NoiseHeadDims,
    layers: Vec<Linear>,
    /// Ends of the log-variance.
    logvar: (f64, f64),
}

impl NoiseHead {
    pub(super) fn new(store: &ParamStore, dims: &NoiseHeadDims) -> Result<Self, ModelError> {
        let layers = (0..=dims.hidden.len())
            .map(|i| Linear::new(store, &noise_layer(i)))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            layers,
            logvar: dims.logvar_range(),
            dims: dims.clone(),
        })
    }

    /// `[B, H, width]` to `[B, H, A]`: `exp(logvar / 2)`, `logvar = low + (high - low) (tanh(z) + 1) / 2` (piRL, Flow-Noise).
    pub(super) fn forward(&self, hidden: &Tensor) -> Tensor {
        let mut x = hidden.shallow_clone();
        for layer in &self.layers {
            x = layer.forward(&x).tanh();
        }
        let (low, high) = self.logvar;
        ((x + 1.0) * ((high - low) / 4.0) + low / 2.0).exp()
    }
}
