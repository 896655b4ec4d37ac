//! Weighted sum of the losses of policy, critic and entropy.

use tch::Tensor;

use super::{
    critic::ppo_critic_loss,
    entropy::mean_entropy,
    error::{LossError, Result},
    reduce::read_metrics,
    spec::{PolicyInput, PolicyLoss, PolicySettings},
    surrogate::{ActorInput, ActorLoss, ActorSettings},
};

type ActorLossFn = fn(&ActorInput<'_>, &ActorSettings) -> Result<ActorLoss>;

/// Returns `L = L_policy + value_coef L_value - entropy_bonus S` (Schulman et al. 2017, eq. 9); `L_policy` includes the KL
/// penalty.
pub(super) fn combine(
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
