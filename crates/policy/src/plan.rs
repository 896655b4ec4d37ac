//! The checked plan of a run: sizes derived once, contradictions refused before anything starts.

use crate::{
    config::{ConfigError, RunConfig, TokenizerConfig},
    dims::PolicyDims,
    dims::Variant,
    flow::Schedule,
    norm::Normalization,
    params::{CriticInput, ValueHeadDims},
    prompt::Tokenizer,
};

/// What the programs below `main` take instead of the raw configuration.
#[derive(Debug, Clone, PartialEq)]
pub struct RunPlan {
    /// The effective configuration.
    pub config: RunConfig,
    /// Its digest.
    pub config_digest: String,
    /// Sizes of the policy.
    pub dims: PolicyDims,
    /// Sizes of the value head.
    pub value_head: Option<ValueHeadDims>,
}

pub(crate) fn refuse(key: &str, detail: impl Into<String>) -> ConfigError {
    ConfigError::Key {
        key: key.to_owned(),
        detail: detail.into(),
    }
}

impl RunPlan {
    /// Checks a configuration and derives the sizes.
    ///
    /// # Errors
    /// Names the key that contradicts another or lies out of range.
    pub fn new(config: RunConfig) -> Result<Self, ConfigError> {
        let model = &config.actor.model;
        let dims = PolicyDims {
            variant: model.variant,
            vocab: model.vocab,
            vlm: model.vlm,
            expert: model.expert,
            depth: model.depth,
            heads: model.heads,
            kv_heads: model.kv_heads,
            head_dim: model.head_dim,
            vision: model.vision,
            cameras: model.cameras.len(),
            prompt_len: model.prompt_len,
            action_horizon: model.action_horizon,
            action_dim: model.action_dim,
        };
        dims.check().map_err(|e| refuse("actor.model", e.to_string()))?;
        let at_most = |key: &str, value: usize, bound_key: &str, bound: usize| {
            if value == 0 || value > bound {
                return Err(refuse(key, format!("{value}, expected 1 to `{bound_key}` = {bound}")));
            }
            Ok(())
        };
        at_most(
            "actor.model.num_action_chunks",
            model.num_action_chunks,
            "actor.model.action_horizon",
            model.action_horizon,
        )?;
        at_most(
            "actor.model.env_action_dim",
            model.env_action_dim,
            "actor.model.action_dim",
            model.action_dim,
        )?;
        at_most(
            "actor.model.num_steps",
            model.num_steps,
            "the largest number of denoise steps",
            1000,
        )?;
        at_most(
            "actor.micro_batch_size",
            config.actor.micro_batch_size,
            "actor.global_batch_size",
            config.actor.global_batch_size,
        )?;
        at_most("actor.threads", config.actor.threads, "the most threads", 1024)?;
        at_most("rollout.threads", config.rollout.threads, "the most threads", 1024)?;
        at_most(
            "rollout.max_batch",
            config.rollout.max_batch,
            "the largest batch",
            65_536,
        )?;
        at_most(
            "rollout.queue_capacity",
            config.rollout.queue_capacity,
            "the longest queue",
            1 << 20,
        )?;
        at_most(
            "env.train.total_num_envs",
            config.env.train.total_num_envs,
            "the most environments",
            65_536,
        )?;
        at_most(
            "env.train.workers",
            config.env.train.workers,
            "env.train.total_num_envs",
            config.env.train.total_num_envs,
        )?;
        at_most(
            "env.train.rollout_epoch",
            config.env.train.rollout_epoch,
            "the most episodes",
            65_536,
        )?;
        at_most(
            "algorithm.group_size",
            config.algorithm.group_size,
            "env.train.total_num_envs",
            config.env.train.total_num_envs,
        )?;
        if !config
            .env
            .train
            .total_num_envs
            .is_multiple_of(config.algorithm.group_size)
        {
            return Err(refuse(
                "algorithm.group_size",
                format!(
                    "{} does not divide `env.train.total_num_envs` = {}",
                    config.algorithm.group_size, config.env.train.total_num_envs
                ),
            ));
        }
        let level = model.openpi.noise_level;
        if !(level.is_finite() && level > 0.0 && level <= 2.0) {
            return Err(refuse(
                "actor.model.openpi.noise_level",
                format!("{level}, expected above 0, at most 2"),
            ));
        }
        let a = &config.algorithm;
        for (key, value) in [("algorithm.gamma", a.gamma), ("algorithm.gae_lambda", a.gae_lambda)] {
            if !(0.0..=1.0).contains(&value) {
                return Err(refuse(key, format!("{value}, expected 0 to 1")));
            }
        }
        let o = &config.actor.optim;
        let mut positive = vec![
            ("algorithm.clip_ratio_low", a.clip_ratio_low),
            ("algorithm.clip_ratio_high", a.clip_ratio_high),
            ("algorithm.huber_delta", a.huber_delta),
            ("actor.optim.eps", o.eps),
            ("actor.optim.clip_grad", o.clip_grad),
        ];
        positive.extend(a.clip_ratio_c.map(|v| ("algorithm.clip_ratio_c", v)));
        positive.extend(a.value_clip.map(|v| ("algorithm.value_clip", v)));
        positive.extend(a.target_kl.map(|v| ("algorithm.target_kl", v)));
        for (key, value) in positive {
            if !(value.is_finite() && value > 0.0) {
                return Err(refuse(key, format!("{value}, expected a number above 0")));
            }
        }
        for (key, value) in [
            ("actor.optim.lr", o.lr),
            ("actor.optim.value_lr", o.value_lr),
            ("actor.optim.weight_decay", o.weight_decay),
        ] {
            if !(value.is_finite() && value >= 0.0) {
                return Err(refuse(key, format!("{value}, expected a number of at least 0")));
            }
        }
        if model.openpi.noise_level > 0.0
            && Schedule::new(
                model.openpi.noise_method,
                model.num_steps,
                level,
                model.openpi.ignore_last,
            )
            .drawable
                == 0
        {
            return Err(refuse(
                "actor.model.openpi.noise_method",
                format!(
                    "`{}` with `num_steps` = {} and `ignore_last` = {} leaves no stochastic step, so nothing can be learnt",
                    model.openpi.noise_method.name(),
                    model.num_steps,
                    model.openpi.ignore_last
                ),
            ));
        }
        crate::plan_algorithm::check(&config)?;
        if !model.openpi.train_expert_only {
            return Err(refuse(
                "actor.model.openpi.train_expert_only",
                "false is not supported yet: RL trains the action expert on a frozen vision-language model, set it to true",
            ));
        }
        if model.normalization != Normalization::None && model.norm_stats.is_none() {
            return Err(refuse(
                "actor.model.norm_stats",
                "missing, `actor.model.normalization` needs the statistics",
            ));
        }
        if model
            .value_head
            .as_ref()
            .is_some_and(|head| head.state && (head.input != CriticInput::Vlm || model.variant != Variant::Pi0))
        {
            return Err(refuse(
                "actor.model.value_head.state",
                "true, but only `V_vlm` of pi0 can read the state apart: the expert and pi0.5's prompt hold it already",
            ));
        }
        if let TokenizerConfig::Words { words } = &model.tokenizer {
            let ids = Tokenizer::from_words(words)
                .map_err(|e| refuse("actor.model.tokenizer.words", e.to_string()))?
                .vocab_size();
            if ids > dims.vocab {
                return Err(refuse(
                    "actor.model.vocab",
                    format!("{}, but the tokenizer's words make {ids} ids", dims.vocab),
                ));
            }
        }
        let value_head = model.value_head.as_ref().map(|head| ValueHeadDims {
            input: head.input,
            hidden: head.hidden.clone(),
            state: head.state,
        });
        let config_digest = config.digest()?;
        Ok(Self {
            config,
            config_digest,
            dims,
            value_head,
        })
    }

    /// The step tables of this run.
    pub fn schedule(&self) -> Schedule {
        let model = &self.config.actor.model;
        Schedule::new(
            model.openpi.noise_method,
            model.num_steps,
            model.openpi.noise_level,
            model.openpi.ignore_last,
        )
    }

    /// Whether the critic reads the prefix.
    pub fn critic_reads_prefix(&self) -> bool {
        self.value_head
            .as_ref()
            .is_some_and(|head| head.input == CriticInput::Vlm)
    }
}
