//! `prefix.onnx`: images and prompt to the key-value cache, the prefix mask and the pooled prefix output.

use std::collections::BTreeMap;

use policy::{
    bundle::VLM_WEIGHTS,
    dims::PolicyDims,
    element::ElementType,
    graph::GraphContract,
    params::{EMBEDDING, Pooling, VLM, vlm_params},
    weights::Location,
};

use crate::{
    builder::{GraphBuilder, GraphError, Value, WeightsAs},
    graph::{
        GraphOptions,
        gemma::{Norm, Stack, bias_of, grouped_bias, position_ids, rotary},
        siglip::{ImageTokens, image_tokens},
    },
    shape::Dim,
};

/// Returns the prefix graph as the bytes of an `.onnx` file; the weights are at `locations` in `vlm.safetensors` in the same
/// folder.
///
/// `pooling` selects the output `pooled`. Inputs and outputs are those of [`GraphContract::prefix`]. Debug outputs are
/// `patch_pos_emb.N`, `vision_hidden.N` and `vision_projected.N` per camera `N`, `prefix_embs`, `prefix_out`, `position_ids`.
///
/// # Errors
/// A location is missing or has a wrong shape; see [`GraphError`].
pub fn prefix_graph(
    dims: &PolicyDims,
    pooling: Pooling,
    locations: &BTreeMap<String, Location>,
    options: GraphOptions,
) -> Result<Vec<u8>, GraphError> {
    let weights = WeightsAs::External {
        file: VLM_WEIGHTS,
        locations,
    };
    let mut builder = GraphBuilder::new("prefix", options.batch, vlm_params(dims), weights);
    let g = &mut builder;
    let contract = GraphContract::prefix(dims, options.batch);
    let inputs: Vec<Value> = contract.inputs.iter().map(|spec| g.input(spec)).collect();
    let [images, image_mask, prompt, prompt_mask] = <[Value; 4]>::try_from(inputs)
        .map_err(|found| g.refuse("inputs", format!("{} inputs, expected 4", found.len())))?;

    let side = Dim::fixed(dims.vision.image_size);
    let (batch, image_rows) = (g.rows(1), g.rows(dims.cameras));
    let (prefix, width) = (Dim::fixed(dims.prefix_len()), Dim::fixed(dims.vlm.width));
    let flat_images = g.reshape(&images, &[image_rows, Dim::fixed(3), side, side])?;
    let image = image_tokens(g, dims, &flat_images)?;

    g.scope("prefix.embed");
    let image_len = dims.cameras * dims.vision.tokens();
    let image_part = g.reshape(&image.projected, &[batch, Dim::fixed(image_len), width])?;
    let table = g.weight(EMBEDDING)?;
    let words = g.gather_rows(&table, &prompt)?;
    let scale = g.scalar((dims.vlm.width as f64).sqrt() as f32)?;
    let words = g.mul(&words, &scale)?;
    let embs = g.concat(&[&image_part, &words], 1)?;

    g.scope("prefix.mask");
    let per_camera = g.reshape(&image_mask, &[batch, Dim::fixed(dims.cameras), Dim::fixed(1)])?;
    let per_token = g.expand(
        &per_camera,
        &[batch, Dim::fixed(dims.cameras), Dim::fixed(dims.vision.tokens())],
    )?;
    let per_token = g.reshape(&per_token, &[batch, Dim::fixed(image_len)])?;
    let mask = g.concat(&[&per_token, &prompt_mask], 1)?;
    let valid = g.cast(&mask, ElementType::F32)?;
    let ordinal = g.cumsum(&valid, 1)?;
    let one = g.scalar(1.0)?;
    let positions = g.sub(&ordinal, &one)?;
    let as_query = g.reshape(&mask, &[batch, prefix, Dim::fixed(1)])?;
    let as_key = g.reshape(&mask, &[batch, Dim::fixed(1), prefix])?;
    let pairs = g.and(&as_query, &as_key)?;
    let bias = bias_of(g, &pairs)?;
    let bias = grouped_bias(g, dims, &bias, dims.prefix_len())?;
    let rotary = rotary(g, dims, &positions, dims.prefix_len())?;

    let stack = Stack {
        dims,
        width: dims.vlm.width,
        tokens: dims.prefix_len(),
        norm: Norm::Weight,
        rotary,
        bias,
    };
    let rows = g.rows(dims.prefix_len());
    let mut x = g.reshape(&embs, &[rows, width])?;
    let (mut keys, mut values) = (Vec::new(), Vec::new());
    let entry = [
        batch,
        Dim::fixed(1),
        Dim::fixed(dims.kv_heads),
        prefix,
        Dim::fixed(dims.head_dim),
    ];
    for l in 0..dims.depth {
        g.scope(&format!("prefix.{l}"));
        let (next, cache) = stack.layer(g, &format!("{VLM}language_model.layers.{l}"), &x, None)?;
        keys.push(g.reshape(&cache.k, &entry)?);
        values.push(g.reshape(&cache.v, &entry)?);
        x = next;
    }
    g.scope("prefix.out");
    let k = g.concat(&keys.iter().collect::<Vec<_>>(), 1)?;
    let v = g.concat(&values.iter().collect::<Vec<_>>(), 1)?;
    let out = stack.final_norm(g, &x, &format!("{VLM}language_model.norm"))?;
    let out = g.reshape(&out, &[batch, prefix, width])?;
    let slot = |g: &mut GraphBuilder<'_>, index: usize| {
        let one = g.slice(&out, 1, index, 1)?;
        g.reshape(&one, &[batch, width])
    };
    let pooled = match pooling {
        Pooling::Mean => {
            let weights = g.reshape(&valid, &[batch, Dim::fixed(1), prefix])?;
            let total = g.matmul(&weights, &out)?;
            let total = g.reshape(&total, &[batch, width])?;
            let count = g.sum(&valid, 1)?;
            let count = g.max(&count, &one)?;
            g.div(&total, &count)?
        }
        Pooling::First => slot(g, 0)?,
        Pooling::Last => slot(g, dims.prefix_len() - 1)?,
        Pooling::MeanPadded => {
            let mean = g.mean(&out, 1)?;
            g.reshape(&mean, &[batch, width])?
        }
    };

    for (spec, value) in contract.outputs.iter().zip([&k, &v, &mask, &pooled]) {
        g.output(spec, value)?;
    }
    if options.debug {
        per_camera_outputs(g, dims, &image)?;
        let ids = position_ids(g, &positions)?;
        for (name, value) in [("prefix_embs", &embs), ("prefix_out", &out), ("position_ids", &ids)] {
            g.debug_output(name, value);
        }
    }
    builder.finish()
}

fn per_camera_outputs(g: &mut GraphBuilder<'_>, dims: &PolicyDims, image: &ImageTokens) -> Result<(), GraphError> {
    g.scope("debug");
    let (batch, tokens) = (g.rows(1), Dim::fixed(dims.vision.tokens()));
    for (name, value) in [
        ("patch_pos_emb", &image.embedded),
        ("vision_hidden", &image.hidden),
        ("vision_projected", &image.projected),
    ] {
        let width = value.axis(2);
        let all = g.reshape(value, &[batch, Dim::fixed(dims.cameras), tokens, width])?;
        for camera in 0..dims.cameras {
            let one = g.slice(&all, 1, camera, 1)?;
            let one = g.reshape(&one, &[batch, tokens, width])?;
            g.debug_output(&format!("{name}.{camera}"), &one);
        }
    }
    Ok(())
}
