//! The `SigLIP` image tower and the projector to the language model's width.

use policy::{dims::PolicyDims, params::VLM};

use crate::{
    builder::{GraphBuilder, GraphError, Value},
    shape::Dim,
};

/// Added to the variance in a norm.
pub(crate) const EPS: f32 = 1e-6;

/// Results of the tower for `n` images with `N` patches each.
pub(crate) struct ImageTokens {
    /// Patch embedding plus position embedding, `[n, N, vision.width]`.
    pub(crate) embedded: Value,
    /// Tokens after the last layer norm, `[n, N, vision.width]`.
    pub(crate) hidden: Value,
    /// Tokens with the language model's width, `[n, N, vlm.width]`.
    pub(crate) projected: Value,
}

/// Returns the tokens of `images` `[n, 3, size, size]`.
pub(crate) fn image_tokens(
    g: &mut GraphBuilder<'_>,
    dims: &PolicyDims,
    images: &Value,
) -> Result<ImageTokens, GraphError> {
    let vision = &dims.vision;
    let (patches, width) = (Dim::fixed(vision.tokens()), Dim::fixed(vision.width));
    let n = images.axis(0);
    let rows = n.times(vision.tokens());
    let tower = format!("{VLM}vision_tower.vision_model");

    g.scope("vision.embed");
    let kernel = g.weight(&format!("{tower}.embeddings.patch_embedding.weight"))?;
    let bias = g.weight(&format!("{tower}.embeddings.patch_embedding.bias"))?;
    let position = g.weight(&format!("{tower}.embeddings.position_embedding.weight"))?;
    let grid = g.patchify(images, &kernel, &bias)?;
    let grid = g.reshape(&grid, &[n, width, patches])?;
    let tokens = g.transpose_last(&grid)?;
    let embedded = g.add(&tokens, &position)?;
    let mut x = g.reshape(&embedded, &[rows, width])?;

    for l in 0..vision.depth {
        g.scope(&format!("vision.{l}"));
        let layer = format!("{tower}.encoder.layers.{l}");
        let normed = norm(g, &x, &format!("{layer}.layer_norm1"))?;
        let attended = attention(g, dims, &normed, &format!("{layer}.self_attn"), n)?;
        x = g.add(&x, &attended)?;
        let normed = norm(g, &x, &format!("{layer}.layer_norm2"))?;
        let hidden = g.linear_named(&normed, &format!("{layer}.mlp.fc1"), true)?;
        let hidden = g.gelu_tanh(&hidden)?;
        let hidden = g.linear_named(&hidden, &format!("{layer}.mlp.fc2"), true)?;
        x = g.add(&x, &hidden)?;
    }
    g.scope("vision.out");
    let last = norm(g, &x, &format!("{tower}.post_layernorm"))?;
    let projected = g.linear_named(&last, &format!("{VLM}multi_modal_projector.linear"), true)?;
    Ok(ImageTokens {
        embedded,
        hidden: g.reshape(&last, &[n, patches, width])?,
        projected: g.reshape(&projected, &[n, patches, Dim::fixed(dims.vlm.width)])?,
    })
}

fn norm(g: &mut GraphBuilder<'_>, x: &Value, name: &str) -> Result<Value, GraphError> {
    let weight = g.weight(&format!("{name}.weight"))?;
    let bias = g.weight(&format!("{name}.bias"))?;
    g.layer_norm(x, &weight, &bias, EPS)
}

/// Applies full attention among the patches of each image; `x` is `[n * N, width]`.
fn attention(g: &mut GraphBuilder<'_>, dims: &PolicyDims, x: &Value, name: &str, n: Dim) -> Result<Value, GraphError> {
    let vision = &dims.vision;
    let head_dim = vision.width / vision.heads;
    let split = [
        n,
        Dim::fixed(vision.tokens()),
        Dim::fixed(vision.heads),
        Dim::fixed(head_dim),
    ];
    let mut heads = |proj: &str, order: [usize; 4]| {
        let flat = g.linear_named(x, &format!("{name}.{proj}"), true)?;
        let flat = g.reshape(&flat, &split)?;
        g.transpose(&flat, &order)
    };
    let q = heads("q_proj", [0, 2, 1, 3])?;
    let k = heads("k_proj", [0, 2, 3, 1])?;
    let v = heads("v_proj", [0, 2, 1, 3])?;
    let scores = g.matmul(&q, &k)?;
    let scale = g.scalar((1.0 / (head_dim as f64).sqrt()) as f32)?;
    let scores = g.mul(&scores, &scale)?;
    let weights = g.softmax(&scores)?;
    let mixed = g.matmul(&weights, &v)?;
    let mixed = g.transpose(&mixed, &[0, 2, 1, 3])?;
    let mixed = g.reshape(&mixed, &[n.times(vision.tokens()), Dim::fixed(vision.width)])?;
    g.linear_named(&mixed, &format!("{name}.out_proj"), true)
}
