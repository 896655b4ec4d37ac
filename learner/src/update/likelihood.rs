//! The passes of an update whose loss is on probability ratios: log-probabilities and values of recorded denoise transitions again, then
//! the loss.

use policy::{
    config::{JointLogprob, LogprobType, LossAgg},
    params::{CriticInput as CriticReads, ValueSteps},
    plan::RunPlan,
};
use tch::{Kind, Tensor, no_grad};

use super::{
    logprob::{Executed, StepTable, TransitionBatch, gaussian, path_value, standard_normal_entropy, transition},
    reference::Reference,
};
use crate::{
    batch::{RolloutBatch, minibatch::MicroBatch, prefix_store::PrefixStore},
    error::Result,
    loss::{
        self, ActorInput, ActorMetrics, ActorSettings, CriticInput, CriticSettings, ExplainedVariance, PolicyInput,
        PolicyLossSpec, PolicySettings, Share, aggregate_logprob, interpolated_proximal,
    },
    model::{Pi0, PrefixCache},
};

/// A loss on probability ratios with its settings, and the reference of its KL penalty.
#[derive(Debug)]
pub(crate) struct LikelihoodObjective {
    loss: PolicyLossSpec,
    settings: PolicySettings,
    executed: Executed,
    logprob_type: LogprobType,
    joint_logprob: Option<JointLogprob>,
    num_steps: usize,
    detach_critic_input: bool,
    by_episode: bool,
    pub(crate) reference: Option<Reference>,
}

/// What one pass over a micro-batch brought. Factors that make the parts of a minibatch add up to it are in, but for the share of the
/// rows.
pub(crate) struct Pass {
    /// With gradient.
    pub(crate) loss: Tensor,
    pub(crate) actor: Option<ActorMetrics>,
    /// Value loss, share of clipped values, and the sums of the explained variance.
    pub(crate) critic: Option<(f64, f64, ExplainedVariance)>,
    pub(crate) entropy: f64,
    pub(crate) gaps: Gaps,
}

/// How far recomputed numbers are from recorded ones, over records of the version in training; 0 without any.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub(crate) struct Gaps {
    /// Largest `|logprob - recorded logprob|`.
    pub(crate) logprob: f64,
    /// Largest `|ratio - 1|`.
    pub(crate) ratio: f64,
    /// Largest `|value - recorded value|`.
    pub(crate) value: f64,
}

impl Gaps {
    pub(crate) fn max(self, other: Self) -> Self {
        Self {
            logprob: self.logprob.max(other.logprob),
            ratio: self.ratio.max(other.ratio),
            value: self.value.max(other.value),
        }
    }
}

/// What the policy says of a micro-batch's transitions, `M` samples.
struct Recomputed {
    /// At the configured level.
    logprob: Tensor,
    /// Per executed element, `[M, action_chunk, env_action_dim]`; `None` where it does not depend on the weights.
    entropy: Option<Tensor>,
    /// `V_expert` at the stochastic steps, `[M]`.
    value: Option<Tensor>,
}

/// The rows of a micro-batch.
struct Samples<'a> {
    batch: &'a RolloutBatch,
    /// i64 `[M]`.
    rows: Tensor,
    /// The record of each, i64 `[M]`.
    record: Tensor,
    cache: PrefixCache,
    /// What `V_vlm` reads.
    pooled: Tensor,
}

impl Samples<'_> {
    fn pick(&self, of_samples: &Tensor) -> Tensor {
        of_samples.index_select(0, &self.rows)
    }

    fn seen(&self, of_records: &Tensor) -> Tensor {
        of_records.index_select(0, &self.record)
    }
}

impl LikelihoodObjective {
    /// The loss of a plan beside `policy`.
    ///
    /// # Errors
    /// The sizes do not fit together.
    pub(crate) fn new(plan: &RunPlan, loss: PolicyLossSpec, policy: &Pi0) -> Result<Self> {
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
            by_episode: algorithm.loss_agg == LossAgg::EpisodeLength,
            reference: algorithm
                .kl_reference
                .map(|config| Reference::new(config, policy))
                .transpose()?,
        })
    }

    /// Takes the lengths of an iteration's episodes.
    pub(crate) fn begin(&mut self, policy: &Pi0, batch: &RolloutBatch) {
        self.settings.actor.episode_steps = self.by_episode.then_some(batch.policy_episodes.steps);
        self.settings.critic.episode_steps = self.by_episode.then_some(batch.value_episodes.steps);
        if let Some(reference) = &mut self.reference {
            reference.begin(policy);
        }
    }

    /// The loss of a part of a minibatch. During the critic's warm-up the policy has no part in it.
    pub(crate) fn pass(
        &self,
        policy: &Pi0,
        table: &StepTable,
        batch: &RolloutBatch,
        prefixes: &PrefixStore<'_>,
        (part, minibatch): (MicroBatch<'_>, &[usize]),
        warming: bool,
    ) -> Result<Pass> {
        let rows: Vec<i64> = part.rows.iter().map(|r| *r as i64).collect();
        let rows = Tensor::from_slice(&rows).to_device(policy.device());
        let record = batch.record.index_select(0, &rows);
        let (cache, pooled) = prefixes.rows(&record)?;
        let samples = Samples {
            batch,
            rows,
            record,
            cache,
            pooled,
        };
        let detach = warming || self.detach_critic_input;
        let head = policy.value_head();
        let reads_expert = |steps| head.is_some_and(|h| h.input == CriticReads::Expert && h.steps == steps);
        let at_steps = reads_expert(ValueSteps::Stochastic);
        let now = if !warming || at_steps {
            Some(self.recompute(policy, table, &samples, detach)?)
        } else {
            None
        };
        let value = if reads_expert(ValueSteps::Path) {
            let (state, chain) = (samples.seen(&batch.observations.state), samples.seen(&batch.chain));
            path_value(policy, table, &samples.cache, Some(&state), &chain, detach)?
        } else if head.is_some_and(|h| h.input == CriticReads::Vlm) {
            Some(policy.value_vlm(&samples.pooled, &samples.seen(&batch.observations.state))?)
        } else {
            now.as_ref()
                .and_then(|now| now.value.as_ref())
                .map(Tensor::shallow_clone)
        };
        let old_logprob = aggregate_logprob(&samples.pick(&batch.old_logprob), self.logprob_type)?;
        let old_value = samples.pick(&batch.old_value);
        let gaps = gaps(
            &samples,
            now.as_ref().map(|now| (&now.logprob, &old_logprob)),
            value.as_ref().map(|value| (value, &old_value)),
        );

        let policy_part = now.as_ref().filter(|_| !warming);
        let proximal = match policy_part {
            Some(now) if self.loss.proximal => {
                let (versions, trained) = (samples.pick(&batch.version), batch.trained_version as f64);
                Some(interpolated_proximal(&now.logprob, &old_logprob, &versions, trained)?)
            }
            _ => None,
        };
        let reference = match (&self.reference, policy_part) {
            (Some(reference), Some(_)) => {
                let of_reference = || self.recompute(reference.policy(), table, &samples, true);
                Some(no_grad(of_reference)?.logprob)
            }
            _ => None,
        };
        let (advantages, mask) = (samples.pick(&batch.advantages), samples.pick(&batch.mask));
        let policy_len = samples.pick(&batch.policy_episodes.len);
        let (returns, value_len) = (samples.pick(&batch.returns), samples.pick(&batch.value_episodes.len));
        let all = returns.ones_like();
        let share = valid_share(&batch.valid, part, minibatch);
        let input = PolicyInput {
            actor: policy_part.map(|now| ActorInput {
                new_logprob: &now.logprob,
                old_logprob: &old_logprob,
                proximal_logprob: proximal.as_ref(),
                reference_logprob: reference.as_ref(),
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
            entropy: policy_part.and_then(|now| now.entropy.as_ref()),
            share: Share {
                surrogate: if self.by_episode { 1.0 } else { share },
                entropy: share,
            },
        };
        let loss = if warming { loss::WARM_UP } else { self.loss.loss };
        let out = loss(&input, &self.settings)?;
        Ok(Pass {
            loss: out.loss,
            actor: out.actor.map(|metrics| shared(metrics, input.share)),
            critic: out
                .critic
                .map(|c| (c.value_loss, c.value_clip_fraction, c.explained_variance)),
            entropy: out.entropy.unwrap_or(0.0) * share,
            gaps,
        })
    }

    /// Each sample's `S` stochastic steps again, as rows of their own, and their log-probabilities joined.
    fn recompute(&self, policy: &Pi0, table: &StepTable, samples: &Samples<'_>, detach: bool) -> Result<Recomputed> {
        let batch = samples.batch;
        let step = samples.pick(&batch.step);
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
        let out = transition(policy, table, cache, inputs, self.executed, detach)?;
        let (chunk, width) = (self.executed.action_chunk as i64, self.executed.env_action_dim as i64);
        let over_steps = |t: &Tensor| {
            t.view([count, steps, chunk, width])
                .sum_dim_intlist(1, false, Kind::Float)
        };
        let terms = (self.num_steps + 1) as f64;
        let logprob = over_steps(&out.logprob);
        let logprob = match self.joint_logprob {
            Some(JointLogprob::Mean) => {
                let initial = samples
                    .seen(&batch.chain.select(1, 0))
                    .narrow(1, 0, chunk)
                    .narrow(2, 0, width);
                let of_initial = gaussian(&initial, &initial.zeros_like(), &initial.ones_like());
                (logprob + of_initial) / terms
            }
            Some(JointLogprob::Sum) | None => logprob,
        };
        let entropy = out.entropy.map(|entropy| match self.joint_logprob {
            Some(JointLogprob::Mean) => (over_steps(&entropy) + standard_normal_entropy()) / terms,
            Some(JointLogprob::Sum) | None => over_steps(&entropy) / steps as f64,
        });
        let value = out
            .value
            .map(|v| v.view([count, steps]).mean_dim(1, false, Kind::Float));
        Ok(Recomputed {
            logprob: aggregate_logprob(&logprob, self.logprob_type)?,
            entropy,
            value,
        })
    }
}

fn gaps(samples: &Samples<'_>, logprob: Option<(&Tensor, &Tensor)>, value: Option<(&Tensor, &Tensor)>) -> Gaps {
    let batch = samples.batch;
    let fresh = samples
        .pick(&batch.version)
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
    let moved = |(now, recorded): (&Tensor, &Tensor)| now.detach() - recorded;
    Gaps {
        logprob: logprob.map_or(0.0, |pair| largest(&moved(pair).abs())),
        ratio: logprob.map_or(0.0, |pair| largest(&moved(pair).expm1().abs())),
        value: value.map_or(0.0, |pair| largest(&moved(pair).abs())),
    }
}

/// The metrics of a part as its addends to the minibatch's; the largest deviation is no mean.
fn shared(metrics: ActorMetrics, share: Share) -> ActorMetrics {
    let mut out = ActorMetrics::default();
    out.add(&metrics, share.entropy);
    out.policy_loss = metrics.policy_loss * share.surrogate;
    out.kl_penalty = metrics.kl_penalty * share.surrogate;
    out
}

/// Share of a part in the minibatch's valid elements over its share of the rows.
fn valid_share(valid: &[u32], part: MicroBatch<'_>, minibatch: &[usize]) -> f64 {
    let count = |rows: &[usize]| -> f64 {
        let counts = rows.iter().filter_map(|row| valid.get(*row));
        counts.map(|count| f64::from(*count)).sum()
    };
    count(part.rows) / count(minibatch).max(1.0) / part.weight
}
