//! Advantages, losses, optimizer and schedules against the recorded reference. Where the reference is wrong, both
//! numbers are stated: the recorded one is reproduced from its cause by a few lines here, ours is the library's.
#![expect(
    clippy::expect_used,
    clippy::float_cmp,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "helpers of tests: they fail by panicking, print what was covered and compare infinities"
)]

use std::collections::{BTreeMap, BTreeSet};

use integration_tests::{Array, Golden, assert_close, assert_close_relative, golden_cases};
use learner::advantage::{
    self, AdvantageError, ChunkLayout, Episode, EstimatorSettings, GaeGrid, Layout, chunk_any, chunk_sum,
    chunks_from_steps, episode_scores, estimator, gae, group_relative_grid, keep_groups, loss_mask, normalize,
    reward_to_go, spread, stack_epochs, steps_from_chunks,
};
use learner::loss::{
    ActorInput, ActorLoss, ActorSettings, CriticInput, CriticLoss, CriticSettings, ExplainedVariance, LogprobLevel,
    PolicyInput, PolicySettings, aggregate_logprob, align, decoupled_actor_loss, episode_weighted_mean, huber,
    interpolated_proximal, masked_mean, policy_loss, ppo_actor_loss, ppo_critic_loss,
};
use learner::optim::{AdamW, AdamWSettings, Decay, ParamGroup, Schedule};
use serde_json::Value;
use tch::{Kind, Tensor};

/// Tolerance of losses and advantages: f32 sums over some tens of elements.
const ABS: f64 = 1e-5;
/// Tolerance of gradients, relative to the tensor's largest magnitude.
const GRAD: f64 = 1e-3;

/// One recorded call.
struct Case<'a> {
    golden: &'a Golden,
    spec: &'a Value,
    id: String,
}

impl Case<'_> {
    fn arg(&self, name: &str) -> &Value {
        &self.spec["args"][name]
    }
    fn number(&self, name: &str) -> Option<f64> {
        self.arg(name).as_f64()
    }
    fn need(&self, name: &str) -> f64 {
        self.number(name)
            .unwrap_or_else(|| panic!("{}: no number `{name}`", self.id))
    }
    fn text(&self, name: &str) -> &str {
        self.arg(name)
            .as_str()
            .unwrap_or_else(|| panic!("{}: no text `{name}`", self.id))
    }
    fn flag(&self, name: &str) -> Option<bool> {
        self.arg(name).as_bool()
    }
    fn has(&self, name: &str) -> bool {
        self.golden.has(&format!("{}.{name}", self.id))
    }
    fn array(&self, name: &str) -> Array {
        self.golden.get(&format!("{}.{name}", self.id))
    }
    fn maybe(&self, name: &str) -> Option<Array> {
        self.has(name).then(|| self.array(name))
    }
    fn scalar(&self, name: &str) -> f64 {
        self.array(name).data[0]
    }
    fn input(&self, name: &str) -> Tensor {
        tensor(&self.array(&format!("in.{name}")))
    }
    fn maybe_input(&self, name: &str) -> Option<Tensor> {
        self.maybe(&format!("in.{name}")).map(|array| tensor(&array))
    }
    fn leaf(&self, name: &str) -> Tensor {
        self.input(name).set_requires_grad(true)
    }
    fn close(&self, what: &str, got: f64, want: f64) {
        let label = format!("{} {what}", self.id);
        assert!(same(got, want), "{label}: {got} against {want}");
    }
    fn close_array(&self, name: &str, got: &[f32]) {
        assert_close(&format!("{} {name}", self.id), got, &self.array(name), ABS);
    }
}

/// Equal within [`ABS`] of a number of order 1; large ones (an overflowing ratio) to the same number of digits.
fn same(got: f64, want: f64) -> bool {
    (got.is_nan() && want.is_nan()) || got == want || (got - want).abs() <= ABS * want.abs().max(1.0)
}

fn tensor(array: &Array) -> Tensor {
    let values = Tensor::from_slice(&array.data).reshape(array.dims());
    match array.dtype {
        safetensors::Dtype::BOOL => values.to_kind(Kind::Bool),
        safetensors::Dtype::I64 => values.to_kind(Kind::Int64),
        _ => values.to_kind(Kind::Float),
    }
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.detach().to_kind(Kind::Float).reshape([-1])).unwrap()
}

fn flags(array: &Array) -> Vec<f32> {
    array.f32()
}

fn as_floats(flags: &[bool]) -> Vec<f32> {
    flags.iter().map(|flag| f32::from(u8::from(*flag))).collect()
}

fn layout(array: &Array) -> Layout {
    Layout {
        steps: array.shape[0],
        envs: array.shape[1],
    }
}

/// What became of the cases of one file. Every case is in exactly one list.
#[derive(Default)]
struct Coverage {
    same: Vec<String>,
    differs: Vec<(String, String)>,
    not_built: Vec<(String, String)>,
}

impl Coverage {
    fn differs(&mut self, case: &Case<'_>, why: &str) {
        self.differs.push((case.id.clone(), why.to_owned()));
    }
    fn not_built(&mut self, case: &Case<'_>, function: &str) {
        self.not_built.push((case.id.clone(), function.to_owned()));
    }
    /// Prints the counts; `not_built` are the functions of the file that wait for issue 3, sorted.
    fn finish(self, stem: &str, total: usize, not_built: &[&str]) {
        println!(
            "golden {stem}: {total} cases, {} equal, {} differ on purpose, {} not built (issue 3): {:?}",
            self.same.len(),
            self.differs.len(),
            self.not_built.len(),
            self.not_built
        );
        for (case, why) in &self.differs {
            println!("  {case}: {why}");
        }
        let waiting: BTreeSet<&str> = self.not_built.iter().map(|(_, function)| function.as_str()).collect();
        assert_eq!(
            waiting.into_iter().collect::<Vec<_>>(),
            not_built,
            "{stem}: functions that wait"
        );
        assert_eq!(
            self.same.len() + self.differs.len() + self.not_built.len(),
            total,
            "{stem}: every case is covered"
        );
    }
}

/// Runs `check` on every case of a golden file; it says what became of the case in the coverage.
fn run(stem: &str, not_built: &[&str], mut check: impl FnMut(&Case<'_>, &mut Coverage)) {
    let golden = Golden::open(stem);
    let all = golden_cases(stem);
    let cases = all["cases"].as_array().expect("list of cases");
    assert!(!cases.is_empty(), "{stem} has no case");
    let mut coverage = Coverage::default();
    for spec in cases {
        let id = spec["case"].as_str().expect("case name").to_owned();
        let case = Case {
            golden: &golden,
            spec,
            id,
        };
        let before = coverage.differs.len() + coverage.not_built.len();
        check(&case, &mut coverage);
        if coverage.differs.len() + coverage.not_built.len() == before {
            coverage.same.push(case.id.clone());
        }
    }
    coverage.finish(stem, cases.len(), not_built);
}

// ---- advantages

/// GAE of the reference's layout: `dones` has one row more than the rewards and every end is a terminal.
fn reference_gae(
    layout: Layout,
    rewards: &[f32],
    values: &[f32],
    dones: &[bool],
    gamma: f64,
    lambda: f64,
) -> advantage::Advantages {
    let ended = &dones[layout.envs..];
    let open = vec![false; layout.len()];
    let input = GaeGrid {
        layout,
        rewards,
        values,
        terminated: ended,
        truncated: &open,
        final_values: None,
    };
    gae(&input, gamma, lambda).unwrap()
}

fn check_gae(case: &Case<'_>, coverage: &mut Coverage) {
    let rewards = case.array("in.rewards");
    let layout = layout(&rewards);
    let dones = case.array("in.dones").bool();
    let mask = case.maybe("in.loss_mask").map(|mask| mask.bool());
    let (mut advantages, mut returns) = if let Some(values) = case.maybe("in.values") {
        let (gamma, lambda) = (case.need("gamma"), case.need("gae_lambda"));
        let out = reference_gae(layout, &rewards.f32(), &values.f32(), &dones, gamma, lambda);
        (out.advantages, out.returns)
    } else {
        let to_go = reward_to_go(layout, &rewards.f32(), &dones[layout.envs..]).unwrap();
        (to_go.clone(), to_go)
    };
    if case.flag("normalize_advantages").unwrap_or(true) {
        normalize(&mut advantages, mask.as_deref());
    }
    if case.flag("normalize_returns").unwrap_or(false) {
        normalize(&mut returns, mask.as_deref());
    }
    case.close_array("out.returns", &returns);
    let recorded = case.array("out.advantages");
    if mask
        .as_ref()
        .is_some_and(|mask| mask.iter().filter(|valid| **valid).count() == 1)
    {
        assert!(
            recorded.data.iter().all(|value| value.is_nan()),
            "{}: the reference's NaN",
            case.id
        );
        assert!(advantages.iter().all(|value| value.is_finite()));
        coverage.differs(
            case,
            "one valid entry has no spread: the reference turns all advantages into NaN, ours stay as they are",
        );
    } else {
        case.close_array("out.advantages", &advantages);
    }
}

fn check_grpo(case: &Case<'_>, coverage: &mut Coverage) {
    let mask = case.array("in.loss_mask");
    let scores = case.array("in.rewards").f32();
    let group_size = case.need("group_size") as usize;
    match group_relative_grid(layout(&mask), &scores, group_size, &mask.bool()) {
        Ok(advantages) => {
            case.close_array("out.advantages", &advantages);
            // the registry's ragged form: one episode per environment
            let rewards: Vec<[f32; 1]> = scores.iter().map(|score| [*score]).collect();
            let episodes: Vec<Episode<'_>> = rewards
                .iter()
                .enumerate()
                .map(|(at, rewards)| Episode {
                    rewards,
                    values: &[],
                    final_value: 0.0,
                    group: (at / group_size) as u64,
                })
                .collect();
            let settings = EstimatorSettings {
                gamma: 1.0,
                gae_lambda: 1.0,
            };
            let ragged: Vec<f32> = estimator("grpo").unwrap()(&episodes, settings)
                .unwrap()
                .iter()
                .map(|episode| episode.advantages[0])
                .collect();
            case.close_array("out.advantages", &spread(layout(&mask), &ragged, &mask.bool()).unwrap());
        }
        Err(AdvantageError::Group { .. }) => {
            assert!(group_size < 2);
            assert!(case.array("out.advantages").data.iter().any(|value| value.is_nan()));
            coverage.differs(
                case,
                "a group of 1 has no spread: the reference gives NaN, ours is an error",
            );
        }
        Err(other) => panic!("{}: {other}", case.id),
    }
}

#[test]
fn advantages_agree_with_the_reference() {
    run(
        "rlinf_advantages",
        &["grpo_dynamic", "grpo_video", "opd", "reinpp"],
        |case, coverage| {
            let name = case.spec["fn"]
                .as_str()
                .unwrap()
                .trim_start_matches("get_adv_and_returns('")
                .trim_end_matches("')");
            match name {
                "gae" => check_gae(case, coverage),
                "grpo" => check_grpo(case, coverage),
                "raw" => {
                    let mask = case.array("in.loss_mask");
                    let mut advantages = spread(layout(&mask), &case.array("in.rewards").f32(), &mask.bool()).unwrap();
                    if case.flag("normalize_advantages").unwrap_or(true) {
                        normalize(&mut advantages, Some(&mask.bool()));
                    }
                    case.close_array("out.advantages", &advantages);
                }
                "grpo_video" | "grpo_dynamic" | "reinpp" | "opd" => {
                    assert!(estimator(name).is_none(), "{name} is built: test it");
                    coverage.not_built(case, name);
                }
                other => panic!("unknown function {other}"),
            }
        },
    );
}

// ---- embodied pipeline

fn chunk_layout(array: &Array) -> ChunkLayout {
    ChunkLayout {
        chunks: array.shape[0],
        envs: array.shape[1],
        chunk_len: array.shape[2],
    }
}

/// `[chunks + 1, envs, chunk_len]` flags to one row more than there are steps: the last ones.
fn step_dones(dones: &Array) -> Vec<bool> {
    let layout = chunk_layout(dones);
    let rows = steps_from_chunks(layout, &dones.bool()).unwrap();
    rows[(layout.chunk_len - 1) * layout.envs..].to_vec()
}

/// Loss mask and episode lengths in primitive steps of `[chunks + 1, envs, chunk_len]` flags, the mask per chunk layout.
fn chunk_loss_mask(dones: &Array) -> (ChunkLayout, Vec<bool>, Vec<usize>) {
    let full = chunk_layout(dones);
    let layout = ChunkLayout {
        chunks: full.chunks - 1,
        ..full
    };
    let mask = loss_mask(layout.step_grid(), &step_dones(dones)).unwrap();
    (
        layout,
        chunks_from_steps(layout, &mask.valid).unwrap(),
        mask.episode_len,
    )
}

/// Rewards, dones, values and mask of a grid, of chunks or of primitive steps.
struct Preprocessed {
    layout: Layout,
    rewards: Vec<f32>,
    dones: Vec<bool>,
    values: Option<Vec<f32>>,
    mask: Option<Vec<bool>>,
}

fn preprocess(case: &Case<'_>) -> Preprocessed {
    let rewards = case.array("in.rewards");
    let dones = case.array("in.dones");
    let chunk = chunk_layout(&rewards);
    let values = case.maybe("in.values");
    let mask = case.maybe("in.loss_mask");
    if case.text("reward_type") == "chunk_level" {
        return Preprocessed {
            layout: chunk.chunk_grid(),
            rewards: chunk_sum(chunk, &rewards.f32()).unwrap(),
            dones: chunk_any(chunk_layout(&dones), &dones.bool()).unwrap(),
            values: values.map(|values| values.f32()),
            mask: mask.map(|mask| chunk_any(chunk_layout(&mask), &mask.bool()).unwrap()),
        };
    }
    let layout = chunk.step_grid();
    Preprocessed {
        layout,
        rewards: steps_from_chunks(chunk, &rewards.f32()).unwrap(),
        dones: step_dones(&dones),
        values: values.map(|values| {
            let mut rows = steps_from_chunks(chunk_layout(&values), &values.f32()).unwrap();
            rows.truncate(layout.len() + layout.envs);
            rows
        }),
        mask: mask.map(|mask| steps_from_chunks(chunk_layout(&mask), &mask.bool()).unwrap()),
    }
}

fn check_pipeline(case: &Case<'_>) {
    let pre = preprocess(case);
    case.close_array("out.pre.rewards", &pre.rewards);
    case.close_array("out.pre.dones", &as_floats(&pre.dones));
    if let Some(values) = &pre.values {
        case.close_array("out.pre.values", values);
    }
    if let Some(mask) = &pre.mask {
        case.close_array("out.pre.loss_mask", &as_floats(mask));
    }
    // back from steps to [chunks, envs, chunk_len], where the reference gives it that way
    let shaped = |rows: &[f32]| {
        let chunk = chunk_layout(&case.array("in.rewards"));
        if case.text("reward_type") == "chunk_level" {
            rows.to_vec()
        } else {
            chunks_from_steps(chunk, rows).unwrap()
        }
    };
    if case.text("adv_type") == "gae" {
        let values = pre.values.as_ref().expect("GAE has values");
        let (gamma, lambda) = (case.need("gamma"), case.need("gae_lambda"));
        let mut out = reference_gae(pre.layout, &pre.rewards, values, &pre.dones, gamma, lambda);
        normalize(&mut out.advantages, pre.mask.as_deref());
        case.close_array("out.advantages", &shaped(&out.advantages));
        case.close_array("out.returns", &shaped(&out.returns));
    } else {
        let scores = episode_scores(pre.layout, &pre.rewards, &pre.dones).unwrap();
        case.close_array("out.scores", &scores);
        let mask = pre.mask.as_ref().expect("GRPO has a mask");
        let advantages = group_relative_grid(pre.layout, &scores, case.need("group_size") as usize, mask).unwrap();
        case.close_array("out.advantages", &shaped(&advantages));
    }
}

fn check_preprocess(case: &Case<'_>) {
    let epochs = case.need("rollout_epoch") as usize;
    let stacked = |name: &str| {
        let array = case.array(&format!("in.{name}"));
        let row_len = array.shape[1..].iter().product();
        let data = stack_epochs(epochs, array.shape[0] / epochs, row_len, &array.data).unwrap();
        let mut shape = array.shape.clone();
        (shape[0], shape[1]) = (shape[0] / epochs, shape[1] * epochs);
        Array {
            shape,
            data,
            dtype: array.dtype,
        }
    };
    let (rewards, dones, values) = (stacked("rewards"), stacked("dones"), stacked("prev_values"));
    case.close_array("out.rewards", &rewards.f32());
    case.close_array("out.dones", &flags(&dones));
    case.close_array("out.prev_values", &values.f32());
    let (layout, mut mask, episode_len) = chunk_loss_mask(&dones);
    let chunk_level = case.text("reward_type") == "chunk_level";
    if chunk_level {
        mask = chunk_any(layout, &mask).unwrap();
    }
    if case.flag("filter_rewards") == Some(true) {
        // scores of the first episodes; an end inside a chunk ends the episode with that chunk, or with its step
        let totals = if chunk_level {
            let ends = chunk_any(chunk_layout(&dones), &dones.bool()).unwrap();
            episode_scores(layout.chunk_grid(), &chunk_sum(layout, &rewards.f32()).unwrap(), &ends)
        } else {
            let rows = steps_from_chunks(layout, &rewards.f32()).unwrap();
            episode_scores(layout.step_grid(), &rows, &step_dones(&dones))
        }
        .unwrap();
        let (low, high) = (case.need("rewards_lower_bound"), case.need("rewards_upper_bound"));
        let keep = keep_groups(&totals, case.need("group_size") as usize, low, high).unwrap();
        let width = if chunk_level { 1 } else { layout.chunk_len };
        for (at, valid) in mask.iter_mut().enumerate() {
            *valid &= keep[at / width % layout.envs];
        }
    }
    case.close_array("out.loss_mask", &as_floats(&mask));
    let recorded = case.array("out.loss_mask_sum");
    let width = recorded.shape[2];
    for (at, sum) in recorded.data.iter().enumerate() {
        case.close("loss_mask_sum", episode_len[at / width % layout.envs] as f64, *sum);
    }
}

#[test]
fn the_embodied_pipeline_agrees_with_the_reference() {
    run("rlinf_embodied_pipeline", &[], |case, _| {
        match case.spec["fn"].as_str().unwrap() {
            "compute_loss_mask" => {
                let (layout, mask, episode_len) = chunk_loss_mask(&case.array("in.dones"));
                case.close_array("out.loss_mask", &as_floats(&mask));
                let lengths: Vec<f32> = (0..mask.len())
                    .map(|at| episode_len[at / layout.chunk_len % layout.envs] as f32)
                    .collect();
                case.close_array("out.loss_mask_sum", &lengths);
            }
            "calculate_adv_and_returns" => check_pipeline(case),
            "preprocess_embodied_batch" => check_preprocess(case),
            other => panic!("unknown function {other}"),
        }
    });
}

// ---- losses

fn actor_settings(case: &Case<'_>) -> ActorSettings {
    let clamp = |low: Option<f64>, high: Option<f64>| {
        (low.is_some() || high.is_some()).then(|| (low.unwrap_or(f64::NEG_INFINITY), high.unwrap_or(f64::INFINITY)))
    };
    ActorSettings {
        clip_low: case.need("clip_ratio_low"),
        clip_high: case.need("clip_ratio_high"),
        dual_clip: case.number("clip_ratio_c"),
        log_ratio_clamp: clamp(case.number("clip_log_ratio_min"), case.number("clip_log_ratio_max")),
        episode_steps: case.number("max_episode_steps"),
        behaviour_ratio_max: case.number("behave_weight_threshold"),
    }
}

/// Plain loop in f64 over the elements of one policy loss: the oracle of our metrics and, with the reference's
/// denominators, of the recorded ones.
struct ActorOracle {
    metrics: BTreeMap<&'static str, f64>,
    reference: BTreeMap<&'static str, f64>,
    /// Valid elements over set mask entries: by how much the reference's sums are too large.
    excess: f64,
}

fn actor_oracle(input: &ActorInput<'_>, settings: &ActorSettings) -> ActorOracle {
    let logprob = input.logprob.detach();
    let spread = |tensor: &Tensor| -> Vec<f64> {
        let aligned = align("oracle", &tensor.to_kind(Kind::Double), "logprob", &logprob).unwrap();
        Vec::try_from(aligned.expand_as(&logprob).contiguous().reshape([-1])).unwrap()
    };
    let (new, old, advantage) = (spread(&logprob), spread(input.old_logprob), spread(input.advantage));
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
        let mut log_ratio = new[at] - old[at];
        if let Some((low, high)) = settings.log_ratio_clamp {
            log_ratio = log_ratio.clamp(low, high);
        }
        // f32, as both programs have it: an overflow is infinite here too
        let ratio = f64::from((log_ratio as f32).exp());
        let clipped_ratio = ratio.clamp(1.0 - settings.clip_low, 1.0 + settings.clip_high);
        let (unclipped, clipped) = (-advantage[at] * ratio, -advantage[at] * clipped_ratio);
        let surrogate = unclipped.max(clipped);
        let bound = settings.dual_clip.map_or(f64::INFINITY, |c| c * advantage[at].abs());
        largest = largest.max((ratio - 1.0).abs());
        let mut add = |name, value: f64| *sums.entry(name).or_insert(0.0) += value;
        add("policy_loss", surrogate.min(bound));
        add("policy_loss_abs", surrogate.min(bound).abs());
        add("ratio", ratio);
        add("ratio_abs", (ratio - 1.0).abs());
        add("clipped_ratio", clipped_ratio);
        add("dual_cliped_ratio", if bound < surrogate { ratio } else { 0.0 });
        add("dual_clip_fraction", f64::from(u8::from(bound < surrogate)));
        add("k1", -log_ratio);
        add("k3", ratio - 1.0 - log_ratio);
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
    let reference = BTreeMap::from([
        ("ratio", mean("ratio") * ratio_excess),
        ("ratio_abs", mean("ratio_abs") * ratio_excess),
        ("clipped_ratio", mean("clipped_ratio") * ratio_excess),
        ("dual_cliped_ratio", mean("dual_cliped_ratio") * ratio_excess),
        ("approx_kl", mean("k1") * excess),
        ("clip_fraction", mean("clip_fraction") * excess),
    ]);
    ActorOracle {
        metrics,
        reference,
        excess,
    }
}

fn check_actor_metrics(case: &Case<'_>, oracle: &ActorOracle, ours: &ActorLoss) {
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
    advantage: Tensor,
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
            advantage: case.input("advantages"),
            mask,
            episode_len,
        }
    }
    fn input(&self) -> ActorInput<'_> {
        ActorInput {
            logprob: &self.logprob,
            old_logprob: &self.old_logprob,
            proximal_logprob: self.proximal.as_ref(),
            advantage: &self.advantage,
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
    }
}

fn check_decoupled(case: &Case<'_>, coverage: &mut Coverage) {
    let tensors = ActorTensors::read(case);
    let ours = decoupled_actor_loss(&tensors.input(), &actor_settings(case)).unwrap();
    ours.loss.backward();
    check_loss(case, &ours.loss, &tensors.logprob, "out.grad.logprobs", 1.0);
    case.close(
        "dropped",
        ours.metrics.behaviour_clip_fraction,
        case.scalar("out.metric.actor/behav_clip_fraction"),
    );
    let (recorded, clip) = (
        case.scalar("out.metric.actor/clip_fraction"),
        ours.metrics.clip_fraction,
    );
    let dropped = ours.metrics.behaviour_clip_fraction;
    if dropped > 0.0 {
        coverage.differs(case, &format!("share of clipped elements {recorded} of the valid ones, ours {clip} of those that were not dropped; loss and gradient equal"));
    } else {
        case.close("clip_fraction", clip, recorded);
    }
}

/// Reference's `value_clip_ratio`: the share of clipped values, masked ones too, that lie outside the clip. Only rounding
/// puts any there.
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

/// Critic metrics of a case; returns the line that states the two clip shares where they differ.
fn check_critic_metrics(case: &Case<'_>, input: &CriticInput<'_>, clip: f64, ours: &CriticLoss) -> Option<String> {
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

fn critic_settings(case: &Case<'_>) -> CriticSettings {
    CriticSettings {
        value_clip: case.number("value_clip"),
        huber_delta: case.need("huber_delta"),
        episode_steps: case.number("max_episode_steps"),
    }
}

/// Tensors of one recorded critic loss.
struct CriticTensors {
    value: Tensor,
    old_value: Tensor,
    returns: Tensor,
    mask: Option<Tensor>,
    episode_len: Option<Tensor>,
}

impl CriticTensors {
    fn read(case: &Case<'_>) -> Self {
        Self {
            value: case.leaf("values"),
            old_value: case.input("prev_values"),
            returns: case.input("returns"),
            mask: case.maybe_input("loss_mask"),
            episode_len: case.maybe_input("loss_mask_sum"),
        }
    }
    fn input(&self) -> CriticInput<'_> {
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

fn check_policy_loss(case: &Case<'_>, coverage: &mut Coverage) {
    let level = match case.text("logprob_type") {
        "token_level" => LogprobLevel::Token,
        "action_level" => LogprobLevel::Action,
        _ => LogprobLevel::Chunk,
    };
    let element = case.leaf("logprobs");
    let logprob = aggregate_logprob(&element, level).unwrap();
    let old_logprob = aggregate_logprob(&case.input("old_logprobs"), level).unwrap();
    case.close_array("out.pre.logprobs", &floats(&logprob));
    case.close_array("out.pre.old_logprobs", &floats(&old_logprob));
    let (advantage, mask) = (case.input("advantages"), case.input("loss_mask"));
    let aligned = align("advantages", &advantage, "logprobs", &logprob).unwrap();
    assert_eq!(aligned.size(), case.array("out.pre.advantages").dims(), "{}", case.id);
    case.close_array("out.pre.advantages", &floats(&aligned));
    let episode_len = case.input("loss_mask_sum");
    let actor = ActorInput {
        logprob: &logprob,
        old_logprob: &old_logprob,
        proximal_logprob: None,
        advantage: &advantage,
        mask: Some(&mask),
        episode_len: Some(&episode_len),
    };
    let critic = CriticTensors::read(case);
    let settings = PolicySettings {
        actor: actor_settings(case),
        critic: critic_settings(case),
        value_coef: 1.0,
        entropy_coef: 0.0,
    };
    let name = case.text("loss_type");
    let input = PolicyInput {
        actor: Some(actor),
        critic: Some(critic.input()),
        entropy: None,
    };
    let ours = policy_loss(name).unwrap_or_else(|| panic!("loss {name}"))(&input, &settings).unwrap();
    ours.loss.backward();

    let oracle = actor_oracle(&actor, &settings.actor);
    let excess = if settings.actor.episode_steps.is_some() {
        1.0
    } else {
        oracle.excess
    };
    let metrics = ours.actor.expect("policy part");
    case.close(
        "policy_loss",
        metrics.policy_loss * excess,
        case.scalar("out.metric.actor/policy_loss"),
    );
    if name != "decoupled_actor_critic" {
        let alone = ppo_actor_loss(&actor, &settings.actor).unwrap();
        check_actor_metrics(case, &oracle, &alone);
    }
    let value_loss = ours.critic.map_or(0.0, |critic| critic.value_loss);
    case.close("whole", ours.loss.double_value(&[]), metrics.policy_loss + value_loss);
    case.close(
        "recorded whole",
        case.scalar("out.loss"),
        metrics.policy_loss * excess + value_loss,
    );
    let mut recorded = case.array("out.grad.logprobs");
    for value in &mut recorded.data {
        *value /= excess;
    }
    assert_close_relative(
        &format!("{} grad.logprobs", case.id),
        &floats(&element.grad()),
        &recorded,
        GRAD,
    );

    let mut why = Vec::new();
    if excess > 1.0 {
        let recorded = case.scalar("out.metric.actor/policy_loss");
        why.push(format!(
            "policy loss {recorded:.5}, ours {:.5}: the mask's entries are not its elements",
            metrics.policy_loss
        ));
    } else if oracle.excess > 1.0 && case.has("out.metric.actor/approx_kl") {
        let recorded = case.scalar("out.metric.actor/approx_kl");
        why.push(format!(
            "approx_kl {recorded:.5}, ours {:.5}: the mask's entries are not its elements",
            metrics.approx_kl_k1
        ));
    }
    if let Some(critic_metrics) = ours.critic {
        let gradient = case.array("out.grad.values");
        assert_close_relative(
            &format!("{} grad.values", case.id),
            &floats(&critic.value.grad()),
            &gradient,
            GRAD,
        );
        case.close(
            "value_loss",
            critic_metrics.value_loss,
            case.scalar("out.metric.critic/value_loss"),
        );
        let clip = settings.critic.value_clip.unwrap();
        let alone = ppo_critic_loss(&critic.input(), &settings.critic).unwrap();
        why.extend(check_critic_metrics(case, &critic.input(), clip, &alone));
    }
    if !why.is_empty() {
        coverage.differs(case, &why.join("; "));
    }
}

#[test]
fn whole_policy_losses_agree_with_the_reference() {
    run("rlinf_policy_loss", &[], check_policy_loss);
}

#[test]
fn loss_helpers_agree_with_the_reference() {
    run(
        "rlinf_helpers",
        &["kl_penalty", "seq_mean_token_mean", "seq_mean_token_sum"],
        |case, coverage| match case.spec["fn"].as_str().unwrap() {
            "huber_loss" => {
                let error = case.input("error");
                case.close_array(
                    "out.out",
                    &floats(&huber(&error, &error.zeros_like(), case.need("delta"))),
                );
            }
            "masked_mean" => {
                let (values, mask) = (case.input("values"), case.maybe_input("mask"));
                let ours = masked_mean(&values, mask.as_ref()).double_value(&[]);
                let elements = mask
                    .as_ref()
                    .map_or(1.0, |mask| values.numel() as f64 / mask.numel() as f64);
                case.close("recorded", case.scalar("out.out"), ours * elements);
                if elements > 1.0 {
                    let recorded = case.scalar("out.out");
                    coverage.differs(case, &format!("a mask entry spread over {elements} elements counts once in the reference: {recorded:.5}, ours {ours:.5}"));
                }
            }
            "masked_mean_ratio" => {
                // the reference is given length over longest length
                let (values, mask) = (case.input("values"), case.input("mask"));
                let longest = 1e6;
                let lengths = case.input("loss_mask_ratio") * longest;
                let ours = episode_weighted_mean(&values, &mask, &lengths, longest);
                case.close("recorded", ours.double_value(&[]), case.scalar("out.out"));
            }
            "reshape_entropy" => {
                let entropy = case.input("entropy");
                let (rows, action_dim) = (case.need("batch_size") as i64, case.need("action_dim") as i64);
                let level = match case.text("entropy_type") {
                    "action_level" => LogprobLevel::Action,
                    "chunk_level" => LogprobLevel::Chunk,
                    _ => LogprobLevel::Token,
                };
                let ours = aggregate_logprob(&entropy.reshape([rows, -1, action_dim]), level).unwrap();
                case.close_array("out.out", &floats(&ours));
            }
            "safe_normalize" => {
                let mut values = case.array("in.array").f32();
                normalize(&mut values, Some(&case.array("in.loss_mask").bool()));
                case.close_array("out.out", &values);
            }
            "compute_critic_explained_variance_from_stats" => {
                let stat = |name: &str| case.scalar(&format!("in.__sum__/_critic_explained_variance/{name}"));
                let sums = ExplainedVariance {
                    count: stat("count"),
                    returns_sum: stat("returns_sum"),
                    returns_sq_sum: stat("returns_sq_sum"),
                    errors_sum: stat("errors_sum"),
                    errors_sq_sum: stat("errors_sq_sum"),
                };
                case.close("explained variance", sums.value().unwrap(), case.scalar("out.out"));
            }
            name @ ("kl_penalty" | "seq_mean_token_sum" | "seq_mean_token_mean") => {
                coverage.not_built(case, name);
            }
            other => panic!("unknown function {other}"),
        },
    );
}

// ---- optimizer

fn check_adamw(case: &Case<'_>) {
    let parameter = |name: &str| {
        (
            name.to_owned(),
            tensor(&case.array(&format!("in.p0.{name}"))).set_requires_grad(true),
        )
    };
    let names: Vec<String> = case
        .golden
        .names()
        .iter()
        .filter_map(|name| name.strip_prefix(&format!("{}.in.p0.", case.id)).map(str::to_owned))
        .collect();
    let params: Vec<(String, Tensor)> = names.iter().map(|name| parameter(name)).collect();
    let group = |name: &str, lr: f64, head: bool| ParamGroup {
        name: name.to_owned(),
        lr,
        weight_decay: case.need("weight_decay"),
        params: params
            .iter()
            .filter(|(param, _)| param.contains("value_head") == head)
            .map(|(param, tensor)| (param.clone(), tensor.shallow_clone()))
            .collect(),
    };
    let beta = |at: usize| case.arg("betas")[at].as_f64().expect("beta");
    let settings = AdamWSettings {
        beta1: beta(0),
        beta2: beta(1),
        eps: case.need("eps"),
        clip_norm: Some(case.need("clip")),
    };
    let groups = vec![
        group("actor", case.need("lr"), false),
        group("value_head", case.need("value_lr"), true),
    ];
    let mut optimizer = AdamW::new(settings, groups).unwrap();
    let steps = case.need("steps") as usize;
    let states = |name: &str| {
        (1..=steps)
            .map(|step| case.array(&format!("out.p{step}.{name}")).data)
            .collect::<Vec<_>>()
    };
    // where a recording shows one state at every step, its tensors are views of the last one: only that is a fact
    let recorded_each = names
        .iter()
        .any(|name| states(name).windows(2).any(|pair| pair[0] != pair[1]));
    let mut oracle = AdamWOracle::default();
    for step in 0..steps {
        optimizer.zero_grad();
        let gradients: BTreeMap<String, Vec<f64>> = names
            .iter()
            .map(|name| (name.clone(), case.array(&format!("in.grad{step}.{name}")).data))
            .collect();
        for (name, param) in &params {
            // the gradient of sum(param * given) is the given one
            (param * tensor(&case.array(&format!("in.grad{step}.{name}"))))
                .sum(Kind::Float)
                .backward();
        }
        let report = optimizer.step(1.0).unwrap();
        assert!(!report.skipped);
        case.close("norm", report.grad_norm, case.scalar(&format!("out.gradnorm{step}")));
        let norm = gradients.values().flatten().map(|g| g * g).sum::<f64>().sqrt();
        let scale = (case.need("clip") / (norm + 1e-6)).min(1.0);
        case.close("clip coefficient", report.clip_coefficient, scale);
        for (name, param) in &params {
            let lr = case.need(if name.contains("value_head") { "value_lr" } else { "lr" });
            let initial = || case.array(&format!("in.p0.{name}")).data;
            let expected = oracle.step(
                name,
                initial,
                &gradients[name],
                scale,
                lr,
                &settings,
                case.need("weight_decay"),
            );
            let got = floats(param);
            for (got, want) in got.iter().zip(expected) {
                case.close(&format!("plain loop, step {step}, {name}"), f64::from(*got), *want);
            }
            if recorded_each || step + 1 == steps {
                case.close_array(&format!("out.p{}.{name}", step + 1), &got);
            }
        }
    }
}

/// `AdamW` as a plain loop in f64, by parameter name.
#[derive(Default)]
struct AdamWOracle(BTreeMap<String, OracleState>);

/// Parameter, first and second moment, steps taken.
struct OracleState {
    param: Vec<f64>,
    m: Vec<f64>,
    v: Vec<f64>,
    steps: i32,
}

impl AdamWOracle {
    fn step(
        &mut self,
        name: &str,
        initial: impl Fn() -> Vec<f64>,
        gradient: &[f64],
        scale: f64,
        lr: f64,
        settings: &AdamWSettings,
        weight_decay: f64,
    ) -> &[f64] {
        let state = self.0.entry(name.to_owned()).or_insert_with(|| OracleState {
            param: initial(),
            m: vec![0.0; gradient.len()],
            v: vec![0.0; gradient.len()],
            steps: 0,
        });
        let OracleState { param, m, v, steps } = state;
        *steps += 1;
        for at in 0..gradient.len() {
            let g = gradient[at] * scale;
            m[at] = settings.beta1 * m[at] + (1.0 - settings.beta1) * g;
            v[at] = settings.beta2 * v[at] + (1.0 - settings.beta2) * g * g;
            let m_hat = m[at] / (1.0 - settings.beta1.powi(*steps));
            let v_hat = v[at] / (1.0 - settings.beta2.powi(*steps));
            param[at] -= lr * weight_decay * param[at] + lr * m_hat / (v_hat.sqrt() + settings.eps);
        }
        param
    }
}

fn check_schedule(case: &Case<'_>, coverage: &mut Coverage) {
    let base_lr = case.need("base_lr");
    let total_steps = case.need("num_training_steps") as u64;
    let warmup_steps = case.need("num_warmup_steps") as u64;
    let recorded = case.array("out.lr").data;
    // f64 on both sides: what is left is the order of the operations
    let check = |schedule: Schedule, until: usize| {
        for (step, lr) in recorded.iter().take(until).enumerate() {
            let ours = base_lr * schedule.factor(step as u64);
            assert!(
                (ours - lr).abs() <= 1e-12 * base_lr,
                "{} step {step}: {ours} against {lr}",
                case.id
            );
        }
    };
    let cosine = |min_lr: f64| Decay::Cosine {
        total_steps,
        min_factor: min_lr / base_lr,
    };
    match case.text("lr_scheduler") {
        "constant" => {
            check(
                Schedule {
                    warmup_steps,
                    warmup_start: 0.0,
                    decay: Decay::Constant,
                },
                recorded.len(),
            );
        }
        "openpi_cosine" => check(
            Schedule::warmup(warmup_steps, cosine(case.need("min_lr"))),
            recorded.len(),
        ),
        "cosine" => {
            // the reference's floor is a factor of the optimizer's default rate 1e-3, not of the group's; after the
            // last step its cosine climbs again
            let floor = case.need("min_lr") * base_lr / 1e-3;
            let schedule = |min_lr| Schedule {
                warmup_steps,
                warmup_start: 0.0,
                decay: cosine(min_lr),
            };
            check(schedule(floor), total_steps as usize + 1);
            let last = base_lr * schedule(case.need("min_lr")).factor(total_steps + 3);
            assert!((last - case.need("min_lr")).abs() <= 1e-12 * base_lr);
            let climbed = recorded[total_steps as usize + 3];
            coverage.differs(case, &format!("floor {floor:.1e} instead of the configured {last:.1e}, and {climbed:.1e} three steps after the end, where ours stays at the floor"));
        }
        other => panic!("unknown schedule {other}"),
    }
}

#[test]
fn the_optimizer_and_its_schedules_agree_with_the_reference() {
    run("rlinf_optim", &[], |case, coverage| {
        if case.has("in.p0.actor.w") {
            check_adamw(case);
        } else {
            check_schedule(case, coverage);
        }
    });
}
