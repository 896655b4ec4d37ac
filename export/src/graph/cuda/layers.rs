//! Gemma layers of both stacks, and their attention over the buffers of keys and values.

use std::collections::BTreeMap;

use policy::{
    cuda::{Attention, CACHED, CudaContract, LAST, in_place, keys, values},
    derived::{gemma, layer},
    dims::PolicyDims,
    element::ElementType,
};

use crate::{
    builder::{GraphBuilder, GraphError, Value},
    fused::{Buffers, HeadSizes, RotaryTables},
    graph::{
        denoise::named,
        gemma::{EPS, rotary_angle},
    },
    shape::Dim,
};

/// The two stacks of Gemma layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// The language model.
    Vlm,
    /// The action expert.
    Expert,
}

impl Kind {
    /// Returns the first part of the names of the stack's weights.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Vlm => "vlm",
            Self::Expert => "expert",
        }
    }
}

/// Scale of a norm, and for pi0.5 what follows from the flow time.
pub(crate) struct NormWeights {
    /// Factor of the normalized tokens, `[width]`.
    pub(crate) scale: Value,
    /// Added to the scaled tokens, `[width]`.
    pub(crate) shift: Option<Value>,
    /// Factor of the sub-layer's result, `[width]`.
    pub(crate) gate: Option<Value>,
}

/// Norms of a stack.
pub(crate) enum Norms {
    /// Weights of the policy.
    Weights,
    /// Values that are computed per denoise step: two per layer, and one for the output.
    Computed(Vec<NormWeights>),
}

/// Tokens between two sub-layers, `[batch, tokens, width]`: the sum so far, and a sub-layer's result that is not added yet. The next
/// norm adds the result.
pub(crate) struct Tokens {
    sum: Value,
    pending: Option<Value>,
}

impl Tokens {
    /// Returns tokens before the first layer.
    pub(crate) fn new(sum: Value) -> Self {
        Self { sum, pending: None }
    }
}

/// One stack during the build of its layers.
pub(crate) struct Layers<'d> {
    /// Sizes of the policy.
    pub(crate) dims: &'d PolicyDims,
    /// Which stack.
    pub(crate) kind: Kind,
    /// Norms of all layers and of the output.
    pub(crate) norms: Norms,
}

/// Returns the heads of both stacks.
pub(crate) fn head_sizes(dims: &PolicyDims) -> HeadSizes {
    HeadSizes {
        heads: dims.heads,
        kv_heads: dims.kv_heads,
        head_dim: dims.head_dim,
    }
}

/// Returns the tables of the positions `0` to `count - 1`, with the leading axes `lead` of size 1.
pub(crate) fn tables(
    g: &mut GraphBuilder<'_>,
    contract: &CudaContract,
    count: usize,
    lead: &[usize],
) -> Result<RotaryTables, GraphError> {
    let half = contract.dims.head_dim / 2;
    let shape = [lead, &[count, half]].concat();
    let mut table = |of: fn(f64) -> f64| {
        let values: Vec<f32> = (0..count * half)
            .map(|at| of(f64::from(rotary_angle(at / half, at % half, contract.dims.head_dim))) as f32)
            .collect();
        g.constant_in(contract.element, &shape, &values)
    };
    Ok(RotaryTables {
        cos: table(f64::cos)?,
        sin: table(f64::sin)?,
    })
}

impl Layers<'_> {
    fn weight(&self, g: &mut GraphBuilder<'_>, l: usize, name: &str) -> Result<Value, GraphError> {
        g.weight(&layer(self.kind.name(), l, name))
    }

    fn product(&self, g: &mut GraphBuilder<'_>, x: &Value, l: usize, name: &str) -> Result<Value, GraphError> {
        let weight = self.weight(g, l, name)?;
        g.product(x, &weight)
    }

    /// Adds the pending result and applies a norm: norm `index` of the computed norms, otherwise the weight `name`.
    fn norm(
        &self,
        g: &mut GraphBuilder<'_>,
        tokens: Tokens,
        index: usize,
        name: &str,
    ) -> Result<(Value, Value), GraphError> {
        let weights = match &self.norms {
            Norms::Weights => None,
            Norms::Computed(norms) => Some(
                norms
                    .get(index)
                    .ok_or_else(|| g.refuse("norm", format!("no computed norm {index}")))?,
            ),
        };
        let scale = match weights {
            Some(weights) => weights.scale.clone(),
            None => g.weight(name)?,
        };
        let (normed, sum) = match &tokens.pending {
            None => (g.scaled_rms_norm(&tokens.sum, &scale, EPS)?, tokens.sum),
            Some(pending) => {
                let both = g.skip_rms_norm(&tokens.sum, pending, &scale, EPS)?;
                (both.normed, both.sum)
            }
        };
        let normed = match weights.and_then(|weights| weights.shift.as_ref()) {
            Some(shift) => g.add(&normed, shift)?,
            None => normed,
        };
        Ok((normed, sum))
    }

    /// Returns the tokens with the result of a sub-layer, after the gate of norm `index`.
    fn pending(&self, g: &mut GraphBuilder<'_>, sum: Value, result: Value, index: usize) -> Result<Tokens, GraphError> {
        let gate = match &self.norms {
            Norms::Weights => None,
            Norms::Computed(norms) => norms.get(index).and_then(|norm| norm.gate.as_ref()),
        };
        let pending = match gate {
            Some(gate) => g.mul(&result, gate)?,
            None => result,
        };
        Ok(Tokens {
            sum,
            pending: Some(pending),
        })
    }

    /// Applies the norm before attention and the projections of layer `l`. Returns queries, keys and values in one tensor, `[batch,
    /// tokens, (heads + 2 kv_heads) head_dim]`, and the sum so far.
    pub(crate) fn project(
        &self,
        g: &mut GraphBuilder<'_>,
        l: usize,
        tokens: Tokens,
    ) -> Result<(Value, Value), GraphError> {
        g.scope(&format!("{}.{l}", self.kind.name()));
        let (normed, sum) = self.norm(g, tokens, 2 * l, &layer(self.kind.name(), l, gemma::NORM1))?;
        Ok((self.product(g, &normed, l, gemma::QKV)?, sum))
    }

    /// Applies the rest of layer `l` to the result of attention.
    pub(crate) fn complete(
        &self,
        g: &mut GraphBuilder<'_>,
        l: usize,
        sum: Value,
        mixed: &Value,
    ) -> Result<Tokens, GraphError> {
        let attended = self.product(g, mixed, l, gemma::OUT)?;
        let tokens = self.pending(g, sum, attended, 2 * l)?;
        let (normed, sum) = self.norm(g, tokens, 2 * l + 1, &layer(self.kind.name(), l, gemma::NORM2))?;
        let (gate, up) = match self.kind {
            Kind::Vlm => (
                self.product(g, &normed, l, gemma::GATE)?,
                self.product(g, &normed, l, gemma::UP)?,
            ),
            // for few tokens one product is faster than two, even with the copy of the split
            Kind::Expert => {
                let both = self.product(g, &normed, l, gemma::GATE_UP)?;
                let mlp = self.dims.expert.mlp;
                let parts = g.split(&both, 2, &[mlp, mlp])?;
                <[Value; 2]>::try_from(parts)
                    .map_err(|parts| g.refuse("Split", format!("{} parts, expected 2", parts.len())))?
                    .into()
            }
        };
        let gate = g.gelu_tanh(&gate)?;
        let hidden = g.mul(&gate, &up)?;
        let down = self.product(g, &hidden, l, gemma::DOWN)?;
        self.pending(g, sum, down, 2 * l + 1)
    }

    fn last_norm(&self) -> String {
        format!("{}.norm", self.kind.name())
    }

    /// Applies the last norm.
    pub(crate) fn finish(&self, g: &mut GraphBuilder<'_>, tokens: Tokens) -> Result<Value, GraphError> {
        g.scope(&format!("{}.out", self.kind.name()));
        let (normed, _) = self.norm(g, tokens, 2 * self.dims.depth, &self.last_norm())?;
        Ok(normed)
    }
}

/// Attention of the expert over the buffers.
pub(crate) enum BufferAttention {
    /// In place in the buffers.
    Grouped {
        /// Position of the last token.
        last: Value,
        /// Rotary tables of all positions.
        tables: RotaryTables,
    },
    /// Over the stack's own tokens and the buffers.
    General {
        /// Number of tokens in the buffers.
        cached: Value,
        /// Positions of the stack's own tokens.
        positions: Value,
        /// Number of valid keys.
        valid: Value,
        /// Rotary tables of all positions.
        tables: RotaryTables,
    },
}

impl BufferAttention {
    /// Returns the attention of `tokens` tokens per row, which follow the tokens in the buffers.
    pub(crate) fn new(
        g: &mut GraphBuilder<'_>,
        contract: &CudaContract,
        inputs: &BTreeMap<&str, Value>,
        tokens: usize,
    ) -> Result<Self, GraphError> {
        g.scope("expert.positions");
        let tables = tables(g, contract, contract.capacity(), &[])?;
        if contract.attention == Attention::Grouped {
            let last = named(g, inputs, LAST)?;
            return Ok(Self::Grouped { last, tables });
        }
        let cached = if let Some(cached) = inputs.get(CACHED) {
            cached.clone()
        } else {
            // the state graph has one token: its position is the number of tokens before it
            let last = named(g, inputs, LAST)?;
            g.cast(&last, ElementType::I64)?
        };
        let batch = g.rows(1);
        let column = g.reshape(&cached, &[batch, Dim::fixed(1)])?;
        let own: Vec<i64> = (0..tokens as i64).collect();
        let own = g.integers(&own);
        let own = g.reshape(&own, &[Dim::fixed(1), Dim::fixed(tokens)])?;
        let positions = g.add(&column, &own)?;
        let count = g.integers(&[tokens as i64]);
        Ok(Self::General {
            valid: g.add(&cached, &count)?,
            cached,
            positions,
            tables,
        })
    }

    /// Returns the mixed values of layer `l`. With `written` the keys and values of `qkv` are written to the buffers, which become
    /// outputs; grouped attention always writes.
    pub(crate) fn attend(
        &self,
        g: &mut GraphBuilder<'_>,
        dims: &PolicyDims,
        qkv: &Value,
        (l, buffers): (usize, &Buffers),
        written: bool,
        outputs: &mut BTreeMap<String, Value>,
    ) -> Result<Value, GraphError> {
        let sizes = head_sizes(dims);
        match self {
            Self::Grouped { last, tables } => {
                let (mixed, buffers) = g.grouped_attention(qkv, buffers, last, tables, sizes)?;
                outputs.insert(in_place(&keys(l)), buffers.k);
                outputs.insert(in_place(&values(l)), buffers.v);
                Ok(mixed)
            }
            Self::General {
                cached,
                positions,
                valid,
                tables,
            } => {
                let head_dim = dims.head_dim;
                let parts = g.split(qkv, 2, &[dims.heads * head_dim, head_dim, head_dim])?;
                let [q, k, v] = <[Value; 3]>::try_from(parts)
                    .map_err(|parts| g.refuse("Split", format!("{} parts, expected 3", parts.len())))?;
                let q = g.rotate(&q, tables, Some(positions), dims.heads)?;
                let k = g.rotate(&k, tables, Some(positions), 1)?;
                let (batch, tokens, wide) = (k.axis(0), k.axis(1), Dim::fixed(head_dim));
                let all = [batch, buffers.k.axis(2), wide];
                let mut join = |name: String, own: &Value, buffer: &Value| {
                    if written {
                        let own = g.reshape(own, &[batch, Dim::fixed(1), tokens, wide])?;
                        let whole = g.write_tokens(buffer, &own, cached)?;
                        outputs.insert(in_place(&name), whole.clone());
                        g.reshape(&whole, &all)
                    } else {
                        // padding is at the end, where attention does not read
                        let buffer = g.reshape(buffer, &all)?;
                        g.concat(&[own, &buffer], 1)
                    }
                };
                let k = join(keys(l), &k, &buffers.k)?;
                let v = join(values(l), &v, &buffers.v)?;
                g.attention((&q, &k, &v), Some(valid), sizes)
            }
        }
    }
}

/// Returns the buffers of layer `l`.
pub(crate) fn buffers(g: &GraphBuilder<'_>, inputs: &BTreeMap<&str, Value>, l: usize) -> Result<Buffers, GraphError> {
    Ok(Buffers {
        k: named(g, inputs, &keys(l))?,
        v: named(g, inputs, &values(l))?,
    })
}
