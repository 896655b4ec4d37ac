//! The graph builder: typed values with a static shape (the batch may be symbolic), checked during the build.

use std::collections::{BTreeMap, BTreeSet};

use policy::{
    config::Flavour,
    element::{ElementType, bf16_bytes, f32_bytes},
    graph::TensorSpec,
    params::ParamSpec,
    weights::Location,
};
use prost::Message;

use crate::{
    proto::{
        AttributeProto, GraphProto, ModelProto, NodeProto, OperatorSetIdProto, StringStringEntryProto, TensorProto,
        TensorShapeProto, TypeProto, ValueInfoProto, attribute_proto::AttributeType, tensor_proto::DataLocation,
        tensor_shape_proto, type_proto,
    },
    shape::{Dim, fixed, text},
};

/// Domain of the operators that ONNX Runtime adds to those of ONNX.
pub(crate) const MICROSOFT: &str = "com.microsoft";

/// Returns the IR version of the written models.
pub(crate) const fn ir_version(flavour: Flavour) -> i64 {
    match flavour {
        Flavour::Plain => 10,
        Flavour::Cuda => 11,
    }
}

/// Returns the operator sets of the written models, as domain and version.
pub(crate) const fn operator_sets(flavour: Flavour) -> &'static [(&'static str, i64)] {
    match flavour {
        // the first with `Gelu`
        Flavour::Plain => &[("", 20)],
        // the first with `Attention` over a number of keys per row
        Flavour::Cuda => &[("", 24), (MICROSOFT, 1)],
    }
}

/// Error of building a graph.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum GraphError {
    /// Shapes or types do not match.
    #[error("graph node `{node}`: {detail}")]
    Node {
        /// Name of the node.
        node: String,
        /// The expected and the found value.
        detail: String,
    },
    /// A weight is not in the parameter table.
    #[error("graph weight `{0}` is not in the parameter table")]
    UnknownWeight(String),
    /// A weight is not read by any node.
    #[error("graph weight `{0}` is read by no node")]
    UnusedWeight(String),
    /// The weight file lacks a tensor.
    #[error("weight file `{file}` lacks the tensor `{name}`")]
    NoLocation {
        /// Name of the weight file.
        file: String,
        /// Name of the tensor.
        name: String,
    },
    /// A tensor of the weight file has a wrong shape or a wrong length.
    #[error("tensor `{name}` of the weight file has {found}, expected {expected} in F32")]
    Location {
        /// Name of the tensor.
        name: String,
        /// Shape and bytes in the policy.
        expected: String,
        /// Shape and bytes in the file.
        found: String,
    },
}

/// Location of the graph's weights.
#[derive(Debug, Clone, Copy)]
pub enum WeightsAs<'a> {
    /// Initializers with their data in a file in the graph's folder.
    External {
        /// Name of the file.
        file: &'a str,
        /// Offset and length of every tensor, in bytes.
        locations: &'a BTreeMap<String, Location>,
    },
    /// Graph inputs with the names of the weights, after the other inputs.
    Inputs,
}

/// A value of the graph: a graph input, a weight, a constant or the result of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Value {
    pub(crate) name: String,
    pub(crate) shape: Vec<Dim>,
    pub(crate) elem: ElementType,
}

impl Value {
    /// Returns the shape.
    pub fn shape(&self) -> &[Dim] {
        &self.shape
    }

    /// Returns an axis, counted from the front; size 1 beyond the rank.
    pub(crate) fn axis(&self, axis: usize) -> Dim {
        self.shape.get(axis).copied().unwrap_or(Dim::fixed(1))
    }
}

/// Builder of one graph. The operations are methods, which check their inputs and return the result's value.
#[derive(Debug)]
pub struct GraphBuilder<'a> {
    name: String,
    flavour: Flavour,
    batch: Option<usize>,
    params: BTreeMap<String, TensorSpec>,
    order: Vec<String>,
    weights: WeightsAs<'a>,
    used: BTreeSet<String>,
    scope: String,
    count: usize,
    inputs: Vec<Value>,
    outputs: Vec<(String, Value)>,
    nodes: Vec<NodeProto>,
    initializers: Vec<TensorProto>,
    integers: BTreeMap<Vec<i64>, Value>,
}

impl<'a> GraphBuilder<'a> {
    /// Creates an empty graph over the weights `params`; a `batch` of `None` is symbolic.
    pub fn new(name: &str, batch: Option<usize>, params: Vec<ParamSpec>, weights: WeightsAs<'a>) -> Self {
        let params = params.into_iter().map(TensorSpec::from).collect();
        Self::of(name, Flavour::Plain, batch, params, weights)
    }

    /// Creates an empty graph of flavour `cuda` with `batch` rows; the weights are graph inputs.
    pub fn cuda(name: &str, batch: usize, weights: Vec<TensorSpec>) -> Self {
        Self::of(name, Flavour::Cuda, Some(batch), weights, WeightsAs::Inputs)
    }

    fn of(name: &str, flavour: Flavour, batch: Option<usize>, params: Vec<TensorSpec>, weights: WeightsAs<'a>) -> Self {
        Self {
            name: name.to_owned(),
            flavour,
            batch,
            order: params.iter().map(|p| p.name.clone()).collect(),
            params: params.into_iter().map(|p| (p.name.clone(), p)).collect(),
            weights,
            used: BTreeSet::new(),
            scope: String::new(),
            count: 0,
            inputs: Vec::new(),
            outputs: Vec::new(),
            nodes: Vec::new(),
            initializers: Vec::new(),
            integers: BTreeMap::new(),
        }
    }

    /// Returns an axis with `count` rows per sample.
    pub fn rows(&self, count: usize) -> Dim {
        self.batch.map_or(Dim::batch(count), |batch| Dim::fixed(batch * count))
    }

    /// Returns whether the weights are graph inputs.
    pub fn weights_are_inputs(&self) -> bool {
        matches!(self.weights, WeightsAs::Inputs)
    }

    /// Returns the flavour of the graph.
    pub(crate) fn flavour(&self) -> Flavour {
        self.flavour
    }

    /// Sets the prefix of the names of the following nodes.
    pub fn scope(&mut self, scope: &str) {
        scope.clone_into(&mut self.scope);
    }

    /// Adds a graph input.
    pub fn input(&mut self, spec: &TensorSpec) -> Value {
        let value = Value {
            name: spec.name.clone(),
            shape: axes(spec),
            elem: spec.element,
        };
        self.inputs.push(value.clone());
        value
    }

    /// Makes a value the graph output of `spec`.
    ///
    /// # Errors
    /// The type or shape differs from `spec`.
    pub fn output(&mut self, spec: &TensorSpec, value: &Value) -> Result<(), GraphError> {
        if value.elem != spec.element || value.shape != axes(spec) {
            return Err(GraphError::Node {
                node: spec.name.clone(),
                detail: format!("output is {:?} {}, expected {spec}", value.elem, text(&value.shape)),
            });
        }
        self.debug_output(&spec.name, value);
        Ok(())
    }

    /// Makes a value a graph output outside of the contract, with the value's type and shape.
    pub(crate) fn debug_output(&mut self, name: &str, value: &Value) {
        self.outputs.push((name.to_owned(), value.clone()));
    }

    /// Returns a weight by its checkpoint name.
    ///
    /// # Errors
    /// The weight is not in the parameter table, or its tensor in the weight file is missing or has a wrong size.
    pub fn weight(&mut self, name: &str) -> Result<Value, GraphError> {
        let spec = self
            .params
            .get(name)
            .ok_or_else(|| GraphError::UnknownWeight(name.to_owned()))?;
        let value = Value {
            name: spec.name.clone(),
            shape: axes(spec),
            elem: spec.element,
        };
        if self.used.insert(spec.name.clone())
            && let WeightsAs::External { file, locations } = self.weights
        {
            self.initializers.push(external(spec, file, locations)?);
        }
        Ok(value)
    }

    /// Adds a small f32 constant, stored in the graph.
    ///
    /// # Errors
    /// The number of values does not match the shape.
    pub fn constant(&mut self, shape: &[usize], data: &[f32]) -> Result<Value, GraphError> {
        self.constant_in(ElementType::F32, shape, data)
    }

    /// Adds a small constant of a float type, stored in the graph; values are rounded to the nearest, ties to even.
    ///
    /// # Errors
    /// The number of values does not match the shape, or the type is not a float.
    pub(crate) fn constant_in(
        &mut self,
        elem: ElementType,
        shape: &[usize],
        data: &[f32],
    ) -> Result<Value, GraphError> {
        let name = self.next_name("const");
        if shape.iter().product::<usize>() != data.len() {
            return Err(GraphError::Node {
                node: name,
                detail: format!("{} values for shape {shape:?}", data.len()),
            });
        }
        let raw = match elem {
            ElementType::F32 => f32_bytes(data),
            ElementType::Bf16 => bf16_bytes(data),
            other => {
                return Err(GraphError::Node {
                    node: name,
                    detail: format!("a constant of type {other:?}, expected a float"),
                });
            }
        };
        Ok(self.store(name, shape, elem, raw))
    }

    /// Adds an f32 scalar, stored in the graph.
    ///
    /// # Errors
    /// See [`GraphBuilder::constant`]; does not occur in practice.
    pub fn scalar(&mut self, value: f32) -> Result<Value, GraphError> {
        self.constant(&[], &[value])
    }

    /// Adds a 32-bit integer scalar, stored in the graph.
    pub(crate) fn integer(&mut self, value: i32) -> Value {
        let name = self.next_name("int");
        self.store(name, &[], ElementType::I32, value.to_le_bytes().to_vec())
    }

    /// Adds an integer vector for shapes and axes; equal vectors are stored once.
    pub(crate) fn integers(&mut self, data: &[i64]) -> Value {
        if let Some(known) = self.integers.get(data) {
            return known.clone();
        }
        let name = self.next_name("ints");
        let raw = data.iter().flat_map(|v| v.to_le_bytes()).collect();
        let value = self.store(name, &[data.len()], ElementType::I64, raw);
        self.integers.insert(data.to_vec(), value.clone());
        value
    }

    fn store(&mut self, name: String, shape: &[usize], elem: ElementType, raw: Vec<u8>) -> Value {
        self.initializers.push(TensorProto {
            name: Some(name.clone()),
            dims: shape.iter().map(|n| *n as i64).collect(),
            data_type: Some(data_type(elem)),
            raw_data: Some(raw),
            ..TensorProto::default()
        });
        Value {
            name,
            shape: fixed(shape),
            elem,
        }
    }

    fn next_name(&mut self, kind: &str) -> String {
        self.count += 1;
        format!("{}/{kind}_{}", self.scope, self.count)
    }

    /// Returns an error of the next operation.
    pub(crate) fn refuse(&self, op: &str, detail: String) -> GraphError {
        GraphError::Node {
            node: format!("{}/{op}_{}", self.scope, self.count + 1),
            detail,
        }
    }

    /// Adds a node with one result.
    pub(crate) fn node(
        &mut self,
        op: &str,
        inputs: &[&Value],
        attributes: Vec<AttributeProto>,
        shape: Vec<Dim>,
        elem: ElementType,
    ) -> Value {
        let name = self.next_name(op);
        self.nodes.push(NodeProto {
            name: Some(name.clone()),
            op_type: Some(op.to_owned()),
            input: inputs.iter().map(|v| v.name.clone()).collect(),
            output: vec![name.clone()],
            attribute: attributes,
            ..NodeProto::default()
        });
        Value { name, shape, elem }
    }

    /// Adds a node with several results of one type.
    pub(crate) fn node_many(
        &mut self,
        op: &str,
        inputs: &[&Value],
        attributes: Vec<AttributeProto>,
        shapes: Vec<Vec<Dim>>,
        elem: ElementType,
    ) -> Vec<Value> {
        let name = self.next_name(op);
        let values: Vec<Value> = shapes
            .into_iter()
            .enumerate()
            .map(|(i, shape)| Value {
                name: format!("{name}.{i}"),
                shape,
                elem,
            })
            .collect();
        self.nodes.push(NodeProto {
            name: Some(name),
            op_type: Some(op.to_owned()),
            input: inputs.iter().map(|v| v.name.clone()).collect(),
            output: values.iter().map(|v| v.name.clone()).collect(),
            attribute: attributes,
            ..NodeProto::default()
        });
        values
    }

    /// Adds a node of a domain with inputs and outputs that may be absent; returns the outputs that are present.
    pub(crate) fn node_of(
        &mut self,
        (domain, op): (&str, &str),
        inputs: &[Option<&Value>],
        attributes: Vec<AttributeProto>,
        outputs: &[Option<Vec<Dim>>],
        elem: ElementType,
    ) -> Vec<Value> {
        let name = self.next_name(op);
        let made: Vec<Option<Value>> = outputs
            .iter()
            .enumerate()
            .map(|(i, shape)| {
                shape.as_ref().map(|shape| Value {
                    name: format!("{name}.{i}"),
                    shape: shape.clone(),
                    elem,
                })
            })
            .collect();
        // an empty name stands for an absent input or output
        let names = |values: Vec<Option<&Value>>| -> Vec<String> {
            let last = values.iter().rposition(Option::is_some).map_or(0, |last| last + 1);
            values
                .into_iter()
                .take(last)
                .map(|value| value.map_or_else(String::new, |value| value.name.clone()))
                .collect()
        };
        self.nodes.push(NodeProto {
            domain: (!domain.is_empty()).then(|| domain.to_owned()),
            input: names(inputs.to_vec()),
            output: names(made.iter().map(Option::as_ref).collect()),
            name: Some(name),
            op_type: Some(op.to_owned()),
            attribute: attributes,
            ..NodeProto::default()
        });
        made.into_iter().flatten().collect()
    }

    /// Returns the bytes of the finished `.onnx` file.
    ///
    /// # Errors
    /// A weight is not read by any node.
    pub fn finish(mut self) -> Result<Vec<u8>, GraphError> {
        if let Some(name) = self.order.iter().find(|name| !self.used.contains(*name)) {
            return Err(GraphError::UnusedWeight(name.clone()));
        }
        self.name_outputs();
        let weight_inputs = self
            .weights_are_inputs()
            .then_some(&self.order)
            .into_iter()
            .flatten()
            .filter_map(|name| {
                let spec = self.params.get(name)?;
                Some(value_info(name, spec.element, &axes(spec)))
            });
        let input = self
            .inputs
            .iter()
            .map(|v| value_info(&v.name, v.elem, &v.shape))
            .chain(weight_inputs)
            .collect();
        let output = self
            .outputs
            .iter()
            .map(|(name, v)| value_info(name, v.elem, &v.shape))
            .collect();
        let graph = GraphProto {
            name: Some(self.name),
            node: self.nodes,
            initializer: self.initializers,
            input,
            output,
            ..GraphProto::default()
        };
        let model = ModelProto {
            ir_version: Some(ir_version(self.flavour)),
            opset_import: operator_sets(self.flavour)
                .iter()
                .map(|(domain, version)| OperatorSetIdProto {
                    domain: Some((*domain).to_owned()),
                    version: Some(*version),
                })
                .collect(),
            producer_name: Some("pirl-export".to_owned()),
            producer_version: Some(env!("CARGO_PKG_VERSION").to_owned()),
            graph: Some(graph),
            ..ModelProto::default()
        };
        Ok(model.encode_to_vec())
    }

    /// Names every output: renames the node's result, or adds a copy for graph inputs and for results that are already renamed.
    fn name_outputs(&mut self) {
        let made: BTreeSet<String> = self.nodes.iter().flat_map(|n| n.output.iter().cloned()).collect();
        let mut renamed: BTreeMap<String, String> = BTreeMap::new();
        for (name, value) in &self.outputs {
            if made.contains(&value.name) && !renamed.contains_key(&value.name) {
                renamed.insert(value.name.clone(), name.clone());
            } else {
                self.nodes.push(NodeProto {
                    name: Some(format!("output/{name}")),
                    op_type: Some("Identity".to_owned()),
                    input: vec![value.name.clone()],
                    output: vec![name.clone()],
                    ..NodeProto::default()
                });
            }
        }
        for node in &mut self.nodes {
            for name in node.input.iter_mut().chain(&mut node.output) {
                if let Some(new) = renamed.get(name) {
                    new.clone_into(name);
                }
            }
        }
    }
}

fn axes(spec: &TensorSpec) -> Vec<Dim> {
    spec.axes.iter().copied().map(Dim::from).collect()
}

/// Returns the type's number in ONNX's `TensorProto.DataType`.
pub(crate) const fn data_type(element: ElementType) -> i32 {
    match element {
        ElementType::F32 => 1,
        ElementType::U8 => 2,
        ElementType::I32 => 6,
        ElementType::I64 => 7,
        ElementType::Bool => 9,
        ElementType::Bf16 => 16,
    }
}

fn external(spec: &TensorSpec, file: &str, locations: &BTreeMap<String, Location>) -> Result<TensorProto, GraphError> {
    let location = locations.get(&spec.name).ok_or_else(|| GraphError::NoLocation {
        file: file.to_owned(),
        name: spec.name.clone(),
    })?;
    let shape = spec.shape(1);
    let bytes = (shape.iter().product::<usize>() * spec.element.size()) as u64;
    if location.shape != shape || location.length != bytes {
        return Err(GraphError::Location {
            name: spec.name.clone(),
            expected: format!("shape {shape:?} and {bytes} bytes"),
            found: format!("shape {:?} and {} bytes", location.shape, location.length),
        });
    }
    let entry = |key: &str, value: String| StringStringEntryProto {
        key: Some(key.to_owned()),
        value: Some(value),
    };
    Ok(TensorProto {
        name: Some(spec.name.clone()),
        dims: shape.iter().map(|n| *n as i64).collect(),
        data_type: Some(data_type(spec.element)),
        data_location: Some(DataLocation::External as i32),
        external_data: vec![
            entry("location", file.to_owned()),
            entry("offset", location.offset.to_string()),
            entry("length", location.length.to_string()),
        ],
        ..TensorProto::default()
    })
}

fn value_info(name: &str, elem: ElementType, shape: &[Dim]) -> ValueInfoProto {
    use tensor_shape_proto::{Dimension, dimension};
    let axis = |dim: &Dim| {
        let value = if dim.is_batched() {
            dimension::Value::DimParam(dim.to_string())
        } else {
            dimension::Value::DimValue(dim.count() as i64)
        };
        Dimension {
            value: Some(value),
            ..Dimension::default()
        }
    };
    let tensor = type_proto::Tensor {
        elem_type: Some(data_type(elem)),
        shape: Some(TensorShapeProto {
            dim: shape.iter().map(axis).collect(),
        }),
    };
    ValueInfoProto {
        name: Some(name.to_owned()),
        r#type: Some(TypeProto {
            value: Some(type_proto::Value::TensorType(tensor)),
            ..TypeProto::default()
        }),
        ..ValueInfoProto::default()
    }
}

/// Returns an integer attribute.
pub(crate) fn int(name: &str, value: i64) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Int as i32),
        i: Some(value),
        ..AttributeProto::default()
    }
}

/// Returns a float attribute.
pub(crate) fn float(name: &str, value: f32) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Float as i32),
        f: Some(value),
        ..AttributeProto::default()
    }
}

/// Returns an attribute with a list of integers.
pub(crate) fn ints(name: &str, values: &[i64]) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::Ints as i32),
        ints: values.to_vec(),
        ..AttributeProto::default()
    }
}

/// Returns a string attribute.
pub(crate) fn string(name: &str, value: &str) -> AttributeProto {
    AttributeProto {
        name: Some(name.to_owned()),
        r#type: Some(AttributeType::String as i32),
        s: Some(value.as_bytes().to_vec()),
        ..AttributeProto::default()
    }
}

#[cfg(test)]
mod tests {
    use policy::{
        graph::Axis,
        params::Part,
        weights::{Layout, Weight},
    };

    use super::*;

    fn spec(name: &str, shape: &[usize]) -> ParamSpec {
        ParamSpec {
            name: name.to_owned(),
            shape: shape.to_vec(),
            part: Part::Expert,
        }
    }

    /// Returns the spec of an f32 tensor `[batch, width]`.
    fn rows(name: &str, width: usize) -> TensorSpec {
        TensorSpec {
            name: name.to_owned(),
            element: ElementType::F32,
            axes: vec![Axis::Batch, Axis::Fixed(width)],
        }
    }

    #[test]
    fn shapes_that_do_not_fit_are_refused_with_both() {
        let mut g = GraphBuilder::new("g", None, vec![spec("w.weight", &[5, 4])], WeightsAs::Inputs);
        g.scope("layer");
        let x = g.input(&rows("x", 3));
        let error = g
            .linear_named(&x, "w", false)
            .expect_err("3 columns do not fit 4")
            .to_string();
        assert_eq!(
            error,
            "graph node `layer/Gemm_1`: input [batch, 3], weight [5, 4], bias none: expected [rows, in], [out, in], [out]"
        );
        let wide = g.input(&rows("wide", 4));
        assert!(g.add(&x, &wide).is_err(), "3 and 4 do not broadcast");
        assert!(g.matmul(&x, &wide).is_err(), "inner axes differ");
        assert!(g.reshape(&x, &fixed(&[3])).is_err(), "the batch is lost");
        assert!(
            g.reshape(&x, &[Dim::batch(1), Dim::fixed(4)]).is_err(),
            "one element more"
        );
        assert!(g.split(&wide, 1, &[1, 2]).is_err(), "the pieces do not add up");
        assert!(g.slice(&wide, 1, 3, 2).is_err(), "beyond the end");
        assert!(g.concat(&[&x, &wide], 0).is_err(), "another width");
        assert!(g.transpose(&x, &[0, 0]).is_err(), "not a permutation");
        assert!(
            g.expand(&wide, &[Dim::batch(1), Dim::fixed(8)]).is_err(),
            "only axes of size 1 grow"
        );
        assert!(g.choose(&x, &x, &x).is_err(), "the condition is not a boolean");
        assert!(g.weight("other").is_err(), "not in the table");
    }

    #[test]
    fn a_symbolic_batch_follows_reshapes() {
        let mut g = GraphBuilder::new("g", None, vec![], WeightsAs::Inputs);
        let x = g.input(&rows("x", 12));
        let flat = g.reshape(&x, &[g.rows(6), Dim::fixed(2)]).expect("same elements");
        assert_eq!(text(flat.shape()), "[6*batch, 2]");
        let mut g = GraphBuilder::new("g", Some(4), vec![], WeightsAs::Inputs);
        assert_eq!(g.rows(6), Dim::fixed(24));
        assert!(g.constant(&[2], &[1.0]).is_err(), "one value for two");
    }

    #[test]
    fn external_data_points_into_the_weight_file() {
        let weights: Vec<f32> = (0..6).map(|i| i as f32).collect();
        let specs = [spec("a.weight", &[2, 3]), spec("b", &[6])];
        let named = specs.clone().map(|spec| {
            let data = weights.clone();
            (
                spec.name,
                Weight {
                    shape: spec.shape,
                    data,
                },
            )
        });
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("w.safetensors");
        policy::bundle::write_weights(&path, &specs, &BTreeMap::from(named)).expect("written");
        let layout = Layout::of(&specs).expect("layout");
        let external = WeightsAs::External {
            file: "w.safetensors",
            locations: layout.locations(),
        };
        let mut g = GraphBuilder::new("g", None, vec![spec("a.weight", &[2, 3])], external);
        let x = g.input(&rows("x", 3));
        let y = g.linear_named(&x, "a", false).expect("fits");
        g.output(&rows("y", 2), &y).expect("as declared");
        let model = ModelProto::decode(g.finish().expect("graph").as_slice()).expect("ONNX");
        let graph = model.graph.expect("graph");
        let tensor = graph
            .initializer
            .iter()
            .find(|t| t.name() == "a.weight")
            .expect("initializer");
        let entry = |key: &str| {
            tensor
                .external_data
                .iter()
                .find(|e| e.key() == key)
                .expect("entry")
                .value()
                .to_owned()
        };
        assert_eq!(entry("location"), "w.safetensors");
        let from: usize = entry("offset").parse().expect("number");
        let length: usize = entry("length").parse().expect("number");
        let stored: Vec<f32> = std::fs::read(&path).expect("file")[from..from + length]
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        assert_eq!(stored, weights, "the graph reads the very bytes of the tensor");
        assert_eq!(
            graph.node.first().expect("node").output,
            ["y"],
            "the node itself carries the output's name"
        );
    }

    #[test]
    fn a_weight_of_another_size_or_without_reader_is_refused() {
        let layout = Layout::of([&spec("a", &[2])]).expect("layout");
        let external = WeightsAs::External {
            file: "w.safetensors",
            locations: layout.locations(),
        };
        let mut g = GraphBuilder::new("g", None, vec![spec("a", &[3]), spec("b", &[1])], external);
        assert!(matches!(g.weight("a"), Err(GraphError::Location { .. })));
        assert!(matches!(g.weight("b"), Err(GraphError::NoLocation { .. })));
        let g = GraphBuilder::new("g", None, vec![spec("a", &[2])], external);
        assert_eq!(g.finish(), Err(GraphError::UnusedWeight("a".to_owned())));
    }

    #[test]
    fn a_constant_has_the_bytes_of_its_type() {
        let mut g = GraphBuilder::cuda("g", 1, vec![]);
        for elem in [ElementType::F32, ElementType::Bf16] {
            g.constant_in(elem, &[2], &[1.0, -2.0]).expect("a float");
        }
        assert!(g.constant_in(ElementType::I64, &[1], &[1.0]).is_err(), "not a float");
        let stored: Vec<&[u8]> = g.initializers.iter().map(TensorProto::raw_data).collect();
        let wide: &[u8] = &[0, 0, 0x80, 0x3f, 0, 0, 0, 0xc0];
        assert_eq!(stored, [wide, &[0x80, 0x3f, 0, 0xc0]]);
    }

    #[test]
    fn absent_inputs_and_outputs_have_an_empty_name() {
        let vector = |name: &str, axes: &[usize]| TensorSpec {
            name: name.to_owned(),
            element: ElementType::Bf16,
            axes: axes.iter().copied().map(Axis::Fixed).collect(),
        };
        let mut g = GraphBuilder::cuda("g", 1, vec![vector("scale", &[4])]);
        let x = g.input(&vector("x", &[1, 3, 4]));
        let scale = g.weight("scale").expect("in the table");
        let both = g.skip_rms_norm(&x, &x, &scale, 1e-6).expect("fits");
        g.output(&vector("sum", &[1, 3, 4]), &both.sum).expect("as declared");
        assert!(g.skip_rms_norm(&x, &x, &x, 1e-6).is_err(), "not a vector");
        assert!(g.output(&rows("y", 4), &both.normed).is_err(), "another type");
        let model = ModelProto::decode(g.finish().expect("graph").as_slice()).expect("ONNX");
        let graph = model.graph.expect("graph");
        let inputs: Vec<&str> = graph.input.iter().map(ValueInfoProto::name).collect();
        assert_eq!(inputs, ["x", "scale"]);
        let node = graph.node.first().expect("node");
        assert_eq!(node.domain(), MICROSOFT);
        assert_eq!(node.input, ["x", "x", "scale"]);
        let empty: Vec<bool> = node.output.iter().map(String::is_empty).collect();
        assert_eq!(empty, [false, true, true, false]);
        assert_eq!(node.output.last().expect("four outputs"), "sum");
    }
}
