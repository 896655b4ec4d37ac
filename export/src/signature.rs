//! Inputs and outputs of the two graphs: the contract between the exporter and whoever runs a bundle.

use policy::{
    config::WeightMode,
    dims::{PolicyDims, Variant},
    params::{CriticInput, Heads, ParamSpec, Part, params},
};

use crate::shape::{Dim, Elem, Port, fixed};

/// Inputs and outputs of a graph, in order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Signature {
    /// What is fed; in weight mode `inputs` the weights come last.
    pub inputs: Vec<Port>,
    /// What is computed.
    pub outputs: Vec<Port>,
}

impl Signature {
    /// The input of this name.
    pub fn input(&self, name: &str) -> Option<&Port> {
        self.inputs.iter().find(|p| p.name == name)
    }
}

fn port(name: &str, elem: Elem, batch: Option<usize>, axes: &[usize]) -> Port {
    let rows = batch.map_or(Dim::batch(1), Dim::fixed);
    Port {
        name: name.to_owned(),
        elem,
        shape: [rows].into_iter().chain(fixed(axes)).collect(),
    }
}

/// The prefix graph: `images` f32 in [-1, 1], `image_mask`, `prompt`, `prompt_mask` to `k`, `v` (keys after RoPE),
/// `prefix_mask`, `pooled` (what `V_vlm` reads of the prefix output: the mean over its valid tokens unless configured otherwise). `batch` absent: symbolic.
pub fn prefix_signature(dims: &PolicyDims, batch: Option<usize>) -> Signature {
    let side = dims.vision.image_size;
    let cache = [dims.depth, dims.kv_heads, dims.prefix_len(), dims.head_dim];
    Signature {
        inputs: vec![
            port("images", Elem::F32, batch, &[dims.cameras, 3, side, side]),
            port("image_mask", Elem::Bool, batch, &[dims.cameras]),
            port("prompt", Elem::I64, batch, &[dims.prompt_len]),
            port("prompt_mask", Elem::Bool, batch, &[dims.prompt_len]),
        ],
        outputs: vec![
            port("k", Elem::F32, batch, &cache),
            port("v", Elem::F32, batch, &cache),
            port("prefix_mask", Elem::Bool, batch, &[dims.prefix_len()]),
            port("pooled", Elem::F32, batch, &[dims.vlm.width]),
        ],
    }
}

/// The denoise graph: one step `x_next = c_x x_t + c_v v_t + std z`, the velocity, and the value when there is a head. With a noise
/// head `std` is the factor of its own standard deviation, and `step_std` is the product.
/// `time_emb` is [`policy::flow::time_embedding`] of the step's flow time. `batch` absent: symbolic.
pub fn denoise_signature(dims: &PolicyDims, heads: &Heads, weights: WeightMode, batch: Option<usize>) -> Signature {
    let actions = [dims.action_horizon, dims.action_dim];
    let cache = [dims.depth, dims.kv_heads, dims.prefix_len(), dims.head_dim];
    let f32_port = |name: &str, axes: &[usize]| port(name, Elem::F32, batch, axes);
    let mut inputs = vec![f32_port("x_t", &actions), f32_port("time_emb", &[dims.expert.width])];
    if dims.variant == Variant::Pi0 {
        inputs.push(f32_port("state", &[dims.action_dim]));
    }
    inputs.extend([
        f32_port("k", &cache),
        f32_port("v", &cache),
        port("prefix_mask", Elem::Bool, batch, &[dims.prefix_len()]),
    ]);
    if heads.value.as_ref().is_some_and(|head| head.input == CriticInput::Vlm) {
        inputs.push(f32_port("pooled", &[dims.vlm.width]));
    }
    inputs.extend([
        f32_port("c_x", &[]),
        f32_port("c_v", &[]),
        f32_port("std", &[]),
        f32_port("z", &actions),
    ]);
    if weights == WeightMode::Inputs {
        inputs.extend(expert_params(dims, heads).into_iter().map(|spec| Port {
            shape: fixed(&spec.shape),
            name: spec.name,
            elem: Elem::F32,
        }));
    }
    let mut outputs = vec![
        f32_port("x_next", &actions),
        f32_port("mean", &actions),
        f32_port("v_t", &actions),
    ];
    if heads.noise.is_some() {
        outputs.push(f32_port("step_std", &actions));
    }
    if heads.value.is_some() {
        outputs.push(f32_port("value", &[]));
    }
    Signature { inputs, outputs }
}

/// Weights of the prefix graph, in the order of the parameter table.
pub fn vlm_params(dims: &PolicyDims) -> Vec<ParamSpec> {
    params(dims, &Heads::default())
        .into_iter()
        .filter(|p| p.part == Part::Vlm)
        .collect()
}

/// Weights of the denoise graph, in the order of the parameter table.
pub fn expert_params(dims: &PolicyDims, heads: &Heads) -> Vec<ParamSpec> {
    params(dims, heads)
        .into_iter()
        .filter(|p| p.part != Part::Vlm)
        .collect()
}
