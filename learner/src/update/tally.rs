//! Running sums of an iteration's updates.

use tch::Tensor;

use super::report::UpdateReport;
use crate::{
    error::Result,
    loss::{ActorMetrics, CriticMetrics, ExplainedVariance},
    optim::StepReport,
    ranks::Ranks,
};

/// Loss and metrics of one micro-batch. The numbers contain the factors that make the parts of a minibatch add up to the whole,
/// except the share of the rows.
pub(super) struct Pass {
    /// Loss with gradient.
    pub(super) loss: Tensor,
    pub(super) actor: Option<ActorMetrics>,
    pub(super) critic: Option<CriticMetrics>,
    pub(super) entropy: Option<f64>,
    pub(super) gaps: Option<Gaps>,
}

/// Largest gaps between recomputed and recorded numbers, over records of the version in training; 0 without such records.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(super) struct Gaps {
    /// Largest `|logprob - recorded logprob|`.
    pub(super) logprob: f64,
    /// Largest `|ratio - 1|`.
    pub(super) ratio: f64,
    /// Largest `|value - recorded value|`.
    pub(super) value: f64,
}

impl Gaps {
    fn max(self, other: Self) -> Self {
        Self {
            logprob: self.logprob.max(other.logprob),
            ratio: self.ratio.max(other.ratio),
            value: self.value.max(other.value),
        }
    }
}

/// Running sums of an iteration.
#[derive(Debug, Default)]
pub(super) struct Tally {
    minibatches: f64,
    /// This rank's part of the incomplete minibatch.
    minibatch: ActorMetrics,
    /// Sum over the minibatches of all ranks.
    actor: ActorMetrics,
    /// Sum over the minibatches of this rank, like `value_loss` and `value_clip_fraction`.
    entropy: f64,
    value_loss: f64,
    value_clip_fraction: f64,
    explained_variance: ExplainedVariance,
    gaps: Gaps,
    last_kl: f64,
    grad_norm: f64,
    updates: u64,
    skipped: u64,
    lr: f64,
    stopped_early: bool,
}

impl Tally {
    /// Returns whether no minibatch is complete, so that the weights are unchanged since the iteration's start.
    pub(super) fn in_first_minibatch(&self) -> bool {
        self.minibatches == 0.0
    }

    /// Adds a micro-batch, whose share of the minibatch's rows is `weight`.
    pub(super) fn add_pass(&mut self, pass: &Pass, weight: f64, epoch: u32) {
        if let Some(gaps) = pass.gaps {
            self.gaps = self.gaps.max(gaps);
        }
        if let Some(actor) = &pass.actor {
            self.minibatch.add(actor, weight);
        }
        if let Some(entropy) = pass.entropy {
            self.entropy += entropy * weight;
        }
        if let Some(critic) = &pass.critic {
            self.value_loss += critic.value_loss * weight;
            self.value_clip_fraction += critic.value_clip_fraction * weight;
            if epoch == 0 {
                self.explained_variance.merge(&critic.explained_variance);
            }
        }
    }

    /// Completes a minibatch and returns its metrics over all ranks.
    pub(super) fn end_minibatch(&mut self, ranks: &dyn Ranks) -> Result<ActorMetrics> {
        let minibatch = std::mem::take(&mut self.minibatch).sum_over(ranks)?;
        self.minibatches += 1.0;
        self.last_kl = minibatch.approx_kl;
        self.actor.add(&minibatch, 1.0);
        Ok(minibatch)
    }

    pub(super) fn add_critic_step(&mut self, step: StepReport) {
        self.skipped += u64::from(step.skipped);
    }

    pub(super) fn add_actor_step(&mut self, step: StepReport, lr: f64) {
        self.lr = lr;
        self.skipped += u64::from(step.skipped);
        if !step.skipped {
            self.grad_norm += step.grad_norm;
            self.updates += 1;
        }
    }

    pub(super) fn stop_early(&mut self) {
        self.stopped_early = true;
    }

    /// Converts the sums of all ranks into means.
    pub(super) fn finish(self, ranks: &dyn Ranks) -> Result<UpdateReport> {
        let count = self.minibatches.max(1.0);
        let [entropy, value_loss, value_clip_fraction] =
            ranks.sum_numbers([self.entropy, self.value_loss, self.value_clip_fraction])?;
        let mut actor = ActorMetrics::default();
        actor.add(&self.actor, count.recip());
        Ok(UpdateReport {
            actor,
            logprob_gap: ranks.largest(self.gaps.logprob)?,
            first_ratio_deviation: ranks.largest(self.gaps.ratio)?,
            first_value_gap: ranks.largest(self.gaps.value)?,
            last_kl: self.last_kl,
            entropy: entropy / count,
            value_loss: value_loss / count,
            value_clip_fraction: value_clip_fraction / count,
            explained_variance: self.explained_variance.sum_over(ranks)?.value().unwrap_or(f64::NAN),
            grad_norm: self.grad_norm / (self.updates as f64).max(1.0),
            updates: self.updates,
            skipped: self.skipped,
            lr: self.lr,
            stopped_early: self.stopped_early,
            ..UpdateReport::default()
        })
    }
}
