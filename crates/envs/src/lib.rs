//! Environments: the `VecEnv` trait, the embedded tabletop, its scripted expert, data sets, and the env worker.

pub mod env;
pub mod raster;
pub mod tabletop;
pub mod registry;
pub mod expert;
pub mod dataset;
pub mod worker;
pub mod exit;
