//! Update of an iteration: epochs, minibatches, micro-batches, gradients, optimizer steps.

use std::time::Instant;

use policy::{config::PrefixCachePlace, params::Part, plan::RunPlan};

use super::{
    objective::{Objective, Passes},
    optimizers::Optimizers,
    reference::Reference,
    report::UpdateReport,
    tally::Tally,
};
use crate::{
    batch::{
        RolloutBatch,
        minibatch::{MinibatchTotals, ShuffleSeed, micro_batches, minibatch_count, minibatches, permutation},
        prefix_store::PrefixStore,
    },
    error::Result,
    model::Pi0,
    optim::AdamW,
    ranks::Ranks,
};

/// Trained parts of the policy.
const TRAINED: [Part; 3] = [Part::Expert, Part::NoiseHead, Part::ValueHead];

/// Training of one policy on rollouts, together with the other ranks.
#[derive(Debug)]
pub struct Updater<'a> {
    plan: &'a RunPlan,
    policy: &'a Pi0,
    ranks: &'a dyn Ranks,
    objective: Objective,
    optimizers: Optimizers,
    /// Largest size of an iteration's prefixes that a warning has reported, in bytes.
    warned_of: u64,
}

impl<'a> Updater<'a> {
    /// Builds the loss of a plan and the optimizers of a policy. Copies the trained weights of rank 0 to all ranks.
    ///
    /// # Errors
    /// A loss name or an optimizer setting is invalid, or the exchange between ranks failed.
    pub fn new(plan: &'a RunPlan, policy: &'a Pi0, ranks: &'a dyn Ranks) -> Result<Self> {
        let mut weights: Vec<_> = TRAINED
            .iter()
            .flat_map(|part| policy.store().part(*part))
            .map(|(_, tensor)| tensor.detach())
            .collect();
        ranks.broadcast(&mut weights, 0)?;
        let (optim, iterations) = (&plan.config.actor.optim, plan.config.runner.max_epochs);
        Ok(Self {
            plan,
            policy,
            ranks,
            objective: Objective::new(plan, policy)?,
            optimizers: Optimizers::new(optim, iterations, &plan.heads, policy)?,
            warned_of: 0,
        })
    }

    /// Returns the trained policy.
    pub fn policy(&self) -> &'a Pi0 {
        self.policy
    }

    /// Returns the reference policy, for checkpoints; `None` for a loss without reference.
    pub fn reference(&mut self) -> Option<&mut Reference> {
        self.objective.reference()
    }

    /// Returns the optimizers of actor and critic, for checkpoints.
    pub fn optimizers(&mut self) -> (&mut AdamW, Option<&mut AdamW>) {
        (&mut self.optimizers.actor, self.optimizers.critic.as_mut())
    }

    /// Trains on one iteration's records. During the critic's warm-up the policy is unchanged. Without a critic, 0 records or records
    /// whose advantages are all 0 cause no optimizer step, so that neither momentum nor weight decay moves the weights.
    ///
    /// # Errors
    /// A shape does not fit the policy, or the exchange between ranks failed.
    pub fn update(&mut self, batch: &RolloutBatch, iteration: u32) -> Result<UpdateReport> {
        if let Some(reference) = self.objective.reference() {
            reference.begin(self.policy);
        }
        let teaches = self.optimizers.critic.is_some() || self.objective.teaches(batch);
        let report = if batch.whole.samples > 0 && teaches {
            self.train(batch, iteration)?
        } else {
            tracing::warn!(
                "iteration {}: none of the {} records has an advantage, the policy stays as it is",
                iteration + 1,
                batch.whole.samples
            );
            UpdateReport {
                records: batch.whole.samples,
                explained_variance: f64::NAN,
                ..UpdateReport::default()
            }
        };
        if let Some(reference) = self.objective.reference() {
            reference.end(self.policy);
        }
        Ok(report)
    }

    /// Stores the prefixes, then optimizes.
    fn train(&mut self, batch: &RolloutBatch, iteration: u32) -> Result<UpdateReport> {
        let begin = Instant::now();
        let prefixes = PrefixStore::fill(self.plan, self.policy, &batch.observations)?;
        self.warn_of_bound(&prefixes);
        let passes = self
            .objective
            .passes(self.plan, self.policy, batch, &prefixes, iteration, self.ranks)?;
        let prefix_seconds = begin.elapsed().as_secs_f64();
        let begin = Instant::now();
        self.policy.store().set_trainable(&TRAINED);
        let tally = optimize(self.plan, &mut self.optimizers, &passes, batch, iteration, self.ranks)?;
        self.policy.store().set_trainable(&[]);
        Ok(UpdateReport {
            credit: passes.credit(),
            records: batch.whole.records,
            prefix_cache_bytes: prefixes.bytes()?,
            prefix_seconds,
            update_seconds: begin.elapsed().as_secs_f64(),
            ..tally.finish(self.ranks)?
        })
    }

    /// Warns if the prefixes exceed the prefix cache's bound and the largest size of an earlier warning.
    fn warn_of_bound(&mut self, prefixes: &PrefixStore<'_>) {
        let (place, bound) = self.plan.prefix_cache();
        let wanted = prefixes.wanted_bytes();
        if place == PrefixCachePlace::Off || wanted <= bound.max(self.warned_of) {
            return;
        }
        self.warned_of = wanted;
        tracing::warn!(
            "the prefix cache keeps {} records; the prefixes of the others run again in every epoch: all of them take {} MB, \
             `actor.prefix_cache_mb` is {}",
            prefixes.held(),
            wanted.div_ceil(1_000_000),
            bound / 1_000_000
        );
    }
}

/// Runs proximal policy optimization (Schulman et al. 2017, algorithm 1): epochs of minibatch steps on the records of one iteration.
fn optimize(
    plan: &RunPlan,
    optimizers: &mut Optimizers,
    passes: &Passes<'_>,
    batch: &RolloutBatch,
    iteration: u32,
    ranks: &dyn Ranks,
) -> Result<Tally> {
    let (actor, algorithm) = (&plan.config.actor, &plan.config.algorithm);
    let count = minibatch_count(batch.whole.samples, actor.global_batch_size);
    let mut tally = Tally::default();
    'epochs: for epoch in 0..algorithm.update_epoch {
        let shuffle = ShuffleSeed {
            run: plan.config.runner.seed,
            iteration: u64::from(iteration),
            epoch: u64::from(epoch),
        };
        let order = permutation(batch.len(), shuffle);
        for minibatch in minibatches(&order, count) {
            optimizers.zero_grad();
            let totals = MinibatchTotals::new(minibatch, &batch.valid, ranks)?;
            for part in micro_batches(minibatch, &batch.valid, totals, actor.micro_batch_size) {
                // new log-probabilities, ratio, clipped surrogate, value loss, entropy
                let pass = passes.pass(part, epoch, tally.in_first_minibatch())?;
                (&pass.loss * part.weight).backward();
                tally.add_pass(&pass, part.weight, epoch);
            }
            optimizers.sum_gradients(ranks)?;
            let metrics = tally.end_minibatch(ranks)?;
            if let Some(step) = optimizers.step_critic()? {
                tally.add_critic_step(step);
            }
            if passes.critic_warmup() {
                continue;
            }
            if algorithm.target_kl.is_some_and(|limit| metrics.approx_kl > limit) {
                tally.stop_early();
                break 'epochs;
            }
            // clips the gradient by its norm, then steps
            let (step, lr) = optimizers.step_actor(iteration)?;
            tally.add_actor_step(step, lr);
        }
    }
    Ok(tally)
}
