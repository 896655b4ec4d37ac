//! Value head (linear layers with ReLU in between, one output) and noise head of Flow-Noise (linear layers with tanh, standard
//! deviations as output).

use policy::params::{NoiseHeadDims, ValueHeadDims, noise_layer};
use tch::Tensor;

use super::{ModelError, gemma::Linear, store::ParamStore};

/// Value head on one feature vector per sample.
#[derive(Debug)]
pub(super) struct ValueHead {
    layers: Vec<Linear>,
    /// Input feature and layer widths of the head.
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

    /// Maps features `[B, width]` to values `[B]`.
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

/// Noise head: maps the expert's output of each action token to the standard deviations of its action elements.
#[derive(Debug)]
pub(super) struct NoiseHead {
    pub(super) dims: NoiseHeadDims,
    layers: Vec<Linear>,
    /// Lower and upper bound of the log-variance.
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

    /// Maps `[B, H, width]` to standard deviations `[B, H, A]`: `exp(logvar / 2)`,
    /// `logvar = low + (high - low) (tanh(z) + 1) / 2` (piRL, Flow-Noise).
    pub(super) fn forward(&self, hidden: &Tensor) -> Tensor {
        let mut x = hidden.shallow_clone();
        for layer in &self.layers {
            x = layer.forward(&x).tanh();
        }
        let (low, high) = self.logvar;
        ((x + 1.0) * ((high - low) / 4.0) + low / 2.0).exp()
    }
}
