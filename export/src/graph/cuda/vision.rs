//! The `SigLIP` image tower and the projector to the language model's width.

use policy::{cuda::CudaContract, derived::layer, element::ElementType};

use crate::{
    builder::{GraphBuilder, GraphError, Value},
    fused::HeadSizes,
    graph::{cuda::ports::as_type, siglip::EPS},
    shape::Dim,
};

/// Largest byte of a picture, halved: a byte divided by this is in `[0, 2]`.
const HALF_RANGE: f32 = 127.5;

/// Returns the tokens `[n, patches, vlm.width]` of `images`, bytes `[n, size, size, 3]`.
pub(crate) fn image_tokens(
    g: &mut GraphBuilder<'_>,
    contract: &CudaContract,
    images: &Value,
) -> Result<Value, GraphError> {
    let vision = &contract.dims.vision;
    let n = images.axis(0);
    let (patches, width) = (Dim::fixed(vision.tokens()), Dim::fixed(vision.width));

    g.scope("vision.embed");
    let rows = patch_rows(g, contract, images)?;
    let weight = g.weight("vision.patch.weight")?;
    let bias = g.weight("vision.patch.bias")?;
    let position = g.weight("vision.position")?;
    let tokens = g.product(&rows, &weight)?;
    let tokens = g.add(&tokens, &bias)?;
    let tokens = g.reshape(&tokens, &[n, patches, width])?;
    let mut x = g.add(&tokens, &position)?;

    // result of the last sub-layer, and its bias, which the next norm adds
    let mut pending: Option<(Value, Value)> = None;
    for l in 0..vision.depth {
        g.scope(&format!("vision.{l}"));
        let name = |weight: &str| layer("vision", l, weight);
        let normed = norm(g, &mut x, pending, &name("norm1"))?;
        let attended = attention(g, contract, &normed, l)?;
        let normed = norm(g, &mut x, Some(attended), &name("norm2"))?;
        let fc1 = g.weight(&name("fc1.weight"))?;
        let bias = g.weight(&name("fc1.bias"))?;
        let hidden = g.product(&normed, &fc1)?;
        let hidden = g.bias_gelu_tanh(&hidden, &bias)?;
        let fc2 = g.weight(&name("fc2.weight"))?;
        let bias = g.weight(&name("fc2.bias"))?;
        pending = Some((g.product(&hidden, &fc2)?, bias));
    }
    g.scope("vision.out");
    let last = norm(g, &mut x, pending, "vision.norm")?;
    g.linear_named(&last, "projector", true)
}

/// Returns the values of every patch in `[-1, 1]`, in the order channel, row, column: `[n * patches, 3 * patch * patch]`.
fn patch_rows(g: &mut GraphBuilder<'_>, contract: &CudaContract, images: &Value) -> Result<Value, GraphError> {
    let vision = &contract.dims.vision;
    let (n, side) = (images.axis(0), vision.image_size / vision.patch);
    let (grid, patch, channels) = (Dim::fixed(side), Dim::fixed(vision.patch), Dim::fixed(3));
    let apart = g.reshape(images, &[n, grid, patch, grid, patch, channels])?;
    let apart = g.transpose(&apart, &[0, 1, 3, 5, 2, 4])?;
    let flat = [n.times(side * side), Dim::fixed(3 * vision.patch * vision.patch)];
    let bytes = g.reshape(&apart, &flat)?;
    let values = g.cast(&bytes, ElementType::F32)?;
    // the same bits as `x / 255 * 2 - 1`: a factor of two changes no digits
    let half = g.scalar(HALF_RANGE)?;
    let values = g.div(&values, &half)?;
    let one = g.scalar(1.0)?;
    let values = g.sub(&values, &one)?;
    as_type(g, &values, contract.element)
}

/// Adds the pending result with its bias to `x`, and returns the layer norm.
fn norm(
    g: &mut GraphBuilder<'_>,
    x: &mut Value,
    pending: Option<(Value, Value)>,
    name: &str,
) -> Result<Value, GraphError> {
    let weight = g.weight(&format!("{name}.weight"))?;
    let offset = g.weight(&format!("{name}.bias"))?;
    let Some((result, bias)) = pending else {
        return g.layer_norm(x, &weight, &offset, EPS);
    };
    let both = g.skip_layer_norm(x, (&result, &bias), (&weight, &offset), EPS)?;
    *x = both.sum;
    Ok(both.normed)
}

/// Applies full attention among the patches of each image to `x` `[n, patches, width]`. Returns the result without the bias, and the
/// bias.
fn attention(
    g: &mut GraphBuilder<'_>,
    contract: &CudaContract,
    x: &Value,
    l: usize,
) -> Result<(Value, Value), GraphError> {
    let vision = &contract.dims.vision;
    let qkv = g.linear_named(x, &layer("vision", l, "qkv"), true)?;
    let parts = g.split(&qkv, 2, &[vision.width; 3])?;
    let [q, k, v] = <[Value; 3]>::try_from(parts)
        .map_err(|parts| g.refuse("Split", format!("{} parts, expected 3", parts.len())))?;
    let sizes = HeadSizes {
        heads: vision.heads,
        kv_heads: vision.heads,
        head_dim: vision.width / vision.heads,
    };
    let mixed = g.attention((&q, &k, &v), None, sizes)?;
    let weight = g.weight(&layer("vision", l, "out.weight"))?;
    let bias = g.weight(&layer("vision", l, "out.bias"))?;
    Ok((g.product(&mixed, &weight)?, bias))
}
