//! The check of a finished bundle: digests, manifest, weights, and the structure of the graphs. The check runs no inference.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read,
    path::Path,
};

use policy::{
    bundle::{Bundle, BundleError, EXPERT_WEIGHTS, VLM_WEIGHTS},
    config::{Flavour, WeightMode},
    element::ElementType,
    graph::{Axis, BATCH, DENOISE_GRAPH, GraphContract, PREFIX_GRAPH, TensorSpec},
    params::{ParamSpec, expert_params, vlm_params},
    transform::Transform,
    weights::{Location, WeightFile},
};
use prost::Message;

use crate::{
    builder::{data_type, ir_version, operator_sets},
    graph::cuda::cuda_contracts,
    proto::{
        GraphProto, ModelProto, TensorProto, ValueInfoProto, tensor_proto::DataLocation, tensor_shape_proto, type_proto,
    },
};

const MAX_GRAPH_BYTES: u64 = 256 << 20;

/// A bundle that is not usable.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// The manifest, a digest or the weights are wrong.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A graph is wrong.
    #[error("graph `{file}` is not one of this policy")]
    Graph {
        /// File of the graph.
        file: String,
        /// The first wrong property.
        source: GraphFault,
    },
}

/// A wrong property of a graph.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum GraphFault {
    /// A file that is too large.
    #[error("larger than {MAX_GRAPH_BYTES} bytes, expected a graph without weights")]
    Large,
    /// Not ONNX.
    #[error("not an ONNX model")]
    Decode(#[source] prost::DecodeError),
    /// A newer format.
    #[error("IR version {found}, expected at most {expected}")]
    IrVersion {
        /// The version of the flavour.
        expected: i64,
        /// The version of the model.
        found: i64,
    },
    /// Another operator set.
    #[error("operator set `{domain}` {version}, expected {expected}")]
    OperatorSet {
        /// Its domain.
        domain: String,
        /// Its version.
        version: i64,
        /// The operator sets of the flavour.
        expected: String,
    },
    /// A model without a graph.
    #[error("the model has no graph")]
    NoGraph,
    /// A weight on one side only.
    #[error("weight `{0}` is in the graph or in the policy, not in both")]
    OneSided(String),
    /// A weight in another file.
    #[error("weight `{name}` lies in `{found}`, expected `{expected}`")]
    WeightFile {
        /// Which weight.
        name: String,
        /// The weight file of the graph.
        expected: &'static str,
        /// The file in the graph.
        found: String,
    },
    /// A weight that its file does not have.
    #[error("weight `{name}` is not in `{file}`")]
    NoWeight {
        /// Which weight.
        name: String,
        /// The weight file.
        file: &'static str,
    },
    /// A weight of another type or shape.
    #[error("weight `{name}` has type {element} and shape {found:?}, expected F32 {expected:?}")]
    WeightShape {
        /// Which weight.
        name: String,
        /// ONNX's number of the type in the graph.
        element: i32,
        /// Shape in the weight file.
        expected: Vec<i64>,
        /// Shape in the graph.
        found: Vec<i64>,
    },
    /// A weight at another place.
    #[error("weight `{name}` has {key} `{found}`, expected {expected}")]
    WeightPlace {
        /// Which weight.
        name: String,
        /// `offset` or `length`.
        key: &'static str,
        /// The number in the weight file.
        expected: u64,
        /// The text in the graph.
        found: String,
    },
    /// A value with two definitions.
    #[error("`{0}` is defined twice")]
    Twice(String),
    /// An operator of another domain.
    #[error("node `{node}` is of domain `{domain}`, which is not in the operator sets of the flavour")]
    Domain {
        /// Which node.
        node: String,
        /// Its domain.
        domain: String,
    },
    /// A value without a definition.
    #[error("node `{node}` reads `{value}`, which no earlier node makes")]
    Undefined {
        /// Which node.
        node: String,
        /// Which value.
        value: String,
    },
    /// An output without a definition.
    #[error("output `{0}` is made by no node")]
    NoOutput(String),
    /// An input or output that is not a tensor.
    #[error("{kind} `{name}` is not a tensor with a shape")]
    NotATensor {
        /// `input` or `output`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// Another input or output.
    #[error("{kind} {found}, expected {expected}")]
    Port {
        /// `input` or `output`.
        kind: &'static str,
        /// Name, type and shape of the contract.
        expected: Box<TensorSpec>,
        /// Name, type and shape in the graph.
        found: Box<TensorSpec>,
    },
    /// Another number of inputs or outputs.
    #[error("{found} {kind}s, expected {expected}")]
    Ports {
        /// `input` or `output`.
        kind: &'static str,
        /// Number in the contract.
        expected: usize,
        /// Number in the graph.
        found: usize,
    },
}

/// Counts of the checked parts, for a summary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckReport {
    /// Policy version.
    pub policy_version: u64,
    /// Form of the graphs.
    pub flavour: Flavour,
    /// Files with a correct digest.
    pub files: usize,
    /// Weights with the correct name and shape and with finite values only.
    pub weights: usize,
    /// Nodes of all graphs.
    pub nodes: usize,
}

/// Checks all properties of a bundle that need no inference.
///
/// # Errors
/// The first wrong property, with the expected and the found value.
pub fn check_bundle(dir: &Path) -> Result<CheckReport, CheckError> {
    let bundle = Bundle::open(dir)?;
    bundle.verify()?;
    let manifest = &bundle.manifest;
    // the contract with the tokenizer; `open` has no tokenizer
    Transform::of_bundle(manifest, dir)?;
    let (dims, head) = (&manifest.dims, &manifest.heads);
    let cuda = manifest.cuda().map_err(|error| BundleError::Manifest {
        path: dir.to_owned(),
        detail: error.to_string(),
    })?;
    let expected = match cuda {
        Some(contract) => cuda_contracts(&contract)
            .into_iter()
            .map(|(file, contract)| Expected {
                file,
                flavour: Flavour::Cuda,
                contract,
                weight_file: EXPERT_WEIGHTS,
                params: Vec::new(),
                mode: WeightMode::Inputs,
            })
            .collect(),
        None => vec![
            Expected {
                file: PREFIX_GRAPH.to_owned(),
                flavour: Flavour::Plain,
                contract: GraphContract::prefix(dims, manifest.batch),
                weight_file: VLM_WEIGHTS,
                params: vlm_params(dims),
                mode: WeightMode::Constants,
            },
            Expected {
                file: DENOISE_GRAPH.to_owned(),
                flavour: Flavour::Plain,
                contract: GraphContract::denoise(dims, head, manifest.weights, manifest.batch),
                weight_file: EXPERT_WEIGHTS,
                params: expert_params(dims, head),
                mode: manifest.weights,
            },
        ],
    };
    let mut nodes = 0;
    for graph in &expected {
        nodes += graph.check(&bundle)?;
    }
    Ok(CheckReport {
        policy_version: manifest.policy_version,
        flavour: manifest.flavour,
        files: manifest.files.len(),
        weights: manifest.params().len(),
        nodes,
    })
}

/// Requirements of a graph of a bundle.
struct Expected {
    file: String,
    flavour: Flavour,
    contract: GraphContract,
    weight_file: &'static str,
    params: Vec<ParamSpec>,
    mode: WeightMode,
}

impl Expected {
    /// Checks the graph against the requirements; returns the number of nodes.
    fn check(&self, bundle: &Bundle) -> Result<usize, CheckError> {
        let fail = |source| CheckError::Graph {
            file: self.file.clone(),
            source,
        };
        let path = bundle.path(&self.file);
        let mut bytes = Vec::new();
        let io = |source| BundleError::Io {
            action: "reading",
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(io)?;
        file.take(MAX_GRAPH_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > MAX_GRAPH_BYTES {
            return Err(fail(GraphFault::Large));
        }
        let weights = bundle.path(self.weight_file);
        let locations = WeightFile::open(&weights)
            .map_err(|source| BundleError::Weights { path: weights, source })?
            .locations();
        self.structure(&bytes, &locations).map_err(fail)
    }

    fn structure(&self, bytes: &[u8], locations: &BTreeMap<String, Location>) -> Result<usize, GraphFault> {
        let model = ModelProto::decode(bytes).map_err(GraphFault::Decode)?;
        let expected = ir_version(self.flavour);
        if model.ir_version() > expected {
            return Err(GraphFault::IrVersion {
                expected,
                found: model.ir_version(),
            });
        }
        let sets = operator_sets(self.flavour);
        for set in &model.opset_import {
            if !sets.contains(&(set.domain(), set.version())) {
                let sets: Vec<String> = sets
                    .iter()
                    .map(|(domain, version)| format!("`{domain}` {version}"))
                    .collect();
                return Err(GraphFault::OperatorSet {
                    domain: set.domain().to_owned(),
                    version: set.version(),
                    expected: sets.join(" and "),
                });
            }
        }
        let graph = model.graph.as_ref().ok_or(GraphFault::NoGraph)?;
        let inputs: Vec<&TensorSpec> = self.contract.inputs.iter().chain(&self.contract.weights).collect();
        ports("input", &graph.input, &inputs)?;
        ports(
            "output",
            &graph.output,
            &self.contract.outputs.iter().collect::<Vec<_>>(),
        )?;
        self.initializers(graph, locations)?;
        defined(graph, self.flavour)?;
        Ok(graph.node.len())
    }

    fn initializers(&self, graph: &GraphProto, locations: &BTreeMap<String, Location>) -> Result<(), GraphFault> {
        let mut external = BTreeSet::new();
        for tensor in &graph.initializer {
            if tensor.data_location() == DataLocation::External {
                self.external(tensor, locations)?;
                external.insert(tensor.name());
            }
        }
        let wanted: BTreeSet<&str> = match self.mode {
            WeightMode::Constants => self.params.iter().map(|p| p.name.as_str()).collect(),
            WeightMode::Inputs => BTreeSet::new(),
        };
        match wanted.symmetric_difference(&external).next() {
            Some(name) => Err(GraphFault::OneSided((*name).to_owned())),
            None => Ok(()),
        }
    }

    fn external(&self, tensor: &TensorProto, locations: &BTreeMap<String, Location>) -> Result<(), GraphFault> {
        let name = tensor.name();
        let entry = |key: &str| {
            tensor
                .external_data
                .iter()
                .find(|e| e.key() == key)
                .map_or("", |e| e.value())
        };
        if entry("location") != self.weight_file {
            return Err(GraphFault::WeightFile {
                name: name.to_owned(),
                expected: self.weight_file,
                found: entry("location").to_owned(),
            });
        }
        let location = locations.get(name).ok_or_else(|| GraphFault::NoWeight {
            name: name.to_owned(),
            file: self.weight_file,
        })?;
        let shape: Vec<i64> = location.shape.iter().map(|n| *n as i64).collect();
        if tensor.data_type() != data_type(ElementType::F32) || tensor.dims != shape {
            return Err(GraphFault::WeightShape {
                name: name.to_owned(),
                element: tensor.data_type(),
                expected: shape,
                found: tensor.dims.clone(),
            });
        }
        // the header of the weight file has the location, and was checked against the size of the file
        for (key, expected) in [("offset", location.offset), ("length", location.length)] {
            if entry(key).parse() != Ok(expected) {
                return Err(GraphFault::WeightPlace {
                    name: name.to_owned(),
                    key,
                    expected,
                    found: entry(key).to_owned(),
                });
            }
        }
        Ok(())
    }
}

/// Checks that a node reads only earlier values, that names are unique, and that all outputs are defined.
fn defined(graph: &GraphProto, flavour: Flavour) -> Result<(), GraphFault> {
    let mut known: BTreeSet<&str> = BTreeSet::new();
    let given = graph
        .input
        .iter()
        .map(ValueInfoProto::name)
        .chain(graph.initializer.iter().map(TensorProto::name));
    for name in given {
        if !known.insert(name) {
            return Err(GraphFault::Twice(name.to_owned()));
        }
    }
    for node in &graph.node {
        if !operator_sets(flavour)
            .iter()
            .any(|(domain, _)| *domain == node.domain())
        {
            return Err(GraphFault::Domain {
                node: node.name().to_owned(),
                domain: node.domain().to_owned(),
            });
        }
        if let Some(name) = node
            .input
            .iter()
            .find(|name| !name.is_empty() && !known.contains(name.as_str()))
        {
            return Err(GraphFault::Undefined {
                node: node.name().to_owned(),
                value: name.clone(),
            });
        }
        // an empty name stands for an absent output
        for name in node.output.iter().filter(|name| !name.is_empty()) {
            if !known.insert(name) {
                return Err(GraphFault::Twice(name.clone()));
            }
        }
    }
    match graph.output.iter().find(|port| !known.contains(port.name())) {
        Some(port) => Err(GraphFault::NoOutput(port.name().to_owned())),
        None => Ok(()),
    }
}

fn ports(kind: &'static str, found: &[ValueInfoProto], expected: &[&TensorSpec]) -> Result<(), GraphFault> {
    for (found, expected) in found.iter().zip(expected) {
        let found = spec_of(found).ok_or_else(|| GraphFault::NotATensor {
            kind,
            name: found.name().to_owned(),
        })?;
        if found != **expected {
            return Err(GraphFault::Port {
                kind,
                expected: Box::new((*expected).clone()),
                found: Box::new(found),
            });
        }
    }
    if found.len() != expected.len() {
        return Err(GraphFault::Ports {
            kind,
            expected: expected.len(),
            found: found.len(),
        });
    }
    Ok(())
}

/// Returns name, type and shape of a graph's input or output; `None` if it is not a tensor.
pub(crate) fn spec_of(info: &ValueInfoProto) -> Option<TensorSpec> {
    let Some(type_proto::Value::TensorType(tensor)) = info.r#type.as_ref()?.value.as_ref() else {
        return None;
    };
    let element = [
        ElementType::F32,
        ElementType::Bf16,
        ElementType::U8,
        ElementType::I32,
        ElementType::I64,
        ElementType::Bool,
    ]
    .into_iter()
    .find(|e| data_type(*e) == tensor.elem_type())?;
    let axis = |dim: &tensor_shape_proto::Dimension| match dim.value.as_ref()? {
        tensor_shape_proto::dimension::Value::DimValue(n) => usize::try_from(*n).ok().map(Axis::Fixed),
        tensor_shape_proto::dimension::Value::DimParam(name) => (name == BATCH).then_some(Axis::Batch),
    };
    let axes = tensor.shape.as_ref()?.dim.iter().map(axis).collect::<Option<_>>()?;
    Some(TensorSpec {
        name: info.name().to_owned(),
        element,
        axes,
    })
}
