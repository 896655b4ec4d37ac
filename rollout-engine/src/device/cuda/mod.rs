//! ONNX Runtime's CUDA provider on tensors in the device's memory.
//!
//! A chunk is one upload, the prefix graph per row, the denoise graph `K` times, and one download. Keys, values, weights and the
//! chain of actions do not leave the device. Launches are captured once per graph and weight slot, and replayed. A new version is
//! copied to a free weight slot on a stream of its own.

mod device;
mod model;
mod weights;
mod graphs;
mod layout;
mod runtime;

pub use self::{
    device::{CudaDevice, CudaLoader, Staged},
    graphs::CudaOptions,
};
