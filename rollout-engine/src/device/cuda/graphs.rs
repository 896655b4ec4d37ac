//! Graphs on the device: a session of ONNX Runtime, and bindings of its inputs and outputs to addresses.

use std::{ffi::CString, path::Path, ptr};

use ort::{
    AsPointer,
    ep::{self, ArenaExtendStrategy, cuda::AttentionBackend},
    memory::{AllocationDevice, AllocatorType, MemoryInfo, MemoryType},
    session::{IoBinding, NoSelectedOutputs, RunOptions, Session, builder::GraphOptimizationLevel},
    sys,
};
use policy::{
    graph::{GraphContract, TensorSpec},
    message::one_line,
};

use super::{
    layout::bytes,
    runtime::{Range, Stream},
};
use crate::device::{
    DeviceError,
    library::{OnnxLibrary, element_type, require},
};

/// Settings that change the speed only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CudaOptions {
    /// Whether the launches of a graph are captured once and replayed.
    pub capture: bool,
    /// Host threads that convert weights.
    pub threads: usize,
}

/// A session on the device.
#[derive(Debug)]
pub(super) struct Graph {
    name: &'static str,
    session: Session,
    contract: GraphContract,
}

/// Inputs and outputs of a graph at fixed addresses.
pub(super) struct Bound {
    binding: IoBinding,
    options: RunOptions<NoSelectedOutputs>,
}

impl std::fmt::Debug for Bound {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Bound")
            .field("binding", &self.binding)
            .finish_non_exhaustive()
    }
}

impl Graph {
    /// Loads a graph. All nodes run on the device, in the order of `stream`; `capture` is for graphs that run per chunk.
    ///
    /// # Errors
    /// The provider or the graph is not usable, or a node cannot run on the device.
    #[expect(unsafe_code, reason = "ONNX Runtime receives the handle of a stream")]
    pub(super) fn load(
        library: &OnnxLibrary,
        path: &Path,
        (name, contract): (&'static str, GraphContract),
        stream: &Stream,
        (options, capture): (CudaOptions, bool),
    ) -> Result<Self, DeviceError> {
        let refused = |e: ort::Error| DeviceError::Provider {
            provider: "cuda",
            detail: one_line(e),
        };
        // on an H200 a chunk with cuDNN's attention takes 2 ms longer (docs/gpu.md)
        let attention =
            AttentionBackend::FLASH_ATTENTION | AttentionBackend::EFFICIENT_ATTENTION | AttentionBackend::MATH;
        let provider = ep::CUDA::default()
            .with_attention_backend(attention)
            .with_tf32(false)
            .with_arena_extend_strategy(ArenaExtendStrategy::SameAsRequested)
            .with_cuda_graph(options.capture && capture);
        // SAFETY: streams live as long as the process
        let provider = unsafe { provider.with_compute_stream(stream.handle().cast()) };
        let mut builder = Session::builder(library.environment())
            .and_then(|b| Ok(b.with_optimization_level(GraphOptimizationLevel::Level3)?))
            .and_then(|b| Ok(b.with_intra_threads(1)?))
            .and_then(|b| Ok(b.with_disable_cpu_fallback()?))
            .map_err(refused)?
            .with_execution_providers([provider.build().error_on_failure()])
            .map_err(|e| refused(e.into()))?;
        let session = builder.commit_from_file(path).map_err(|e| DeviceError::Load {
            path: path.to_owned(),
            detail: one_line(e),
        })?;
        require(path, &session, &contract)?;
        Ok(Self {
            name,
            session,
            contract,
        })
    }

    /// Binds all inputs and outputs to the addresses that `place` returns. Runs with the same `number` replay one capture; the
    /// number is unique within the graph.
    ///
    /// # Errors
    /// A tensor has no place or a shorter one.
    pub(super) fn bind(
        &self,
        number: usize,
        place: impl Fn(&TensorSpec) -> Result<Range, DeviceError>,
    ) -> Result<Bound, DeviceError> {
        let failed = |e: ort::Error| DeviceError::Run {
            graph: self.name,
            detail: one_line(e),
        };
        let info =
            MemoryInfo::new(AllocationDevice::CUDA, 0, AllocatorType::Device, MemoryType::Default).map_err(failed)?;
        let binding = self.session.create_binding().map_err(failed)?;
        let contract = &self.contract;
        for spec in contract.inputs.iter().chain(&contract.weights) {
            bind_address(&binding, Side::Input, &info, spec, place(spec)?).map_err(failed)?;
        }
        for spec in &contract.outputs {
            bind_address(&binding, Side::Output, &info, spec, place(spec)?).map_err(failed)?;
        }
        let mut options = RunOptions::new().map_err(failed)?;
        options.set("gpu_graph_id", number.to_string()).map_err(failed)?;
        // the caller waits for the stream
        options.disable_device_sync().map_err(failed)?;
        Ok(Bound { binding, options })
    }

    /// Starts a run; it ends in the order of the stream.
    ///
    /// # Errors
    /// ONNX Runtime fails.
    pub(super) fn run(&mut self, bound: &Bound) -> Result<(), DeviceError> {
        let outputs = self.session.run_binding_with_options(&bound.binding, &bound.options);
        outputs.map(drop).map_err(|e| DeviceError::Run {
            graph: self.name,
            detail: one_line(e),
        })
    }
}

#[derive(Clone, Copy)]
enum Side {
    Input,
    Output,
}

/// Binds a tensor to an address on the device. `ort` would copy tensors that it does not own, so that an address could not be shared.
#[expect(unsafe_code, reason = "calls into ONNX Runtime")]
fn bind_address(
    binding: &IoBinding,
    side: Side,
    info: &MemoryInfo<'_>,
    spec: &TensorSpec,
    place: Range,
) -> Result<(), ort::Error> {
    let shape: Vec<i64> = spec.shape(0).iter().map(|n| *n as i64).collect();
    let needed = bytes(spec);
    if place.bytes < needed {
        return Err(ort::Error::new(format!(
            "`{}` has {} bytes on the device, expected {needed}",
            spec.name, place.bytes
        )));
    }
    let name = CString::new(spec.name.as_str()).map_err(|e| ort::Error::new(e.to_string()))?;
    let api = ort::api();
    let mut value: *mut sys::OrtValue = ptr::null_mut();
    // SAFETY: the address has room for the shape, and the shape outlives the call, which copies it
    let status = unsafe {
        (api.CreateTensorWithDataAsOrtValue)(
            info.ptr(),
            place.address(),
            needed,
            shape.as_ptr(),
            shape.len(),
            element_type(spec.element).into(),
            &raw mut value,
        )
    };
    // SAFETY: the status is of the call above
    unsafe { ort::Error::result_from_status(status) }?;
    let bind = match side {
        Side::Input => api.BindInput,
        Side::Output => api.BindOutput,
    };
    // SAFETY: all three live during the call; the binding keeps a reference of its own to the value
    let status = unsafe { bind(binding.ptr().cast_mut(), name.as_ptr(), value) };
    // SAFETY: the value was created above and is released once
    unsafe { (api.ReleaseValue)(value) };
    // SAFETY: the status is of the call above
    unsafe { ort::Error::result_from_status(status) }
}
