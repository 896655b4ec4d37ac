//! ONNX Runtime: the library, and how sessions are made with it.

mod sessions;

use std::path::{Path, PathBuf};

use ort::{
    environment::Environment,
    ep,
    session::{Session, builder::GraphOptimizationLevel},
};
use policy::{config::Provider, message::one_line};

pub use self::sessions::{
    PolicySessions, PrefixBatch, PrefixCache, SharedPrefix, StepBatch, StepOutput, prefix_identity,
};

/// What ONNX Runtime refuses.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BackendError {
    /// No library.
    #[error(
        "libonnxruntime is not found: set `ORT_DYLIB_PATH` to libonnxruntime.so, or run scripts/setup, which puts it into `.deps/onnxruntime`"
    )]
    NoLibrary,
    /// The library cannot be used.
    #[error("libonnxruntime `{path}`: {detail}")]
    Library {
        /// Which file.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// The provider cannot be had here.
    #[error(
        "provider `{provider}` cannot be had: {detail}; install what is missing or set `rollout.provider = \"cpu\"`"
    )]
    Provider {
        /// Its name in a configuration.
        provider: &'static str,
        /// What ONNX Runtime says.
        detail: String,
    },
    /// A graph that cannot be loaded.
    #[error("graph `{path}`: {detail}")]
    Load {
        /// Which file.
        path: PathBuf,
        /// Why.
        detail: String,
    },
    /// A graph with other inputs or outputs.
    #[error("graph `{path}`: {kind} `{name}` is missing, the graphs of this policy need it: export the bundle again")]
    Graph {
        /// Which file.
        path: PathBuf,
        /// `input` or `output`.
        kind: &'static str,
        /// Its name.
        name: String,
    },
    /// Weights of the inputs mode.
    #[error("weights `{path}`: {source}")]
    Weights {
        /// Which file.
        path: PathBuf,
        /// What is wrong.
        source: policy::weights::WeightsError,
    },
    /// A run failed.
    #[error("running the {graph} graph: {detail}")]
    Run {
        /// Which graph.
        graph: &'static str,
        /// What ONNX Runtime says.
        detail: String,
    },
    /// An output of another size.
    #[error("{graph} graph: output `{name}` has {found} elements, expected {expected}")]
    Output {
        /// Which graph.
        graph: &'static str,
        /// Which output.
        name: &'static str,
        /// What the sizes give.
        expected: usize,
        /// What came.
        found: usize,
    },
}

/// Name of a provider in a configuration.
pub fn provider_name(provider: Provider) -> &'static str {
    match provider {
        Provider::Cpu => "cpu",
        Provider::Cuda => "cuda",
        Provider::Tensorrt => "tensorrt",
    }
}

/// The loaded library and how sessions are made with it; cheap to clone.
#[derive(Clone)]
pub struct Backend {
    environment: Environment,
    provider: Provider,
    threads: usize,
}

impl std::fmt::Debug for Backend {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Backend")
            .field("provider", &self.provider)
            .field("threads", &self.threads)
            .finish_non_exhaustive()
    }
}

/// The library: `ORT_DYLIB_PATH`, else `.deps/onnxruntime/libonnxruntime.so` in a folder above the program.
fn library() -> Result<PathBuf, BackendError> {
    if let Some(path) = std::env::var_os("ORT_DYLIB_PATH").filter(|p| !p.is_empty()) {
        return Ok(PathBuf::from(path));
    }
    let program = std::env::current_exe().map_err(|_unknown| BackendError::NoLibrary)?;
    program
        .ancestors()
        .map(|folder| folder.join(".deps/onnxruntime/libonnxruntime.so"))
        .find(|path| path.is_file())
        .ok_or(BackendError::NoLibrary)
}

impl Backend {
    /// Loads the library and checks that `provider` can be had; `threads` per session (at least 1).
    ///
    /// # Errors
    /// The library is missing or broken, or the provider is refused: there is no silent fall-back.
    pub fn new(provider: Provider, threads: usize) -> Result<Self, BackendError> {
        let path = library()?;
        let bad = |detail: String| BackendError::Library {
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
        let backend = Self {
            environment,
            provider,
            threads,
        };
        backend.builder()?;
        Ok(backend)
    }

    /// The provider in use.
    pub fn provider(&self) -> Provider {
        self.provider
    }

    fn builder(&self) -> Result<ort::session::builder::SessionBuilder, BackendError> {
        let refused = |e: ort::Error| BackendError::Provider {
            provider: provider_name(self.provider),
            detail: one_line(e),
        };
        let builder = Session::builder(&self.environment)
            .and_then(|b| Ok(b.with_optimization_level(GraphOptimizationLevel::Level3)?))
            .and_then(|b| Ok(b.with_intra_threads(self.threads.max(1))?))
            // learner and env workers share these cores: a thread that waits must not spin
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

    fn load(&self, path: &Path) -> Result<Session, BackendError> {
        self.builder()?.commit_from_file(path).map_err(|e| BackendError::Load {
            path: path.to_owned(),
            detail: one_line(e),
        })
    }
}
