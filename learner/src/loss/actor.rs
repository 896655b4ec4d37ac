//! `actor`: the clipped policy loss of PPO, without a critic.

use super::{ActorInput, ActorLoss, ActorSettings, PolicyLossSpec, Result, combine::combine, surrogate::actor_loss};

/// Computes the clipped policy loss of PPO (Schulman et al. 2017, eq. 7; dual clip as in Ye et al. 2020, eq. 5).
/// A masked element contributes neither loss nor gradient, even where its ratio overflows.
pub fn ppo_actor_loss(input: &ActorInput<'_>, settings: &ActorSettings) -> Result<ActorLoss> {
    actor_loss(
        &ActorInput {
            proximal_logprob: None,
            ..*input
        },
        &ActorSettings {
            behave_weight_threshold: None,
            ..*settings
        },
    )
}

/// `actor`, a loss without a critic.
pub(super) const SPEC: PolicyLossSpec = PolicyLossSpec {
    loss_type: "actor",
    loss: |input, settings| combine(SPEC.loss_type, input, settings, Some(ppo_actor_loss), false),
    critic: false,
    proximal: false,
};
