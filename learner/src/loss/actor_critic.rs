//! `actor_critic`: the policy loss and the critic loss of PPO.

use super::{PolicyLossSpec, actor::ppo_actor_loss, combine::combine};

/// `actor_critic`, a loss of policy and critic.
pub(super) const SPEC: PolicyLossSpec = PolicyLossSpec {
    loss_type: "actor_critic",
    loss: |input, settings| combine(SPEC.loss_type, input, settings, Some(ppo_actor_loss), true),
    critic: true,
    proximal: false,
};
