//! `denoise.onnx`: one denoise step over the cached prefix, and the value.

use std::collections::BTreeMap;

use policy::{
    bundle::EXPERT_WEIGHTS,
    config::WeightMode,
    dims::PolicyDims,
    params::{CriticInput, ValueHeadDims},
    weights::Location,
};

use crate::{
    builder::{GraphBuilder, GraphError, Value, WeightsAs},
    graph::{
        GraphOptions,
        expert::{expert, suffix},
        gemma::position_ids,
        prefix::debug_output,
    },
    shape::Dim,
    signature::{denoise_signature, expert_params},
};

/// The denoise graph as the bytes of an `.onnx` file. In mode `constants` its weights lie at `locations` of
/// `expert.safetensors` beside it; in mode `inputs` they are graph inputs and `locations` is not read.
///
/// Inputs and outputs are those of [`denoise_signature`]; debug outputs are `suffix_embs`, `suffix_out`, `adarms_cond`
/// (pi0.5), `suffix_position_ids`.
///
/// # Errors
/// A location is missing or has another shape; see [`GraphError`].
pub fn denoise_graph(
    dims: &PolicyDims,
    value_head: Option<&ValueHeadDims>,
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
    let mut builder = GraphBuilder::new("denoise", options.batch, expert_params(dims, value_head), weights);
    let g = &mut builder;
    let signature = denoise_signature(dims, value_head, mode, options.batch);
    // the weights' ports are added by the builder
    let plain = denoise_signature(dims, value_head, WeightMode::Constants, options.batch).inputs;
    let inputs: BTreeMap<String, Value> = plain.iter().map(|port| (port.name.clone(), g.input(port))).collect();
    let input = |g: &GraphBuilder<'_>, name: &str| {
        inputs
            .get(name)
            .cloned()
            .ok_or_else(|| g.refuse("inputs", format!("no input `{name}`")))
    };
    let (x_t, time_emb) = (input(g, "x_t")?, input(g, "time_emb")?);
    let prefix_mask = input(g, "prefix_mask")?;

    let (batch, width) = (g.rows(1), Dim::fixed(dims.expert.width));
    let (horizon, tokens) = (Dim::fixed(dims.action_horizon), Dim::fixed(dims.suffix_len()));
    let suffix = suffix(g, dims, &x_t, &time_emb, inputs.get("state"))?;
    let embs = suffix.tokens.clone();
    let condition = suffix.condition.clone();
    let (k, v) = (input(g, "k")?, input(g, "v")?);
    let expert = expert(g, dims, suffix, &prefix_mask, &k, &v)?;

    let out = g.reshape(&expert.tokens, &[batch, tokens, width])?;
    let actions = g.slice(&out, 1, dims.suffix_len() - dims.action_horizon, dims.action_horizon)?;
    let action_rows = g.rows(dims.action_horizon);
    let flat = g.reshape(&actions, &[action_rows, width])?;
    let velocity = g.linear_named(&flat, "action_out_proj", true)?;
    let velocity = g.reshape(&velocity, &[batch, horizon, Dim::fixed(dims.action_dim)])?;

    g.scope("step");
    let z = input(g, "z")?;
    let mut scaled = |coefficient: &str, x: &Value| {
        let c = input(g, coefficient)?;
        let c = g.reshape(&c, &[batch, Dim::fixed(1), Dim::fixed(1)])?;
        g.mul(x, &c)
    };
    let from_x = scaled("c_x", &x_t)?;
    let from_v = scaled("c_v", &velocity)?;
    let noise = scaled("std", &z)?;
    let mean = g.add(&from_x, &from_v)?;
    let next = g.add(&mean, &noise)?;

    let mut results = vec![next, mean, velocity];
    if let Some(head) = value_head {
        let features = match head.input {
            CriticInput::Expert => {
                let mean = g.mean(&actions, 1)?;
                g.reshape(&mean, &[batch, width])?
            }
            CriticInput::Vlm => input(g, "pooled")?,
        };
        let features = if head.state {
            let state = input(g, "state")?;
            g.concat(&[&features, &state], 1)?
        } else {
            features
        };
        results.push(value(g, head, &features)?);
    }
    for (port, value) in signature.outputs.iter().zip(&results) {
        g.output(port, value)?;
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
            debug_output(g, name, value)?;
        }
        if let Some(condition) = condition {
            debug_output(g, "adarms_cond", &condition)?;
        }
    }
    builder.finish()
}

/// The value head on `[batch, width]` features: ReLU between, one number out; `[batch]`.
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
