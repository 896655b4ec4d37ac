//! Contract of a bundle's two graphs: name, element type and shape of each input and output, by policy.
//!
//! The exporter writes graphs that keep the contract; the engine feeds and reads graphs according to the contract.

use std::fmt;

use crate::{
    config::WeightMode,
    dims::{PolicyDims, Variant},
    element::ElementType,
    params::{CriticInput, Heads, ParamSpec, expert_params},
};

/// The prefix graph's file name in a bundle.
pub const PREFIX_GRAPH: &str = "prefix.onnx";
/// The denoise graph's file name in a bundle.
pub const DENOISE_GRAPH: &str = "denoise.onnx";

/// Input of the prefix graph: images in `[-1, 1]`, `[batch, cameras, 3, image_size, image_size]`.
pub const IMAGES: &str = "images";
/// Input of the prefix graph: whether a camera has an image, `[batch, cameras]`.
pub const IMAGE_MASK: &str = "image_mask";
/// Input of the prefix graph: token ids, `[batch, prompt_len]`.
pub const PROMPT: &str = "prompt";
/// Input of the prefix graph: whether a token of the prompt is valid, `[batch, prompt_len]`.
pub const PROMPT_MASK: &str = "prompt_mask";
/// Keys after the rotary embedding, from prefix to denoise graph: `[batch, depth, kv_heads, prefix_len, head_dim]`.
pub const K: &str = "k";
/// Values, from prefix to denoise graph: shape of [`K`].
pub const V: &str = "v";
/// Whether a prefix token is valid, from prefix to denoise graph: `[batch, prefix_len]`.
pub const PREFIX_MASK: &str = "prefix_mask";
/// Prefix output pooled by [`Heads::pooling`], `[batch, vlm.width]`. The denoise graph has this input only for a `V_vlm` critic.
pub const POOLED: &str = "pooled";
/// Input of the denoise graph: noisy actions, `[batch, action_horizon, action_dim]`.
pub const X_T: &str = "x_t";
/// Input of the denoise graph: [`crate::flow::time_embedding`] of the step's flow time, `[batch, expert.width]`.
pub const TIME_EMB: &str = "time_emb";
/// Input of pi0's denoise graph: state in model units, `[batch, action_dim]`.
pub const STATE: &str = "state";
/// Input of the denoise graph: factor of `x_t` in the mean, `[batch]`.
pub const C_X: &str = "c_x";
/// Input of the denoise graph: factor of `v_t` in the mean, `[batch]`.
pub const C_V: &str = "c_v";
/// Input of the denoise graph: standard deviation of the added noise, or its factor for a noise head, `[batch]`.
pub const STD: &str = "std";
/// Input of the denoise graph: standard normal noise, shape of [`X_T`].
pub const Z: &str = "z";
/// Output of the denoise graph: `mean` plus the noise, shape of [`X_T`].
pub const X_NEXT: &str = "x_next";
/// Output of the denoise graph: `c_x * x_t + c_v * v_t`, shape of [`X_T`].
pub const MEAN: &str = "mean";
/// Output of the denoise graph: velocity, shape of [`X_T`].
pub const V_T: &str = "v_t";
/// Output of the denoise graph of a policy with a noise head: `std` times the head's standard deviation, shape of [`X_T`].
pub const STEP_STD: &str = "step_std";
/// Output of the denoise graph of a policy with a value head, `[batch]`.
pub const VALUE: &str = "value";

/// Name of the symbolic batch axis in a graph and in texts.
pub const BATCH: &str = "batch";

/// Size of one axis of a graph input or output.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Axis {
    /// Number of rows of the batch, chosen at each run.
    Batch,
    /// A fixed size.
    Fixed(usize),
}

impl fmt::Display for Axis {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Batch => f.write_str(BATCH),
            Self::Fixed(size) => write!(f, "{size}"),
        }
    }
}

/// Name, element type and shape of a graph input or output.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorSpec {
    /// Name of the input or output.
    pub name: String,
    /// Element type of the tensor.
    pub element: ElementType,
    /// Axes in order.
    pub axes: Vec<Axis>,
}

impl TensorSpec {
    /// Returns the shape for a batch of `rows`; a fixed batch axis keeps its size.
    pub fn shape(&self, rows: usize) -> Vec<usize> {
        self.axes
            .iter()
            .map(|axis| match axis {
                Axis::Batch => rows,
                Axis::Fixed(size) => *size,
            })
            .collect()
    }
}

impl From<ParamSpec> for TensorSpec {
    fn from(spec: ParamSpec) -> Self {
        Self {
            name: spec.name,
            element: ElementType::F32,
            axes: spec.shape.into_iter().map(Axis::Fixed).collect(),
        }
    }
}

impl fmt::Display for TensorSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let axes: Vec<String> = self.axes.iter().map(Axis::to_string).collect();
        write!(f, "`{}` {:?} [{}]", self.name, self.element, axes.join(", "))
    }
}

/// Inputs and outputs of one graph, in the graph's order.
///
/// An output of the prefix graph and an input of the denoise graph of the same name are the same tensor.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct GraphContract {
    /// Inputs that change from run to run.
    pub inputs: Vec<TensorSpec>,
    /// Weights as inputs, after `inputs` and in the order of the parameter table; empty if the graph reads its weights from a
    /// file.
    pub weights: Vec<TensorSpec>,
    /// Outputs.
    pub outputs: Vec<TensorSpec>,
}

impl GraphContract {
    /// Returns the contract of the prefix graph; `batch` is the fixed batch size, `None` a symbolic one.
    pub fn prefix(dims: &PolicyDims, batch: Option<usize>) -> Self {
        let spec = batched(batch);
        let side = dims.vision.image_size;
        Self {
            inputs: vec![
                spec(IMAGES, ElementType::F32, &[dims.cameras, 3, side, side]),
                spec(IMAGE_MASK, ElementType::Bool, &[dims.cameras]),
                spec(PROMPT, ElementType::I64, &[dims.prompt_len]),
                spec(PROMPT_MASK, ElementType::Bool, &[dims.prompt_len]),
            ],
            weights: Vec::new(),
            outputs: cache(dims, batch)
                .into_iter()
                .chain([spec(POOLED, ElementType::F32, &[dims.vlm.width])])
                .collect(),
        }
    }

    /// Returns the contract of the denoise graph; `batch` is the fixed batch size, `None` a symbolic one.
    pub fn denoise(dims: &PolicyDims, heads: &Heads, weights: WeightMode, batch: Option<usize>) -> Self {
        let spec = batched(batch);
        let floats = |name, axes: &[usize]| spec(name, ElementType::F32, axes);
        let actions = [dims.action_horizon, dims.action_dim];
        let mut inputs = vec![floats(X_T, &actions), floats(TIME_EMB, &[dims.expert.width])];
        if dims.variant == Variant::Pi0 {
            inputs.push(floats(STATE, &[dims.action_dim]));
        }
        inputs.extend(cache(dims, batch));
        if heads.value.as_ref().is_some_and(|head| head.input == CriticInput::Vlm) {
            inputs.push(floats(POOLED, &[dims.vlm.width]));
        }
        inputs.extend([
            floats(C_X, &[]),
            floats(C_V, &[]),
            floats(STD, &[]),
            floats(Z, &actions),
        ]);
        let mut outputs = vec![floats(X_NEXT, &actions), floats(MEAN, &actions), floats(V_T, &actions)];
        if heads.noise.is_some() {
            outputs.push(floats(STEP_STD, &actions));
        }
        if heads.value.is_some() {
            outputs.push(floats(VALUE, &[]));
        }
        Self {
            inputs,
            weights: match weights {
                WeightMode::Constants => Vec::new(),
                WeightMode::Inputs => expert_params(dims, heads).into_iter().map(TensorSpec::from).collect(),
            },
            outputs,
        }
    }

    /// Returns the input of this name, weights excluded.
    pub fn input(&self, name: &str) -> Option<&TensorSpec> {
        self.inputs.iter().find(|spec| spec.name == name)
    }

    /// Returns the output of this name.
    pub fn output(&self, name: &str) -> Option<&TensorSpec> {
        self.outputs.iter().find(|spec| spec.name == name)
    }
}

/// Returns a constructor of tensors whose first axis is the batch.
fn batched(batch: Option<usize>) -> impl Fn(&str, ElementType, &[usize]) -> TensorSpec {
    let rows = batch.map_or(Axis::Batch, Axis::Fixed);
    move |name, element, axes| TensorSpec {
        name: name.to_owned(),
        element,
        axes: [rows]
            .into_iter()
            .chain(axes.iter().copied().map(Axis::Fixed))
            .collect(),
    }
}

/// Returns the prefix outputs that every denoise graph reads.
fn cache(dims: &PolicyDims, batch: Option<usize>) -> [TensorSpec; 3] {
    let spec = batched(batch);
    let axes = [dims.depth, dims.kv_heads, dims.prefix_len(), dims.head_dim];
    [
        spec(K, ElementType::F32, &axes),
        spec(V, ElementType::F32, &axes),
        spec(PREFIX_MASK, ElementType::Bool, &[dims.prefix_len()]),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::params::{NoiseHeadDims, Pooling, ValueHeadDims, ValueSteps};

    fn names(specs: &[TensorSpec]) -> Vec<&str> {
        specs.iter().map(|spec| spec.name.as_str()).collect()
    }

    fn heads(input: CriticInput) -> Heads {
        Heads {
            value: Some(ValueHeadDims {
                input,
                hidden: vec![7],
                state: false,
                pooling: Pooling::Mean,
                tokens: None,
                steps: ValueSteps::Stochastic,
            }),
            noise: Some(NoiseHeadDims {
                hidden: vec![6],
                std_range: [0.08, 0.16],
            }),
        }
    }

    #[test]
    fn variant_and_heads_decide_on_inputs_and_outputs() {
        let contract = |variant, heads: &Heads| {
            GraphContract::denoise(&PolicyDims::published(variant), heads, WeightMode::Constants, None)
        };
        let plain = contract(Variant::Pi05, &Heads::default());
        assert_eq!(
            names(&plain.inputs),
            [X_T, TIME_EMB, K, V, PREFIX_MASK, C_X, C_V, STD, Z]
        );
        assert_eq!(names(&plain.outputs), [X_NEXT, MEAN, V_T]);
        let expert = contract(Variant::Pi0, &heads(CriticInput::Expert));
        assert!(expert.input(STATE).is_some() && expert.input(POOLED).is_none());
        assert_eq!(names(&expert.outputs), [X_NEXT, MEAN, V_T, STEP_STD, VALUE]);
        assert!(
            contract(Variant::Pi05, &heads(CriticInput::Vlm))
                .input(POOLED)
                .is_some()
        );
    }

    #[test]
    fn the_denoise_graph_reads_tensors_of_the_prefix_graph_unchanged() {
        for batch in [None, Some(2)] {
            let dims = PolicyDims::published(Variant::Pi0);
            let prefix = GraphContract::prefix(&dims, batch);
            let denoise = GraphContract::denoise(&dims, &heads(CriticInput::Vlm), WeightMode::Constants, batch);
            let shared: Vec<&TensorSpec> = prefix.outputs.iter().filter_map(|o| denoise.input(&o.name)).collect();
            assert_eq!(shared, prefix.outputs.iter().collect::<Vec<_>>());
        }
    }

    #[test]
    fn a_fixed_batch_is_in_the_shape() {
        let dims = PolicyDims::published(Variant::Pi05);
        let text = |batch| GraphContract::prefix(&dims, batch).outputs[0].to_string();
        assert_eq!(text(None), "`k` F32 [batch, 18, 1, 968, 256]");
        assert_eq!(text(Some(4)), "`k` F32 [4, 18, 1, 968, 256]");
        let shape = |batch| GraphContract::prefix(&dims, batch).inputs[1].shape(7);
        assert_eq!((shape(None), shape(Some(4))), (vec![7, 3], vec![4, 3]));
    }

    #[test]
    fn weights_as_inputs_are_the_table_without_the_vision_language_part() {
        let dims = PolicyDims::published(Variant::Pi05);
        let heads = heads(CriticInput::Expert);
        let contract = |mode| GraphContract::denoise(&dims, &heads, mode, None);
        let specs = expert_params(&dims, &heads);
        let inputs = contract(WeightMode::Inputs);
        assert_eq!(
            names(&inputs.weights),
            specs.iter().map(|s| s.name.as_str()).collect::<Vec<_>>()
        );
        assert_eq!(inputs.weights[0].shape(9), specs[0].shape, "no batch axis");
        assert_eq!(contract(WeightMode::Constants).weights, []);
    }
}
