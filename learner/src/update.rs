//! One RL iteration's updates: epochs over minibatches of chunk records, PPO on actor and critic.

use policy::{
    config::{JointLogprob, LogprobType, LossAgg, PrefixCachePlace},
    params::{CriticInput as CriticReads, Part, ValueSteps},
    plan::RunPlan,
};
use tch::{Kind, Tensor};

use crate::{
    error::{LearnerError, Result},
    logprob::{Executed, StepTable, TransitionBatch, gaussian, path_value, transition},
    loss::{
        ActorInput, ActorMetrics, ActorSettings, CriticInput, CriticSettings, ExplainedVariance, PolicyInput,
        PolicyLossFn, PolicySettings, aggregate_logprob, interpolated_proximal, policy_loss,
    },
    minibatch::{MicroBatch, ShuffleSeed, micro_batches, minibatches, permutation},
    model::Pi0,
    optim::{AdamW, AdamWSettings, Decay, ParamGroup, Schedule},
    prefix_store::PrefixStore,
    reference::Reference,
    rollout::RolloutBatch,
    update_velocity::{self, Credit, VelocityObjective},
};

/// Trains a policy on rollouts.
#[derive(Debug)]
pub struct Updater {
    plan: RunPlan,
    executed: Executed,
    loss: Loss,
    level: LogprobType,
    /// Whether the loss clips around a proximal policy of its own.
    decoupled: bool,
    settings: PolicySettings,
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
enum Loss {
    Likelihood(PolicyLossFn),
    Velocity(Box<VelocityObjective>),
}

impl Loss {
    fn new(plan: &RunPlan, policy: &Pi0) -> Result<Self> {
        Ok(match VelocityObjective::new(plan, policy)? {
            Some(velocity) => Self::Velocity(Box::new(velocity)),
            None => Self::Likelihood(likelihood(plan)?),
        })
    }
}

/// How a micro-batch is passed in this iteration.
enum Passes<'a> {
    Likelihood(PolicyLossFn),
    Velocity(&'a VelocityObjective, Credit),
}

/// Means over the minibatches of an iteration; every number is over valid records only.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct UpdateReport {
    /// Means of the policy loss's metrics.
    pub actor: ActorMetrics,
    /// Largest `|ratio - 1|` before the first optimizer step: the parity of engine and learner. Like the next two over records of
    /// the version in training; 0 where there is none.
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
    /// Of the critic as it was at rollout.
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

/// What the chunks of an iteration were worth to a loss on the velocity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CreditReport {
    /// Mean credit.
    pub mean: f64,
    /// Mean distance of the executed actions from the reference's, model units; 0 where the method does not read it.
    pub displacement: f64,
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

/// Refuses an `algorithm.loss_type` that is not registered, or whose parameters are wrong, before anything starts.
///
/// # Errors
/// Lists the registered names, or says what is wrong with a parameter.
pub fn check_loss(plan: &RunPlan) -> Result<()> {
    match update_velocity::method(plan)? {
        Some(_) => Ok(()),
        None => likelihood(plan).map(|_loss| ()),
    }
}

fn likelihood(plan: &RunPlan) -> Result<PolicyLossFn> {
    let name = plan.config.algorithm.loss_type.as_str();
    policy_loss(name).ok_or_else(|| {
        let likelihood = crate::loss::POLICY_LOSSES.iter().map(|(n, _)| *n);
        let known: Vec<&str> = likelihood
            .chain(crate::velocity::VELOCITY_LOSSES.iter().map(|(n, _)| *n))
            .collect();
        LearnerError::Missing(format!(
            "`algorithm.loss_type` is `{name}`, expected one of {}",
            known.join(", ")
        ))
    })
}

impl Updater {
    /// The optimizers and settings of a plan.
    ///
    /// # Errors
    /// An unknown loss name or optimizer setting.
    pub fn new(plan: &RunPlan, policy: &Pi0) -> Result<Self> {
        let (algorithm, optim) = (&plan.config.algorithm, &plan.config.actor.optim);
        let model = &plan.config.actor.model;
        let loss = Loss::new(plan, policy)?;
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
        let settings = PolicySettings {
            actor: ActorSettings {
                clip_low: algorithm.clip_ratio_low,
                clip_high: algorithm.clip_ratio_high,
                dual_clip: algorithm.clip_ratio_c,
                log_ratio_clamp: algorithm.clip_log_ratio.map(|bounds| (bounds.min, bounds.max)),
                episode_steps: None,
                behaviour_ratio_max: algorithm.behave_weight_threshold,
                kl_beta: algorithm.kl_beta,
            },
            critic: CriticSettings {
                value_clip: algorithm.value_clip,
                huber_delta: algorithm.huber_delta,
                episode_steps: None,
            },
            value_coef: 1.0,
            entropy_coef: algorithm.entropy_bonus.unwrap_or(0.0),
        };
        Ok(Self {
            executed: Executed {
                action_chunk: model.num_action_chunks,
                env_action_dim: model.env_action_dim,
            },
            loss,
            level: algorithm.logprob_type,
            decoupled: algorithm.loss_type == "decoupled_actor_critic",
            settings,
            actor,
            critic,
            rise: Schedule::warmup(u64::from(optim.lr_warmup_steps), Decay::Constant),
            fall: Schedule::warmup(0, decay),
            warned_of: 0,
            plan: plan.clone(),
        })
    }

    /// The reference policy of a loss on the velocity, for checkpoints.
    pub fn reference(&mut self) -> Option<&mut Reference> {
        match &mut self.loss {
            Loss::Velocity(velocity) => Some(&mut velocity.reference),
            Loss::Likelihood(_) => None,
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
        let version = u64::from(iteration);
        let informed = match &self.loss {
            Loss::Velocity(velocity) => velocity.informed(batch),
            Loss::Likelihood(_) => self.critic.is_some() || batch.informative,
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
        let by_episode = self.plan.config.algorithm.loss_agg == LossAgg::EpisodeLength;
        self.settings.actor.episode_steps = by_episode.then_some(batch.policy_episodes.steps);
        self.settings.critic.episode_steps = by_episode.then_some(batch.value_episodes.steps);
        let begin = std::time::Instant::now();
        let prefixes = PrefixStore::fill(&self.plan, policy, &batch.observations)?;
        self.warn_of_bound(&prefixes);
        if let Some(reference) = self.reference() {
            reference.begin(policy);
        }
        let warming = iteration < self.plan.config.actor.optim.critic_warmup_epochs && self.critic.is_some();
        let passes = match &self.loss {
            Loss::Velocity(velocity) => Passes::Velocity(velocity, velocity.credit(&self.plan, batch, &prefixes)?),
            Loss::Likelihood(loss) if warming => Passes::Likelihood(policy_loss("critic").unwrap_or(*loss)),
            Loss::Likelihood(loss) => Passes::Likelihood(*loss),
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
            &self.plan.sampling(version),
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
                let first = minibatches_done == 0.0;
                let mut actor = ActorMetrics::default();
                for part in micro_batches(minibatch, micro) {
                    let loss = match &passes {
                        Passes::Likelihood(loss) => *loss,
                        Passes::Velocity(velocity, credit) => {
                            let key = (seed, u64::from(iteration), u64::from(epoch));
                            let loss = velocity.loss(policy, batch, &prefixes, credit, part.rows, key)?;
                            (&loss * part.weight).backward();
                            actor.policy_loss += loss.double_value(&[]) * part.weight;
                            continue;
                        }
                    };
                    // a mean by episodes divides by all elements, a masked mean by the valid ones
                    let share = if by_episode {
                        1.0
                    } else {
                        valid_share(&batch.valid, part, minibatch)
                    };
                    let objective = Objective { loss, warming, share };
                    let rows: Vec<i64> = part.rows.iter().map(|r| *r as i64).collect();
                    let rows = Tensor::from_slice(&rows).to_device(policy.device());
                    let out = self.forward(policy, &table, batch, &prefixes, &rows, objective)?;
                    (&out.loss * part.weight).backward();
                    if first {
                        report.logprob_gap = report.logprob_gap.max(out.logprob_gap);
                        report.first_value_gap = report.first_value_gap.max(out.value_gap);
                        report.first_ratio_deviation = report.first_ratio_deviation.max(out.logprob_gap.exp_m1());
                    }
                    if let Some(metrics) = out.actor {
                        add(&mut actor, &metrics, part.weight * share);
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
                add(&mut report.actor, &actor, 1.0);
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
        add(&mut report.actor, &sum, count.recip());
        report.entropy /= count;
        report.value_loss /= count;
        report.value_clip_fraction /= count;
        report.grad_norm /= (report.updates as f64).max(1.0);
        report.explained_variance = variance.value().unwrap_or(f64::NAN);
        report.update_seconds = begin.elapsed().as_secs_f64();
        policy.store().set_trainable(&[]);
        if let Some(reference) = self.reference() {
            reference.end(policy);
        }
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

    fn forward(
        &self,
        policy: &Pi0,
        table: &StepTable,
        batch: &RolloutBatch,
        prefixes: &PrefixStore<'_>,
        rows: &Tensor,
        Objective { loss, warming, share }: Objective,
    ) -> Result<Pass> {
        let pick = |t: &Tensor| t.index_select(0, rows);
        let record = pick(&batch.record);
        let (cache, pooled) = prefixes.rows(&record)?;
        let seen = |t: &Tensor| t.index_select(0, &record);
        let (old_value, returns) = (pick(&batch.old_value), pick(&batch.returns));
        let old_logprob = aggregate_logprob(&pick(&batch.old_logprob), self.level)?;
        let (advantage, mask) = (pick(&batch.advantage), pick(&batch.mask));
        let (policy_len, value_len) = (pick(&batch.policy_episodes.len), pick(&batch.value_episodes.len));
        let mut entropy = None;
        let head = policy.value_head();
        let detach = warming
            || self
                .plan
                .config
                .actor
                .model
                .value_head
                .as_ref()
                .is_none_or(|head| head.detach_critic_input);
        let path = head.is_some_and(|h| h.input == CriticReads::Expert && h.steps == ValueSteps::Path);
        let at_steps = head.is_some_and(|h| h.input == CriticReads::Expert && h.steps == ValueSteps::Stochastic);
        let (mut logprob, mut value) = (None, None);
        if !warming || at_steps {
            // each sample's S stochastic steps as rows of their own
            let step = pick(&batch.step);
            let (samples, steps) = (step.size()[0], step.size()[1]);
            let each = |t: &Tensor| t.repeat_interleave_self_int(steps, 0, None);
            let record = each(&record);
            let repeated = if steps == 1 {
                None
            } else {
                let own = Tensor::arange(samples, (Kind::Int64, policy.device()));
                Some(cache.index_select(&each(&own))?)
            };
            let step = step.view(-1);
            let (x, x_next) = (
                batch.chain.index(&[Some(&record), Some(&step)]),
                batch.chain.index(&[Some(&record), Some(&(&step + 1))]),
            );
            let state = batch.observations.state.index_select(0, &record);
            let inputs = TransitionBatch {
                state: Some(&state),
                x: &x,
                x_next: &x_next,
                step: &step,
            };
            let out = transition(
                policy,
                table,
                repeated.as_ref().unwrap_or(&cache),
                inputs,
                self.executed,
                detach,
            )?;
            let (chunk, width) = (self.executed.action_chunk as i64, self.executed.env_action_dim as i64);
            let per_step = out.logprob.view([samples, steps, chunk, width]);
            let joined = per_step.sum_dim_intlist(1, false, Kind::Float);
            let joined = match self.plan.config.actor.model.openpi.joint_logprob {
                Some(JointLogprob::Mean) => {
                    let initial = seen(&batch.chain.select(1, 0)).narrow(1, 0, chunk).narrow(2, 0, width);
                    (joined + gaussian(&initial, &Tensor::zeros_like(&initial), &Tensor::ones_like(&initial)))
                        / (steps + 1) as f64
                }
                Some(JointLogprob::Sum) | None => joined,
            };
            logprob = Some(aggregate_logprob(&joined, self.level)?);
            // of the noise head: the mean over the sample's steps, per executed element
            entropy = out
                .entropy
                .map(|e| e.view([samples, steps, chunk, width]).mean_dim(1, false, Kind::Float));
            value = out
                .value
                .filter(|_| at_steps)
                .map(|v| v.view([samples, steps]).mean_dim(1, false, Kind::Float));
        }
        if path {
            let (state, chain) = (seen(&batch.observations.state), seen(&batch.chain));
            value = path_value(policy, table, &cache, Some(&state), &chain, detach)?;
        }
        if head.is_some_and(|h| h.input == CriticReads::Vlm) {
            value = Some(policy.value_vlm(&pooled, &seen(&batch.observations.state))?);
        }
        let fresh = pick(&batch.version)
            .eq(batch.trained_version as i64 - 1)
            .nonzero()
            .view(-1);
        let gap = |a: &Tensor, b: &Tensor| {
            let gaps = (a.detach() - b).abs().index_select(0, &fresh);
            if gaps.numel() == 0 {
                0.0
            } else {
                gaps.max().double_value(&[])
            }
        };
        let logprob_gap = logprob.as_ref().map_or(0.0, |l| gap(l, &old_logprob));
        let value_gap = value.as_ref().map_or(0.0, |v| gap(v, &old_value));
        let proximal = match &logprob {
            Some(logprob) if self.decoupled => {
                let trained = batch.trained_version as f64;
                Some(interpolated_proximal(
                    logprob,
                    &old_logprob,
                    &pick(&batch.version),
                    trained,
                )?)
            }
            _ => None,
        };
        let actor = logprob.as_ref().filter(|_| !warming).map(|logprob| ActorInput {
            logprob,
            old_logprob: &old_logprob,
            proximal_logprob: proximal.as_ref(),
            advantage: &advantage,
            mask: Some(&mask),
            episode_len: Some(&policy_len),
        });
        let all = returns.ones_like();
        let critic = value.as_ref().map(|value| CriticInput {
            value,
            old_value: &old_value,
            returns: &returns,
            mask: Some(&all),
            episode_len: Some(&value_len),
        });
        let out = loss(
            &PolicyInput {
                actor,
                critic,
                entropy: entropy.as_ref().filter(|_| !warming),
                actor_share: Some(share),
            },
            &self.settings,
        )?;
        let critic = out
            .critic
            .map(|c| (c.value_loss, c.value_clip_fraction, c.explained_variance));
        Ok(Pass {
            loss: out.loss,
            actor: out.actor,
            critic,
            entropy: out.entropy.unwrap_or(0.0),
            logprob_gap,
            value_gap,
        })
    }
}

/// What a pass computes.
#[derive(Clone, Copy)]
struct Objective {
    loss: PolicyLossFn,
    warming: bool,
    /// See [`PolicyInput::actor_share`].
    share: f64,
}

/// Share of a part in the minibatch's valid elements over its share of the rows.
fn valid_share(valid: &[u32], part: MicroBatch<'_>, minibatch: &[usize]) -> f64 {
    let count = |rows: &[usize]| -> f64 {
        let counts = rows.iter().filter_map(|row| valid.get(*row));
        counts.map(|count| f64::from(*count)).sum()
    };
    count(part.rows) / count(minibatch).max(1.0) / part.weight
}

struct Pass {
    loss: Tensor,
    actor: Option<ActorMetrics>,
    critic: Option<(f64, f64, ExplainedVariance)>,
    entropy: f64,
    logprob_gap: f64,
    value_gap: f64,
}

/// `sum += weight * one`; the largest deviation is a maximum, not a mean.
fn add(sum: &mut ActorMetrics, one: &ActorMetrics, weight: f64) {
    sum.policy_loss += weight * one.policy_loss;
    sum.kl_penalty += weight * one.kl_penalty;
    sum.ratio += weight * one.ratio;
    sum.ratio_deviation += weight * one.ratio_deviation;
    sum.ratio_deviation_max = sum.ratio_deviation_max.max(one.ratio_deviation_max);
    sum.approx_kl += weight * one.approx_kl;
    sum.approx_kl_k1 += weight * one.approx_kl_k1;
    sum.clip_fraction += weight * one.clip_fraction;
    sum.dual_clip_fraction += weight * one.dual_clip_fraction;
    sum.behaviour_clip_fraction += weight * one.behaviour_clip_fraction;
}
