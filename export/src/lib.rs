//! Conversion of weights to a policy bundle: a builder for the ONNX graphs, and the check of a finished bundle.
//!
//! The graphs contain no weights. The external data of a graph is an offset and a length in the bundle's safetensors files. A new
//! policy version therefore reuses the graphs of the first version and writes only the trained weights. The crate links no runtime.

#[expect(
    unreachable_pub,
    clippy::pedantic,
    clippy::enum_variant_names,
    reason = "generated from the schema"
)]
mod proto;
pub mod shape;
pub mod builder;
mod ops;
mod fused;
mod graph;
pub mod bundle;
pub mod check;
pub mod exit;
#[cfg(test)]
mod tests;

pub use builder::GraphError;
pub use bundle::{
    BundleSpec, ExportError, GraphSource, NextVersion, WeightSource, manifest_of, next_version, tokenizer_of,
    write_bundle,
};
pub use check::{CheckError, CheckReport, GraphFault, check_bundle};
pub use graph::{GraphOptions, cuda::cuda_graphs, denoise::denoise_graph, prefix::prefix_graph};
