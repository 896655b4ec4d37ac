//! The pi0 and pi0.5 networks in libtorch: prefix with KV cache, velocity, value head; all sizes from `PolicyDims`.
//!
//! Public functions check the shapes that they are given; inside, tensor operations fit together by construction and end the
//! program only when memory runs out.

mod error;
mod store;
mod prefix_cache;
mod gemma;
mod siglip;
mod expert;
mod heads;
mod sampler;
mod flow_matching;

use policy::{
    dims::PolicyDims,
    params::{CriticInput, EMBEDDING, Heads, NoiseHeadDims, Pooling, VLM, ValueHeadDims},
};
use tch::{Device, Kind, Tensor};

pub use self::{
    error::ModelError,
    expert::Velocity,
    flow_matching::FlowMatching,
    prefix_cache::PrefixCache,
    sampler::Sample,
    siglip::VisionOutput,
    store::{ExportedParam, ParamStore},
};
pub(crate) use self::{error::check_shape, flow_matching::path};
use self::{
    expert::Expert,
    gemma::{Layer, Norm, PlainNorm, Rope, attention_bias},
    heads::{NoiseHead, ValueHead},
    siglip::Siglip,
};

/// The prefix pass: image and text tokens through the vision-language stack. A run reads `cache` and `out`; the steps on the way to
/// them are held for the golden tests, which find a deviation where it begins.
#[derive(Debug)]
pub struct Prefix {
    /// Keys, values, mask.
    pub cache: PrefixCache,
    /// Final-normed output `[B, S, vlm width]`, rows of padded tokens included.
    pub out: Tensor,
    /// Embeddings `[B, S, vlm width]`.
    pub embs: Tensor,
    /// Positions `[B, S]`; -1 for padding in front of the first valid token.
    pub position_ids: Tensor,
    /// Image tower outputs of all cameras, `N = B * cameras`, camera by camera within a sample.
    pub vision: VisionOutput,
}

/// A pi0 or pi0.5 policy with its weights.
#[derive(Debug)]
pub struct Pi0 {
    dims: PolicyDims,
    store: ParamStore,
    vision: Siglip,
    embedding: Tensor,
    layers: Vec<Layer<PlainNorm>>,
    norm: PlainNorm,
    expert: Expert,
    value_head: Option<ValueHead>,
    noise_head: Option<NoiseHead>,
}

impl Pi0 {
    /// The network over these weights.
    ///
    /// # Errors
    /// The sizes do not fit together, or the store was made for others.
    pub fn new(dims: PolicyDims, heads: &Heads, store: ParamStore) -> Result<Self, ModelError> {
        dims.check()?;
        let layers = (0..dims.depth)
            .map(|l| Layer::new(&store, &format!("{VLM}language_model.layers.{l}"), &dims))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            vision: Siglip::new(&store, &dims.vision)?,
            embedding: store.get(EMBEDDING)?.shallow_clone(),
            layers,
            norm: PlainNorm::new(&store, &format!("{VLM}language_model.norm"))?,
            expert: Expert::new(&store, &dims)?,
            value_head: heads
                .value
                .as_ref()
                .map(|head| ValueHead::new(&store, head))
                .transpose()?,
            noise_head: heads
                .noise
                .as_ref()
                .map(|head| NoiseHead::new(&store, head))
                .transpose()?,
            dims,
            store,
        })
    }

    /// Sizes.
    pub fn dims(&self) -> &PolicyDims {
        &self.dims
    }

    /// Weights.
    pub fn store(&self) -> &ParamStore {
        &self.store
    }

    /// Where it computes.
    pub fn device(&self) -> Device {
        self.store.device()
    }

    /// The value head, when there is one.
    pub fn value_head(&self) -> Option<&ValueHeadDims> {
        self.value_head.as_ref().map(|head| &head.dims)
    }

    /// The noise head, when there is one.
    pub fn noise_head(&self) -> Option<&NoiseHeadDims> {
        self.noise_head.as_ref().map(|head| &head.dims)
    }

    /// `[B, H, A]`.
    fn chunk_shape(&self, batch: i64) -> [i64; 3] {
        [batch, self.dims.action_horizon as i64, self.dims.action_dim as i64]
    }

    /// Encodes observations: `images` f32 `[B, cameras, 3, size, size]` in `[-1, 1]`, `image_mask` bool `[B, cameras]`, `prompt`
    /// i64 `[B, L]` and `prompt_mask` bool `[B, L]`. Tokens are the cameras in order, then the prompt.
    ///
    /// # Errors
    /// A shape that does not fit the policy. Prompt ids must lie in the vocabulary.
    pub fn prefix(
        &self,
        images: &Tensor,
        image_mask: &Tensor,
        prompt: &Tensor,
        prompt_mask: &Tensor,
    ) -> Result<Prefix, ModelError> {
        let (cameras, size) = (self.dims.cameras as i64, self.dims.vision.image_size as i64);
        let (patches, length) = (self.dims.vision.tokens() as i64, self.dims.prompt_len as i64);
        let batch = rows("prompt", prompt, length)?;
        check_shape("images", images, &[batch, cameras, 3, size, size])?;
        check_shape("image_mask", image_mask, &[batch, cameras])?;
        check_shape("prompt_mask", prompt_mask, &[batch, length])?;

        let width = self.dims.vlm.width as i64;
        let vision = self.vision.forward(&images.flatten(0, 1));
        let image_tokens = vision.projected.view([batch, cameras * patches, width]);
        // id 0 is padding: its row gets no gradient
        let text_tokens = Tensor::embedding(&self.embedding, prompt, 0, false, false) * (width as f64).sqrt();
        let embs = Tensor::cat(&[image_tokens, text_tokens], 1);
        let image_valid = image_mask
            .unsqueeze(-1)
            .expand([batch, cameras, patches], false)
            .flatten(1, 2);
        let mask = Tensor::cat(&[&image_valid, prompt_mask], 1);
        let position_ids = mask.cumsum(1, Kind::Int64) - 1;

        let rope = Rope::new(&position_ids, self.dims.head_dim);
        let all_valid = mask.all().int64_value(&[]) != 0;
        let bias = (!all_valid).then(|| {
            attention_bias(&mask.unsqueeze(2).logical_and(&mask.unsqueeze(1)))
                .unsqueeze(1)
                .unsqueeze(3)
        });
        let mut x = embs.shallow_clone();
        let (mut keys, mut values) = (
            Vec::with_capacity(self.layers.len()),
            Vec::with_capacity(self.layers.len()),
        );
        for layer in &self.layers {
            let output = layer.forward(&x, (), &rope, None, bias.as_ref());
            x = output.x;
            keys.push(output.k);
            values.push(output.v);
        }
        let (out, _) = self.norm.forward(&x, ());
        let cache = PrefixCache {
            k: Tensor::stack(&keys, 1),
            v: Tensor::stack(&values, 1),
            mask,
            all_valid,
        };
        Ok(Prefix {
            cache,
            out,
            embs,
            position_ids,
            vision,
        })
    }

    /// What `V_vlm` reads of the prefix output, `[B, vlm width]`: the mean over its valid tokens unless the head says otherwise.
    pub fn pooled(&self, prefix: &Prefix) -> Tensor {
        match self.value_head().map_or(Pooling::Mean, |head| head.pooling) {
            Pooling::Mean => {
                let mask = prefix.cache.mask.to_kind(Kind::Float).unsqueeze(-1);
                let count = mask.sum_dim_intlist(1, false, Kind::Float).clamp_min(1.0);
                (&prefix.out * mask).sum_dim_intlist(1, false, Kind::Float) / count
            }
            Pooling::First => prefix.out.select(1, 0),
            Pooling::Last => prefix.out.select(1, -1),
            Pooling::MeanPadded => prefix.out.mean_dim(1, false, Kind::Float),
        }
    }

    /// Standard deviation of the noise head, `[B, H, A]`, from the expert's output `[B, H, expert width]` of the same step; `None`
    /// without a noise head. The gradient reaches the expert.
    pub fn noise_std(&self, hidden: &Tensor) -> Option<Tensor> {
        self.noise_head.as_ref().map(|head| head.forward(hidden))
    }

    /// Velocity at `x_t` `[B, H, A]` and flow times `t` `[B]` (f32 or f64; any value per row). The state `[B, A]` is read by pi0
    /// only. Gradients reach the cache's tensors when they record them.
    ///
    /// # Errors
    /// A shape that does not fit the policy or the batch, or a missing state.
    pub fn velocity(
        &self,
        cache: &PrefixCache,
        state: Option<&Tensor>,
        x_t: &Tensor,
        t: &Tensor,
    ) -> Result<Velocity, ModelError> {
        check_shape("t", t, &[cache.batch()])?;
        self.velocity_embedded(cache, state, x_t, &self.expert.time_embedding(t))
    }

    /// [`Pi0::velocity`] with the time embedding `[B, expert width]` given (`policy::flow::time_embedding`).
    ///
    /// # Errors
    /// See [`Pi0::velocity`].
    pub fn velocity_embedded(
        &self,
        cache: &PrefixCache,
        state: Option<&Tensor>,
        x_t: &Tensor,
        time_emb: &Tensor,
    ) -> Result<Velocity, ModelError> {
        let batch = cache.batch();
        let (depth, kv, head_dim) = (
            self.dims.depth as i64,
            self.dims.kv_heads as i64,
            self.dims.head_dim as i64,
        );
        check_shape("k", &cache.k, &[batch, depth, kv, cache.len(), head_dim])?;
        check_shape("x_t", x_t, &self.chunk_shape(batch))?;
        check_shape("time_emb", time_emb, &[batch, self.dims.expert.width as i64])?;
        if let Some(state) = state {
            check_shape("state", state, &[batch, self.dims.action_dim as i64])?;
        }
        self.expert.forward(cache, state, x_t, time_emb)
    }

    /// Time embedding `[n, expert width]` f32 of flow times `[n]`, computed in f64.
    pub fn time_embedding(&self, t: &Tensor) -> Tensor {
        self.expert.time_embedding(t)
    }

    /// `V_vlm` `[B]` of the pooled prefix `[B, vlm width]`, followed by the state `[B, A]` when the head reads it.
    ///
    /// # Errors
    /// There is no value head on the prefix, or a shape does not fit.
    pub fn value_vlm(&self, pooled: &Tensor, state: &Tensor) -> Result<Tensor, ModelError> {
        let head = self
            .value_head
            .as_ref()
            .filter(|head| head.dims.input == CriticInput::Vlm)
            .ok_or(ModelError::NoValueHead)?;
        let batch = rows("pooled", pooled, self.dims.vlm.width as i64)?;
        if !head.dims.state {
            return Ok(head.forward(pooled));
        }
        check_shape("state", state, &[batch, self.dims.action_dim as i64])?;
        Ok(head.forward(&Tensor::cat(&[pooled, state], 1)))
    }

    /// `V_expert` `[B]` of the action features `[B, H, expert width]`: their mean over the horizon, or over the executed tokens when the
    /// head says so; `None` without an expert value head.
    pub fn value_expert(&self, hidden: &Tensor) -> Option<Tensor> {
        let head = self
            .value_head
            .as_ref()
            .filter(|head| head.dims.input == CriticInput::Expert)?;
        let read = match head.dims.tokens {
            Some(tokens) => hidden.narrow(1, 0, tokens as i64),
            None => hidden.shallow_clone(),
        };
        Some(head.forward(&read.mean_dim(1, false, Kind::Float)))
    }
}

/// Returns the number of rows of a matrix that has to be `width` wide.
fn rows(name: &'static str, matrix: &Tensor, width: i64) -> Result<i64, ModelError> {
    match matrix.size().as_slice() {
        [count, found] if *found == width => Ok(*count),
        found => Err(ModelError::Shape {
            name,
            expected: vec![-1, width],
            found: found.to_vec(),
        }),
    }
}
