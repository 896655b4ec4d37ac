//! The checked plan of a run: sizes derived once, contradictions refused before anything starts.

mod range;
mod runner;
mod stage;
mod actor;
mod model;
mod sampling;
mod env;
mod rollout;
mod algorithm;

use crate::{
    config::{ConfigError, PrefixCachePlace, RunConfig},
    dims::PolicyDims,
    flow::Sampling,
    params::Heads,
};

/// Megabytes of kept prefixes where the configuration names no bound.
pub const DEFAULT_PREFIX_CACHE_MB: u64 = 2000;

/// What the programs below `main` take instead of the raw configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct RunPlan {
    /// The effective configuration.
    pub config: RunConfig,
    /// Its digest.
    pub config_digest: String,
    /// Sizes of the policy.
    pub dims: PolicyDims,
    /// Heads beside the velocity.
    pub heads: Heads,
}

impl RunPlan {
    /// Checks a configuration and derives the sizes.
    ///
    /// # Errors
    /// Names the key that contradicts another or lies out of range.
    pub fn new(config: RunConfig) -> Result<Self, ConfigError> {
        let model = &config.actor.model;
        let dims = model::dims(model)?;
        runner::check(&config.runner)?;
        stage::check(&config)?;
        actor::check(&config.actor)?;
        model::check(model)?;
        sampling::check(model, config.algorithm.velocity.is_some())?;
        env::check(&config.env)?;
        rollout::check(&config.rollout)?;
        algorithm::check(&config)?;
        let heads = Heads {
            value: model
                .value_head
                .as_ref()
                .map(|head| model::value_head(head, model))
                .transpose()?,
            noise: model.openpi.noise_head.clone(),
        };
        let config_digest = config.digest()?;
        Ok(Self {
            config,
            config_digest,
            dims,
            heads,
        })
    }

    /// The oldest version whose records an update of the weights at `version` may read.
    pub fn oldest(&self, version: u64) -> u64 {
        version.saturating_sub(u64::from(self.config.rollout.max_staleness.unwrap_or(0)))
    }

    /// Where an iteration's frozen prefixes are kept, and at most how many bytes of them.
    pub fn prefix_cache(&self) -> (PrefixCachePlace, u64) {
        let actor = &self.config.actor;
        let place = actor.prefix_cache.unwrap_or(PrefixCachePlace::Memory);
        let mb = match place {
            PrefixCachePlace::Off => 0,
            PrefixCachePlace::Memory | PrefixCachePlace::Disk => {
                actor.prefix_cache_mb.unwrap_or(DEFAULT_PREFIX_CACHE_MB)
            }
        };
        (place, mb * 1_000_000)
    }

    /// How a policy version samples.
    pub fn sampling(&self, version: u64) -> Sampling {
        let model = &self.config.actor.model;
        Sampling {
            noise_method: model.openpi.noise_method,
            noise_level: model
                .openpi
                .noise_anneal
                .map_or(model.openpi.noise_level, |anneal| anneal.level(version)),
            ignore_last: model.openpi.ignore_last,
            num_steps: model.num_steps,
            mdp: model.openpi.mdp,
            safe_logprob: model.openpi.safe_get_logprob,
        }
    }
}
