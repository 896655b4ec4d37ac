//! `condition.onnx`: factor, shift and gate of pi0.5's norms for all denoise steps.

use std::collections::BTreeMap;

use policy::{
    cuda::{CudaContract, MODULATION},
    graph::{GraphContract, TIME_EMB},
};

use crate::{
    builder::GraphError,
    graph::{
        cuda::ports::{as_type, begin, end},
        denoise::named,
        expert::time_condition,
    },
    shape::Dim,
};

/// Returns the condition graph as the bytes of an `.onnx` file.
///
/// # Errors
/// See [`GraphError`].
pub(crate) fn condition_graph(contract: &CudaContract, ports: &GraphContract) -> Result<Vec<u8>, GraphError> {
    let (mut builder, inputs) = begin("condition", contract.num_steps, ports);
    let g = &mut builder;
    g.scope("condition");
    let time_emb = named(g, &inputs, TIME_EMB)?;
    let condition = time_condition(g, &time_emb)?;
    let all = g.linear_named(&condition, "modulation", true)?;
    let norms = 2 * contract.dims.depth + 1;
    let (steps, width) = (g.rows(1), Dim::fixed(contract.dims.expert.width));
    let apart = g.reshape(&all, &[steps, Dim::fixed(norms), Dim::fixed(3), width])?;
    // scale, shift, gate: the factor is `1 + scale`
    let offset = g.constant(&[3, 1], &[1.0, 0.0, 0.0])?;
    let apart = g.add(&apart, &offset)?;
    let all = g.reshape(&apart, all.shape())?;
    let modulation = as_type(g, &all, contract.element)?;
    end(builder, ports, &BTreeMap::from([(MODULATION.to_owned(), modulation)]))
}
