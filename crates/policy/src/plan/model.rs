//! Checks of `[actor.model]`: sizes, heads, inputs and outputs of the network.

use super::range::{at_most, hidden, refuse};
use crate::{
    config::{ConfigError, ModelConfig, TokenizerConfig, ValueHeadConfig},
    dims::{PolicyDims, Variant},
    flow::Mdp,
    norm::{Normalization, mask_fits},
    params::{CriticInput, Pooling, ValueHeadDims, ValueSteps},
    prompt::Tokenizer,
};

/// Returns the checked sizes of the policy.
///
/// # Errors
/// The sizes do not fit together.
pub(super) fn dims(model: &ModelConfig) -> Result<PolicyDims, ConfigError> {
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
    Ok(dims)
}

/// Checks ranges, and contradictions between keys of the section.
///
/// # Errors
/// Names the key and the value expected.
pub(super) fn check(model: &ModelConfig) -> Result<(), ConfigError> {
    let most = [
        (
            "actor.model.num_action_chunks",
            model.num_action_chunks,
            "actor.model.action_horizon",
            model.action_horizon,
        ),
        (
            "actor.model.env_action_dim",
            model.env_action_dim,
            "actor.model.action_dim",
            model.action_dim,
        ),
        (
            "actor.model.num_steps",
            model.num_steps,
            "the largest number of denoise steps",
            1000,
        ),
    ];
    for (key, value, bound_key, bound) in most {
        at_most(key, value, bound_key, bound)?;
    }
    if let Some(width) = model.env_state_dim {
        at_most(
            "actor.model.env_state_dim",
            width,
            "actor.model.action_dim",
            model.action_dim,
        )?;
    }
    let mut cameras = model.cameras.iter().enumerate();
    if let Some((_, name)) = cameras.find(|(index, name)| model.cameras[..*index].contains(name)) {
        return Err(refuse(
            "actor.model.cameras",
            format!("`{name}` is there twice, expected a name of its own for each camera"),
        ));
    }
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
        if ids > model.vocab {
            return Err(refuse(
                "actor.model.vocab",
                format!("{}, but the tokenizer's words make {ids} ids", model.vocab),
            ));
        }
    }
    Ok(())
}

/// Returns the value head's sizes, with defaults filled in.
///
/// # Errors
/// Names the key that does not belong to this head.
pub(super) fn value_head(head: &ValueHeadConfig, model: &ModelConfig) -> Result<ValueHeadDims, ConfigError> {
    hidden("actor.model.value_head.hidden", &head.hidden)?;
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
