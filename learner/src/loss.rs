//! Losses of the policy and the critic on tensors with gradients, one function per equation, and metrics that say what
//! their names say.
//!
//! Shapes: `N` rows (chunks), `C` executed actions per chunk, `D` action dimensions. A tensor that accompanies another
//! one (advantage, mask, episode length) may miss trailing dimensions or have size 1 there; it is spread over them, and
//! every mean is taken over the elements it was spread to. Nothing is ever spread over leading dimensions, so that a
//! `[N]` tensor never meets an `[N, 1]` one as `[N, N]`.

use tch::{Kind, Reduction, Tensor};
use thiserror::Error;

/// What can be wrong with the tensors given to a loss.
#[derive(Debug, Error)]
pub enum LossError {
    /// A tensor does not fit the one it accompanies.
    #[error("`{name}` of shape {found:?} does not fit `{like}` of shape {expected:?}: leading sizes must be equal")]
    Shape {
        /// The tensor that does not fit.
        name: &'static str,
        /// Its shape.
        found: Vec<i64>,
        /// The tensor it accompanies.
        like: &'static str,
        /// That one's shape.
        expected: Vec<i64>,
    },
    /// The log-probabilities are not per action element.
    #[error("`logprob` needs shape [rows, actions, action dim], found {found:?}")]
    NotElementwise {
        /// Shape found.
        found: Vec<i64>,
    },
    /// The loss needs an input that is not there.
    #[error("policy loss `{loss}` needs the `{input}` input")]
    Missing {
        /// Name of the loss.
        loss: &'static str,
        /// Missing part of [`PolicyInput`].
        input: &'static str,
    },
    /// The metrics could not be read from the device.
    #[error("reading the loss metrics: {source}")]
    Metrics {
        /// What libtorch said.
        source: tch::TchError,
    },
}

/// Result of this module.
pub type Result<T, E = LossError> = std::result::Result<T, E>;

/// Over what a log-probability is summed before it makes a ratio.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LogprobLevel {
    /// One ratio per action element: `[N, C, D]`.
    Token,
    /// One ratio per action: `[N, C]`.
    Action,
    /// One ratio per chunk: `[N]`.
    Chunk,
}

impl LogprobLevel {
    /// The level of this configuration name: `token`, `action` or `chunk`.
    pub fn from_name(name: &str) -> Option<Self> {
        [("token", Self::Token), ("action", Self::Action), ("chunk", Self::Chunk)]
            .into_iter()
            .find_map(|(known, level)| (known == name).then_some(level))
    }
}

/// Sums element-wise log-probabilities (or entropies) `[N, C, D]` to the level's shape: the joint density of
/// independent elements is the product of theirs.
pub fn aggregate_logprob(logprob: &Tensor, level: LogprobLevel) -> Result<Tensor> {
    if logprob.dim() != 3 {
        return Err(LossError::NotElementwise { found: logprob.size() });
    }
    let none: Option<Kind> = None;
    Ok(match level {
        LogprobLevel::Token => logprob.shallow_clone(),
        LogprobLevel::Action => logprob.sum_dim_intlist([2i64].as_slice(), false, none),
        LogprobLevel::Chunk => logprob.sum_dim_intlist([1i64, 2].as_slice(), false, none),
    })
}

/// The companion tensor with `like`'s rank: trailing sizes of 1 dropped, the rest equal to the front of `like`'s shape,
/// trailing sizes of 1 appended. What it then meets in an operation is only ever spread over trailing dimensions.
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

/// Mean over the elements whose mask is set, the mask spread over `values` first; 0 with no such element. `mask` has
/// the rank of `values`. Masked elements do not reach the result even if they are not finite.
pub fn masked_mean(values: &Tensor, mask: Option<&Tensor>) -> Tensor {
    let Some(mask) = mask else {
        return values.mean(values.kind());
    };
    let mask = mask.to_kind(Kind::Bool).expand_as(values);
    let count = mask.sum(Kind::Int64).clamp_min(1).to_kind(values.kind());
    values.masked_fill(&mask.logical_not(), 0.0).sum(values.kind()) / count
}

/// Mean over all elements of `values * mask * episode_steps / episode_len`: every episode weighs the same, whatever its
/// length, when the rows of a lock-step rollout (valid or not) are all there. Elements of an episode of length 0 count
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

/// PPO's clipped surrogate as a loss per element (Schulman et al. 2017, eq. 7, with separate bounds):
/// `max(-A r, -A clip(r, 1 - low, 1 + high))`.
pub fn clipped_surrogate(ratio: &Tensor, advantage: &Tensor, clip_low: f64, clip_high: f64) -> Tensor {
    let unclipped = -(advantage * ratio);
    let clipped = -(advantage * ratio.clamp(1.0 - clip_low, 1.0 + clip_high));
    unclipped.maximum(&clipped)
}

/// Dual clip (Ye et al. 2020, eq. 5): a bound `c |A|` on the loss of an action that was bad and has become likely.
/// Where the advantage is positive the loss is negative and the bound does nothing.
pub fn dual_clip(surrogate: &Tensor, advantage: &Tensor, bound: f64) -> Tensor {
    surrogate.minimum(&(advantage.abs() * bound))
}

/// The proximal log-probability between the behaviour policy and the current one, by policy versions (decoupled PPO,
/// Hilton et al. 2022, section 3): `old + alpha (current - old)` with
/// `alpha = clamp((v - 1 - v_b) / (v - v_b), 0, 1)`, `v` the learner's version and `v_b` the one that acted. It carries
/// no gradient; an unknown version (negative) gives the behaviour policy's own.
pub fn interpolated_proximal(
    logprob: &Tensor,
    old_logprob: &Tensor,
    versions: &Tensor,
    current: f64,
) -> Result<Tensor> {
    let versions = align("versions", &versions.to_kind(logprob.kind()), "logprob", logprob)?;
    let lag = versions.neg() + current;
    // a lag of 0 means the current policy acted: alpha is then clamped to 0 from minus infinity
    let alpha = ((&lag - 1.0) / lag.clamp_min(1e-6))
        .clamp(0.0, 1.0)
        .masked_fill(&versions.lt(0), 0.0);
    Ok((old_logprob + alpha * (logprob.detach() - old_logprob)).detach())
}

/// What the policy losses read. All tensors fit `logprob` in the sense of [`align`].
#[derive(Debug, Clone, Copy)]
pub struct ActorInput<'a> {
    /// Log-probability of the recorded action under the current weights, at the configured level, with gradient.
    pub logprob: &'a Tensor,
    /// The same under the weights that acted.
    pub old_logprob: &'a Tensor,
    /// The same under the policy that the update stays close to; without it that is the one that acted.
    pub proximal_logprob: Option<&'a Tensor>,
    /// Advantage of each row.
    pub advantage: &'a Tensor,
    /// Rows (or elements) that count; all without it.
    pub mask: Option<&'a Tensor>,
    /// Primitive steps of the row's episode, for [`episode_weighted_mean`].
    pub episode_len: Option<&'a Tensor>,
}

/// What the configuration says about the policy loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ActorSettings {
    /// The ratio is clipped below `1 - clip_low`.
    pub clip_low: f64,
    /// The ratio is clipped above `1 + clip_high`.
    pub clip_high: f64,
    /// Bound of [`dual_clip`], above 1.
    pub dual_clip: Option<f64>,
    /// Bounds of the log-ratio; without them a log-ratio above 88 overflows to an infinite loss.
    pub log_ratio_clamp: Option<(f64, f64)>,
    /// Longest episode in primitive steps: with it, and with mask and episode lengths, rows are weighted by
    /// [`episode_weighted_mean`].
    pub episode_steps: Option<f64>,
    /// Decoupled loss only: rows whose proximal-to-behaviour ratio exceeds this are left out.
    pub behaviour_ratio_max: Option<f64>,
}

/// What happened in one policy loss; all means over the valid elements, the ratio after the configured clamp.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ActorMetrics {
    /// The loss itself.
    pub policy_loss: f64,
    /// Mean ratio of new to old (decoupled: proximal) probability.
    pub ratio: f64,
    /// Mean `|r - 1|`.
    pub ratio_deviation: f64,
    /// Largest `|r - 1|`.
    pub ratio_deviation_max: f64,
    /// `mean((r - 1) - log r)`, never negative (Schulman 2020, "Approximating KL Divergence", estimator k3).
    pub approx_kl: f64,
    /// `mean(-log r)`: unbiased, may be negative (estimator k1).
    pub approx_kl_k1: f64,
    /// Share of elements where the clip decided the loss.
    pub clip_fraction: f64,
    /// Share of elements where the dual clip decided the loss.
    pub dual_clip_fraction: f64,
    /// Share of elements left out because the proximal policy is too far from the one that acted.
    pub behaviour_clip_fraction: f64,
}

/// A policy loss and its metrics.
#[derive(Debug)]
pub struct ActorLoss {
    /// Scalar with gradient.
    pub loss: Tensor,
    /// Read once from the device.
    pub metrics: ActorMetrics,
}

/// The clipped policy loss of PPO (Schulman et al. 2017, eq. 7; dual clip as in Ye et al. 2020, eq. 5).
/// A masked element gives neither loss nor gradient, even where its ratio overflows.
pub fn ppo_actor_loss(input: &ActorInput<'_>, settings: &ActorSettings) -> Result<ActorLoss> {
    actor_loss(
        &ActorInput {
            proximal_logprob: None,
            ..*input
        },
        &ActorSettings {
            behaviour_ratio_max: None,
            ..*settings
        },
    )
}

/// Decoupled PPO (Hilton et al. 2022, eq. 4): the surrogate clips against the proximal policy and each element is
/// weighted by the ratio of the proximal policy to the one that acted.
pub fn decoupled_actor_loss(input: &ActorInput<'_>, settings: &ActorSettings) -> Result<ActorLoss> {
    actor_loss(input, settings)
}

fn actor_loss(input: &ActorInput<'_>, settings: &ActorSettings) -> Result<ActorLoss> {
    let logprob = input.logprob.to_kind(Kind::Float);
    let companion = |name, tensor: &Tensor| align(name, &tensor.to_kind(Kind::Float), "logprob", &logprob);
    let old_logprob = companion("old_logprob", input.old_logprob)?.detach();
    let advantage = companion("advantage", input.advantage)?.detach();
    let proximal = match input.proximal_logprob {
        Some(proximal) => companion("proximal_logprob", proximal)?.detach(),
        None => old_logprob.shallow_clone(),
    };
    let given_mask = match input.mask {
        Some(mask) => align("mask", mask, "logprob", &logprob)?
            .to_kind(Kind::Bool)
            .expand_as(&logprob),
        None => logprob.ones_like().to_kind(Kind::Bool).detach(),
    };

    let behaviour_ratio = (&proximal - &old_logprob)
        .masked_fill(&given_mask.logical_not(), 0.0)
        .exp();
    let mask = match settings.behaviour_ratio_max {
        Some(bound) => given_mask.logical_and(&behaviour_ratio.le(bound)),
        None => given_mask.shallow_clone(),
    };

    let mut log_ratio = (&logprob - &proximal).masked_fill(&mask.logical_not(), 0.0);
    if let Some((low, high)) = settings.log_ratio_clamp {
        log_ratio = log_ratio.clamp(low, high);
    }
    let ratio = log_ratio.exp();
    let surrogate = clipped_surrogate(&ratio, &advantage, settings.clip_low, settings.clip_high);
    let bounded = match settings.dual_clip {
        Some(bound) => dual_clip(&surrogate, &advantage, bound),
        None => surrogate.shallow_clone(),
    };
    let weighted = &bounded * &behaviour_ratio;
    let loss = aggregate(
        &weighted,
        input.mask.map(|_| &mask),
        input.episode_len,
        settings.episode_steps,
    )?;

    let metrics = tch::no_grad(|| {
        let mean = |values: &Tensor| masked_mean(&values.to_kind(Kind::Float), Some(&mask));
        let deviation = (&ratio - 1.0).abs();
        let unclipped = -(&advantage * &ratio);
        let dropped = masked_mean(&mask.logical_not().to_kind(Kind::Float), Some(&given_mask));
        read_metrics(&[
            loss.detach(),
            mean(&ratio),
            mean(&deviation),
            deviation.masked_fill(&mask.logical_not(), 0.0).max(),
            mean(&(&ratio - 1.0 - &log_ratio)),
            mean(&log_ratio.neg()),
            mean(&unclipped.lt_tensor(&surrogate)),
            mean(&bounded.lt_tensor(&surrogate)),
            dropped,
        ])
    })?;
    let [
        policy_loss,
        ratio,
        ratio_deviation,
        ratio_deviation_max,
        approx_kl,
        approx_kl_k1,
        clip,
        dual,
        behaviour,
    ] = metrics;
    let metrics = ActorMetrics {
        policy_loss,
        ratio,
        ratio_deviation,
        ratio_deviation_max,
        approx_kl,
        approx_kl_k1,
        clip_fraction: clip,
        dual_clip_fraction: dual,
        behaviour_clip_fraction: behaviour,
    };
    Ok(ActorLoss { loss, metrics })
}

fn aggregate(
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

fn read_metrics<const N: usize>(scalars: &[Tensor; N]) -> Result<[f64; N]> {
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

/// What the critic loss reads. All tensors fit `value` in the sense of [`align`].
#[derive(Debug, Clone, Copy)]
pub struct CriticInput<'a> {
    /// Value of each row's observation under the current weights, with gradient.
    pub value: &'a Tensor,
    /// The same when the row was recorded.
    pub old_value: &'a Tensor,
    /// Target.
    pub returns: &'a Tensor,
    /// Rows that count; all without it.
    pub mask: Option<&'a Tensor>,
    /// Primitive steps of the row's episode, for [`episode_weighted_mean`].
    pub episode_len: Option<&'a Tensor>,
}

/// What the configuration says about the critic loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CriticSettings {
    /// How far a value may move from the recorded one before the loss stops rewarding it; none: no clip.
    pub value_clip: Option<f64>,
    /// Error at which the loss turns from squared to linear.
    pub huber_delta: f64,
    /// See [`ActorSettings::episode_steps`].
    pub episode_steps: Option<f64>,
}

/// Sums from which the explained variance of any union of batches follows, in f64.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct ExplainedVariance {
    /// Number of elements.
    pub count: f64,
    /// Sum of the returns.
    pub returns_sum: f64,
    /// Sum of the squared returns.
    pub returns_sq_sum: f64,
    /// Sum of the errors `return - value`.
    pub errors_sum: f64,
    /// Sum of the squared errors.
    pub errors_sq_sum: f64,
}

impl ExplainedVariance {
    /// Adds another batch's sums.
    pub fn merge(&mut self, other: &Self) {
        self.count += other.count;
        self.returns_sum += other.returns_sum;
        self.returns_sq_sum += other.returns_sq_sum;
        self.errors_sum += other.errors_sum;
        self.errors_sq_sum += other.errors_sq_sum;
    }

    /// `1 - Var(return - value) / Var(return)`: 1 is a perfect critic, 0 one that knows only the mean. `None` where the
    /// returns do not vary.
    pub fn value(&self) -> Option<f64> {
        let variance = |sum: f64, sq_sum: f64| sq_sum / self.count - (sum / self.count).powi(2);
        let returns = variance(self.returns_sum, self.returns_sq_sum);
        let explained = 1.0 - variance(self.errors_sum, self.errors_sq_sum) / returns;
        (self.count > 1.0 && returns > 0.0).then_some(explained)
    }
}

/// What happened in one critic loss.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub struct CriticMetrics {
    /// The loss itself.
    pub value_loss: f64,
    /// Share of elements whose value had moved further than the clip, before it was clipped.
    pub value_clip_fraction: f64,
    /// Sums for the explained variance of the iteration.
    pub explained_variance: ExplainedVariance,
}

/// A critic loss and its metrics.
#[derive(Debug)]
pub struct CriticLoss {
    /// Scalar with gradient.
    pub loss: Tensor,
    /// Read once from the device.
    pub metrics: CriticMetrics,
}

/// Huber loss per element (Huber 1964): `e^2 / 2` for `|e| < delta`, else `delta (|e| - delta / 2)`.
pub fn huber(value: &Tensor, target: &Tensor, delta: f64) -> Tensor {
    value.huber_loss(target, Reduction::None, delta)
}

/// Clipped Huber value loss (value clipping as in Schulman et al.'s PPO code, see Huang et al. 2022, "The 37
/// Implementation Details of PPO", detail 9): `max(huber(R - V), huber(R - V_clip))`,
/// `V_clip = V_old + clip(V - V_old, -c, c)`. There is no factor 1/2 and no coefficient.
pub fn ppo_critic_loss(input: &CriticInput<'_>, settings: &CriticSettings) -> Result<CriticLoss> {
    let value = input.value.to_kind(Kind::Float);
    let companion = |name, tensor: &Tensor| align(name, &tensor.to_kind(Kind::Float), "value", &value);
    let old_value = companion("old_value", input.old_value)?.detach().expand_as(&value);
    let returns = companion("returns", input.returns)?.detach().expand_as(&value);
    let mask = match input.mask {
        Some(mask) => Some(
            align("mask", mask, "value", &value)?
                .to_kind(Kind::Bool)
                .expand_as(&value),
        ),
        None => None,
    };
    let moved = &value - &old_value;
    let mut errors = huber(&value, &returns, settings.huber_delta);
    if let Some(clip) = settings.value_clip {
        let clipped = &old_value + moved.clamp(-clip, clip);
        errors = errors.maximum(&huber(&clipped, &returns, settings.huber_delta));
    }
    let loss = aggregate(&errors, mask.as_ref(), input.episode_len, settings.episode_steps)?;

    let metrics = tch::no_grad(|| {
        let outside = match settings.value_clip {
            Some(clip) => moved.abs().gt(clip).to_kind(Kind::Float),
            None => moved.zeros_like(),
        };
        let valid = mask
            .as_ref()
            .map_or_else(|| value.ones_like(), |mask| mask.to_kind(Kind::Float));
        let total = |values: &Tensor| {
            let kept = values.to_kind(Kind::Double).masked_fill(&valid.eq(0), 0.0);
            kept.sum(Kind::Double)
        };
        let error = &returns - &value;
        read_metrics(&[
            loss.detach(),
            masked_mean(&outside, mask.as_ref()),
            valid.sum(Kind::Double),
            total(&returns),
            total(&returns.to_kind(Kind::Double).square()),
            total(&error),
            total(&error.to_kind(Kind::Double).square()),
        ])
    })?;
    let [
        value_loss,
        value_clip_fraction,
        count,
        returns_sum,
        returns_sq_sum,
        errors_sum,
        errors_sq_sum,
    ] = metrics;
    let explained_variance = ExplainedVariance {
        count,
        returns_sum,
        returns_sq_sum,
        errors_sum,
        errors_sq_sum,
    };
    Ok(CriticLoss {
        loss,
        metrics: CriticMetrics {
            value_loss,
            value_clip_fraction,
            explained_variance,
        },
    })
}

/// Mean entropy of the valid elements; the mask is spread over the entropy's trailing dimensions, never over rows.
pub fn mean_entropy(entropy: &Tensor, mask: Option<&Tensor>) -> Result<Tensor> {
    let mask = mask.map(|mask| align("mask", mask, "entropy", entropy)).transpose()?;
    Ok(masked_mean(entropy, mask.as_ref()))
}

/// What a policy loss of the registry reads.
#[derive(Debug, Clone, Copy, Default)]
pub struct PolicyInput<'a> {
    /// The policy's part.
    pub actor: Option<ActorInput<'a>>,
    /// The critic's part.
    pub critic: Option<CriticInput<'a>>,
    /// Entropy of the policy per row or element, with gradient; masked as the policy's part is.
    pub entropy: Option<&'a Tensor>,
}

/// What the configuration says about the whole loss.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PolicySettings {
    /// The policy's part.
    pub actor: ActorSettings,
    /// The critic's part.
    pub critic: CriticSettings,
    /// Factor of the critic loss in the sum.
    pub value_coef: f64,
    /// Factor of the mean entropy that is subtracted; 0: the entropy is only reported.
    pub entropy_coef: f64,
}

/// A whole loss and its metrics; a part that the loss does not have is `None`.
#[derive(Debug)]
pub struct PolicyLoss {
    /// Scalar with gradient.
    pub loss: Tensor,
    /// The policy's part.
    pub actor: Option<ActorMetrics>,
    /// The critic's part.
    pub critic: Option<CriticMetrics>,
    /// Mean entropy.
    pub entropy: Option<f64>,
}

/// A loss of the registry.
pub type PolicyLossFn = fn(&PolicyInput<'_>, &PolicySettings) -> Result<PolicyLoss>;

/// The one table of policy losses. `critic` is the loss of the critic's warm-up: the policy stays as it is.
pub const POLICY_LOSSES: [(&str, PolicyLossFn); 4] = [
    ("actor", |input, settings| {
        combine("actor", input, settings, Some(ppo_actor_loss), false)
    }),
    ("critic", |input, settings| {
        combine("critic", input, settings, None, true)
    }),
    ("actor_critic", |input, settings| {
        combine("actor_critic", input, settings, Some(ppo_actor_loss), true)
    }),
    ("decoupled_actor_critic", |input, settings| {
        combine(
            "decoupled_actor_critic",
            input,
            settings,
            Some(decoupled_actor_loss),
            true,
        )
    }),
];

/// The policy loss of this name (`algorithm.loss_type` of the configuration); see [`POLICY_LOSSES`].
pub fn policy_loss(name: &str) -> Option<PolicyLossFn> {
    POLICY_LOSSES
        .iter()
        .find(|(known, _)| *known == name)
        .map(|(_, loss)| *loss)
}

type ActorLossFn = fn(&ActorInput<'_>, &ActorSettings) -> Result<ActorLoss>;

/// `L = L_policy + value_coef L_value - entropy_coef S` (Schulman et al. 2017, eq. 9).
fn combine(
    name: &'static str,
    input: &PolicyInput<'_>,
    settings: &PolicySettings,
    actor_loss: Option<ActorLossFn>,
    with_critic: bool,
) -> Result<PolicyLoss> {
    let missing = |input| LossError::Missing { loss: name, input };
    let mut terms: Vec<Tensor> = Vec::new();
    let mut whole = PolicyLoss {
        loss: Tensor::new(),
        actor: None,
        critic: None,
        entropy: None,
    };
    if let Some(actor_loss) = actor_loss {
        let actor_input = input.actor.as_ref().ok_or_else(|| missing("actor"))?;
        let actor = actor_loss(actor_input, &settings.actor)?;
        terms.push(actor.loss);
        whole.actor = Some(actor.metrics);
        if let Some(entropy) = input.entropy {
            let entropy = mean_entropy(entropy, actor_input.mask)?;
            let [value] = read_metrics(&[entropy.detach()])?;
            whole.entropy = Some(value);
            if settings.entropy_coef > 0.0 {
                terms.push(entropy * -settings.entropy_coef);
            }
        }
    }
    if with_critic {
        let critic_input = input.critic.as_ref().ok_or_else(|| missing("critic"))?;
        let critic = ppo_critic_loss(critic_input, &settings.critic)?;
        terms.push(critic.loss * settings.value_coef);
        whole.critic = Some(critic.metrics);
    }
    whole.loss = terms
        .into_iter()
        .reduce(|sum, term| sum + term)
        .ok_or_else(|| missing("actor"))?;
    Ok(whole)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn f(values: &[f32]) -> Tensor {
        Tensor::from_slice(values)
    }

    #[test]
    fn a_companion_is_never_spread_over_rows() {
        let like = Tensor::zeros([4, 3], (Kind::Float, tch::Device::Cpu));
        let aligned = |shape: &[i64]| {
            align(
                "mask",
                &Tensor::zeros(shape, (Kind::Float, like.device())),
                "like",
                &like,
            )
        };
        assert_eq!(aligned(&[4]).unwrap().size(), [4, 1]);
        assert_eq!(aligned(&[4, 1, 1]).unwrap().size(), [4, 1]);
        assert_eq!(aligned(&[4, 3]).unwrap().size(), [4, 3]);
        for wrong in [&[1i64][..], &[3], &[1, 3], &[], &[4, 2], &[4, 3, 2]] {
            assert!(aligned(wrong).is_err(), "{wrong:?}");
        }
    }

    #[test]
    fn the_entropy_bonus_is_a_mean_whatever_the_masks_shape() {
        // defect of the reference: [rows] entropy times [rows, 1] mask is [rows, rows], and the quotient is the sum of
        // the entropies instead of their mean
        let entropy = f(&[1.0, 2.0, 3.0, 4.0]);
        let mask = f(&[1.0, 1.0, 1.0, 0.0]).to_kind(Kind::Bool).reshape([4, 1]);
        let reference = ((&entropy * &mask).sum(Kind::Float) / mask.sum(Kind::Float)).double_value(&[]);
        assert!((reference - 10.0).abs() < 1e-6, "the reference's number {reference}");
        let ours = mean_entropy(&entropy, Some(&mask)).unwrap().double_value(&[]);
        assert!((ours - 2.0).abs() < 1e-6, "ours {ours}");
    }

    #[test]
    fn a_missing_input_is_named() {
        let settings = PolicySettings {
            actor: ActorSettings {
                clip_low: 0.2,
                clip_high: 0.2,
                dual_clip: None,
                log_ratio_clamp: None,
                episode_steps: None,
                behaviour_ratio_max: None,
            },
            critic: CriticSettings {
                value_clip: None,
                huber_delta: 1.0,
                episode_steps: None,
            },
            value_coef: 1.0,
            entropy_coef: 0.0,
        };
        let loss = policy_loss("critic").unwrap();
        let error = loss(&PolicyInput::default(), &settings).unwrap_err();
        assert_eq!(error.to_string(), "policy loss `critic` needs the `critic` input");
        assert!(policy_loss("sac").is_none());
    }

    #[test]
    fn explained_variance_of_a_union_is_that_of_the_whole() {
        let critic = |value: &[f32], returns: &[f32]| {
            let (value, returns) = (f(value), f(returns));
            let input = CriticInput {
                value: &value,
                old_value: &value,
                returns: &returns,
                mask: None,
                episode_len: None,
            };
            let settings = CriticSettings {
                value_clip: None,
                huber_delta: 1.0,
                episode_steps: None,
            };
            ppo_critic_loss(&input, &settings).unwrap().metrics.explained_variance
        };
        let whole = critic(&[0.1, 0.9, 0.4, 0.6], &[0.0, 1.0, 0.0, 1.0]);
        let mut merged = critic(&[0.1, 0.9], &[0.0, 1.0]);
        merged.merge(&critic(&[0.4, 0.6], &[0.0, 1.0]));
        let (whole, merged) = (whole.value().unwrap(), merged.value().unwrap());
        // errors -0.1, 0.1, -0.4, 0.4: variance 0.085 against 0.25
        assert!(
            (whole - 0.66).abs() < 1e-6 && (merged - whole).abs() < 1e-12,
            "{whole} {merged}"
        );
        assert!(critic(&[0.0, 0.0], &[1.0, 1.0]).value().is_none());
    }
}
