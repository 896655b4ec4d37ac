//! `decoupled_actor` and `decoupled_actor_critic`: PPO with the clip around a proximal policy instead of the behavior policy, for
//! rollouts of older versions.

use tch::Tensor;

use super::{
    ActorInput, ActorLoss, ActorSettings, PolicyLossSpec, Result, combine::combine, reduce::align,
    surrogate::actor_loss,
};

/// Interpolates the proximal log-probability between behavior policy and current policy by policy versions (decoupled PPO,
/// Hilton et al. 2022, section 3): `old + alpha (current - old)` with
/// `alpha = clamp((v - 1 - v_b) / (v - v_b), 0, 1)`, learner version `v` and behavior version `v_b`. The result has
/// no gradient; an unknown version (negative) yields the log-probability of the behavior policy.
pub fn interpolated_proximal(
    new_logprob: &Tensor,
    old_logprob: &Tensor,
    versions: &Tensor,
    current: f64,
) -> Result<Tensor> {
    let versions = align(
        "versions",
        &versions.to_kind(new_logprob.kind()),
        "new_logprob",
        new_logprob,
    )?;
    let lag = versions.neg() + current;
    // at lag 0 the current policy acted: alpha is then clamped to 0 from a large negative number
    let alpha = ((&lag - 1.0) / lag.clamp_min(1e-6))
        .clamp(0.0, 1.0)
        .masked_fill(&versions.lt(0), 0.0);
    Ok((old_logprob + alpha * (new_logprob.detach() - old_logprob)).detach())
}

/// Computes the loss of decoupled PPO (Hilton et al. 2022, eq. 4): the surrogate clips against the proximal policy. Each element
/// is weighted by the ratio of the proximal policy to the behavior policy. Elements whose weight exceeds
/// [`ActorSettings::behave_weight_threshold`] add nothing.
pub fn decoupled_actor_loss(input: &ActorInput<'_>, settings: &ActorSettings) -> Result<ActorLoss> {
    actor_loss(input, settings)
}

/// `decoupled_actor`, a loss without a critic.
pub(super) const ACTOR: PolicyLossSpec = PolicyLossSpec {
    loss_type: "decoupled_actor",
    loss: |input, settings| combine(ACTOR.loss_type, input, settings, Some(decoupled_actor_loss), false),
    critic: false,
    proximal: true,
};

/// `decoupled_actor_critic`, a loss of policy and critic.
pub(super) const ACTOR_CRITIC: PolicyLossSpec = PolicyLossSpec {
    loss_type: "decoupled_actor_critic",
    loss: |input, settings| {
        combine(
            ACTOR_CRITIC.loss_type,
            input,
            settings,
            Some(decoupled_actor_loss),
            true,
        )
    },
    critic: true,
    proximal: true,
};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_proximal_policy_moves_from_the_one_that_acted_towards_the_current_one() {
        // the update in progress publishes version 8
        let versions = Tensor::from_slice(&[7i64, 6, 4, 8, 9, -1]);
        let logprob = Tensor::from_slice(&[1.0f32; 6]).set_requires_grad(true);
        let old = Tensor::from_slice(&[0.0f32; 6]);
        let proximal = interpolated_proximal(&logprob, &old, &versions, 8.0).unwrap();
        assert!(!proximal.requires_grad());
        let got: Vec<f32> = Vec::try_from(proximal).unwrap();
        // alpha at lag 1 is 0/1, at lag 2 1/2, at lag 4 3/4; lag 0, a negative lag or an unknown version: the behavior policy
        assert_eq!(got, [0.0, 0.5, 0.75, 0.0, 0.0, 0.0]);
    }

    #[test]
    fn a_row_whose_policy_is_too_far_away_is_left_out() {
        let (old, proximal) = (Tensor::from_slice(&[0.0f32, 0.0]), Tensor::from_slice(&[0.5f32, 2.0]));
        let logprob = Tensor::from_slice(&[0.5f32, 2.0]).set_requires_grad(true);
        let advantages = Tensor::from_slice(&[1.0f32, 1.0]);
        let input = ActorInput {
            new_logprob: &logprob,
            old_logprob: &old,
            proximal_logprob: Some(&proximal),
            reference_logprob: None,
            advantages: &advantages,
            mask: None,
            episode_len: None,
        };
        let settings = ActorSettings {
            clip_ratio_low: 0.2,
            clip_ratio_high: 0.2,
            clip_ratio_c: None,
            clip_log_ratio: None,
            episode_steps: None,
            behave_weight_threshold: Some(3.0),
            kl_beta: None,
        };
        let loss = decoupled_actor_loss(&input, &settings).unwrap();
        loss.loss.backward();
        let gradient: Vec<f32> = Vec::try_from(logprob.grad()).unwrap();
        // mean of two rows: the first has ratio 1 to the proximal policy and weight e^0.5, the second's weight e^2 exceeds 3
        assert!((gradient[0] + 0.5f32.exp() / 2.0).abs() < 1e-6, "{gradient:?}");
        assert!(gradient[1].abs() < f32::EPSILON, "{gradient:?}");
        assert!((loss.metrics.behaviour_clip_fraction - 0.5).abs() < 1e-9);
    }
}
