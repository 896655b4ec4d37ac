//! One RL iteration's updates: epochs over minibatches of chunk records, PPO on actor and critic.

pub mod logprob;
pub mod reference_records;
pub mod reference;
mod likelihood;
mod velocity;

use policy::{config::PrefixCachePlace, params::Part, plan::RunPlan};

pub use self::velocity::CreditReport;
use self::{
    likelihood::{Gaps, LikelihoodObjective},
    logprob::StepTable,
    reference::Reference,
    velocity::{Credit, VelocityObjective},
};
use crate::{
    batch::{
        RolloutBatch,
        minibatch::{ShuffleSeed, micro_batches, minibatches, permutation},
        prefix_store::PrefixStore,
    },
    error::Result,
    loss::{ActorMetrics, ExplainedVariance},
    method::{Method, method},
    model::Pi0,
    optim::{AdamW, AdamWSettings, Decay, ParamGroup, Schedule},
};

/// Trains a policy on rollouts.
#[derive(Debug)]
pub struct Updater {
    plan: RunPlan,
    objective: Objective,
    /// The actor's optimizer, then the critic's: each clips its own gradient, so that a cold critic does not slow the actor.
    actor: AdamW,
    critic: Option<AdamW>,
    /// Learning-rate factor over the actor's updates.
    rise: Schedule,
    /// Learning-rate factor over the iterations.
    fall: Schedule,
    /// Largest size of an iteration's prefixes that a warning has named.
    warned_of: u64,
}

/// What an update descends.
#[derive(Debug)]
enum Objective {
    Likelihood(Box<LikelihoodObjective>),
    Velocity(Box<VelocityObjective>),
}

/// How a micro-batch is passed in this iteration.
enum Passes<'a> {
    Likelihood(&'a LikelihoodObjective),
    Velocity(&'a VelocityObjective, Credit),
}

/// Means over the minibatches of an iteration; every number is over valid records only.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct UpdateReport {
    /// Means of the policy loss's metrics.
    pub actor: ActorMetrics,
    /// Largest `|ratio - 1|` before the first optimizer step, at the level of the ratio: the parity of engine and learner. Like the next
    /// two over records of the version in training; 0 where there is none.
    pub first_ratio_deviation: f64,
    /// Largest `|value - recorded value|` before the first optimizer step.
    pub first_value_gap: f64,
    /// Largest `|logprob - recorded logprob|` before the first optimizer step.
    pub logprob_gap: f64,
    /// KL estimate of the last minibatch.
    pub last_kl: f64,
    /// Mean entropy of the policy; 0 where the loss has none.
    pub entropy: f64,
    /// Mean value loss.
    pub value_loss: f64,
    /// Share of values moved beyond the clip.
    pub value_clip_fraction: f64,
    /// Of the returns by the critic's values during the first epoch, in which it is already trained.
    pub explained_variance: f64,
    /// Mean gradient norm of the actor.
    pub grad_norm: f64,
    /// Optimizer steps of the actor.
    pub updates: u64,
    /// Steps skipped for a gradient that was not finite.
    pub skipped: u64,
    /// Learning rate of the actor at the last step.
    pub lr: f64,
    /// Of a loss on the velocity.
    pub credit: Option<CreditReport>,
    /// Records.
    pub records: usize,
    /// Whether `target_kl` ended the iteration early.
    pub stopped_early: bool,
    /// Bytes of the frozen prefixes that were kept.
    pub prefix_cache_bytes: u64,
    /// Seconds until the frozen prefixes were kept; prefixes that are not kept run during the updates.
    pub prefix_seconds: f64,
    /// Seconds of the updates.
    pub update_seconds: f64,
}

fn group(policy: &Pi0, part: Part, name: &str, lr: f64, weight_decay: f64) -> ParamGroup {
    let params = policy
        .store()
        .part(part)
        .map(|(n, t)| (n.to_owned(), t.shallow_clone()))
        .collect();
    ParamGroup {
        name: name.to_owned(),
        lr,
        weight_decay,
        params,
    }
}

impl Updater {
    /// The optimizers and settings of a plan.
    ///
    /// # Errors
    /// An unknown loss name or optimizer setting.
    pub fn new(plan: &RunPlan, policy: &Pi0) -> Result<Self> {
        let optim = &plan.config.actor.optim;
        let objective = match method(plan)? {
            Method::Likelihood(loss) => Objective::Likelihood(Box::new(LikelihoodObjective::new(plan, loss, policy)?)),
            Method::Velocity(loss, reference) => {
                Objective::Velocity(Box::new(VelocityObjective::new(plan, loss, reference, policy)?))
            }
        };
        let adam = AdamWSettings {
            beta1: optim.betas[0],
            beta2: optim.betas[1],
            eps: optim.eps,
            clip_norm: Some(optim.clip_grad),
        };
        let mut actor = group(policy, Part::Expert, "actor", optim.lr, optim.weight_decay);
        actor
            .params
            .extend(group(policy, Part::NoiseHead, "actor", optim.lr, optim.weight_decay).params);
        let actor = AdamW::new(adam, vec![actor])?;
        let critic = match &plan.heads.value {
            Some(_) => {
                let head = group(
                    policy,
                    Part::ValueHead,
                    "value_head",
                    optim.value_lr,
                    optim.weight_decay,
                );
                Some(AdamW::new(adam, vec![head])?)
            }
            None => None,
        };
        // an iteration's number of updates varies with the episodes' lengths, so the rise counts updates and the fall iterations
        let decay = Decay::Cosine {
            total_steps: u64::from(plan.config.runner.max_epochs),
            min_factor: optim.min_lr_ratio,
        };
        Ok(Self {
            objective,
            actor,
            critic,
            rise: Schedule::warmup(u64::from(optim.lr_warmup_steps), Decay::Constant),
            fall: Schedule::warmup(0, decay),
            warned_of: 0,
            plan: plan.clone(),
        })
    }

    /// The reference policy, where the loss has one, for checkpoints.
    pub fn reference(&mut self) -> Option<&mut Reference> {
        match &mut self.objective {
            Objective::Velocity(velocity) => Some(&mut velocity.reference),
            Objective::Likelihood(likelihood) => likelihood.reference.as_mut(),
        }
    }

    /// The actor's and the critic's optimizer, for checkpoints.
    pub fn optimizers(&mut self) -> (&mut AdamW, Option<&mut AdamW>) {
        (&mut self.actor, self.critic.as_mut())
    }

    /// Trains on one iteration's records. During the critic's warm-up the policy stays as it is. Without a critic, records
    /// whose advantages are all 0 (or no records) teach nothing: no optimizer takes a step, so that neither momentum nor
    /// weight decay moves the weights.
    ///
    /// # Errors
    /// Shapes that do not fit the policy.
    pub fn update(&mut self, policy: &Pi0, batch: &RolloutBatch, iteration: u32) -> Result<UpdateReport> {
        match &mut self.objective {
            Objective::Velocity(velocity) => velocity.reference.begin(policy),
            Objective::Likelihood(likelihood) => likelihood.begin(policy, batch),
        }
        let report = self.train(policy, batch, iteration)?;
        if let Some(reference) = self.reference() {
            reference.end(policy);
        }
        Ok(report)
    }

    fn train(&mut self, policy: &Pi0, batch: &RolloutBatch, iteration: u32) -> Result<UpdateReport> {
        let informed = match &self.objective {
            Objective::Velocity(velocity) => velocity.informed(batch),
            Objective::Likelihood(_) => self.critic.is_some() || batch.informative,
        };
        if batch.is_empty() || !informed {
            tracing::warn!(
                "iteration {}: none of the {} records has an advantage, the policy stays as it is",
                iteration + 1,
                batch.len()
            );
            return Ok(UpdateReport {
                records: batch.len(),
                explained_variance: f64::NAN,
                ..UpdateReport::default()
            });
        }
        let begin = std::time::Instant::now();
        let prefixes = PrefixStore::fill(&self.plan, policy, &batch.observations)?;
        self.warn_of_bound(&prefixes);
        let warming = iteration < self.plan.config.actor.optim.critic_warmup_epochs && self.critic.is_some();
        let passes = match &self.objective {
            Objective::Velocity(velocity) => Passes::Velocity(velocity, velocity.credit(&self.plan, batch, &prefixes)?),
            Objective::Likelihood(likelihood) => Passes::Likelihood(likelihood),
        };
        let mut report = UpdateReport {
            credit: match &passes {
                Passes::Velocity(_, credit) => Some(credit.report()),
                Passes::Likelihood(_) => None,
            },
            records: batch.observations.len() as usize,
            prefix_cache_bytes: prefixes.bytes()?,
            prefix_seconds: begin.elapsed().as_secs_f64(),
            ..UpdateReport::default()
        };
        policy
            .store()
            .set_trainable(&[Part::Expert, Part::NoiseHead, Part::ValueHead]);
        let table = StepTable::of(
            &self.plan.sampling(u64::from(iteration)),
            self.plan.dims.expert.width,
            policy.device(),
        );
        let begin = std::time::Instant::now();
        let config = &self.plan.config;
        let (global, micro) = (config.actor.global_batch_size, config.actor.micro_batch_size);
        let (seed, epochs, target_kl) = (
            config.runner.seed,
            config.algorithm.update_epoch,
            config.algorithm.target_kl,
        );
        let mut minibatches_done = 0.0;
        let mut gaps = Gaps::default();
        let mut variance = ExplainedVariance::default();
        'epochs: for epoch in 0..epochs {
            let shuffle = ShuffleSeed {
                run: seed,
                iteration: u64::from(iteration),
                epoch: u64::from(epoch),
            };
            let order = permutation(batch.len(), shuffle);
            for minibatch in minibatches(&order, global) {
                self.actor.zero_grad();
                if let Some(critic) = &mut self.critic {
                    critic.zero_grad();
                }
                let mut actor = ActorMetrics::default();
                for part in micro_batches(minibatch, micro) {
                    let out = match &passes {
                        Passes::Likelihood(likelihood) => {
                            likelihood.pass(policy, &table, batch, &prefixes, (part, minibatch), warming)?
                        }
                        Passes::Velocity(velocity, credit) => {
                            let key = (seed, u64::from(iteration), u64::from(epoch));
                            let loss = velocity.loss(policy, batch, &prefixes, credit, part.rows, key)?;
                            (&loss * part.weight).backward();
                            actor.policy_loss += loss.double_value(&[]) * part.weight;
                            continue;
                        }
                    };
                    (&out.loss * part.weight).backward();
                    if minibatches_done == 0.0 {
                        gaps = gaps.max(out.gaps);
                    }
                    if let Some(metrics) = out.actor {
                        actor.add(&metrics, part.weight);
                    }
                    report.entropy += out.entropy * part.weight;
                    if let Some((value_loss, clipped, sums)) = out.critic {
                        report.value_loss += value_loss * part.weight;
                        report.value_clip_fraction += clipped * part.weight;
                        if epoch == 0 {
                            variance.merge(&sums);
                        }
                    }
                }
                minibatches_done += 1.0;
                report.last_kl = actor.approx_kl;
                report.actor.add(&actor, 1.0);
                if let Some(critic) = &mut self.critic {
                    report.skipped += u64::from(critic.step(1.0)?.skipped);
                }
                if !warming {
                    if target_kl.is_some_and(|limit| actor.approx_kl > limit) {
                        report.stopped_early = true;
                        break 'epochs;
                    }
                    let factor = self.rise.factor(self.actor.updates()) * self.fall.factor(u64::from(iteration));
                    let step = self.actor.step(factor)?;
                    report.lr = config.actor.optim.lr * factor;
                    report.skipped += u64::from(step.skipped);
                    if !step.skipped {
                        report.grad_norm += step.grad_norm;
                        report.updates += 1;
                    }
                }
            }
        }
        let count = f64::max(minibatches_done, 1.0);
        let sum = std::mem::take(&mut report.actor);
        report.actor.add(&sum, count.recip());
        (report.logprob_gap, report.first_ratio_deviation, report.first_value_gap) =
            (gaps.logprob, gaps.ratio, gaps.value);
        report.entropy /= count;
        report.value_loss /= count;
        report.value_clip_fraction /= count;
        report.grad_norm /= (report.updates as f64).max(1.0);
        report.explained_variance = variance.value().unwrap_or(f64::NAN);
        report.update_seconds = begin.elapsed().as_secs_f64();
        policy.store().set_trainable(&[]);
        Ok(report)
    }

    /// Warns of records that the prefix cache has no place for, when there are more than ever before.
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
