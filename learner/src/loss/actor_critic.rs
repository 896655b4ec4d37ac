//! `actor_critic`: the losses of PPO's policy and critic.

use super::{PolicyLossSpec, actor::ppo_actor_loss, combine::combine};

/// Policy and critic.
pub(super) const SPEC: PolicyLossSpec = PolicyLossSpec {
    loss_type: "actor_critic",
    loss: |input, settings| combine(SPEC.loss_type, input, settings, Some(ppo_actor_loss), true),
    critic: true,
    proximal: false,
};
