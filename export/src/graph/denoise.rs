//! `denoise.onnx`: one denoise step over the cached prefix, and the value.

use std::collections::BTreeMap;

use policy::{
    bundle::EXPERT_WEIGHTS,
    config::WeightMode,
    dims::PolicyDims,
    graph::{C_V, C_X, GraphContract, K, POOLED, PREFIX_MASK, STATE, STD, TIME_EMB, V, X_T, Z},
    params::{CriticInput, Heads, NoiseHeadDims, ValueHeadDims, expert_params, noise_layer},
    weights::Location,
};

use crate::{
    builder::{GraphBuilder, GraphError, Value, WeightsAs},
    graph::{
        GraphOptions,
        expert::{expert, suffix},
        gemma::position_ids,
    },
    shape::Dim,
};

/// Returns the denoise graph as the bytes of an `.onnx` file. In mode `constants` the weights are at `locations` in
/// `expert.safetensors` in the same folder. In mode `inputs` the weights are graph inputs and `locations` is not read.
///
/// Inputs and outputs are those of [`GraphContract::denoise`]; debug outputs are `suffix_embs`, `suffix_out`, `adarms_cond`
/// (pi0.5), `suffix_position_ids`.
///
/// # Errors
/// A location is missing or has a wrong shape; see [`GraphError`].
pub fn denoise_graph(
    dims: &PolicyDims,
    heads: &Heads,
    locations: &BTreeMap<String, Location>,
    mode: WeightMode,
    options: GraphOptions,
) -> Result<Vec<u8>, GraphError> {
    let weights = match mode {
        WeightMode::Constants => WeightsAs::External {
            file: EXPERT_WEIGHTS,
            locations,
        },
        WeightMode::Inputs => WeightsAs::Inputs,
    };
    let mut builder = GraphBuilder::new("denoise", options.batch, expert_params(dims, heads), weights);
    let g = &mut builder;
    let contract = GraphContract::denoise(dims, heads, mode, options.batch);
    // the builder adds the weights
    let inputs: BTreeMap<&str, Value> = contract
        .inputs
        .iter()
        .map(|spec| (spec.name.as_str(), g.input(spec)))
        .collect();
    let input = |g: &GraphBuilder<'_>, name: &str| named(g, &inputs, name);
    let (x_t, time_emb) = (input(g, X_T)?, input(g, TIME_EMB)?);
    let prefix_mask = input(g, PREFIX_MASK)?;

    let (batch, width) = (g.rows(1), Dim::fixed(dims.expert.width));
    let tokens = Dim::fixed(dims.suffix_len());
    let suffix = suffix(g, dims, &x_t, &time_emb, inputs.get(STATE))?;
    let embs = suffix.tokens.clone();
    let condition = suffix.condition.clone();
    let (k, v) = (input(g, K)?, input(g, V)?);
    let expert = expert(g, dims, suffix, &prefix_mask, &k, &v)?;

    let out = g.reshape(&expert.tokens, &[batch, tokens, width])?;
    let actions = g.slice(&out, 1, dims.suffix_len() - dims.action_horizon, dims.action_horizon)?;
    let step = step(g, dims, heads, &inputs, &actions)?;
    let results = [
        Some(step.next),
        Some(step.mean),
        Some(step.velocity),
        step.std,
        step.value,
    ];
    for (spec, value) in contract.outputs.iter().zip(results.iter().flatten()) {
        g.output(spec, value)?;
    }
    if options.debug {
        g.scope("debug");
        let embs = g.reshape(&embs, &[batch, tokens, width])?;
        let ids = position_ids(g, &expert.positions)?;
        for (name, value) in [
            ("suffix_embs", &embs),
            ("suffix_out", &out),
            ("suffix_position_ids", &ids),
        ] {
            g.debug_output(name, value);
        }
        if let Some(condition) = condition {
            g.debug_output("adarms_cond", &condition);
        }
    }
    builder.finish()
}

/// Results of one denoise step.
pub(crate) struct Step {
    /// The next actions.
    pub(crate) next: Value,
    /// Mean of the next actions.
    pub(crate) mean: Value,
    /// Velocity.
    pub(crate) velocity: Value,
    /// Standard deviation of a policy with a noise head.
    pub(crate) std: Option<Value>,
    /// Value of a policy with a value head.
    pub(crate) value: Option<Value>,
}

/// Applies the output projection, the sampling step and the heads to `actions`, the action tokens after the last norm, `[batch,
/// horizon, width]` f32. `inputs` are the graph inputs by name.
pub(crate) fn step(
    g: &mut GraphBuilder<'_>,
    dims: &PolicyDims,
    heads: &Heads,
    inputs: &BTreeMap<&str, Value>,
    actions: &Value,
) -> Result<Step, GraphError> {
    let input = |g: &GraphBuilder<'_>, name: &str| named(g, inputs, name);
    let (batch, width) = (g.rows(1), Dim::fixed(dims.expert.width));
    let action_rows = g.rows(dims.action_horizon);
    let flat = g.reshape(actions, &[action_rows, width])?;
    let velocity = g.linear_named(&flat, "action_out_proj", true)?;
    let horizon = Dim::fixed(dims.action_horizon);
    let velocity = g.reshape(&velocity, &[batch, horizon, Dim::fixed(dims.action_dim)])?;

    g.scope("step");
    let (x_t, z) = (input(g, X_T)?, input(g, Z)?);
    let scaled = |g: &mut GraphBuilder<'_>, coefficient: &str, x: &Value| {
        let c = input(g, coefficient)?;
        let c = g.reshape(&c, &[batch, Dim::fixed(1), Dim::fixed(1)])?;
        g.mul(x, &c)
    };
    let from_x = scaled(g, C_X, &x_t)?;
    let from_v = scaled(g, C_V, &velocity)?;
    let (noise, std) = match &heads.noise {
        Some(head) => {
            let learnt = noise_std(g, dims, head, &flat)?;
            let std = scaled(g, STD, &learnt)?;
            (g.mul(&z, &std)?, Some(std))
        }
        None => (scaled(g, STD, &z)?, None),
    };
    let mean = g.add(&from_x, &from_v)?;
    let next = g.add(&mean, &noise)?;

    let mut estimate = None;
    if let Some(head) = &heads.value {
        let features = match head.input {
            CriticInput::Expert => {
                let read = match head.tokens {
                    Some(tokens) => g.slice(actions, 1, 0, tokens)?,
                    None => actions.clone(),
                };
                let mean = g.mean(&read, 1)?;
                g.reshape(&mean, &[batch, width])?
            }
            CriticInput::Vlm => input(g, POOLED)?,
        };
        let features = if head.state {
            let state = input(g, STATE)?;
            g.concat(&[&features, &state], 1)?
        } else {
            features
        };
        estimate = Some(value(g, head, &features)?);
    }
    Ok(Step {
        next,
        mean,
        velocity,
        std,
        value: estimate,
    })
}

/// Returns the graph input `name`.
pub(crate) fn named(g: &GraphBuilder<'_>, inputs: &BTreeMap<&str, Value>, name: &str) -> Result<Value, GraphError> {
    inputs
        .get(name)
        .cloned()
        .ok_or_else(|| g.refuse("inputs", format!("no input `{name}`")))
}

/// Returns the noise head's standard deviation, `[batch, horizon, action_dim]`, for the flat action tokens `[batch * horizon,
/// width]`: `exp(logvar / 2)`. `(tanh + 1) / 2` interpolates `logvar` between the ends of the range (piRL, Flow-Noise).
fn noise_std(
    g: &mut GraphBuilder<'_>,
    dims: &PolicyDims,
    head: &NoiseHeadDims,
    flat: &Value,
) -> Result<Value, GraphError> {
    g.scope("noise");
    let mut x = flat.clone();
    for layer in 0..=head.hidden.len() {
        x = g.linear_named(&x, &noise_layer(layer), true)?;
        x = g.tanh(&x)?;
    }
    let (low, high) = head.logvar_range();
    // half the log-variance: low / 2 + (high - low) / 4 (tanh + 1)
    let slope = g.scalar(((high - low) / 4.0) as f32)?;
    let offset = g.scalar((low / 2.0 + (high - low) / 4.0) as f32)?;
    let x = g.mul(&x, &slope)?;
    let x = g.add(&x, &offset)?;
    let x = g.exp(&x)?;
    let batch = g.rows(1);
    let std = g.reshape(
        &x,
        &[batch, Dim::fixed(dims.action_horizon), Dim::fixed(dims.action_dim)],
    )?;
    g.scope("step");
    Ok(std)
}

/// Returns the values `[batch]` of the value head for features `[batch, width]`: linear layers with ReLU between.
fn value(g: &mut GraphBuilder<'_>, head: &ValueHeadDims, features: &Value) -> Result<Value, GraphError> {
    g.scope("value");
    let mut x = features.clone();
    for layer in 0..=head.hidden.len() {
        x = g.linear_named(&x, &format!("value_head.mlp.{}", 2 * layer), true)?;
        if layer < head.hidden.len() {
            x = g.relu(&x)?;
        }
    }
    let batch = g.rows(1);
    g.reshape(&x, &[batch])
}
