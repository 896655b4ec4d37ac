//! Contract of the `cuda` graphs, which a device runs on tensors in its own memory.
//!
//! All shapes are fixed. The prefix graphs have one row; the other graphs have the bundle's batch size. Keys and values are written
//! to buffers of [`CudaContract::capacity`] tokens per layer and row: first the prefix, then pi0's state token, then the action tokens.
//! Padding tokens of the prompt have no place there: the suffix overwrites them. A prefix graph reads present cameras only, so that
//! the valid tokens are the first [`LENGTH`] tokens.

use crate::{
    derived::{
        DerivedWeight, condition_weights, expert_weights, gemma, head_weights, layer, state_weights, vlm_weights,
    },
    dims::{PolicyDims, Variant},
    element::ElementType,
    graph::{
        Axis, C_V, C_X, DENOISE_GRAPH, GraphContract, IMAGES, MEAN, POOLED, PREFIX_GRAPH, PROMPT, STATE, STD, STEP_STD,
        TIME_EMB, TensorSpec, VALUE, X_NEXT, X_T, Z,
    },
    params::{CriticInput, Heads, Pooling},
};

/// Input of the prefix graph: number of valid prefix tokens, `[1]`.
pub const LENGTH: &str = "length";
/// Input of the state graph and of a denoise graph with grouped attention: position of the last token that is in the buffers after
/// the run, `[batch]`.
pub const LAST: &str = "last";
/// Input of a denoise graph with general attention: number of tokens in the buffers, prefix and state, `[batch]`.
pub const CACHED: &str = "cached";
/// Input of pi0.5's denoise graph and output of the condition graph: factor, shift and gate of each norm, in the order of
/// [`condition_weights`]; `[1, (2 depth + 1) 3 width]` and `[num_steps, ...]`. The factor is `1 + scale`.
pub const MODULATION: &str = "modulation";

/// File name of pi0's state graph.
pub const STATE_GRAPH: &str = "state.onnx";
/// File name of pi0.5's condition graph.
pub const CONDITION_GRAPH: &str = "condition.onnx";

/// Returns the name of a layer's keys.
pub fn keys(layer: usize) -> String {
    format!("k.{layer}")
}

/// Returns the name of a layer's values.
pub fn values(layer: usize) -> String {
    format!("v.{layer}")
}

/// Returns the name of the output that shares the memory of the input `name`.
pub fn in_place(name: &str) -> String {
    format!("{name}.next")
}

/// The rotation in `GroupQueryAttention` takes heads of a multiple of this width.
const HEAD_STEP: usize = 16;

/// Operators of attention in the denoise graph.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Attention {
    /// `GroupQueryAttention` in place in the buffers; one row.
    Grouped,
    /// `Attention` over joined keys and values; any number of rows.
    General,
}

fn spec(name: &str, element: ElementType, axes: &[usize]) -> TensorSpec {
    TensorSpec {
        name: name.to_owned(),
        element,
        axes: axes.iter().copied().map(Axis::Fixed).collect(),
    }
}

fn weights(derived: impl IntoIterator<Item = DerivedWeight>) -> Vec<TensorSpec> {
    derived
        .into_iter()
        .map(|weight| spec(&weight.name, weight.element, &weight.shape))
        .collect()
}

/// Reason why a policy has no `cuda` graphs.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no `cuda` graphs for this policy: {0}")]
pub struct CudaError(String);

/// Sizes, types and operators of the `cuda` graphs of one bundle.
#[derive(Debug, Clone, PartialEq)]
pub struct CudaContract {
    /// Sizes of the policy.
    pub dims: PolicyDims,
    /// Heads of the policy.
    pub heads: Heads,
    /// Element type of matrices and tokens: bf16 or f32.
    pub element: ElementType,
    /// Rows of the state graph and of the denoise graph.
    pub batch: usize,
    /// Denoise steps of a chunk.
    pub num_steps: usize,
    /// Operators of attention.
    pub attention: Attention,
}

impl CudaContract {
    /// Returns the contract; attention is grouped for one row in bf16, for which CUDA has that operator.
    ///
    /// # Errors
    /// The policy has several key-value heads or an unusual head width, the batch size is 0, or the critic reads padding tokens.
    pub fn new(
        dims: &PolicyDims,
        heads: &Heads,
        element: ElementType,
        batch: usize,
        num_steps: usize,
    ) -> Result<Self, CudaError> {
        if dims.kv_heads != 1 {
            return Err(CudaError(format!("`kv_heads` is {}, expected 1", dims.kv_heads)));
        }
        if !dims.head_dim.is_multiple_of(HEAD_STEP) {
            return Err(CudaError(format!(
                "`head_dim` is {}, expected a multiple of {HEAD_STEP}",
                dims.head_dim
            )));
        }
        if batch == 0 {
            return Err(CudaError("the batch size is not fixed".to_owned()));
        }
        let grouped = batch == 1 && element == ElementType::Bf16;
        let contract = Self {
            dims: dims.clone(),
            heads: heads.clone(),
            element,
            batch,
            num_steps,
            attention: if grouped {
                Attention::Grouped
            } else {
                Attention::General
            },
        };
        if contract.pooled() && matches!(heads.pooling(), Pooling::Last | Pooling::MeanPadded) {
            return Err(CudaError(
                "the critic reads padding tokens of the prompt, set `pooling` to `mean` or `first`".to_owned(),
            ));
        }
        Ok(contract)
    }

    /// Returns whether the critic reads the pooled prefix.
    pub fn pooled(&self) -> bool {
        self.heads
            .value
            .as_ref()
            .is_some_and(|head| head.input == CriticInput::Vlm)
    }

    /// Returns the number of prefix tokens with `cameras` present cameras, padding of the prompt included.
    pub fn prefix_len(&self, cameras: usize) -> usize {
        cameras * self.dims.vision.tokens() + self.dims.prompt_len
    }

    /// Returns the tokens that a key or value buffer has room for, per layer and row.
    pub fn capacity(&self) -> usize {
        (self.dims.prefix_len() + self.dims.suffix_len()).next_multiple_of(64)
    }

    /// Returns the file of the prefix graph for `cameras` present cameras.
    pub fn prefix_file(&self, cameras: usize) -> String {
        if cameras == self.dims.cameras {
            PREFIX_GRAPH.to_owned()
        } else {
            format!("prefix.{cameras}.onnx")
        }
    }

    /// Returns the names of the graph files.
    pub fn files(&self) -> Vec<String> {
        let own = match self.dims.variant {
            Variant::Pi0 => STATE_GRAPH,
            Variant::Pi05 => CONDITION_GRAPH,
        };
        (1..=self.dims.cameras)
            .map(|cameras| self.prefix_file(cameras))
            .chain([own.to_owned(), DENOISE_GRAPH.to_owned()])
            .collect()
    }

    /// Returns the key and value buffers of all layers, by `name`.
    fn buffers(&self, name: impl Fn(&str) -> String) -> Vec<TensorSpec> {
        let axes = [self.batch, 1, self.capacity(), self.dims.head_dim];
        (0..self.dims.depth)
            .flat_map(|l| [keys(l), values(l)])
            .map(|buffer| spec(&name(&buffer), self.element, &axes))
            .collect()
    }

    /// Returns the weights that a stack reads whose last layer ends with its keys and values.
    fn up_to_last_keys(&self, stack: &str, weights: Vec<DerivedWeight>) -> Vec<DerivedWeight> {
        let last = self.dims.depth - 1;
        let unread: Vec<String> = [
            gemma::OUT,
            gemma::NORM2,
            gemma::GATE,
            gemma::UP,
            gemma::GATE_UP,
            gemma::DOWN,
        ]
        .map(|weight| layer(stack, last, weight))
        .into_iter()
        .chain([format!("{stack}.norm")])
        .collect();
        weights
            .into_iter()
            .filter(|weight| !unread.contains(&weight.name))
            .collect()
    }

    /// Returns the weights of the prefix graphs. Without a critic that reads the pooled prefix, the last layer ends with its keys
    /// and values.
    pub fn prefix_weights(&self) -> Vec<DerivedWeight> {
        let all = vlm_weights(&self.dims, self.element);
        if self.pooled() {
            return all;
        }
        self.up_to_last_keys("vlm", all)
    }

    /// Returns the weights of the state graph, whose last layer ends with its keys and values.
    pub fn state_weights(&self) -> Vec<DerivedWeight> {
        let expert = expert_weights(&self.dims, self.element);
        [self.up_to_last_keys("expert", expert), state_weights(&self.dims)].concat()
    }

    /// Returns the weights of the denoise graph.
    pub fn denoise_weights(&self) -> Vec<DerivedWeight> {
        [
            expert_weights(&self.dims, self.element),
            head_weights(&self.dims, &self.heads),
        ]
        .concat()
    }

    /// Returns the contract of the prefix graph for one row with `cameras` present cameras. Images are bytes, channels last.
    pub fn prefix(&self, cameras: usize) -> GraphContract {
        let dims = &self.dims;
        let side = dims.vision.image_size;
        let cache = [1, 1, self.prefix_len(cameras), dims.head_dim];
        let mut outputs: Vec<TensorSpec> = (0..dims.depth)
            .flat_map(|l| [keys(l), values(l)])
            .map(|name| spec(&name, self.element, &cache))
            .collect();
        if self.pooled() {
            outputs.push(spec(POOLED, ElementType::F32, &[1, dims.vlm.width]));
        }
        GraphContract {
            inputs: vec![
                spec(IMAGES, ElementType::U8, &[cameras, side, side, 3]),
                spec(PROMPT, ElementType::I64, &[1, dims.prompt_len]),
                spec(LENGTH, ElementType::I64, &[1]),
            ],
            weights: weights(self.prefix_weights()),
            outputs,
        }
    }

    /// Returns the contract of pi0's state graph, which appends the state token to the buffers; `None` for pi0.5.
    pub fn state(&self) -> Option<GraphContract> {
        if self.dims.variant != Variant::Pi0 {
            return None;
        }
        let mut inputs = vec![
            spec(STATE, ElementType::F32, &[self.batch, self.dims.action_dim]),
            spec(LAST, ElementType::I32, &[self.batch]),
        ];
        inputs.extend(self.buffers(str::to_owned));
        Some(GraphContract {
            inputs,
            weights: weights(self.state_weights()),
            outputs: self.buffers(in_place),
        })
    }

    /// Returns the contract of pi0.5's condition graph, which computes the modulation of all denoise steps; `None` for pi0.
    pub fn condition(&self) -> Option<GraphContract> {
        if self.dims.variant != Variant::Pi05 {
            return None;
        }
        let width = self.dims.expert.width;
        Some(GraphContract {
            inputs: vec![spec(TIME_EMB, ElementType::F32, &[self.num_steps, width])],
            weights: weights(condition_weights(&self.dims)),
            outputs: vec![spec(
                MODULATION,
                self.element,
                &[self.num_steps, (2 * self.dims.depth + 1) * 3 * width],
            )],
        })
    }

    /// Returns the contract of the denoise graph.
    pub fn denoise(&self) -> GraphContract {
        let (dims, batch) = (&self.dims, self.batch);
        let floats = |name, axes: &[usize]| spec(name, ElementType::F32, axes);
        let actions = [batch, dims.action_horizon, dims.action_dim];
        let width = dims.expert.width;
        let mut inputs = vec![floats(X_T, &actions)];
        inputs.push(match dims.variant {
            Variant::Pi0 => floats(TIME_EMB, &[1, width]),
            Variant::Pi05 => spec(MODULATION, self.element, &[1, (2 * dims.depth + 1) * 3 * width]),
        });
        inputs.extend([
            floats(C_X, &[batch]),
            floats(C_V, &[batch]),
            floats(STD, &[batch]),
            floats(Z, &actions),
        ]);
        inputs.push(match self.attention {
            Attention::Grouped => spec(LAST, ElementType::I32, &[batch]),
            Attention::General => spec(CACHED, ElementType::I64, &[batch]),
        });
        if self.pooled() {
            inputs.push(floats(POOLED, &[batch, dims.vlm.width]));
        }
        if self.heads.value.as_ref().is_some_and(|head| head.state) {
            inputs.push(floats(STATE, &[batch, dims.action_dim]));
        }
        inputs.extend(self.buffers(str::to_owned));
        let mut outputs = vec![floats(X_NEXT, &actions), floats(MEAN, &actions)];
        if self.heads.noise.is_some() {
            outputs.push(floats(STEP_STD, &actions));
        }
        if self.heads.value.is_some() {
            outputs.push(floats(VALUE, &[batch]));
        }
        if self.attention == Attention::Grouped {
            outputs.extend(self.buffers(in_place));
        }
        GraphContract {
            inputs,
            weights: weights(self.denoise_weights()),
            outputs,
        }
    }
}
