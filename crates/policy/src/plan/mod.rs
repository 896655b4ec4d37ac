//! Checked plan of a run: derived sizes, and rejection of contradictory configurations before any process starts.

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

/// Largest size of the stored prefixes in megabytes if the configuration gives no bound.
pub const DEFAULT_PREFIX_CACHE_MB: u64 = 2000;

/// Checked configuration with derived sizes, used by the programs instead of the raw configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct RunPlan {
    /// Effective configuration.
    pub config: RunConfig,
    /// Digest of the effective configuration, see [`RunConfig::digest`].
    pub config_digest: String,
    /// Sizes of the policy.
    pub dims: PolicyDims,
    /// Heads in addition to the velocity output.
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

    /// Returns the oldest version whose records an update of the weights at `version` may read.
    pub fn oldest(&self, version: u64) -> u64 {
        version.saturating_sub(u64::from(self.config.rollout.max_staleness.unwrap_or(0)))
    }

    /// Returns the storage of an iteration's frozen prefixes and its largest size in bytes.
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

    /// Returns the sampling parameters of a policy version.
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
