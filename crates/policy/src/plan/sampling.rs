//! Checks of `[actor.model.openpi]`: sampling, and presence of a stochastic step for a loss with likelihood.

use super::range::{hidden, refuse};
use crate::{
    config::{ConfigError, ModelConfig},
    flow::{Mdp, Schedule},
};

/// Checks the section; `without_likelihood`: the loss needs no stochastic step.
///
/// # Errors
/// Names the key and the value expected.
pub(super) fn check(model: &ModelConfig, without_likelihood: bool) -> Result<(), ConfigError> {
    let openpi = &model.openpi;
    let method = openpi.noise_method;
    let mut levels = vec![("actor.model.openpi.noise_level", openpi.noise_level)];
    if let Some(anneal) = &openpi.noise_anneal {
        levels.push(("actor.model.openpi.noise_anneal.start", anneal.start));
        levels.push(("actor.model.openpi.noise_anneal.end", anneal.end));
        if anneal.steps == 0 {
            return Err(refuse(
                "actor.model.openpi.noise_anneal.steps",
                "0, expected at least 1",
            ));
        }
        if method.levels.is_none() {
            return Err(refuse(
                "actor.model.openpi.noise_anneal",
                format!("given, but `{}` reads no noise level: remove the section", method.name),
            ));
        }
    }
    let largest = method.levels.unwrap_or(f64::INFINITY);
    for (key, level) in levels {
        if !(level.is_finite() && level > 0.0 && level <= largest) {
            return Err(refuse(
                key,
                format!("{level}, expected above 0, at most {largest} with `{}`", method.name),
            ));
        }
    }
    match &openpi.noise_head {
        None if method.learnt => {
            return Err(refuse(
                "actor.model.openpi.noise_head",
                format!(
                    "missing, `{}` needs `{{ hidden = [128, 64], std_range = [0.08, 0.16] }}`",
                    method.name
                ),
            ));
        }
        Some(_) if !method.learnt => {
            return Err(refuse(
                "actor.model.openpi.noise_head",
                format!("given, but `{}` learns no noise: remove the section", method.name),
            ));
        }
        Some(head) => {
            let [low, high] = head.std_range;
            if !(low > 0.0 && low < high && high <= 2.0) {
                return Err(refuse(
                    "actor.model.openpi.noise_head.std_range",
                    format!("[{low}, {high}], expected 0 < smallest < largest <= 2"),
                ));
            }
            hidden("actor.model.openpi.noise_head.hidden", &head.hidden)?;
        }
        None => {}
    }
    if openpi.safe_get_logprob && method.learnt {
        return Err(refuse(
            "actor.model.openpi.safe_get_logprob",
            format!(
                "true, but it does not read the standard deviation that `{}` learns: remove the key",
                method.name
            ),
        ));
    }
    match (openpi.mdp, openpi.joint_logprob) {
        (Mdp::Joint, None) => {
            return Err(refuse(
                "actor.model.openpi.joint_logprob",
                "missing, `mdp = \"joint\"` needs `sum` (the paper) or `mean` (the reference)",
            ));
        }
        (Mdp::Hybrid | Mdp::TwoLayer, Some(_)) => {
            return Err(refuse(
                "actor.model.openpi.joint_logprob",
                "given, but only `mdp = \"joint\"` joins log-probabilities: remove the key",
            ));
        }
        _ => {}
    }
    let schedule = Schedule::new(
        openpi.noise_method,
        model.num_steps,
        openpi.noise_level,
        openpi.ignore_last,
    );
    if schedule.drawable == 0 && !without_likelihood {
        return Err(refuse(
            "actor.model.openpi.noise_method",
            format!(
                "`{}` with `num_steps` = {} and `ignore_last` = {} leaves no stochastic step, so nothing can be learned",
                method.name, model.num_steps, openpi.ignore_last
            ),
        ));
    }
    Ok(())
}
