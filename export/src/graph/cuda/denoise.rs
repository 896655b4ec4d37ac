//! `denoise.onnx`: one denoise step over the buffers of keys and values, and the value.

use std::collections::BTreeMap;

use policy::{
    cuda::{CudaContract, MODULATION},
    dims::Variant,
    element::ElementType,
    graph::{MEAN, STEP_STD, TIME_EMB, VALUE, X_NEXT, X_T},
};

use crate::{
    builder::{GraphBuilder, GraphError, Value},
    graph::{
        cuda::{
            layers::{BufferAttention, Kind, Layers, NormWeights, Norms, Tokens, buffers},
            ports::{as_type, begin, end},
        },
        denoise::{named, step},
    },
    shape::Dim,
};

/// Most results of one split: above, the split reads a list of addresses from memory that is gone when a recorded run is repeated.
const MOST_PARTS: usize = 30;

/// Returns the denoise graph as the bytes of an `.onnx` file.
///
/// # Errors
/// See [`GraphError`].
pub(crate) fn denoise_graph(contract: &CudaContract) -> Result<Vec<u8>, GraphError> {
    let ports = contract.denoise();
    let (mut builder, inputs) = begin("denoise", contract.batch, &ports);
    let g = &mut builder;
    let dims = &contract.dims;
    let mut tokens = Tokens::new(action_tokens(g, contract, &inputs)?);
    let norms = match dims.variant {
        Variant::Pi0 => Norms::Weights,
        Variant::Pi05 => Norms::Computed(computed(g, contract, &named(g, &inputs, MODULATION)?)?),
    };
    let attention = BufferAttention::new(g, contract, &inputs, dims.action_horizon)?;
    let layers = Layers {
        dims,
        kind: Kind::Expert,
        norms,
    };
    let mut outputs = BTreeMap::new();
    for l in 0..dims.depth {
        let (qkv, sum) = layers.project(g, l, tokens)?;
        let buffers = buffers(g, &inputs, l)?;
        let mixed = attention.attend(g, dims, &qkv, (l, &buffers), false, &mut outputs)?;
        tokens = layers.complete(g, l, sum, &mixed)?;
    }
    let out = layers.finish(g, tokens)?;
    let out = as_type(g, &out, ElementType::F32)?;
    let step = step(g, dims, &contract.heads, &inputs, &out)?;
    let results = [
        (X_NEXT, Some(step.next)),
        (MEAN, Some(step.mean)),
        (STEP_STD, step.std),
        (VALUE, step.value),
    ];
    for (name, value) in results {
        outputs.extend(value.map(|value| (name.to_owned(), value)));
    }
    end(builder, &ports, &outputs)
}

/// Returns the action tokens, `[batch, action_horizon, expert.width]`; for pi0 with the flow time.
fn action_tokens(
    g: &mut GraphBuilder<'_>,
    contract: &CudaContract,
    inputs: &BTreeMap<&str, Value>,
) -> Result<Value, GraphError> {
    g.scope("suffix");
    let dims = &contract.dims;
    let rows = g.rows(dims.action_horizon);
    let x_t = named(g, inputs, X_T)?;
    let x = g.reshape(&x_t, &[rows, Dim::fixed(dims.action_dim)])?;
    let mut actions = g.linear_named(&x, "action_in_proj", true)?;
    if dims.variant == Variant::Pi0 {
        let time_emb = named(g, inputs, TIME_EMB)?;
        let for_action = g.weight("action_time_mlp_in.action")?;
        let for_time = g.weight("action_time_mlp_in.time")?;
        let bias = g.weight("action_time_mlp_in.bias")?;
        let action_part = g.product(&actions, &for_action)?;
        let time_part = g.product(&time_emb, &for_time)?;
        let time_part = g.add(&time_part, &bias)?;
        let mixed = g.add(&action_part, &time_part)?;
        let mixed = g.silu(&mixed)?;
        actions = g.linear_named(&mixed, "action_time_mlp_out", true)?;
    }
    let shape = [
        g.rows(1),
        Dim::fixed(dims.action_horizon),
        Dim::fixed(dims.expert.width),
    ];
    let tokens = g.reshape(&actions, &shape)?;
    as_type(g, &tokens, contract.element)
}

/// Returns the norms of all layers, and of the output, from `modulation` `[1, norms * 3 * width]`.
fn computed(
    g: &mut GraphBuilder<'_>,
    contract: &CudaContract,
    modulation: &Value,
) -> Result<Vec<NormWeights>, GraphError> {
    g.scope("expert.norms");
    let width = contract.dims.expert.width;
    let count = 3 * (2 * contract.dims.depth + 1);
    let flat = g.reshape(modulation, &[Dim::fixed(count * width)])?;
    let mut parts = Vec::new();
    for first in (0..count).step_by(MOST_PARTS) {
        let some = MOST_PARTS.min(count - first);
        let range = g.slice(&flat, 0, first * width, some * width)?;
        parts.extend(g.split(&range, 0, &vec![width; some])?);
    }
    let (norms, _) = parts.as_chunks::<3>();
    Ok(norms
        .iter()
        .map(|[scale, shift, gate]| NormWeights {
            scale: scale.clone(),
            shift: Some(shift.clone()),
            gate: Some(gate.clone()),
        })
        .collect())
}
