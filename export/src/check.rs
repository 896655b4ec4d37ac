//! The check of a finished bundle: digests, manifest, weights, and the structure of both graphs. No inference.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::Read,
    path::Path,
};

use policy::{
    bundle::{Bundle, BundleError, DENOISE_GRAPH, EXPERT_WEIGHTS, PREFIX_GRAPH, VLM_WEIGHTS},
    config::WeightMode,
    graph::{Axis, BATCH, ElementType, GraphContract, TensorSpec},
    params::{ParamSpec, expert_params, vlm_params},
    weights::{Location, WeightFile},
};
use prost::Message;

use crate::{
    builder::{IR_VERSION, OPSET, data_type},
    proto::{
        GraphProto, ModelProto, TensorProto, ValueInfoProto, tensor_proto::DataLocation, tensor_shape_proto, type_proto,
    },
};

const MAX_GRAPH_BYTES: u64 = 256 << 20;

/// A bundle that must not be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckError {
    /// Manifest, digests or weights.
    #[error(transparent)]
    Bundle(#[from] BundleError),
    /// A graph.
    #[error("graph `{file}`: {detail}")]
    Graph {
        /// Which file.
        file: String,
        /// What was expected and found.
        detail: String,
    },
}

/// What was looked at, for a summary.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CheckReport {
    /// Policy version.
    pub policy_version: u64,
    /// Files with a right digest.
    pub files: usize,
    /// Weights with the right name and shape, all finite.
    pub weights: usize,
    /// Nodes of both graphs.
    pub nodes: usize,
}

/// Checks everything about a bundle that needs no inference.
///
/// # Errors
/// The first thing that is not as it must be, with what was expected and found.
pub fn check_bundle(dir: &Path) -> Result<CheckReport, CheckError> {
    let bundle = Bundle::open(dir)?;
    bundle.verify()?;
    let manifest = &bundle.manifest;
    let (dims, head) = (&manifest.dims, &manifest.heads);
    let prefix = Expected {
        file: PREFIX_GRAPH,
        contract: GraphContract::prefix(dims, manifest.batch),
        weight_file: VLM_WEIGHTS,
        params: vlm_params(dims),
        mode: WeightMode::Constants,
    };
    let denoise = Expected {
        file: DENOISE_GRAPH,
        contract: GraphContract::denoise(dims, head, manifest.weights, manifest.batch),
        weight_file: EXPERT_WEIGHTS,
        params: expert_params(dims, head),
        mode: manifest.weights,
    };
    let nodes = prefix.check(&bundle)? + denoise.check(&bundle)?;
    Ok(CheckReport {
        policy_version: manifest.policy_version,
        files: manifest.files.len(),
        weights: prefix.params.len() + denoise.params.len(),
        nodes,
    })
}

/// What a graph of a bundle has to be.
struct Expected {
    file: &'static str,
    contract: GraphContract,
    weight_file: &'static str,
    params: Vec<ParamSpec>,
    mode: WeightMode,
}

impl Expected {
    /// Reads the graph and compares; gives its number of nodes.
    fn check(&self, bundle: &Bundle) -> Result<usize, CheckError> {
        let fail = |detail: String| CheckError::Graph {
            file: self.file.to_owned(),
            detail,
        };
        let path = bundle.path(self.file);
        let mut bytes = Vec::new();
        let io = |source| BundleError::Io {
            action: "reading",
            path: path.clone(),
            source,
        };
        let file = File::open(&path).map_err(io)?;
        file.take(MAX_GRAPH_BYTES + 1).read_to_end(&mut bytes).map_err(io)?;
        if bytes.len() as u64 > MAX_GRAPH_BYTES {
            return Err(fail(format!(
                "larger than {MAX_GRAPH_BYTES} bytes, expected a graph without weights"
            )));
        }
        let weights = bundle.path(self.weight_file);
        let locations = WeightFile::open(&weights)
            .map_err(|source| BundleError::Weights { path: weights, source })?
            .locations();
        self.structure(&bytes, &locations).map_err(fail)
    }

    fn structure(&self, bytes: &[u8], locations: &BTreeMap<String, Location>) -> Result<usize, String> {
        let model = ModelProto::decode(bytes).map_err(|e| format!("no ONNX model ({e})"))?;
        if model.ir_version() > IR_VERSION {
            return Err(format!(
                "IR version {}, expected at most {IR_VERSION}",
                model.ir_version()
            ));
        }
        for set in &model.opset_import {
            if !set.domain().is_empty() || set.version() != OPSET {
                return Err(format!(
                    "operator set `{}` {}, expected `` {OPSET}",
                    set.domain(),
                    set.version()
                ));
            }
        }
        let graph = model.graph.as_ref().ok_or("the model has no graph")?;
        let inputs: Vec<&TensorSpec> = self.contract.inputs.iter().chain(&self.contract.weights).collect();
        ports("input", &graph.input, &inputs)?;
        ports(
            "output",
            &graph.output,
            &self.contract.outputs.iter().collect::<Vec<_>>(),
        )?;
        self.initializers(graph, locations)?;
        defined(graph)?;
        Ok(graph.node.len())
    }

    fn initializers(&self, graph: &GraphProto, locations: &BTreeMap<String, Location>) -> Result<(), String> {
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
            Some(name) => Err(format!("weight `{name}` is in the graph or in the policy, not in both")),
            None => Ok(()),
        }
    }

    fn external(&self, tensor: &TensorProto, locations: &BTreeMap<String, Location>) -> Result<(), String> {
        let name = tensor.name();
        let entry = |key: &str| {
            tensor
                .external_data
                .iter()
                .find(|e| e.key() == key)
                .map_or("", |e| e.value())
        };
        if entry("location") != self.weight_file {
            return Err(format!(
                "weight `{name}` lies in `{}`, expected `{}`",
                entry("location"),
                self.weight_file
            ));
        }
        let location = locations
            .get(name)
            .ok_or_else(|| format!("weight `{name}` is not in `{}`", self.weight_file))?;
        let shape: Vec<i64> = location.shape.iter().map(|n| *n as i64).collect();
        if tensor.data_type() != data_type(ElementType::F32) || tensor.dims != shape {
            return Err(format!(
                "weight `{name}` has type {} and shape {:?}, expected F32 {shape:?}",
                tensor.data_type(),
                tensor.dims
            ));
        }
        // the file's own header says where the tensor lies, and that was checked against the file's size
        for (key, expected) in [("offset", location.offset), ("length", location.length)] {
            if entry(key).parse() != Ok(expected) {
                return Err(format!(
                    "weight `{name}` has {key} `{}`, expected {expected}",
                    entry(key)
                ));
            }
        }
        Ok(())
    }
}

/// Every node reads only what stands before it, every name is made once, every output is made.
fn defined(graph: &GraphProto) -> Result<(), String> {
    let mut known: BTreeSet<&str> = BTreeSet::new();
    let given = graph
        .input
        .iter()
        .map(ValueInfoProto::name)
        .chain(graph.initializer.iter().map(TensorProto::name));
    for name in given {
        if !known.insert(name) {
            return Err(format!("`{name}` is defined twice"));
        }
    }
    for node in &graph.node {
        if !node.domain().is_empty() {
            return Err(format!(
                "node `{}` is of domain `{}`, expected ONNX's own",
                node.name(),
                node.domain()
            ));
        }
        if let Some(name) = node
            .input
            .iter()
            .find(|name| !name.is_empty() && !known.contains(name.as_str()))
        {
            return Err(format!(
                "node `{}` reads `{name}`, which nothing before it makes",
                node.name()
            ));
        }
        for name in &node.output {
            if !known.insert(name) {
                return Err(format!("`{name}` is defined twice"));
            }
        }
    }
    match graph.output.iter().find(|port| !known.contains(port.name())) {
        Some(port) => Err(format!("output `{}` is made by no node", port.name())),
        None => Ok(()),
    }
}

fn ports(kind: &str, found: &[ValueInfoProto], expected: &[&TensorSpec]) -> Result<(), String> {
    for (found, expected) in found.iter().zip(expected) {
        let is = spec_of(found).ok_or_else(|| format!("{kind} `{}` is no tensor with a shape", found.name()))?;
        if is != **expected {
            return Err(format!("{kind} {is}, expected {expected}"));
        }
    }
    if found.len() != expected.len() {
        return Err(format!("{} {kind}s, expected {}", found.len(), expected.len()));
    }
    Ok(())
}

fn spec_of(info: &ValueInfoProto) -> Option<TensorSpec> {
    let Some(type_proto::Value::TensorType(tensor)) = info.r#type.as_ref()?.value.as_ref() else {
        return None;
    };
    let element = [ElementType::F32, ElementType::I64, ElementType::Bool]
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
