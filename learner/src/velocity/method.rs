//! Interface of the methods without likelihood and their inputs.

use std::fmt::Debug;

use tch::{Kind, Tensor};

/// Inputs of the credit of an iteration's chunks; all slices have one entry per sample.
#[derive(Debug, Clone, Copy)]
pub struct Episodes<'a> {
    /// Index of the episode.
    pub episode: &'a [usize],
    /// Whether the episode succeeded.
    pub success: &'a [bool],
    /// Advantage of `algorithm.adv_type`, normalized if configured.
    pub advantages: &'a [f32],
    /// Distance of the executed actions from the reference policy's actions on the same initial noise, in model units; empty
    /// unless [`VelocityLoss::reads_displacement`].
    pub displacement: &'a [f32],
}

/// Result of one pass of the trained and the reference policy. Every tensor except `credit` is `[B, H, A]`, f32 unless noted.
#[derive(Debug, Clone, Copy)]
pub struct Velocities<'a> {
    /// Velocity of the trained policy, with gradient.
    pub velocity: &'a Tensor,
    /// Velocity of the reference policy, without gradient.
    pub reference: &'a Tensor,
    /// Flow-matching target `u`.
    pub target: &'a Tensor,
    /// Mask of the elements that the environment executed, bool.
    pub executed: &'a Tensor,
    /// Credit of each sample, f32 `[B]`.
    pub credit: &'a Tensor,
}

impl Velocities<'_> {
    /// Computes the mean square distance of two velocities over the executed elements of each sample, `[B]`. An element that was
    /// not executed reaches neither the sum nor a gradient, whatever its value.
    pub(super) fn distance(&self, a: &Tensor, b: &Tensor) -> Tensor {
        let dims: &[i64] = &[1, 2];
        let gap = (a - b).masked_fill(&self.executed.logical_not(), 0.0);
        let count = self.executed.sum_dim_intlist(dims, false, Kind::Float);
        gap.square().sum_dim_intlist(dims, false, Kind::Float) / count.clamp_min(1.0)
    }
}

/// Method without likelihood.
pub trait VelocityLoss: Debug {
    /// Returns whether [`Episodes::displacement`] is read, which costs `K` passes of the reference policy per chunk.
    fn reads_displacement(&self) -> bool {
        false
    }

    /// Returns whether [`Episodes::advantages`] is read, so that records without any advantage have no effect.
    fn reads_advantages(&self) -> bool {
        false
    }

    /// Returns the credit of each sample, finite.
    fn credit(&self, episodes: &Episodes<'_>) -> Vec<f32>;

    /// Returns the range of flow times, inside `(0, 1)`.
    fn times(&self) -> (f64, f64);

    /// Computes the loss of each sample, f32 `[B]`, with gradient.
    fn loss(&self, input: &Velocities<'_>) -> Tensor;
}
