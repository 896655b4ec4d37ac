//! Operations of the builder. Every operation checks the types and shapes of its inputs.

use policy::{config::Flavour, element::ElementType};

use crate::{
    builder::{GraphBuilder, GraphError, Value, data_type, float, int, ints, string},
    shape::{Dim, broadcast, elements, text},
};

type Built = Result<Value, GraphError>;

impl GraphBuilder<'_> {
    pub(crate) fn need(&self, op: &str, holds: bool, detail: impl FnOnce() -> String) -> Result<(), GraphError> {
        if holds { Ok(()) } else { Err(self.refuse(op, detail())) }
    }

    pub(crate) fn need_float(&self, op: &str, value: &Value) -> Result<(), GraphError> {
        self.need(op, matches!(value.elem, ElementType::F32 | ElementType::Bf16), || {
            format!("takes a float, found {:?}", value.elem)
        })
    }

    fn binary(&mut self, op: &str, a: &Value, b: &Value) -> Built {
        self.need(op, a.elem == b.elem, || {
            format!("takes one type, found {:?} and {:?}", a.elem, b.elem)
        })?;
        let shape = broadcast(&a.shape, &b.shape).ok_or_else(|| {
            self.refuse(
                op,
                format!("{} and {} do not broadcast", text(&a.shape), text(&b.shape)),
            )
        })?;
        Ok(self.node(op, &[a, b], vec![], shape, a.elem))
    }

    /// Returns `a + b`, broadcast.
    ///
    /// # Errors
    /// The types or shapes do not match.
    pub fn add(&mut self, a: &Value, b: &Value) -> Built {
        self.binary("Add", a, b)
    }

    /// Returns `a - b`, broadcast.
    ///
    /// # Errors
    /// The types or shapes do not match.
    pub fn sub(&mut self, a: &Value, b: &Value) -> Built {
        self.binary("Sub", a, b)
    }

    /// Returns `a * b`, broadcast.
    ///
    /// # Errors
    /// The types or shapes do not match.
    pub fn mul(&mut self, a: &Value, b: &Value) -> Built {
        self.binary("Mul", a, b)
    }

    /// Returns `a / b`, broadcast.
    ///
    /// # Errors
    /// The types or shapes do not match.
    pub fn div(&mut self, a: &Value, b: &Value) -> Built {
        self.binary("Div", a, b)
    }

    /// Returns the elementwise maximum, broadcast.
    ///
    /// # Errors
    /// The types or shapes do not match.
    pub fn max(&mut self, a: &Value, b: &Value) -> Built {
        self.binary("Max", a, b)
    }

    /// Returns `a` and `b`, elementwise and broadcast.
    ///
    /// # Errors
    /// The inputs are not booleans, or the shapes do not match.
    pub fn and(&mut self, a: &Value, b: &Value) -> Built {
        self.need("And", a.elem == ElementType::Bool, || {
            format!("takes Bool, found {:?}", a.elem)
        })?;
        self.binary("And", a, b)
    }

    fn unary(&mut self, op: &str, x: &Value) -> Built {
        self.need_float(op, x)?;
        Ok(self.node(op, &[x], vec![], x.shape.clone(), x.elem))
    }

    /// Returns the elementwise cosine.
    ///
    /// # Errors
    /// The input is not a float.
    pub fn cos(&mut self, x: &Value) -> Built {
        self.unary("Cos", x)
    }

    /// Returns the elementwise sine.
    ///
    /// # Errors
    /// The input is not a float.
    pub fn sin(&mut self, x: &Value) -> Built {
        self.unary("Sin", x)
    }

    /// Returns the elementwise square root.
    ///
    /// # Errors
    /// The input is not a float.
    pub fn sqrt(&mut self, x: &Value) -> Built {
        self.unary("Sqrt", x)
    }

    /// Returns the elementwise hyperbolic tangent.
    ///
    /// # Errors
    /// The input is not a float.
    pub fn tanh(&mut self, x: &Value) -> Built {
        self.unary("Tanh", x)
    }

    /// Returns the elementwise exponential.
    ///
    /// # Errors
    /// The input is not a float.
    pub fn exp(&mut self, x: &Value) -> Built {
        self.unary("Exp", x)
    }

    /// Returns `max(x, 0)`, elementwise.
    ///
    /// # Errors
    /// The input is not a float.
    pub fn relu(&mut self, x: &Value) -> Built {
        self.unary("Relu", x)
    }

    /// Returns `x * sigmoid(x)`, elementwise.
    ///
    /// # Errors
    /// The input is not a float.
    pub fn silu(&mut self, x: &Value) -> Built {
        let gate = self.unary("Sigmoid", x)?;
        self.mul(x, &gate)
    }

    /// Returns GELU in its tanh form, elementwise.
    ///
    /// # Errors
    /// The input is not a float.
    pub fn gelu_tanh(&mut self, x: &Value) -> Built {
        self.need_float("Gelu", x)?;
        Ok(self.node(
            "Gelu",
            &[x],
            vec![string("approximate", "tanh")],
            x.shape.clone(),
            x.elem,
        ))
    }

    /// Returns the softmax over the last axis.
    ///
    /// # Errors
    /// The input is not a float.
    pub fn softmax(&mut self, x: &Value) -> Built {
        self.need_float("Softmax", x)?;
        Ok(self.node("Softmax", &[x], vec![int("axis", -1)], x.shape.clone(), x.elem))
    }

    /// Returns `x * rsqrt(mean(x^2) + eps) * scale` over the last axis; `scale` has the width of this axis.
    ///
    /// # Errors
    /// The scale has a wrong width.
    pub fn rms_norm(&mut self, x: &Value, scale: &Value, eps: f32) -> Built {
        let last = x.shape.last().copied().unwrap_or(Dim::fixed(1));
        self.need("RmsNorm", scale.shape == [last], || {
            format!("scale has shape {}, expected {}", text(&scale.shape), text(&[last]))
        })?;
        // runtimes recognize exactly this chain of nodes, and fuse the chain into one kernel
        let two = self.scalar(2.0)?;
        let square = self.node("Pow", &[x, &two], vec![], x.shape.clone(), ElementType::F32);
        let mean = self.reduce("ReduceMean", &square, x.shape.len().saturating_sub(1))?;
        let eps = self.scalar(eps)?;
        let guarded = self.add(&mean, &eps)?;
        let root = self.sqrt(&guarded)?;
        let normed = self.div(x, &root)?;
        self.mul(&normed, scale)
    }

    /// Returns the layer normalization over the last axis.
    ///
    /// # Errors
    /// The weight or the bias has a wrong width.
    pub fn layer_norm(&mut self, x: &Value, weight: &Value, bias: &Value, eps: f32) -> Built {
        let last = x.shape.last().copied().unwrap_or(Dim::fixed(1));
        self.need(
            "LayerNormalization",
            weight.shape == [last] && bias.shape == [last],
            || {
                format!(
                    "weight {} and bias {}, expected {}",
                    text(&weight.shape),
                    text(&bias.shape),
                    text(&[last])
                )
            },
        )?;
        let attributes = vec![int("axis", -1), float("epsilon", eps)];
        Ok(self.node(
            "LayerNormalization",
            &[x, weight, bias],
            attributes,
            x.shape.clone(),
            x.elem,
        ))
    }

    /// Adds `ReduceMean` or `ReduceSum` over one axis, which is kept with size 1.
    pub(crate) fn reduce(&mut self, op: &str, x: &Value, axis: usize) -> Built {
        self.need_float(op, x)?;
        let mut shape = x.shape.clone();
        let slot = shape
            .get_mut(axis)
            .ok_or_else(|| self.refuse(op, format!("no axis {axis} in {}", text(&x.shape))))?;
        *slot = Dim::fixed(1);
        let axes = self.integers(&[axis as i64]);
        Ok(self.node(op, &[x, &axes], vec![int("keepdims", 1)], shape, x.elem))
    }

    /// Returns the mean over one axis, which is kept with size 1.
    ///
    /// # Errors
    /// The axis does not exist, or the input is not a float.
    pub fn mean(&mut self, x: &Value, axis: usize) -> Built {
        self.reduce("ReduceMean", x, axis)
    }

    /// Returns the sum over one axis, which is kept with size 1.
    ///
    /// # Errors
    /// The axis does not exist, or the input is not a float.
    pub fn sum(&mut self, x: &Value, axis: usize) -> Built {
        self.reduce("ReduceSum", x, axis)
    }

    /// Returns the running sum over one axis.
    ///
    /// # Errors
    /// The axis does not exist, or the input is not a float.
    pub fn cumsum(&mut self, x: &Value, axis: usize) -> Built {
        self.need_float("CumSum", x)?;
        self.need("CumSum", axis < x.shape.len(), || {
            format!("no axis {axis} in {}", text(&x.shape))
        })?;
        let axis = self.integers(&[axis as i64]);
        Ok(self.node("CumSum", &[x, &axis], vec![], x.shape.clone(), ElementType::F32))
    }

    /// Returns `x W^T + b`: `x` `[rows, in]`, `weight` `[out, in]` as in checkpoints, `bias` `[out]`.
    ///
    /// # Errors
    /// The shapes do not match.
    pub fn linear(&mut self, x: &Value, weight: &Value, bias: Option<&Value>) -> Built {
        let (out, input) = (weight.axis(0), weight.axis(1));
        let fits = x.shape.len() == 2 && weight.shape.len() == 2 && x.axis(1) == input;
        self.need("Gemm", fits && bias.is_none_or(|b| b.shape == [out]), || {
            format!(
                "input {}, weight {}, bias {}: expected [rows, in], [out, in], [out]",
                text(&x.shape),
                text(&weight.shape),
                bias.map_or_else(|| "none".to_owned(), |b| text(&b.shape))
            )
        })?;
        let shape = vec![x.axis(0), out];
        let inputs: Vec<&Value> = [x, weight].into_iter().chain(bias).collect();
        Ok(self.node("Gemm", &inputs, vec![int("transB", 1)], shape, ElementType::F32))
    }

    /// Applies a linear layer by name: `NAME.weight` and, if `with_bias` is set, `NAME.bias`. The weight is `[out, in]`, in a graph
    /// of flavour `cuda` `[in, out]`.
    ///
    /// # Errors
    /// A weight is missing, or the shapes do not match.
    pub fn linear_named(&mut self, x: &Value, name: &str, with_bias: bool) -> Built {
        let weight = self.weight(&format!("{name}.weight"))?;
        let bias = if with_bias {
            Some(self.weight(&format!("{name}.bias"))?)
        } else {
            None
        };
        if self.flavour() == Flavour::Plain {
            return self.linear(x, &weight, bias.as_ref());
        }
        let product = self.product(x, &weight)?;
        bias.map_or(Ok(product.clone()), |bias| self.add(&product, &bias))
    }

    /// Returns the matrix product over the last two axes; the leading axes are equal.
    ///
    /// # Errors
    /// The shapes do not match.
    pub fn matmul(&mut self, a: &Value, b: &Value) -> Built {
        let rank = a.shape.len();
        let fits = rank >= 2
            && b.shape.len() == rank
            && a.elem == b.elem
            && a.shape.get(..rank - 2) == b.shape.get(..rank - 2)
            && a.axis(rank - 1) == b.axis(rank - 2);
        self.need("MatMul", fits, || {
            format!("{} times {}", text(&a.shape), text(&b.shape))
        })?;
        let mut shape = a.shape.clone();
        shape.pop();
        shape.push(b.axis(rank - 1));
        Ok(self.node("MatMul", &[a, b], vec![], shape, a.elem))
    }

    /// Returns the same elements in another shape.
    ///
    /// # Errors
    /// The number of elements differs.
    pub fn reshape(&mut self, x: &Value, shape: &[Dim]) -> Built {
        if x.shape == shape {
            return Ok(x.clone());
        }
        let same = elements(&x.shape).is_some_and(|n| Some(n) == elements(shape));
        self.need("Reshape", same, || format!("{} to {}", text(&x.shape), text(shape)))?;
        let target: Vec<i64> = shape
            .iter()
            .map(|d| if d.is_batched() { -1 } else { d.count() as i64 })
            .collect();
        let target = self.integers(&target);
        Ok(self.node("Reshape", &[x, &target], vec![], shape.to_vec(), x.elem))
    }

    /// Returns the axes in another order.
    ///
    /// # Errors
    /// `order` is not a permutation of the axes.
    pub fn transpose(&mut self, x: &Value, order: &[usize]) -> Built {
        let mut sorted = order.to_vec();
        sorted.sort_unstable();
        self.need("Transpose", sorted.iter().copied().eq(0..x.shape.len()), || {
            format!("order {order:?} of {}", text(&x.shape))
        })?;
        let shape = order.iter().map(|i| x.axis(*i)).collect();
        let order: Vec<i64> = order.iter().map(|i| *i as i64).collect();
        Ok(self.node("Transpose", &[x], vec![ints("perm", &order)], shape, x.elem))
    }

    /// Exchanges the last two axes.
    ///
    /// # Errors
    /// The input has fewer than two axes.
    pub fn transpose_last(&mut self, x: &Value) -> Built {
        let rank = x.shape.len();
        self.need("Transpose", rank >= 2, || {
            format!("takes two axes, found {}", text(&x.shape))
        })?;
        let mut order: Vec<usize> = (0..rank).collect();
        order.swap(rank - 1, rank - 2);
        self.transpose(x, &order)
    }

    /// Repeats axes of size 1 until the shape is `shape` (of the same rank).
    ///
    /// # Errors
    /// The rank differs, or an axis is neither 1 nor the axis of `shape`.
    pub fn expand(&mut self, x: &Value, shape: &[Dim]) -> Built {
        if x.shape == shape {
            return Ok(x.clone());
        }
        let grows = x.shape.len() == shape.len()
            && x.shape
                .iter()
                .zip(shape)
                .all(|(a, b)| a == b || (*a == Dim::fixed(1) && !b.is_batched()));
        self.need("Expand", grows, || format!("{} to {}", text(&x.shape), text(shape)))?;
        // the target of an unchanged axis is 1, so that the batch may be symbolic
        let target: Vec<i64> = x
            .shape
            .iter()
            .zip(shape)
            .map(|(a, b)| if a == b { 1 } else { b.count() as i64 })
            .collect();
        let target = self.integers(&target);
        Ok(self.node("Expand", &[x, &target], vec![], shape.to_vec(), x.elem))
    }

    /// Splits an axis into parts of the given sizes.
    ///
    /// # Errors
    /// The sizes do not add up to the axis.
    pub fn split(&mut self, x: &Value, axis: usize, sizes: &[usize]) -> Result<Vec<Value>, GraphError> {
        let whole = Dim::fixed(sizes.iter().sum());
        self.need("Split", axis < x.shape.len() && x.axis(axis) == whole, || {
            format!("axis {axis} of {} into {sizes:?}", text(&x.shape))
        })?;
        let shapes = sizes
            .iter()
            .map(|n| {
                x.shape
                    .iter()
                    .enumerate()
                    .map(|(i, d)| if i == axis { Dim::fixed(*n) } else { *d })
                    .collect()
            })
            .collect();
        let lengths: Vec<i64> = sizes.iter().map(|n| *n as i64).collect();
        let lengths = self.integers(&lengths);
        Ok(self.node_many("Split", &[x, &lengths], vec![int("axis", axis as i64)], shapes, x.elem))
    }

    /// Returns `length` entries of an axis, from `start`.
    ///
    /// # Errors
    /// The entries exceed the axis.
    pub fn slice(&mut self, x: &Value, axis: usize, start: usize, length: usize) -> Built {
        let whole = x.axis(axis);
        if start == 0 && whole == Dim::fixed(length) {
            return Ok(x.clone());
        }
        let inside = axis < x.shape.len() && !whole.is_batched() && start + length <= whole.count();
        self.need("Slice", inside, || {
            format!("{start} to {} of axis {axis} of {}", start + length, text(&x.shape))
        })?;
        let mut shape = x.shape.clone();
        if let Some(slot) = shape.get_mut(axis) {
            *slot = Dim::fixed(length);
        }
        let start_value = self.integers(&[start as i64]);
        let end = self.integers(&[(start + length) as i64]);
        let axes = self.integers(&[axis as i64]);
        Ok(self.node("Slice", &[x, &start_value, &end, &axes], vec![], shape, x.elem))
    }

    /// Concatenates values along an axis.
    ///
    /// # Errors
    /// `parts` is empty, or another axis or the type differs.
    pub fn concat(&mut self, parts: &[&Value], axis: usize) -> Built {
        let first = parts
            .first()
            .ok_or_else(|| self.refuse("Concat", "nothing to join".to_owned()))?;
        if parts.len() == 1 {
            return Ok((*first).clone());
        }
        let alike = axis < first.shape.len()
            && parts.iter().all(|p| {
                p.elem == first.elem
                    && p.shape.len() == first.shape.len()
                    && p.axis(axis).is_batched() == first.axis(axis).is_batched()
                    && (0..p.shape.len()).all(|i| i == axis || p.axis(i) == first.axis(i))
            });
        self.need("Concat", alike, || {
            let shapes: Vec<String> = parts.iter().map(|p| text(&p.shape)).collect();
            format!("{} along axis {axis}", shapes.join(", "))
        })?;
        let joined = parts.iter().map(|p| p.axis(axis).count()).sum();
        let mut shape = first.shape.clone();
        if let Some(slot) = shape.get_mut(axis) {
            *slot = if slot.is_batched() {
                Dim::batch(joined)
            } else {
                Dim::fixed(joined)
            };
        }
        let elem = first.elem;
        Ok(self.node("Concat", parts, vec![int("axis", axis as i64)], shape, elem))
    }

    /// Appends `count` zeros to the last axis.
    ///
    /// # Errors
    /// The input is not a float, or the last axis is the batch.
    pub fn pad_last(&mut self, x: &Value, count: usize) -> Built {
        self.need_float("Pad", x)?;
        let mut shape = x.shape.clone();
        let fixed = shape
            .last_mut()
            .filter(|d| !d.is_batched())
            .map(|d| *d = Dim::fixed(d.count() + count))
            .is_some();
        self.need("Pad", fixed, || format!("the last axis of {}", text(&x.shape)))?;
        let mut pads = vec![0; 2 * x.shape.len()];
        if let Some(end) = pads.last_mut() {
            *end = count as i64;
        }
        let pads = self.integers(&pads);
        Ok(self.node(
            "Pad",
            &[x, &pads],
            vec![string("mode", "constant")],
            shape,
            ElementType::F32,
        ))
    }

    /// Converts to another element type.
    ///
    /// # Errors
    /// Does not occur in practice.
    pub fn cast(&mut self, x: &Value, elem: ElementType) -> Built {
        let to = int("to", i64::from(data_type(elem)));
        Ok(self.node("Cast", &[x], vec![to], x.shape.clone(), elem))
    }

    /// Returns `yes` where `condition` is true, otherwise `no`, broadcast.
    ///
    /// # Errors
    /// The types or shapes do not match.
    pub fn choose(&mut self, condition: &Value, yes: &Value, no: &Value) -> Built {
        self.need(
            "Where",
            condition.elem == ElementType::Bool && yes.elem == no.elem,
            || {
                format!(
                    "takes Bool and one type, found {:?}, {:?}, {:?}",
                    condition.elem, yes.elem, no.elem
                )
            },
        )?;
        let shape = broadcast(&yes.shape, &no.shape)
            .and_then(|s| broadcast(&condition.shape, &s))
            .ok_or_else(|| self.refuse("Where", "shapes do not broadcast".to_owned()))?;
        Ok(self.node("Where", &[condition, yes, no], vec![], shape, yes.elem))
    }

    /// Returns the rows `ids` of `table` `[rows, width]`. The caller ensures that ids are in range; others fail at run time.
    ///
    /// # Errors
    /// The table is not a matrix, or the ids are not integers.
    pub fn gather_rows(&mut self, table: &Value, ids: &Value) -> Built {
        self.need("Gather", table.shape.len() == 2 && ids.elem == ElementType::I64, || {
            format!("table {}, ids {:?}", text(&table.shape), ids.elem)
        })?;
        let shape = ids.shape.iter().copied().chain([table.axis(1)]).collect();
        Ok(self.node("Gather", &[table, ids], vec![int("axis", 0)], shape, table.elem))
    }

    /// Returns the convolution with stride = kernel: `x` `[n, 3, side, side]`, `weight` `[width, 3, patch, patch]`.
    ///
    /// # Errors
    /// The side is not a multiple of the patch, or the shapes do not match.
    pub fn patchify(&mut self, x: &Value, weight: &Value, bias: &Value) -> Built {
        let (side, patch) = (x.axis(2).count(), weight.axis(3).count());
        let fits = x.shape.len() == 4
            && weight.shape.len() == 4
            && x.axis(1) == weight.axis(1)
            && x.axis(2) == x.axis(3)
            && weight.axis(2) == weight.axis(3)
            && patch > 0
            && side % patch == 0
            && bias.shape == [weight.axis(0)];
        self.need("Conv", fits, || {
            format!(
                "input {}, weight {}, bias {}",
                text(&x.shape),
                text(&weight.shape),
                text(&bias.shape)
            )
        })?;
        let grid = Dim::fixed(side / patch);
        let shape = vec![x.axis(0), weight.axis(0), grid, grid];
        let stride = patch as i64;
        let attributes = vec![
            ints("kernel_shape", &[stride, stride]),
            ints("strides", &[stride, stride]),
        ];
        Ok(self.node("Conv", &[x, weight, bias], attributes, shape, ElementType::F32))
    }
}
