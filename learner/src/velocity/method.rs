//! What a method without likelihood does and what it reads.

use std::fmt::Debug;

use tch::{Kind, Tensor};

/// What a method knows of the chunks of an iteration when it gives credit; all slices are by sample.
#[derive(Debug, Clone, Copy)]
pub struct Episodes<'a> {
    /// Which episode.
    pub episode: &'a [usize],
    /// Whether that episode succeeded.
    pub success: &'a [bool],
    /// Advantage of `algorithm.adv_type`, normalized when configured.
    pub advantages: &'a [f32],
    /// Distance of the executed actions from those of the reference on the same initial noise, model units; empty unless
    /// [`VelocityLoss::reads_displacement`].
    pub displacement: &'a [f32],
}

/// One pass of the trained and the reference policy; every tensor but `credit` is `[B, H, A]`, f32 unless it says otherwise.
#[derive(Debug, Clone, Copy)]
pub struct Velocities<'a> {
    /// Of the trained policy, with gradient.
    pub velocity: &'a Tensor,
    /// Of the reference, without.
    pub reference: &'a Tensor,
    /// Flow-matching target `u`.
    pub target: &'a Tensor,
    /// Which elements the environment executed, bool.
    pub executed: &'a Tensor,
    /// Credit of each sample, f32 `[B]`.
    pub credit: &'a Tensor,
}

impl Velocities<'_> {
    /// Mean square distance of two velocities over the executed elements of each sample, `[B]`. An element that was not executed
    /// reaches neither the sum nor a gradient, whatever it holds.
    pub(super) fn distance(&self, a: &Tensor, b: &Tensor) -> Tensor {
        let dims: &[i64] = &[1, 2];
        let gap = (a - b).masked_fill(&self.executed.logical_not(), 0.0);
        let count = self.executed.sum_dim_intlist(dims, false, Kind::Float);
        gap.square().sum_dim_intlist(dims, false, Kind::Float) / count.clamp_min(1.0)
    }
}

/// A method without likelihood.
pub trait VelocityLoss: Debug {
    /// Whether [`Episodes::displacement`] is read: it costs `K` passes of the reference per chunk.
    fn reads_displacement(&self) -> bool {
        false
    }

    /// Whether [`Episodes::advantages`] is read: then records without any advantage teach nothing.
    fn reads_advantages(&self) -> bool {
        false
    }

    /// Credit of each sample, finite.
    fn credit(&self, episodes: &Episodes<'_>) -> Vec<f32>;

    /// The range of flow times, inside `(0, 1)`.
    fn times(&self) -> (f64, f64);

    /// Loss of each sample, f32 `[B]`, with gradient.
    fn loss(&self, input: &Velocities<'_>) -> Tensor;
}
