//! All integration tests in one binary, so that libtorch is linked once.

#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "helpers of tests fail as tests do, and say aloud what they leave out"
)]

mod common;
mod onnx_sessions;
mod cuda;
mod cuda_graphs;
mod differences;
mod golden {
    mod algorithms;
    mod claimed;
    mod network;
    mod onnx;
    mod other_set;
    mod preproc;
    mod real;
    mod rl;
    mod pooled;
    mod variants;
}
mod asynchronous;
mod client;
mod contract;
mod environments;
mod exit;
mod hostile;
mod inspect;
mod load;
mod mdp;
mod prefix_store;
mod properties;
mod ranks;
mod ratio;
mod refuse;
mod report;
mod resume;
mod ring;
mod update;
mod websocket;
