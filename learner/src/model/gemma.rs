//! Gemma blocks shared by the vision-language stack and the action expert: RMSNorm, adaRMS, RoPE, grouped-query attention, gated MLP.

use policy::dims::PolicyDims;
use tch::{Kind, Tensor};

use super::{ModelError, store::ParamStore};

/// Added under the root of every norm.
pub(super) const NORM_EPS: f64 = 1e-6;
/// Base of the rotary frequencies.
const ROPE_THETA: f64 = 10_000.0;
/// Added to the score of a forbidden pair. It is finite: a row without any allowed key becomes uniform over all keys, as in openpi.
pub(super) const FORBIDDEN: f64 = -2.381_976_3e38;

/// A linear layer `y = x W^T + b`.
#[derive(Debug)]
pub(super) struct Linear {
    /// `[out, in]`.
    pub(super) weight: Tensor,
    /// `[out]`.
    pub(super) bias: Option<Tensor>,
}

impl Linear {
    /// Weight and bias of this name.
    pub(super) fn new(store: &ParamStore, name: &str) -> Result<Self, ModelError> {
        let weight = store.get(&format!("{name}.weight"))?.shallow_clone();
        let bias = store.get(&format!("{name}.bias"))?.shallow_clone();
        Ok(Self {
            weight,
            bias: Some(bias),
        })
    }

    /// The weight of this name, no bias.
    pub(super) fn without_bias(store: &ParamStore, name: &str) -> Result<Self, ModelError> {
        Ok(Self {
            weight: store.get(&format!("{name}.weight"))?.shallow_clone(),
            bias: None,
        })
    }

    pub(super) fn forward(&self, x: &Tensor) -> Tensor {
        x.linear(&self.weight, self.bias.as_ref())
    }
}

/// An RMSNorm, `x / rms(x)`, and what follows it.
pub(super) trait Norm: Sized {
    /// What the norm reads besides `x`.
    type Condition<'a>: Copy;

    /// Takes the weights of this name.
    fn new(store: &ParamStore, name: &str) -> Result<Self, ModelError>;

    /// Returns the normed `x` `[B, T, W]` and, for adaRMS, the gate `[B, 1, W]` of the block's output.
    fn forward(&self, x: &Tensor, condition: Self::Condition<'_>) -> (Tensor, Option<Tensor>);
}

/// The norm of Gemma: times `1 + w`.
#[derive(Debug)]
pub(super) struct PlainNorm {
    /// `[width]`.
    weight: Tensor,
}

impl Norm for PlainNorm {
    type Condition<'a> = ();

    fn new(store: &ParamStore, name: &str) -> Result<Self, ModelError> {
        Ok(Self {
            weight: store.get(&format!("{name}.weight"))?.shallow_clone(),
        })
    }

    fn forward(&self, x: &Tensor, (): ()) -> (Tensor, Option<Tensor>) {
        (rms_normed(x) * (&self.weight + 1.0), None)
    }
}

/// The norm of pi0.5's expert (adaRMS): modulated by a condition `[B, width]`.
#[derive(Debug)]
pub(super) struct AdaptiveNorm {
    /// `[3 width, width]`, gives scale, shift and gate.
    dense: Linear,
}

impl Norm for AdaptiveNorm {
    type Condition<'a> = &'a Tensor;

    fn new(store: &ParamStore, name: &str) -> Result<Self, ModelError> {
        Ok(Self {
            dense: Linear::new(store, &format!("{name}.dense"))?,
        })
    }

    fn forward(&self, x: &Tensor, condition: &Tensor) -> (Tensor, Option<Tensor>) {
        let normed = rms_normed(x);
        let mut modulation = self.dense.forward(condition).unsqueeze(1).chunk(3, -1);
        // 3 * width columns always make three chunks
        let gate = modulation.swap_remove(2);
        let (scale, shift) = (&modulation[0], &modulation[1]);
        (shift.addcmul(&normed, &(scale + 1.0)), Some(gate))
    }
}

/// `x / rms(x)`.
fn rms_normed(x: &Tensor) -> Tensor {
    x * (x.square().mean_dim(-1, true, Kind::Float) + NORM_EPS).rsqrt()
}

/// `x + f`, or `x + gate * f` under adaRMS.
fn residual(x: &Tensor, f: &Tensor, gate: Option<&Tensor>) -> Tensor {
    match gate {
        Some(gate) => x.addcmul(gate, f),
        None => x + f,
    }
}

/// Rotary tables of one call, shared by all layers. Rotation pairs element `j` with `j + head_dim / 2`.
#[derive(Debug)]
pub(super) struct Rope {
    /// `[b, T, 1, head_dim]`, `b` is 1 or the batch; the same angle in both halves.
    cos: Tensor,
    /// The same with the first half negated.
    sin: Tensor,
    /// Both times `head_dim^-0.5`: the attention's scale rides on the rotation of the queries.
    query_cos: Tensor,
    query_sin: Tensor,
    half: i64,
}

impl Rope {
    /// Tables for positions `[b, T]`.
    pub(super) fn new(positions: &Tensor, head_dim: usize) -> Self {
        let half = head_dim / 2;
        let frequencies: Vec<f32> = (0..half)
            .map(|j| ROPE_THETA.powf(-2.0 * j as f64 / head_dim as f64) as f32)
            .collect();
        let frequencies = Tensor::from_slice(&frequencies).to_device(positions.device());
        let angles = positions.to_kind(Kind::Float).unsqueeze(-1) * frequencies;
        let (cos, sin) = (angles.cos(), angles.sin());
        let cos = Tensor::cat(&[&cos, &cos], -1).unsqueeze(2);
        let sin = Tensor::cat(&[&sin.neg(), &sin], -1).unsqueeze(2);
        let scale = (head_dim as f64).sqrt().recip();
        Self {
            query_cos: &cos * scale,
            query_sin: &sin * scale,
            cos,
            sin,
            half: half as i64,
        }
    }

    fn key(&self, x: &Tensor) -> Tensor {
        (x * &self.cos).addcmul(&x.roll(self.half, -1), &self.sin)
    }

    fn query(&self, x: &Tensor) -> Tensor {
        (x * &self.query_cos).addcmul(&x.roll(self.half, -1), &self.query_sin)
    }
}

/// What a layer gives: the new token features and its own keys and values.
pub(super) struct LayerOutput {
    /// `[B, T, W]`.
    pub(super) x: Tensor,
    /// `[B, kv, T, head_dim]`, rotated.
    pub(super) k: Tensor,
    /// `[B, kv, T, head_dim]`.
    pub(super) v: Tensor,
}

/// One Gemma layer.
#[derive(Debug)]
pub(super) struct Layer<N> {
    norm1: N,
    q: Linear,
    k: Linear,
    v: Linear,
    o: Linear,
    norm2: N,
    gate: Linear,
    up: Linear,
    down: Linear,
    heads: i64,
    kv_heads: i64,
    head_dim: i64,
}

impl<N: Norm> Layer<N> {
    pub(super) fn new(store: &ParamStore, name: &str, dims: &PolicyDims) -> Result<Self, ModelError> {
        let linear = |part: &str| Linear::without_bias(store, &format!("{name}.{part}"));
        Ok(Self {
            norm1: N::new(store, &format!("{name}.input_layernorm"))?,
            q: linear("self_attn.q_proj")?,
            k: linear("self_attn.k_proj")?,
            v: linear("self_attn.v_proj")?,
            o: linear("self_attn.o_proj")?,
            norm2: N::new(store, &format!("{name}.post_attention_layernorm"))?,
            gate: linear("mlp.gate_proj")?,
            up: linear("mlp.up_proj")?,
            down: linear("mlp.down_proj")?,
            heads: dims.heads as i64,
            kv_heads: dims.kv_heads as i64,
            head_dim: dims.head_dim as i64,
        })
    }

    /// One layer on `x` `[B, T, W]`. `past`: keys and values `[B, kv, S, head_dim]` in front of the own ones; `bias`: additive,
    /// broadcastable to `[B, kv, T, heads / kv, S + T]`.
    pub(super) fn forward(
        &self,
        x: &Tensor,
        condition: N::Condition<'_>,
        rope: &Rope,
        past: Option<(&Tensor, &Tensor)>,
        bias: Option<&Tensor>,
    ) -> LayerOutput {
        let (normed, gate) = self.norm1.forward(x, condition);
        let (attended, k, v) = self.attend(&normed, rope, past, bias);
        let x = residual(x, &self.o.forward(&attended), gate.as_ref());
        let (normed, gate) = self.norm2.forward(&x, condition);
        let hidden = self.gate.forward(&normed).gelu("tanh") * self.up.forward(&normed);
        let x = residual(&x, &self.down.forward(&hidden), gate.as_ref());
        LayerOutput { x, k, v }
    }

    /// Grouped-query attention. The query heads of one key-value head are folded into rows, so that each key is read once.
    fn attend(
        &self,
        x: &Tensor,
        rope: &Rope,
        past: Option<(&Tensor, &Tensor)>,
        bias: Option<&Tensor>,
    ) -> (Tensor, Tensor, Tensor) {
        // `x` is `[B, T, W]` in every call
        let size = x.size();
        let (batch, tokens) = (size[0], size[1]);
        let (kv, group, width) = (self.kv_heads, self.heads / self.kv_heads, self.head_dim);
        let q = rope.query(&self.q.forward(x).view([batch, tokens, self.heads, width]));
        let q = q
            .view([batch, tokens, kv, group, width])
            .permute([0, 2, 1, 3, 4])
            .reshape([-1, tokens * group, width]);
        let k = rope
            .key(&self.k.forward(x).view([batch, tokens, kv, width]))
            .transpose(1, 2);
        let v = self.v.forward(x).view([batch, tokens, kv, width]).transpose(1, 2);
        let (keys, values) = match past {
            Some((past_k, past_v)) => (Tensor::cat(&[past_k, &k], 2), Tensor::cat(&[past_v, &v], 2)),
            None => (k.shallow_clone(), v.shallow_clone()),
        };
        // keys are `[B, kv, S + T, head_dim]`
        let total = keys.size()[2];
        let scores = q.bmm(&keys.reshape([-1, total, width]).transpose(1, 2));
        if let Some(bias) = bias {
            // in place: the backward pass of the product does not read its result
            let mut by_head = scores.view([batch, kv, tokens, group, total]);
            drop(by_head.g_add_(bias));
        }
        let attended = scores.softmax(-1, Kind::Float).bmm(&values.reshape([-1, total, width]));
        let attended = attended
            .view([batch, kv, tokens, group, width])
            .permute([0, 2, 1, 3, 4]);
        (attended.reshape([batch, tokens, self.heads * width]), k, v)
    }
}

/// Turns "may attend" `bool` into an additive bias.
pub(super) fn attention_bias(allowed: &Tensor) -> Tensor {
    allowed
        .zeros_like()
        .to_kind(Kind::Float)
        .masked_fill(&allowed.logical_not(), FORBIDDEN)
}
