//! Inputs and outputs of the graphs, by the names of a contract.

use std::collections::BTreeMap;

use policy::{element::ElementType, graph::GraphContract};

use crate::builder::{GraphBuilder, GraphError, Value};

/// Returns a builder with the inputs of `ports`, and the inputs by name.
pub(super) fn begin<'p>(
    name: &str,
    batch: usize,
    ports: &'p GraphContract,
) -> (GraphBuilder<'static>, BTreeMap<&'p str, Value>) {
    let mut builder = GraphBuilder::cuda(name, batch, ports.weights.clone());
    let inputs = ports
        .inputs
        .iter()
        .map(|spec| (spec.name.as_str(), builder.input(spec)))
        .collect();
    (builder, inputs)
}

/// Converts to an element type, if the value has another one.
pub(super) fn as_type(g: &mut GraphBuilder<'_>, x: &Value, elem: ElementType) -> Result<Value, GraphError> {
    if x.elem == elem { Ok(x.clone()) } else { g.cast(x, elem) }
}

/// Makes values the outputs of `ports`, by name.
pub(super) fn end(
    mut builder: GraphBuilder<'_>,
    ports: &GraphContract,
    outputs: &BTreeMap<String, Value>,
) -> Result<Vec<u8>, GraphError> {
    for spec in &ports.outputs {
        let value = outputs
            .get(&spec.name)
            .ok_or_else(|| builder.refuse("outputs", format!("no output `{}`", spec.name)))?;
        builder.output(spec, value)?;
    }
    builder.finish()
}
