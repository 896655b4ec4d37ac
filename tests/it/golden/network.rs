//! Compares the network with the golden tensors: prefix, suffix, velocity, ODE, flow-matching loss and gradients, for pi0 and pi0.5. All
//! sizes are read from the files.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;

use integration_tests::{
    Array, Golden, assert_close, assert_close_relative, golden_dims, golden_dir, lacks, output_tolerance,
};
use learner::{
    model::{ParamStore, Pi0, Prefix, PrefixCache},
    update::logprob::Executed,
};
use policy::{
    dims::{PolicyDims, StackDims, Variant, VisionDims},
    flow::{NoiseMethod, Schedule},
    params::{
        CriticInput, EMBEDDING, EMBEDDING_ALIAS, Heads, NoiseHeadDims, Part, Pooling, ValueHeadDims, ValueSteps,
        noise_layer,
    },
    weights::WeightFile,
};
use serde_json::Value;
use tch::{Device, Kind, Tensor};

/// Absolute tolerance of the flow-matching loss.
const LOSS: f64 = 1e-5;
/// Tolerance of gradients, relative to the largest element of the tensor.
pub(super) const GRADIENT: f64 = 1e-3;

pub(super) const MODES: [&str; 2] = ["pi0", "pi05"];
pub(super) const CAMERAS: [&str; 3] = ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"];

fn size(dims: &Value, key: &str) -> usize {
    dims["dims"][key]
        .as_u64()
        .unwrap_or_else(|| panic!("dims.json: `{key}`")) as usize
}

/// Returns the policy's sizes of a golden file.
pub(super) fn policy_dims(file: &str) -> (PolicyDims, ValueHeadDims, Executed) {
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
            pooling: Pooling::Mean,
            tokens: None,
            steps: ValueSteps::Stochastic,
        },
        executed,
    )
}

pub(super) fn float(array: &Array) -> Tensor {
    Tensor::from_slice(&array.f32()).view(array.dims().as_slice())
}

fn int(array: &Array) -> Tensor {
    Tensor::from_slice(&array.i64()).view(array.dims().as_slice())
}

fn boolean(array: &Array) -> Tensor {
    Tensor::from_slice(&array.bool()).view(array.dims().as_slice())
}

pub(super) fn values(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.detach().to_kind(Kind::Float).contiguous().view([-1]);
    Vec::try_from(&tensor).expect("f32 tensor")
}

#[track_caller]
pub(super) fn close(what: &str, got: &Tensor, want: &Array, tolerance: f64) {
    assert_eq!(got.size(), want.dims(), "{what}: shape");
    assert_close(what, &values(got), want, tolerance);
}

/// Asserts that a network output is within the tolerance of the golden output.
#[track_caller]
pub(super) fn close_output(what: &str, got: &Tensor, want: &Array) {
    close(what, got, want, output_tolerance(want));
}

/// Returns element `index` of the leading axis.
pub(super) fn at(array: &Array, index: usize) -> Array {
    let len = array.data.len() / array.shape[0];
    Array {
        shape: array.shape[1..].to_vec(),
        data: array.data[index * len..(index + 1) * len].to_vec(),
        dtype: array.dtype,
    }
}

/// Returns the noise head's sizes of `MODE_rl_heads`.
pub(super) fn noise_head(mode: &str) -> NoiseHeadDims {
    let heads = Golden::open(&format!("{mode}_rl_heads"));
    // a head has a few layers
    let mut hidden: Vec<usize> = (0..16)
        .map(|i| format!("{}.weight", noise_layer(i)))
        .take_while(|name| heads.has(name))
        .map(|name| heads.get(&name).shape[0])
        .collect();
    // the last layer's outputs are the action's elements
    hidden.pop();
    let std = |end: &str| (heads.get(&format!("noise_head.logvar_{end}")).data[0] / 2.0).exp();
    NoiseHeadDims {
        hidden,
        std_range: [std("min"), std("max")],
    }
}

/// Returns a policy with the weights of `MODE_weights`, and of `heads` from `MODE_rl_heads`.
pub(super) fn golden_policy(mode: &str, heads: &Heads) -> Pi0 {
    let (dims, _, _) = policy_dims(&format!("{mode}_model"));
    let store = ParamStore::zeros(&dims, heads, Device::Cpu).expect("sizes");
    let file = WeightFile::open(&golden_dir().join(format!("{mode}_weights.safetensors"))).expect("weights");
    store.load(&file, &[Part::Vlm, Part::Expert]).expect("strict load");
    let golden = Golden::open(&format!("{mode}_rl_heads"));
    for spec in store.specs() {
        if matches!(spec.part, Part::ValueHead | Part::NoiseHead) {
            store.assign(&spec.name, &golden.get(&spec.name).f32()).expect("head");
        }
    }
    Pi0::new(dims, heads, store).expect("network")
}

/// Returns the golden policy with its value head.
fn with_value_head(mode: &str) -> Pi0 {
    let (_, head, _) = policy_dims(&format!("{mode}_model"));
    golden_policy(mode, &Heads::value(head))
}

/// Encodes the observation of a golden file, with images under `{images}.{camera}`.
pub(super) fn encode(policy: &Pi0, golden: &Golden, images: &str) -> Prefix {
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
        let (policy, golden) = (with_value_head(mode), Golden::open(&format!("{mode}_model")));
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
                close_output(&format!("{mode} {name}"), &of_camera(got), &golden.get(&name));
            };
            check("patch_pos_emb", &prefix.vision.patch_pos_emb);
            check("last_hidden", &prefix.vision.last_hidden);
            check("projected", &prefix.vision.projected);
        }
        close_output(&format!("{mode} prefix.embs"), &prefix.embs, &golden.get("prefix.embs"));
        close_output(&format!("{mode} prefix.out"), &prefix.out, &golden.get("prefix.out"));
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
                close_output(
                    &format!("{mode} {name}"),
                    &cache.select(1, l as i64),
                    &golden.get(&name),
                );
            }
        }
        // joint pass of the reference: a valid prefix token never sees the suffix, so its output is equal; a padded token is a mean over
        // all keys, in the joint pass including the suffix
        let joint = golden.get("train.joint_prefix_out");
        let gap = (&prefix.out - float(&joint)).abs() * prefix.cache.mask.to_kind(Kind::Float).unsqueeze(-1);
        let gap = gap.max().double_value(&[]);
        assert!(gap <= output_tolerance(&joint), "{mode} joint prefix: {gap:e}");
    }
}

#[test]
fn velocity_of_one_denoise_step() {
    for mode in MODES {
        let (policy, golden) = (with_value_head(mode), Golden::open(&format!("{mode}_model")));
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
        close_output(
            &format!("{mode} suffix_embs"),
            &velocity.suffix_embs,
            &golden.get("step.suffix_embs"),
        );
        close_output(
            &format!("{mode} suffix_out"),
            &velocity.suffix_out,
            &golden.get("step.suffix_out"),
        );
        close_output(&format!("{mode} v_t"), &velocity.v_t, &golden.get("step.v_t"));
        let positions = golden.get("step.position_ids");
        close(
            &format!("{mode} positions"),
            &velocity.position_ids.expand(positions.dims(), false),
            &positions,
            0.0,
        );
        if let Some(cond) = &velocity.adarms_cond {
            close_output(&format!("{mode} adarms_cond"), cond, &golden.get("step.adarms_cond"));
        }
    }
}

#[test]
fn ode_paths_with_the_accumulated_times() {
    for mode in MODES {
        let (policy, golden) = (with_value_head(mode), Golden::open(&format!("{mode}_model")));
        let prefix = encode(&policy, &golden, "pre.image");
        let state = float(&golden.get("in.state"));
        for stem in ["ode4", "ode10"] {
            let times = golden.get(&format!("{stem}.t"));
            let steps = times.shape[0];
            let mut x = float(&golden.get("ode.noise"));
            for k in 0..steps {
                close_output(
                    &format!("{mode} {stem} x {k}"),
                    &x,
                    &at(&golden.get(&format!("{stem}.x_path")), k),
                );
                let velocity = policy
                    .velocity(&prefix.cache, Some(&state), &x, &float(&at(&times, k)))
                    .expect("velocity");
                close_output(
                    &format!("{mode} {stem} v {k}"),
                    &velocity.v_t,
                    &at(&golden.get(&format!("{stem}.v_path")), k),
                );
                x += velocity.v_t * (-1.0 / steps as f64);
            }
            close_output(&format!("{mode} {stem}"), &x, &golden.get(&format!("{stem}.actions")));
        }
    }
}

/// A bf16 checkpoint is read and widened to f32; the reference computes in bf16.
#[test]
fn a_bf16_checkpoint_gives_what_the_reference_computes_in_bf16() {
    let dir = tempfile::tempdir().expect("folder");
    for mode in MODES {
        if lacks(&format!("{mode}_model_bf16.safetensors")) {
            continue;
        }
        let golden = Golden::open(&format!("{mode}_model"));
        let tensors =
            Tensor::read_safetensors(golden_dir().join(format!("{mode}_weights.safetensors"))).expect("weights");
        let rounded: Vec<(String, Tensor)> = tensors
            .into_iter()
            .map(|(name, tensor)| (name, tensor.to_kind(Kind::BFloat16)))
            .collect();
        let path = dir.path().join(format!("{mode}.safetensors"));
        Tensor::write_safetensors(&rounded, &path).expect("writing");
        let (dims, _, _) = policy_dims(&format!("{mode}_model"));
        let store = ParamStore::zeros(&dims, &Heads::default(), Device::Cpu).expect("sizes");
        let file = WeightFile::open(&path).expect("weights");
        store.load(&file, &[Part::Vlm, Part::Expert]).expect("strict load");
        let policy = Pi0::new(dims, &Heads::default(), store).expect("network");

        let recorded = Golden::open(&format!("{mode}_model_bf16"));
        let prefix = encode(&policy, &golden, "pre.image");
        let input = |name: &str| float(&golden.get(name));
        let (state, x, t) = (input("in.state"), input("step.x_t"), input("step.t"));
        let velocity = policy.velocity(&prefix.cache, Some(&state), &x, &t).expect("velocity");
        // the golden set's own difference of f32 and bf16, whose activations have 8 bits
        let tolerance = 5e-2;
        close(
            &format!("{mode} v_t"),
            &velocity.v_t,
            &recorded.get("step.v_t"),
            tolerance,
        );
        let steps = golden.get("ode4.t").shape[0];
        let schedule = Schedule::new(NoiseMethod::ODE, steps, 0.0, false);
        let sample = policy.sample(&prefix.cache, Some(&state), &input("ode.noise"), &schedule, &[]);
        let actions = sample.expect("sample").actions;
        close(
            &format!("{mode} ode4"),
            &actions,
            &recorded.get("ode4.actions"),
            tolerance,
        );
    }
}

/// Compares every gradient of the store with `{prefix}{name}` of a golden file. Parameters that the file lacks must have no gradient,
/// except those that `skip` selects.
pub(super) fn check_gradients(policy: &Pi0, golden: &Golden, prefix: &str, skip: impl Fn(&str) -> bool) -> usize {
    let mut left: BTreeSet<String> = golden.names().into_iter().filter(|n| n.starts_with(prefix)).collect();
    let mut checked = 0;
    for (name, tensor) in [Part::Vlm, Part::Expert, Part::NoiseHead, Part::ValueHead]
        .into_iter()
        .flat_map(|p| policy.store().part(p))
    {
        let key = format!("{prefix}{}", if name == EMBEDDING { EMBEDDING_ALIAS } else { name });
        let grad = tensor.grad();
        if left.remove(&key) {
            let want = golden.get(&key);
            // a recorded gradient of exactly zero (the last layer's query of the prefix) belongs to an unused parameter
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
        let (policy, golden) = (with_value_head(mode), Golden::open(&format!("{mode}_model")));
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
        // the joint pass of the reference has the suffix that a denoise step has
        let step = policy.velocity(
            &prefix.cache,
            Some(&input("in.state")),
            &result.x_t,
            &input("train.time"),
        );
        close_output(
            &format!("{mode} joint suffix"),
            &step.expect("velocity").suffix_out,
            &golden.get("train.joint_suffix_out"),
        );
        close(&format!("{mode} x_t"), &result.x_t, &golden.get("train.x_t"), 1e-6);
        close(&format!("{mode} u_t"), &result.u_t, &golden.get("train.u_t"), 1e-6);
        // elements square the velocity's error and reach 20, where the reference's own error against f64 is above 1e-5: elements have a
        // tolerance relative to the largest, the mean has the loss tolerance
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

/// A golden policy with its encoded observation.
pub(super) struct Setup {
    pub(super) policy: Pi0,
    pub(super) prefix: Prefix,
    pub(super) state: Tensor,
    pub(super) executed: Executed,
}

pub(super) fn setup(mode: &str, heads: &Heads) -> Setup {
    let policy = golden_policy(mode, heads);
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

/// Without padding no attention mask is built; the result must equal the result with a mask.
#[test]
fn full_prefix_without_mask_equals_masked() {
    for mode in MODES {
        let s = setup(mode, &Heads::default());
        let batch = s.prefix.cache.batch();
        let golden = Golden::open(&format!("{mode}_model"));
        let x = float(&golden.get("step.x_t"));
        let t = float(&golden.get("step.t"));
        let len = s.prefix.cache.len();
        // a single sample is fully valid without its padding; a batch with a padded neighbor builds a mask
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
    let heads = Heads::value(head);
    let make = |seed| ParamStore::random(&dims, &heads, seed, Device::Cpu).expect("store");
    let (a, b, c) = (make(1), make(1), make(2));
    let all = [Part::Vlm, Part::Expert, Part::ValueHead];
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("all.safetensors");
    let bytes = |s: &ParamStore| {
        s.write(&all, &path).expect("written");
        std::fs::read(&path).expect("bytes")
    };
    assert_eq!(bytes(&a), bytes(&b), "same seed, same bytes");
    assert_ne!(bytes(&a), bytes(&c), "another seed, other weights");
    a.write(&all, &path).expect("written");
    c.load(&WeightFile::open(&path).expect("open"), &all).expect("load");
    assert_eq!(bytes(&a), bytes(&c), "export, load, export");
    let refused = c
        .load(&WeightFile::open(&path).expect("open"), &[Part::Vlm])
        .expect_err("extra tensors");
    assert!(refused.to_string().contains("does not belong"), "{refused}");
}

#[test]
fn wrong_shapes_are_named() {
    let s = setup("pi0", &Heads::default());
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
