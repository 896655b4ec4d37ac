//! The settings of the sessions.

use std::path::Path;

use ort::{
    ep,
    session::{Session, builder::GraphOptimizationLevel},
};
use policy::{
    config::{Flavour, Provider},
    message::one_line,
};

use crate::device::{
    DeviceError,
    library::{OnnxLibrary, provider_name},
};

/// ONNX Runtime with the settings of its sessions; cheap to clone.
#[derive(Debug, Clone)]
pub struct OnnxRuntime {
    library: OnnxLibrary,
    provider: Provider,
    threads: usize,
}

impl OnnxRuntime {
    /// Loads the library and checks that `provider`, one that runs graphs of flavour `plain`, is available. Each session has
    /// `threads` threads (at least 1).
    ///
    /// # Errors
    /// The library is missing or broken, or the provider is unavailable; there is no silent fallback.
    pub fn new(provider: Provider, threads: usize) -> Result<Self, DeviceError> {
        if provider.flavour() != Flavour::Plain {
            return Err(DeviceError::Provider {
                provider: provider_name(provider),
                detail: "its graphs run on a device of their own".to_owned(),
            });
        }
        let runtime = Self {
            library: OnnxLibrary::load()?,
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
        let builder = Session::builder(self.library.environment())
            .and_then(|b| Ok(b.with_optimization_level(GraphOptimizationLevel::Level3)?))
            .and_then(|b| Ok(b.with_intra_threads(self.threads.max(1))?))
            // learner and env workers share these cores: a waiting thread must not spin
            .and_then(|b| Ok(b.with_intra_op_spinning(false)?))
            .map_err(refused)?;
        let provider = match self.provider {
            Provider::Tensorrt => ep::TensorRT::default().build(),
            Provider::Cpu | Provider::Cuda => return Ok(builder),
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
