//! The graphs of flavour `cuda`, see [`policy::cuda`].
//!
//! Norms and residual sums are one node, projections that read the same tokens are one product, and attention reads the buffers of
//! keys and values where they are. Matrices and tokens have the contract's element type; actions, times and heads are f32.

mod ports;
pub(crate) mod layers;
pub(crate) mod vision;
pub(crate) mod prefix;
pub(crate) mod state;
pub(crate) mod condition;
pub(crate) mod denoise;

use policy::{
    cuda::{CONDITION_GRAPH, CudaContract, STATE_GRAPH},
    graph::{DENOISE_GRAPH, GraphContract},
};

use self::{condition::condition_graph, denoise::denoise_graph, prefix::prefix_graph, state::state_graph};
use crate::builder::GraphError;

/// Returns the graphs of a bundle of flavour `cuda`, as file names and bytes, in the order of [`CudaContract::files`].
///
/// # Errors
/// The graph and the contract differ; see [`GraphError`].
pub fn cuda_graphs(contract: &CudaContract) -> Result<Vec<(String, Vec<u8>)>, GraphError> {
    let mut graphs = Vec::new();
    for cameras in 1..=contract.dims.cameras {
        graphs.push((contract.prefix_file(cameras), prefix_graph(contract, cameras)?));
    }
    if let Some(ports) = contract.state() {
        graphs.push((STATE_GRAPH.to_owned(), state_graph(contract, &ports)?));
    }
    if let Some(ports) = contract.condition() {
        graphs.push((CONDITION_GRAPH.to_owned(), condition_graph(contract, &ports)?));
    }
    graphs.push((DENOISE_GRAPH.to_owned(), denoise_graph(contract)?));
    Ok(graphs)
}

/// Returns the graph files of a bundle of flavour `cuda` with their contracts, in the order of [`CudaContract::files`].
pub(crate) fn cuda_contracts(contract: &CudaContract) -> Vec<(String, GraphContract)> {
    let own = contract.state().map(|ports| (STATE_GRAPH.to_owned(), ports));
    let own = own.or_else(|| contract.condition().map(|ports| (CONDITION_GRAPH.to_owned(), ports)));
    (1..=contract.dims.cameras)
        .map(|cameras| (contract.prefix_file(cameras), contract.prefix(cameras)))
        .chain(own)
        .chain([(DENOISE_GRAPH.to_owned(), contract.denoise())])
        .collect()
}
