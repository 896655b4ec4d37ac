//! What a policy is: sizes, tensor names, flow time, step table, log-probability, pre- and post-processing, run
//! configuration, and the bundle on disk. No device, no socket.

pub mod config;
pub mod plan;
pub mod dims;
pub mod image;
pub mod norm;
pub mod prompt;
pub mod flow;
pub mod noise;
pub mod logprob;
pub mod params;
pub mod weights;
pub mod selftest;
pub mod bundle;
