//! The checked plan of a run: sizes derived once, contradictions refused before anything starts.

use crate::{
    config::{
        ActorConfig, ConfigError, ModelConfig, PrefixCachePlace, RunConfig, StageOptim, TokenizerConfig,
        ValueHeadConfig, WorkerKind,
    },
    dims::{PolicyDims, Variant},
    flow::{Mdp, Sampling, Schedule},
    norm::{Normalization, mask_fits},
    params::{CriticInput, Heads, Pooling, ValueHeadDims, ValueSteps},
    prompt::Tokenizer,
};

/// Megabytes of kept prefixes where the configuration names no bound.
pub const DEFAULT_PREFIX_CACHE_MB: u64 = 2000;
/// Largest bound of the kept prefixes, a petabyte.
const MAX_PREFIX_CACHE_MB: u64 = 1_000_000_000;

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
        check_prefix_cache(&config.actor)?;
        if let Some(rows) = config.rollout.fixed_batch
            && !(2..=config.rollout.max_batch).contains(&rows)
        {
            // a batch of one row is multiplied as a vector, which sums in another order than a matrix
            return Err(refuse(
                "rollout.fixed_batch",
                format!(
                    "{rows}, expected 2 to `rollout.max_batch` = {}, or no such key",
                    config.rollout.max_batch
                ),
            ));
        }
        if config.runner.keep_last == Some(0) {
            return Err(refuse(
                "runner.keep_last",
                "0, expected at least 1, or no such key to keep all checkpoints",
            ));
        }
        if config.runner.keep_best && config.runner.val_check_interval == 0 {
            return Err(refuse(
                "runner.keep_best",
                "true, but `runner.val_check_interval = 0` evaluates nothing during training: set an interval",
            ));
        }
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
        if config.env.python.is_some() && config.env.worker != WorkerKind::Python {
            return Err(refuse(
                "env.python",
                "given, but `env.worker = \"rust\"` needs no interpreter: remove the key",
            ));
        }
        check_sampling(model, config.algorithm.velocity.is_some())?;
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
        let stages = [
            ("pretrain.optim", config.pretrain.as_ref().map(|stage| &stage.optim)),
            ("sft.optim", config.sft.as_ref().map(|stage| &stage.optim)),
        ];
        for (section, optim) in stages
            .into_iter()
            .filter_map(|(section, optim)| Some((section, optim?)))
        {
            check_stage(section, optim)?;
        }
        check_fraction("actor.optim.min_lr_ratio", o.min_lr_ratio)?;
        for beta in o.betas {
            if !(0.0..1.0).contains(&beta) {
                return Err(refuse(
                    "actor.optim.betas",
                    format!("{beta}, expected at least 0 and below 1"),
                ));
            }
        }
        for (key, episodes) in [
            ("env.eval.episodes", config.env.eval.episodes),
            ("env.eval.train_episodes", config.env.eval.train_episodes),
        ] {
            at_most(key, episodes, "the most episodes", 1 << 20)?;
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
        if let Some(runs) = &model.delta_actions
            && !mask_fits(runs, model.env_action_dim)
        {
            return Err(refuse(
                "actor.model.delta_actions",
                format!(
                    "{runs:?}, expected run lengths other than 0 over at most `actor.model.env_action_dim` = {} dimensions, like [6, -1]",
                    model.env_action_dim
                ),
            ));
        }
        if model.discrete_state_input && model.variant != Variant::Pi05 {
            return Err(refuse(
                "actor.model.discrete_state_input",
                "true, but pi0 has a token for the state: remove the key",
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
        let heads = Heads {
            value: model
                .value_head
                .as_ref()
                .map(|head| value_head(head, model))
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

fn check_fraction(key: &str, value: f64) -> Result<(), ConfigError> {
    if (0.0..=1.0).contains(&value) {
        return Ok(());
    }
    Err(refuse(key, format!("{value}, expected 0 to 1")))
}

fn check_stage(section: &str, optim: &StageOptim) -> Result<(), ConfigError> {
    check_fraction(&format!("{section}.min_lr_ratio"), optim.min_lr_ratio)?;
    for (key, value) in [("lr", optim.lr), ("weight_decay", optim.weight_decay)] {
        if !(value.is_finite() && value >= 0.0) {
            return Err(refuse(
                &format!("{section}.{key}"),
                format!("{value}, expected a number of at least 0"),
            ));
        }
    }
    Ok(())
}

/// Hidden widths of a head.
fn check_hidden(key: &str, hidden: &[usize]) -> Result<(), ConfigError> {
    if hidden.len() > 16 || hidden.iter().any(|width| !(1..=65_536).contains(width)) {
        return Err(refuse(
            key,
            format!("{hidden:?}, expected at most 16 widths of 1 to 65536"),
        ));
    }
    Ok(())
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

fn check_sampling(model: &ModelConfig, without_likelihood: bool) -> Result<(), ConfigError> {
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
            check_hidden("actor.model.openpi.noise_head.hidden", &head.hidden)?;
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
                "`{}` with `num_steps` = {} and `ignore_last` = {} leaves no stochastic step, so nothing can be learnt",
                method.name, model.num_steps, openpi.ignore_last
            ),
        ));
    }
    Ok(())
}

fn value_head(head: &ValueHeadConfig, model: &ModelConfig) -> Result<ValueHeadDims, ConfigError> {
    check_hidden("actor.model.value_head.hidden", &head.hidden)?;
    let vlm = head.input == CriticInput::Vlm;
    if head.state && !(vlm && model.variant == Variant::Pi0) {
        return Err(refuse(
            "actor.model.value_head.state",
            "true, but only `V_vlm` of pi0 can read the state apart: pi0's expert holds it already, and so does pi0.5's prompt with \
             `actor.model.discrete_state_input`",
        ));
    }
    let only = |key: &str, name: &str| {
        refuse(
            &format!("actor.model.value_head.{key}"),
            format!("given, but it belongs to `input = \"{name}\"`: remove the key"),
        )
    };
    if head.pooling.is_some() && !vlm {
        return Err(only("pooling", "vlm"));
    }
    if head.chunk_critic_input && vlm {
        return Err(only("chunk_critic_input", "expert"));
    }
    if head.steps.is_some() && vlm {
        return Err(only("steps", "expert"));
    }
    if head.steps == Some(ValueSteps::Path) && model.openpi.mdp == Mdp::TwoLayer {
        return Err(refuse(
            "actor.model.value_head.steps",
            "`path`, but with `mdp = \"two_layer\"` every denoise step has a value of its own: set `stochastic`",
        ));
    }
    Ok(ValueHeadDims {
        input: head.input,
        hidden: head.hidden.clone(),
        state: head.state,
        pooling: head.pooling.unwrap_or(Pooling::Mean),
        tokens: head.chunk_critic_input.then_some(model.num_action_chunks),
        steps: head.steps.unwrap_or(ValueSteps::Stochastic),
    })
}
