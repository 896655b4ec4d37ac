//! Definition of a policy: sizes, tensor names, graph contract, flow time, step table, log-probability, pre- and post-processing,
//! run configuration, bundle on disk. The crate uses no device and no socket.

pub mod message;
pub mod dims;
pub mod element;
pub mod params;
pub mod weights;
pub mod flops;
pub mod image;
pub mod norm;
pub mod flow;
pub mod noise;
pub mod guidance;
pub mod logprob;
pub mod config;
pub mod prompt;
pub mod plan;
#[cfg(test)]
mod recipes;
pub mod graph;
pub mod derived;
pub mod cuda;
pub mod contract;
pub mod bundle;
pub mod transform;
pub mod selftest;
