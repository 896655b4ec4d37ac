//! Sessions of ONNX Runtime on the CPU, for tests that run exported graphs without the engine.

use std::{path::Path, sync::OnceLock};

use ort::{environment::Environment, session::Session};

/// Returns the environment, one per process.
fn environment() -> &'static Environment {
    static LOADED: OnceLock<Environment> = OnceLock::new();
    LOADED.get_or_init(|| {
        let library = Path::new(env!("CARGO_MANIFEST_DIR")).join("../.deps/onnxruntime/libonnxruntime.so");
        ort::init_from(&library)
            .expect("libonnxruntime, which scripts/setup fetches")
            .build()
            .expect("environment")
    })
}

/// Loads a graph, with one thread.
pub(crate) fn session(path: &Path) -> Session {
    Session::builder(environment())
        .expect("session builder")
        .with_intra_threads(1)
        .expect("one thread")
        .commit_from_file(path)
        .unwrap_or_else(|e| panic!("loading {}: {e}", path.display()))
}
