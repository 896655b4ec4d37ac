//! A Gemma layer for both stacks: RMSNorm or adaRMS, rotary positions, grouped-query attention, gated MLP.

use policy::{dims::PolicyDims, element::ElementType};

use crate::{
    builder::{GraphBuilder, GraphError, Value},
    shape::Dim,
};

/// Added to the mean square in a norm.
pub(crate) const EPS: f32 = 1e-6;
const ROPE_THETA: f64 = 10_000.0;
/// Bias added to the score of a forbidden pair. The bias is finite: a row without an allowed key has uniform attention over all
/// keys.
pub(crate) const FORBIDDEN: f32 = -2.381_976_3e38;

/// Returns the angle per position of the pair `j` of a head.
fn frequency(j: usize, head_dim: usize) -> f32 {
    ROPE_THETA.powf(-2.0 * j as f64 / head_dim as f64) as f32
}

/// Returns the angle of the pair `j` of a head at a position.
pub(crate) fn rotary_angle(position: usize, j: usize, head_dim: usize) -> f32 {
    position as f32 * frequency(j, head_dim)
}

/// Cosines and signed sines, for queries (multiplied by the attention scale) and for keys.
pub(crate) struct Rotary {
    query: (Value, Value),
    key: (Value, Value),
}

/// Returns the tables for `positions` `[batch, tokens]` f32: `[batch * tokens, heads, head_dim]`, built once per graph.
///
/// With `swap(x)` for the exchanged halves of a head, rotation is `x cos + swap(x) sin`, where the sine of the first half is
/// negative. The tables have all heads, so that the products in every layer read contiguous memory.
pub(crate) fn rotary(
    g: &mut GraphBuilder<'_>,
    dims: &PolicyDims,
    positions: &Value,
    tokens: usize,
) -> Result<Rotary, GraphError> {
    let head_dim = dims.head_dim;
    let half = head_dim / 2;
    let frequency = |j: usize| frequency(j, head_dim);
    let signed: Vec<f32> = (0..half)
        .map(|j| -frequency(j))
        .chain((0..half).map(frequency))
        .collect();
    let signed = g.constant(&[head_dim], &signed)?;
    let rows = g.rows(tokens);
    let column = g.reshape(positions, &[rows, Dim::fixed(1), Dim::fixed(1)])?;
    let angles = g.mul(&column, &signed)?;
    let cos = g.cos(&angles)?;
    let sin = g.sin(&angles)?;
    let scale = g.scalar((1.0 / (head_dim as f64).sqrt()) as f32)?;
    let mut tables = |heads: usize, scale: Option<&Value>| {
        let mut table = |base: &Value| {
            let base = scale.map_or_else(|| Ok(base.clone()), |s| g.mul(base, s))?;
            g.expand(&base, &[rows, Dim::fixed(heads), Dim::fixed(head_dim)])
        };
        Ok::<_, GraphError>((table(&cos)?, table(&sin)?))
    };
    Ok(Rotary {
        query: tables(dims.heads, Some(&scale))?,
        key: tables(dims.kv_heads, None)?,
    })
}

/// Rotates `x` `[rows, heads * head_dim]`; returns `[rows, heads, head_dim]`.
fn rotate(g: &mut GraphBuilder<'_>, x: &Value, table: &(Value, Value)) -> Result<Value, GraphError> {
    let half = table.0.axis(2).count() / 2;
    let x = g.reshape(x, table.0.shape())?;
    let halves = g.split(&x, 2, &[half, half])?;
    let swapped: Vec<&Value> = halves.iter().rev().collect();
    let swapped = g.concat(&swapped, 2)?;
    let cos = g.mul(&x, &table.0)?;
    let sin = g.mul(&swapped, &table.1)?;
    g.add(&cos, &sin)
}

/// Kind of a stack's norms.
pub(crate) enum Norm {
    /// RMSNorm with a separate weight, applied as `1 + w`.
    Weight,
    /// adaRMS: scale, shift and gate from the condition `[batch, width]`.
    Adaptive(Value),
}

/// Result of a norm: the tokens, and for adaRMS the gate `[batch, 1, width]` of the sub-layer's output.
struct Normed {
    tokens: Value,
    gate: Option<Value>,
}

/// Constants of one stack during the build of its layers.
pub(crate) struct Stack<'d> {
    /// Sizes of the policy.
    pub(crate) dims: &'d PolicyDims,
    /// Token width.
    pub(crate) width: usize,
    /// Tokens per sample.
    pub(crate) tokens: usize,
    /// Kind of the norms of every layer and of the output.
    pub(crate) norm: Norm,
    /// Rotary tables.
    pub(crate) rotary: Rotary,
    /// Score bias, `[batch, tokens * group, keys]` with one kv head, otherwise `[batch, 1, tokens * group, keys]`.
    pub(crate) bias: Value,
}

/// Keys and values of one layer: `[batch, tokens, head_dim]` with one kv head, otherwise `[batch, kv_heads, tokens, head_dim]`.
pub(crate) struct Cache {
    /// Keys after rotation.
    pub(crate) k: Value,
    /// Values.
    pub(crate) v: Value,
}

/// Returns the axes of keys or values with `tokens` entries, in the layout of [`Cache`].
pub(crate) fn cache_shape(g: &GraphBuilder<'_>, dims: &PolicyDims, tokens: usize) -> Vec<Dim> {
    if dims.kv_heads == 1 {
        vec![g.rows(1), Dim::fixed(tokens), Dim::fixed(dims.head_dim)]
    } else {
        vec![
            g.rows(1),
            Dim::fixed(dims.kv_heads),
            Dim::fixed(tokens),
            Dim::fixed(dims.head_dim),
        ]
    }
}

/// Repeats a bias `[batch, tokens, keys]` (or 1 in the middle) for the query heads of a group, in the layout of [`Stack::bias`].
pub(crate) fn grouped_bias(
    g: &mut GraphBuilder<'_>,
    dims: &PolicyDims,
    bias: &Value,
    tokens: usize,
) -> Result<Value, GraphError> {
    let group = dims.heads / dims.kv_heads;
    let (rows, keys) = (g.rows(1), bias.axis(2));
    let bias = g.reshape(bias, &[rows, bias.axis(1), Dim::fixed(1), keys])?;
    let bias = g.expand(&bias, &[rows, Dim::fixed(tokens), Dim::fixed(group), keys])?;
    let flat = Dim::fixed(tokens * group);
    if dims.kv_heads == 1 {
        g.reshape(&bias, &[rows, flat, keys])
    } else {
        g.reshape(&bias, &[rows, Dim::fixed(1), flat, keys])
    }
}

/// Returns `0` where `allowed`, otherwise [`FORBIDDEN`].
pub(crate) fn bias_of(g: &mut GraphBuilder<'_>, allowed: &Value) -> Result<Value, GraphError> {
    let zero = g.scalar(0.0)?;
    let forbidden = g.scalar(FORBIDDEN)?;
    g.choose(allowed, &zero, &forbidden)
}

impl Stack<'_> {
    fn rows(&self, g: &GraphBuilder<'_>) -> Dim {
        g.rows(self.tokens)
    }

    fn norm(&self, g: &mut GraphBuilder<'_>, x: &Value, name: &str) -> Result<Normed, GraphError> {
        match &self.norm {
            Norm::Weight => {
                let weight = g.weight(&format!("{name}.weight"))?;
                let one = g.scalar(1.0)?;
                let scale = g.add(&weight, &one)?;
                if g.weights_are_inputs() {
                    // a constant scale lets the runtime fuse the norm; the weight follows as a separate product
                    let normed = self.plain_norm(g, x)?;
                    return Ok(Normed {
                        tokens: g.mul(&normed, &scale)?,
                        gate: None,
                    });
                }
                Ok(Normed {
                    tokens: g.rms_norm(x, &scale, EPS)?,
                    gate: None,
                })
            }
            Norm::Adaptive(condition) => {
                let (batch, width) = (g.rows(1), Dim::fixed(self.width));
                let modulation = g.linear_named(condition, &format!("{name}.dense"), true)?;
                let modulation = g.reshape(&modulation, &[batch, Dim::fixed(3), width])?;
                let parts = g.split(&modulation, 1, &[1, 1, 1])?;
                let [scale, shift, gate] = <[Value; 3]>::try_from(parts)
                    .map_err(|parts| g.refuse("Split", format!("{} parts, expected 3", parts.len())))?;
                let one = g.scalar(1.0)?;
                let scale = g.add(&scale, &one)?;
                let normed = self.plain_norm(g, x)?;
                let normed = g.reshape(&normed, &[batch, Dim::fixed(self.tokens), width])?;
                let scaled = g.mul(&normed, &scale)?;
                let shifted = g.add(&scaled, &shift)?;
                let rows = self.rows(g);
                Ok(Normed {
                    tokens: g.reshape(&shifted, &[rows, width])?,
                    gate: Some(gate),
                })
            }
        }
    }

    fn plain_norm(&self, g: &mut GraphBuilder<'_>, x: &Value) -> Result<Value, GraphError> {
        let ones = g.constant(&[self.width], &vec![1.0; self.width])?;
        g.rms_norm(x, &ones, EPS)
    }

    /// Returns `x + gate * y`, or `x + y` without a gate.
    fn residual(
        &self,
        g: &mut GraphBuilder<'_>,
        x: &Value,
        y: &Value,
        gate: Option<&Value>,
    ) -> Result<Value, GraphError> {
        let Some(gate) = gate else { return g.add(x, y) };
        let width = Dim::fixed(self.width);
        let (batch, rows) = (g.rows(1), self.rows(g));
        let y = g.reshape(y, &[batch, Dim::fixed(self.tokens), width])?;
        let gated = g.mul(&y, gate)?;
        let gated = g.reshape(&gated, &[rows, width])?;
        g.add(x, &gated)
    }

    /// Applies the stack's last norm to `[rows, width]`, without a gate.
    pub(crate) fn final_norm(&self, g: &mut GraphBuilder<'_>, x: &Value, name: &str) -> Result<Value, GraphError> {
        Ok(self.norm(g, x, name)?.tokens)
    }

    /// Applies one layer to `x` `[rows, width]`; `past` has the keys and values before this stack's own. Returns the new tokens,
    /// and the layer's own keys and values.
    pub(crate) fn layer(
        &self,
        g: &mut GraphBuilder<'_>,
        name: &str,
        x: &Value,
        past: Option<&Cache>,
    ) -> Result<(Value, Cache), GraphError> {
        let normed = self.norm(g, x, &format!("{name}.input_layernorm"))?;
        let q = g.linear_named(&normed.tokens, &format!("{name}.self_attn.q_proj"), false)?;
        let k = g.linear_named(&normed.tokens, &format!("{name}.self_attn.k_proj"), false)?;
        let v = g.linear_named(&normed.tokens, &format!("{name}.self_attn.v_proj"), false)?;
        let q = rotate(g, &q, &self.rotary.query)?;
        let k = rotate(g, &k, &self.rotary.key)?;
        let own = Cache {
            k: self.to_cache(g, &k)?,
            v: self.to_cache(g, &v)?,
        };
        let mixed = match past {
            Some(past) => {
                let axis = own.k.shape().len() - 2;
                let k = g.concat(&[&past.k, &own.k], axis)?;
                let v = g.concat(&[&past.v, &own.v], axis)?;
                self.attend(g, &q, &Cache { k, v })?
            }
            None => self.attend(g, &q, &own)?,
        };
        let attended = g.linear_named(&mixed, &format!("{name}.self_attn.o_proj"), false)?;
        let x = self.residual(g, x, &attended, normed.gate.as_ref())?;

        let normed = self.norm(g, &x, &format!("{name}.post_attention_layernorm"))?;
        let gate = g.linear_named(&normed.tokens, &format!("{name}.mlp.gate_proj"), false)?;
        let gate = g.gelu_tanh(&gate)?;
        let up = g.linear_named(&normed.tokens, &format!("{name}.mlp.up_proj"), false)?;
        let hidden = g.mul(&gate, &up)?;
        let down = g.linear_named(&hidden, &format!("{name}.mlp.down_proj"), false)?;
        Ok((self.residual(g, &x, &down, normed.gate.as_ref())?, own))
    }

    /// Converts `[rows, kv_heads * head_dim]` (or `[rows, kv_heads, head_dim]`) to the layout of [`Cache`].
    fn to_cache(&self, g: &mut GraphBuilder<'_>, x: &Value) -> Result<Value, GraphError> {
        let dims = self.dims;
        if dims.kv_heads == 1 {
            let shape = cache_shape(g, dims, self.tokens);
            return g.reshape(x, &shape);
        }
        let apart = [
            g.rows(1),
            Dim::fixed(self.tokens),
            Dim::fixed(dims.kv_heads),
            Dim::fixed(dims.head_dim),
        ];
        let x = g.reshape(x, &apart)?;
        g.transpose(&x, &[0, 2, 1, 3])
    }

    /// Applies grouped-query attention to `q` `[rows, heads, head_dim]`, rotated and scaled. Returns `[rows, heads * head_dim]`.
    ///
    /// The queries of a group are rows of one product. With one kv head this is the natural layout, without a transposition.
    fn attend(&self, g: &mut GraphBuilder<'_>, q: &Value, cache: &Cache) -> Result<Value, GraphError> {
        let dims = self.dims;
        let (batch, rows) = (g.rows(1), self.rows(g));
        let (kv, tokens, head_dim) = (dims.kv_heads, self.tokens, dims.head_dim);
        let group = dims.heads / kv;
        let flat = Dim::fixed(tokens * group);
        let (kv_axis, width) = (Dim::fixed(kv), Dim::fixed(group * head_dim));
        let q = if kv == 1 {
            g.reshape(q, &[batch, flat, Dim::fixed(head_dim)])?
        } else {
            let q = g.reshape(q, &[batch, Dim::fixed(tokens), kv_axis, width])?;
            let q = g.transpose(&q, &[0, 2, 1, 3])?;
            g.reshape(&q, &[batch, kv_axis, flat, Dim::fixed(head_dim)])?
        };
        let keys = g.transpose_last(&cache.k)?;
        let scores = g.matmul(&q, &keys)?;
        let scores = g.add(&scores, &self.bias)?;
        let weights = g.softmax(&scores)?;
        let mut mixed = g.matmul(&weights, &cache.v)?;
        if kv > 1 {
            mixed = g.reshape(&mixed, &[batch, kv_axis, Dim::fixed(tokens), width])?;
            mixed = g.transpose(&mixed, &[0, 2, 1, 3])?;
        }
        g.reshape(&mixed, &[rows, Dim::fixed(dims.heads * head_dim)])
    }
}

/// Returns positions as integers, for debug outputs.
pub(crate) fn position_ids(g: &mut GraphBuilder<'_>, positions: &Value) -> Result<Value, GraphError> {
    g.cast(positions, ElementType::I64)
}
