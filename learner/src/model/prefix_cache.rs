//! The KV cache of a prefix.

use tch::{Kind, Tensor};

use super::error::{ModelError, check_shape};

/// Keys, values and mask of a prefix: all that the expert reads of an observation.
#[derive(Debug)]
pub struct PrefixCache {
    /// Keys after RoPE, `[B, depth, kv, S, head_dim]`.
    pub k: Tensor,
    /// Values, `[B, depth, kv, S, head_dim]`.
    pub v: Tensor,
    /// Which prefix tokens are valid, bool `[B, S]`.
    pub mask: Tensor,
    /// Whether all of them are: then no mask is built.
    pub(super) all_valid: bool,
}

impl PrefixCache {
    /// A cache from stored tensors (shapes at the fields).
    ///
    /// # Errors
    /// The shapes do not fit each other.
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

    /// The rows `[n]` (i64) as a cache of their own.
    ///
    /// # Errors
    /// None for rows inside the batch.
    pub fn index_select(&self, rows: &Tensor) -> Result<Self, ModelError> {
        Self::new(
            self.k.index_select(0, rows),
            self.v.index_select(0, rows),
            self.mask.index_select(0, rows),
        )
    }

    /// Samples in the cache.
    pub fn batch(&self) -> i64 {
        self.mask.size().first().copied().unwrap_or(0)
    }

    /// Prefix tokens, padding included.
    pub fn len(&self) -> i64 {
        self.mask.size().get(1).copied().unwrap_or(0)
    }

    /// Whether there is no prefix token.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Positions of `tokens` suffix tokens: they go on from the number of valid prefix tokens. `[1, tokens]` when it is the same
    /// for all samples, else `[B, tokens]`.
    pub(super) fn suffix_positions(&self, tokens: i64) -> Tensor {
        let own = Tensor::arange(tokens, (Kind::Int64, self.mask.device())).unsqueeze(0);
        if self.all_valid {
            own + self.len()
        } else {
            own + self.mask.sum_dim_intlist(1, true, Kind::Int64)
        }
    }
}
