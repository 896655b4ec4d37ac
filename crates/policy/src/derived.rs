//! Derived weights: the tensors that the `cuda` graphs read, computed from the weights of a checkpoint.
//!
//! The `cuda` graphs multiply by matrices `[in, out]`, join projections that read the same tokens, and scale by `1 + w` directly. A
//! device computes these tensors once per policy version.

use std::borrow::Cow;

use crate::{
    dims::{PolicyDims, Variant},
    element::ElementType,
    params::{EMBEDDING, EXPERT, Heads, NoiseHeadDims, ParamSpec, VLM, ValueHeadDims, noise_layer, params},
    weights::{Weights, WeightsError},
};

/// Tensor of a checkpoint, or a range of its columns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// The tensor; linear weights are `[out, in]`.
    pub spec: ParamSpec,
    /// First column and number of columns of a linear weight; `None`: all columns.
    pub columns: Option<(usize, usize)>,
}

/// Computation of a derived weight.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Form {
    /// The values as stored, one source after another.
    Stored,
    /// Linear weights `[out, in]`, joined along `out` and transposed: `[in, sum of out]`.
    Transposed,
    /// `1 + w`, the scale of Gemma's RMSNorm.
    OnePlus,
}

/// A weight input of a `cuda` graph.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DerivedWeight {
    /// Name of the graph input.
    pub name: String,
    /// Element type of the graph input.
    pub element: ElementType,
    /// Shape of the graph input.
    pub shape: Vec<usize>,
    /// Tensors of the checkpoint.
    pub sources: Vec<Source>,
    /// Computation.
    pub form: Form,
}

impl DerivedWeight {
    /// Returns the number of elements.
    pub fn elements(&self) -> usize {
        self.shape.iter().product()
    }

    /// Computes the values, row-major.
    ///
    /// # Errors
    /// A source is missing, misshapen or not finite.
    pub fn values(&self, weights: &dyn Weights) -> Result<Vec<f32>, WeightsError> {
        if let (Form::Stored, [source]) = (self.form, self.sources.as_slice()) {
            return Ok(weights.values(&source.spec)?.into_owned());
        }
        let mut stored: Vec<Cow<'_, [f32]>> = Vec::with_capacity(self.sources.len());
        for source in &self.sources {
            stored.push(weights.values(&source.spec)?);
        }
        Ok(match self.form {
            Form::Stored => stored.concat(),
            Form::OnePlus => stored
                .iter()
                .flat_map(|values| values.iter().map(|w| 1.0 + w))
                .collect(),
            Form::Transposed => self.transposed(&stored),
        })
    }

    fn transposed(&self, stored: &[Cow<'_, [f32]>]) -> Vec<f32> {
        /// Rows and columns that are moved together, so that both sides stay in the processor's cache.
        const TILE: usize = 32;
        let width = self.shape.last().copied().unwrap_or(1);
        let mut out = vec![0.0; self.elements()];
        let mut first = 0;
        for (source, values) in self.sources.iter().zip(stored) {
            let rows = source.spec.shape.first().copied().unwrap_or(1);
            let all = values.len() / rows.max(1);
            let (from, columns) = source.columns.unwrap_or((0, all));
            for row in (0..rows).step_by(TILE) {
                for column in (0..columns).step_by(TILE) {
                    for r in row..(row + TILE).min(rows) {
                        for c in column..(column + TILE).min(columns) {
                            out[c * width + first + r] = values[r * all + from + c];
                        }
                    }
                }
            }
            first += rows;
        }
        out
    }
}

/// Names of the derived weights of one Gemma layer.
pub mod gemma {
    /// Scale of the norm before attention, `[width]`.
    pub const NORM1: &str = "norm1";
    /// Query, key and value projections, `[width, (heads + 2 kv_heads) head_dim]`.
    pub const QKV: &str = "qkv";
    /// Output projection of attention, `[heads head_dim, width]`.
    pub const OUT: &str = "out";
    /// Scale of the norm before the MLP, `[width]`.
    pub const NORM2: &str = "norm2";
    /// Gate projection, `[width, mlp]`; in the language model only.
    pub const GATE: &str = "gate";
    /// Up projection, `[width, mlp]`; in the language model only.
    pub const UP: &str = "up";
    /// Gate and up projections, `[width, 2 mlp]`; in the action expert only.
    pub const GATE_UP: &str = "gate_up";
    /// Down projection, `[mlp, width]`.
    pub const DOWN: &str = "down";
}

/// Returns the name of a weight of layer `layer` of a stack (`vision`, `vlm`, `expert`).
pub fn layer(stack: &str, layer: usize, weight: &str) -> String {
    format!("{stack}.{layer}.{weight}")
}

/// Collects derived weights over a parameter table.
struct Table {
    params: Vec<ParamSpec>,
    element: ElementType,
    list: Vec<DerivedWeight>,
}

impl Table {
    #[expect(
        clippy::expect_used,
        reason = "the names here are those of the parameter table, which a test goes through"
    )]
    fn source(&self, name: &str) -> Source {
        let spec = self.params.iter().find(|spec| spec.name == name).cloned();
        Source {
            spec: spec.expect("a name of the parameter table"),
            columns: None,
        }
    }

    fn push(&mut self, name: String, element: ElementType, shape: Vec<usize>, sources: Vec<Source>, form: Form) {
        self.list.push(DerivedWeight {
            name,
            element,
            shape,
            sources,
            form,
        });
    }

    /// Adds a tensor as stored.
    fn stored(&mut self, name: String, from: &str, element: ElementType) {
        let source = self.source(from);
        self.push(name, element, source.spec.shape.clone(), vec![source], Form::Stored);
    }

    /// Adds biases, joined.
    fn bias(&mut self, name: String, from: &[String]) {
        let sources: Vec<Source> = from.iter().map(|from| self.source(from)).collect();
        let width = sources.iter().flat_map(|source| &source.spec.shape).sum();
        self.push(name, self.element, vec![width], sources, Form::Stored);
    }

    /// Adds `1 + w`.
    fn one_plus(&mut self, name: String, from: &str) {
        let source = self.source(from);
        self.push(
            name,
            self.element,
            source.spec.shape.clone(),
            vec![source],
            Form::OnePlus,
        );
    }

    /// Adds linear weights with the same input, joined and transposed.
    fn matrix(&mut self, name: String, from: &[String], element: ElementType) {
        let sources: Vec<Source> = from.iter().map(|from| self.source(from)).collect();
        let out = sources.iter().filter_map(|source| source.spec.shape.first()).sum();
        let input = sources
            .first()
            .map_or(1, |source| source.spec.shape.iter().skip(1).product());
        self.push(name, element, vec![input, out], sources, Form::Transposed);
    }

    /// Adds the transposed matrix and the bias of a linear layer in f32, as `NAME.weight` and `NAME.bias`.
    fn linear_f32(&mut self, name: &str) {
        self.matrix(format!("{name}.weight"), &[format!("{name}.weight")], ElementType::F32);
        self.stored(format!("{name}.bias"), &format!("{name}.bias"), ElementType::F32);
    }

    fn gemma_layer(&mut self, stack: &str, number: usize, checkpoint: &str, joined: bool, adaptive: bool) {
        let from = |weight: &str| format!("{checkpoint}layers.{number}.{weight}");
        let element = self.element;
        if !adaptive {
            self.one_plus(layer(stack, number, gemma::NORM1), &from("input_layernorm.weight"));
        }
        let qkv = ["q", "k", "v"].map(|p| from(&format!("self_attn.{p}_proj.weight")));
        self.matrix(layer(stack, number, gemma::QKV), &qkv, element);
        self.matrix(
            layer(stack, number, gemma::OUT),
            &[from("self_attn.o_proj.weight")],
            element,
        );
        if !adaptive {
            self.one_plus(
                layer(stack, number, gemma::NORM2),
                &from("post_attention_layernorm.weight"),
            );
        }
        let (gate, up) = (from("mlp.gate_proj.weight"), from("mlp.up_proj.weight"));
        if joined {
            self.matrix(layer(stack, number, gemma::GATE_UP), &[gate, up], element);
        } else {
            self.matrix(layer(stack, number, gemma::GATE), &[gate], element);
            self.matrix(layer(stack, number, gemma::UP), &[up], element);
        }
        self.matrix(
            layer(stack, number, gemma::DOWN),
            &[from("mlp.down_proj.weight")],
            element,
        );
    }
}

/// Returns the weights of the `cuda` prefix graph: matrices and norms in `element`.
pub fn vlm_weights(dims: &PolicyDims, element: ElementType) -> Vec<DerivedWeight> {
    let mut table = Table {
        params: params(dims, &Heads::default()),
        element,
        list: Vec::new(),
    };
    let tower = format!("{VLM}vision_tower.vision_model");
    table.matrix(
        "vision.patch.weight".to_owned(),
        &[format!("{tower}.embeddings.patch_embedding.weight")],
        element,
    );
    table.bias(
        "vision.patch.bias".to_owned(),
        &[format!("{tower}.embeddings.patch_embedding.bias")],
    );
    table.stored(
        "vision.position".to_owned(),
        &format!("{tower}.embeddings.position_embedding.weight"),
        element,
    );
    for l in 0..dims.vision.depth {
        let from = |weight: &str| format!("{tower}.encoder.layers.{l}.{weight}");
        let name = |weight: &str| layer("vision", l, weight);
        let qkv = |part: &str| ["q", "k", "v"].map(|p| from(&format!("self_attn.{p}_proj.{part}")));
        table.stored(name("norm1.weight"), &from("layer_norm1.weight"), element);
        table.stored(name("norm1.bias"), &from("layer_norm1.bias"), element);
        table.matrix(name("qkv.weight"), &qkv("weight"), element);
        table.bias(name("qkv.bias"), &qkv("bias"));
        table.matrix(name("out.weight"), &[from("self_attn.out_proj.weight")], element);
        table.bias(name("out.bias"), &[from("self_attn.out_proj.bias")]);
        table.stored(name("norm2.weight"), &from("layer_norm2.weight"), element);
        table.stored(name("norm2.bias"), &from("layer_norm2.bias"), element);
        table.matrix(name("fc1.weight"), &[from("mlp.fc1.weight")], element);
        table.bias(name("fc1.bias"), &[from("mlp.fc1.bias")]);
        table.matrix(name("fc2.weight"), &[from("mlp.fc2.weight")], element);
        table.bias(name("fc2.bias"), &[from("mlp.fc2.bias")]);
    }
    for part in ["weight", "bias"] {
        table.stored(
            format!("vision.norm.{part}"),
            &format!("{tower}.post_layernorm.{part}"),
            element,
        );
    }
    let projector = format!("{VLM}multi_modal_projector.linear");
    table.matrix("projector.weight".to_owned(), &[format!("{projector}.weight")], element);
    table.bias("projector.bias".to_owned(), &[format!("{projector}.bias")]);
    table.stored("embedding".to_owned(), EMBEDDING, element);
    for l in 0..dims.depth {
        table.gemma_layer("vlm", l, &format!("{VLM}language_model."), false, false);
    }
    table.one_plus("vlm.norm".to_owned(), &format!("{VLM}language_model.norm.weight"));
    table.list
}

/// Returns the weights of the expert's layers in the `cuda` graphs: matrices and norms in `element`. For pi0.5 the norms are in
/// [`condition_weights`].
pub fn expert_weights(dims: &PolicyDims, element: ElementType) -> Vec<DerivedWeight> {
    let mut table = Table {
        params: params(dims, &Heads::default()),
        element,
        list: Vec::new(),
    };
    let adaptive = dims.variant == Variant::Pi05;
    for l in 0..dims.depth {
        table.gemma_layer("expert", l, EXPERT, true, adaptive);
    }
    if !adaptive {
        table.one_plus("expert.norm".to_owned(), &format!("{EXPERT}norm.weight"));
    }
    table.list
}

/// Returns the weight of pi0's state token, in f32.
pub fn state_weights(dims: &PolicyDims) -> Vec<DerivedWeight> {
    let mut table = Table {
        params: params(dims, &Heads::default()),
        element: ElementType::F32,
        list: Vec::new(),
    };
    if dims.variant == Variant::Pi0 {
        table.linear_f32("state_proj");
    }
    table.list
}

/// Returns the weights of pi0.5's condition graph, in f32: the time MLP, and the modulation of the norms in the order of the layers
/// (before attention, before the MLP), then of the output, as one matrix `[width, (2 depth + 1) 3 width]`.
pub fn condition_weights(dims: &PolicyDims) -> Vec<DerivedWeight> {
    let mut table = Table {
        params: params(dims, &Heads::default()),
        element: ElementType::F32,
        list: Vec::new(),
    };
    if dims.variant == Variant::Pi05 {
        table.linear_f32("time_mlp_in");
        table.linear_f32("time_mlp_out");
        let norms: Vec<String> = (0..dims.depth)
            .flat_map(|l| ["input_layernorm", "post_attention_layernorm"].map(|n| format!("{EXPERT}layers.{l}.{n}")))
            .chain([format!("{EXPERT}norm")])
            .collect();
        let part = |part: &str| -> Vec<String> { norms.iter().map(|norm| format!("{norm}.dense.{part}")).collect() };
        table.matrix("modulation.weight".to_owned(), &part("weight"), ElementType::F32);
        table.bias("modulation.bias".to_owned(), &part("bias"));
    }
    table.list
}

/// Returns the weights of the projections and heads of the denoise graph, in f32.
///
/// pi0's `action_time_mlp_in.weight` is two matrices, `action_time_mlp_in.action` and `action_time_mlp_in.time`.
pub fn head_weights(dims: &PolicyDims, heads: &Heads) -> Vec<DerivedWeight> {
    let mut table = Table {
        params: params(dims, heads),
        element: ElementType::F32,
        list: Vec::new(),
    };
    table.linear_f32("action_in_proj");
    if dims.variant == Variant::Pi0 {
        let width = dims.expert.width;
        for (name, from) in [("action", 0), ("time", width)] {
            let mut source = table.source("action_time_mlp_in.weight");
            source.columns = Some((from, width));
            table.push(
                format!("action_time_mlp_in.{name}"),
                ElementType::F32,
                vec![width, width],
                vec![source],
                Form::Transposed,
            );
        }
        table.stored(
            "action_time_mlp_in.bias".to_owned(),
            "action_time_mlp_in.bias",
            ElementType::F32,
        );
        table.linear_f32("action_time_mlp_out");
    }
    table.linear_f32("action_out_proj");
    if let Some(NoiseHeadDims { hidden, .. }) = &heads.noise {
        for l in 0..=hidden.len() {
            table.linear_f32(&noise_layer(l));
        }
    }
    if let Some(ValueHeadDims { hidden, .. }) = &heads.value {
        for l in 0..=hidden.len() {
            table.linear_f32(&format!("value_head.mlp.{}", 2 * l));
        }
    }
    table.list
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeMap, BTreeSet};

    use super::*;
    use crate::{
        params::{CriticInput, Pooling, ValueSteps},
        weights::Weight,
    };

    fn heads() -> Heads {
        Heads {
            value: Some(ValueHeadDims {
                input: CriticInput::Expert,
                hidden: vec![7],
                state: false,
                pooling: Pooling::Mean,
                tokens: None,
                steps: ValueSteps::Stochastic,
            }),
            noise: Some(NoiseHeadDims {
                hidden: vec![6, 5],
                std_range: [0.08, 0.16],
            }),
        }
    }

    #[test]
    fn every_weight_of_a_published_policy_is_read_once() {
        for variant in [Variant::Pi0, Variant::Pi05] {
            let (dims, heads) = (PolicyDims::published(variant), heads());
            let all: Vec<DerivedWeight> = [
                vlm_weights(&dims, ElementType::Bf16),
                expert_weights(&dims, ElementType::Bf16),
                state_weights(&dims),
                condition_weights(&dims),
                head_weights(&dims, &heads),
            ]
            .concat();
            let mut elements: BTreeMap<&str, usize> = BTreeMap::new();
            let names: BTreeSet<&str> = all.iter().map(|weight| weight.name.as_str()).collect();
            assert_eq!(names.len(), all.len(), "a name is used once");
            for weight in &all {
                let mut sum = 0;
                for source in &weight.sources {
                    let whole: usize = source.spec.shape.iter().product();
                    let read = source
                        .columns
                        .map_or(whole, |(_, columns)| columns * source.spec.shape[0]);
                    *elements.entry(&source.spec.name).or_default() += read;
                    sum += read;
                }
                assert_eq!(weight.elements(), sum, "{}", weight.name);
            }
            for spec in params(&dims, &heads) {
                let whole: usize = spec.shape.iter().product();
                assert_eq!(elements.get(spec.name.as_str()), Some(&whole), "{}", spec.name);
            }
        }
    }

    #[test]
    fn joined_projections_are_transposed() {
        let spec = |name: &str, rows| ParamSpec {
            name: name.to_owned(),
            shape: vec![rows, 40],
            part: crate::params::Part::Expert,
        };
        let source = |name: &str, rows, columns| Source {
            spec: spec(name, rows),
            columns,
        };
        let weight = |rows: usize, offset: f32| Weight {
            shape: vec![rows, 40],
            data: (0..rows * 40).map(|i| i as f32 + offset).collect(),
        };
        let weights: BTreeMap<String, Weight> =
            [("a".to_owned(), weight(35, 0.0)), ("b".to_owned(), weight(3, 0.5))].into();
        let derived = DerivedWeight {
            name: "ab".to_owned(),
            element: ElementType::F32,
            shape: vec![33, 38],
            sources: vec![source("a", 35, Some((7, 33))), source("b", 3, Some((0, 33)))],
            form: Form::Transposed,
        };
        let values = derived.values(&weights).expect("values");
        for input in 0..33 {
            for out in 0..38 {
                let want = if out < 35 {
                    weights["a"].data[out * 40 + 7 + input]
                } else {
                    weights["b"].data[(out - 35) * 40 + input]
                };
                assert_eq!(values[input * 38 + out].to_bits(), want.to_bits(), "{input} {out}");
            }
        }
    }

    #[test]
    fn a_norm_scales_by_one_plus_its_weight() {
        let dims = PolicyDims::published(Variant::Pi0);
        let norm = expert_weights(&dims, ElementType::F32).pop().expect("a norm");
        assert_eq!(norm.name, "expert.norm");
        let data: Vec<f32> = (0..1024).map(|i| i as f32).collect();
        let shape = vec![1024];
        let weights: BTreeMap<String, Weight> = [(norm.sources[0].spec.name.clone(), Weight { shape, data })].into();
        let values = norm.values(&weights).expect("values");
        assert_eq!((values[0], values[1023]), (1.0, 1024.0));
    }
}
