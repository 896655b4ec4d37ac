//! A batch of observations in model units, and its prefix.

use policy::{dims::PolicyDims, transform::ModelInput};
use tch::{Device, Kind, Tensor, kind::Element, no_grad};

use crate::model::{ModelError, Pi0, Prefix, PrefixCache};

/// Observations as the network reads them, with pixels as bytes.
#[derive(Debug)]
pub struct ObservationBatch {
    /// Pixels, u8 `[N, cameras, size, size, 3]`.
    pub images: Tensor,
    /// Presence of each camera, bool `[N, cameras]`.
    pub image_mask: Tensor,
    /// Prompt ids, i64 `[N, prompt_len]`.
    pub prompt: Tensor,
    /// Validity of each prompt id, bool `[N, prompt_len]`.
    pub prompt_mask: Tensor,
    /// Normalized, padded state, f32 `[N, action_dim]`.
    pub state: Tensor,
}

impl ObservationBatch {
    /// Lays out observations of a policy with the sizes `dims` as one batch in main memory.
    pub fn of(inputs: &[ModelInput], dims: &PolicyDims) -> Self {
        let (n, cameras, side) = (inputs.len() as i64, dims.cameras as i64, dims.vision.image_size as i64);
        let (prompt_len, action_dim) = (dims.prompt_len as i64, dims.action_dim as i64);
        Self {
            images: rows(inputs, |input| &input.images).view([n, cameras, side, side, 3]),
            image_mask: rows(inputs, |input| &input.image_mask).view([n, cameras]),
            prompt: rows(inputs, |input| &input.prompt).view([n, prompt_len]),
            prompt_mask: rows(inputs, |input| &input.prompt_mask).view([n, prompt_len]),
            state: rows(inputs, |input| &input.state).view([n, action_dim]),
        }
    }

    /// Returns the number of observations.
    pub fn len(&self) -> i64 {
        self.prompt.size()[0]
    }

    /// Returns whether the batch is empty.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Returns the rows with the indices `rows`, i64 `[n]`.
    #[must_use]
    pub fn select(&self, rows: &Tensor) -> Self {
        let pick = |t: &Tensor| t.index_select(0, &rows.to_device(t.device()));
        Self {
            images: pick(&self.images),
            image_mask: pick(&self.image_mask),
            prompt: pick(&self.prompt),
            prompt_mask: pick(&self.prompt_mask),
            state: pick(&self.state),
        }
    }

    /// Returns the batch on a device; tensors that are on the device already are shared.
    #[must_use]
    pub fn to_device(&self, device: Device) -> Self {
        Self {
            images: self.images.to_device(device),
            image_mask: self.image_mask.to_device(device),
            prompt: self.prompt.to_device(device),
            prompt_mask: self.prompt_mask.to_device(device),
            state: self.state.to_device(device),
        }
    }

    /// Returns the pixels scaled to `[-1, 1]` by `x / 255 * 2 - 1`, f32 `[N, cameras, 3, size, size]`.
    pub fn pixels(&self) -> Tensor {
        (self.images.to_kind(Kind::Float) / 255.0 * 2.0 - 1.0)
            .permute([0, 1, 4, 2, 3])
            .contiguous()
    }

    /// Returns the prefix of these observations, computed on the policy's device.
    ///
    /// # Errors
    /// A shape does not fit the policy.
    pub fn prefix(&self, policy: &Pi0) -> Result<Prefix, ModelError> {
        let here = self.to_device(policy.device());
        policy.prefix(&here.pixels(), &here.image_mask, &here.prompt, &here.prompt_mask)
    }

    /// Returns cache and pooled output of these rows, computed in one pass without gradient. A single row is passed twice: a matrix of
    /// one row is multiplied as a vector, which sums in another order. A row's prefix must not depend on the other rows of its pass.
    ///
    /// # Errors
    /// A shape does not fit the policy.
    pub(crate) fn frozen_rows(&self, policy: &Pi0, rows: &[i64]) -> Result<(PrefixCache, Tensor), ModelError> {
        let padded = match rows {
            [one] => vec![*one, *one],
            several => several.to_vec(),
        };
        no_grad(|| {
            let prefix = self.select(&Tensor::from_slice(&padded)).prefix(policy)?;
            let own = |t: &Tensor| t.narrow(0, 0, rows.len() as i64);
            let PrefixCache { k, v, mask, .. } = &prefix.cache;
            Ok((
                PrefixCache::new(own(k), own(v), own(mask))?,
                own(&policy.pooled(&prefix)),
            ))
        })
    }

    /// Returns the prefix of a frozen vision-language model for all rows: cache and pooled output `[N, vlm width]`. Computes the prefix
    /// without gradient, in parts of `batch` rows.
    ///
    /// # Errors
    /// A shape does not fit the policy.
    pub fn frozen_prefix(&self, policy: &Pi0, batch: i64) -> Result<(PrefixCache, Tensor), ModelError> {
        let _guard = tch::no_grad_guard();
        let (mut k, mut v, mut mask, mut pooled) = (vec![], vec![], vec![], vec![]);
        let mut from = 0;
        while from < self.len() {
            let count = batch.min(self.len() - from);
            let rows = Tensor::arange_start(from, from + count, (Kind::Int64, self.prompt.device()));
            let prefix = self.select(&rows).prefix(policy)?;
            pooled.push(policy.pooled(&prefix));
            k.push(prefix.cache.k);
            v.push(prefix.cache.v);
            mask.push(prefix.cache.mask);
            from += count;
        }
        let cache = PrefixCache::new(Tensor::cat(&k, 0), Tensor::cat(&v, 0), Tensor::cat(&mask, 0))?;
        Ok((cache, Tensor::cat(&pooled, 0)))
    }
}

/// Returns one field of all inputs, concatenated.
fn rows<T: Element>(inputs: &[ModelInput], field: impl Fn(&ModelInput) -> &[T]) -> Tensor {
    Tensor::from_slice(&inputs.iter().map(field).collect::<Vec<_>>().concat())
}
