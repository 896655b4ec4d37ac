//! Wrong input of the programs: one clear line, a non-zero exit, nothing half-written.

use std::{
    path::Path,
    process::{Command, Output},
};

use integration_tests::{
    ring::{plan, program},
    skip,
};
use learner::{
    model::{ParamStore, Pi0},
    run::publish::Publisher,
};
use policy::{
    bundle::{BUNDLE_VERSION, Bundle, EXPERT_WEIGHTS, MANIFEST},
    params::Part,
    weights::WeightFile,
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use tch::Device;

fn run(name: &str, args: &[&str]) -> Output {
    Command::new(program(name))
        .args(args)
        .output()
        .expect("running the program")
}

/// Asserts that the program fails with one line that holds all of `wanted`.
#[track_caller]
fn assert_refusal(output: &Output, wanted: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success(), "it did not fail: {text}");
    let line = text
        .lines()
        .rfind(|l| !l.trim().is_empty())
        .unwrap_or_else(|| panic!("no error line"));
    assert!(!text.contains("panicked"), "{text}");
    for part in wanted {
        assert!(line.contains(part), "`{part}` is not in: {line}");
    }
}

fn quickstart() -> String {
    format!("{}/../configs/quickstart.toml", env!("CARGO_MANIFEST_DIR"))
}

#[test]
fn unknown_key_names_the_nearest() {
    let config = quickstart();
    for program in ["learner", "rollout-engine"] {
        let verb = if program == "learner" { "train" } else { "serve" };
        let output = run(program, &[verb, "--config", &config, "--set", "algorithm.gama=0.9"]);
        assert_refusal(&output, &["algorithm.gama", "did you mean `gamma`"]);
    }
    let output = run("learner", &["train", "--config", "/nowhere/else.toml"]);
    assert_refusal(&output, &["/nowhere/else.toml"]);
    let output = run(
        "learner",
        &[
            "train",
            "--config",
            &config,
            "--set",
            "actor.model.openpi.noise_level=-1.0",
        ],
    );
    assert_refusal(&output, &["noise_level", "expected"]);
}

#[test]
fn training_without_sft_says_what_to_run() {
    let dir = tempfile::tempdir().expect("folder");
    let output_dir = format!("runner.output_dir={:?}", dir.path().display().to_string());
    let output = run("learner", &["train", "--config", &quickstart(), "--set", &output_dir]);
    assert_refusal(&output, &["model.safetensors", "learner sft"]);
    assert!(!dir.path().join("policy").exists(), "nothing half-written");
}

/// Non-finite numbers in the data sets of both stages, and a cut file, are found before the first step.
#[test]
fn a_damaged_data_set_is_named_with_row_and_column() {
    let dir = tempfile::tempdir().expect("folder");
    let output_dir = format!("runner.output_dir={:?}", dir.path().display().to_string());
    let (config, data) = (quickstart(), dir.path().join("data"));
    let sft = || {
        let few = [
            "pretrain.optim.steps=1",
            "sft.optim.steps=1",
            "pretrain.scenes=9",
            "sft.demos=1",
        ];
        let set = [few.as_slice(), &[&output_dir]].concat();
        let set: Vec<&str> = set.into_iter().flat_map(|key| ["--set", key]).collect();
        run("learner", &[&["sft", "--config", &config], set.as_slice()].concat())
    };
    let made = sft();
    assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
    std::fs::remove_dir_all(dir.path().join("sft")).expect("weights of whole data sets");
    for (name, tensor, row, column, width) in [("scenes", "keypoints", 8, 5, 6), ("demos", "state", 3, 2, 4)] {
        let path = data.join(format!("{name}.safetensors"));
        let whole = std::fs::read(&path).expect("data set");
        let (header, metadata) = SafeTensors::read_metadata(&whole).expect("safetensors");
        let from = 8 + header + metadata.info(tensor).expect("tensor").data_offsets.0;
        let at = from + 4 * (row * width + column);
        let mut bytes = whole.clone();
        bytes[at..at + 4].copy_from_slice(&f32::NAN.to_le_bytes());
        std::fs::write(&path, bytes).expect("written");
        let text = format!("`{tensor}` of row {row} holds NaN in column {column}");
        assert_refusal(&sft(), &[&path.display().to_string(), &text]);
        std::fs::write(&path, &whole[..whole.len() / 2]).expect("written");
        assert_refusal(&sft(), &[&path.display().to_string(), "may be cut"]);
        std::fs::write(&path, whole).expect("written");
    }
    assert!(!dir.path().join("sft").exists(), "nothing half-written");
}

#[test]
fn busy_port_is_named() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").expect("port");
    let port = taken.local_addr().expect("address").port();
    let listen = format!("rollout.listen=\"tcp://127.0.0.1:{port}\"");
    let dir = tempfile::tempdir().expect("folder");
    let bundle = bundle(dir.path()).dir().display().to_string();
    let args = [
        "serve",
        "--config",
        &quickstart(),
        "--set",
        &listen,
        "--standalone",
        "--bundle",
        &bundle,
    ];
    let output = run("rollout-engine", &args);
    assert_refusal(&output, &[&port.to_string(), "in use"]);
}

#[test]
fn an_endpoint_on_a_network_is_rejected() {
    let dir = tempfile::tempdir().expect("folder");
    let bundle = bundle(dir.path()).dir().display().to_string();
    for set in ["rollout.http=\"0.0.0.0:0\"", "rollout.listen=\"tcp://0.0.0.0:0\""] {
        let args = [
            "serve",
            "--config",
            &quickstart(),
            "--set",
            set,
            "--standalone",
            "--bundle",
            &bundle,
        ];
        assert_refusal(&run("rollout-engine", &args), &["0.0.0.0", "loopback"]);
    }
}

#[test]
fn missing_accelerator_is_no_silent_fallback() {
    // with the driver's control device present, the providers may work
    if let Some(device) = ["/dev/nvidiactl", "/dev/dxg"]
        .iter()
        .find(|path| Path::new(path).exists())
    {
        skip(
            "the refusal of a missing accelerator",
            &format!("this host has one (`{device}`)"),
        );
        return;
    }
    for provider in ["cuda", "tensorrt"] {
        let dir = tempfile::tempdir().expect("folder");
        let bundle = bundle(dir.path());
        let set = format!("rollout.provider={provider:?}");
        let bundle = bundle.dir().display().to_string();
        let args = [
            "serve",
            "--config",
            &quickstart(),
            "--set",
            &set,
            "--standalone",
            "--bundle",
            &bundle,
        ];
        let output = run("rollout-engine", &args);
        assert_refusal(&output, &[provider]);
    }
}

fn bundle(dir: &Path) -> Bundle {
    let plan = plan(dir, &[]);
    let store = ParamStore::random(&plan.dims, &plan.heads, 1, Device::Cpu).expect("weights");
    let policy = Pi0::new(plan.dims.clone(), &plan.heads, store).expect("network");
    Publisher::new(&dir.join("policy"), &plan, None)
        .publish(&policy, 0)
        .expect("bundle")
}

#[track_caller]
fn assert_check_refuses(bundle: &Bundle, wanted: &[&str]) {
    let dir = bundle.dir().display().to_string();
    assert_refusal(&run("rollout-engine", &["check", &dir]), wanted);
    assert_refusal(&run("export", &["check", &dir]), wanted);
}

#[test]
fn a_sound_bundle_passes() {
    let dir = tempfile::tempdir().expect("folder");
    let bundle = bundle(dir.path());
    let output = run("export", &["check", &bundle.dir().display().to_string()]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

#[test]
fn other_bundle_version_says_both() {
    let dir = tempfile::tempdir().expect("folder");
    let bundle = bundle(dir.path());
    let path = bundle.path(MANIFEST);
    let text = std::fs::read_to_string(&path).expect("manifest");
    std::fs::write(
        &path,
        text.replacen(
            &format!("\"format_version\": {BUNDLE_VERSION}"),
            "\"format_version\": 77",
            1,
        ),
    )
    .expect("manifest");
    assert_check_refuses(&bundle, &["format version 77", &format!("reads {BUNDLE_VERSION}")]);
}

#[test]
fn truncated_weights_are_refused() {
    let dir = tempfile::tempdir().expect("folder");
    let bundle = bundle(dir.path());
    let path = bundle.path(EXPERT_WEIGHTS);
    let bytes = std::fs::read(&path).expect("weights");
    std::fs::write(&path, &bytes[..bytes.len() / 2]).expect("weights");
    assert_check_refuses(&bundle, &[EXPERT_WEIGHTS, "bytes"]);
}

type Tensors = Vec<(String, Vec<usize>, Vec<f32>)>;

/// Asserts that `export onnx` rejects a checkpoint with changed tensors.
#[track_caller]
fn assert_export_refuses(change: impl FnOnce(&mut Tensors), wanted: &[&str]) {
    let dir = tempfile::tempdir().expect("folder");
    let plan = plan(dir.path(), &[]);
    let store = ParamStore::random(&plan.dims, &plan.heads, 1, Device::Cpu).expect("weights");
    let mut tensors: Tensors = [Part::Vlm, Part::Expert, Part::ValueHead]
        .iter()
        .flat_map(|p| store.export(*p))
        .collect();
    change(&mut tensors);
    let raw = |data: &[f32]| data.iter().flat_map(|v| v.to_le_bytes()).collect::<Vec<u8>>();
    let data: Vec<Vec<u8>> = tensors.iter().map(|(.., data)| raw(data)).collect();
    let views = tensors.iter().zip(&data).map(|((name, shape, _), data)| {
        let view = TensorView::new(Dtype::F32, shape.clone(), data).expect("a shape that fits");
        (name, view)
    });
    let bytes = safetensors::serialize(views, None).expect("file");
    let checkpoint = dir.path().join("model.safetensors");
    std::fs::write(&checkpoint, bytes).expect("checkpoint");
    let out = dir.path().join("bundle");
    let (checkpoint, target) = (checkpoint.display().to_string(), out.display().to_string());
    let output = run(
        "export",
        &[
            "onnx",
            "--config",
            &quickstart(),
            "--checkpoint",
            &checkpoint,
            "--out",
            &target,
        ],
    );
    assert_refusal(&output, wanted);
    assert!(!out.exists(), "nothing half-written");
}

#[test]
fn wrong_weights_are_named() {
    let name = "action_out_proj.weight";
    assert_export_refuses(|t| t.retain(|(n, ..)| n != name), &[name, "missing"]);
    assert_export_refuses(
        |t| t.push(("action_out_projj.weight".to_owned(), vec![1], vec![0.0])),
        &["action_out_projj", name],
    );
    assert_export_refuses(
        |t| {
            let (_, shape, _) = t.iter_mut().find(|(n, ..)| n == name).expect("weight");
            shape.reverse();
        },
        &[name, "shape", "expected"],
    );
    assert_export_refuses(
        |t| t.iter_mut().find(|(n, ..)| n == name).expect("weight").2[3] = f32::NAN,
        &[name, "NaN", "element 3"],
    );
}

#[test]
fn a_cut_checkpoint_is_refused() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("cut.safetensors");
    std::fs::write(&path, [9, 0, 0, 0, 0, 0, 0, 0, b'{']).expect("file");
    let error = WeightFile::open(&path).expect_err("refused").to_string();
    assert!(error.contains("truncated"), "{error}");
}
