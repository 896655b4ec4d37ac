//! Pass of an update whose loss is on probability ratios. Recomputes log-probabilities and values of recorded denoise transitions
//! under the current weights, then computes the loss.

use policy::{
    config::{JointLogprob, LogprobType, LossAgg},
    params::{CriticInput as CriticReads, ValueHeadDims, ValueSteps},
    plan::RunPlan,
};
use tch::{Kind, Tensor, no_grad};

use super::{
    logprob::{Executed, StepTable, TransitionBatch, gaussian, path_value, standard_normal_entropy, transition},
    reference::Reference,
    samples::Samples,
    tally::{Gaps, Pass},
};
use crate::{
    batch::{RolloutBatch, minibatch::MicroBatch, prefix_store::PrefixStore},
    error::Result,
    loss::{
        self, ActorInput, ActorMetrics, ActorSettings, CriticInput, CriticSettings, PolicyInput, PolicyLossFn,
        PolicyLossSpec, PolicySettings, Share, aggregate_logprob, interpolated_proximal,
    },
    model::Pi0,
};

/// Loss on probability ratios with its settings, and the reference of its KL penalty.
#[derive(Debug)]
pub(super) struct LikelihoodObjective {
    loss: PolicyLossSpec,
    settings: PolicySettings,
    executed: Executed,
    logprob_type: LogprobType,
    joint_logprob: Option<JointLogprob>,
    num_steps: usize,
    detach_critic_input: bool,
    critic_warmup_epochs: u32,
    by_episode: bool,
    pub(super) reference: Option<Reference>,
}

/// Recomputed numbers of `M` samples.
struct Recomputed {
    /// Log-probability at the configured level, with gradient.
    new_logprob: Tensor,
    /// Entropy per executed element, `[M, action_chunk, env_action_dim]`; `None` if the entropy does not depend on the weights.
    entropy: Option<Tensor>,
    /// `V_expert` at the stochastic steps, `[M]`.
    value: Option<Tensor>,
}

impl LikelihoodObjective {
    /// Reads the settings of a plan and creates the reference of `policy` that the plan configures.
    ///
    /// # Errors
    /// The sizes do not fit together.
    pub(super) fn new(plan: &RunPlan, loss: PolicyLossSpec, policy: &Pi0) -> Result<Self> {
        let algorithm = &plan.config.algorithm;
        let model = &plan.config.actor.model;
        let settings = PolicySettings {
            actor: ActorSettings {
                clip_ratio_low: algorithm.clip_ratio_low,
                clip_ratio_high: algorithm.clip_ratio_high,
                clip_ratio_c: algorithm.clip_ratio_c,
                clip_log_ratio: algorithm.clip_log_ratio.map(|bounds| (bounds.min, bounds.max)),
                episode_steps: None,
                behave_weight_threshold: algorithm.behave_weight_threshold,
                kl_beta: algorithm.kl_beta,
            },
            critic: CriticSettings {
                value_clip: algorithm.value_clip,
                huber_delta: algorithm.huber_delta,
                episode_steps: None,
            },
            value_coef: 1.0,
            entropy_bonus: algorithm.entropy_bonus,
        };
        Ok(Self {
            loss,
            settings,
            executed: Executed::of(plan),
            logprob_type: algorithm.logprob_type,
            joint_logprob: model.openpi.joint_logprob,
            num_steps: model.num_steps,
            detach_critic_input: model.value_head.as_ref().is_none_or(|head| head.detach_critic_input),
            critic_warmup_epochs: plan.config.actor.optim.critic_warmup_epochs,
            by_episode: algorithm.loss_agg == LossAgg::EpisodeLength,
            reference: algorithm
                .kl_reference
                .map(|config| Reference::new(config, policy))
                .transpose()?,
        })
    }

    /// Prepares the passes over the batch of an iteration, whose step table is `table`.
    pub(super) fn passes<'a>(
        &'a self,
        policy: &'a Pi0,
        batch: &'a RolloutBatch,
        prefixes: &'a PrefixStore<'a>,
        table: StepTable,
        iteration: u32,
    ) -> LikelihoodPasses<'a> {
        let mut settings = self.settings;
        settings.actor.episode_steps = self.by_episode.then_some(batch.policy_episodes.steps);
        settings.critic.episode_steps = self.by_episode.then_some(batch.value_episodes.steps);
        LikelihoodPasses {
            objective: self,
            policy,
            batch,
            prefixes,
            table,
            settings,
            critic_warmup: iteration < self.critic_warmup_epochs && policy.value_head().is_some(),
        }
    }
}

/// Passes of one iteration.
pub(super) struct LikelihoodPasses<'a> {
    objective: &'a LikelihoodObjective,
    policy: &'a Pi0,
    batch: &'a RolloutBatch,
    prefixes: &'a PrefixStore<'a>,
    table: StepTable,
    settings: PolicySettings,
    /// Whether only the critic trains.
    pub(super) critic_warmup: bool,
}

impl LikelihoodPasses<'_> {
    /// Computes the loss of a part of a minibatch. With `compare`, also compares recomputed numbers with recorded numbers.
    pub(super) fn pass(&self, part: MicroBatch<'_>, compare: bool) -> Result<Pass> {
        let Self {
            objective,
            policy,
            batch,
            ..
        } = *self;
        let samples = Samples::read(batch, self.prefixes, part.rows, policy.device())?;
        let detach_critic_input = self.critic_warmup || objective.detach_critic_input;
        let at_steps = self.value_head(ValueSteps::Stochastic).is_some();
        let recomputed = if !self.critic_warmup || at_steps {
            Some(self.recompute(policy, &samples, detach_critic_input)?)
        } else {
            None
        };
        let value = self.value(&samples, recomputed.as_ref(), detach_critic_input)?;
        let old_logprob = aggregate_logprob(&samples.of_samples(&batch.old_logprob), objective.logprob_type)?;
        let old_value = samples.of_samples(&batch.old_value);
        let gaps = compare.then(|| {
            let logprob = recomputed.as_ref().map(|new| (&new.new_logprob, &old_logprob));
            compare_to_records(&samples, logprob, value.as_ref().map(|value| (value, &old_value)))
        });

        let trained = recomputed.as_ref().filter(|_| !self.critic_warmup);
        let proximal_logprob = self.proximal_logprob(&samples, trained, &old_logprob)?;
        let reference_logprob = self.reference_logprob(&samples, trained)?;
        let (advantages, mask) = (samples.of_samples(&batch.advantages), samples.of_samples(&batch.mask));
        let policy_len = samples.of_samples(&batch.policy_episodes.len);
        let (returns, value_len) = (
            samples.of_samples(&batch.returns),
            samples.of_samples(&batch.value_episodes.len),
        );
        let all = returns.ones_like();
        let input = PolicyInput {
            actor: trained.map(|new| ActorInput {
                new_logprob: &new.new_logprob,
                old_logprob: &old_logprob,
                proximal_logprob: proximal_logprob.as_ref(),
                reference_logprob: reference_logprob.as_ref(),
                advantages: &advantages,
                mask: Some(&mask),
                episode_len: Some(&policy_len),
            }),
            critic: value.as_ref().map(|value| CriticInput {
                value,
                old_value: &old_value,
                returns: &returns,
                mask: Some(&all),
                episode_len: Some(&value_len),
            }),
            entropy: trained.and_then(|new| new.entropy.as_ref()),
            share: Share {
                surrogate: if objective.by_episode { 1.0 } else { part.valid_share },
                entropy: part.valid_share,
            },
        };
        let loss: PolicyLossFn = if self.critic_warmup {
            loss::WARM_UP
        } else {
            objective.loss.loss
        };
        let out = loss(&input, &self.settings)?;
        Ok(Pass {
            loss: out.loss,
            actor: out.actor.map(|metrics| shared(&metrics, input.share)),
            critic: out.critic,
            entropy: out.entropy.map(|entropy| entropy * input.share.entropy),
            gaps,
        })
    }

    /// Computes the log-probability that a decoupled loss clips around; `None` with another loss or during the critic's warm-up.
    fn proximal_logprob(
        &self,
        samples: &Samples<'_>,
        trained: Option<&Recomputed>,
        old_logprob: &Tensor,
    ) -> Result<Option<Tensor>> {
        let Some(new) = trained.filter(|_| self.objective.loss.proximal) else {
            return Ok(None);
        };
        let (versions, trained_version) = (
            samples.of_samples(&self.batch.version),
            self.batch.trained_version as f64,
        );
        Ok(Some(interpolated_proximal(
            &new.new_logprob,
            old_logprob,
            &versions,
            trained_version,
        )?))
    }

    /// Computes the log-probability under the reference of the KL penalty; `None` without a reference or during the critic's warm-up.
    fn reference_logprob(&self, samples: &Samples<'_>, trained: Option<&Recomputed>) -> Result<Option<Tensor>> {
        let Some(reference) = self.objective.reference.as_ref().filter(|_| trained.is_some()) else {
            return Ok(None);
        };
        let recomputed = no_grad(|| self.recompute(reference.policy(), samples, true))?;
        Ok(Some(recomputed.new_logprob))
    }

    /// Returns the value head if it reads the expert at these steps.
    fn value_head(&self, steps: ValueSteps) -> Option<&ValueHeadDims> {
        let head = self.policy.value_head()?;
        (head.input == CriticReads::Expert && head.steps == steps).then_some(head)
    }

    /// Computes each sample's value from the input of the value head; `None` without a critic.
    fn value(
        &self,
        samples: &Samples<'_>,
        recomputed: Option<&Recomputed>,
        detach_critic_input: bool,
    ) -> Result<Option<Tensor>> {
        let (policy, batch) = (self.policy, self.batch);
        let state = || samples.of_records(&batch.observations.state);
        if self.value_head(ValueSteps::Path).is_some() {
            let (state, chain) = (state(), samples.of_records(&batch.chain));
            let cache = &samples.cache;
            return Ok(path_value(
                policy,
                &self.table,
                cache,
                Some(&state),
                &chain,
                detach_critic_input,
            )?);
        }
        if policy.value_head().is_some_and(|head| head.input == CriticReads::Vlm) {
            return Ok(Some(policy.value_vlm(&samples.pooled, &state())?));
        }
        Ok(recomputed.and_then(|new| new.value.as_ref()).map(Tensor::shallow_clone))
    }

    /// Computes each sample's `S` stochastic steps under the weights of `policy`, as separate rows, and joins the log-probabilities.
    fn recompute(&self, policy: &Pi0, samples: &Samples<'_>, detach_critic_input: bool) -> Result<Recomputed> {
        let Self { objective, batch, .. } = *self;
        let step = samples.of_samples(&batch.step);
        let (count, steps) = (step.size()[0], step.size()[1]);
        let each = |t: &Tensor| t.repeat_interleave_self_int(steps, 0, None);
        let record = each(&samples.record);
        let repeated = if steps == 1 {
            None
        } else {
            let own = Tensor::arange(count, (Kind::Int64, policy.device()));
            Some(samples.cache.index_select(&each(&own))?)
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
        let cache = repeated.as_ref().unwrap_or(&samples.cache);
        let out = transition(
            policy,
            &self.table,
            cache,
            inputs,
            objective.executed,
            detach_critic_input,
        )?;
        let (chunk, width) = (
            objective.executed.action_chunk as i64,
            objective.executed.env_action_dim as i64,
        );
        let over_steps = |t: &Tensor| {
            t.view([count, steps, chunk, width])
                .sum_dim_intlist(1, false, Kind::Float)
        };
        let terms = (objective.num_steps + 1) as f64;
        let new_logprob = over_steps(&out.logprob);
        let new_logprob = match objective.joint_logprob {
            Some(JointLogprob::Mean) => {
                let initial = samples
                    .of_records(&batch.chain.select(1, 0))
                    .narrow(1, 0, chunk)
                    .narrow(2, 0, width);
                let of_initial = gaussian(&initial, &initial.zeros_like(), &initial.ones_like());
                (new_logprob + of_initial) / terms
            }
            Some(JointLogprob::Sum) | None => new_logprob,
        };
        let entropy = out.entropy.map(|entropy| match objective.joint_logprob {
            Some(JointLogprob::Mean) => (over_steps(&entropy) + standard_normal_entropy()) / terms,
            Some(JointLogprob::Sum) | None => over_steps(&entropy) / steps as f64,
        });
        let value = out
            .value
            .map(|v| v.view([count, steps]).mean_dim(1, false, Kind::Float));
        Ok(Recomputed {
            new_logprob: aggregate_logprob(&new_logprob, objective.logprob_type)?,
            entropy,
            value,
        })
    }
}

/// Returns the largest gaps between recomputed and recorded numbers, pair by pair, over samples of the version in training.
fn compare_to_records(
    samples: &Samples<'_>,
    logprob: Option<(&Tensor, &Tensor)>,
    value: Option<(&Tensor, &Tensor)>,
) -> Gaps {
    let batch = samples.batch;
    let fresh = samples
        .of_samples(&batch.version)
        .eq(batch.trained_version as i64 - 1)
        .nonzero()
        .view(-1);
    let largest = |gaps: &Tensor| {
        let gaps = gaps.index_select(0, &fresh);
        if gaps.numel() == 0 {
            0.0
        } else {
            gaps.max().double_value(&[])
        }
    };
    let difference = |(new, recorded): (&Tensor, &Tensor)| new.detach() - recorded;
    Gaps {
        logprob: logprob.map_or(0.0, |pair| largest(&difference(pair).abs())),
        ratio: logprob.map_or(0.0, |log_ratio| largest(&difference(log_ratio).expm1().abs())),
        value: value.map_or(0.0, |pair| largest(&difference(pair).abs())),
    }
}

/// Converts the metrics of a part into addends of the minibatch's metrics; the largest deviation is unchanged.
fn shared(metrics: &ActorMetrics, share: Share) -> ActorMetrics {
    let mut out = ActorMetrics::default();
    out.add(metrics, share.entropy);
    out.policy_loss = metrics.policy_loss * share.surrogate;
    out.kl_penalty = metrics.kl_penalty * share.surrogate;
    out
}
