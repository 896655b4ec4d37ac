//! Exit codes of the programs, by the class of the failure.

use std::{
    path::Path,
    process::{Command, Stdio},
};

use integration_tests::{
    ring::{plan, program},
    standalone::{Programs, random_bundle},
};
use policy::bundle::{EXPERT_WEIGHTS, MANIFEST};
use wire::{
    limits::Limits,
    messages::{FromEngine, Refusal, ToEngine},
    socket::{RouterEvent, bind_router},
};

const OTHER: i32 = 1;
const USAGE: i32 = 2;
const DATA: i32 = 3;
const RING: i32 = 4;

const QUICKSTART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/quickstart.toml");

/// Runs a program and asserts its exit code and its error line.
#[track_caller]
fn ends(name: &str, args: &[&str], code: i32) {
    ends_with(Command::new(program(name)).args(args), code);
}

#[track_caller]
fn ends_with(command: &mut Command, code: i32) {
    let done = command.stdin(Stdio::null()).output().expect("starting the program");
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(code), "{command:?}: {said}");
    assert!(!said.trim().is_empty(), "{command:?}");
}

fn text(path: &Path) -> String {
    path.to_str().expect("a path of this test").to_owned()
}

#[test]
fn every_program_names_its_exit_codes() {
    for name in ["export", "rollout-engine", "env-worker", "learner"] {
        let help = Command::new(program(name)).arg("--help").output().expect("help");
        let help = String::from_utf8_lossy(&help.stdout);
        // clap may break the lines
        let help = help.split_whitespace().collect::<Vec<_>>().join(" ");
        assert!(help.contains(process::exit::CODES), "{name}: {help}");
    }
}

#[test]
fn wrong_usage_and_configurations_end_with_2() {
    let dir = tempfile::tempdir().expect("folder");
    let out = text(&dir.path().join("out"));
    let exists = text(dir.path());
    for name in ["export", "rollout-engine", "env-worker", "learner"] {
        ends(name, &["--no-such-flag"], USAGE);
    }
    let set = ["--set", "actor.model.openpi.noise_level=-1.0"];
    let onnx = ["onnx", "--config", QUICKSTART, "--checkpoint", "absent", "--out"];
    ends("export", &[&onnx[..], &[&out], &set].concat(), USAGE);
    ends("export", &[&onnx[..], &[&exists]].concat(), USAGE);
    let serve = ["serve", "--config", QUICKSTART];
    ends("rollout-engine", &["serve", "--config", "absent.toml"], USAGE);
    ends("rollout-engine", &[&serve[..], &set].concat(), USAGE);
    for learner in ["tcp://127.0.0.1:0", "tcp://10.0.0.1:5560", "127.0.0.1:5560"] {
        ends("rollout-engine", &[&serve[..], &["--learner", learner]].concat(), USAGE);
    }
    let worker = ["serve", "--num-envs", "1"];
    ends("env-worker", &[&worker[..], &["--env", "absent"]].concat(), USAGE);
    ends(
        "env-worker",
        &[&worker[..], &["--params", "grasp_tol = "]].concat(),
        USAGE,
    );
    ends(
        "env-worker",
        &[&worker[..], &["--params", "grasp_tol = 7.0"]].concat(),
        USAGE,
    );
    ends(
        "env-worker",
        &[&worker[..], &["--engine", "tcp://10.0.0.1:5555"]].concat(),
        USAGE,
    );
}

#[test]
fn broken_data_ends_with_3() {
    let dir = tempfile::tempdir().expect("folder");
    let bundle = random_bundle(&Programs::default(), &plan(dir.path(), &[]), dir.path());
    let check = |name: &str, code: i32| ends(name, &["check", &text(&bundle)], code);
    let serve = [
        "serve",
        "--config",
        QUICKSTART,
        "--standalone",
        "--listen",
        "tcp://127.0.0.1:0",
        "--http",
        "127.0.0.1:0",
        "--bundle",
    ];
    std::fs::write(bundle.join(EXPERT_WEIGHTS), "cut").expect("breaking the weights");
    check("export", DATA);
    check("rollout-engine", DATA);
    let state = text(&dir.path().join("state"));
    let path = text(&bundle);
    ends(
        "rollout-engine",
        &[&serve[..], &[&path, "--state-dir", &state]].concat(),
        DATA,
    );
    std::fs::remove_file(bundle.join(MANIFEST)).expect("removing the manifest");
    check("export", DATA);
    check("rollout-engine", DATA);
    let out = text(&dir.path().join("out"));
    let absent = ["onnx", "--config", QUICKSTART, "--checkpoint", "absent", "--out", &out];
    ends("export", &absent, DATA);
    let demos = [
        "demos",
        "--episodes",
        "5",
        "--horizon",
        "4",
        "--seed",
        "1",
        "--out",
        &out,
    ];
    ends(
        "env-worker",
        &[&demos[..], &["--params", "demo_bias = 0.2"]].concat(),
        DATA,
    );
}

#[test]
fn a_learner_without_its_data_ends_with_3() {
    let dir = tempfile::tempdir().expect("folder");
    let set = format!("runner.output_dir=\"{}\"", text(dir.path()));
    // no SFT checkpoint
    ends("learner", &["train", "--config", QUICKSTART, "--set", &set], DATA);
    let absent = text(&dir.path().join("absent"));
    ends("learner", &["report", &absent], DATA);
    ends(
        "learner",
        &[
            "sft",
            "--config",
            QUICKSTART,
            "--set",
            &set,
            "--set",
            "actor.model.norm_stats=\"absent.json\"",
        ],
        DATA,
    );
}

#[test]
fn a_learner_shows_the_log_of_an_engine_that_ends_and_ends_with_4() {
    let dir = tempfile::tempdir().expect("folder");
    let bundle = text(&random_bundle(&Programs::default(), &plan(dir.path(), &[]), dir.path()));
    let set = format!("runner.output_dir=\"{}\"", text(&dir.path().join("run")));
    let done = Command::new(program("learner"))
        .args([
            "eval",
            "--config",
            QUICKSTART,
            "--set",
            &set,
            "--bundle",
            &bundle,
            "--episodes",
            "2",
        ])
        .env("ORT_DYLIB_PATH", "/nowhere/libonnxruntime.so")
        .stdin(Stdio::null())
        .output()
        .expect("starting the program");
    let said = String::from_utf8_lossy(&done.stderr);
    assert_eq!(done.status.code(), Some(RING), "{said}");
    let mut lines = said.lines();
    let first = lines.find(|line| line.starts_with("learner: ")).expect("the failure");
    assert!(first.contains("rollout-engine"), "{said}");
    assert!(
        lines.any(|line| line.starts_with("    ") && line.contains("/nowhere/libonnxruntime.so")),
        "{said}"
    );
}

#[test]
fn a_broken_ring_ends_with_4() {
    let dir = tempfile::tempdir().expect("folder");
    let bundle = text(&random_bundle(&Programs::default(), &plan(dir.path(), &[]), dir.path()));
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("port");
    let taken = taken.local_addr().expect("address").to_string();
    let state = text(&dir.path().join("state"));
    let serve = [
        "serve",
        "--config",
        QUICKSTART,
        "--standalone",
        "--state-dir",
        &state,
        "--bundle",
        &bundle,
    ];
    let busy = format!("tcp://{taken}");
    let listen = ["--listen", &busy, "--http", "127.0.0.1:0"];
    ends("rollout-engine", &[&serve[..], &listen].concat(), RING);
    let http = ["--listen", "tcp://127.0.0.1:0", "--http", &taken];
    ends("rollout-engine", &[&serve[..], &http].concat(), RING);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_is_rejected_ends_with_4() {
    let router = bind_router::<ToEngine>("tcp://127.0.0.1:0", Limits::default()).await;
    let (send, mut receive, endpoint) = router.expect("an engine");
    let worker = tokio::task::spawn_blocking(move || {
        ends("env-worker", &["serve", "--num-envs", "1", "--engine", &endpoint], RING);
    });
    let RouterEvent::Frame(peer, Ok(ToEngine::Hello(_))) = receive.receive().await else {
        panic!("expected a hello");
    };
    let refusal = Refusal {
        request: None,
        retry: false,
        reason: "another policy".to_owned(),
    };
    send.send(peer, &FromEngine::Refused(refusal)).expect("sending");
    worker.await.expect("the worker's end");
}

#[test]
fn a_host_without_the_library_ends_with_1() {
    let dir = tempfile::tempdir().expect("folder");
    let bundle = text(&random_bundle(&Programs::default(), &plan(dir.path(), &[]), dir.path()));
    for name in ["rollout-engine", "export"] {
        let mut check = Command::new(program(name));
        check
            .args(["check", &bundle])
            .env("ORT_DYLIB_PATH", "/nowhere/libonnxruntime.so");
        ends_with(&mut check, OTHER);
    }
}
