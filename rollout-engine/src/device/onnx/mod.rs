//! ONNX Runtime with tensors in the host's memory: the CPU device. Other providers use the same sessions, with a copy to the device
//! and back at each step.

mod device;
mod sessions;
mod runtime;

pub use self::{
    device::{OnnxDevice, OnnxLoader},
    runtime::OnnxRuntime,
};
