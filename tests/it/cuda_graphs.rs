//! Compares the graphs of flavour `cuda` with the graphs of flavour `plain`, in f32 in ONNX Runtime on the CPU: both variants, present
//! and absent cameras, padded prompts, grouped and general attention, heads.

use std::collections::BTreeMap;

use export::{GraphOptions, cuda_graphs, denoise_graph, prefix_graph};
use ort::{
    session::{Session, SessionInputValue},
    value::Tensor,
};
use policy::{
    bundle::{VLM_WEIGHTS, write_weights},
    config::WeightMode,
    cuda::{
        Attention, CACHED, CONDITION_GRAPH, CudaContract, LAST, LENGTH, MODULATION, STATE_GRAPH, in_place, keys, values,
    },
    dims::{PolicyDims, StackDims, Variant, VisionDims},
    element::ElementType,
    flow::time_embedding,
    graph::{
        C_V, C_X, DENOISE_GRAPH, GraphContract, IMAGE_MASK, IMAGES, MEAN, POOLED, PROMPT, PROMPT_MASK, STATE, STD,
        STEP_STD, TIME_EMB, VALUE, X_NEXT, X_T, Z,
    },
    image::normalise_u8,
    params::{
        CriticInput, Heads, NoiseHeadDims, Pooling, ValueHeadDims, ValueSteps, expert_params, params, vlm_params,
    },
    weights::{Layout, Weight},
};

use crate::onnx_sessions::session;

/// Largest difference, relative to the largest magnitude of an output. Both graphs compute in f32; fused operators add in another
/// order, which changes the last bits in every layer, and the differences of one step are in the input of the next.
const TOLERANCE: f32 = 1e-5;
/// Denoise steps of a chunk.
const STEPS: usize = 3;

/// Reproducible numbers in `[-1, 1]`.
struct Draws(u64);

impl Draws {
    fn next(&mut self) -> f32 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / (1 << 23) as f32) - 1.0
    }

    fn floats(&mut self, count: usize) -> Vec<f32> {
        (0..count).map(|_| self.next()).collect()
    }

    fn below(&mut self, end: usize) -> usize {
        (self.next().abs() * end as f32) as usize % end
    }
}

fn dims(variant: Variant) -> PolicyDims {
    PolicyDims {
        variant,
        vocab: 40,
        vlm: StackDims { width: 32, mlp: 56 },
        expert: StackDims { width: 24, mlp: 40 },
        depth: 3,
        heads: 4,
        kv_heads: 1,
        head_dim: 16,
        vision: VisionDims {
            width: 24,
            mlp: 20,
            depth: 2,
            heads: 2,
            image_size: 8,
            patch: 4,
        },
        cameras: 3,
        prompt_len: 6,
        action_horizon: 5,
        action_dim: 7,
    }
}

fn weights(dims: &PolicyDims, heads: &Heads) -> BTreeMap<String, Weight> {
    let mut draws = Draws(7);
    params(dims, heads)
        .into_iter()
        .map(|spec| {
            let inputs: usize = spec.shape.iter().skip(1).product();
            let scale = if spec.shape.len() > 1 {
                1.7 / (inputs as f32).sqrt()
            } else {
                0.3
            };
            let data = draws.floats(spec.shape.iter().product());
            let data = data.into_iter().map(|v| v * scale).collect();
            (
                spec.name,
                Weight {
                    shape: spec.shape,
                    data,
                },
            )
        })
        .collect()
}

/// An input or output of a graph.
#[derive(Debug, Clone)]
enum Data {
    F32(Vec<f32>),
    I32(Vec<i32>),
    I64(Vec<i64>),
    U8(Vec<u8>),
    Bool(Vec<bool>),
}

type Ports = BTreeMap<String, (Vec<usize>, Data)>;

fn run(session: &mut Session, inputs: &Ports) -> Ports {
    let fed: Vec<(String, SessionInputValue<'_>)> = inputs
        .iter()
        .map(|(name, (shape, data))| {
            let shape = shape.clone();
            let value: SessionInputValue<'_> = match data.clone() {
                Data::F32(data) => Tensor::from_array((shape, data)).expect(name).into(),
                Data::I32(data) => Tensor::from_array((shape, data)).expect(name).into(),
                Data::I64(data) => Tensor::from_array((shape, data)).expect(name).into(),
                Data::U8(data) => Tensor::from_array((shape, data)).expect(name).into(),
                Data::Bool(data) => Tensor::from_array((shape, data)).expect(name).into(),
            };
            (name.clone(), value)
        })
        .collect();
    let outputs = session.run(fed).expect("inference");
    outputs
        .iter()
        .map(|(name, value)| {
            let shape: Vec<usize> = value.shape().iter().map(|n| *n as usize).collect();
            let data = match value.try_extract_tensor::<f32>() {
                Ok((_, data)) => Data::F32(data.to_vec()),
                Err(_) => Data::Bool(value.try_extract_tensor::<bool>().expect("f32 or bool").1.to_vec()),
            };
            (name.to_owned(), (shape, data))
        })
        .collect()
}

fn floats<'p>(ports: &'p Ports, name: &str) -> &'p [f32] {
    match &ports.get(name).unwrap_or_else(|| panic!("no `{name}`")).1 {
        Data::F32(data) => data,
        other => panic!("`{name}` is {other:?}"),
    }
}

/// Returns the inputs of a contract that are in `given`, and the weights.
fn fed(contract: &GraphContract, given: Ports, weights: &Ports) -> Ports {
    let mut all = given;
    for spec in &contract.weights {
        all.insert(spec.name.clone(), weights[&spec.name].clone());
    }
    let wanted: Vec<&String> = contract
        .inputs
        .iter()
        .chain(&contract.weights)
        .map(|s| &s.name)
        .collect();
    assert_eq!(all.len(), wanted.len(), "{:?} for {wanted:?}", all.keys());
    all
}

/// One row of a batch.
#[derive(Clone)]
struct Row {
    /// Bytes per camera, channels last; `None` is an absent camera.
    cameras: Vec<Option<Vec<u8>>>,
    /// Valid tokens of the prompt.
    prompt: Vec<i64>,
    state: Vec<f32>,
}

fn row(dims: &PolicyDims, draws: &mut Draws, present: &[bool], prompt: usize) -> Row {
    let bytes = dims.vision.image_size.pow(2) * 3;
    Row {
        cameras: present
            .iter()
            .map(|present| present.then(|| (0..bytes).map(|_| draws.below(256) as u8).collect()))
            .collect(),
        prompt: (0..prompt).map(|_| draws.below(dims.vocab) as i64).collect(),
        state: draws.floats(dims.action_dim),
    }
}

/// Noise, coefficients and time of the steps; the rows of a batch have one time.
struct Chunk {
    start: Vec<f32>,
    noise: Vec<Vec<f32>>,
    coefficients: Vec<[Vec<f32>; 3]>,
    times: Vec<Vec<f32>>,
}

fn chunk(dims: &PolicyDims, draws: &mut Draws, batch: usize) -> Chunk {
    let count = batch * dims.action_horizon * dims.action_dim;
    Chunk {
        start: draws.floats(count),
        noise: (0..STEPS).map(|_| draws.floats(count)).collect(),
        coefficients: (0..STEPS).map(|_| [(); 3].map(|()| draws.floats(batch))).collect(),
        times: (0..STEPS)
            .map(|i| time_embedding(1.0 - i as f64 / STEPS as f64, dims.expert.width))
            .collect(),
    }
}

/// The inputs of a step that both flavours have.
fn step_inputs(dims: &PolicyDims, chunk: &Chunk, i: usize, x_t: Vec<f32>, batch: usize) -> Ports {
    let actions = vec![batch, dims.action_horizon, dims.action_dim];
    let [c_x, c_v, std] = chunk.coefficients[i].clone();
    [
        (X_T, actions.clone(), x_t),
        (Z, actions, chunk.noise[i].clone()),
        (C_X, vec![batch], c_x),
        (C_V, vec![batch], c_v),
        (STD, vec![batch], std),
    ]
    .into_iter()
    .map(|(name, shape, data)| (name.to_owned(), (shape, Data::F32(data))))
    .collect()
}

fn states(dims: &PolicyDims, rows: &[Row]) -> (Vec<usize>, Data) {
    let all = rows.iter().flat_map(|row| row.state.clone()).collect();
    (vec![rows.len(), dims.action_dim], Data::F32(all))
}

/// Runs the graphs of flavour `plain`; returns the outputs of each step.
fn plain(
    dims: &PolicyDims,
    heads: &Heads,
    weights: &BTreeMap<String, Weight>,
    rows: &[Row],
    chunk: &Chunk,
) -> Vec<Ports> {
    let folder = tempfile::tempdir().expect("folder");
    let batch = rows.len();
    let options = GraphOptions {
        batch: Some(batch),
        debug: false,
    };
    let vlm = vlm_params(dims);
    write_weights(&folder.path().join(VLM_WEIGHTS), &vlm, weights).expect("weights");
    let layout = Layout::of(&vlm).expect("layout");
    let prefix = prefix_graph(dims, heads.pooling(), layout.locations(), options).expect("prefix graph");
    let denoise = denoise_graph(dims, heads, &BTreeMap::new(), WeightMode::Inputs, options).expect("denoise graph");
    let [mut prefix, mut denoise] = [("prefix.onnx", prefix), ("denoise.onnx", denoise)].map(|(name, bytes)| {
        let path = folder.path().join(name);
        std::fs::write(&path, bytes).expect("writing");
        session(&path)
    });

    let side = dims.vision.image_size;
    let (mut images, mut mask, mut prompt, mut valid) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
    for row in rows {
        for camera in &row.cameras {
            mask.push(camera.is_some());
            for channel in 0..3 {
                for pixel in 0..side * side {
                    images.push(
                        camera
                            .as_ref()
                            .map_or(0.0, |bytes| normalise_u8(bytes[pixel * 3 + channel])),
                    );
                }
            }
        }
        for slot in 0..dims.prompt_len {
            prompt.push(row.prompt.get(slot).copied().unwrap_or(0));
            valid.push(slot < row.prompt.len());
        }
    }
    let inputs = Ports::from([
        (
            IMAGES.to_owned(),
            (vec![batch, dims.cameras, 3, side, side], Data::F32(images)),
        ),
        (IMAGE_MASK.to_owned(), (vec![batch, dims.cameras], Data::Bool(mask))),
        (PROMPT.to_owned(), (vec![batch, dims.prompt_len], Data::I64(prompt))),
        (
            PROMPT_MASK.to_owned(),
            (vec![batch, dims.prompt_len], Data::Bool(valid)),
        ),
    ]);
    let cache = run(&mut prefix, &inputs);
    let contract = GraphContract::denoise(dims, heads, WeightMode::Inputs, Some(batch));
    let named: Ports = expert_params(dims, heads)
        .into_iter()
        .map(|spec| {
            let weight = &weights[&spec.name];
            (spec.name, (weight.shape.clone(), Data::F32(weight.data.clone())))
        })
        .collect();
    let mut x_t = chunk.start.clone();
    let mut steps = Vec::new();
    for i in 0..STEPS {
        let mut given = step_inputs(dims, chunk, i, x_t, batch);
        let time = chunk.times[i].repeat(batch);
        given.insert(TIME_EMB.to_owned(), (vec![batch, dims.expert.width], Data::F32(time)));
        given.insert(STATE.to_owned(), states(dims, rows));
        given.extend(cache.clone());
        given.retain(|name, _| contract.input(name).is_some());
        let out = run(&mut denoise, &fed(&contract, given, &named));
        x_t = floats(&out, X_NEXT).to_vec();
        steps.push(out);
    }
    steps
}

/// Runs the graphs of flavour `cuda` as a device does; returns the outputs of each step.
fn cuda(contract: &CudaContract, weights: &BTreeMap<String, Weight>, rows: &[Row], chunk: &Chunk) -> Vec<Ports> {
    let dims = &contract.dims;
    let batch = rows.len();
    assert_eq!(contract.batch, batch);
    let folder = tempfile::tempdir().expect("folder");
    let mut sessions = BTreeMap::new();
    for (name, bytes) in cuda_graphs(contract).expect("graphs") {
        let path = folder.path().join(&name);
        std::fs::write(&path, bytes).expect("writing");
        sessions.insert(name, session(&path));
    }
    assert_eq!(sessions.keys().len(), contract.files().len());
    let mut derived = contract.prefix_weights();
    derived.extend(contract.state_weights());
    derived.extend(policy::derived::condition_weights(dims));
    derived.extend(contract.denoise_weights());
    let named: Ports = derived
        .into_iter()
        .map(|weight| {
            let data = weight.values(weights).expect("derived");
            (weight.name, (weight.shape, Data::F32(data)))
        })
        .collect();

    // numbers of an earlier chunk
    let (capacity, wide) = (contract.capacity(), dims.head_dim);
    let mut buffers: Ports = (0..dims.depth)
        .flat_map(|l| [keys(l), values(l)])
        .map(|name| {
            let data = vec![7.0; batch * capacity * wide];
            (name, (vec![batch, 1, capacity, wide], Data::F32(data)))
        })
        .collect();
    let mut pooled = Vec::new();
    let mut lengths = Vec::new();
    let side = dims.vision.image_size;
    for (b, row) in rows.iter().enumerate() {
        let present: Vec<&Vec<u8>> = row.cameras.iter().flatten().collect();
        let cameras = present.len();
        let length = cameras * dims.vision.tokens() + row.prompt.len();
        lengths.push(length);
        let mut prompt = row.prompt.clone();
        prompt.resize(dims.prompt_len, 0);
        let images = present.into_iter().flatten().copied().collect();
        let given = Ports::from([
            (IMAGES.to_owned(), (vec![cameras, side, side, 3], Data::U8(images))),
            (PROMPT.to_owned(), (vec![1, dims.prompt_len], Data::I64(prompt))),
            (LENGTH.to_owned(), (vec![1], Data::I64(vec![length as i64]))),
        ]);
        let session = sessions.get_mut(&contract.prefix_file(cameras)).expect("prefix graph");
        let out = run(session, &fed(&contract.prefix(cameras), given, &named));
        for (name, (_, buffer)) in &mut buffers {
            let part = floats(&out, name);
            let Data::F32(buffer) = buffer else { panic!("{name}") };
            buffer[b * capacity * wide..][..part.len()].copy_from_slice(part);
        }
        if contract.pooled() {
            pooled.extend_from_slice(floats(&out, POOLED));
        }
    }

    let next = |buffers: &mut Ports, out: &Ports| {
        for (name, buffer) in buffers {
            let (shape, data) = &out[&in_place(name)];
            assert_eq!(*shape, buffer.0);
            buffer.1 = data.clone();
        }
    };
    let mut cached = lengths.clone();
    if let Some(ports) = contract.state() {
        let last = lengths.iter().map(|n| *n as i32).collect();
        let mut given = buffers.clone();
        given.insert(STATE.to_owned(), states(dims, rows));
        given.insert(LAST.to_owned(), (vec![batch], Data::I32(last)));
        let session = sessions.get_mut(STATE_GRAPH).expect("state graph");
        let out = run(session, &fed(&ports, given, &named));
        next(&mut buffers, &out);
        cached = lengths.iter().map(|n| n + 1).collect();
    }
    let modulation = contract.condition().map(|ports| {
        let times = chunk.times.concat();
        let given = Ports::from([(TIME_EMB.to_owned(), (vec![STEPS, dims.expert.width], Data::F32(times)))]);
        let session = sessions.get_mut(CONDITION_GRAPH).expect("condition graph");
        let out = run(session, &fed(&ports, given, &named));
        floats(&out, MODULATION).to_vec()
    });

    let ports = contract.denoise();
    let mut x_t = chunk.start.clone();
    let mut steps = Vec::new();
    for i in 0..STEPS {
        let mut given = step_inputs(dims, chunk, i, x_t, batch);
        given.extend(buffers.clone());
        let last = cached.iter().map(|n| (n + dims.action_horizon - 1) as i32).collect();
        given.insert(LAST.to_owned(), (vec![batch], Data::I32(last)));
        let counts = cached.iter().map(|n| *n as i64).collect();
        given.insert(CACHED.to_owned(), (vec![batch], Data::I64(counts)));
        given.insert(STATE.to_owned(), states(dims, rows));
        given.insert(
            POOLED.to_owned(),
            (vec![batch, dims.vlm.width], Data::F32(pooled.clone())),
        );
        let time = chunk.times[i].clone();
        given.insert(TIME_EMB.to_owned(), (vec![1, dims.expert.width], Data::F32(time)));
        if let Some(all) = &modulation {
            let width = all.len() / STEPS;
            let row = all[i * width..(i + 1) * width].to_vec();
            given.insert(MODULATION.to_owned(), (vec![1, width], Data::F32(row)));
        }
        given.retain(|name, _| ports.input(name).is_some());
        let session = sessions.get_mut(DENOISE_GRAPH).expect("denoise graph");
        let out = run(session, &fed(&ports, given, &named));
        if contract.attention == Attention::Grouped {
            next(&mut buffers, &out);
        }
        x_t = floats(&out, X_NEXT).to_vec();
        steps.push(out);
    }
    steps
}

/// Runs both flavours and compares all outputs of all steps; returns the largest relative difference.
fn compare(variant: Variant, heads: &Heads, attention: Attention, rows: &[Row]) -> f32 {
    let dims = dims(variant);
    let weights = weights(&dims, heads);
    let mut contract = CudaContract::new(&dims, heads, ElementType::F32, rows.len(), STEPS).expect("contract");
    contract.attention = attention;
    let chunk = chunk(&dims, &mut Draws(99), rows.len());
    let expected = plain(&dims, heads, &weights, rows, &chunk);
    let found = cuda(&contract, &weights, rows, &chunk);
    let mut worst = 0.0f32;
    for (i, (expected, found)) in expected.iter().zip(&found).enumerate() {
        let mut names = vec![X_NEXT, MEAN];
        names.extend(heads.noise.as_ref().map(|_| STEP_STD));
        names.extend(heads.value.as_ref().map(|_| VALUE));
        for name in names {
            let (expected, found) = (floats(expected, name), floats(found, name));
            assert_eq!(expected.len(), found.len(), "{name}");
            let most = expected.iter().fold(0.0f32, |most, v| most.max(v.abs()));
            assert!(most > 1e-3, "{name} is not near zero");
            for (a, b) in expected.iter().zip(found) {
                let difference = (a - b).abs() / most;
                assert!(
                    difference <= TOLERANCE,
                    "step {i}, {name}: {a} and {b} differ by {difference} of {most}"
                );
                worst = worst.max(difference);
            }
        }
    }
    worst
}

fn value(input: CriticInput, pooling: Pooling, state: bool) -> Heads {
    Heads {
        value: Some(ValueHeadDims {
            input,
            hidden: vec![9],
            state,
            pooling,
            tokens: (input == CriticInput::Expert).then_some(2),
            steps: ValueSteps::Stochastic,
        }),
        noise: Some(NoiseHeadDims {
            hidden: vec![8],
            std_range: [0.08, 0.16],
        }),
    }
}

#[test]
fn one_row_matches_flavour_plain() {
    for variant in [Variant::Pi0, Variant::Pi05] {
        // only pi0's graph of flavour `plain` has a state
        let state = variant == Variant::Pi0;
        let heads = [
            Heads::default(),
            value(CriticInput::Expert, Pooling::Mean, false),
            value(CriticInput::Vlm, Pooling::Mean, state),
            value(CriticInput::Vlm, Pooling::First, false),
        ];
        let mut draws = Draws(3);
        let rows = [
            row(&dims(variant), &mut draws, &[true; 3], 4),
            row(&dims(variant), &mut draws, &[true, false, true], 6),
            row(&dims(variant), &mut draws, &[false, true, true], 1),
            row(&dims(variant), &mut draws, &[true, false, false], 3),
        ];
        for (heads, row) in heads.iter().zip(&rows) {
            for attention in [Attention::Grouped, Attention::General] {
                let worst = compare(variant, heads, attention, std::slice::from_ref(row));
                eprintln!("{variant:?} {attention:?}: {worst:.1e}");
            }
        }
    }
}

#[test]
fn rows_of_several_lengths_match_flavour_plain() {
    for variant in [Variant::Pi0, Variant::Pi05] {
        let dims = dims(variant);
        let mut draws = Draws(5);
        let rows = [
            row(&dims, &mut draws, &[true, false, true], 2),
            row(&dims, &mut draws, &[true; 3], 6),
            row(&dims, &mut draws, &[false, true, false], 5),
        ];
        for heads in [
            Heads::default(),
            value(CriticInput::Expert, Pooling::Mean, variant == Variant::Pi0),
            value(CriticInput::Vlm, Pooling::Mean, false),
        ] {
            let worst = compare(variant, &heads, Attention::General, &rows);
            eprintln!("{variant:?} 3 rows: {worst:.1e}");
        }
    }
}
