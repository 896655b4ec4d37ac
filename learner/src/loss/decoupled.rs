//! `decoupled_actor` and `decoupled_actor_critic`: PPO whose clip is around a proximal policy that is not the one that acted, for rollouts of
//! older versions.

use tch::Tensor;

use super::{
    ActorInput, ActorLoss, ActorSettings, PolicyLossSpec, Result, combine::combine, reduce::align,
    surrogate::actor_loss,
};

/// The proximal log-probability between the behaviour policy and the current one, by policy versions (decoupled PPO,
/// Hilton et al. 2022, section 3): `old + alpha (current - old)` with
/// `alpha = clamp((v - 1 - v_b) / (v - v_b), 0, 1)`, `v` the learner's version and `v_b` the one that acted. It carries
/// no gradient; an unknown version (negative) gives the behaviour policy's own.
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
    // a lag of 0 means the current policy acted: alpha is then clamped to 0 from minus infinity
    let alpha = ((&lag - 1.0) / lag.clamp_min(1e-6))
        .clamp(0.0, 1.0)
        .masked_fill(&versions.lt(0), 0.0);
    Ok((old_logprob + alpha * (new_logprob.detach() - old_logprob)).detach())
}

/// Decoupled PPO (Hilton et al. 2022, eq. 4): the surrogate clips against the proximal policy and each element is
/// weighted by the ratio of the proximal policy to the one that acted. Elements whose weight exceeds
/// [`ActorSettings::behave_weight_threshold`] add nothing.
pub fn decoupled_actor_loss(input: &ActorInput<'_>, settings: &ActorSettings) -> Result<ActorLoss> {
    actor_loss(input, settings)
}

/// The policy alone.
pub(super) const ACTOR: PolicyLossSpec = PolicyLossSpec {
    loss_type: "decoupled_actor",
    loss: |input, settings| combine(ACTOR.loss_type, input, settings, Some(decoupled_actor_loss), false),
    critic: false,
    proximal: true,
};

/// Policy and critic.
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
        // the weights being trained will be version 8
        let versions = Tensor::from_slice(&[7i64, 6, 4, 8, 9, -1]);
        let logprob = Tensor::from_slice(&[1.0f32; 6]).set_requires_grad(true);
        let old = Tensor::from_slice(&[0.0f32; 6]);
        let proximal = interpolated_proximal(&logprob, &old, &versions, 8.0).unwrap();
        assert!(!proximal.requires_grad());
        let got: Vec<f32> = Vec::try_from(proximal).unwrap();
        // on policy: 0/1; one late: 1/2; three late: 3/4; from the present or the future, or unknown: the one that acted
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
        // ratio to the proximal policy 1, weight e^0.5, of two rows; the other's weight e^2 is above 3
        assert!((gradient[0] + 0.5f32.exp() / 2.0).abs() < 1e-6, "{gradient:?}");
        assert!(gradient[1].abs() < f32::EPSILON, "{gradient:?}");
        assert!((loss.metrics.behaviour_clip_fraction - 0.5).abs() < 1e-9);
    }
}
