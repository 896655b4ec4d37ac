//! All integration tests in one binary, so that libtorch is linked once.

#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of tests fail as tests do, and say aloud what they leave out"
)]

mod differences;
mod golden {
    mod algorithms;
    mod network;
    mod onnx;
    mod preproc;
    mod rl;
    mod variants;
}
mod asynchronous;
mod inspect;
mod mdp;
mod prefix_store;
mod properties;
mod refuse;
mod report;
mod resume;
mod ring;
mod update;
