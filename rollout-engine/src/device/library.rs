//! The shared library of ONNX Runtime.

use std::{
    path::{Path, PathBuf},
    sync::{Mutex, PoisonError},
};

use ort::{
    environment::Environment,
    session::Session,
    value::{TensorElementType, ValueType},
};
use policy::{
    config::Provider,
    element::ElementType,
    graph::{Axis, GraphContract, TensorSpec},
    message::one_line,
};

use super::DeviceError;

/// Returns the configuration's name of a provider.
pub fn provider_name(provider: Provider) -> &'static str {
    match provider {
        Provider::Cpu => "cpu",
        Provider::Cuda => "cuda",
        Provider::Tensorrt => "tensorrt",
    }
}

/// The loaded library; cheap to clone.
#[derive(Clone)]
pub(super) struct OnnxLibrary {
    environment: Environment,
}

impl std::fmt::Debug for OnnxLibrary {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OnnxLibrary").finish_non_exhaustive()
    }
}

/// Finds the library: `ORT_DYLIB_PATH`, otherwise `.deps/onnxruntime/libonnxruntime.so` in a folder above the program.
fn library() -> Result<PathBuf, DeviceError> {
    if let Some(path) = std::env::var_os("ORT_DYLIB_PATH").filter(|p| !p.is_empty()) {
        return Ok(PathBuf::from(path));
    }
    let program = std::env::current_exe().map_err(|_unknown| DeviceError::NoLibrary)?;
    program
        .ancestors()
        .map(|folder| folder.join(".deps/onnxruntime/libonnxruntime.so"))
        .find(|path| path.is_file())
        .ok_or(DeviceError::NoLibrary)
}

impl OnnxLibrary {
    /// Loads the library, once per process.
    ///
    /// # Errors
    /// The library is missing or broken.
    pub(super) fn load() -> Result<Self, DeviceError> {
        static LOADED: Mutex<Option<OnnxLibrary>> = Mutex::new(None);
        let mut loaded = LOADED.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(library) = &*loaded {
            return Ok(library.clone());
        }
        let library = Self::first()?;
        *loaded = Some(library.clone());
        Ok(library)
    }

    fn first() -> Result<Self, DeviceError> {
        let path = library()?;
        let bad = |detail: String| DeviceError::Library {
            path: path.clone(),
            detail,
        };
        if !path.is_file() {
            return Err(bad("no such file".to_owned()));
        }
        let environment = ort::init_from(&path)
            .map_err(|e| bad(one_line(e)))?
            .with_name("rollout-engine")
            .with_telemetry(false)
            .build()
            .map_err(|e| bad(one_line(e)))?;
        Ok(Self { environment })
    }

    pub(super) fn environment(&self) -> &Environment {
        &self.environment
    }
}

/// Checks that a graph has the inputs and outputs of its contract, with their types and shapes.
pub(super) fn require(path: &Path, session: &Session, contract: &GraphContract) -> Result<(), DeviceError> {
    let check = |kind: &'static str, spec: &TensorSpec, there: &[ort::value::Outlet]| {
        let outlet = there.iter().find(|outlet| outlet.name() == spec.name);
        let outlet = outlet.ok_or_else(|| DeviceError::Graph {
            path: path.to_owned(),
            kind,
            name: spec.name.clone(),
        })?;
        if fits(spec, outlet.dtype()) {
            return Ok(());
        }
        Err(DeviceError::GraphType {
            path: path.to_owned(),
            kind,
            expected: spec.to_string(),
            found: outlet.dtype().to_string(),
        })
    };
    for input in contract.inputs.iter().chain(&contract.weights) {
        check("input", input, session.inputs())?;
    }
    for output in &contract.outputs {
        check("output", output, session.outputs())?;
    }
    Ok(())
}

/// Returns the type of a tensor in ONNX Runtime.
pub(super) fn element_type(element: ElementType) -> TensorElementType {
    match element {
        ElementType::F32 => TensorElementType::Float32,
        ElementType::Bf16 => TensorElementType::Bfloat16,
        ElementType::U8 => TensorElementType::Uint8,
        ElementType::I32 => TensorElementType::Int32,
        ElementType::I64 => TensorElementType::Int64,
        ElementType::Bool => TensorElementType::Bool,
    }
}

/// Returns whether a tensor has the type and the axes of `spec`; the size of a symbolic axis is -1.
fn fits(spec: &TensorSpec, found: &ValueType) -> bool {
    let ValueType::Tensor { ty, shape, .. } = found else {
        return false;
    };
    let axis = |(axis, size): (&Axis, &i64)| match axis {
        Axis::Batch => *size == -1,
        Axis::Fixed(expected) => usize::try_from(*size) == Ok(*expected),
    };
    *ty == element_type(spec.element) && shape.len() == spec.axes.len() && spec.axes.iter().zip(shape.iter()).all(axis)
}
