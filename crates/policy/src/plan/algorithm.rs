//! Checks of `[algorithm]`: ranges, and contradictions between keys or with the model.

use super::range::{at_most, fraction, positive, refuse};
use crate::{
    config::{AlgorithmConfig, ConfigError, FilterMode, LogprobType, ReferenceConfig, RewardType, RunConfig},
    flow::Mdp,
};

/// Most orders per iteration with `resample`.
const MAX_ROUNDS: u32 = 100;
/// Most iterations whose episodes may be pending in addition to the current iteration's.
const MAX_STALENESS: u32 = 64;

/// Checks `[algorithm]` against itself and the model.
///
/// # Errors
/// Names the key and the value expected.
pub(super) fn check(config: &RunConfig) -> Result<(), ConfigError> {
    let algorithm = &config.algorithm;
    check_numbers(config)?;
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
    let method = config.actor.model.openpi.noise_method;
    if algorithm.entropy_bonus.is_some() && !method.learnt {
        return Err(refuse(
            "algorithm.entropy_bonus",
            format!(
                "given, but the noise of `{}` has the same entropy under all weights: remove the key or set \
                 `actor.model.openpi.noise_method = \"flow_noise\"`",
                method.name
            ),
        ));
    }
    Ok(())
}

fn check_numbers(config: &RunConfig) -> Result<(), ConfigError> {
    let (algorithm, envs) = (&config.algorithm, config.env.train.total_num_envs);
    at_most(
        "algorithm.group_size",
        algorithm.group_size,
        "env.train.total_num_envs",
        envs,
    )?;
    if !envs.is_multiple_of(algorithm.group_size) {
        return Err(refuse(
            "algorithm.group_size",
            format!(
                "{} does not divide `env.train.total_num_envs` = {envs}",
                algorithm.group_size
            ),
        ));
    }
    fraction("algorithm.gamma", algorithm.gamma)?;
    fraction("algorithm.gae_lambda", algorithm.gae_lambda)?;
    positive("algorithm.clip_ratio_low", algorithm.clip_ratio_low)?;
    positive("algorithm.clip_ratio_high", algorithm.clip_ratio_high)?;
    positive("algorithm.huber_delta", algorithm.huber_delta)?;
    for (key, value) in [
        ("algorithm.value_clip", algorithm.value_clip),
        ("algorithm.target_kl", algorithm.target_kl),
    ] {
        if let Some(value) = value {
            positive(key, value)?;
        }
    }
    Ok(())
}

/// Checks the keys of the critic and of the KL penalty's reference policy.
fn check_critic(config: &RunConfig) -> Result<(), ConfigError> {
    let (algorithm, optim) = (&config.algorithm, &config.actor.optim);
    let head = config.actor.model.value_head.is_some();
    if !head && optim.critic_warmup_epochs > 0 {
        return Err(refuse(
            "actor.optim.critic_warmup_epochs",
            format!(
                "{}, but there is no `actor.model.value_head` to warm up: set 0",
                optim.critic_warmup_epochs
            ),
        ));
    }
    if !head && algorithm.value_clip.is_some() {
        return Err(refuse(
            "algorithm.value_clip",
            "given, but there is no `actor.model.value_head`: remove the key",
        ));
    }
    if optim.critic_warmup_epochs > 0 && optim.critic_warmup_epochs >= config.runner.max_epochs {
        return Err(refuse(
            "actor.optim.critic_warmup_epochs",
            format!(
                "{}, but `runner.max_epochs` = {} ends the run before the policy trains: set less",
                optim.critic_warmup_epochs, config.runner.max_epochs
            ),
        ));
    }
    match (algorithm.kl_beta, algorithm.kl_reference) {
        (None, Some(_)) => Err(refuse(
            "algorithm.kl_reference",
            "given, but without `algorithm.kl_beta` there is no penalty: set the factor or remove the key",
        )),
        (Some(_), Some(ReferenceConfig::Acting {})) => Err(refuse(
            "algorithm.kl_reference.kind",
            "`acting` is what `algorithm.kl_beta` compares with by itself: remove the key",
        )),
        (_, Some(reference)) => check_reference("algorithm.kl_reference", reference),
        (_, None) => Ok(()),
    }
}

fn check_reference(key: &str, reference: ReferenceConfig) -> Result<(), ConfigError> {
    if let ReferenceConfig::Ema { decay } = reference
        && !(0.0..1.0).contains(&decay)
    {
        return Err(refuse(
            &format!("{key}.decay"),
            format!("{decay}, expected at least 0 and below 1"),
        ));
    }
    Ok(())
}

/// Rejects keys that contradict a loss on the velocity, which has no ratio, no critic and one decision per chunk.
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
    check_reference("algorithm.velocity.reference", velocity.reference)
}

/// Checks the requirements of training on records of older versions.
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
    if algorithm.update_epoch == 0 {
        return Err(refuse(
            "algorithm.update_epoch",
            "0, expected at least 1 pass over the records",
        ));
    }
    if let Some(threshold) = algorithm.behave_weight_threshold
        && !(threshold.is_finite() && threshold >= 1.0)
    {
        return Err(refuse(
            "algorithm.behave_weight_threshold",
            format!("{threshold}, expected at least 1, the weight of a record of the version in training"),
        ));
    }
    let positive = [
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
            (grpo, &[resample][..], ["filter_rewards.max_rounds", "missing"]),
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
                &["algorithm.reward_type=\"action_level\""],
                ["logprob_type", "action_level"],
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
            (grpo, &["algorithm.update_epoch=0"], ["update_epoch", "at least 1"]),
            (
                grpo,
                &["actor.optim.critic_warmup_epochs=2"],
                ["critic_warmup_epochs", "set 0"],
            ),
            (grpo, &["algorithm.value_clip=0.2"], ["value_clip", "remove"]),
            (
                quickstart,
                &["actor.optim.critic_warmup_epochs=120"],
                ["critic_warmup_epochs", "set less"],
            ),
            (
                quickstart,
                &["actor.optim.min_lr_ratio=-1.0"],
                ["min_lr_ratio", "0 to 1"],
            ),
            (
                quickstart,
                &["sft.optim.min_lr_ratio=nan"],
                ["sft.optim.min_lr_ratio", "0 to 1"],
            ),
            (quickstart, &["actor.optim.betas=[0.9, 1.0]"], ["betas", "below 1"]),
            (
                quickstart,
                &["env.eval.train_episodes=0"],
                ["train_episodes", "expected 1"],
            ),
            (
                quickstart,
                &["actor.model.value_head.hidden=[0]"],
                ["value_head.hidden", "1 to 65536"],
            ),
            (
                quickstart,
                &["actor.model.discrete_state_input=true"],
                ["discrete_state_input", "remove"],
            ),
            (
                quickstart,
                &[
                    "actor.model.openpi.noise_method=\"flow_cps\"",
                    "actor.model.openpi.noise_level=1.5",
                ],
                ["noise_level", "at most 1"],
            ),
            (
                "tabletop_flow_noise.toml",
                &["actor.model.openpi.safe_get_logprob=true"],
                ["safe_get_logprob", "flow_noise"],
            ),
            (
                "tabletop_flow_noise.toml",
                &["actor.model.openpi.noise_anneal={start=0.7,end=0.3,steps=10}"],
                ["noise_anneal", "remove"],
            ),
            (
                quickstart,
                &["algorithm.kl_reference={kind=\"frozen\"}"],
                ["kl_reference", "kl_beta"],
            ),
            (
                quickstart,
                &["algorithm.kl_beta=0.1", "algorithm.kl_reference={kind=\"acting\"}"],
                ["kl_reference", "remove"],
            ),
            (
                quickstart,
                &[
                    "algorithm.kl_beta=0.1",
                    "algorithm.kl_reference={kind=\"frozen\",decay=0.9}",
                ],
                ["kl_reference", "decay"],
            ),
            (
                quickstart,
                &[
                    "algorithm.kl_beta=0.1",
                    "algorithm.kl_reference={kind=\"ema\",decay=1.0}",
                ],
                ["kl_reference.decay", "below 1"],
            ),
            (
                asynchronous,
                &["algorithm.behave_weight_threshold=0.9"],
                ["behave_weight_threshold", "at least 1"],
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
