//! From weights to a policy bundle: the two ONNX graphs, written by our own builder, and the check of a finished bundle.
//!
//! The graphs hold no weights. Their external data points at offset and length inside the bundle's safetensors files, so a
//! new policy version reuses the graphs of the first and writes only what was trained. No device, no runtime is linked here.

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
pub use check::{CheckError, CheckReport, check_bundle};
pub use graph::{GraphOptions, denoise::denoise_graph, prefix::prefix_graph};
