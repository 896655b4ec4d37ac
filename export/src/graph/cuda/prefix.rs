//! `prefix.onnx` and `prefix.N.onnx`: images and prompt of one row to keys and values, and the pooled prefix output.

use std::collections::BTreeMap;

use policy::{
    cuda::{CudaContract, LENGTH, keys, values},
    element::ElementType,
    graph::{IMAGES, POOLED, PROMPT},
    params::Pooling,
};

use crate::{
    builder::{GraphBuilder, GraphError, Value},
    graph::{
        cuda::{
            layers::{Kind, Layers, Norms, Tokens, head_sizes, tables},
            ports::{as_type, begin, end},
            vision::image_tokens,
        },
        denoise::named,
    },
    shape::Dim,
};

/// Returns the prefix graph for `cameras` present cameras as the bytes of an `.onnx` file.
///
/// # Errors
/// See [`GraphError`].
pub(crate) fn prefix_graph(contract: &CudaContract, cameras: usize) -> Result<Vec<u8>, GraphError> {
    let ports = contract.prefix(cameras);
    let (mut builder, inputs) = begin("prefix", 1, &ports);
    let g = &mut builder;
    let dims = &contract.dims;
    let count = contract.prefix_len(cameras);
    let (prefix, wide) = (Dim::fixed(count), Dim::fixed(dims.head_dim));
    let length = named(g, &inputs, LENGTH)?;
    let images = named(g, &inputs, IMAGES)?;
    let image = image_tokens(g, contract, &images)?;
    let embs = embed(g, contract, &image, &named(g, &inputs, PROMPT)?)?;

    let tables = tables(g, contract, count, &[1])?;
    let layers = Layers {
        dims,
        kind: Kind::Vlm,
        norms: Norms::Weights,
    };
    let (one, sizes) = (Dim::fixed(1), head_sizes(dims));
    let mut outputs = BTreeMap::new();
    let mut tokens = Tokens::new(embs);
    let mut last = None;
    for l in 0..dims.depth {
        let (qkv, sum) = layers.project(g, l, tokens)?;
        // four axes, so that keys and values are outputs without a copy
        let qkv = g.reshape(&qkv, &[one, one, prefix, qkv.axis(2)])?;
        let parts = g.split(&qkv, 3, &[dims.heads * dims.head_dim, dims.head_dim, dims.head_dim])?;
        let [q, k, v] = <[Value; 3]>::try_from(parts)
            .map_err(|parts| g.refuse("Split", format!("{} parts, expected 3", parts.len())))?;
        let k = g.rotate(&k, &tables, None, 1)?;
        outputs.insert(keys(l), k.clone());
        outputs.insert(values(l), v.clone());
        if l + 1 == dims.depth && !contract.pooled() {
            break;
        }
        let q = g.reshape(&q, &[one, prefix, q.axis(3)])?;
        let q = g.rotate(&q, &tables, None, dims.heads)?;
        let k = g.reshape(&k, &[one, prefix, wide])?;
        let v = g.reshape(&v, &[one, prefix, wide])?;
        let mixed = g.attention((&q, &k, &v), Some(&length), sizes)?;
        tokens = layers.complete(g, l, sum, &mixed)?;
        if l + 1 == dims.depth {
            last = Some(tokens);
            break;
        }
    }
    if let Some(tokens) = last {
        let out = layers.finish(g, tokens)?;
        outputs.insert(POOLED.to_owned(), pooled(g, contract, &out, &length)?);
    }
    end(builder, &ports, &outputs)
}

/// Returns the tokens of images and prompt, `[1, prefix_len, vlm.width]`.
fn embed(
    g: &mut GraphBuilder<'_>,
    contract: &CudaContract,
    image: &Value,
    prompt: &Value,
) -> Result<Value, GraphError> {
    g.scope("prefix.embed");
    let width = contract.dims.vlm.width;
    let count = image.axis(0).times(image.axis(1).count());
    let image = g.reshape(image, &[Dim::fixed(1), count, Dim::fixed(width)])?;
    let table = g.weight("embedding")?;
    let words = g.gather_rows(&table, prompt)?;
    let scale = g.constant_in(contract.element, &[], &[(width as f64).sqrt() as f32])?;
    let words = g.mul(&words, &scale)?;
    g.concat(&[&image, &words], 1)
}

/// Returns the pooled prefix output `[1, vlm.width]` in f32 for `out` `[1, prefix_len, vlm.width]`, of which `length` tokens are
/// valid.
fn pooled(g: &mut GraphBuilder<'_>, contract: &CudaContract, out: &Value, length: &Value) -> Result<Value, GraphError> {
    g.scope("prefix.pooled");
    let (one, width) = (Dim::fixed(1), Dim::fixed(contract.dims.vlm.width));
    if contract.heads.pooling() == Pooling::First {
        let first = g.slice(out, 1, 0, 1)?;
        let first = g.reshape(&first, &[one, width])?;
        return as_type(g, &first, ElementType::F32);
    }
    let out = as_type(g, out, ElementType::F32)?;
    let count = out.axis(1);
    let places: Vec<i64> = (0..count.count() as i64).collect();
    let places = g.integers(&places);
    let valid = g.less(&places, length)?;
    let weights = g.reshape(&valid, &[one, one, count])?;
    let total = g.matmul(&weights, &out)?;
    let total = g.reshape(&total, &[one, width])?;
    let number = g.cast(length, ElementType::F32)?;
    let least = g.scalar(1.0)?;
    let number = g.max(&number, &least)?;
    g.div(&total, &number)
}
