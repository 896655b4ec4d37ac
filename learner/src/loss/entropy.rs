//! Entropy bonus (Schulman et al. 2017, eq. 9).

use tch::{Kind, Tensor};

use super::{
    Result,
    reduce::{align, masked_mean},
};

/// Returns the mean entropy of the valid elements. The mask is broadcast over the entropy's trailing dimensions, never over rows.
/// If the mask is finer than the entropy (per action for an entropy per record), a record with any valid element is valid.
pub fn mean_entropy(entropy: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let Some(mask) = mask else {
        return Ok(masked_mean(entropy, None));
    };
    let mut mask = mask.to_kind(Kind::Bool);
    while mask.dim() > entropy.dim().max(1) {
        mask = mask.any_dim(-1, false);
    }
    let mask = align("mask", &mask, "entropy", entropy)?;
    Ok(masked_mean(entropy, Some(&mask)))
}
