//! Sizes of a policy, from which the network, the graphs and the buffers are built.

use serde::{Deserialize, Serialize};

/// One of the two published architectures.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Variant {
    /// pi0: a state token and a time MLP mixed into the action tokens.
    Pi0,
    /// pi0.5: no state token; flow time enters through adaptive RMSNorm (adaRMS).
    Pi05,
}

/// Width and MLP width of one transformer stack.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StackDims {
    /// Token width.
    pub width: usize,
    /// Hidden width of the gated MLP.
    pub mlp: usize,
}

/// Sizes of the SigLIP image tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VisionDims {
    /// Token width.
    pub width: usize,
    /// Hidden width of the MLP.
    pub mlp: usize,
    /// Number of blocks.
    pub depth: usize,
    /// Attention heads.
    pub heads: usize,
    /// Side of the square input image in pixels.
    pub image_size: usize,
    /// Side of a patch in pixels.
    pub patch: usize,
}

impl VisionDims {
    /// Returns the number of image tokens per camera.
    pub fn tokens(&self) -> usize {
        let side = self.image_size / self.patch;
        side * side
    }
}

/// Sizes of a pi0 or pi0.5 policy; no code assumes the published or small values.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PolicyDims {
    /// Architecture.
    pub variant: Variant,
    /// Vocabulary size of the text embedding.
    pub vocab: usize,
    /// Vision-language stack (Gemma).
    pub vlm: StackDims,
    /// Action expert stack (Gemma).
    pub expert: StackDims,
    /// Layers, in each of the two Gemma stacks.
    pub depth: usize,
    /// Query heads, in each of the two Gemma stacks.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Image tower.
    pub vision: VisionDims,
    /// Number of camera slots, in the order of the observation.
    pub cameras: usize,
    /// Prompt tokens, padding included.
    pub prompt_len: usize,
    /// Predicted action rows per chunk.
    pub action_horizon: usize,
    /// Padded action (and state) width of the model.
    pub action_dim: usize,
}

/// Sizes that do not form a policy.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("policy sizes: {0}")]
pub struct DimsError(String);

impl PolicyDims {
    /// Returns the published sizes of pi0 or pi0.5: three cameras, 32 action dimensions, horizon 50, 48 or 200 prompt tokens.
    pub fn published(variant: Variant) -> Self {
        Self {
            variant,
            vocab: 257_152,
            vlm: StackDims {
                width: 2048,
                mlp: 16_384,
            },
            expert: StackDims { width: 1024, mlp: 4096 },
            depth: 18,
            heads: 8,
            kv_heads: 1,
            head_dim: 256,
            vision: VisionDims {
                width: 1152,
                mlp: 4304,
                depth: 27,
                heads: 16,
                image_size: 224,
                patch: 14,
            },
            cameras: 3,
            prompt_len: if variant == Variant::Pi0 { 48 } else { 200 },
            action_horizon: 50,
            action_dim: 32,
        }
    }

    /// Checks that the sizes fit together.
    ///
    /// # Errors
    /// Names the first size that is out of range or does not fit, with the values found.
    pub fn check(&self) -> Result<(), DimsError> {
        let fail = |text: String| Err(DimsError(text));
        let sizes = [
            ("vocab", self.vocab),
            ("vlm.width", self.vlm.width),
            ("vlm.mlp", self.vlm.mlp),
            ("expert.width", self.expert.width),
            ("expert.mlp", self.expert.mlp),
            ("depth", self.depth),
            ("heads", self.heads),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("vision.width", self.vision.width),
            ("vision.mlp", self.vision.mlp),
            ("vision.depth", self.vision.depth),
            ("vision.heads", self.vision.heads),
            ("vision.image_size", self.vision.image_size),
            ("vision.patch", self.vision.patch),
            ("cameras", self.cameras),
            ("prompt_len", self.prompt_len),
            ("action_horizon", self.action_horizon),
            ("action_dim", self.action_dim),
        ];
        for (name, size) in sizes {
            if size == 0 || size > 1 << 20 {
                return fail(format!("`{name}` is {size}, expected 1 to {}", 1 << 20));
            }
        }
        if !self.heads.is_multiple_of(self.kv_heads) {
            return fail(format!(
                "`heads` {} is not a multiple of `kv_heads` {}",
                self.heads, self.kv_heads
            ));
        }
        if !self.head_dim.is_multiple_of(2) {
            return fail(format!(
                "`head_dim` {} is odd, rotary positions need pairs",
                self.head_dim
            ));
        }
        if !self.expert.width.is_multiple_of(2) || self.expert.width < 4 {
            return fail(format!(
                "`expert.width` {} must be even and at least 4 (time embedding)",
                self.expert.width
            ));
        }
        if !self.vision.image_size.is_multiple_of(self.vision.patch) {
            return fail(format!(
                "`vision.image_size` {} is not a multiple of `vision.patch` {}",
                self.vision.image_size, self.vision.patch
            ));
        }
        if !self.vision.width.is_multiple_of(self.vision.heads) {
            return fail(format!(
                "`vision.width` {} is not a multiple of `vision.heads` {}",
                self.vision.width, self.vision.heads
            ));
        }
        Ok(())
    }

    /// Returns the number of prefix tokens: all cameras, then the prompt.
    pub fn prefix_len(&self) -> usize {
        self.cameras * self.vision.tokens() + self.prompt_len
    }

    /// Returns the number of suffix tokens: the state token (pi0 only), then the action tokens.
    pub fn suffix_len(&self) -> usize {
        self.action_horizon + usize::from(self.variant == Variant::Pi0)
    }
}
