//! The network against the golden tensors: prefix, suffix, velocity, ODE, flow-matching loss and gradients, step grids, rollouts,
//! recomputed log-probabilities and values, for pi0 and pi0.5. All sizes are read from the files.
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test fails by panicking, and shows both numbers where we differ from the reference"
)]

use std::collections::{BTreeMap, BTreeSet};

use integration_tests::{Array, Golden, assert_close, assert_close_relative, golden_dims, golden_dir, max_abs_diff};
use learner::{
    logprob::{Executed, StepTable, TransitionBatch, gaussian, transition},
    model::{ParamStore, Pi0, Prefix, PrefixCache},
};
use policy::{
    dims::{PolicyDims, StackDims, Variant, VisionDims},
    flow::{DenoiseStep, NoiseMethod, Schedule, step_table},
    image::resize_with_pad_f32,
    params::{CriticInput, EMBEDDING, EMBEDDING_ALIAS, Part, ValueHeadDims},
    weights::WeightFile,
};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// Absolute error of network outputs: f32 sums in another order than the reference's.
const OUTPUT: f64 = 1e-4;
/// Absolute error of the flow-matching loss.
const LOSS: f64 = 1e-5;
/// Gradients, relative to the largest element of their tensor.
const GRADIENT: f64 = 1e-3;
/// Log-probabilities: an error of the mean counts `|z| / std` times, about 4 / 0.1, and the velocity's error is near 1e-5.
const LOGPROB: f64 = 4e-4;

const MODES: [&str; 2] = ["pi0", "pi05"];
const CAMERAS: [&str; 3] = ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"];

fn size(dims: &Value, key: &str) -> usize {
    dims["dims"][key]
        .as_u64()
        .unwrap_or_else(|| panic!("dims.json: `{key}`")) as usize
}

/// The sizes of a golden file as a policy.
fn policy_dims(file: &str) -> (PolicyDims, ValueHeadDims, Executed) {
    let dims = golden_dims(file);
    let hidden = dims["dims"]["vh"]
        .as_array()
        .expect("vh")
        .iter()
        .map(|v| v.as_u64().expect("width") as usize)
        .collect();
    let policy = PolicyDims {
        variant: if dims["mode"] == "pi05" {
            Variant::Pi05
        } else {
            Variant::Pi0
        },
        vocab: size(&dims, "vocab"),
        vlm: StackDims {
            width: size(&dims, "vlm_w"),
            mlp: size(&dims, "vlm_mlp"),
        },
        expert: StackDims {
            width: size(&dims, "exp_w"),
            mlp: size(&dims, "exp_mlp"),
        },
        depth: size(&dims, "depth"),
        heads: size(&dims, "heads"),
        kv_heads: size(&dims, "kv"),
        head_dim: size(&dims, "hd"),
        vision: VisionDims {
            width: size(&dims, "vis_h"),
            mlp: size(&dims, "vis_mlp"),
            depth: size(&dims, "vis_l"),
            heads: size(&dims, "vis_heads"),
            image_size: size(&dims, "img"),
            patch: size(&dims, "patch"),
        },
        cameras: CAMERAS.len(),
        prompt_len: size(&dims, "lang"),
        action_horizon: size(&dims, "horizon"),
        action_dim: size(&dims, "action_dim"),
    };
    let executed = Executed {
        action_chunk: size(&dims, "chunk"),
        env_action_dim: size(&dims, "env_dim"),
    };
    (
        policy,
        ValueHeadDims {
            input: CriticInput::Expert,
            hidden,
            state: false,
        },
        executed,
    )
}

fn float(array: &Array) -> Tensor {
    Tensor::from_slice(&array.f32()).view(array.dims().as_slice())
}

fn int(array: &Array) -> Tensor {
    Tensor::from_slice(&array.i64()).view(array.dims().as_slice())
}

fn boolean(array: &Array) -> Tensor {
    Tensor::from_slice(&array.bool()).view(array.dims().as_slice())
}

fn values(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.detach().to_kind(Kind::Float).contiguous().view([-1]);
    Vec::try_from(&tensor).expect("f32 tensor")
}

#[track_caller]
fn close(what: &str, got: &Tensor, want: &Array, tolerance: f64) {
    assert_eq!(got.size(), want.dims(), "{what}: shape");
    assert_close(what, &values(got), want, tolerance);
}

/// Element `index` of the leading axis.
fn at(array: &Array, index: usize) -> Array {
    let len = array.data.len() / array.shape[0];
    Array {
        shape: array.shape[1..].to_vec(),
        data: array.data[index * len..(index + 1) * len].to_vec(),
        dtype: array.dtype,
    }
}

/// A policy with the weights of `MODE_weights` and the value head of `MODE_rl_heads`.
fn golden_policy(mode: &str) -> Pi0 {
    let (dims, head, _) = policy_dims(&format!("{mode}_model"));
    let store = ParamStore::zeros(&dims, Some(&head), Device::Cpu).expect("sizes");
    let file = WeightFile::open(&golden_dir().join(format!("{mode}_weights.safetensors"))).expect("weights");
    store.load(&file, &[Part::Vlm, Part::Expert]).expect("strict load");
    let heads = Golden::open(&format!("{mode}_rl_heads"));
    for name in heads.names().iter().filter(|n| n.starts_with("value_head.")) {
        store.assign(name, &heads.get(name).f32()).expect("value head");
    }
    Pi0::new(dims, Some(&head), store).expect("network")
}

/// The observation of a golden file, images under `{images}.{camera}`.
fn encode(policy: &Pi0, golden: &Golden, images: &str) -> Prefix {
    let stack = |prefix: &str, read: fn(&Array) -> Tensor| {
        let all: Vec<Tensor> = CAMERAS
            .iter()
            .map(|c| read(&golden.get(&format!("{prefix}.{c}"))))
            .collect();
        Tensor::stack(&all, 1)
    };
    policy
        .prefix(
            &stack(images, float),
            &stack("in.image_mask", boolean),
            &int(&golden.get("in.tokenized_prompt")),
            &boolean(&golden.get("in.tokenized_prompt_mask")),
        )
        .expect("prefix")
}

#[test]
fn image_tower_and_prefix() {
    for mode in MODES {
        let (policy, golden) = (golden_policy(mode), Golden::open(&format!("{mode}_model")));
        let prefix = encode(&policy, &golden, "pre.image");
        let batch = prefix.cache.batch();
        for (index, camera) in CAMERAS.iter().enumerate() {
            let of_camera = |all: &Tensor| {
                let (tokens, width) = (all.size()[1], all.size()[2]);
                all.view([batch, CAMERAS.len() as i64, tokens, width])
                    .select(1, index as i64)
            };
            let check = |part: &str, got: &Tensor| {
                let name = format!("vis.{camera}.{part}");
                close(&format!("{mode} {name}"), &of_camera(got), &golden.get(&name), OUTPUT);
            };
            check("patch_pos_emb", &prefix.vision.patch_pos_emb);
            check("last_hidden", &prefix.vision.last_hidden);
            check("projected", &prefix.vision.projected);
        }
        close(
            &format!("{mode} prefix.embs"),
            &prefix.embs,
            &golden.get("prefix.embs"),
            OUTPUT,
        );
        close(
            &format!("{mode} prefix.out"),
            &prefix.out,
            &golden.get("prefix.out"),
            OUTPUT,
        );
        close(
            &format!("{mode} pad_masks"),
            &prefix.cache.mask,
            &golden.get("prefix.pad_masks"),
            0.0,
        );
        close(
            &format!("{mode} position_ids"),
            &prefix.position_ids,
            &golden.get("prefix.position_ids"),
            0.0,
        );
        for l in 0..policy.dims().depth {
            for (part, cache) in [("k", &prefix.cache.k), ("v", &prefix.cache.v)] {
                let name = format!("prefix.{part}.{l}");
                close(
                    &format!("{mode} {name}"),
                    &cache.select(1, l as i64),
                    &golden.get(&name),
                    OUTPUT,
                );
            }
        }
        // joint pass of the reference: a valid prefix token never sees the suffix, so its output is the same; a padded one is a
        // mean over all keys, there the suffix's too
        let joint = float(&golden.get("train.joint_prefix_out"));
        let gap = (&prefix.out - joint).abs() * prefix.cache.mask.to_kind(Kind::Float).unsqueeze(-1);
        let gap = gap.max().double_value(&[]);
        assert!(gap <= OUTPUT, "{mode} joint prefix: {gap:e}");
    }
}

/// Images of another size than the model's are resized as the reference does inside the model.
#[test]
fn images_of_another_size() {
    for mode in MODES {
        let golden = Golden::open(&format!("{mode}_model"));
        let (dims, _, _) = policy_dims(&format!("{mode}_model"));
        let size = dims.vision.image_size;
        for camera in CAMERAS {
            let image = golden.get(&format!("in.image.{camera}"));
            let (planes, height, width) = (image.shape[0] * image.shape[1], image.shape[2], image.shape[3]);
            let got = resize_with_pad_f32(&image.f32(), planes, (height, width), (size, size)).expect("resize");
            assert_close(
                &format!("{mode} {camera}"),
                &got,
                &golden.get(&format!("pre.image.{camera}")),
                1e-6,
            );
        }
    }
}

#[test]
fn velocity_of_one_denoise_step() {
    for mode in MODES {
        let (policy, golden) = (golden_policy(mode), Golden::open(&format!("{mode}_model")));
        let prefix = encode(&policy, &golden, "pre.image");
        let (state, x_t, t) = (
            float(&golden.get("in.state")),
            float(&golden.get("step.x_t")),
            float(&golden.get("step.t")),
        );
        close(
            &format!("{mode} time"),
            &policy.time_embedding(&t),
            &golden.get("step.time_sincos"),
            1e-6,
        );
        let velocity = policy
            .velocity(&prefix.cache, Some(&state), &x_t, &t)
            .expect("velocity");
        close(
            &format!("{mode} suffix_embs"),
            &velocity.suffix_embs,
            &golden.get("step.suffix_embs"),
            OUTPUT,
        );
        close(
            &format!("{mode} suffix_out"),
            &velocity.suffix_out,
            &golden.get("step.suffix_out"),
            OUTPUT,
        );
        close(&format!("{mode} v_t"), &velocity.v_t, &golden.get("step.v_t"), OUTPUT);
        let positions = golden.get("step.position_ids");
        close(
            &format!("{mode} positions"),
            &velocity.position_ids.expand(positions.dims(), false),
            &positions,
            0.0,
        );
        if let Some(cond) = &velocity.adarms_cond {
            close(
                &format!("{mode} adarms_cond"),
                cond,
                &golden.get("step.adarms_cond"),
                OUTPUT,
            );
        }
    }
}

#[test]
fn ode_paths_with_the_accumulated_times() {
    for mode in MODES {
        let (policy, golden) = (golden_policy(mode), Golden::open(&format!("{mode}_model")));
        let prefix = encode(&policy, &golden, "pre.image");
        let state = float(&golden.get("in.state"));
        for stem in ["ode4", "ode10"] {
            let times = golden.get(&format!("{stem}.t"));
            let steps = times.shape[0];
            let mut x = float(&golden.get("ode.noise"));
            for k in 0..steps {
                close(
                    &format!("{mode} {stem} x {k}"),
                    &x,
                    &at(&golden.get(&format!("{stem}.x_path")), k),
                    OUTPUT,
                );
                let velocity = policy
                    .velocity(&prefix.cache, Some(&state), &x, &float(&at(&times, k)))
                    .expect("velocity");
                close(
                    &format!("{mode} {stem} v {k}"),
                    &velocity.v_t,
                    &at(&golden.get(&format!("{stem}.v_path")), k),
                    OUTPUT,
                );
                x += velocity.v_t * (-1.0 / steps as f64);
            }
            close(
                &format!("{mode} {stem}"),
                &x,
                &golden.get(&format!("{stem}.actions")),
                OUTPUT,
            );
        }
    }
}

/// Checks every gradient of the store against `{prefix}{name}` of a golden file; parameters that the file leaves out must get
/// none, save those that `skip` names.
fn check_gradients(policy: &Pi0, golden: &Golden, prefix: &str, skip: impl Fn(&str) -> bool) -> usize {
    let mut left: BTreeSet<String> = golden.names().into_iter().filter(|n| n.starts_with(prefix)).collect();
    let mut checked = 0;
    for (name, tensor) in [Part::Vlm, Part::Expert, Part::ValueHead]
        .into_iter()
        .flat_map(|p| policy.store().part(p))
    {
        let key = format!("{prefix}{}", if name == EMBEDDING { EMBEDDING_ALIAS } else { name });
        let grad = tensor.grad();
        if left.remove(&key) {
            let want = golden.get(&key);
            // a recorded gradient of exactly zero (the last layer's query of the prefix) is one that nothing reads
            let got = if grad.defined() {
                values(&grad)
            } else {
                vec![0.0; want.data.len()]
            };
            assert_close_relative(&key, &got, &want, GRADIENT);
            checked += 1;
        } else if !skip(name) {
            let largest = if grad.defined() {
                grad.abs().max().double_value(&[])
            } else {
                0.0
            };
            assert!(
                largest == 0.0,
                "{name}: has a gradient of {largest:e}, the reference has none"
            );
        }
    }
    assert!(left.is_empty(), "gradients of the file that were not checked: {left:?}");
    checked
}

#[test]
fn flow_matching_loss_and_all_its_gradients() {
    for mode in MODES {
        let (policy, golden) = (golden_policy(mode), Golden::open(&format!("{mode}_model")));
        policy
            .store()
            .set_trainable(&[Part::Vlm, Part::Expert, Part::ValueHead]);
        let prefix = encode(&policy, &golden, "pre.image");
        let input = |name: &str| float(&golden.get(name));
        let result = policy
            .flow_matching_loss(
                &prefix.cache,
                Some(&input("in.state")),
                &input("train.actions"),
                &input("train.noise"),
                &input("train.time"),
            )
            .expect("loss");
        close(&format!("{mode} x_t"), &result.x_t, &golden.get("train.x_t"), 1e-6);
        close(&format!("{mode} u_t"), &result.u_t, &golden.get("train.u_t"), 1e-6);
        // elements square the velocity's error and reach 20, where the reference's own error against f64 is above 1e-5: they are
        // held relative to the largest, the mean to the loss tolerance
        assert_close_relative(
            &format!("{mode} loss"),
            &values(&result.loss),
            &golden.get("train.loss"),
            2e-6,
        );
        let mean = result.loss.mean(Kind::Float);
        close(
            &format!("{mode} loss_mean"),
            &mean,
            &golden.get("train.loss_mean"),
            LOSS,
        );
        mean.backward();
        let grads = Golden::open(&format!("{mode}_train_grads"));
        let checked = check_gradients(&policy, &grads, "", |_| false);
        println!(
            "{mode}: {checked} gradients; none for {}",
            grads.metadata("no_grad_params").unwrap_or_default()
        );
    }
}

fn method(name: &str) -> NoiseMethod {
    match name {
        "flow_ode" => NoiseMethod::FlowOde,
        "flow_sde" => NoiseMethod::FlowSde,
        "flow_cps" => NoiseMethod::FlowCps,
        other => panic!("no noise method {other}"),
    }
}

/// `noise_level` of the golden runs that do not say otherwise.
const NOISE_LEVEL: f64 = 0.5;

/// The first part of every tensor name, before the first dot.
fn groups(golden: &Golden) -> BTreeSet<String> {
    golden
        .names()
        .iter()
        .filter_map(|n| n.split('.').next().map(str::to_owned))
        .collect()
}

struct Setup {
    policy: Pi0,
    prefix: Prefix,
    state: Tensor,
    executed: Executed,
}

fn setup(mode: &str) -> Setup {
    let policy = golden_policy(mode);
    let golden = Golden::open(&format!("{mode}_model"));
    let prefix = tch::no_grad(|| encode(&policy, &golden, "pre.image"));
    let (_, _, executed) = policy_dims(&format!("{mode}_model"));
    Setup {
        policy,
        prefix,
        state: float(&golden.get("in.state")),
        executed,
    }
}

#[test]
fn every_step_of_the_grids() {
    for mode in MODES {
        let s = setup(mode);
        for name in ["flow_sde", "flow_cps", "flow_ode"] {
            let golden = Golden::open(&format!("{mode}_rl_{name}"));
            for grid in groups(&golden).iter().filter(|g| g.starts_with("grid")) {
                let steps: usize = grid.trim_start_matches("grid").parse().expect("grid{K}");
                for (k, row) in step_table(method(name), steps, NOISE_LEVEL).iter().enumerate() {
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
    close(&what("v"), &velocity.v_t, &want("v"), OUTPUT);
    let (c_x, c_v) = row.mean_coefficients();
    let mean = x * c_x + &velocity.v_t * c_v;
    close(&what("mean"), &mean, &want("mean"), OUTPUT);
    let std = Tensor::full(mean.size(), row.std, (Kind::Float, Device::Cpu));
    close(&what("std"), &std, &want("std"), 1e-6);
    let next = &mean + &std * float(&want("noise"));
    close(&what("next"), &next, &want("next"), OUTPUT);
    close(
        &what("value"),
        &s.policy.value_expert(&velocity.hidden).expect("head"),
        &want("value"),
        OUTPUT,
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
        assert!(want("logprob").data.iter().all(|v| *v == 0.0), "{}", what("logprob"));
    }
}

/// `x` at the step of each row: `chains[b, k_b + offset]`.
fn pick(chains: &Tensor, step: &[i64], offset: i64) -> Tensor {
    let rows: Vec<Tensor> = step
        .iter()
        .enumerate()
        .map(|(b, k)| chains.select(0, b as i64).select(0, k + offset))
        .collect();
    Tensor::stack(&rows, 0)
}

/// Which step each row of `{case}.denoise_inds` names.
fn steps_of(golden: &Golden, case: &str) -> Vec<i64> {
    let inds = golden.get(&format!("{case}.denoise_inds"));
    (0..inds.shape[0]).map(|b| at(&inds, b).data[0] as i64).collect()
}

fn recompute(
    s: &Setup,
    cache: &PrefixCache,
    schedule: &Schedule,
    golden: &Golden,
    case: &str,
    detach: bool,
) -> Result<learner::logprob::Transition, learner::model::ModelError> {
    let chains = float(&golden.get(&format!("{case}.chains")));
    let step = steps_of(golden, case);
    let table = StepTable::new(schedule, s.policy.dims().expert.width, Device::Cpu);
    let (x, x_next) = (pick(&chains, &step, 0), pick(&chains, &step, 1));
    let step = Tensor::from_slice(&step);
    let batch = TransitionBatch {
        state: Some(&s.state),
        x: &x,
        x_next: &x_next,
        step: &step,
    };
    transition(&s.policy, &table, cache, batch, s.executed, detach)
}

/// Sampler against a recorded rollout, and the value that we record.
fn check_rollout(s: &Setup, schedule: &Schedule, golden: &Golden, case: &str, what: &str) {
    let name = |part: &str| format!("{case}.{part}");
    let what = |part: &str| format!("{what} {case} {part}");
    let noise = float(&golden.get(&name("noise")));
    let step = steps_of(golden, case);
    let stochastic: Vec<Option<usize>> = step.iter().map(|k| usize::try_from(*k).ok()).collect();
    let z = if step.iter().all(|k| *k >= 0) {
        Some(pick(&noise, &step, 1))
    } else {
        None
    };
    let sample = s
        .policy
        .sample(
            &s.prefix.cache,
            Some(&s.state),
            &noise.select(1, 0),
            schedule,
            &stochastic,
            z.as_ref(),
        )
        .expect("sample");
    close(&what("actions"), &sample.actions, &golden.get(&name("actions")), OUTPUT);
    close(&what("chains"), &sample.chain, &golden.get(&name("chains")), OUTPUT);
    close(
        &what("step_mean"),
        &sample.mean,
        &golden.get(&name("step_mean")),
        OUTPUT,
    );
    close(&what("step_v"), &sample.velocity, &golden.get(&name("step_v")), OUTPUT);
    let values_per_step = sample.values.expect("value head");
    if golden.get(&name("step_value")).data.iter().any(|v| *v != 0.0) {
        close(
            &what("step_value"),
            &values_per_step,
            &golden.get(&name("step_value")),
            OUTPUT,
        );
        let mean = values_per_step.mean_dim(1, true, Kind::Float);
        close(
            &what("mean of step values"),
            &mean,
            &golden.get(&name("prev_values")),
            OUTPUT,
        );
    }
    if golden.has(&name("re.values")) && z.is_some() {
        // On purpose different: the reference records the mean over all denoise steps but trains the value of the stochastic step
        // alone, two functions of the same observation. Here both are the value at the stochastic step.
        let ours: Vec<f32> = step
            .iter()
            .enumerate()
            .map(|(b, k)| values_per_step.double_value(&[b as i64, *k]) as f32)
            .collect();
        println!(
            "{}: recorded value ours {ours:?}, reference {:?}, trained value of both {:?}",
            what("value"),
            golden.get(&name("prev_values")).f32(),
            golden.get(&name("re.values")).f32()
        );
        if golden.get(&name("re.values")).data.iter().any(|v| *v != 0.0) {
            assert_close(&what("recorded value"), &ours, &golden.get(&name("re.values")), OUTPUT);
        }
    }
}

#[test]
fn rollouts_and_their_recomputation() {
    for mode in MODES {
        for name in ["flow_sde", "flow_cps"] {
            let golden = Golden::open(&format!("{mode}_rl_{name}"));
            let s = setup(mode);
            let what = format!("{mode} {name}");
            let mut built = 0;
            for case in groups(&golden) {
                let Some(chains) = golden
                    .has(&format!("{case}.chains"))
                    .then(|| golden.get(&format!("{case}.chains")))
                else {
                    assert!(
                        case == "newpol" || case.starts_with("grid"),
                        "{what}: unknown group {case}"
                    );
                    continue;
                };
                let schedule = Schedule::new(method(name), chains.shape[1] - 1, NOISE_LEVEL, false);
                match case.as_str() {
                    // all steps stochastic, the mean of K + 1 log-probabilities: comes with Flow-Noise
                    "joint" => continue,
                    "mixed" => {}
                    other => {
                        assert!(
                            other == "eval" || other.starts_with("single"),
                            "{what}: unknown group {other}"
                        );
                        check_rollout(&s, &schedule, &golden, &case, &what);
                    }
                }
                built += 1;
                if case == "eval" {
                    continue;
                }
                check_recompute(
                    &s,
                    &s.prefix.cache,
                    &schedule,
                    &golden,
                    &format!("{case}."),
                    "re",
                    &what,
                );
            }
            assert!(built >= 3, "{what}: {built} rollouts");
            check_perturbed(&s, method(name), &golden, &what);
        }
        // a pure ODE has no density: the reference records zeros, we refuse the transition
        let golden = Golden::open(&format!("{mode}_rl_flow_ode"));
        let s = setup(mode);
        for case in groups(&golden).iter().filter(|c| c.starts_with("single")) {
            let steps = golden.get(&format!("{case}.chains")).shape[1] - 1;
            let schedule = Schedule::new(NoiseMethod::FlowOde, steps, 0.0, false);
            check_rollout(&s, &schedule, &golden, case, &format!("{mode} flow_ode"));
            assert!(
                golden
                    .get(&format!("{case}.re.logprobs"))
                    .data
                    .iter()
                    .all(|v| *v == 0.0)
            );
            let refused = recompute(&s, &s.prefix.cache, &schedule, &golden, case, false);
            assert!(refused.is_err_and(|e| e.to_string().contains("no log-probability")));
        }
    }
}

/// Log-probability and value of one recorded case against `{case}{policy}.*`.
fn check_recompute(
    s: &Setup,
    cache: &PrefixCache,
    schedule: &Schedule,
    golden: &Golden,
    case: &str,
    policy: &str,
    what: &str,
) {
    let step = steps_of(golden, case.trim_end_matches('.'));
    let want = golden.get(&format!("{case}{policy}.logprobs"));
    let result = recompute(s, cache, schedule, golden, case.trim_end_matches('.'), false);
    if step
        .iter()
        .any(|k| usize::try_from(*k).is_ok_and(|k| k >= schedule.drawable))
    {
        // the last step of Flow-CPS has no noise: the reference records zeros, here it is never drawn and is refused
        let (rows, width) = (step.len(), want.data.len() / step.len());
        for b in (0..rows).filter(|b| step[*b] as usize >= schedule.drawable) {
            assert!(
                want.data[b * width..(b + 1) * width].iter().all(|v| *v == 0.0),
                "{what} {case}"
            );
        }
        assert!(result.is_err(), "{what} {case}: a step without density was accepted");
        return;
    }
    let result = result.expect("transition");
    close(
        &format!("{what} {case}{policy}.logprobs"),
        &result.logprob,
        &want,
        LOGPROB,
    );
    let value = golden.get(&format!("{case}{policy}.values"));
    close(
        &format!("{what} {case}{policy}.values"),
        &result.value.expect("head"),
        &value,
        OUTPUT,
    );
}

/// The recomputation with perturbed weights (so that the PPO ratio is not one) and its gradients through the KV cache.
fn check_perturbed(s: &Setup, noise_method: NoiseMethod, golden: &Golden, what: &str) {
    for name in golden.names().iter().filter_map(|n| n.strip_prefix("newpol.")) {
        s.policy
            .store()
            .assign(name, &golden.get(&format!("newpol.{name}")).f32())
            .expect("perturbed weight");
    }
    for case in groups(golden).iter().filter(|c| c.starts_with("single")) {
        let steps = golden.get(&format!("{case}.chains")).shape[1] - 1;
        let schedule = Schedule::new(noise_method, steps, NOISE_LEVEL, false);
        check_recompute(s, &s.prefix.cache, &schedule, golden, &format!("{case}."), "new", what);
    }
}

#[test]
fn gradients_of_the_recomputation() {
    for mode in MODES {
        let golden = Golden::open(&format!("{mode}_rl_flow_sde"));
        let grads = Golden::open(&format!("{mode}_rl_flow_sde_grads"));
        let cases: BTreeSet<String> = grads
            .names()
            .iter()
            .filter_map(|n| n.split('/').next().map(str::to_owned))
            .collect();
        assert!(cases.iter().any(|c| c.starts_with("single")), "{mode}: {cases:?}");
        for case in &cases {
            if case == "joint" {
                // the joint likelihood comes with Flow-Noise
                continue;
            }
            let s = setup(mode);
            for name in golden.names().iter().filter_map(|n| n.strip_prefix("newpol.")) {
                s.policy
                    .store()
                    .assign(name, &golden.get(&format!("newpol.{name}")).f32())
                    .expect("perturbed weight");
            }
            s.policy
                .store()
                .set_trainable(&[Part::Vlm, Part::Expert, Part::ValueHead]);
            let prefix = encode(&s.policy, &Golden::open(&format!("{mode}_model")), "pre.image");
            let steps = golden.get(&format!("{case}.chains")).shape[1] - 1;
            let schedule = Schedule::new(NoiseMethod::FlowSde, steps, NOISE_LEVEL, false);
            let result = recompute(&s, &prefix.cache, &schedule, &golden, case, false).expect("transition");
            let coefficient = |part: &str| float(&golden.get(&format!("{case}.grad_coef.{part}")));
            // the entropy of Flow-SDE is a constant, recorded as zero
            let scalar = (result.logprob * coefficient("logprobs")).sum(Kind::Float)
                + (result.value.expect("head") * coefficient("values")).sum(Kind::Float);
            let want = golden.get(&format!("{case}.grad_scalar"));
            let diff = max_abs_diff(&values(&scalar), &want.data);
            assert!(
                diff <= 1e-4 * want.data[0].abs().max(1.0),
                "{mode} {case}: scalar off by {diff:e}"
            );
            scalar.backward();
            let checked = check_gradients(&s.policy, &grads, &format!("{case}/"), |n| {
                n.contains("vision") || n.contains("multi_modal")
            });
            println!("{mode} {case}: {checked} gradients");
        }
    }
}

/// Variants of the reference that are not built: other losses, guidance at evaluation, other heads.
const VARIANTS_NOT_BUILT: [&str; 5] = ["nft", "rtc", "safe_logprob", "chunk_critic", "range"];

#[test]
fn variants() {
    for mode in MODES {
        let golden = Golden::open(&format!("{mode}_rl_variants"));
        let s = setup(mode);
        let mut seen = BTreeMap::new();
        for group in groups(&golden) {
            if VARIANTS_NOT_BUILT.contains(&group.as_str()) {
                continue;
            }
            let (case, name, level) = match group.as_str() {
                "anneal100" => ("anneal100.flow_sde", "flow_sde", None),
                "anneal1000" => ("anneal1000.flow_cps", "flow_cps", None),
                "lvl02" => ("lvl02.flow_sde", "flow_sde", Some(0.2)),
                "k1" => ("k1.flow_sde", "flow_sde", Some(NOISE_LEVEL)),
                "ignore_last" | "no_value_head" => (group.as_str(), "flow_sde", Some(NOISE_LEVEL)),
                "detach0" | "detach1" => continue,
                other => panic!("{mode}: unknown variant {other}"),
            };
            let level = level.unwrap_or_else(|| golden.get(&format!("{case}.noise_level")).data[0]);
            let steps = golden.get(&format!("{case}.chains")).shape[1] - 1;
            let schedule = Schedule::new(method(name), steps, level, group == "ignore_last");
            let what = format!("{mode} variant");
            check_rollout(&s, &schedule, &golden, case, &what);
            if group == "ignore_last" {
                let step = steps_of(&golden, case);
                assert!(step.iter().all(|k| (*k as usize) < schedule.drawable) && schedule.drawable == steps - 1);
            }
            if group != "no_value_head" {
                check_recompute(
                    &s,
                    &s.prefix.cache,
                    &schedule,
                    &golden,
                    &format!("{case}."),
                    "re",
                    &what,
                );
            }
            seen.insert(group, steps);
        }
        println!("{mode}: variants {seen:?}");
        check_detach(mode, &golden);
    }
}

/// `detach_critic_input`: same value, gradient only in the head. The recorded values belong to the chain of `lvl02`.
fn check_detach(mode: &str, golden: &Golden) {
    for (case, detach) in [("detach0", false), ("detach1", true)] {
        let s = setup(mode);
        s.policy.store().set_trainable(&[Part::Expert, Part::ValueHead]);
        let steps = golden.get("lvl02.flow_sde.chains").shape[1] - 1;
        let schedule = Schedule::new(NoiseMethod::FlowSde, steps, 0.2, false);
        let result = recompute(&s, &s.prefix.cache, &schedule, golden, "lvl02.flow_sde", detach).expect("transition");
        let value = result.value.expect("head");
        close(
            &format!("{mode} {case}"),
            &value,
            &golden.get(&format!("{case}.values")),
            OUTPUT,
        );
        value.sum(Kind::Float).backward();
        for name in golden
            .names()
            .iter()
            .filter_map(|n| n.strip_prefix(&format!("{case}.grad.")))
        {
            let grad = s.policy.store().get(name).expect("parameter").grad();
            let want = golden.get(&format!("{case}.grad.{name}"));
            let got = if grad.defined() {
                values(&grad)
            } else {
                vec![0.0; want.data.len()]
            };
            assert_close_relative(&format!("{mode} {case} {name}"), &got, &want, GRADIENT);
        }
    }
}

#[test]
fn value_of_the_pooled_prefix() {
    for mode in MODES {
        let (dims, mut head, _) = policy_dims(&format!("{mode}_vlmvalue"));
        head.input = CriticInput::Vlm;
        let store = ParamStore::zeros(&dims, Some(&head), Device::Cpu).expect("sizes");
        let file =
            WeightFile::open(&golden_dir().join(format!("{mode}_vlmvalue_weights.safetensors"))).expect("weights");
        store
            .load(&file, &[Part::Vlm, Part::Expert, Part::ValueHead])
            .expect("strict load");
        let policy = Pi0::new(dims, Some(&head), store).expect("network");
        let golden = Golden::open(&format!("{mode}_vlmvalue"));
        let prefix = encode(&policy, &golden, "in.image");
        close(
            &format!("{mode} prefix_out"),
            &prefix.out,
            &golden.get("prefix_out"),
            OUTPUT,
        );
        close(
            &format!("{mode} masks"),
            &prefix.cache.mask,
            &golden.get("prefix_pad_masks"),
            0.0,
        );
        let ours = policy
            .value_vlm(
                &policy.pooled(&prefix),
                &Tensor::zeros([0], (Kind::Float, tch::Device::Cpu)),
            )
            .expect("value");
        let masked = Golden::open(&format!("{mode}_vlmvalue_rlsampler")).get("masked_mean.value");
        close(&format!("{mode} V_vlm"), &ours, &masked, OUTPUT);
        // On purpose different: the reference's main code path counts all text slots, padding included, whose rows are means over
        // every key; its newer sampler takes the masked mean, as we do.
        let padded = golden.get("mean_token.direct_value").f32();
        println!(
            "{mode}: V_vlm ours {:?}, reference with padding counted {padded:?}",
            values(&ours)
        );
        let gap = values(&ours)
            .iter()
            .zip(&padded)
            .map(|(a, b)| (a - b).abs())
            .fold(0.0, f32::max);
        assert!(
            gap > 1e-4,
            "{mode}: the two definitions should differ on a padded prompt, gap {gap:e}"
        );
    }
}

#[test]
fn what_is_not_built_is_named() {
    for mode in MODES {
        for name in ["flow_sde", "flow_cps"] {
            let found = groups(&Golden::open(&format!("{mode}_rl_{name}")));
            let rest: Vec<&String> = found
                .iter()
                .filter(|g| !(g.starts_with("grid") || g.starts_with("single")))
                .filter(|g| !["eval", "mixed", "newpol"].contains(&g.as_str()))
                .collect();
            assert_eq!(rest, ["joint"], "{mode} {name}: groups without a test");
        }
        let variants = groups(&Golden::open(&format!("{mode}_rl_variants")));
        for name in VARIANTS_NOT_BUILT {
            assert!(
                variants.contains(name),
                "{mode}: `{name}` is listed as not built but not in the file"
            );
        }
    }
}

/// Without padding no attention mask is built: the short way must give what the long way gives.
#[test]
fn full_prefix_without_mask_equals_masked() {
    for mode in MODES {
        let s = setup(mode);
        let batch = s.prefix.cache.batch();
        let golden = Golden::open(&format!("{mode}_model"));
        let x = float(&golden.get("step.x_t"));
        let t = float(&golden.get("step.t"));
        let len = s.prefix.cache.len();
        // one sample alone is fully valid after cutting its padding; a batch with a padded neighbour takes the long way
        let cut = len - 1;
        let (k, v) = (s.prefix.cache.k.narrow(3, 0, cut), s.prefix.cache.v.narrow(3, 0, cut));
        let short = PrefixCache::new(k, v, Tensor::ones([batch, cut], (Kind::Bool, Device::Cpu))).expect("cache");
        let mask = Tensor::ones([batch, len], (Kind::Bool, Device::Cpu));
        drop(mask.narrow(1, cut, 1).fill_(0));
        let long =
            PrefixCache::new(s.prefix.cache.k.shallow_clone(), s.prefix.cache.v.shallow_clone(), mask).expect("cache");
        let a = s.policy.velocity(&short, Some(&s.state), &x, &t).expect("short").v_t;
        let b = s.policy.velocity(&long, Some(&s.state), &x, &t).expect("long").v_t;
        let diff = (a - b).abs().max().double_value(&[]);
        assert!(diff < 1e-5, "{mode}: {diff:e}");
    }
}

#[test]
fn initial_weights_are_reproducible_and_survive_export() {
    let (dims, head, _) = policy_dims("pi05_model");
    let make = |seed| ParamStore::random(&dims, Some(&head), seed, Device::Cpu).expect("store");
    let (a, b, c) = (make(1), make(1), make(2));
    let all = [Part::Vlm, Part::Expert, Part::ValueHead];
    let bytes = |s: &ParamStore| s.to_safetensors(&all).expect("bytes");
    assert_eq!(bytes(&a), bytes(&b), "same seed, same bytes");
    assert_ne!(bytes(&a), bytes(&c), "another seed, other weights");
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("all.safetensors");
    std::fs::write(&path, bytes(&a)).expect("write");
    c.load(&WeightFile::open(&path).expect("open"), &all).expect("load");
    assert_eq!(bytes(&a), bytes(&c), "export, load, export");
    let refused = c
        .load(&WeightFile::open(&path).expect("open"), &[Part::Vlm])
        .expect_err("extra tensors");
    assert!(refused.to_string().contains("does not belong"), "{refused}");
}

#[test]
fn wrong_shapes_are_named() {
    let s = setup("pi0");
    let golden = Golden::open("pi0_model");
    let x = float(&golden.get("step.x_t"));
    let t = float(&golden.get("step.t"));
    let refused = s
        .policy
        .velocity(&s.prefix.cache, None, &x, &t)
        .expect_err("pi0 without state");
    assert!(refused.to_string().contains("`state`"), "{refused}");
    let refused = s
        .policy
        .velocity(&s.prefix.cache, Some(&s.state), &x.narrow(1, 0, 1), &t)
        .expect_err("short chunk");
    assert!(refused.to_string().contains("`x_t` has shape"), "{refused}");
}
