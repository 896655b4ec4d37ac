//! Checks of `[actor]`: batches, the prefix cache, the optimizer of RL.

use super::range::{MAX_THREADS, at_most, fraction, not_negative, positive, refuse};
use crate::config::{ActorConfig, ConfigError, OptimConfig, PrefixCachePlace};

/// Largest bound of the stored prefixes in megabytes, a petabyte.
const MAX_PREFIX_CACHE_MB: u64 = 1_000_000_000;

/// Checks the section except its model.
///
/// # Errors
/// Names the key and the value expected.
pub(super) fn check(actor: &ActorConfig) -> Result<(), ConfigError> {
    at_most(
        "actor.micro_batch_size",
        actor.micro_batch_size,
        "actor.global_batch_size",
        actor.global_batch_size,
    )?;
    at_most("actor.threads", actor.threads, "the most threads", MAX_THREADS)?;
    check_prefix_cache(actor)?;
    check_optim(&actor.optim)
}

fn check_prefix_cache(actor: &ActorConfig) -> Result<(), ConfigError> {
    let key = "actor.prefix_cache_mb";
    match (actor.prefix_cache, actor.prefix_cache_mb) {
        (Some(PrefixCachePlace::Off), Some(_)) => Err(refuse(
            key,
            "given, but `actor.prefix_cache = \"off\"` keeps nothing: remove the key",
        )),
        (Some(PrefixCachePlace::Disk), None) => Err(refuse(
            key,
            "missing, `actor.prefix_cache = \"disk\"` needs the largest size of its file in megabytes",
        )),
        (_, Some(mb)) if !(1..=MAX_PREFIX_CACHE_MB).contains(&mb) => Err(refuse(
            key,
            format!("{mb}, expected 1 to {MAX_PREFIX_CACHE_MB} megabytes, or `actor.prefix_cache = \"off\"`"),
        )),
        _ => Ok(()),
    }
}

fn check_optim(optim: &OptimConfig) -> Result<(), ConfigError> {
    positive("actor.optim.eps", optim.eps)?;
    positive("actor.optim.clip_grad", optim.clip_grad)?;
    not_negative("actor.optim.lr", optim.lr)?;
    not_negative("actor.optim.value_lr", optim.value_lr)?;
    not_negative("actor.optim.weight_decay", optim.weight_decay)?;
    fraction("actor.optim.min_lr_ratio", optim.min_lr_ratio)?;
    for beta in optim.betas {
        if !(0.0..1.0).contains(&beta) {
            return Err(refuse(
                "actor.optim.betas",
                format!("{beta}, expected at least 0 and below 1"),
            ));
        }
    }
    Ok(())
}
