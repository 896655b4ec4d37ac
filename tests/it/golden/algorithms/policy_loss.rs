//! Complete losses of the registry, by level of the log-probability.

use integration_tests::assert_close_relative;
use learner::loss::{
    ActorInput, PolicyInput, PolicySettings, Share, aggregate_logprob, align, policy_loss, ppo_actor_loss,
    ppo_critic_loss,
};
use policy::config::LogprobType;

use super::{
    Case, Coverage, GRAD, floats,
    losses::{
        CriticTensors, actor_oracle, actor_settings, check_actor_metrics, check_critic_metrics,
        check_decoupled_metrics, critic_settings,
    },
    run,
};

fn check_policy_loss(case: &Case<'_>, coverage: &mut Coverage) {
    let level = match case.text("logprob_type") {
        "token_level" => LogprobType::TokenLevel,
        "action_level" => LogprobType::ActionLevel,
        _ => LogprobType::ChunkLevel,
    };
    let element = case.leaf("logprobs");
    let logprob = aggregate_logprob(&element, level).unwrap();
    let old_logprob = aggregate_logprob(&case.input("old_logprobs"), level).unwrap();
    case.close_array("out.pre.logprobs", &floats(&logprob));
    case.close_array("out.pre.old_logprobs", &floats(&old_logprob));
    let (advantages, mask) = (case.input("advantages"), case.input("loss_mask"));
    let aligned = align("advantages", &advantages, "logprobs", &logprob).unwrap();
    assert_eq!(aligned.size(), case.array("out.pre.advantages").dims(), "{}", case.id);
    case.close_array("out.pre.advantages", &floats(&aligned));
    let episode_len = case.input("loss_mask_sum");
    // companions keep their numbers, in the reference's shapes
    for (name, given) in [("loss_mask", &mask), ("loss_mask_sum", &episode_len)] {
        let aligned = align("companion", given, "logprobs", &logprob).unwrap();
        assert_eq!(
            aligned.size(),
            case.array(&format!("out.pre.{name}")).dims(),
            "{} {name}",
            case.id
        );
        case.close_array(&format!("out.pre.{name}"), &floats(&aligned));
    }
    for name in ["values", "prev_values", "returns"] {
        case.close_array(&format!("out.pre.{name}"), &floats(&case.input(name)));
    }
    let actor = ActorInput {
        new_logprob: &logprob,
        old_logprob: &old_logprob,
        proximal_logprob: None,
        reference_logprob: None,
        advantages: &advantages,
        mask: Some(&mask),
        episode_len: Some(&episode_len),
    };
    let critic = CriticTensors::read(case);
    let settings = PolicySettings {
        actor: actor_settings(case),
        critic: critic_settings(case),
        value_coef: 1.0,
        entropy_bonus: None,
    };
    let name = case.text("loss_type");
    let input = PolicyInput {
        actor: Some(actor),
        critic: Some(critic.input()),
        entropy: None,
        share: Share::default(),
    };
    let ours = policy_loss(name).unwrap_or_else(|| panic!("loss {name}"))(&input, &settings).unwrap();
    ours.loss.backward();

    let oracle = actor_oracle(&actor, &settings.actor);
    let excess = if settings.actor.episode_steps.is_some() {
        1.0
    } else {
        oracle.excess
    };
    let metrics = ours.actor.expect("policy part");
    case.close(
        "policy_loss",
        metrics.policy_loss * excess,
        case.scalar("out.metric.actor/policy_loss"),
    );
    if name == "decoupled_actor_critic" {
        check_decoupled_metrics(case, &metrics, oracle.excess);
    } else {
        let alone = ppo_actor_loss(&actor, &settings.actor).unwrap();
        check_actor_metrics(case, &oracle, &alone);
    }
    let value_loss = ours.critic.map_or(0.0, |critic| critic.value_loss);
    case.close("whole", ours.loss.double_value(&[]), metrics.policy_loss + value_loss);
    case.close(
        "recorded whole",
        case.scalar("out.loss"),
        metrics.policy_loss * excess + value_loss,
    );
    let mut recorded = case.array("out.grad.logprobs");
    for value in &mut recorded.data {
        *value /= excess;
    }
    assert_close_relative(
        &format!("{} grad.logprobs", case.id),
        &floats(&element.grad()),
        &recorded,
        GRAD,
    );

    let mut why = Vec::new();
    if excess > 1.0 {
        let recorded = case.scalar("out.metric.actor/policy_loss");
        why.push(format!(
            "policy loss {recorded:.5}, ours {:.5}: the mask's entries are not its elements",
            metrics.policy_loss
        ));
    } else if oracle.excess > 1.0 && case.has("out.metric.actor/approx_kl") {
        let recorded = case.scalar("out.metric.actor/approx_kl");
        why.push(format!(
            "approx_kl {recorded:.5}, ours {:.5}: the mask's entries are not its elements",
            metrics.approx_kl_k1
        ));
    }
    if let Some(critic_metrics) = ours.critic {
        let gradient = case.array("out.grad.values");
        assert_close_relative(
            &format!("{} grad.values", case.id),
            &floats(&critic.value.grad()),
            &gradient,
            GRAD,
        );
        case.close(
            "value_loss",
            critic_metrics.value_loss,
            case.scalar("out.metric.critic/value_loss"),
        );
        let clip = settings.critic.value_clip.unwrap();
        let alone = ppo_critic_loss(&critic.input(), &settings.critic).unwrap();
        why.extend(check_critic_metrics(case, &critic.input(), clip, &alone));
    }
    if !why.is_empty() {
        coverage.differs(case, &why.join("; "));
    }
}

#[test]
fn whole_policy_losses_agree_with_the_reference() {
    run("rlinf_policy_loss", &[], check_policy_loss);
}
