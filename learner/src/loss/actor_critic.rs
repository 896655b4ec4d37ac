//! `actor_critic`: the losses of PPO's policy and critic.

use super::{PolicyInput, PolicyLoss, PolicySettings, Result, actor::ppo_actor_loss, combine};

/// Policy and critic.
pub(super) fn loss(input: &PolicyInput<'_>, settings: &PolicySettings) -> Result<PolicyLoss> {
    combine("actor_critic", input, settings, Some(ppo_actor_loss), true)
}
