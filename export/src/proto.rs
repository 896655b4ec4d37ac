//! The ONNX messages, generated from `proto/onnx.proto` at build time.

include!(concat!(env!("OUT_DIR"), "/onnx.rs"));
