//! Compares advantages, losses, optimizer and schedules with the recorded reference. Where the reference is wrong, both numbers are stated:
//! a few lines here reproduce the recorded number from its cause, and ours is the library's.
#![expect(
    clippy::expect_used,
    clippy::float_cmp,
    clippy::panic,
    clippy::print_stdout,
    clippy::unwrap_used,
    reason = "helpers of tests: they fail by panicking, print what was covered and compare infinities"
)]

mod advantages;
mod grid;
mod helpers;
mod losses;
mod optim;
mod pipeline;
mod policy_loss;

use std::collections::BTreeSet;

use integration_tests::{Array, Golden, assert_close, golden_cases};
use serde_json::Value;
use tch::{Kind, Tensor};

/// Tolerance of losses and advantages: f32 sums over some tens of elements.
const ABS: f64 = 1e-5;
/// Tolerance of gradients, relative to the tensor's largest magnitude.
const GRAD: f64 = 1e-3;

/// One recorded call.
struct Case<'a> {
    golden: &'a Golden,
    spec: &'a Value,
    id: String,
}

impl Case<'_> {
    fn arg(&self, name: &str) -> &Value {
        &self.spec["args"][name]
    }
    fn number(&self, name: &str) -> Option<f64> {
        self.arg(name).as_f64()
    }
    fn need(&self, name: &str) -> f64 {
        self.number(name)
            .unwrap_or_else(|| panic!("{}: no number `{name}`", self.id))
    }
    fn text(&self, name: &str) -> &str {
        self.arg(name)
            .as_str()
            .unwrap_or_else(|| panic!("{}: no text `{name}`", self.id))
    }
    fn flag(&self, name: &str) -> Option<bool> {
        self.arg(name).as_bool()
    }
    fn has(&self, name: &str) -> bool {
        self.golden.has(&format!("{}.{name}", self.id))
    }
    fn array(&self, name: &str) -> Array {
        self.golden.get(&format!("{}.{name}", self.id))
    }
    fn maybe(&self, name: &str) -> Option<Array> {
        self.has(name).then(|| self.array(name))
    }
    fn scalar(&self, name: &str) -> f64 {
        self.array(name).data[0]
    }
    fn input(&self, name: &str) -> Tensor {
        tensor(&self.array(&format!("in.{name}")))
    }
    fn maybe_input(&self, name: &str) -> Option<Tensor> {
        self.maybe(&format!("in.{name}")).map(|array| tensor(&array))
    }
    fn leaf(&self, name: &str) -> Tensor {
        self.input(name).set_requires_grad(true)
    }
    fn close(&self, what: &str, got: f64, want: f64) {
        let label = format!("{} {what}", self.id);
        assert!(same(got, want), "{label}: {got} against {want}");
    }
    fn close_array(&self, name: &str, got: &[f32]) {
        assert_close(&format!("{} {name}", self.id), got, &self.array(name), ABS);
    }
}

/// Returns whether two numbers are equal within [`ABS`] of a number of order 1; large numbers (an overflowing ratio) to the same number of
/// digits.
fn same(got: f64, want: f64) -> bool {
    (got.is_nan() && want.is_nan()) || got == want || (got - want).abs() <= ABS * want.abs().max(1.0)
}

fn tensor(array: &Array) -> Tensor {
    let values = Tensor::from_slice(&array.data).reshape(array.dims());
    match array.dtype {
        safetensors::Dtype::BOOL => values.to_kind(Kind::Bool),
        safetensors::Dtype::I64 => values.to_kind(Kind::Int64),
        _ => values.to_kind(Kind::Float),
    }
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.detach().to_kind(Kind::Float).reshape([-1])).unwrap()
}

fn as_floats(flags: &[bool]) -> Vec<f32> {
    flags.iter().map(|flag| f32::from(u8::from(*flag))).collect()
}

/// Results of the cases of one file. Every case is in exactly one list.
#[derive(Default)]
struct Coverage {
    same: Vec<String>,
    differs: Vec<(String, String)>,
    not_offered: Vec<(String, String)>,
}

impl Coverage {
    fn differs(&mut self, case: &Case<'_>, why: &str) {
        self.differs.push((case.id.clone(), why.to_owned()));
    }
    fn not_offered(&mut self, case: &Case<'_>, function: &str) {
        self.not_offered.push((case.id.clone(), function.to_owned()));
    }
    /// Prints the counts; `not_offered` are the file's functions of other policies than ours, sorted.
    fn finish(self, stem: &str, total: usize, not_offered: &[&str]) {
        println!(
            "golden {stem}: {total} cases, {} equal, {} differ on purpose, {} not offered: {:?}",
            self.same.len(),
            self.differs.len(),
            self.not_offered.len(),
            self.not_offered
        );
        for (case, why) in &self.differs {
            println!("  {case}: {why}");
        }
        crate::differences::check_cases(stem, &self.differs);
        // another set may lack a function, but must not have one that this list does not name
        let listed = not_offered.iter().copied().collect::<BTreeSet<_>>();
        let left_out: BTreeSet<&str> = self.not_offered.iter().map(|(_, function)| function.as_str()).collect();
        assert!(
            left_out.is_subset(&listed) && (left_out == listed || !crate::differences::of_the_committed_set(stem)),
            "{stem}: functions that are not offered are {left_out:?}, listed {listed:?}"
        );
        assert_eq!(
            self.same.len() + self.differs.len() + self.not_offered.len(),
            total,
            "{stem}: every case is covered"
        );
    }
}

/// Runs `check` on every case of a golden file; `check` enters the result of the case into the coverage.
fn run(stem: &str, not_offered: &[&str], mut check: impl FnMut(&Case<'_>, &mut Coverage)) {
    let golden = Golden::open(stem);
    let all = golden_cases(stem);
    let cases = all["cases"].as_array().expect("list of cases");
    assert!(!cases.is_empty(), "{stem} has no case");
    let mut coverage = Coverage::default();
    for spec in cases {
        let id = spec["case"].as_str().expect("case name").to_owned();
        let case = Case {
            golden: &golden,
            spec,
            id,
        };
        let before = coverage.differs.len() + coverage.not_offered.len();
        check(&case, &mut coverage);
        if coverage.differs.len() + coverage.not_offered.len() == before {
            coverage.same.push(case.id.clone());
        }
    }
    coverage.finish(stem, cases.len(), not_offered);
}
