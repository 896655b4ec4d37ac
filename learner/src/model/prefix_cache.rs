//! KV cache of a prefix.

use tch::{Kind, Tensor};

use super::error::{ModelError, check_shape};

/// Keys, values and mask of a prefix, the only inputs of the expert that depend on images and prompt.
#[derive(Debug)]
pub struct PrefixCache {
    /// Keys after RoPE, `[B, depth, kv, S, head_dim]`.
    pub k: Tensor,
    /// Values, `[B, depth, kv, S, head_dim]`.
    pub v: Tensor,
    /// Mask of the valid prefix tokens, bool `[B, S]`.
    pub mask: Tensor,
    /// Whether all prefix tokens are valid, so that attention needs no mask.
    pub(super) all_valid: bool,
}

impl PrefixCache {
    /// Creates a cache from stored tensors; see the fields for the shapes.
    ///
    /// # Errors
    /// The shapes are inconsistent.
    pub fn new(k: Tensor, v: Tensor, mask: Tensor) -> Result<Self, ModelError> {
        check_shape("v", &v, &k.size())?;
        match k.size().as_slice() {
            [batch, _, _, tokens, _] => check_shape("prefix_mask", &mask, &[*batch, *tokens])?,
            found => {
                return Err(ModelError::Shape {
                    name: "k",
                    expected: vec![-1; 5],
                    found: found.to_vec(),
                });
            }
        }
        let all_valid = mask.all().int64_value(&[]) != 0;
        Ok(Self { k, v, mask, all_valid })
    }

    /// Returns a new cache of the rows `[n]` (i64).
    ///
    /// # Errors
    /// Never for rows inside the batch.
    pub fn index_select(&self, rows: &Tensor) -> Result<Self, ModelError> {
        Self::new(
            self.k.index_select(0, rows),
            self.v.index_select(0, rows),
            self.mask.index_select(0, rows),
        )
    }

    /// Returns the number of samples.
    pub fn batch(&self) -> i64 {
        self.mask.size().first().copied().unwrap_or(0)
    }

    /// Returns the number of prefix tokens, padding included.
    pub fn len(&self) -> i64 {
        self.mask.size().get(1).copied().unwrap_or(0)
    }

    /// Returns whether the prefix has no tokens.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the positions of `tokens` suffix tokens, which start at the number of valid prefix tokens. The shape is
    /// `[1, tokens]` if all prefix tokens are valid, else `[B, tokens]`.
    pub(super) fn suffix_positions(&self, tokens: i64) -> Tensor {
        let own = Tensor::arange(tokens, (Kind::Int64, self.mask.device())).unsqueeze(0);
        if self.all_valid {
            own + self.len()
        } else {
            own + self.mask.sum_dim_intlist(1, true, Kind::Int64)
        }
    }
}
