//! Link arguments: tests find libtorch in the repository's folder without `LD_LIBRARY_PATH`.

fn main() {
    // target/release/PROGRAM and target/release/deps/TEST; LD_LIBRARY_PATH still goes before (RUNPATH)
    for up in ["../..", "../../.."] {
        println!("cargo:rustc-link-arg=-Wl,-rpath,$ORIGIN/{up}/.deps/libtorch/torch/lib");
    }
    println!("cargo:rerun-if-changed=build.rs");
}
