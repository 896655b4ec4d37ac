//! All integration tests in one binary, so that libtorch is linked once.

mod golden {
    mod algorithms;
    mod network;
    mod onnx;
    mod preproc;
}
mod refuse;
mod ring;
