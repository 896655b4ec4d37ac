//! The shared library of ONNX Runtime, and the settings of its sessions.

use std::path::{Path, PathBuf};

use ort::{
    environment::Environment,
    ep,
    session::{Session, builder::GraphOptimizationLevel},
};
use policy::{config::Provider, message::one_line};

use crate::device::DeviceError;

/// Returns the configuration's name of a provider.
pub fn provider_name(provider: Provider) -> &'static str {
    match provider {
        Provider::Cpu => "cpu",
        Provider::Cuda => "cuda",
        Provider::Tensorrt => "tensorrt",
    }
}

/// The loaded library with the settings of its sessions; cheap to clone.
#[derive(Clone)]
pub struct OnnxRuntime {
    environment: Environment,
    provider: Provider,
    threads: usize,
}

impl std::fmt::Debug for OnnxRuntime {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("OnnxRuntime")
            .field("provider", &self.provider)
            .field("threads", &self.threads)
            .finish_non_exhaustive()
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

impl OnnxRuntime {
    /// Loads the library and checks that `provider` is available. Each session has `threads` threads (at least 1).
    ///
    /// # Errors
    /// The library is missing or broken, or the provider is unavailable; there is no silent fallback.
    pub fn new(provider: Provider, threads: usize) -> Result<Self, DeviceError> {
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
        let runtime = Self {
            environment,
            provider,
            threads,
        };
        runtime.builder()?;
        Ok(runtime)
    }

    /// Returns the provider in use.
    pub fn provider(&self) -> Provider {
        self.provider
    }

    fn builder(&self) -> Result<ort::session::builder::SessionBuilder, DeviceError> {
        let refused = |e: ort::Error| DeviceError::Provider {
            provider: provider_name(self.provider),
            detail: one_line(e),
        };
        let builder = Session::builder(&self.environment)
            .and_then(|b| Ok(b.with_optimization_level(GraphOptimizationLevel::Level3)?))
            .and_then(|b| Ok(b.with_intra_threads(self.threads.max(1))?))
            // learner and env workers share these cores: a waiting thread must not spin
            .and_then(|b| Ok(b.with_intra_op_spinning(false)?))
            .map_err(refused)?;
        let provider = match self.provider {
            Provider::Cpu => return Ok(builder),
            Provider::Cuda => ep::CUDA::default().with_tf32(false).build(),
            Provider::Tensorrt => ep::TensorRT::default().build(),
        };
        builder
            .with_execution_providers([provider.error_on_failure()])
            .map_err(|e| refused(e.into()))
    }

    pub(super) fn load(&self, path: &Path) -> Result<Session, DeviceError> {
        self.builder()?.commit_from_file(path).map_err(|e| DeviceError::Load {
            path: path.to_owned(),
            detail: one_line(e),
        })
    }
}
