//! Operations of flavour `cuda`: operators of ONNX Runtime, and of newer operator sets, that do the work of several operators.

use policy::element::ElementType;

use crate::{
    builder::{GraphBuilder, GraphError, MICROSOFT, Value, float, int},
    shape::{Dim, text},
};

type Built = Result<Value, GraphError>;

/// Result of a norm over the sum of two values.
pub(crate) struct SkipNorm {
    /// The normalized sum.
    pub(crate) normed: Value,
    /// The sum.
    pub(crate) sum: Value,
}

/// Heads of an attention operator.
#[derive(Debug, Clone, Copy)]
pub(crate) struct HeadSizes {
    /// Query heads.
    pub(crate) heads: usize,
    /// Key and value heads.
    pub(crate) kv_heads: usize,
    /// Width of one head.
    pub(crate) head_dim: usize,
}

impl HeadSizes {
    fn scale(self) -> f32 {
        (1.0 / (self.head_dim as f64).sqrt()) as f32
    }
}

/// Tables of cosines and sines, `[positions, head_dim / 2]`.
pub(crate) struct RotaryTables {
    /// Cosines.
    pub(crate) cos: Value,
    /// Sines.
    pub(crate) sin: Value,
}

/// Buffers of keys and values of one layer, `[batch, kv_heads, capacity, head_dim]`.
pub(crate) struct Buffers {
    /// Keys after rotation.
    pub(crate) k: Value,
    /// Values.
    pub(crate) v: Value,
}

/// Returns the shape with another size of the last axis.
fn with_last(shape: &[Dim], last: usize) -> Vec<Dim> {
    let mut shape = shape.to_vec();
    if let Some(slot) = shape.last_mut() {
        *slot = Dim::fixed(last);
    }
    shape
}

impl GraphBuilder<'_> {
    /// Checks that values have one element type.
    fn need_alike(&self, op: &str, values: &[&Value]) -> Result<(), GraphError> {
        let alike = values.iter().zip(values.iter().skip(1)).all(|(a, b)| a.elem == b.elem);
        self.need(op, alike, || {
            let types: Vec<String> = values.iter().map(|value| format!("{:?}", value.elem)).collect();
            format!("takes one type, found {}", types.join(", "))
        })
    }

    /// Checks that a value is a vector with the width of the last axis of `x`.
    fn need_width(&self, op: &str, x: &Value, vector: &Value) -> Result<(), GraphError> {
        let last = x.shape.last().copied().unwrap_or(Dim::fixed(1));
        self.need(op, vector.shape == [last] && vector.elem == x.elem, || {
            format!(
                "{:?} {}, expected {:?} {}",
                vector.elem,
                text(&vector.shape),
                x.elem,
                text(&[last])
            )
        })
    }

    /// Returns the only result of a node.
    fn single(
        &mut self,
        op: (&str, &str),
        inputs: &[Option<&Value>],
        attributes: Vec<crate::proto::AttributeProto>,
        shape: Vec<Dim>,
        elem: ElementType,
    ) -> Built {
        let made = self.node_of(op, inputs, attributes, &[Some(shape)], elem);
        made.into_iter()
            .next()
            .ok_or_else(|| self.refuse(op.1, "no result".to_owned()))
    }

    /// Returns the two results of a node whose outputs 0 and 3 are present.
    fn skip_norm(
        &mut self,
        op: &str,
        inputs: &[Option<&Value>],
        attributes: Vec<crate::proto::AttributeProto>,
        x: &Value,
    ) -> Result<SkipNorm, GraphError> {
        let shape = Some(x.shape.clone());
        let made = self.node_of(
            (MICROSOFT, op),
            inputs,
            attributes,
            &[shape.clone(), None, None, shape],
            x.elem,
        );
        let [normed, sum] = <[Value; 2]>::try_from(made)
            .map_err(|made| self.refuse(op, format!("{} results, expected 2", made.len())))?;
        Ok(SkipNorm { normed, sum })
    }

    /// Returns `x W`: `x` `[.., in]`, `weight` `[in, out]`.
    ///
    /// # Errors
    /// The types or shapes do not match.
    pub(crate) fn product(&mut self, x: &Value, weight: &Value) -> Built {
        let fits = weight.shape.len() == 2 && x.shape.len() >= 2 && x.shape.last() == weight.shape.first();
        self.need("MatMul", fits && x.elem == weight.elem, || {
            format!(
                "{:?} {} times {:?} {}, expected one type, [.., in] and [in, out]",
                x.elem,
                text(&x.shape),
                weight.elem,
                text(&weight.shape)
            )
        })?;
        let mut shape = x.shape.clone();
        shape.pop();
        shape.push(weight.axis(1));
        Ok(self.node("MatMul", &[x, weight], vec![], shape, x.elem))
    }

    /// Returns `x * rsqrt(mean(x^2) + eps) * scale` over the last axis as one node.
    ///
    /// # Errors
    /// The scale has a wrong type or width.
    pub(crate) fn scaled_rms_norm(&mut self, x: &Value, scale: &Value, eps: f32) -> Built {
        const OP: &str = "SimplifiedLayerNormalization";
        self.need_width(OP, x, scale)?;
        let attributes = vec![int("axis", -1), float("epsilon", eps), int("stash_type", 1)];
        Ok(self.node(OP, &[x, scale], attributes, x.shape.clone(), x.elem))
    }

    /// Returns the RMS norm of `x + skip`, and the sum.
    ///
    /// # Errors
    /// The types or shapes do not match.
    pub(crate) fn skip_rms_norm(
        &mut self,
        x: &Value,
        skip: &Value,
        scale: &Value,
        eps: f32,
    ) -> Result<SkipNorm, GraphError> {
        const OP: &str = "SkipSimplifiedLayerNormalization";
        self.need_skip(OP, x, skip)?;
        self.need_width(OP, x, scale)?;
        let inputs = [Some(x), Some(skip), Some(scale)];
        self.skip_norm(OP, &inputs, vec![float("epsilon", eps)], x)
    }

    /// Returns the layer norm of `x + skip + bias`, and the sum.
    ///
    /// # Errors
    /// The types or shapes do not match.
    pub(crate) fn skip_layer_norm(
        &mut self,
        x: &Value,
        (skip, bias): (&Value, &Value),
        (weight, offset): (&Value, &Value),
        eps: f32,
    ) -> Result<SkipNorm, GraphError> {
        const OP: &str = "SkipLayerNormalization";
        self.need_skip(OP, x, skip)?;
        for vector in [bias, weight, offset] {
            self.need_width(OP, x, vector)?;
        }
        let inputs = [Some(x), Some(skip), Some(weight), Some(offset), Some(bias)];
        self.skip_norm(OP, &inputs, vec![float("epsilon", eps)], x)
    }

    fn need_skip(&self, op: &str, x: &Value, skip: &Value) -> Result<(), GraphError> {
        self.need_alike(op, &[x, skip])?;
        self.need(op, x.shape.len() == 3 && x.shape == skip.shape, || {
            format!(
                "{} and {}, expected twice [batch, tokens, width]",
                text(&x.shape),
                text(&skip.shape)
            )
        })
    }

    /// Returns GELU of `x + bias` in its tanh form.
    ///
    /// # Errors
    /// The bias has a wrong type or width.
    pub(crate) fn bias_gelu_tanh(&mut self, x: &Value, bias: &Value) -> Built {
        const OP: &str = "FastGelu";
        self.need_float(OP, x)?;
        self.need_width(OP, x, bias)?;
        self.single((MICROSOFT, OP), &[Some(x), Some(bias)], vec![], x.shape.clone(), x.elem)
    }

    /// Rotates `x`, `[batch, tokens, heads * head_dim]` or `[batch, heads, tokens, head_dim]`. Position `i` of `positions` `[batch,
    /// tokens]` reads row `i` of the tables; without positions the tables are `[batch, tokens, head_dim / 2]`.
    ///
    /// # Errors
    /// The types or shapes do not match.
    pub(crate) fn rotate(
        &mut self,
        x: &Value,
        tables: &RotaryTables,
        positions: Option<&Value>,
        heads: usize,
    ) -> Built {
        const OP: &str = "RotaryEmbedding";
        let (cos, sin) = (&tables.cos, &tables.sin);
        self.need_alike(OP, &[x, cos, sin])?;
        let half = cos.shape.last().map_or(0, |half| half.count());
        let tokens = x.axis(x.shape.len().saturating_sub(2));
        let known = match positions {
            Some(positions) => {
                positions.elem == ElementType::I64 && positions.shape == [x.axis(0), tokens] && cos.shape.len() == 2
            }
            None => cos.shape == [x.axis(0), tokens, Dim::fixed(half)],
        };
        let width = match x.shape.len() {
            3 => x.axis(2) == Dim::fixed(2 * half * heads),
            4 => x.axis(1) == Dim::fixed(heads) && x.axis(3) == Dim::fixed(2 * half),
            _ => false,
        };
        self.need(OP, known && width && cos.shape == sin.shape, || {
            format!(
                "input {} with {heads} heads, tables {} and {}, positions {}",
                text(&x.shape),
                text(&cos.shape),
                text(&sin.shape),
                positions.map_or_else(|| "none".to_owned(), |positions| text(&positions.shape))
            )
        })?;
        self.single(
            ("", OP),
            &[Some(x), Some(cos), Some(sin), positions],
            vec![int("num_heads", heads as i64), int("interleaved", 0)],
            x.shape.clone(),
            x.elem,
        )
    }

    /// Returns attention over all keys, or over the first `keys` `[batch]` keys of each row: `q` `[batch, tokens, heads * head_dim]`,
    /// `k` and `v` `[batch, all keys, kv_heads * head_dim]`.
    ///
    /// # Errors
    /// The types or shapes do not match.
    pub(crate) fn attention(
        &mut self,
        (q, k, v): (&Value, &Value, &Value),
        keys: Option<&Value>,
        sizes: HeadSizes,
    ) -> Built {
        const OP: &str = "Attention";
        self.need_alike(OP, &[q, k, v])?;
        let width = |heads: usize| Dim::fixed(heads * sizes.head_dim);
        let fits = q.shape == [q.axis(0), q.axis(1), width(sizes.heads)]
            && k.shape == [q.axis(0), k.axis(1), width(sizes.kv_heads)]
            && v.shape == k.shape
            && keys.is_none_or(|keys| keys.elem == ElementType::I64 && keys.shape == [q.axis(0)]);
        self.need(OP, fits, || {
            format!(
                "queries {}, keys {}, values {}, number of keys {}, {sizes:?}",
                text(&q.shape),
                text(&k.shape),
                text(&v.shape),
                keys.map_or_else(|| "all".to_owned(), |keys| text(&keys.shape))
            )
        })?;
        // absent: mask, and keys and values of earlier runs
        self.single(
            ("", OP),
            &[Some(q), Some(k), Some(v), None, None, None, keys],
            vec![
                int("q_num_heads", sizes.heads as i64),
                int("kv_num_heads", sizes.kv_heads as i64),
                float("scale", sizes.scale()),
            ],
            q.shape.clone(),
            q.elem,
        )
    }

    /// Appends the keys and values of `tokens` tokens to the buffers, so that the last token has the position `last` `[batch]`, and
    /// attends from each of these tokens to all tokens up to the last. The operator rotates queries and keys.
    ///
    /// `qkv` is `[batch, tokens, (heads + 2 kv_heads) * head_dim]`. Returns the mixed values and the buffers.
    ///
    /// # Errors
    /// The types or shapes do not match.
    pub(crate) fn grouped_attention(
        &mut self,
        qkv: &Value,
        buffers: &Buffers,
        last: &Value,
        tables: &RotaryTables,
        sizes: HeadSizes,
    ) -> Result<(Value, Buffers), GraphError> {
        const OP: &str = "GroupQueryAttention";
        let (cos, sin) = (&tables.cos, &tables.sin);
        self.need_alike(OP, &[qkv, &buffers.k, &buffers.v, cos, sin])?;
        let (batch, capacity) = (qkv.axis(0), buffers.k.axis(2));
        let HeadSizes {
            heads,
            kv_heads,
            head_dim,
        } = sizes;
        let packed = Dim::fixed((heads + 2 * kv_heads) * head_dim);
        let fits = qkv.shape == [batch, qkv.axis(1), packed]
            && buffers.k.shape == [batch, Dim::fixed(kv_heads), capacity, Dim::fixed(head_dim)]
            && buffers.v.shape == buffers.k.shape
            && last.elem == ElementType::I32
            && last.shape == [batch]
            && cos.shape == [capacity, Dim::fixed(head_dim / 2)]
            && sin.shape == cos.shape;
        self.need(OP, fits, || {
            format!(
                "projections {}, buffers {} and {}, last {}, tables {} and {}, {sizes:?}",
                text(&qkv.shape),
                text(&buffers.k.shape),
                text(&buffers.v.shape),
                text(&last.shape),
                text(&cos.shape),
                text(&sin.shape)
            )
        })?;
        let total = self.integer(capacity.count() as i32);
        let made = self.node_of(
            (MICROSOFT, OP),
            // absent: keys and values outside of `qkv`
            &[
                Some(qkv),
                None,
                None,
                Some(&buffers.k),
                Some(&buffers.v),
                Some(last),
                Some(&total),
                Some(cos),
                Some(sin),
            ],
            vec![
                int("num_heads", heads as i64),
                int("kv_num_heads", kv_heads as i64),
                float("scale", sizes.scale()),
                int("causal", 0),
                int("do_rotary", 1),
                int("rotary_interleaved", 0),
            ],
            &[
                Some(with_last(&qkv.shape, heads * head_dim)),
                Some(buffers.k.shape.clone()),
                Some(buffers.v.shape.clone()),
            ],
            qkv.elem,
        );
        let [mixed, k, v] = <[Value; 3]>::try_from(made)
            .map_err(|made| self.refuse(OP, format!("{} results, expected 3", made.len())))?;
        Ok((mixed, Buffers { k, v }))
    }

    /// Writes `tokens` `[batch, kv_heads, tokens, head_dim]` to a buffer, from position `first` `[batch]`; returns the buffer.
    ///
    /// # Errors
    /// The types or shapes do not match.
    pub(crate) fn write_tokens(&mut self, buffer: &Value, tokens: &Value, first: &Value) -> Built {
        const OP: &str = "TensorScatter";
        self.need_alike(OP, &[buffer, tokens])?;
        let fits = buffer.shape.len() == 4
            && tokens.shape == [buffer.axis(0), buffer.axis(1), tokens.axis(2), buffer.axis(3)]
            && tokens.axis(2).count() <= buffer.axis(2).count()
            && first.elem == ElementType::I64
            && first.shape == [buffer.axis(0)];
        self.need(OP, fits, || {
            format!(
                "buffer {}, tokens {}, first {}",
                text(&buffer.shape),
                text(&tokens.shape),
                text(&first.shape)
            )
        })?;
        Ok(self.node(
            OP,
            &[buffer, tokens, first],
            vec![int("axis", -2)],
            buffer.shape.clone(),
            buffer.elem,
        ))
    }

    /// Returns 1 where `a < b`, otherwise 0, in f32 and broadcast from `b` `[1]`.
    ///
    /// # Errors
    /// The inputs are not integers.
    pub(crate) fn less(&mut self, a: &Value, b: &Value) -> Built {
        const OP: &str = "Less";
        let fits = a.elem == ElementType::I64 && b.elem == ElementType::I64 && b.shape == [Dim::fixed(1)];
        self.need(OP, fits, || {
            format!("{:?} {} and {:?} {}", a.elem, text(&a.shape), b.elem, text(&b.shape))
        })?;
        let less = self.node(OP, &[a, b], vec![], a.shape.clone(), ElementType::Bool);
        self.cast(&less, ElementType::F32)
    }
}
