//! The action expert: state, noisy actions and flow time to velocity, over the prefix cache.

use std::f64::consts::TAU;

use policy::{
    dims::{PolicyDims, Variant},
    flow::{MAX_PERIOD, MIN_PERIOD},
    params::EXPERT,
};
use tch::{Device, Kind, Tensor};

use super::{
    ModelError, PrefixCache,
    gemma::{AdaptiveNorm, FORBIDDEN, Layer, Linear, Norm, PlainNorm, Rope, attention_bias},
    store::ParamStore,
};

/// Velocity of one call. A run reads `v_t` and `hidden`; the other fields are held for the golden tests, which find a deviation where it
/// begins.
#[derive(Debug)]
pub struct Velocity {
    /// Velocity `[B, H, A]`.
    pub v_t: Tensor,
    /// Final-normed expert output of the action tokens, `[B, H, expert width]`.
    pub hidden: Tensor,
    /// Final-normed expert output of all suffix tokens (pi0: the state token first), `[B, suffix, expert width]`.
    pub suffix_out: Tensor,
    /// Suffix embeddings `[B, suffix, expert width]`.
    pub suffix_embs: Tensor,
    /// adaRMS condition `[B, expert width]`, pi0.5 only.
    pub adarms_cond: Option<Tensor>,
    /// Suffix positions `[b, suffix]`, `b` is 1 when all samples share them.
    pub position_ids: Tensor,
}

/// How flow time enters, and the layers with the norms that this takes.
#[derive(Debug)]
enum TimeMixer {
    /// pi0: a state token, and an MLP over action embedding and time embedding.
    Pi0 {
        state: Linear,
        mlp_in: Linear,
        mlp_out: Linear,
        stack: Stack<PlainNorm>,
    },
    /// pi0.5: an MLP over the time embedding gives the condition of every norm.
    Pi05 {
        mlp_in: Linear,
        mlp_out: Linear,
        stack: Stack<AdaptiveNorm>,
    },
}

/// The layers and the final norm.
#[derive(Debug)]
struct Stack<N> {
    layers: Vec<Layer<N>>,
    norm: N,
}

impl<N: Norm> Stack<N> {
    fn new(store: &ParamStore, dims: &PolicyDims) -> Result<Self, ModelError> {
        Ok(Self {
            layers: (0..dims.depth)
                .map(|l| Layer::new(store, &format!("{EXPERT}layers.{l}"), dims))
                .collect::<Result<_, _>>()?,
            norm: N::new(store, &format!("{EXPERT}norm"))?,
        })
    }

    /// Returns the final-normed output of the suffix embeddings, both `[B, suffix, width]`.
    fn forward(
        &self,
        suffix_embs: &Tensor,
        condition: N::Condition<'_>,
        rope: &Rope,
        cache: &PrefixCache,
        bias: Option<&Tensor>,
    ) -> Tensor {
        let mut x = suffix_embs.shallow_clone();
        for (index, layer) in self.layers.iter().enumerate() {
            let past = (&cache.k.select(1, index as i64), &cache.v.select(1, index as i64));
            x = layer.forward(&x, condition, rope, Some(past), bias).x;
        }
        self.norm.forward(&x, condition).0
    }
}

/// Action expert with its projections.
#[derive(Debug)]
pub(super) struct Expert {
    action_in: Linear,
    action_out: Linear,
    mixer: TimeMixer,
    /// Angular frequencies of the time embedding, f64 `[width / 2]`.
    angular: Tensor,
    width: i64,
    horizon: i64,
    /// Suffix tokens.
    tokens: i64,
    head_dim: usize,
}

impl Expert {
    pub(super) fn new(store: &ParamStore, dims: &PolicyDims) -> Result<Self, ModelError> {
        let mixer = match dims.variant {
            Variant::Pi0 => TimeMixer::Pi0 {
                state: Linear::new(store, "state_proj")?,
                mlp_in: Linear::new(store, "action_time_mlp_in")?,
                mlp_out: Linear::new(store, "action_time_mlp_out")?,
                stack: Stack::new(store, dims)?,
            },
            Variant::Pi05 => TimeMixer::Pi05 {
                mlp_in: Linear::new(store, "time_mlp_in")?,
                mlp_out: Linear::new(store, "time_mlp_out")?,
                stack: Stack::new(store, dims)?,
            },
        };
        Ok(Self {
            action_in: Linear::new(store, "action_in_proj")?,
            action_out: Linear::new(store, "action_out_proj")?,
            mixer,
            angular: angular_frequencies(dims.expert.width, store.device()),
            width: dims.expert.width as i64,
            horizon: dims.action_horizon as i64,
            tokens: dims.suffix_len() as i64,
            head_dim: dims.head_dim,
        })
    }

    /// Time embedding `[B, width]` f32 of flow times `[B]`, computed in f64 (`policy::flow::time_embedding` for tensors).
    pub(super) fn time_embedding(&self, t: &Tensor) -> Tensor {
        let angles = t.to_kind(Kind::Double).unsqueeze(-1) * &self.angular;
        Tensor::cat(&[angles.sin(), angles.cos()], -1).to_kind(Kind::Float)
    }

    /// Velocity at `x_t` `[B, H, A]`, time embedding `[B, width]`; the state `[B, A]` is read by pi0 only.
    pub(super) fn forward(
        &self,
        cache: &PrefixCache,
        state: Option<&Tensor>,
        x_t: &Tensor,
        time_emb: &Tensor,
    ) -> Result<Velocity, ModelError> {
        let position_ids = cache.suffix_positions(self.tokens);
        let rope = Rope::new(&position_ids, self.head_dim);
        let bias = self.bias(cache);
        let actions = self.action_in.forward(x_t);
        let (suffix_embs, suffix_out, adarms_cond) = match &self.mixer {
            TimeMixer::Pi0 {
                state: state_proj,
                mlp_in,
                mlp_out,
                stack,
            } => {
                let state = state.ok_or(ModelError::NoState)?;
                // the layer's input is [action ; time] side by side; time is the same for all tokens of a sample
                let action_part = actions.linear(&mlp_in.weight.narrow(1, 0, self.width), None::<&Tensor>);
                let time_weight = mlp_in.weight.narrow(1, self.width, self.width);
                let time_part = time_emb.linear(&time_weight, mlp_in.bias.as_ref()).unsqueeze(1);
                let tokens = mlp_out.forward(&(action_part + time_part).silu());
                let embs = Tensor::cat(&[state_proj.forward(state).unsqueeze(1), tokens], 1);
                let out = stack.forward(&embs, (), &rope, cache, bias.as_ref());
                (embs, out, None)
            }
            TimeMixer::Pi05 { mlp_in, mlp_out, stack } => {
                let condition = mlp_out.forward(&mlp_in.forward(time_emb).silu()).silu();
                let out = stack.forward(&actions, &condition, &rope, cache, bias.as_ref());
                (actions, out, Some(condition))
            }
        };
        let hidden = suffix_out.narrow(1, self.tokens - self.horizon, self.horizon);
        let v_t = self.action_out.forward(&hidden);
        Ok(Velocity {
            v_t,
            hidden,
            suffix_out,
            suffix_embs,
            adarms_cond,
            position_ids,
        })
    }

    /// Attention bias `[b, 1, suffix, 1, S + suffix]`: padded prefix tokens are hidden, and pi0's state token sees no action.
    /// Nothing when every pair is allowed.
    fn bias(&self, cache: &PrefixCache) -> Option<Tensor> {
        let tokens = self.tokens;
        let has_state = matches!(self.mixer, TimeMixer::Pi0 { .. });
        if cache.all_valid && !has_state {
            return None;
        }
        let device = cache.mask.device();
        let within = Tensor::zeros([tokens, tokens], (Kind::Float, device));
        if has_state {
            drop(within.select(0, 0).narrow(0, 1, tokens - 1).fill_(FORBIDDEN));
        }
        let prefix = cache.len();
        let bias = if cache.all_valid {
            Tensor::cat(&[&Tensor::zeros([tokens, prefix], (Kind::Float, device)), &within], 1).unsqueeze(0)
        } else {
            let batch = cache.batch();
            let padded = attention_bias(&cache.mask)
                .unsqueeze(1)
                .expand([batch, tokens, prefix], false);
            Tensor::cat(
                &[&padded, &within.unsqueeze(0).expand([batch, tokens, tokens], false)],
                2,
            )
        };
        Some(bias.unsqueeze(1).unsqueeze(3))
    }
}

/// `2 pi / period`, periods geometric from [`MIN_PERIOD`] to [`MAX_PERIOD`].
fn angular_frequencies(width: usize, device: Device) -> Tensor {
    // at least 2: `PolicyDims::check` refuses an expert narrower than 4
    let half = width / 2;
    let frequencies: Vec<f64> = (0..half)
        .map(|j| {
            let fraction = j as f64 / (half - 1) as f64;
            TAU / (MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD).powf(fraction))
        })
        .collect();
    Tensor::from_slice(&frequencies).to_device(device)
}
