//! Parameter table: name, shape and part of every weight, with the names of openpi's PyTorch checkpoints.

use crate::dims::{PolicyDims, Variant};
use serde::{Deserialize, Serialize};

/// Part of the policy that a weight belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Image tower, projector and language model: frozen in RL, in a separate file of a bundle.
    Vlm,
    /// Action expert, projections, time MLP: trained by SFT and RL.
    Expert,
    /// Noise head of Flow-Noise: trained with the expert.
    NoiseHead,
    /// Value head: a separate optimizer group.
    ValueHead,
}

/// Name, shape and part of one weight.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParamSpec {
    /// Name in the checkpoint.
    pub name: String,
    /// Sizes; linear weights are `[out, in]`.
    pub shape: Vec<usize>,
    /// Part of the policy.
    pub part: Part,
}

/// Prefix of the vision-language model's names.
pub const VLM: &str = "paligemma_with_expert.paligemma.model.";
/// Prefix of the action expert's names.
pub const EXPERT: &str = "paligemma_with_expert.gemma_expert.model.";
/// Name of the text embedding in openpi's files (the tied output head).
pub const EMBEDDING: &str = "paligemma_with_expert.paligemma.lm_head.weight";
/// Alternative name of [`EMBEDDING`].
pub const EMBEDDING_ALIAS: &str = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight";
/// Tensor of published checkpoints that no computation reads; accepted and dropped.
pub const UNUSED: &str = "paligemma_with_expert.gemma_expert.lm_head.weight";

/// Input of the value head.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum CriticInput {
    /// `V_expert`: mean over the action tokens of the expert's output, at the denoise steps of [`ValueSteps`].
    Expert,
    /// `V_vlm`: prefix output pooled over tokens by [`Pooling`].
    Vlm,
}

/// Tokens of the prefix output that `V_vlm` reads.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Pooling {
    /// Mean over the valid tokens.
    Mean,
    /// The first token.
    First,
    /// The last slot, usually padding.
    Last,
    /// Mean over all slots including padding, as in the reference.
    MeanPadded,
}

/// Denoise steps of `V_expert`; the same in rollout and update.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ValueSteps {
    /// The stochastic steps; their mean if a chunk is one decision.
    Stochastic,
    /// The mean over all denoise steps of the path.
    Path,
}

/// Noise head of Flow-Noise: an MLP with tanh between layers, on the expert's output of each action token.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoiseHeadDims {
    /// Hidden widths, `[128, 64]` in the reference.
    pub hidden: Vec<usize>,
    /// Smallest and largest standard deviation, in model units.
    pub std_range: [f64; 2],
}

impl NoiseHeadDims {
    /// Returns the range of the log-variance, `(log std_min^2, log std_max^2)`.
    pub fn logvar_range(&self) -> (f64, f64) {
        (2.0 * self.std_range[0].ln(), 2.0 * self.std_range[1].ln())
    }
}

/// Heads of a policy in addition to the velocity output.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Heads {
    /// Value head, for algorithms with a critic.
    pub value: Option<ValueHeadDims>,
    /// Noise head, for Flow-Noise.
    pub noise: Option<NoiseHeadDims>,
}

impl Heads {
    /// Returns the pooling of the prefix graph's output `pooled`.
    pub fn pooling(&self) -> Pooling {
        self.value.as_ref().map_or(Pooling::Mean, |head| head.pooling)
    }

    /// Makes heads with a value head and no noise head.
    pub fn value(head: ValueHeadDims) -> Self {
        Self {
            value: Some(head),
            noise: None,
        }
    }
}

/// Value head: an MLP with ReLU between layers and one output number.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ValueHeadDims {
    /// Source of the input features.
    pub input: CriticInput,
    /// Hidden widths, e.g. `[512, 256, 128]`.
    pub hidden: Vec<usize>,
    /// Whether the state, padded to the action width, follows the features (`V_vlm` only).
    pub state: bool,
    /// Tokens that `V_vlm` reads.
    pub pooling: Pooling,
    /// Number of first action tokens in the mean of `V_expert`; absent: all.
    pub tokens: Option<usize>,
    /// Denoise steps of `V_expert`.
    pub steps: ValueSteps,
}

impl ValueHeadDims {
    /// Returns the width of the input, features and state.
    pub fn input_width(&self, dims: &PolicyDims) -> usize {
        let features = match self.input {
            CriticInput::Expert => dims.expert.width,
            CriticInput::Vlm => dims.vlm.width,
        };
        features + if self.state { dims.action_dim } else { 0 }
    }
}

struct Table(Vec<ParamSpec>, Part);

impl Table {
    fn add(&mut self, name: impl Into<String>, shape: &[usize]) {
        self.0.push(ParamSpec {
            name: name.into(),
            shape: shape.to_vec(),
            part: self.1,
        });
    }
    fn linear(&mut self, name: &str, out: usize, input: usize) {
        self.add(format!("{name}.weight"), &[out, input]);
        self.add(format!("{name}.bias"), &[out]);
    }
    fn norm(&mut self, name: &str, width: usize) {
        self.add(format!("{name}.weight"), &[width]);
        self.add(format!("{name}.bias"), &[width]);
    }
    /// Adds one Gemma layer; `ada` selects pi0.5's adaptive norm.
    fn gemma_layer(&mut self, prefix: &str, width: usize, mlp: usize, dims: &PolicyDims, ada: bool) {
        let (q, kv) = (dims.heads * dims.head_dim, dims.kv_heads * dims.head_dim);
        self.add(format!("{prefix}.self_attn.q_proj.weight"), &[q, width]);
        self.add(format!("{prefix}.self_attn.k_proj.weight"), &[kv, width]);
        self.add(format!("{prefix}.self_attn.v_proj.weight"), &[kv, width]);
        self.add(format!("{prefix}.self_attn.o_proj.weight"), &[width, q]);
        self.add(format!("{prefix}.mlp.gate_proj.weight"), &[mlp, width]);
        self.add(format!("{prefix}.mlp.up_proj.weight"), &[mlp, width]);
        self.add(format!("{prefix}.mlp.down_proj.weight"), &[width, mlp]);
        self.rms(&format!("{prefix}.input_layernorm"), width, ada);
        self.rms(&format!("{prefix}.post_attention_layernorm"), width, ada);
    }
    fn rms(&mut self, name: &str, width: usize, ada: bool) {
        if ada {
            self.linear(&format!("{name}.dense"), 3 * width, width);
        } else {
            self.add(format!("{name}.weight"), &[width]);
        }
    }
}

/// Returns the reference's name of a layer of the noise head.
pub fn noise_layer(index: usize) -> String {
    format!("noise_head.mlp_logvar.moduleList.{index}.linear_1")
}

/// Returns all weights of a policy, in the order of the data path.
pub fn params(dims: &PolicyDims, heads: &Heads) -> Vec<ParamSpec> {
    let mut table = Table(Vec::new(), Part::Vlm);
    let vision = &dims.vision;
    let tower = format!("{VLM}vision_tower.vision_model");
    table.add(
        format!("{tower}.embeddings.patch_embedding.weight"),
        &[vision.width, 3, vision.patch, vision.patch],
    );
    table.add(format!("{tower}.embeddings.patch_embedding.bias"), &[vision.width]);
    table.add(
        format!("{tower}.embeddings.position_embedding.weight"),
        &[vision.tokens(), vision.width],
    );
    for l in 0..vision.depth {
        let layer = format!("{tower}.encoder.layers.{l}");
        table.norm(&format!("{layer}.layer_norm1"), vision.width);
        for proj in ["q_proj", "k_proj", "v_proj", "out_proj"] {
            table.linear(&format!("{layer}.self_attn.{proj}"), vision.width, vision.width);
        }
        table.norm(&format!("{layer}.layer_norm2"), vision.width);
        table.linear(&format!("{layer}.mlp.fc1"), vision.mlp, vision.width);
        table.linear(&format!("{layer}.mlp.fc2"), vision.width, vision.mlp);
    }
    table.norm(&format!("{tower}.post_layernorm"), vision.width);
    table.linear(
        &format!("{VLM}multi_modal_projector.linear"),
        dims.vlm.width,
        vision.width,
    );
    table.add(EMBEDDING, &[dims.vocab, dims.vlm.width]);
    for l in 0..dims.depth {
        table.gemma_layer(
            &format!("{VLM}language_model.layers.{l}"),
            dims.vlm.width,
            dims.vlm.mlp,
            dims,
            false,
        );
    }
    table.rms(&format!("{VLM}language_model.norm"), dims.vlm.width, false);

    table.1 = Part::Expert;
    let ada = dims.variant == Variant::Pi05;
    let width = dims.expert.width;
    for l in 0..dims.depth {
        table.gemma_layer(&format!("{EXPERT}layers.{l}"), width, dims.expert.mlp, dims, ada);
    }
    table.rms(&format!("{EXPERT}norm"), width, ada);
    table.linear("action_in_proj", width, dims.action_dim);
    table.linear("action_out_proj", dims.action_dim, width);
    match dims.variant {
        Variant::Pi0 => {
            table.linear("state_proj", width, dims.action_dim);
            table.linear("action_time_mlp_in", width, 2 * width);
            table.linear("action_time_mlp_out", width, width);
        }
        Variant::Pi05 => {
            table.linear("time_mlp_in", width, width);
            table.linear("time_mlp_out", width, width);
        }
    }
    if let Some(head) = &heads.noise {
        table.1 = Part::NoiseHead;
        let mut input = dims.expert.width;
        for (i, out) in head.hidden.iter().copied().chain([dims.action_dim]).enumerate() {
            table.linear(&noise_layer(i), out, input);
            input = out;
        }
    }
    if let Some(head) = &heads.value {
        table.1 = Part::ValueHead;
        let mut input = head.input_width(dims);
        for (i, out) in head.hidden.iter().copied().chain([1]).enumerate() {
            table.linear(&format!("value_head.mlp.{}", 2 * i), out, input);
            input = out;
        }
    }
    table.0
}

/// Returns the weights of the prefix graph, in the order of the parameter table.
pub fn vlm_params(dims: &PolicyDims) -> Vec<ParamSpec> {
    params(dims, &Heads::default())
        .into_iter()
        .filter(|p| p.part == Part::Vlm)
        .collect()
}

/// Returns the weights of the denoise graph, in the order of the parameter table.
pub fn expert_params(dims: &PolicyDims, heads: &Heads) -> Vec<ParamSpec> {
    params(dims, heads)
        .into_iter()
        .filter(|p| p.part != Part::Vlm)
        .collect()
}
