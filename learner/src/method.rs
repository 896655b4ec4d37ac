//! The loss and the advantage estimator that a plan names, and their requirements on the rest of the plan. An entry of a registry
//! declares its own requirements, so that a new entry needs no new check here.

use policy::{
    config::{BootstrapType, ConfigError, ReferenceConfig},
    plan::RunPlan,
};

use crate::{
    advantage::{ESTIMATORS, EstimatorSpec},
    error::{LearnerError, Result},
    loss::{POLICY_LOSSES, PolicyLossSpec},
    velocity::{VELOCITY_LOSSES, VelocityLoss, velocity_loss},
};

/// Loss that an update minimizes.
#[derive(Debug)]
pub enum Method {
    /// A loss on probability ratios.
    Likelihood(PolicyLossSpec),
    /// A loss on the velocity, and its reference policy.
    Velocity(Box<dyn VelocityLoss>, ReferenceConfig),
}

fn refuse<T>(key: &str, detail: String) -> Result<T> {
    Err(LearnerError::Config(ConfigError::key(key, detail)))
}

fn names<'a>(all: impl Iterator<Item = &'a str>) -> String {
    all.collect::<Vec<_>>().join(", ")
}

/// Returns the loss of a plan.
///
/// # Errors
/// The loss is not registered, its section is missing or superfluous, or a parameter is invalid.
pub fn method(plan: &RunPlan) -> Result<Method> {
    let algorithm = &plan.config.algorithm;
    let name = algorithm.loss_type.as_str();
    if let Some(build) = velocity_loss(name) {
        let Some(velocity) = &algorithm.velocity else {
            return refuse(
                "algorithm.velocity",
                format!("missing, `loss_type = \"{name}\"` needs `reference` and `params`"),
            );
        };
        return match build(&velocity.params) {
            Ok(loss) => Ok(Method::Velocity(loss, velocity.reference)),
            Err(detail) => refuse("algorithm.velocity.params", format!("of `{name}`: {detail}")),
        };
    }
    let Some(loss) = POLICY_LOSSES.iter().find(|spec| spec.loss_type == name) else {
        let known = POLICY_LOSSES.iter().map(|spec| spec.loss_type);
        let known = names(known.chain(VELOCITY_LOSSES.iter().map(|(known, _)| *known)));
        return refuse("algorithm.loss_type", format!("`{name}`, expected one of {known}"));
    };
    if algorithm.velocity.is_some() {
        return refuse(
            "algorithm.velocity",
            format!(
                "given, but `algorithm.loss_type` is `{name}`: remove the section or set one of {}",
                names(VELOCITY_LOSSES.iter().map(|(known, _)| *known))
            ),
        );
    }
    Ok(Method::Likelihood(*loss))
}

/// Returns the estimator of a plan.
///
/// # Errors
/// The estimator is not registered; the error lists the registered names.
pub fn estimator(plan: &RunPlan) -> Result<&'static EstimatorSpec> {
    let name = plan.config.algorithm.adv_type.as_str();
    match ESTIMATORS.iter().find(|spec| spec.adv_type == name) {
        Some(spec) => Ok(spec),
        None => refuse(
            "algorithm.adv_type",
            format!(
                "`{name}`, expected one of {}",
                names(ESTIMATORS.iter().map(|spec| spec.adv_type))
            ),
        ),
    }
}

/// Rejects keys that do not fit the loss or the estimator, before anything starts.
///
/// # Errors
/// A key does not fit; the error names the key and a valid setting.
pub fn check(plan: &RunPlan) -> Result<()> {
    let estimator = estimator(plan)?;
    check_estimator(plan, estimator)?;
    match method(plan)? {
        Method::Likelihood(loss) => check_likelihood(plan, loss),
        Method::Velocity(..) => check_staleness(plan, false),
    }
}

fn check_likelihood(plan: &RunPlan, loss: PolicyLossSpec) -> Result<()> {
    let algorithm = &plan.config.algorithm;
    let name = loss.loss_type;
    match (loss.critic, plan.heads.value.is_some()) {
        (true, false) => {
            return refuse(
                "actor.model.value_head",
                format!("missing, `algorithm.loss_type = \"{name}\"` needs one"),
            );
        }
        (false, true) => {
            return refuse(
                "actor.model.value_head",
                format!("given, but `algorithm.loss_type = \"{name}\"` trains none: remove the section"),
            );
        }
        _ => {}
    }
    if algorithm.behave_weight_threshold.is_some() && !loss.proximal {
        return refuse(
            "algorithm.behave_weight_threshold",
            format!(
                "given, but only {} weigh by it, not `{name}`: remove the key",
                proximal_losses()
            ),
        );
    }
    check_staleness(plan, loss.proximal)
}

fn proximal_losses() -> String {
    names(
        POLICY_LOSSES
            .iter()
            .filter(|spec| spec.proximal)
            .map(|spec| spec.loss_type),
    )
}

/// Rejects `max_staleness` unless the loss corrects for records of older versions.
fn check_staleness(plan: &RunPlan, corrects: bool) -> Result<()> {
    if plan.config.rollout.max_staleness.is_none() || corrects {
        return Ok(());
    }
    refuse(
        "rollout.max_staleness",
        format!(
            "given, but `algorithm.loss_type = \"{}\"` does not correct for records of older versions: set one of {}, or remove the key",
            plan.config.algorithm.loss_type,
            proximal_losses()
        ),
    )
}

fn check_estimator(plan: &RunPlan, estimator: &EstimatorSpec) -> Result<()> {
    let algorithm = &plan.config.algorithm;
    let name = estimator.adv_type;
    let critic = plan.heads.value.is_some();
    if estimator.values && !critic {
        return refuse(
            "algorithm.adv_type",
            format!(
                "`{name}` needs values: add `actor.model.value_head`, or set one of {}",
                names(ESTIMATORS.iter().filter(|spec| !spec.values).map(|spec| spec.adv_type))
            ),
        );
    }
    if critic && !estimator.values {
        return refuse(
            "actor.model.value_head",
            format!(
                "given, but no advantage of `{name}` reads a value: remove the section and set a `loss_type` without a critic"
            ),
        );
    }
    if algorithm.bootstrap_type != BootstrapType::None && !critic {
        return refuse(
            "algorithm.bootstrap_type",
            "without `actor.model.value_head` there is no value to bootstrap with: set `none`".to_owned(),
        );
    }
    if estimator.groups && algorithm.group_size < 2 {
        return refuse(
            "algorithm.group_size",
            format!(
                "{}, but `algorithm.adv_type = \"{name}\"` compares episodes of a group: set at least 2",
                algorithm.group_size
            ),
        );
    }
    if estimator.normalize_advantages && !algorithm.normalize_advantages {
        return refuse(
            "algorithm.normalize_advantages",
            format!("false, but `{name}` is defined by its normalization over the batch: set true"),
        );
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use policy::config::{FilterMode, RunConfig};

    use super::*;

    fn configs() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs")
    }

    fn checked(name: &str, overrides: &[&str]) -> Result<(), String> {
        let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
        let config = RunConfig::load(&configs().join(name), &overrides).map_err(|e| e.to_string())?;
        let plan = RunPlan::new(config).map_err(|e| e.to_string())?;
        check(&plan).map_err(|e| e.to_string())
    }

    #[test]
    fn every_recipe_names_what_is_registered_and_fits() {
        let mut recipes = 0;
        for entry in std::fs::read_dir(configs()).expect("folder") {
            let path = entry.expect("entry").path();
            let name = path.file_name().and_then(|name| name.to_str()).expect("name");
            if path.extension().is_some_and(|extension| extension == "toml") {
                checked(name, &[]).unwrap_or_else(|error| panic!("{name}: {error}"));
                recipes += 1;
            }
        }
        assert!(recipes > 30, "{recipes}");
    }

    #[test]
    fn what_does_not_fit_is_refused_with_the_key() {
        let (grpo, quickstart) = ("tabletop_grpo.toml", "quickstart.toml");
        for (config, overrides, wanted) in [
            (
                "tabletop_flow_ipo.toml",
                &["algorithm.adv_type=\"grpo\"", "algorithm.group_size=1"][..],
                ["group_size", "at least 2"],
            ),
            (grpo, &["algorithm.adv_type=\"gae\""], ["adv_type", "value_head"]),
            (
                grpo,
                &["algorithm.adv_type=\"reinpp\""],
                ["adv_type", "reinforce_pp_baseline"],
            ),
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
            (
                grpo,
                &["algorithm.loss_type=\"decoupled_actor_critic\""],
                ["value_head", "missing"],
            ),
            (
                grpo,
                &["algorithm.loss_type=\"flow_ipo\""],
                ["algorithm.velocity", "`reference`"],
            ),
            (
                quickstart,
                &["algorithm.loss_type=\"actor\""],
                ["value_head", "trains none"],
            ),
            (
                quickstart,
                &["algorithm.loss_type=\"critic\""],
                ["loss_type", "actor_critic"],
            ),
            (
                quickstart,
                &["algorithm.adv_type=\"raw\""],
                ["value_head", "no advantage of `raw`"],
            ),
            (
                quickstart,
                &["algorithm.behave_weight_threshold=2.0"],
                ["behave_weight_threshold", "decoupled_actor"],
            ),
            (
                quickstart,
                &["rollout.max_staleness=1"],
                ["rollout.max_staleness", "decoupled_actor_critic"],
            ),
            (
                "tabletop_flow_ipo.toml",
                &["rollout.max_staleness=1"],
                ["rollout.max_staleness", "`algorithm.loss_type = \"flow_ipo\"`"],
            ),
            (
                "tabletop_nft.toml",
                &["algorithm.loss_type=\"actor\""],
                ["algorithm.velocity", "nft"],
            ),
        ] {
            let error = checked(config, overrides).expect_err("refused");
            for part in wanted {
                assert!(error.contains(part), "{overrides:?}: `{part}` is not in: {error}");
            }
        }
    }

    #[test]
    fn asynchronous_training_without_a_critic_is_one_key_away() {
        let resample = checked(
            "tabletop_grpo.toml",
            &["algorithm.loss_type=\"decoupled_actor\"", "rollout.max_staleness=1"],
        );
        assert!(resample.expect_err("refused").contains("`mask`"));
        let overrides = [
            "algorithm.loss_type=\"decoupled_actor\"",
            "rollout.max_staleness=1",
            "algorithm.filter_rewards={lower=0.1,upper=0.9,mode=\"mask\"}",
        ]
        .map(str::to_owned);
        let config = RunConfig::load(&configs().join("tabletop_grpo.toml"), &overrides).expect("configuration");
        assert_eq!(config.algorithm.filter_rewards.map(|f| f.mode), Some(FilterMode::Mask));
        check(&RunPlan::new(config).expect("plan")).expect("fits");
    }
}
