//! What a policy is: sizes, tensor names, flow time, step table, log-probability, pre- and post-processing, run
//! configuration, and the bundle on disk. No device, no socket.

pub mod bundle;
pub mod config;
pub mod dims;
pub mod flops;
pub mod flow;
pub mod guidance;
pub mod image;
pub mod logprob;
pub mod noise;
pub mod norm;
pub mod params;
pub mod plan;
mod plan_algorithm;
pub mod prompt;
#[cfg(test)]
mod recipes;
pub mod selftest;
pub mod weights;
