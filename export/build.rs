//! Compiles the vendored ONNX schema without protoc.

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let descriptors = protox::compile(["proto/onnx.proto"], ["proto"])?;
    let mut config = prost_build::Config::new();
    // the schema's comments hold indented text, which rustdoc would run as code
    config.disable_comments(["."]);
    config.compile_fds(descriptors)?;
    for path in ["build.rs", "proto/onnx.proto"] {
        println!("cargo:rerun-if-changed={path}");
    }
    Ok(())
}
