//! Shared parts of the integration tests: golden tensors, and comparisons with stated tolerances.
#![expect(
    clippy::expect_used,
    clippy::panic,
    clippy::float_cmp,
    reason = "a test helper fails by panicking with the reason"
)]

pub mod ring;
pub mod hostile;
pub mod probe;
pub mod standalone;
pub mod load;
pub mod attacks;
pub mod siege;

use std::{io::Write, path::PathBuf};

use safetensors::{Dtype, SafeTensors};
use serde_json::Value;

/// Folder of this repository's golden tensors.
pub const COMMITTED_GOLDEN: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/golden");

/// Returns the folder of the golden tensors: `PIRL_GOLDEN_DIR`, otherwise `tests/golden` of this repository.
pub fn golden_dir() -> PathBuf {
    std::env::var_os("PIRL_GOLDEN_DIR").map_or_else(|| PathBuf::from(COMMITTED_GOLDEN), PathBuf::from)
}

/// Reports on standard error what is skipped and why; a passing test does not hide this output.
pub fn skip(what: &str, why: &str) {
    writeln!(std::io::stderr(), "skipped: {what}: {why}").expect("writing to standard error");
}

/// Returns whether the golden set lacks this file, and reports a missing file on standard error.
pub fn lacks(file: &str) -> bool {
    let lacks = !golden_dir().join(file).exists();
    if lacks {
        skip(file, "not in this golden set");
    }
    lacks
}

/// One array of a golden file. Booleans are 0 and 1; integers are exact below 2^53.
#[derive(Debug, Clone)]
pub struct Array {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Row-major values.
    pub data: Vec<f64>,
    /// Stored type.
    pub dtype: Dtype,
}

impl Array {
    /// Returns the values as f32.
    pub fn f32(&self) -> Vec<f32> {
        self.data.iter().map(|v| *v as f32).collect()
    }
    /// Returns the values as i64.
    pub fn i64(&self) -> Vec<i64> {
        self.data.iter().map(|v| *v as i64).collect()
    }
    /// Returns the shape as i64, libtorch's type of sizes.
    pub fn dims(&self) -> Vec<i64> {
        self.shape.iter().map(|v| *v as i64).collect()
    }
    /// Returns the values as booleans.
    pub fn bool(&self) -> Vec<bool> {
        self.data.iter().map(|v| *v != 0.0).collect()
    }
}

/// One golden safetensors file held in memory.
pub struct Golden {
    name: String,
    bytes: Vec<u8>,
}

impl Golden {
    /// Opens `NAME.safetensors` of the golden folder.
    pub fn open(name: &str) -> Self {
        let path = golden_dir().join(format!("{name}.safetensors"));
        let bytes = std::fs::read(&path).unwrap_or_else(|e| panic!("reading {}: {e}", path.display()));
        Self {
            name: name.to_owned(),
            bytes,
        }
    }

    fn tensors(&self) -> SafeTensors<'_> {
        SafeTensors::deserialize(&self.bytes).unwrap_or_else(|e| panic!("parsing golden {}: {e}", self.name))
    }

    /// Returns all tensor names, sorted.
    pub fn names(&self) -> Vec<String> {
        let mut names: Vec<String> = self.tensors().names().into_iter().map(str::to_owned).collect();
        names.sort();
        names
    }

    /// Returns whether the file holds this tensor.
    pub fn has(&self, tensor: &str) -> bool {
        self.tensors().tensor(tensor).is_ok()
    }

    /// Returns a value of the file's `__metadata__`.
    pub fn metadata(&self, key: &str) -> Option<String> {
        let (_, meta) = SafeTensors::read_metadata(&self.bytes).expect("golden header");
        meta.metadata().as_ref().and_then(|m| m.get(key).cloned())
    }

    /// Returns the tensor of this name; panics with the name if the tensor is missing.
    pub fn get(&self, tensor: &str) -> Array {
        let tensors = self.tensors();
        let view = tensors
            .tensor(tensor)
            .unwrap_or_else(|e| panic!("golden {}: `{tensor}`: {e}", self.name));
        let raw = view.data();
        let data = match view.dtype() {
            Dtype::F32 => raw
                .chunks_exact(4)
                .map(|b| f64::from(f32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                .collect(),
            Dtype::F64 => raw
                .chunks_exact(8)
                .map(|b| f64::from_le_bytes(b.try_into().expect("8 bytes")))
                .collect(),
            Dtype::I64 => raw
                .chunks_exact(8)
                .map(|b| i64::from_le_bytes(b.try_into().expect("8 bytes")) as f64)
                .collect(),
            Dtype::I32 => raw
                .chunks_exact(4)
                .map(|b| f64::from(i32::from_le_bytes([b[0], b[1], b[2], b[3]])))
                .collect(),
            Dtype::U8 | Dtype::BOOL => raw.iter().map(|b| f64::from(*b)).collect(),
            Dtype::BF16 => raw
                .chunks_exact(2)
                .map(|b| f64::from(f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16)))
                .collect(),
            other => panic!("golden {}: `{tensor}` has the unread type {other:?}", self.name),
        };
        Array {
            shape: view.shape().to_vec(),
            data,
            dtype: view.dtype(),
        }
    }
}

/// Returns the model sizes of one golden file, from `dims.json`.
pub fn golden_dims(file: &str) -> Value {
    let path = golden_dir().join("dims.json");
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("reading {}: {e}", path.display()));
    let all: Value = serde_json::from_str(&text).expect("dims.json");
    all[format!("{file}.safetensors")].clone()
}

/// Returns the cases of an algorithm file (`STEM.cases.json`).
pub fn golden_cases(stem: &str) -> Value {
    let path = golden_dir().join(format!("{stem}.cases.json"));
    let text = std::fs::read_to_string(&path).unwrap_or_else(|e| panic!("reading {}: {e}", path.display()));
    serde_json::from_str(&text).expect("cases json")
}

/// Returns the largest absolute difference. NaN equals NaN and an infinity equals itself; any other non-finite pair gives infinity.
pub fn max_abs_diff(got: &[f32], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len(), "lengths differ");
    got.iter().zip(want).fold(0.0, |worst: f64, (g, w)| {
        let g = f64::from(*g);
        let diff = if (g.is_nan() && w.is_nan()) || g == *w {
            0.0
        } else {
            (g - w).abs()
        };
        if diff.is_nan() { f64::INFINITY } else { worst.max(diff) }
    })
}

/// Smallest tolerance of a network output: f32 sums in another order than the reference's.
const OUTPUT: f64 = 1e-4;
/// Tolerance of a network output as a share of the reference's largest magnitude: the reference's f32 noise, measured against float64.
const OUTPUT_SHARE: f64 = 5e-5;

/// Returns the absolute tolerance of a network output, for a golden set of any magnitude.
pub fn output_tolerance(want: &Array) -> f64 {
    let finite = want.data.iter().map(|v| v.abs()).filter(|v| v.is_finite());
    (OUTPUT_SHARE * finite.fold(0.0, f64::max)).max(OUTPUT)
}

/// Asserts that a network output is within [`output_tolerance`] of the golden output.
#[track_caller]
pub fn assert_output(what: &str, got: &[f32], want: &Array) {
    assert_close(what, got, want, output_tolerance(want));
}

/// Asserts that every element is within `tolerance` (absolute) of the golden element.
#[track_caller]
pub fn assert_close(what: &str, got: &[f32], want: &Array, tolerance: f64) {
    assert_eq!(got.len(), want.data.len(), "{what}: number of elements");
    let diff = max_abs_diff(got, &want.data);
    assert!(
        diff <= tolerance,
        "{what}: largest absolute error {diff:.3e}, allowed {tolerance:.0e}"
    );
}

/// Asserts that the error of a gradient is at most `tolerance` times the tensor's largest magnitude.
#[track_caller]
pub fn assert_close_relative(what: &str, got: &[f32], want: &Array, tolerance: f64) {
    assert_eq!(got.len(), want.data.len(), "{what}: number of elements");
    let scale = want.data.iter().fold(0.0f64, |m, v| m.max(v.abs()));
    let diff = max_abs_diff(got, &want.data);
    // a gradient that is zero in the reference may be rounding noise of its sums here
    let allowed = (tolerance * scale).max(1e-7);
    assert!(
        diff <= allowed,
        "{what}: largest error {diff:.3e} at magnitude {scale:.3e}, allowed relative {tolerance:.0e}"
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_output_is_held_relative_to_the_largest_of_the_reference() {
        let want = |scale: f64| Array {
            shape: vec![4],
            data: [3.6, -0.2, 0.0, 1.1].map(|v| v * scale).to_vec(),
            dtype: Dtype::F32,
        };
        let passes =
            |got: &Array, want: &Array| std::panic::catch_unwind(|| assert_output("v", &got.f32(), want)).is_ok();
        let moved = |by: f64| {
            let mut got = want(1.0);
            got.data[1] += by;
            got
        };
        assert!(passes(&moved(1.7e-4), &want(1.0)), "3.6 * 5e-5 is 1.8e-4");
        assert!(!passes(&moved(1.9e-4), &want(1.0)));
        assert!(!passes(&want(1.0), &want(1.0001)), "a factor of the whole output");
        assert!(!passes(&want(1.0001), &want(1.0)));
        // small outputs have the absolute bound
        assert!(passes(&want(0.0), &want(2e-5)));
        assert!(!passes(&want(0.0), &want(4e-5)));
        let mut infinite = want(1.0);
        infinite.data[2] = f64::INFINITY;
        assert!(!passes(&want(1.0), &infinite), "an infinity allows nothing");
    }
}
