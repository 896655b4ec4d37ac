//! Losses of the policy and the critic on tensors with gradients, one file per loss, and their metrics.
//!
//! Shapes: `N` rows (chunks), `C` executed actions per chunk, `D` action dimensions. A companion tensor (advantage, mask,
//! episode length) may lack trailing dimensions or have size 1 there. Companions are broadcast over trailing dimensions, and
//! every mean is taken over the broadcast elements. Leading dimensions are never broadcast, so that
//! `[N]` and `[N, 1]` never combine to `[N, N]`.

mod error;
mod reduce;
mod kl;
mod entropy;
mod surrogate;
mod critic;
mod spec;
mod combine;
mod actor;
mod actor_critic;
mod decoupled;

pub use actor::ppo_actor_loss;
pub use critic::{CriticInput, CriticLoss, CriticMetrics, CriticSettings, ExplainedVariance, huber, ppo_critic_loss};
pub use decoupled::{decoupled_actor_loss, interpolated_proximal};
pub use entropy::mean_entropy;
pub use error::{LossError, Result};
pub use kl::k3;
pub use reduce::{aggregate_logprob, align, episode_weighted_mean, masked_mean};
pub use spec::{PolicyInput, PolicyLoss, PolicyLossFn, PolicyLossSpec, PolicySettings, Share};
pub use surrogate::{ActorInput, ActorLoss, ActorMetrics, ActorSettings, clipped_surrogate, dual_clip};

use combine::combine;

/// Registry of policy losses, one entry per `algorithm.loss_type`.
pub const POLICY_LOSSES: &[PolicyLossSpec] = &[
    actor::SPEC,
    actor_critic::SPEC,
    decoupled::ACTOR,
    decoupled::ACTOR_CRITIC,
];

/// Loss of the critic's warm-up, which leaves the policy unchanged.
pub const WARM_UP: PolicyLossFn = |input, settings| combine("critic", input, settings, None, true);

/// Looks up a policy loss of [`POLICY_LOSSES`] by name.
pub fn policy_loss(name: &str) -> Option<PolicyLossFn> {
    POLICY_LOSSES
        .iter()
        .find(|spec| spec.loss_type == name)
        .map(|spec| spec.loss)
}

#[cfg(test)]
mod tests {
    use tch::{Kind, Tensor};

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
        // defect of the reference: [rows] entropy times [rows, 1] mask is [rows, rows], so that the quotient is the sum of
        // the entropies instead of the mean
        let entropy = f(&[1.0, 2.0, 3.0, 4.0]);
        let mask = f(&[1.0, 1.0, 1.0, 0.0]).to_kind(Kind::Bool).reshape([4, 1]);
        let reference = ((&entropy * &mask).sum(Kind::Float) / mask.sum(Kind::Float)).double_value(&[]);
        assert!((reference - 10.0).abs() < 1e-6, "the reference's number {reference}");
        let ours = mean_entropy(&entropy, Some(&mask)).unwrap().double_value(&[]);
        assert!((ours - 2.0).abs() < 1e-6, "ours {ours}");
        // mask per action, entropy per record: a record with any valid action is valid
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
