//! SigLIP image tower: patches, position table, pre-norm blocks, final norm, projection to the language width.

use policy::{dims::VisionDims, params::VLM};
use tch::{Kind, Tensor};

use super::{
    ModelError,
    gemma::{Linear, NORM_EPS},
    store::ParamStore,
};

/// Outputs of the image tower for `N` images.
#[derive(Debug)]
pub struct VisionOutput {
    /// Sum of patch embedding and position embedding, `[N, tokens, width]`.
    pub patch_pos_emb: Tensor,
    /// Output of the final LayerNorm, `[N, tokens, width]`.
    pub last_hidden: Tensor,
    /// Projection to the width of the language model, `[N, tokens, vlm width]`.
    pub projected: Tensor,
}

#[derive(Debug)]
struct LayerNorm(Linear);

impl LayerNorm {
    fn forward(&self, x: &Tensor) -> Tensor {
        x.layer_norm(
            self.0.weight.size(),
            Some(&self.0.weight),
            self.0.bias.as_ref(),
            NORM_EPS,
            false,
        )
    }
}

#[derive(Debug)]
struct Block {
    norm1: LayerNorm,
    q: Linear,
    k: Linear,
    v: Linear,
    out: Linear,
    norm2: LayerNorm,
    fc1: Linear,
    fc2: Linear,
}

/// SigLIP tower and projector.
#[derive(Debug)]
pub(super) struct Siglip {
    patch: Linear,
    positions: Tensor,
    blocks: Vec<Block>,
    norm: LayerNorm,
    projector: Linear,
    heads: i64,
    stride: i64,
}

impl Siglip {
    pub(super) fn new(store: &ParamStore, dims: &VisionDims) -> Result<Self, ModelError> {
        let tower = format!("{VLM}vision_tower.vision_model");
        let blocks = (0..dims.depth)
            .map(|l| {
                let linear = |part: &str| Linear::new(store, &format!("{tower}.encoder.layers.{l}.{part}"));
                Ok(Block {
                    norm1: LayerNorm(linear("layer_norm1")?),
                    q: linear("self_attn.q_proj")?,
                    k: linear("self_attn.k_proj")?,
                    v: linear("self_attn.v_proj")?,
                    out: linear("self_attn.out_proj")?,
                    norm2: LayerNorm(linear("layer_norm2")?),
                    fc1: linear("mlp.fc1")?,
                    fc2: linear("mlp.fc2")?,
                })
            })
            .collect::<Result<_, ModelError>>()?;
        Ok(Self {
            patch: Linear::new(store, &format!("{tower}.embeddings.patch_embedding"))?,
            positions: store
                .get(&format!("{tower}.embeddings.position_embedding.weight"))?
                .shallow_clone(),
            blocks,
            norm: LayerNorm(Linear::new(store, &format!("{tower}.post_layernorm"))?),
            projector: Linear::new(store, &format!("{VLM}multi_modal_projector.linear"))?,
            heads: dims.heads as i64,
            stride: dims.patch as i64,
        })
    }

    /// Encodes images `[N, 3, size, size]` in `[-1, 1]`. Patches are numbered row by row.
    pub(super) fn forward(&self, images: &Tensor) -> VisionOutput {
        let stride = [self.stride, self.stride];
        let patches = images.conv2d(&self.patch.weight, self.patch.bias.as_ref(), stride, [0, 0], [1, 1], 1);
        let patch_pos_emb = patches.flatten(2, 3).transpose(1, 2) + &self.positions;
        let mut x = patch_pos_emb.shallow_clone();
        for block in &self.blocks {
            let normed = block.norm1.forward(&x);
            x = &x + block.out.forward(&self.attend(block, &normed));
            let hidden = block.fc1.forward(&block.norm2.forward(&x)).gelu("tanh");
            x = &x + block.fc2.forward(&hidden);
        }
        let last_hidden = self.norm.forward(&x);
        let projected = self.projector.forward(&last_hidden);
        VisionOutput {
            patch_pos_emb,
            last_hidden,
            projected,
        }
    }

    fn attend(&self, block: &Block, x: &Tensor) -> Tensor {
        let (count, tokens, width) = match x.size().as_slice() {
            [count, tokens, width] => (*count, *tokens, *width),
            _ => (1, 1, self.heads),
        };
        let head_dim = width / self.heads;
        let split = |y: Tensor| {
            y.view([count, tokens, self.heads, head_dim])
                .transpose(1, 2)
                .reshape([-1, tokens, head_dim])
        };
        let q = split(block.q.forward(x)) * (head_dim as f64).sqrt().recip();
        let scores = q.bmm(&split(block.k.forward(x)).transpose(1, 2));
        let attended = scores.softmax(-1, Kind::Float).bmm(&split(block.v.forward(x)));
        attended
            .view([count, self.heads, tokens, head_dim])
            .transpose(1, 2)
            .reshape([count, tokens, width])
    }
}
