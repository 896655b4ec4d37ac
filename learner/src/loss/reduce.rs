//! Reductions of the losses: levels of the log-probability, companion tensors, masked means.

use policy::config::LogprobType;
use tch::{Kind, Tensor};

use super::{LossError, Result};

/// Sums element-wise log-probabilities (or entropies) `[N, C, D]` to the level's shape `[N, C, D]`, `[N, C]` or `[N]`: the joint
/// density of independent elements is the product of the elements' densities.
pub fn aggregate_logprob(logprob: &Tensor, level: LogprobType) -> Result<Tensor> {
    if logprob.dim() != 3 {
        return Err(LossError::NotElementwise { found: logprob.size() });
    }
    let none: Option<Kind> = None;
    Ok(match level {
        LogprobType::TokenLevel => logprob.shallow_clone(),
        LogprobType::ActionLevel => logprob.sum_dim_intlist([2i64].as_slice(), false, none),
        LogprobType::ChunkLevel => logprob.sum_dim_intlist([1i64, 2].as_slice(), false, none),
    })
}

/// Reshapes a companion tensor to the rank of `like`, so that later operations broadcast over trailing dimensions only.
/// Without trailing sizes of 1 the shape must be a prefix of `like`'s shape; sizes of 1 are then appended.
pub fn align(name: &'static str, tensor: &Tensor, like_name: &'static str, like: &Tensor) -> Result<Tensor> {
    let (found, expected) = (tensor.size(), like.size());
    let mut shape = found.clone();
    while shape.len() > 1 && shape.last() == Some(&1) {
        shape.pop();
    }
    if shape.is_empty() != expected.is_empty() || !expected.starts_with(&shape) {
        return Err(LossError::Shape {
            name,
            found,
            like: like_name,
            expected,
        });
    }
    shape.resize(expected.len(), 1);
    Ok(tensor.reshape(shape))
}

/// Returns the mean over the elements whose mask is set, 0 without such an element. `mask` has the rank of `values` and is
/// broadcast over `values`. Masked elements do not reach the result even if they are not finite.
pub fn masked_mean(values: &Tensor, mask: Option<&Tensor>) -> Tensor {
    let Some(mask) = mask else {
        return values.mean(values.kind());
    };
    let mask = mask.to_kind(Kind::Bool).expand_as(values);
    let count = mask.sum(Kind::Int64).clamp_min(1).to_kind(values.kind());
    values.masked_fill(&mask.logical_not(), 0.0).sum(values.kind()) / count
}

/// Returns the mean over all elements of `values * mask * episode_steps / episode_len`. Every episode has the same weight,
/// whatever its length, if all rows of a lock-step rollout (valid or not) are present. Elements of an episode of length 0 count
/// as masked.
pub fn episode_weighted_mean(values: &Tensor, mask: &Tensor, episode_len: &Tensor, episode_steps: f64) -> Tensor {
    let episode_len = episode_len.to_kind(values.kind());
    let valid = mask
        .to_kind(Kind::Bool)
        .logical_and(&episode_len.ge(1))
        .expand_as(values);
    let weighted = values * episode_steps / episode_len.clamp_min(1.0);
    weighted.masked_fill(&valid.logical_not(), 0.0).mean(values.kind())
}

/// Reduces by [`episode_weighted_mean`] if mask, episode lengths and `episode_steps` are given, else by [`masked_mean`].
pub(super) fn aggregate(
    values: &Tensor,
    mask: Option<&Tensor>,
    episode_len: Option<&Tensor>,
    episode_steps: Option<f64>,
) -> Result<Tensor> {
    Ok(match (mask, episode_len, episode_steps) {
        (Some(mask), Some(episode_len), Some(episode_steps)) => {
            let episode_len = align("episode_len", episode_len, "logprob", values)?;
            episode_weighted_mean(values, mask, &episode_len, episode_steps)
        }
        _ => masked_mean(values, mask),
    })
}

/// Copies scalars to the host in one transfer.
pub(super) fn read_metrics<const N: usize>(scalars: &[Tensor; N]) -> Result<[f64; N]> {
    let scalars: Vec<Tensor> = scalars
        .iter()
        .map(|scalar| scalar.detach().to_kind(Kind::Double))
        .collect();
    let mut values = [0.0; N];
    Tensor::f_stack(&scalars, 0)
        .and_then(|stacked| stacked.f_to_device(tch::Device::Cpu))
        .and_then(|stacked| stacked.f_copy_data(&mut values, N))
        .map_err(|source| LossError::Metrics { source })?;
    Ok(values)
}
