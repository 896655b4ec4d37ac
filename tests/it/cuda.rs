//! The engine on ONNX Runtime's real CUDA provider, over a CUDA runtime that counts instead of computing (`tests/fake-cuda`): which
//! launches, captures, copies and waits a chunk and a reload cost, and what is refused. Numbers are compared on a card by `scripts/gpu`.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use integration_tests::{
    ring::{plan, program},
    skip,
    standalone::{Programs, random_bundle},
};
use policy::{bundle::EXPERT_WEIGHTS, plan::RunPlan};

const DEPS: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../.deps");
/// Denoise steps of the policies here.
const STEPS: u64 = 3;
/// Cameras of the policies here.
const CAMERAS: u64 = 2;
/// Weight slots of the device.
const SLOTS: u64 = 3;
/// Bytes of images per chunk: two cameras of 32 x 32 pixels.
const IMAGES: u64 = 2 * 32 * 32 * 3;

/// Reports a skip when `scripts/setup-cuda` has not run.
fn lacks_cuda() -> bool {
    let there = ["onnxruntime-cuda/libonnxruntime.so", "fake-cuda/libcudart.so.13"];
    let lacks = there.iter().any(|file| !Path::new(DEPS).join(file).is_file());
    if lacks {
        skip("the CUDA provider", "run scripts/setup-cuda, which fetches it");
    }
    lacks
}

/// Calls and bytes by counter.
type Counters = BTreeMap<String, (u64, u64)>;

/// Starts the engine over the counting runtime.
fn engine(args: &[&str], environment: &[(&str, &str)]) -> (Output, Counters) {
    let folder = tempfile::tempdir().expect("folder");
    let log = folder.path().join("counters");
    let done = Command::new(program("rollout-engine"))
        .args(args)
        .args(["--provider", "cuda"])
        .env("LD_LIBRARY_PATH", Path::new(DEPS).join("fake-cuda"))
        .env(
            "ORT_DYLIB_PATH",
            Path::new(DEPS).join("onnxruntime-cuda/libonnxruntime.so"),
        )
        .env("FAKE_CUDA_LOG", &log)
        .envs(environment.iter().copied())
        .output()
        .expect("starting the engine");
    let counters = fs::read_to_string(&log).unwrap_or_default();
    let counters = counters.lines().filter_map(|line| {
        let mut parts = line.split('\t');
        let name = parts.next()?.to_owned();
        Some((name, (parts.next()?.parse().ok()?, parts.next()?.parse().ok()?)))
    });
    (done, counters.collect())
}

/// As [`engine`], for a run that succeeds.
#[track_caller]
fn counted(args: &[&str]) -> Counters {
    let (done, counters) = engine(args, &[]);
    assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
    let refused: Vec<_> = counters
        .keys()
        .filter(|name| name.starts_with("refused:") || name.starts_with("unsupported:"))
        .collect();
    assert!(refused.is_empty(), "a card would refuse {refused:?}");
    counters
}

fn calls(counters: &Counters, name: &str) -> u64 {
    counters.get(name).map_or(0, |(calls, _)| *calls)
}

fn bytes(counters: &Counters, name: &str) -> u64 {
    counters.get(name).map_or(0, |(_, bytes)| *bytes)
}

/// A small policy with the published structure, on CUDA in bf16.
fn policy(dir: &Path, variant: &str, rows: usize) -> RunPlan {
    let steps = format!("actor.model.num_steps={STEPS}");
    let batch = format!("rollout.max_batch={rows}");
    // pi0's critic reads the state apart, pi0.5's does not
    let state = format!("actor.model.value_head.state={}", variant == "pi0");
    let variant = format!("actor.model.variant={variant:?}");
    plan(
        dir,
        &[
            "rollout.provider=\"cuda\"",
            "rollout.precision=\"bf16\"",
            "rollout.weights=\"inputs\"",
            "actor.model.cameras=[\"front\", \"wrist\"]",
            &batch,
            &steps,
            &state,
            &variant,
        ],
    )
}

fn text(path: &Path) -> &str {
    path.to_str().expect("a path of this test")
}

/// Copies a bundle, so that its expert's weights are another file with the same content.
fn copy_of(bundle: &Path, to: &Path) -> PathBuf {
    fs::create_dir(to).expect("folder");
    for entry in fs::read_dir(bundle).expect("bundle") {
        let path = entry.expect("entry").path();
        let target = to.join(path.file_name().expect("name"));
        if path.ends_with(EXPERT_WEIGHTS) {
            fs::copy(&path, &target).expect("copy");
        } else {
            fs::hard_link(&path, &target).expect("link");
        }
    }
    to.to_owned()
}

#[test]
fn a_chunk_is_one_upload_replays_and_one_download() {
    if lacks_cuda() {
        return;
    }
    // rows of the graphs, and rows that are asked for: the others are padding, which costs no prefix
    for (variant, rows, asked) in [("pi0", 1, 1), ("pi05", 1, 1), ("pi0", 3, 3), ("pi0", 3, 2)] {
        let dir = tempfile::tempdir().expect("folder");
        let bundle = random_bundle(&Programs::default(), &policy(dir.path(), variant, rows), dir.path());
        let run = |batches: &str| {
            let rows = asked.to_string();
            counted(&[
                "bench",
                "--bundle",
                text(&bundle),
                "--batch",
                &rows,
                "--batches",
                batches,
            ])
        };
        let (few, many) = (run("10"), run("60"));
        let more = |name: &str| {
            (
                calls(&many, name) - calls(&few, name),
                bytes(&many, name) - bytes(&few, name),
            )
        };
        let (chunks, rows) = (50, asked as u64);

        let captures = calls(&few, "BeginCapture");
        // each graph that runs per chunk is captured once: prefix by number of cameras, state and denoise by weight slot
        let state = u64::from(variant == "pi0");
        assert_eq!(captures, CAMERAS + SLOTS * (state + 1), "{variant}, {rows} rows");
        assert_eq!(calls(&many, "BeginCapture"), captures, "no chunk captures");
        let replays = rows + state + STEPS;
        assert_eq!(more("GraphLaunch").0, chunks * replays, "{variant}, {rows} rows");
        assert_eq!(more("StreamSync").0, chunks, "one wait per chunk");
        // per row the observation, then all steps at once; everything else stays on the device
        let (uploads, uploaded) = more("memcpyHtoD");
        assert_eq!(uploads, chunks * (rows + 1));
        assert!(
            uploaded <= chunks * rows * (IMAGES + 64_000),
            "{} bytes per chunk",
            uploaded / chunks
        );
        assert_eq!(more("memcpyDtoH").0, chunks, "one download per chunk");
        assert_eq!(more("malloc").0, 0, "no chunk allocates");
        // launches outside of the replayed graphs
        let known = ["GraphLaunch", "GraphNodes", "StreamSync", "EventRecord"];
        for name in many.keys().filter(|name| !known.contains(&name.as_str())) {
            let copies = name.starts_with("memcpy") || name.starts_with("cuda");
            assert!(
                copies || more(name).0 == 0,
                "{name} is launched {} times per 50 chunks",
                more(name).0
            );
        }
    }
}

#[test]
fn a_reload_copies_the_expert_and_captures_nothing() {
    if lacks_cuda() {
        return;
    }
    let dir = tempfile::tempdir().expect("folder");
    let bundle = random_bundle(&Programs::default(), &policy(dir.path(), "pi0", 1), dir.path());
    let other = copy_of(&bundle, &dir.path().join("other"));
    let run = |reloads: &str| {
        let other = text(&other);
        let bench = ["bench", "--bundle", text(&bundle), "--batch", "1", "--batches", "1"];
        counted(&[&bench[..], &["--reload", other, "--reloads", reloads]].concat())
    };
    let (few, many) = (run("1"), run("201"));
    assert_eq!(calls(&many, "BeginCapture"), calls(&few, "BeginCapture"));
    assert_eq!(
        calls(&many, "malloc"),
        calls(&few, "malloc"),
        "a reload allocates nothing on the device"
    );
    assert_eq!(
        calls(&many, "hostMalloc"),
        calls(&few, "hostMalloc"),
        "nor page-locked memory"
    );
    // the file holds bf16; the projections and heads go to the device in f32
    let expert = fs::metadata(bundle.join(EXPERT_WEIGHTS)).expect("weights").len();
    let copied = bytes(&many, "memcpyHtoD") - bytes(&few, "memcpyHtoD");
    assert!(
        copied >= 200 * expert * 9 / 10,
        "{copied} bytes for 200 versions of {expert} bytes"
    );
    assert_eq!(bytes(&many, "mallocPeak"), bytes(&few, "mallocPeak"));
}

#[test]
fn what_a_host_lacks_is_one_clear_line() {
    if lacks_cuda() {
        return;
    }
    let dir = tempfile::tempdir().expect("folder");
    let bundle = random_bundle(&Programs::default(), &policy(dir.path(), "pi0", 1), dir.path());
    let plain_dir = tempfile::tempdir().expect("folder");
    let plain = random_bundle(&Programs::default(), &plan(plain_dir.path(), &[]), plain_dir.path());
    let refusal = |bundle: &Path, environment: &[(&str, &str)], code: i32| {
        let (done, _) = engine(&["check", text(bundle)], environment);
        let said = String::from_utf8_lossy(&done.stderr).into_owned();
        assert_eq!(done.status.code(), Some(code), "{environment:?}: {said}");
        let lines: Vec<&str> = said
            .lines()
            .filter(|line| line.starts_with("rollout-engine: "))
            .collect();
        assert_eq!(lines.len(), 1, "{environment:?}: {said}");
        lines[0].to_owned()
    };
    let said = refusal(&bundle, &[("FAKE_CUDA_DEVICES", "0")], 2);
    assert!(said.contains("no CUDA device"), "{said}");
    let said = refusal(&bundle, &[("LD_LIBRARY_PATH", "/nowhere")], 2);
    assert!(said.contains("libcudart.so"), "{said}");
    let said = refusal(&bundle, &[("ORT_DYLIB_PATH", "/nowhere/libonnxruntime.so")], 1);
    assert!(said.contains("libonnxruntime"), "{said}");
    let cpu = Path::new(DEPS).join("onnxruntime/libonnxruntime.so");
    let said = refusal(&bundle, &[("ORT_DYLIB_PATH", text(&cpu))], 2);
    assert!(said.contains("provider `cuda` is unavailable"), "{said}");
    // room for the buffers of transfers, not for the weights
    let said = refusal(&bundle, &[("FAKE_CUDA_MEMORY", "100000")], 1);
    assert!(said.contains("no room for"), "{said}");
    let said = refusal(&plain, &[], 3);
    assert!(said.contains("flavour `plain`, expected `cuda`"), "{said}");

    let done = Command::new(program("rollout-engine"))
        .args(["check", text(&bundle)])
        .output()
        .expect("engine");
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(3), "{said}");
    assert!(said.contains("flavour `cuda`, expected `plain`"), "{said}");
}
