//! `state.onnx`: writes the keys and values of pi0's state token to the buffers, after the prefix. The state token reads no action
//! token, so that its keys and values are the same in all denoise steps.

use std::collections::BTreeMap;

use policy::{
    cuda::CudaContract,
    graph::{GraphContract, STATE},
};

use crate::{
    builder::GraphError,
    graph::{
        cuda::{
            layers::{BufferAttention, Kind, Layers, Norms, Tokens, buffers},
            ports::{as_type, begin, end},
        },
        denoise::named,
    },
    shape::Dim,
};

/// Returns the state graph as the bytes of an `.onnx` file.
///
/// # Errors
/// See [`GraphError`].
pub(crate) fn state_graph(contract: &CudaContract, ports: &GraphContract) -> Result<Vec<u8>, GraphError> {
    let (mut builder, inputs) = begin("state", contract.batch, ports);
    let g = &mut builder;
    let dims = &contract.dims;
    g.scope("state");
    let state = named(g, &inputs, STATE)?;
    let token = g.linear_named(&state, "state_proj", true)?;
    let token = g.reshape(&token, &[g.rows(1), Dim::fixed(1), Dim::fixed(dims.expert.width)])?;
    let token = as_type(g, &token, contract.element)?;

    let attention = BufferAttention::new(g, contract, &inputs, 1)?;
    let layers = Layers {
        dims,
        kind: Kind::Expert,
        norms: Norms::Weights,
    };
    let mut outputs = BTreeMap::new();
    let mut tokens = Tokens::new(token);
    for l in 0..dims.depth {
        let (qkv, sum) = layers.project(g, l, tokens)?;
        let buffers = buffers(g, &inputs, l)?;
        let mixed = attention.attend(g, dims, &qkv, (l, &buffers), true, &mut outputs)?;
        if l + 1 == dims.depth {
            // the keys and values of the last layer are written
            break;
        }
        tokens = layers.complete(g, l, sum, &mixed)?;
    }
    end(builder, ports, &outputs)
}
