//! `nft`: the trained velocity is contrasted with its mirror image about the reference's (`DiffusionNFT`, Zheng et al. 2025, eq. 7;
//! the ranking form after `StepNFT`).

use serde::Deserialize;
use tch::{Kind, Tensor};

use super::{
    method::{Episodes, Velocities, VelocityLoss},
    params::{ParamsError, check_positive, check_times, parameters},
};

/// How the two distances become a loss.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Form {
    /// `r E+ + (1 - r) E-` with `r = (1 + y) / 2`.
    Mse,
    /// `softplus(y (E+ - E-))`: which of the two is nearer, not how near.
    Softplus,
}

/// `algorithm.velocity.params`
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Nft {
    /// Distance of both branches from the reference: `v+- = v_ref +- beta (v - v_ref)`.
    beta: f64,
    /// Advantage at which the credit `y` is 1; beyond it is cut.
    advantage_max: f64,
    t_min: f64,
    t_max: f64,
    form: Form,
}

/// The method with these parameters.
pub(super) fn build(params: &toml::Table) -> Result<Box<dyn VelocityLoss>, ParamsError> {
    let method: Nft = parameters(params)?;
    check_positive("beta", method.beta)?;
    check_positive("advantage_max", method.advantage_max)?;
    check_times(method.t_min, method.t_max)?;
    Ok(Box::new(method))
}

impl VelocityLoss for Nft {
    fn reads_advantages(&self) -> bool {
        true
    }

    /// `y = A / advantage_max`, cut to -1 to 1.
    fn credit(&self, episodes: &Episodes<'_>) -> Vec<f32> {
        let credit = |a: &f32| (f64::from(*a) / self.advantage_max).clamp(-1.0, 1.0) as f32;
        episodes.advantages.iter().map(credit).collect()
    }

    fn times(&self) -> (f64, f64) {
        (self.t_min, self.t_max)
    }

    fn loss(&self, input: &Velocities<'_>) -> Tensor {
        let moved = (input.velocity - input.reference) * self.beta;
        let toward = input.distance(&(input.reference + &moved), input.target);
        let away = input.distance(&(input.reference - &moved), input.target);
        let y = input.credit.to_kind(Kind::Float);
        match self.form {
            Form::Mse => (toward * (1.0 + &y) + away * (1.0 - &y)) * 0.5,
            Form::Softplus => ((toward - away) * y).softplus(),
        }
    }
}
