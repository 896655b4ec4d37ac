//! Compares the exported graphs in ONNX Runtime with the network's golden tensors: pi0 and pi0.5, both weight modes, fixed and symbolic
//! batch.
#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "helpers of tests fail by panicking with the reason"
)]

use std::collections::BTreeMap;

use export::{GraphOptions, denoise_graph, prefix_graph};
use integration_tests::{Array, Golden, golden_dims, golden_dir, max_abs_diff, output_tolerance};
use ort::{
    session::{Session, SessionInputValue},
    value::Tensor,
};
use policy::{
    bundle::{EXPERT_WEIGHTS, VLM_WEIGHTS, write_weights},
    config::WeightMode,
    dims::{PolicyDims, StackDims, Variant, VisionDims},
    flow::{DenoiseStep, NoiseMethod, step_table, time_embedding},
    params::{CriticInput, Heads, ParamSpec, Pooling, ValueHeadDims, ValueSteps, expert_params, params, vlm_params},
    weights::{Layout, Weight, WeightFile},
};

use crate::onnx_sessions::session;

const MODES: [&str; 2] = ["pi0", "pi05"];
const VARIANTS: [(WeightMode, bool); 4] = [
    (WeightMode::Constants, false),
    (WeightMode::Constants, true),
    (WeightMode::Inputs, false),
    (WeightMode::Inputs, true),
];

/// Returns the model sizes of a golden file, with the number of cameras in `model`.
fn sizes(file: &str, model: &Golden, critic: CriticInput) -> (PolicyDims, ValueHeadDims) {
    let entry = golden_dims(file);
    let size = |key: &str| {
        entry["dims"][key]
            .as_u64()
            .unwrap_or_else(|| panic!("{file}: size {key}")) as usize
    };
    let dims = PolicyDims {
        variant: if entry["mode"] == "pi0" {
            Variant::Pi0
        } else {
            Variant::Pi05
        },
        vocab: size("vocab"),
        vlm: StackDims {
            width: size("vlm_w"),
            mlp: size("vlm_mlp"),
        },
        expert: StackDims {
            width: size("exp_w"),
            mlp: size("exp_mlp"),
        },
        depth: size("depth"),
        heads: size("heads"),
        kv_heads: size("kv"),
        head_dim: size("hd"),
        vision: VisionDims {
            width: size("vis_h"),
            mlp: size("vis_mlp"),
            depth: size("vis_l"),
            heads: size("vis_heads"),
            image_size: size("img"),
            patch: size("patch"),
        },
        cameras: cameras(model).len(),
        prompt_len: size("lang"),
        action_horizon: size("horizon"),
        action_dim: size("action_dim"),
    };
    dims.check().expect("golden sizes");
    let hidden = entry["dims"]["vh"]
        .as_array()
        .expect("vh")
        .iter()
        .map(|n| n.as_u64().expect("vh") as usize)
        .collect();
    (
        dims,
        ValueHeadDims {
            input: critic,
            hidden,
            state: false,
            pooling: Pooling::Mean,
            tokens: None,
            steps: ValueSteps::Stochastic,
        },
    )
}

/// Returns the camera names in alphabetical order, which is the order of the observation.
fn cameras(model: &Golden) -> Vec<String> {
    model
        .names()
        .iter()
        .filter_map(|n| n.strip_prefix("in.image.").map(str::to_owned))
        .collect()
}

type Weights = BTreeMap<String, Weight>;

/// Returns the weights of a golden file, with the value head from `heads`.
fn weights(file: &str, heads: &str, dims: &PolicyDims, head: &ValueHeadDims) -> Weights {
    let files = [file, heads]
        .map(|name| WeightFile::open(&golden_dir().join(format!("{name}.safetensors"))).expect("golden weights"));
    let read = |spec: &ParamSpec| {
        let [weights, heads] = &files;
        let file = if spec.name.starts_with("value_head.") {
            heads
        } else {
            weights
        };
        (spec.name.clone(), file.read(spec).expect("golden weight"))
    };
    params(dims, &Heads::value(head.clone())).iter().map(read).collect()
}

/// Outputs of one run of a graph, as f64.
type Outputs = BTreeMap<String, Array>;

fn run(session: &mut Session, inputs: Vec<(String, SessionInputValue<'_>)>) -> Outputs {
    let outputs = session.run(inputs).expect("inference");
    let mut arrays = BTreeMap::new();
    for (name, value) in &outputs {
        let shape = value.shape().iter().map(|n| *n as usize).collect();
        let data: Vec<f64> = if let Ok((_, data)) = value.try_extract_tensor::<f32>() {
            data.iter().map(|v| f64::from(*v)).collect()
        } else if let Ok((_, data)) = value.try_extract_tensor::<i64>() {
            data.iter().map(|v| *v as f64).collect()
        } else {
            let (_, data) = value.try_extract_tensor::<bool>().expect("f32, i64 or bool");
            data.iter().map(|v| f64::from(u8::from(*v))).collect()
        };
        arrays.insert(
            name.to_owned(),
            Array {
                shape,
                data,
                dtype: safetensors::Dtype::F32,
            },
        );
    }
    arrays
}

fn floats(shape: &[usize], data: Vec<f32>) -> SessionInputValue<'static> {
    Tensor::from_array((shape.to_vec(), data)).expect("tensor").into()
}

fn booleans(array: &Array) -> SessionInputValue<'static> {
    Tensor::from_array((array.shape.clone(), array.bool()))
        .expect("tensor")
        .into()
}

/// Both graphs of one policy in ONNX Runtime.
struct Graphs {
    dims: PolicyDims,
    vlm_critic: bool,
    weight_inputs: Vec<(String, Weight)>,
    prefix: Session,
    denoise: Session,
    _folder: tempfile::TempDir,
}

impl Graphs {
    fn build(
        dims: &PolicyDims,
        head: &ValueHeadDims,
        weights: &Weights,
        mode: WeightMode,
        batch: Option<usize>,
    ) -> Self {
        let folder = tempfile::tempdir().expect("folder");
        let options = GraphOptions { batch, debug: true };
        let heads = Heads::value(head.clone());
        let expert_specs = expert_params(dims, &Heads::value(head.clone()));
        let vlm_specs = vlm_params(dims);
        for (name, specs) in [(VLM_WEIGHTS, &vlm_specs), (EXPERT_WEIGHTS, &expert_specs)] {
            write_weights(&folder.path().join(name), specs, weights).expect("weights");
        }
        let layout = |specs| Layout::of(specs).expect("layout");
        let (vlm, expert) = (layout(&vlm_specs), layout(&expert_specs));
        let prefix = prefix_graph(dims, heads.pooling(), vlm.locations(), options).expect("prefix graph");
        let denoise = denoise_graph(dims, &heads, expert.locations(), mode, options).expect("denoise graph");
        let files = [("prefix.onnx", prefix), ("denoise.onnx", denoise)];
        for (name, bytes) in files {
            std::fs::write(folder.path().join(name), bytes).expect("writing");
        }
        let weight_inputs = match mode {
            WeightMode::Constants => Vec::new(),
            WeightMode::Inputs => expert_specs
                .iter()
                .map(|s| (s.name.clone(), weights[&s.name].clone()))
                .collect(),
        };
        Self {
            dims: dims.clone(),
            vlm_critic: head.input == CriticInput::Vlm,
            weight_inputs,
            prefix: session(&folder.path().join("prefix.onnx")),
            denoise: session(&folder.path().join("denoise.onnx")),
            _folder: folder,
        }
    }

    /// Runs the prefix graph; `images` is the prefix of preprocessed images, per camera `[B, 3, size, size]` under `PREFIX.NAME`.
    fn prefix(&mut self, model: &Golden, images: &str) -> Outputs {
        let names = cameras(model);
        let per_camera: Vec<Array> = names.iter().map(|n| model.get(&format!("{images}.{n}"))).collect();
        let masks: Vec<Array> = names.iter().map(|n| model.get(&format!("in.image_mask.{n}"))).collect();
        let batch = masks[0].shape[0];
        let side = self.dims.vision.image_size;
        let pixels = 3 * side * side;
        let (mut image, mut mask) = (Vec::new(), Vec::new());
        for b in 0..batch {
            for (camera, valid) in per_camera.iter().zip(&masks) {
                assert_eq!(camera.shape, [batch, 3, side, side], "preprocessed image");
                image.extend(camera.data[b * pixels..(b + 1) * pixels].iter().map(|v| *v as f32));
                mask.push(valid.data[b] != 0.0);
            }
        }
        let prompt = model.get("in.tokenized_prompt");
        let inputs = vec![
            ("images".to_owned(), floats(&[batch, names.len(), 3, side, side], image)),
            (
                "image_mask".to_owned(),
                Tensor::from_array(([batch, names.len()], mask)).expect("tensor").into(),
            ),
            (
                "prompt".to_owned(),
                Tensor::from_array((prompt.shape.clone(), prompt.i64()))
                    .expect("tensor")
                    .into(),
            ),
            (
                "prompt_mask".to_owned(),
                booleans(&model.get("in.tokenized_prompt_mask")),
            ),
        ];
        run(&mut self.prefix, inputs)
    }

    fn step(&mut self, prefix: &Outputs, state: &Array, step: &Step<'_>) -> Outputs {
        let batch = step.x.len() / (self.dims.action_horizon * self.dims.action_dim);
        let actions = [batch, self.dims.action_horizon, self.dims.action_dim];
        let width = self.dims.expert.width;
        let time: Vec<f32> = step.t.iter().flat_map(|t| time_embedding(*t, width)).collect();
        let all = |value: f64| floats(&[batch], vec![value as f32; batch]);
        let of = |name: &str| floats(&prefix[name].shape, prefix[name].f32());
        let mut inputs = vec![
            ("x_t".to_owned(), floats(&actions, step.x.to_vec())),
            ("time_emb".to_owned(), floats(&[batch, width], time)),
            ("k".to_owned(), of("k")),
            ("v".to_owned(), of("v")),
            ("prefix_mask".to_owned(), booleans(&prefix["prefix_mask"])),
            ("c_x".to_owned(), all(step.coefficients.0)),
            ("c_v".to_owned(), all(step.coefficients.1)),
            ("std".to_owned(), all(step.std)),
            ("z".to_owned(), floats(&actions, step.z.to_vec())),
        ];
        if self.dims.variant == Variant::Pi0 {
            inputs.push(("state".to_owned(), floats(&state.shape, state.f32())));
        }
        if self.vlm_critic {
            inputs.push(("pooled".to_owned(), of("pooled")));
        }
        for (name, weight) in &self.weight_inputs {
            inputs.push((name.clone(), floats(&weight.shape, weight.data.clone())));
        }
        run(&mut self.denoise, inputs)
    }
}

/// One denoise step of a batch, with a time per sample and common coefficients.
struct Step<'a> {
    x: &'a [f32],
    t: Vec<f64>,
    coefficients: (f64, f64),
    std: f64,
    z: &'a [f32],
}

/// Returns the `index`-th entry of an array's first axis.
fn at(array: &Array, index: usize) -> Array {
    let shape = array.shape[1..].to_vec();
    let length: usize = shape.iter().product();
    Array {
        shape,
        data: array.data[index * length..(index + 1) * length].to_vec(),
        dtype: array.dtype,
    }
}

/// Returns layer `l` of a cache `[B, depth, ...]`.
fn layer(cache: &Array, l: usize) -> Array {
    let samples: Vec<Array> = (0..cache.shape[0]).map(|b| at(&at(cache, b), l)).collect();
    let shape = [vec![cache.shape[0]], samples[0].shape.clone()].concat();
    Array {
        shape,
        data: samples.into_iter().flat_map(|s| s.data).collect(),
        dtype: cache.dtype,
    }
}

/// Asserts that two arrays are within `tolerance` and returns the largest error.
#[track_caller]
fn close(what: &str, got: &Array, want: &Array, tolerance: f64) -> f64 {
    assert_eq!(got.shape, want.shape, "{what}: shape");
    let diff = max_abs_diff(&got.f32(), &want.data);
    assert!(
        diff <= tolerance,
        "{what}: largest absolute error {diff:.3e}, allowed {tolerance:.0e}"
    );
    diff
}

/// Asserts that a network output is within its tolerance and returns the largest error.
#[track_caller]
fn close_output(what: &str, got: &Array, want: &Array) -> f64 {
    close(what, got, want, output_tolerance(want))
}

fn main_case(mode: &str) -> (Golden, PolicyDims, ValueHeadDims, Weights) {
    let model = Golden::open(&format!("{mode}_model"));
    let (dims, head) = sizes(&format!("{mode}_model"), &model, CriticInput::Expert);
    let weights = weights(&format!("{mode}_weights"), &format!("{mode}_rl_heads"), &dims, &head);
    (model, dims, head, weights)
}

fn each_variant(mode: &str, mut test: impl FnMut(&str, &Golden, &mut Graphs)) {
    let (model, dims, head, weights) = main_case(mode);
    let batch = model.get("in.state").shape[0];
    for (weights_mode, fixed) in VARIANTS {
        let mut graphs = Graphs::build(&dims, &head, &weights, weights_mode, fixed.then_some(batch));
        let label = format!(
            "{mode}, weights as {weights_mode:?}, {} batch",
            if fixed { "fixed" } else { "symbolic" }
        );
        test(&label, &model, &mut graphs);
    }
}

#[test]
fn prefix_graph_matches_the_golden_network() {
    for mode in MODES {
        each_variant(mode, |label, model, graphs| {
            let got = graphs.prefix(model, "pre.image");
            let mut worst = 0.0f64;
            let mut check = |name: &str, got: &Array, want: &str| {
                worst = worst.max(close_output(&format!("{label}: {name}"), got, &model.get(want)));
            };
            let equal = |name: &str, want: &str| close(&format!("{label}: {name}"), &got[name], &model.get(want), 0.0);
            for (i, camera) in cameras(model).iter().enumerate() {
                for (ours, theirs) in [
                    ("patch_pos_emb", "patch_pos_emb"),
                    ("vision_hidden", "last_hidden"),
                    ("vision_projected", "projected"),
                ] {
                    let name = format!("{ours}.{i}");
                    check(&name, &got[&name], &format!("vis.{camera}.{theirs}"));
                }
            }
            check("prefix_embs", &got["prefix_embs"], "prefix.embs");
            equal("prefix_mask", "prefix.pad_masks");
            equal("position_ids", "prefix.position_ids");
            for l in 0..graphs.dims.depth {
                check("k", &layer(&got["k"], l), &format!("prefix.k.{l}"));
                check("v", &layer(&got["v"], l), &format!("prefix.v.{l}"));
            }
            check("prefix_out", &got["prefix_out"], "prefix.out");
            println!("{label}: prefix, largest error {worst:.1e}");
        });
    }
}

#[test]
fn denoise_graph_matches_the_golden_step_and_both_ode_paths() {
    for mode in MODES {
        each_variant(mode, |label, model, graphs| {
            let prefix = graphs.prefix(model, "pre.image");
            let state = model.get("in.state");
            let mut worst = 0.0f64;
            let mut check = |name: &str, got: &Array, want: &Array| {
                worst = worst.max(close_output(&format!("{label}: {name}"), got, want));
            };
            let x = model.get("step.x_t").f32();
            let zeros = vec![0.0; x.len()];
            let step = Step {
                x: &x,
                t: model.get("step.t").data,
                coefficients: (1.0, 0.0),
                std: 0.0,
                z: &zeros,
            };
            let got = graphs.step(&prefix, &state, &step);
            check("suffix_embs", &got["suffix_embs"], &model.get("step.suffix_embs"));
            let positions = &got["suffix_position_ids"];
            close(
                &format!("{label}: suffix_position_ids"),
                positions,
                &model.get("step.position_ids"),
                0.0,
            );
            check("suffix_out", &got["suffix_out"], &model.get("step.suffix_out"));
            check("v_t", &got["v_t"], &model.get("step.v_t"));
            if model.has("step.adarms_cond") {
                check("adarms_cond", &got["adarms_cond"], &model.get("step.adarms_cond"));
            }
            for steps in [4, 10] {
                let golden = |name: &str| model.get(&format!("ode{steps}.{name}"));
                let (times, xs, vs) = (golden("t"), golden("x_path"), golden("v_path"));
                let mut x = model.get("ode.noise");
                for i in 0..steps {
                    check("x of the ODE path", &x, &at(&xs, i));
                    let now = x.f32();
                    let coefficients = (1.0, f64::from(-1.0 / steps as f32));
                    let step = Step {
                        x: &now,
                        t: at(&times, i).data,
                        coefficients,
                        std: 0.0,
                        z: &zeros,
                    };
                    let mut got = graphs.step(&prefix, &state, &step);
                    check("v of the ODE path", &got["v_t"], &at(&vs, i));
                    x = got.remove("x_next").expect("x_next");
                }
                check("ODE actions", &x, &golden("actions"));
            }
            println!("{label}: denoise, largest error {worst:.1e}");
        });
    }
}

#[test]
fn denoise_graph_matches_the_golden_step_grids_and_expert_values() {
    for mode in MODES {
        for (file, method) in [
            ("flow_sde", NoiseMethod::named("flow_sde").expect("registered")),
            ("flow_ode", NoiseMethod::ODE),
            ("flow_cps", NoiseMethod::named("flow_cps").expect("registered")),
        ] {
            let rl = Golden::open(&format!("{mode}_rl_{file}"));
            let grids: Vec<String> = rl
                .names()
                .iter()
                .filter_map(|n| n.strip_suffix(".timesteps").map(str::to_owned))
                .collect();
            assert!(!grids.is_empty(), "{mode} {file}: no step grid");
            // by Flow-SDE's formula its first step has the noise level itself as deviation
            let sde = Golden::open(&format!("{mode}_rl_flow_sde"));
            let level = sde.get(&format!("{}.std", grids[0])).data[0];
            each_variant(mode, |label, model, graphs| {
                let prefix = graphs.prefix(model, "pre.image");
                let state = model.get("in.state");
                let batch = state.shape[0];
                for grid in &grids {
                    let golden = |name: &str| rl.get(&format!("{grid}.{name}"));
                    let (x, z, times) = (golden("x"), golden("noise"), golden("timesteps"));
                    let rows: Vec<DenoiseStep> = step_table(method, x.shape[0], level);
                    for (k, row) in rows.iter().enumerate() {
                        let (x, z) = (at(&x, k).f32(), at(&z, k).f32());
                        let step = Step {
                            x: &x,
                            t: vec![times.data[k]; batch],
                            coefficients: row.mean_coefficients(),
                            std: row.std,
                            z: &z,
                        };
                        let got = graphs.step(&prefix, &state, &step);
                        for (name, want) in [("v_t", "v"), ("mean", "mean"), ("x_next", "next"), ("value", "value")] {
                            let what = format!("{label}: {file} {grid} step {k} {name}");
                            close_output(&what, &got[name], &at(&golden(want), k));
                        }
                    }
                }
            });
        }
    }
}

#[test]
fn value_of_the_prefix_is_the_masked_mean_of_the_reference() {
    for mode in MODES {
        let model = Golden::open(&format!("{mode}_vlmvalue"));
        let file = format!("{mode}_vlmvalue_weights");
        let (dims, head) = sizes(&file, &model, CriticInput::Vlm);
        let weights = weights(&file, &file, &dims, &head);
        let want = Golden::open(&format!("{mode}_vlmvalue_rlsampler")).get("masked_mean.value");
        for (weights_mode, fixed) in VARIANTS {
            let state = model.get("in.state");
            let batch = state.shape[0];
            let mut graphs = Graphs::build(&dims, &head, &weights, weights_mode, fixed.then_some(batch));
            let prefix = graphs.prefix(&model, "in.image");
            close_output(
                &format!("{mode}: prefix_out"),
                &prefix["prefix_out"],
                &model.get("prefix_out"),
            );
            let x = vec![0.5; batch * dims.action_horizon * dims.action_dim];
            let step = Step {
                x: &x,
                t: vec![1.0; batch],
                coefficients: (1.0, 0.0),
                std: 0.0,
                z: &x,
            };
            let got = graphs.step(&prefix, &state, &step);
            close_output(&format!("{mode}: V_vlm"), &got["value"], &want);
        }
    }
}

/// No golden file has grouped heads. A policy with two equal kv heads equals the golden policy with a single kv head.
#[test]
fn two_equal_kv_heads_are_one() {
    for mode in MODES {
        let (model, dims, head, weights) = main_case(mode);
        if dims.kv_heads != 1 || dims.heads % 2 != 0 {
            continue;
        }
        let doubled_dims = PolicyDims {
            kv_heads: 2,
            ..dims.clone()
        };
        let doubled: Weights = weights
            .iter()
            .map(|(name, weight)| {
                let mut weight = weight.clone();
                let is_kv = name.ends_with("self_attn.k_proj.weight") || name.ends_with("self_attn.v_proj.weight");
                if is_kv && !name.contains("vision_tower") {
                    weight.data = [weight.data.clone(), weight.data].concat();
                    weight.shape[0] *= 2;
                }
                (name.clone(), weight)
            })
            .collect();
        let state = model.get("in.state");
        let x = model.get("step.x_t").f32();
        let step = || Step {
            x: &x,
            t: model.get("step.t").data,
            coefficients: (1.0, 0.0),
            std: 0.0,
            z: &x,
        };
        for (weights_mode, fixed) in VARIANTS {
            let batch = fixed.then_some(state.shape[0]);
            let mut graphs = Graphs::build(&doubled_dims, &head, &doubled, weights_mode, batch);
            let prefix = graphs.prefix(&model, "pre.image");
            close_output("prefix_out", &prefix["prefix_out"], &model.get("prefix.out"));
            let got = graphs.step(&prefix, &state, &step());
            close_output("v_t", &got["v_t"], &model.get("step.v_t"));
        }
    }
}
