//! Losses of the policy and the critic on tensors with gradients, one file per loss, and metrics that say what their
//! names say.
//!
//! Shapes: `N` rows (chunks), `C` executed actions per chunk, `D` action dimensions. A tensor that accompanies another
//! one (advantage, mask, episode length) may miss trailing dimensions or have size 1 there; it is spread over them, and
//! every mean is taken over the elements it was spread to. Nothing is ever spread over leading dimensions, so that a
//! `[N]` tensor never meets an `[N, 1]` one as `[N, N]`.

mod reduce;
mod kl;
mod entropy;
mod surrogate;
mod critic;
mod actor;
mod actor_critic;
mod decoupled;

use tch::Tensor;
use thiserror::Error;

pub use actor::ppo_actor_loss;
pub use critic::{CriticInput, CriticLoss, CriticMetrics, CriticSettings, ExplainedVariance, huber, ppo_critic_loss};
pub use decoupled::{decoupled_actor_loss, interpolated_proximal};
pub use entropy::mean_entropy;
pub use kl::k3;
pub use reduce::{aggregate_logprob, align, episode_weighted_mean, masked_mean};
pub use surrogate::{ActorInput, ActorLoss, ActorMetrics, ActorSettings, clipped_surrogate, dual_clip};

use reduce::read_metrics;

/// What can be wrong with the tensors given to a loss.
#[derive(Debug, Error)]
pub enum LossError {
    /// A tensor does not fit the one it accompanies.
    #[error("`{name}` of shape {found:?} does not fit `{like}` of shape {expected:?}: leading sizes must be equal")]
    Shape {
        /// The tensor that does not fit.
        name: &'static str,
        /// Its shape.
        found: Vec<i64>,
        /// The tensor it accompanies.
        like: &'static str,
        /// That one's shape.
        expected: Vec<i64>,
    },
    /// The log-probabilities are not per action element.
    #[error("`logprob` needs shape [rows, actions, action dim], found {found:?}")]
    NotElementwise {
        /// Shape found.
        found: Vec<i64>,
    },
    /// The loss needs an input that is not there.
    #[error("policy loss `{loss}` needs the `{input}` input")]
    Missing {
        /// Name of the loss.
        loss: &'static str,
        /// Missing part of [`PolicyInput`].
        input: &'static str,
    },
    /// The metrics could not be read from the device.
    #[error("reading the loss metrics: {source}")]
    Metrics {
        /// What libtorch said.
        source: tch::TchError,
    },
}

/// Result of this module.
pub type Result<T, E = LossError> = std::result::Result<T, E>;

/// What a policy loss of the registry reads.
#[derive(Debug, Clone, Copy, Default)]
pub struct PolicyInput<'a> {
    /// The policy's part.
    pub actor: Option<ActorInput<'a>>,
    /// The critic's part.
    pub critic: Option<CriticInput<'a>>,
    /// Entropy of the policy per row (or per element), with gradient; masked as the policy's part is.
    pub entropy: Option<&'a Tensor>,
    /// Factors of the means over the valid elements; 1 without.
    pub share: Share,
}

/// A part of a minibatch is weighed by its rows; its means over valid elements have its share of the minibatch's valid elements over its
/// share of the rows as a factor, so that the parts add up to the minibatch's means.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share {
    /// Of the policy's mean; 1 where that is by episodes, which counts all elements.
    pub surrogate: f64,
    /// Of the mean entropy, which is over valid elements whatever the policy's is.
    pub entropy: f64,
}

impl Default for Share {
    fn default() -> Self {
        Self {
            surrogate: 1.0,
            entropy: 1.0,
        }
    }
}

/// What the configuration says about the whole loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PolicySettings {
    /// The policy's part.
    pub actor: ActorSettings,
    /// The critic's part.
    pub critic: CriticSettings,
    /// Factor of the critic loss in the sum.
    pub value_coef: f64,
    /// Factor of the mean entropy that is subtracted; none: the entropy is only reported.
    pub entropy_bonus: Option<f64>,
}

/// A whole loss and its metrics; a part that the loss does not have is `None`.
#[derive(Debug)]
pub struct PolicyLoss {
    /// Scalar with gradient.
    pub loss: Tensor,
    /// The policy's part.
    pub actor: Option<ActorMetrics>,
    /// The critic's part.
    pub critic: Option<CriticMetrics>,
    /// Mean entropy.
    pub entropy: Option<f64>,
}

/// A loss of the registry.
pub type PolicyLossFn = fn(&PolicyInput<'_>, &PolicySettings) -> Result<PolicyLoss>;

/// A loss of the registry with what it asks of a run.
#[derive(Debug, Clone, Copy)]
pub struct PolicyLossSpec {
    /// `algorithm.loss_type` of the configuration.
    pub loss_type: &'static str,
    /// The loss.
    pub loss: PolicyLossFn,
    /// Whether it trains a value head.
    pub critic: bool,
    /// Whether it clips around a proximal policy of its own, and so may read records of older versions.
    pub proximal: bool,
}

/// The one table of policy losses.
pub const POLICY_LOSSES: &[PolicyLossSpec] = &[
    actor::SPEC,
    actor_critic::SPEC,
    decoupled::ACTOR,
    decoupled::ACTOR_CRITIC,
];

/// The loss of the critic's warm-up: the policy stays as it is.
pub const WARM_UP: PolicyLossFn = critic::loss;

/// The policy loss of this name; see [`POLICY_LOSSES`].
pub fn policy_loss(name: &str) -> Option<PolicyLossFn> {
    POLICY_LOSSES
        .iter()
        .find(|spec| spec.loss_type == name)
        .map(|spec| spec.loss)
}

type ActorLossFn = fn(&ActorInput<'_>, &ActorSettings) -> Result<ActorLoss>;

/// `L = L_policy + value_coef L_value - entropy_bonus S` (Schulman et al. 2017, eq. 9); `L_policy` holds the KL penalty.
fn combine(
    name: &'static str,
    input: &PolicyInput<'_>,
    settings: &PolicySettings,
    actor_loss: Option<ActorLossFn>,
    with_critic: bool,
) -> Result<PolicyLoss> {
    let missing = |input| LossError::Missing { loss: name, input };
    let mut terms: Vec<Tensor> = Vec::new();
    let mut whole = PolicyLoss {
        loss: Tensor::new(),
        actor: None,
        critic: None,
        entropy: None,
    };
    if let Some(actor_loss) = actor_loss {
        let actor_input = input.actor.as_ref().ok_or_else(|| missing("actor"))?;
        let actor = actor_loss(actor_input, &settings.actor)?;
        terms.push(actor.loss * input.share.surrogate);
        whole.actor = Some(actor.metrics);
        if settings.entropy_bonus.is_some() && input.entropy.is_none() {
            return Err(missing("entropy"));
        }
        if let Some(entropy) = input.entropy {
            let entropy = mean_entropy(entropy, actor_input.mask)?;
            let [value] = read_metrics(&[entropy.detach()])?;
            whole.entropy = Some(value);
            if let Some(entropy_bonus) = settings.entropy_bonus {
                terms.push(entropy * (-entropy_bonus * input.share.entropy));
            }
        }
    }
    if with_critic {
        let critic_input = input.critic.as_ref().ok_or_else(|| missing("critic"))?;
        let critic = ppo_critic_loss(critic_input, &settings.critic)?;
        terms.push(critic.loss * settings.value_coef);
        whole.critic = Some(critic.metrics);
    }
    whole.loss = terms
        .into_iter()
        .reduce(|sum, term| sum + term)
        .ok_or_else(|| missing("actor"))?;
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use tch::Kind;

    use super::*;

    fn f(values: &[f32]) -> Tensor {
        Tensor::from_slice(values)
    }

    #[test]
    fn a_companion_is_never_spread_over_rows() {
        let like = Tensor::zeros([4, 3], (Kind::Float, tch::Device::Cpu));
        let aligned = |shape: &[i64]| {
            align(
                "mask",
                &Tensor::zeros(shape, (Kind::Float, like.device())),
                "like",
                &like,
            )
        };
        assert_eq!(aligned(&[4]).unwrap().size(), [4, 1]);
        assert_eq!(aligned(&[4, 1, 1]).unwrap().size(), [4, 1]);
        assert_eq!(aligned(&[4, 3]).unwrap().size(), [4, 3]);
        for wrong in [&[1i64][..], &[3], &[1, 3], &[], &[4, 2], &[4, 3, 2]] {
            assert!(aligned(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_entropy_bonus_is_a_mean_whatever_the_masks_shape() {
        // defect of the reference: [rows] entropy times [rows, 1] mask is [rows, rows], and the quotient is the sum of
        // the entropies instead of their mean
        let entropy = f(&[1.0, 2.0, 3.0, 4.0]);
        let mask = f(&[1.0, 1.0, 1.0, 0.0]).to_kind(Kind::Bool).reshape([4, 1]);
        let reference = ((&entropy * &mask).sum(Kind::Float) / mask.sum(Kind::Float)).double_value(&[]);
        assert!((reference - 10.0).abs() < 1e-6, "the reference's number {reference}");
        let ours = mean_entropy(&entropy, Some(&mask)).unwrap().double_value(&[]);
        assert!((ours - 2.0).abs() < 1e-6, "ours {ours}");
        // a mask per action for an entropy per record: a record with any valid action counts
        let per_action = f(&[1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0])
            .to_kind(Kind::Bool)
            .reshape([4, 2]);
        let ours = mean_entropy(&entropy, Some(&per_action)).unwrap().double_value(&[]);
        assert!((ours - 2.0).abs() < 1e-6, "ours {ours}");
    }

    #[test]
    fn a_missing_input_is_named() {
        let settings = PolicySettings {
            actor: ActorSettings {
                clip_ratio_low: 0.2,
                clip_ratio_high: 0.2,
                clip_ratio_c: None,
                clip_log_ratio: None,
                episode_steps: None,
                behave_weight_threshold: None,
                kl_beta: None,
            },
            critic: CriticSettings {
                value_clip: None,
                huber_delta: 1.0,
                episode_steps: None,
            },
            value_coef: 1.0,
            entropy_bonus: None,
        };
        let error = WARM_UP(&PolicyInput::default(), &settings).unwrap_err();
        assert_eq!(error.to_string(), "policy loss `critic` needs the `critic` input");
        let logprob = f(&[0.0]);
        let actor = ActorInput {
            new_logprob: &logprob,
            old_logprob: &logprob,
            proximal_logprob: None,
            reference_logprob: None,
            advantages: &logprob,
            mask: None,
            episode_len: None,
        };
        let input = PolicyInput {
            actor: Some(actor),
            ..PolicyInput::default()
        };
        let bonus = PolicySettings {
            entropy_bonus: Some(0.1),
            ..settings
        };
        let error = policy_loss("actor").unwrap()(&input, &bonus).unwrap_err();
        assert_eq!(error.to_string(), "policy loss `actor` needs the `entropy` input");
        assert!(policy_loss("sac").is_none());
    }

    #[test]
    fn explained_variance_of_a_union_is_that_of_the_whole() {
        let critic = |value: &[f32], returns: &[f32]| {
            let (value, returns) = (f(value), f(returns));
            let input = CriticInput {
                value: &value,
                old_value: &value,
                returns: &returns,
                mask: None,
                episode_len: None,
            };
            let settings = CriticSettings {
                value_clip: None,
                huber_delta: 1.0,
                episode_steps: None,
            };
            ppo_critic_loss(&input, &settings).unwrap().metrics.explained_variance
        };
        let whole = critic(&[0.1, 0.9, 0.4, 0.6], &[0.0, 1.0, 0.0, 1.0]);
        let mut merged = critic(&[0.1, 0.9], &[0.0, 1.0]);
        merged.merge(&critic(&[0.4, 0.6], &[0.0, 1.0]));
        let (whole, merged) = (whole.value().unwrap(), merged.value().unwrap());
        // errors -0.1, 0.1, -0.4, 0.4: variance 0.085 against 0.25
        assert!(
            (whole - 0.66).abs() < 1e-6 && (merged - whole).abs() < 1e-12,
            "{whole} {merged}"
        );
        assert!(critic(&[0.0, 0.0], &[1.0, 1.0]).value().is_none());
    }
}
