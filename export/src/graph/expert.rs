//! Tokens of the action expert (state, and noisy actions with the flow time), attention mask and positions.

use policy::{
    dims::{PolicyDims, Variant},
    element::ElementType,
    params::EXPERT,
};

use crate::{
    builder::{GraphBuilder, GraphError, Value},
    graph::gemma::{Cache, FORBIDDEN, Norm, Stack, bias_of, cache_shape, grouped_bias, rotary},
    shape::Dim,
};

/// The expert's input tokens and, for pi0.5, the condition of the norms.
pub(crate) struct Suffix {
    /// Input tokens, `[batch * suffix_len, expert.width]`.
    pub(crate) tokens: Value,
    /// Condition of the norms, `[batch, expert.width]`; `None` for pi0.
    pub(crate) condition: Option<Value>,
}

/// Returns the suffix. For pi0: `[state, action tokens]` with the time in the action tokens. For pi0.5: action tokens, with the
/// time in the condition.
pub(crate) fn suffix(
    g: &mut GraphBuilder<'_>,
    dims: &PolicyDims,
    x_t: &Value,
    time_emb: &Value,
    state: Option<&Value>,
) -> Result<Suffix, GraphError> {
    g.scope("suffix");
    let width = dims.expert.width;
    let (batch, wide) = (g.rows(1), Dim::fixed(width));
    let action_rows = g.rows(dims.action_horizon);
    let x = g.reshape(x_t, &[action_rows, Dim::fixed(dims.action_dim)])?;
    let actions = g.linear_named(&x, "action_in_proj", true)?;
    match dims.variant {
        Variant::Pi05 => Ok(Suffix {
            tokens: actions,
            condition: Some(time_condition(g, time_emb)?),
        }),
        Variant::Pi0 => {
            let state = state.ok_or_else(|| g.refuse("Gemm", "pi0 takes a `state`".to_owned()))?;
            let state = g.linear_named(state, "state_proj", true)?;
            // the weight for [action ; time] is split in two halves, so that the time part is computed once per sample
            let weight = g.weight("action_time_mlp_in.weight")?;
            let bias = g.weight("action_time_mlp_in.bias")?;
            let halves = g.split(&weight, 1, &[width, width])?;
            let [for_action, for_time] = <[Value; 2]>::try_from(halves)
                .map_err(|parts| g.refuse("Split", format!("{} parts, expected 2", parts.len())))?;
            let action_part = g.linear(&actions, &for_action, None)?;
            let time_part = g.linear(time_emb, &for_time, Some(&bias))?;
            let horizon = Dim::fixed(dims.action_horizon);
            let action_part = g.reshape(&action_part, &[batch, horizon, wide])?;
            let time_part = g.reshape(&time_part, &[batch, Dim::fixed(1), wide])?;
            let mixed = g.add(&action_part, &time_part)?;
            let mixed = g.reshape(&mixed, &[action_rows, wide])?;
            let mixed = g.silu(&mixed)?;
            let mixed = g.linear_named(&mixed, "action_time_mlp_out", true)?;
            let mixed = g.reshape(&mixed, &[batch, horizon, wide])?;
            let state = g.reshape(&state, &[batch, Dim::fixed(1), wide])?;
            let tokens = g.concat(&[&state, &mixed], 1)?;
            let rows = g.rows(dims.suffix_len());
            Ok(Suffix {
                tokens: g.reshape(&tokens, &[rows, wide])?,
                condition: None,
            })
        }
    }
}

/// Returns the condition of pi0.5's norms for `time_emb` `[rows, expert.width]`.
pub(crate) fn time_condition(g: &mut GraphBuilder<'_>, time_emb: &Value) -> Result<Value, GraphError> {
    let hidden = g.linear_named(time_emb, "time_mlp_in", true)?;
    let hidden = g.silu(&hidden)?;
    let hidden = g.linear_named(&hidden, "time_mlp_out", true)?;
    g.silu(&hidden)
}

/// Result of the expert for the suffix.
pub(crate) struct ExpertOutput {
    /// Tokens after the final norm, `[batch * suffix_len, expert.width]`.
    pub(crate) tokens: Value,
    /// Positions as f32, `[batch, suffix_len]`.
    pub(crate) positions: Value,
}

/// Runs all layers over the cached prefix: `k`, `v` `[batch, depth, kv_heads, prefix_len, head_dim]`.
pub(crate) fn expert(
    g: &mut GraphBuilder<'_>,
    dims: &PolicyDims,
    suffix: Suffix,
    prefix_mask: &Value,
    k: &Value,
    v: &Value,
) -> Result<ExpertOutput, GraphError> {
    g.scope("expert.positions");
    let tokens = dims.suffix_len();
    let valid = g.cast(prefix_mask, ElementType::F32)?;
    let count = g.sum(&valid, 1)?;
    let own: Vec<f32> = (0..tokens).map(|i| i as f32).collect();
    let own = g.constant(&[1, tokens], &own)?;
    let positions = g.add(&count, &own)?;
    let rotary = rotary(g, dims, &positions, tokens)?;
    let bias = suffix_bias(g, dims, prefix_mask)?;

    g.scope("expert.cache");
    let keys = per_layer(g, dims, k)?;
    let values = per_layer(g, dims, v)?;
    let norm = suffix.condition.map_or(Norm::Weight, Norm::Adaptive);
    let stack = Stack {
        dims,
        width: dims.expert.width,
        tokens,
        norm,
        rotary,
        bias,
    };
    let mut x = suffix.tokens;
    for (l, (k, v)) in keys.into_iter().zip(values).enumerate() {
        g.scope(&format!("expert.{l}"));
        x = stack
            .layer(g, &format!("{EXPERT}layers.{l}"), &x, Some(&Cache { k, v }))?
            .0;
    }
    g.scope("expert.out");
    Ok(ExpertOutput {
        tokens: stack.final_norm(g, &x, &format!("{EXPERT}norm"))?,
        positions,
    })
}

/// Returns one value per layer in the layout of [`Cache`].
fn per_layer(g: &mut GraphBuilder<'_>, dims: &PolicyDims, cached: &Value) -> Result<Vec<Value>, GraphError> {
    let shape = cache_shape(g, dims, dims.prefix_len());
    if dims.depth == 1 {
        return Ok(vec![g.reshape(cached, &shape)?]);
    }
    g.split(cached, 1, &vec![1; dims.depth])?
        .iter()
        .map(|layer| g.reshape(layer, &shape))
        .collect()
}

/// Returns the attention bias. Every token sees the valid prefix; in addition, pi0's state token sees itself, and action tokens see
/// the whole suffix.
fn suffix_bias(g: &mut GraphBuilder<'_>, dims: &PolicyDims, prefix_mask: &Value) -> Result<Value, GraphError> {
    let (prefix, tokens) = (dims.prefix_len(), dims.suffix_len());
    let keys = prefix + tokens;
    let bias = bias_of(g, prefix_mask)?;
    let bias = g.pad_last(&bias, tokens)?;
    let batch = g.rows(1);
    let bias = g.reshape(&bias, &[batch, Dim::fixed(1), Dim::fixed(keys)])?;
    let bias = match dims.variant {
        Variant::Pi05 => bias,
        Variant::Pi0 => {
            let own: Vec<f32> = (0..tokens * keys)
                .map(|at| {
                    if at / keys == 0 && at % keys > prefix {
                        FORBIDDEN
                    } else {
                        0.0
                    }
                })
                .collect();
            let own = g.constant(&[1, tokens, keys], &own)?;
            g.add(&bias, &own)?
        }
    };
    grouped_bias(g, dims, &bias, tokens)
}
