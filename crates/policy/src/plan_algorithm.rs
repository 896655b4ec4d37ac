//! What of the algorithm's keys contradicts another or lies out of range.

use crate::{
    config::{
        AlgorithmConfig, BootstrapType, ConfigError, FilterMode, LogprobType, ReferenceConfig, RewardType, RunConfig,
    },
    flow::Mdp,
    plan::refuse,
};

/// Most orders of one iteration that replaces groups.
const MAX_ROUNDS: u32 = 100;
/// Most iterations whose episodes may be on their way at once beside those of the present one.
const MAX_STALENESS: u32 = 64;

/// Checks `[algorithm]` against itself and the model.
///
/// # Errors
/// Names the key and what would be right.
pub(crate) fn check(config: &RunConfig) -> Result<(), ConfigError> {
    let algorithm = &config.algorithm;
    check_critic(config)?;
    check_groups(algorithm)?;
    check_ranges(algorithm)?;
    check_velocity(config)?;
    check_staleness(config)?;
    if algorithm.reward_type == RewardType::ActionLevel && algorithm.logprob_type == LogprobType::ChunkLevel {
        return Err(refuse(
            "algorithm.logprob_type",
            "`chunk_level` has one ratio per chunk, but `algorithm.reward_type = \"action_level\"` makes one advantage per action: \
             set `action_level` or `token_level`",
        ));
    }
    if algorithm.reward_type == RewardType::ActionLevel && config.actor.model.openpi.mdp == Mdp::TwoLayer {
        return Err(refuse(
            "algorithm.reward_type",
            "`action_level`, but with `actor.model.openpi.mdp = \"two_layer\"` only the last denoise step of a chunk acts: set \
             `chunk_level`",
        ));
    }
    if algorithm.behave_weight_threshold.is_some() && algorithm.loss_type != "decoupled_actor_critic" {
        return Err(refuse(
            "algorithm.behave_weight_threshold",
            format!(
                "given, but only `loss_type = \"decoupled_actor_critic\"` weighs by it, not `{}`: remove the key",
                algorithm.loss_type
            ),
        ));
    }
    let method = config.actor.model.openpi.noise_method.name();
    if algorithm.entropy_bonus.is_some() && method != "flow_noise" {
        return Err(refuse(
            "algorithm.entropy_bonus",
            format!(
                "given, but the noise of `{method}` has the same entropy under all weights: remove the key or set \
                 `actor.model.openpi.noise_method = \"flow_noise\"`"
            ),
        ));
    }
    Ok(())
}

fn check_critic(config: &RunConfig) -> Result<(), ConfigError> {
    let algorithm = &config.algorithm;
    let head = config.actor.model.value_head.is_some();
    match (algorithm.loss_type.as_str(), head) {
        ("actor_critic" | "decoupled_actor_critic", false) => {
            return Err(refuse(
                "actor.model.value_head",
                format!("missing, `algorithm.loss_type = \"{}\"` needs one", algorithm.loss_type),
            ));
        }
        ("actor", true) => {
            return Err(refuse(
                "actor.model.value_head",
                "given, but `algorithm.loss_type = \"actor\"` trains none: remove the section",
            ));
        }
        ("critic", _) => {
            return Err(refuse(
                "algorithm.loss_type",
                "`critic` trains no policy, it is the loss of `actor.optim.critic_warmup_epochs`: set `actor_critic`",
            ));
        }
        _ => {}
    }
    if algorithm.adv_type == "gae" && !head {
        return Err(refuse(
            "algorithm.adv_type",
            "`gae` needs values: add `actor.model.value_head`, or set `grpo`, `reinforce_pp` or `raw`",
        ));
    }
    if algorithm.bootstrap_type != BootstrapType::None && !head {
        return Err(refuse(
            "algorithm.bootstrap_type",
            "without `actor.model.value_head` there is no value to bootstrap with: set `none`",
        ));
    }
    Ok(())
}

/// A loss on the velocity has no ratio, no critic and one decision per chunk.
fn check_velocity(config: &RunConfig) -> Result<(), ConfigError> {
    let algorithm = &config.algorithm;
    let Some(velocity) = &algorithm.velocity else {
        return Ok(());
    };
    let without = |key: &str, why: &str| {
        Err(refuse(
            key,
            format!("given, but `{}` {why}: remove it", algorithm.loss_type),
        ))
    };
    if config.actor.model.value_head.is_some() {
        return without("actor.model.value_head", "trains no critic");
    }
    let ratio = [
        ("algorithm.clip_ratio_c", algorithm.clip_ratio_c.is_some()),
        ("algorithm.clip_log_ratio", algorithm.clip_log_ratio.is_some()),
        ("algorithm.kl_beta", algorithm.kl_beta.is_some()),
        ("algorithm.target_kl", algorithm.target_kl.is_some()),
        ("algorithm.entropy_bonus", algorithm.entropy_bonus.is_some()),
        ("algorithm.value_clip", algorithm.value_clip.is_some()),
    ];
    if let Some((key, _)) = ratio.iter().find(|(_, given)| *given) {
        return without(key, "has no likelihood and no value");
    }
    if algorithm.reward_type == RewardType::ActionLevel {
        return Err(refuse(
            "algorithm.reward_type",
            format!(
                "`action_level`, but `{}` gives credit to chunks: set `chunk_level`",
                algorithm.loss_type
            ),
        ));
    }
    if config.actor.model.openpi.mdp == Mdp::TwoLayer {
        return Err(refuse(
            "actor.model.openpi.mdp",
            format!(
                "`two_layer`, but `{}` takes a chunk as one decision: set `hybrid`",
                algorithm.loss_type
            ),
        ));
    }
    if config.actor.model.openpi.noise_head.is_some() {
        return Err(refuse(
            "actor.model.openpi.noise_method",
            format!(
                "`flow_noise`, but `{}` trains no noise head: set `flow_ode` or `flow_sde`",
                algorithm.loss_type
            ),
        ));
    }
    if let ReferenceConfig::Ema { decay } = velocity.reference
        && !(0.0..1.0).contains(&decay)
    {
        return Err(refuse(
            "algorithm.velocity.reference.decay",
            format!("{decay}, expected at least 0 and below 1"),
        ));
    }
    Ok(())
}

/// What training on records of older versions needs.
fn check_staleness(config: &RunConfig) -> Result<(), ConfigError> {
    let Some(bound) = config.rollout.max_staleness else {
        return Ok(());
    };
    if !(1..=MAX_STALENESS).contains(&bound) {
        return Err(refuse(
            "rollout.max_staleness",
            format!("{bound}, expected 1 to {MAX_STALENESS}; remove the key to train synchronously"),
        ));
    }
    let algorithm = &config.algorithm;
    if algorithm.loss_type != "decoupled_actor_critic" {
        return Err(refuse(
            "rollout.max_staleness",
            format!(
                "given, but `algorithm.loss_type = \"{}\"` does not correct for records of older versions: set \
                 `decoupled_actor_critic`, or remove the key",
                algorithm.loss_type
            ),
        ));
    }
    if algorithm
        .filter_rewards
        .is_some_and(|filter| filter.mode == FilterMode::Resample)
    {
        return Err(refuse(
            "algorithm.filter_rewards.mode",
            "`resample`, but with `rollout.max_staleness` the groups of an iteration are ordered before the one before is trained: \
             set `mask`",
        ));
    }
    if config.actor.model.openpi.noise_anneal.is_some() {
        return Err(refuse(
            "actor.model.openpi.noise_anneal",
            "given, but with `rollout.max_staleness` an update reads records of several versions, whose noise levels would differ: \
             remove one of the two",
        ));
    }
    Ok(())
}

fn check_groups(algorithm: &AlgorithmConfig) -> Result<(), ConfigError> {
    let adv_type = algorithm.adv_type.as_str();
    if matches!(adv_type, "grpo" | "reinforce_pp_baseline") && algorithm.group_size < 2 {
        return Err(refuse(
            "algorithm.group_size",
            format!(
                "{}, but `algorithm.adv_type = \"{adv_type}\"` compares episodes of a group: set at least 2",
                algorithm.group_size
            ),
        ));
    }
    if matches!(adv_type, "reinforce_pp" | "reinforce_pp_baseline") && !algorithm.normalize_advantages {
        return Err(refuse(
            "algorithm.normalize_advantages",
            format!("false, but `{adv_type}` is defined by its normalisation over the batch: set true"),
        ));
    }
    let Some(filter) = &algorithm.filter_rewards else {
        return Ok(());
    };
    if algorithm.group_size < 2 {
        return Err(refuse(
            "algorithm.filter_rewards",
            format!("filters groups, but `algorithm.group_size` = {}", algorithm.group_size),
        ));
    }
    if !(filter.lower.is_finite() && filter.upper.is_finite() && filter.lower <= filter.upper) {
        return Err(refuse(
            "algorithm.filter_rewards.lower",
            format!("{} to `upper` = {} is no interval", filter.lower, filter.upper),
        ));
    }
    match (filter.mode, filter.max_rounds) {
        (FilterMode::Resample, None) => Err(refuse(
            "algorithm.filter_rewards.max_rounds",
            "missing, `mode = \"resample\"` needs the most orders of an iteration, the first included, e.g. 4",
        )),
        (FilterMode::Resample, Some(rounds)) if !(2..=MAX_ROUNDS).contains(&rounds) => Err(refuse(
            "algorithm.filter_rewards.max_rounds",
            format!("{rounds}, expected 2 to {MAX_ROUNDS} orders, the first included"),
        )),
        (FilterMode::Mask, Some(_)) => Err(refuse(
            "algorithm.filter_rewards.max_rounds",
            "given, but `mode = \"mask\"` orders no new groups: remove the key",
        )),
        _ => Ok(()),
    }
}

fn check_ranges(algorithm: &AlgorithmConfig) -> Result<(), ConfigError> {
    let positive = [
        ("algorithm.behave_weight_threshold", algorithm.behave_weight_threshold),
        ("algorithm.entropy_bonus", algorithm.entropy_bonus),
        ("algorithm.kl_beta", algorithm.kl_beta),
    ];
    for (key, value) in positive {
        if value.is_some_and(|v| !(v.is_finite() && v > 0.0)) {
            return Err(refuse(
                key,
                format!(
                    "{}, expected a number above 0; remove the key to switch it off",
                    value.unwrap_or_default()
                ),
            ));
        }
    }
    if let Some(bound) = algorithm.clip_ratio_c
        && !(bound.is_finite() && bound > 1.0)
    {
        return Err(refuse(
            "algorithm.clip_ratio_c",
            format!("{bound}, expected above 1: the dual clip bounds the loss by that multiple of the advantage"),
        ));
    }
    if let Some(bounds) = &algorithm.clip_log_ratio
        && !(bounds.min.is_finite() && bounds.max.is_finite() && bounds.min < 0.0 && bounds.max > 0.0)
    {
        return Err(refuse(
            "algorithm.clip_log_ratio",
            format!(
                "min = {}, max = {}, expected finite bounds with min below 0 and max above 0",
                bounds.min, bounds.max
            ),
        ));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use crate::{config::RunConfig, plan::RunPlan};

    fn configs() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs")
    }

    fn plan(config: &str, overrides: &[&str]) -> Result<RunPlan, String> {
        let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
        RunConfig::load(&configs().join(config), &overrides)
            .and_then(RunPlan::new)
            .map_err(|error| error.to_string())
    }

    #[test]
    fn contradictions_are_refused_with_the_key() {
        let grpo = "tabletop_grpo.toml";
        let quickstart = "quickstart.toml";
        let asynchronous = "tabletop_async.toml";
        let resample = "algorithm.filter_rewards={lower=0.1,upper=0.9,mode=\"resample\"}";
        for (config, overrides, wanted) in [
            (grpo, &["algorithm.group_size=1"][..], ["group_size", "at least 2"]),
            (grpo, &["algorithm.adv_type=\"gae\""], ["adv_type", "value_head"]),
            (
                grpo,
                &["algorithm.bootstrap_type=\"truncation\""],
                ["bootstrap_type", "`none`"],
            ),
            (
                grpo,
                &["algorithm.adv_type=\"reinforce_pp\""],
                ["normalize_advantages", "true"],
            ),
            (grpo, &[resample], ["filter_rewards.max_rounds", "missing"]),
            (
                grpo,
                &["algorithm.filter_rewards.max_rounds=1"],
                ["max_rounds", "2 to 100"],
            ),
            (
                grpo,
                &["algorithm.filter_rewards.mode=\"mask\""],
                ["max_rounds", "remove"],
            ),
            (
                grpo,
                &["algorithm.filter_rewards.lower=1.0"],
                ["filter_rewards.lower", "no interval"],
            ),
            (
                grpo,
                &["algorithm.filter_rewards.mode=\"drop\""],
                ["filter_rewards.mode", "unknown variant"],
            ),
            (
                grpo,
                &["algorithm.adv_type=\"raw\"", "algorithm.group_size=1"],
                ["filter_rewards", "group_size"],
            ),
            (
                quickstart,
                &["algorithm.loss_type=\"actor\""],
                ["value_head", "trains none"],
            ),
            (
                quickstart,
                &["algorithm.loss_type=\"critic\""],
                ["loss_type", "no policy"],
            ),
            (
                grpo,
                &["algorithm.loss_type=\"decoupled_actor_critic\""],
                ["value_head", "missing"],
            ),
            (
                quickstart,
                &["algorithm.reward_type=\"action_level\""],
                ["logprob_type", "action_level"],
            ),
            (
                quickstart,
                &["algorithm.behave_weight_threshold=2.0"],
                ["behave_weight_threshold", "decoupled"],
            ),
            (
                quickstart,
                &["algorithm.entropy_bonus=0.01"],
                ["entropy_bonus", "flow_noise"],
            ),
            (quickstart, &["algorithm.kl_beta=-0.1"], ["kl_beta", "above 0"]),
            (quickstart, &["algorithm.clip_ratio_c=1.0"], ["clip_ratio_c", "above 1"]),
            (
                quickstart,
                &["algorithm.clip_log_ratio={min=0.1,max=2.0}"],
                ["clip_log_ratio", "min below 0"],
            ),
            (
                quickstart,
                &["algorithm.clip_log_ratio={min=-0.1,maxx=2.0}"],
                ["maxx", "did you mean `max`"],
            ),
            (
                quickstart,
                &["rollout.max_staleness=1"],
                ["rollout.max_staleness", "`decoupled_actor_critic`"],
            ),
            (
                asynchronous,
                &["rollout.max_staleness=0"],
                ["rollout.max_staleness", "synchronously"],
            ),
            (
                asynchronous,
                &["rollout.max_staleness=65"],
                ["rollout.max_staleness", "1 to 64"],
            ),
            (
                asynchronous,
                &[
                    "algorithm.group_size=4",
                    "algorithm.filter_rewards={lower=0.1,upper=0.9,mode=\"resample\",max_rounds=2}",
                ],
                ["filter_rewards.mode", "`mask`"],
            ),
            (
                asynchronous,
                &["actor.model.openpi.noise_anneal={start=0.7,end=0.3,steps=10}"],
                ["noise_anneal", "rollout.max_staleness"],
            ),
        ] {
            let error = plan(config, overrides).expect_err("refused");
            for part in wanted {
                assert!(error.contains(part), "{overrides:?}: `{part}` is not in: {error}");
            }
        }
        for overrides in [
            &["algorithm.clip_log_ratio={min=-2.0,max=2.0}", "algorithm.kl_beta=0.01"][..],
            &[
                "algorithm.reward_type=\"action_level\"",
                "algorithm.logprob_type=\"token_level\"",
            ],
        ] {
            assert_eq!(plan(quickstart, overrides).err(), None, "{overrides:?}");
        }
    }
}
