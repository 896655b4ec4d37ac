//! Policy and critic losses, their gradients and metrics.

use std::collections::BTreeMap;

use integration_tests::{assert_close, assert_close_relative};
use learner::loss::{
    ActorInput, ActorLoss, ActorMetrics, ActorSettings, CriticInput, CriticLoss, CriticSettings, align,
    decoupled_actor_loss, interpolated_proximal, ppo_actor_loss, ppo_critic_loss,
};
use tch::{Kind, Tensor};

use super::{ABS, Case, Coverage, GRAD, floats, run, same};

pub(super) fn actor_settings(case: &Case<'_>) -> ActorSettings {
    let clamp = |low: Option<f64>, high: Option<f64>| {
        (low.is_some() || high.is_some()).then(|| (low.unwrap_or(f64::NEG_INFINITY), high.unwrap_or(f64::INFINITY)))
    };
    ActorSettings {
        clip_ratio_low: case.need("clip_ratio_low"),
        clip_ratio_high: case.need("clip_ratio_high"),
        clip_ratio_c: case.number("clip_ratio_c"),
        clip_log_ratio: clamp(case.number("clip_log_ratio_min"), case.number("clip_log_ratio_max")),
        episode_steps: case.number("max_episode_steps"),
        behave_weight_threshold: case.number("behave_weight_threshold"),
        kl_beta: None,
    }
}

/// Sums of a plain f64 loop over the elements of one policy loss: the oracle of our metrics and, with the reference's denominators, of the
/// recorded metrics.
pub(super) struct ActorOracle {
    metrics: BTreeMap<&'static str, f64>,
    reference: BTreeMap<&'static str, f64>,
    /// Valid elements over set mask entries, the factor by which the reference's sums are too large.
    pub(super) excess: f64,
}

pub(super) fn actor_oracle(input: &ActorInput<'_>, settings: &ActorSettings) -> ActorOracle {
    let logprob = input.new_logprob.detach();
    let spread = |tensor: &Tensor| -> Vec<f64> {
        let aligned = align("oracle", &tensor.to_kind(Kind::Double), "logprob", &logprob).unwrap();
        Vec::try_from(aligned.expand_as(&logprob).contiguous().reshape([-1])).unwrap()
    };
    let (new, old, advantage) = (spread(&logprob), spread(input.old_logprob), spread(input.advantages));
    let ones = logprob.ones_like();
    let mask = spread(input.mask.unwrap_or(&ones));
    let valid = mask.iter().filter(|m| **m != 0.0).count().max(1) as f64;
    let entries = input
        .mask
        .map_or(valid, |mask| mask.sum(Kind::Double).double_value(&[]).max(1.0));
    let excess = if mask.iter().all(|m| *m == 0.0) {
        1.0
    } else {
        valid / entries
    };
    let mut sums: BTreeMap<&'static str, f64> = BTreeMap::new();
    let mut largest = 0.0f64;
    for at in (0..new.len()).filter(|at| mask[*at] != 0.0) {
        let moved = new[at] - old[at];
        let log_ratio = settings
            .clip_log_ratio
            .map_or(moved, |(low, high)| moved.clamp(low, high));
        // f32, as in both programs: an overflow is infinite here too
        let ratio = f64::from((log_ratio as f32).exp());
        let clipped_ratio = ratio.clamp(1.0 - settings.clip_ratio_low, 1.0 + settings.clip_ratio_high);
        let (unclipped, clipped) = (-advantage[at] * ratio, -advantage[at] * clipped_ratio);
        let surrogate = unclipped.max(clipped);
        let bound = settings.clip_ratio_c.map_or(f64::INFINITY, |c| c * advantage[at].abs());
        largest = largest.max((ratio - 1.0).abs());
        let mut add = |name, value: f64| *sums.entry(name).or_insert(0.0) += value;
        add("policy_loss", surrogate.min(bound));
        add("policy_loss_abs", surrogate.min(bound).abs());
        add("ratio", ratio);
        add("ratio_abs", (ratio - 1.0).abs());
        add("clipped_ratio", clipped_ratio);
        add("dual_cliped_ratio", if bound < surrogate { ratio } else { 0.0 });
        add("dual_clip_fraction", f64::from(u8::from(bound < surrogate)));
        add("k1", -moved);
        add("clamped_k1", -log_ratio);
        add("k3", f64::from((moved as f32).exp()) - 1.0 - moved);
        add("clip_fraction", f64::from(u8::from(unclipped < clipped)));
    }
    let mean = |name: &str| sums.get(name).copied().unwrap_or(0.0) / valid;
    let metrics = BTreeMap::from([
        ("ratio", mean("ratio")),
        ("ratio_deviation", mean("ratio_abs")),
        ("ratio_deviation_max", largest),
        ("approx_kl", mean("k3")),
        ("approx_kl_k1", mean("k1")),
        ("clip_fraction", mean("clip_fraction")),
        ("dual_clip_fraction", mean("dual_clip_fraction")),
    ]);
    // the reference spreads the mask for its ratio metrics only where the log-probs have three dimensions
    let ratio_excess = if logprob.dim() > 2 { 1.0 } else { excess };
    let mut reference = BTreeMap::from([
        ("ratio", mean("ratio") * ratio_excess),
        ("ratio_abs", mean("ratio_abs") * ratio_excess),
        ("clipped_ratio", mean("clipped_ratio") * ratio_excess),
        ("dual_cliped_ratio", mean("dual_cliped_ratio") * ratio_excess),
        ("approx_kl", mean("clamped_k1") * excess),
        ("clip_fraction", mean("clip_fraction") * excess),
    ]);
    // with weights by episode that mean differs
    if settings.episode_steps.is_none() {
        reference.insert("policy_loss_abs", mean("policy_loss_abs") * excess);
    }
    ActorOracle {
        metrics,
        reference,
        excess,
    }
}

pub(super) fn check_actor_metrics(case: &Case<'_>, oracle: &ActorOracle, ours: &ActorLoss) {
    let metrics = &ours.metrics;
    for (name, got) in [
        ("ratio", metrics.ratio),
        ("ratio_deviation", metrics.ratio_deviation),
        ("ratio_deviation_max", metrics.ratio_deviation_max),
        ("approx_kl", metrics.approx_kl),
        ("approx_kl_k1", metrics.approx_kl_k1),
        ("clip_fraction", metrics.clip_fraction),
        ("dual_clip_fraction", metrics.dual_clip_fraction),
    ] {
        case.close(&format!("our {name}"), got, oracle.metrics[name]);
    }
    for (name, expected) in &oracle.reference {
        let recorded = format!("out.metric.actor/{name}");
        if case.has(&recorded) {
            case.close(&format!("recorded {name}"), case.scalar(&recorded), *expected);
        }
    }
}

/// Returns the line with both estimates of the KL if a clamp of the log-ratio makes them differ; ours is of the policy, not of the clamp.
pub(super) fn clamped_kl(case: &Case<'_>, oracle: &ActorOracle) -> Option<String> {
    let (clamped, ours) = (
        oracle.reference["approx_kl"] / oracle.excess,
        oracle.metrics["approx_kl_k1"],
    );
    (clamped - ours).abs().gt(&ABS).then(|| {
        let recorded = case.scalar("out.metric.actor/approx_kl");
        format!("approx_kl {recorded:.5} of the clamped log-ratio, ours {ours:.5} of the log-ratio")
    })
}

/// Compares loss and gradient, `excess` times too large in the reference.
fn check_loss(case: &Case<'_>, loss: &Tensor, leaf: &Tensor, gradient: &str, excess: f64) {
    if case.has("out.loss") {
        case.close("loss", loss.double_value(&[]) * excess, case.scalar("out.loss"));
    }
    if !case.has(gradient) {
        return;
    }
    let mut recorded = case.array(gradient);
    for value in &mut recorded.data {
        *value /= excess;
    }
    let got = floats(&leaf.grad());
    if recorded.data.iter().all(|value| value.is_finite()) {
        assert_close_relative(&format!("{} {gradient}", case.id), &got, &recorded, GRAD);
    } else {
        assert_close(&format!("{} {gradient}", case.id), &got, &recorded, ABS);
    }
}

/// Tensors of one recorded policy loss.
struct ActorTensors {
    logprob: Tensor,
    old_logprob: Tensor,
    proximal: Option<Tensor>,
    advantages: Tensor,
    mask: Option<Tensor>,
    episode_len: Option<Tensor>,
}

impl ActorTensors {
    fn read(case: &Case<'_>) -> Self {
        let logprob = case.leaf("logprobs");
        let old_logprob = case.input("old_logprobs");
        let proximal = case.maybe_input("proximal_logprobs").or_else(|| {
            let versions = case.maybe_input("versions")?;
            Some(interpolated_proximal(&logprob, &old_logprob, &versions, case.need("current_version")).unwrap())
        });
        let (mask, episode_len) = (case.maybe_input("loss_mask"), case.maybe_input("loss_mask_sum"));
        Self {
            logprob,
            old_logprob,
            proximal,
            advantages: case.input("advantages"),
            mask,
            episode_len,
        }
    }
    fn input(&self) -> ActorInput<'_> {
        ActorInput {
            new_logprob: &self.logprob,
            old_logprob: &self.old_logprob,
            proximal_logprob: self.proximal.as_ref(),
            reference_logprob: None,
            advantages: &self.advantages,
            mask: self.mask.as_ref(),
            episode_len: self.episode_len.as_ref(),
        }
    }
}

fn check_actor(case: &Case<'_>, coverage: &mut Coverage) {
    let tensors = ActorTensors::read(case);
    let (input, settings) = (tensors.input(), actor_settings(case));
    let ours = ppo_actor_loss(&input, &settings).unwrap();
    let oracle = actor_oracle(&input, &settings);
    check_actor_metrics(case, &oracle, &ours);

    if case.flag("critic_warmup") == Some(true) {
        case.close("recorded loss", case.scalar("out.loss"), 0.0);
        coverage.differs(case, "critic warm-up: the reference returns a constant 0, ours is the `critic` loss that has no policy part; metrics equal");
        return;
    }
    ours.loss.backward();
    let gradient = floats(&tensors.logprob.grad());
    if settings.episode_steps.is_some() && case.array("in.loss_mask_sum").data.contains(&0.0) {
        assert!(
            !case.scalar("out.loss").is_finite(),
            "{}: the reference divides by 0",
            case.id
        );
        assert!(ours.loss.double_value(&[]).is_finite() && gradient.iter().all(|value| value.is_finite()));
        let recorded = case.array("out.grad.logprobs");
        let lengths = case.array("in.loss_mask_sum");
        for (at, length) in lengths.data.iter().enumerate() {
            if *length > 0.0 {
                case.close("gradient", f64::from(gradient[at]), recorded.data[at]);
            } else {
                case.close("gradient", f64::from(gradient[at]), 0.0);
            }
        }
        coverage.differs(
            case,
            "an episode of length 0: the reference divides by it (inf), ours counts it as masked",
        );
        return;
    }
    let masked_overflow = case.maybe("in.loss_mask").is_some_and(|mask| {
        let recorded = case.maybe("out.grad.logprobs");
        recorded.is_some_and(|recorded| {
            recorded
                .data
                .iter()
                .zip(&mask.data)
                .any(|(gradient, mask)| *mask == 0.0 && gradient.is_nan())
        })
    });
    if masked_overflow {
        case.close("loss", ours.loss.double_value(&[]), case.scalar("out.loss"));
        let (recorded, mask) = (case.array("out.grad.logprobs"), case.array("in.loss_mask"));
        for (at, valid) in mask.data.iter().enumerate() {
            let want = if *valid == 0.0 { 0.0 } else { recorded.data[at] };
            case.close("gradient", f64::from(gradient[at]), want);
        }
        coverage.differs(
            case,
            "an overflow in masked entries: the reference's gradient there is NaN, ours 0",
        );
        return;
    }
    let excess = if settings.episode_steps.is_some() && tensors.mask.is_some() {
        1.0
    } else {
        oracle.excess
    };
    check_loss(case, &ours.loss, &tensors.logprob, "out.grad.logprobs", excess);
    if oracle.excess > 1.0 {
        let (recorded, ours) = (case.scalar("out.loss"), ours.loss.double_value(&[]));
        coverage.differs(case, &format!("a mask spread over {} elements divides the reference's sums by its entries: loss {recorded:.5}, ours {ours:.5}", oracle.excess));
    } else if let Some(why) = clamped_kl(case, &oracle) {
        coverage.differs(case, &why);
    }
}

fn check_decoupled(case: &Case<'_>, coverage: &mut Coverage) {
    let tensors = ActorTensors::read(case);
    let (input, settings) = (tensors.input(), actor_settings(case));
    let ours = decoupled_actor_loss(&input, &settings).unwrap();
    ours.loss.backward();
    let excess = actor_oracle(&input, &settings).excess;
    let dropped = ours.metrics.behaviour_clip_fraction;
    // the reference divides by the remaining elements, ours by all valid elements
    let factor = excess / (1.0 - dropped);
    check_loss(case, &ours.loss, &tensors.logprob, "out.grad.logprobs", factor);
    case.close(
        "dropped",
        ours.metrics.behaviour_clip_fraction,
        case.scalar("out.metric.actor/behav_clip_fraction"),
    );
    if excess > 1.0 {
        let (loss, ours) = (case.scalar("out.loss"), ours.loss.double_value(&[]));
        coverage.differs(case, &format!("a mask spread over {excess} elements divides the reference's sums by its entries: loss {loss:.5}, ours {ours:.5}"));
    } else if dropped > 0.0 {
        let (recorded, clip) = (
            case.scalar("out.metric.actor/clip_fraction"),
            ours.metrics.clip_fraction,
        );
        let (loss, ours) = (case.scalar("out.loss"), ours.loss.double_value(&[]));
        coverage.differs(case, &format!("{dropped:.2} of the elements dropped: loss {loss:.5}, ours {ours:.5} over all valid ones; share of clipped elements {recorded:.2} of the valid ones, ours {clip:.2} of those that were not dropped"));
    }
    check_decoupled_metrics(case, &ours.metrics, excess);
}

/// Compares the metrics of decoupled PPO that ours also has, over the valid elements, if no element was dropped.
pub(super) fn check_decoupled_metrics(case: &Case<'_>, ours: &ActorMetrics, excess: f64) {
    if ours.behaviour_clip_fraction > 0.0 {
        return;
    }
    for (recorded, ours) in [
        ("proximal_ratio", ours.ratio),
        ("clip_fraction", ours.clip_fraction),
        ("dual_clip_fraction", ours.dual_clip_fraction),
    ] {
        let name = format!("out.metric.actor/{recorded}");
        case.close(&name, ours * excess, case.scalar(&name));
    }
}

/// Returns the reference's `value_clip_ratio`: the share of clipped values outside the clip, including masked values. Only rounding puts a
/// value there.
fn reference_value_clip_ratio(input: &CriticInput<'_>, clip: f64) -> f64 {
    tch::no_grad(|| {
        let clipped = input.old_value + (input.value - input.old_value).clamp(-clip, clip);
        (clipped - input.old_value)
            .abs()
            .gt(clip)
            .to_kind(Kind::Float)
            .mean(Kind::Float)
            .double_value(&[])
    })
}

fn true_value_clip_fraction(input: &CriticInput<'_>, clip: f64) -> f64 {
    let value = floats(input.value);
    let old = floats(input.old_value);
    let mask = input.mask.map_or_else(|| vec![1.0; value.len()], floats);
    assert_eq!(mask.len(), value.len());
    let valid: f64 = mask.iter().map(|m| f64::from(*m)).sum();
    let outside = (0..value.len()).filter(|at| mask[*at] != 0.0 && f64::from((value[*at] - old[*at]).abs()) > clip);
    outside.count() as f64 / valid.max(1.0)
}

/// Compares the critic metrics of a case; returns the line with both clip shares if they differ.
pub(super) fn check_critic_metrics(
    case: &Case<'_>,
    input: &CriticInput<'_>,
    clip: f64,
    ours: &CriticLoss,
) -> Option<String> {
    let sums = ours.metrics.explained_variance;
    for (name, got) in [
        ("count", sums.count),
        ("returns_sum", sums.returns_sum),
        ("returns_sq_sum", sums.returns_sq_sum),
        ("errors_sum", sums.errors_sum),
        ("errors_sq_sum", sums.errors_sq_sum),
    ] {
        case.close(
            name,
            got,
            case.scalar(&format!("out.metric.__sum__/_critic_explained_variance/{name}")),
        );
    }
    let recorded = case.scalar("out.metric.critic/value_clip_ratio");
    case.close(
        "recorded value_clip_ratio",
        recorded,
        reference_value_clip_ratio(input, clip),
    );
    let fraction = ours.metrics.value_clip_fraction;
    case.close(
        "our value_clip_fraction",
        fraction,
        true_value_clip_fraction(input, clip),
    );
    (!same(recorded, fraction)).then(|| {
        format!("clipped values: the reference compares them after clipping and logs {recorded:.3}, ours before: {fraction:.3}; the critic's loss and gradient are equal")
    })
}

pub(super) fn critic_settings(case: &Case<'_>) -> CriticSettings {
    CriticSettings {
        value_clip: case.number("value_clip"),
        huber_delta: case.need("huber_delta"),
        episode_steps: case.number("max_episode_steps"),
    }
}

/// Tensors of one recorded critic loss.
pub(super) struct CriticTensors {
    pub(super) value: Tensor,
    old_value: Tensor,
    returns: Tensor,
    mask: Option<Tensor>,
    episode_len: Option<Tensor>,
}

impl CriticTensors {
    pub(super) fn read(case: &Case<'_>) -> Self {
        Self {
            value: case.leaf("values"),
            old_value: case.input("prev_values"),
            returns: case.input("returns"),
            mask: case.maybe_input("loss_mask"),
            episode_len: case.maybe_input("loss_mask_sum"),
        }
    }
    pub(super) fn input(&self) -> CriticInput<'_> {
        CriticInput {
            value: &self.value,
            old_value: &self.old_value,
            returns: &self.returns,
            mask: self.mask.as_ref(),
            episode_len: self.episode_len.as_ref(),
        }
    }
}

fn check_critic(case: &Case<'_>, coverage: &mut Coverage) {
    let tensors = CriticTensors::read(case);
    let settings = critic_settings(case);
    let ours = ppo_critic_loss(&tensors.input(), &settings).unwrap();
    ours.loss.backward();
    check_loss(case, &ours.loss, &tensors.value, "out.grad.values", 1.0);
    if let Some(why) = check_critic_metrics(case, &tensors.input(), settings.value_clip.unwrap(), &ours) {
        coverage.differs(case, &why);
    }
}

#[test]
fn losses_agree_with_the_reference() {
    run("rlinf_losses", &[], |case, coverage| {
        match case.spec["fn"].as_str().unwrap() {
            "compute_ppo_actor_loss" => check_actor(case, coverage),
            "compute_decoupled_ppo_actor_loss" => check_decoupled(case, coverage),
            "compute_ppo_critic_loss" => check_critic(case, coverage),
            other => panic!("unknown function {other}"),
        }
    });
}
