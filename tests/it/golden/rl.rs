//! Compares sampling and recomputation with the golden tensors, for pi0 and pi0.5: step grids, rollouts, log-probabilities, entropies and
//! values, and their gradients. All sizes are read from the files.
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking, and shows both numbers where we differ from the reference"
)]

use std::collections::BTreeSet;

use integration_tests::{Array, Golden, assert_close, assert_output, max_abs_diff, output_tolerance};
use learner::{
    model::{ModelError, PrefixCache, Sample},
    update::logprob::{Executed, StepTable, Transition, TransitionBatch, gaussian, path_value, transition},
};
use policy::{
    flow::{DenoiseStep, Mdp, NoiseMethod, Sampling, Schedule, flow_times, step_table},
    logprob::LN_SQRT_TWO_PI,
    noise::StepNoise,
    params::{Heads, Part},
};
use tch::{Device, Kind, Tensor};

use crate::differences::check_numbers;

use super::network::{
    MODES, Setup, at, check_gradients, close, close_output, encode, float, noise_head, policy_dims, setup, values,
};

/// Tolerance of log-probabilities: an error of the mean counts `|z| / std` times, about 4 / 0.1, and the velocity's error is near 1e-5.
pub(super) const LOGPROB: f64 = 4e-4;
/// Returns the default `noise_level` of the golden runs: by Flow-SDE's formula the first step's deviation equals the level.
pub(super) fn noise_level(mode: &str) -> f64 {
    let golden = Golden::open(&format!("{mode}_rl_flow_sde"));
    let grids = groups(&golden);
    let first = grids.iter().find(|g| g.starts_with("grid")).expect("a step grid");
    golden.get(&format!("{first}.std")).data[0]
}

pub(super) fn method(name: &str) -> NoiseMethod {
    NoiseMethod::named(name).unwrap_or_else(|| panic!("unknown noise method {name}"))
}

/// Returns the first part of every tensor name, before the first dot.
pub(super) fn groups(golden: &Golden) -> BTreeSet<String> {
    golden
        .names()
        .iter()
        .filter_map(|n| n.split('.').next().map(str::to_owned))
        .collect()
}

/// Returns the heads that a method needs: the golden value head, and the noise head for Flow-Noise.
pub(super) fn heads_of(mode: &str, method: NoiseMethod) -> Heads {
    let (_, value, _) = policy_dims(&format!("{mode}_model"));
    Heads {
        value: Some(value),
        noise: method.learnt.then(|| noise_head(mode)),
    }
}

pub(super) fn sampling(noise_method: NoiseMethod, num_steps: usize, noise_level: f64, joint: bool) -> Sampling {
    Sampling {
        noise_method,
        noise_level,
        ignore_last: false,
        num_steps,
        mdp: if joint { Mdp::Joint } else { Mdp::Hybrid },
        safe_logprob: false,
    }
}

#[test]
fn every_step_of_the_grids() {
    for mode in MODES {
        for name in ["flow_sde", "flow_cps", "flow_ode", "flow_noise"] {
            let s = setup(mode, &heads_of(mode, method(name)));
            let golden = Golden::open(&format!("{mode}_rl_{name}"));
            for grid in groups(&golden).iter().filter(|g| g.starts_with("grid")) {
                let steps: usize = grid.trim_start_matches("grid").parse().expect("grid{K}");
                let times: Vec<f32> = flow_times(steps).iter().map(|t| *t as f32).collect();
                // a quotient of small whole numbers: one rounding to f32
                assert_close(grid, &times, &golden.get(&format!("{grid}.timesteps")), 1e-7);
                for (k, row) in step_table(method(name), steps, noise_level(mode)).iter().enumerate() {
                    check_grid_step(&s, &golden, &format!("{grid}."), k, row, &format!("{mode} {name}"));
                }
            }
        }
    }
}

fn check_grid_step(s: &Setup, golden: &Golden, grid: &str, k: usize, row: &DenoiseStep, what: &str) {
    let want = |part: &str| at(&golden.get(&format!("{grid}{part}")), k);
    let what = |part: &str| format!("{what} {grid}{part} step {k}");
    let x = float(&want("x"));
    let t = Tensor::full([s.prefix.cache.batch()], row.t, (Kind::Double, Device::Cpu));
    let velocity = s
        .policy
        .velocity(&s.prefix.cache, Some(&s.state), &x, &t)
        .expect("velocity");
    close_output(&what("v"), &velocity.v_t, &want("v"));
    let (c_x, c_v) = row.mean_coefficients();
    let mean = x * c_x + &velocity.v_t * c_v;
    close_output(&what("mean"), &mean, &want("mean"));
    let std = match s.policy.noise_std(&velocity.hidden) {
        Some(learnt) => learnt * row.std,
        None => Tensor::full(mean.size(), row.std, (Kind::Float, Device::Cpu)),
    };
    // a step without noise has no density: the reference writes the entropy of deviation 1
    let of = if row.std > 0.0 {
        std.shallow_clone()
    } else {
        std.ones_like()
    };
    let entropy = of.log() + (0.5 + f64::from(LN_SQRT_TWO_PI));
    close_output(&what("entropy"), &entropy, &want("entropy"));
    // of the head: an f32 network's output near 0.1; of the table: a number
    close(&what("std"), &std, &want("std"), 1e-5);
    let next = &mean + &std * float(&want("noise"));
    close_output(&what("next"), &next, &want("next"));
    close_output(
        &what("value"),
        &s.policy.value_expert(&velocity.hidden).expect("head"),
        &want("value"),
    );
    if row.std > 0.0 {
        close(
            &what("logprob"),
            &gaussian(&next, &mean, &std),
            &want("logprob"),
            LOGPROB,
        );
    } else {
        // no density: the reference writes zeros, here such a step makes no record
        assert!(all_zero(&want("logprob")), "{}", what("logprob"));
    }
}

fn all_zero(array: &Array) -> bool {
    array.data.iter().all(|v| *v == 0.0)
}

/// Returns the stochastic steps of each row from `{case}.denoise_inds`: one, all, or none.
pub(super) fn steps_of(golden: &Golden, case: &str) -> Vec<Vec<usize>> {
    let inds = golden.get(&format!("{case}.denoise_inds"));
    (0..inds.shape[0])
        .map(|b| {
            let mut row: Vec<usize> = at(&inds, b)
                .data
                .iter()
                .filter(|k| **k >= 0.0)
                .map(|k| *k as usize)
                .collect();
            row.dedup();
            row
        })
        .collect()
}

/// Returns the recorded steps that have a density.
fn with_density(golden: &Golden, case: &str, schedule: &Schedule) -> Vec<Vec<usize>> {
    let mut steps = steps_of(golden, case);
    for row in &mut steps {
        row.retain(|k| *k < schedule.drawable);
    }
    steps
}

/// Our policy's outputs for the recorded transitions of a case, each row with its `S` stochastic steps in order.
pub(super) struct Recomputed {
    rows: i64,
    steps: i64,
    pub(super) out: Transition,
}

impl Recomputed {
    pub(super) fn new(
        s: &Setup,
        cache: &PrefixCache,
        sampling: &Sampling,
        golden: &Golden,
        case: &str,
        detach: bool,
    ) -> Result<Self, ModelError> {
        Self::of(s, cache, sampling, golden, case, s.executed, detach)
    }

    /// Recomputes the transitions, with log-probabilities of these elements of the chunk.
    pub(super) fn of(
        s: &Setup,
        cache: &PrefixCache,
        sampling: &Sampling,
        golden: &Golden,
        case: &str,
        executed: Executed,
        detach: bool,
    ) -> Result<Self, ModelError> {
        let chains = float(&golden.get(&format!("{case}.chains")));
        let schedule = Schedule::of(sampling);
        let mut steps = with_density(golden, case, &schedule);
        if steps.iter().all(Vec::is_empty) {
            // no step with a density: pass the recorded steps, which are rejected
            steps = steps_of(golden, case);
        }
        let count = steps[0].len();
        assert!(
            steps.iter().all(|row| row.len() == count && count > 0),
            "{case}: {steps:?}"
        );
        let flat: Vec<i64> = steps.iter().flatten().map(|k| *k as i64).collect();
        let rows: Vec<i64> = (0..steps.len())
            .flat_map(|b| std::iter::repeat_n(b as i64, count))
            .collect();
        let (step, row) = (Tensor::from_slice(&flat), Tensor::from_slice(&rows));
        let (x, x_next) = (
            chains.index(&[Some(&row), Some(&step)]),
            chains.index(&[Some(&row), Some(&(&step + 1))]),
        );
        let state = s.state.index_select(0, &row);
        let table = StepTable::of(sampling, s.policy.dims().expert.width, Device::Cpu);
        let batch = TransitionBatch {
            state: Some(&state),
            x: &x,
            x_next: &x_next,
            step: &step,
        };
        let out = transition(
            &s.policy,
            &table,
            &cache.index_select(&row).expect("cache"),
            batch,
            executed,
            detach,
        )?;
        Ok(Self {
            rows: steps.len() as i64,
            steps: count as i64,
            out,
        })
    }

    /// Reshapes `[B * S, ...]` to `[B, S, ...]`.
    fn per_step(&self, t: &Tensor) -> Tensor {
        let mut shape = t.size();
        shape.splice(0..1, [self.rows, self.steps]);
        t.view(shape.as_slice())
    }

    /// Returns the reference's joint log-probability: the mean over the steps, in the joint case also over the initial noise's term.
    fn joined(&self, s: &Setup, golden: &Golden, case: &str) -> Tensor {
        let logprob = self.per_step(&self.out.logprob);
        if !is_joint(golden, case) {
            return logprob.mean_dim(1, false, Kind::Float);
        }
        let (chunk, width) = (s.executed.action_chunk as i64, s.executed.env_action_dim as i64);
        let initial = float(&golden.get(&format!("{case}.chains"))).select(1, 0);
        let initial = initial.narrow(1, 0, chunk).narrow(2, 0, width);
        let initial = gaussian(&initial, &initial.zeros_like(), &initial.ones_like());
        // the reference counts a step without density as a term of zero
        let terms = golden.get(&format!("{case}.chains")).shape[1] as f64;
        (logprob.sum_dim_intlist(1, false, Kind::Float) + initial) / terms
    }

    /// Returns the log-probability at the first step.
    pub(super) fn at_first_step(&self) -> Tensor {
        self.per_step(&self.out.logprob).select(1, 0)
    }

    /// Returns the mean value over the steps, `[B]`; `None` without a head at the steps.
    pub(super) fn value(&self) -> Option<Tensor> {
        let value = self.out.value.as_ref()?;
        Some(self.per_step(value).mean_dim(1, false, Kind::Float))
    }

    /// Returns the reference's entropy `[B, 1]`: the mean over steps and executed elements, in the joint case also over the initial noise.
    fn entropy(&self, joint: bool) -> Option<Tensor> {
        let per_step = self
            .per_step(self.out.entropy.as_ref()?)
            .mean_dim([2i64, 3].as_slice(), false, Kind::Float);
        let initial = if joint { 0.5 + f64::from(LN_SQRT_TWO_PI) } else { 0.0 };
        let terms = self.steps as f64 + if joint { 1.0 } else { 0.0 };
        Some((per_step.sum_dim_intlist(1, true, Kind::Float) + initial) / terms)
    }
}

/// Returns whether all steps of a case are stochastic (with one denoise step, decided by the number of recorded terms).
pub(super) fn is_joint(golden: &Golden, case: &str) -> bool {
    let name = format!("{case}.re.raw_logprobs");
    golden.has(&name) && golden.get(&name).shape[1] > 1
}

/// Runs our sampler on a case's noise.
fn sampled(s: &Setup, schedule: &Schedule, golden: &Golden, case: &str) -> Sample {
    let own = format!("{case}.noise");
    let noise = golden.get(if golden.has(&own) { &own } else { "noise" });
    let drawn: Vec<Vec<StepNoise>> = steps_of(golden, case)
        .iter()
        .enumerate()
        .map(|(b, steps)| {
            let row = at(&noise, b);
            let z = |k: usize| at(&row, k + 1).f32();
            steps.iter().map(|k| StepNoise { step: *k, z: z(*k) }).collect()
        })
        .collect();
    s.policy
        .sample(
            &s.prefix.cache,
            Some(&s.state),
            &float(&noise).select(1, 0),
            schedule,
            &drawn,
        )
        .expect("sample")
}

/// Compares the deviation of every step of a rollout: 0 for a deterministic step, otherwise the table's, scaled by a noise head if there is
/// one.
fn check_deviations(s: &Setup, schedule: &Schedule, golden: &Golden, case: &str, sample: &Sample, what: &str) {
    let want = golden.get(&format!("{case}.step_std"));
    let steps = steps_of(golden, case);
    for (k, ode) in schedule.ode.iter().enumerate() {
        let t = Tensor::full([s.prefix.cache.batch()], ode.t, (Kind::Double, Device::Cpu));
        let x = sample.chain.select(1, k as i64);
        let velocity = s.policy.velocity(&s.prefix.cache, Some(&s.state), &x, &t);
        let learnt = s.policy.noise_std(&velocity.expect("velocity").hidden);
        for (b, stochastic) in steps.iter().enumerate() {
            let std = schedule.row(k, stochastic.contains(&k)).expect("a step").std;
            let got = match &learnt {
                Some(learnt) => learnt.get(b as i64) * std,
                None => Tensor::full(x.get(b as i64).size(), std, (Kind::Float, Device::Cpu)),
            };
            // as in the grids
            close(
                &format!("{what} of row {b}, step {k}"),
                &got,
                &at(&at(&want, b), k),
                1e-5,
            );
        }
    }
}

/// Compares the sampler and our recorded values with a recorded rollout.
pub(super) fn check_rollout(s: &Setup, schedule: &Schedule, golden: &Golden, case: &str, what: &str) {
    let name = |part: &str| format!("{case}.{part}");
    let what = |part: &str| format!("{what} {case} {part}");
    let sample = sampled(s, schedule, golden, case);
    let check = |part: &str, got: &Tensor| close_output(&what(part), got, &golden.get(&name(part)));
    check("actions", &sample.actions);
    check("chains", &sample.chain);
    if golden.has(&name("step_mean")) {
        check("step_mean", &sample.mean);
        check("step_v", &sample.velocity);
        check_deviations(s, schedule, golden, case, &sample, &what("step_std"));
    }
    let recorded = golden.get(&name("prev_values"));
    if !golden.has(&name("step_value")) || golden.get(&name("step_value")).data.iter().all(|v| *v == 0.0) {
        return;
    }
    let per_step = sample.values.expect("value head");
    check("step_value", &per_step);
    // over the path (`steps = "path"`), as the reference records it
    close_output(
        &what("mean of step values"),
        &per_step.mean_dim(1, true, Kind::Float),
        &recorded,
    );
    let table = StepTable::new(schedule, s.policy.dims().expert.width, Device::Cpu);
    let path = path_value(&s.policy, &table, &s.prefix.cache, Some(&s.state), &sample.chain, true)
        .expect("path")
        .expect("head");
    close_output(&what("path value recomputed"), &path.unsqueeze(1), &recorded);
    let steps = steps_of(golden, case);
    if golden.has(&name("re.values")) && steps[0].len() == 1 {
        // Deliberate difference: the reference records the mean over all denoise steps but trains the value of the stochastic step alone,
        // two functions of the same observation. Here both are the value at the stochastic step, or both the mean.
        let ours: Vec<f32> = steps
            .iter()
            .enumerate()
            .map(|(b, k)| per_step.double_value(&[b as i64, k[0] as i64]) as f32)
            .collect();
        let trained = golden.get(&name("re.values"));
        println!(
            "{}: ours {ours:?}, reference {:?}, trained value of both {:?}",
            what("recorded value"),
            recorded.f32(),
            trained.f32()
        );
        assert_output(&what("recorded value"), &ours, &trained);
        if what("") == "pi0 flow_sde single2 " {
            check_numbers("pi0 flow_sde single2", recorded.data[0], f64::from(ours[0]));
        }
    }
}

/// Compares log-probabilities, values and entropies of one recorded case with `{case}.{policy}.*`.
pub(super) fn check_recompute(s: &Setup, sampling: &Sampling, golden: &Golden, case: &str, policy: &str, what: &str) {
    let schedule = Schedule::of(sampling);
    let want = |part: &str| golden.get(&format!("{case}.{policy}.{part}"));
    let recorded = steps_of(golden, case);
    let ours = Recomputed::new(s, &s.prefix.cache, sampling, golden, case, false);
    if recorded.iter().all(|row| row.iter().all(|k| *k >= schedule.drawable)) {
        // the last step of Flow-CPS has no noise: the reference records zeros, here the step is never drawn and is rejected
        for part in ["logprobs", "raw_logprobs", "entropy", "raw_entropy"] {
            assert!(all_zero(&want(part)), "{what} {case} {part}");
        }
        assert!(ours.is_err(), "{what} {case}: a step without density was accepted");
        return;
    }
    if recorded.iter().any(|row| row.len() == 1 && row[0] >= schedule.drawable) {
        // mixed rows, some without density: rows with a density are checked by the other cases
        return;
    }
    let ours = ours.expect("transition");
    let joint = is_joint(golden, case);
    let what = |part: &str| format!("{what} {case}.{policy}.{part}");
    let joined = ours.joined(s, golden, case);
    close(&what("logprobs"), &joined, &want("logprobs"), LOGPROB);
    if policy == "re" && golden.has(&format!("{case}.prev_logprobs")) {
        // recorded by the same weights
        let recorded = golden.get(&format!("{case}.prev_logprobs"));
        close(&what("prev_logprobs"), &joined, &recorded, LOGPROB);
    }
    let all_steps = ours.steps as usize == recorded[0].len();
    match ours.value() {
        None => assert!(all_zero(&want("values")), "{}", what("values")),
        Some(value) if all_steps => close_output(&what("values"), &value, &want("values")),
        Some(value) => {
            println!(
                "{}: ours {:?} over the steps with a density, reference {:?} over all",
                what("values"),
                values(&value),
                want("values").f32()
            );
            if what("") == "pi0 flow_cps joint.re." {
                let ours = f64::from(values(&value)[0]);
                check_numbers("pi0 flow_cps joint.re", want("values").data[0], ours);
            }
        }
    }
    match ours.entropy(joint) {
        Some(entropy) => close_output(&what("entropy"), &entropy, &want("entropy")),
        None => assert!(all_zero(&want("entropy")), "{}", what("entropy")),
    }
    check_raw(s, sampling, golden, case, policy, &what("raw"));
}

/// Compares log-probabilities, entropies and values per step and element of the whole chunk, executed or not, before any mean. In the joint
/// case the first entry is of the initial noise, and a step without density is recorded as zero.
fn check_raw(s: &Setup, sampling: &Sampling, golden: &Golden, case: &str, policy: &str, what: &str) {
    let want = |part: &str| golden.get(&format!("{case}.{policy}.raw_{part}"));
    let dims = s.policy.dims();
    let whole = Executed {
        action_chunk: dims.action_horizon,
        env_action_dim: dims.action_dim,
    };
    let ours = Recomputed::of(s, &s.prefix.cache, sampling, golden, case, whole, false).expect("transition");
    let initial = float(&golden.get(&format!("{case}.chains"))).select(1, 0);
    let joint = is_joint(golden, case);
    let check = |part: &str, per_step: Option<Tensor>, initial: &Tensor, tolerance: f64| {
        let want = want(part);
        let Some(per_step) = per_step else {
            return assert!(all_zero(&want), "{what} {part}");
        };
        let mut got = per_step;
        if joint {
            let missing = want.shape[1] as i64 - 1 - ours.steps;
            let none = got.narrow(1, 0, 1).zeros_like().repeat([1, missing, 1, 1]);
            got = Tensor::cat(&[initial.unsqueeze(1), got, none], 1);
        }
        close(&format!("{what} {part}"), &got, &want, tolerance);
    };
    let of_initial = gaussian(&initial, &initial.zeros_like(), &initial.ones_like());
    check("logprobs", Some(ours.per_step(&ours.out.logprob)), &of_initial, LOGPROB);
    // a standard Gaussian's
    let of_initial = Tensor::full_like(&initial, 0.5 + f64::from(LN_SQRT_TWO_PI));
    let entropy = ours.out.entropy.as_ref().map(|e| ours.per_step(e));
    check("entropy", entropy, &of_initial, output_tolerance(&want("entropy")));
    let recorded = want("values");
    match &ours.out.value {
        None => assert!(all_zero(&recorded), "{what} values"),
        Some(value) => {
            let got = ours.per_step(value);
            let want = float(&recorded).narrow(1, 0, ours.steps);
            let gap = (got - want).abs().max().double_value(&[]);
            assert!(gap <= output_tolerance(&recorded), "{what} values: {gap:e}");
        }
    }
}

/// Compares `V_expert` of an ODE path at the step that the case names.
fn check_values_at_steps(s: &Setup, golden: &Golden, case: &str, mode: &str) {
    let chains = float(&golden.get(&format!("{case}.chains")));
    let times = flow_times(chains.size()[1] as usize - 1);
    for (b, steps) in steps_of(golden, case).iter().enumerate() {
        let (row, k) = (Tensor::from_slice(&[b as i64]), steps[0]);
        let x = chains.index_select(0, &row).select(1, k as i64);
        let (cache, state) = (s.prefix.cache.index_select(&row), s.state.index_select(0, &row));
        let t = Tensor::from_slice(&[times[k]]);
        let velocity = s.policy.velocity(&cache.expect("cache"), Some(&state), &x, &t);
        let value = s
            .policy
            .value_expert(&velocity.expect("velocity").hidden)
            .expect("head");
        for part in ["re.values", "re.raw_values"] {
            let mut want = at(&golden.get(&format!("{case}.{part}")), b);
            want.shape = vec![1];
            close_output(&format!("{mode} flow_ode {case} {part}"), &value, &want);
        }
    }
}

/// Loads the perturbed weights, so that the PPO ratio is not 1.
fn perturb(s: &Setup, golden: &Golden) {
    for name in golden.names().iter().filter_map(|n| n.strip_prefix("newpol.")) {
        s.policy
            .store()
            .assign(name, &golden.get(&format!("newpol.{name}")).f32())
            .expect("perturbed weight");
    }
}

#[test]
fn rollouts_and_their_recomputation() {
    for mode in MODES {
        for name in ["flow_sde", "flow_cps", "flow_noise"] {
            let golden = Golden::open(&format!("{mode}_rl_{name}"));
            let s = setup(mode, &heads_of(mode, method(name)));
            let what = format!("{mode} {name}");
            let mut cases = Vec::new();
            for case in groups(&golden) {
                if !golden.has(&format!("{case}.chains")) {
                    assert!(
                        case == "newpol" || case.starts_with("grid"),
                        "{what}: unknown group {case}"
                    );
                    continue;
                }
                let steps = golden.get(&format!("{case}.chains")).shape[1] - 1;
                let sampling = sampling(method(name), steps, noise_level(mode), case == "joint");
                match case.as_str() {
                    "mixed" => {}
                    other => {
                        assert!(
                            ["eval", "joint"].contains(&other) || other.starts_with("single"),
                            "{what}: unknown group {other}"
                        );
                        check_rollout(&s, &Schedule::of(&sampling), &golden, &case, &what);
                    }
                }
                if case != "eval" {
                    check_recompute(&s, &sampling, &golden, &case, "re", &what);
                }
                cases.push((case, sampling));
            }
            assert!(
                cases.len() >= 3 && cases.iter().any(|(c, _)| c == "joint"),
                "{what}: {cases:?}"
            );
            perturb(&s, &golden);
            for (case, sampling) in &cases {
                if golden.has(&format!("{case}.new.logprobs")) {
                    check_recompute(&s, sampling, &golden, case, "new", &what);
                }
            }
        }
        // a pure ODE has no density: the reference records zeros, we refuse the transition
        let golden = Golden::open(&format!("{mode}_rl_flow_ode"));
        let s = setup(mode, &heads_of(mode, NoiseMethod::ODE));
        for case in groups(&golden).iter().filter(|c| c.starts_with("single")) {
            let steps = golden.get(&format!("{case}.chains")).shape[1] - 1;
            let sampling = sampling(NoiseMethod::ODE, steps, 0.0, false);
            check_rollout(&s, &Schedule::of(&sampling), &golden, case, &format!("{mode} flow_ode"));
            let recorded = [
                "prev_logprobs",
                "re.logprobs",
                "re.raw_logprobs",
                "re.entropy",
                "re.raw_entropy",
            ];
            for part in recorded {
                assert!(all_zero(&golden.get(&format!("{case}.{part}"))), "{mode} {case} {part}");
            }
            check_values_at_steps(&s, &golden, case, mode);
            for weights in ["the ones that acted", "moved ones"] {
                let refused = Recomputed::new(&s, &s.prefix.cache, &sampling, &golden, case, false);
                assert!(
                    refused.is_err_and(|e| e.to_string().contains("no log-probability")),
                    "{mode}: {weights}"
                );
                perturb(&s, &golden);
            }
        }
    }
}

#[test]
fn gradients_of_the_recomputation() {
    for mode in MODES {
        for name in ["flow_sde", "flow_noise"] {
            let golden = Golden::open(&format!("{mode}_rl_{name}"));
            let grads = Golden::open(&format!("{mode}_rl_{name}_grads"));
            let cases: BTreeSet<String> = grads
                .names()
                .iter()
                .filter_map(|n| n.split('/').next().map(str::to_owned))
                .collect();
            assert!(!cases.is_empty(), "{mode} {name}");
            for case in &cases {
                let s = setup(mode, &heads_of(mode, method(name)));
                perturb(&s, &golden);
                s.policy
                    .store()
                    .set_trainable(&[Part::Vlm, Part::Expert, Part::NoiseHead, Part::ValueHead]);
                let prefix = encode(&s.policy, &Golden::open(&format!("{mode}_model")), "pre.image");
                let steps = golden.get(&format!("{case}.chains")).shape[1] - 1;
                let joint = is_joint(&golden, case);
                let sampling = sampling(method(name), steps, noise_level(mode), joint);
                let ours = Recomputed::new(&s, &prefix.cache, &sampling, &golden, case, false).expect("transition");
                let coefficient = |part: &str| float(&golden.get(&format!("{case}.grad_coef.{part}")));
                let mut scalar = (ours.joined(&s, &golden, case) * coefficient("logprobs")).sum(Kind::Float)
                    + (ours.value().expect("head") * coefficient("values")).sum(Kind::Float);
                // the entropy of Flow-SDE is a constant, recorded as zero
                if let Some(entropy) = ours.entropy(joint) {
                    scalar += (entropy * coefficient("entropy")).sum(Kind::Float);
                }
                let want = golden.get(&format!("{case}.grad_scalar"));
                let diff = max_abs_diff(&values(&scalar), &want.data);
                assert!(
                    diff <= 1e-4 * want.data[0].abs().max(1.0),
                    "{mode} {name} {case}: scalar off by {diff:e}"
                );
                scalar.backward();
                let checked = check_gradients(&s.policy, &grads, &format!("{case}/"), |n| {
                    n.contains("vision") || n.contains("multi_modal")
                });
                println!("{mode} {name} {case}: {checked} gradients");
            }
        }
    }
}
