//! The contract of a robot in the programs: contradictions are refused before anything starts, requests by what the contract says.

use std::{
    path::{Path, PathBuf},
    process::{Command, Output},
    time::Duration,
};

use integration_tests::{
    probe::metric,
    ring::{Client, plan, program, row},
    standalone::{Limits, Programs, Server, random_bundle, random_checkpoint},
};
use policy::{bundle::MANIFEST, params::Part};
use wire::messages::{ActRequest, ActRow, FromEngine, Mode, ToEngine};

use crate::ring::block_on;

const QUICKSTART: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/../configs/quickstart.toml");
/// Longest wait for a page.
const PATIENCE: Duration = Duration::from_secs(30);

/// Returns the path of an input from a bug report.
fn case(name: &str) -> String {
    format!("{}/data/cases/norm_stats_{name}.json", env!("CARGO_MANIFEST_DIR"))
}

/// Returns the keys of a policy with statistics.
fn keys(name: &str, normalization: &str) -> [String; 2] {
    [
        format!("actor.model.norm_stats={:?}", case(name)),
        format!("actor.model.normalization={normalization:?}"),
    ]
}

fn run(name: &str, args: &[&str]) -> Output {
    let mut command = Command::new(program(name));
    command.args(args).env_remove("RUST_BACKTRACE");
    command.output().expect("running the program")
}

/// Asserts that the program fails with the code for data and a last line that holds `parts`.
#[track_caller]
fn assert_refused(output: &Output, parts: &[&str]) {
    let text = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(3), "{text}");
    let line = text
        .lines()
        .rfind(|line| !line.trim().is_empty())
        .expect("an error line");
    for part in parts {
        assert!(line.contains(part), "`{part}` is not in: {line}");
    }
}

/// Every command that starts from a configuration refuses the same contradiction, before any file is written.
#[test]
fn statistics_that_do_not_fit_are_refused_by_every_command() {
    let dir = tempfile::tempdir().expect("folder");
    let out = dir.path().join("run");
    let checkpoint = dir.path().join("random.safetensors");
    let all = [Part::Vlm, Part::Expert, Part::NoiseHead, Part::ValueHead];
    random_checkpoint(&plan(dir.path(), &[]), &all, &checkpoint);
    let trained = dir.path().join("trained");
    let weights = trained.join("sft/model.safetensors");
    random_checkpoint(&plan(dir.path(), &[]), &[Part::Vlm, Part::Expert], &weights);
    let exchanged = dir.path().join("exchanged.json");
    let text = std::fs::read_to_string(case("near_constant_joint")).expect("statistics");
    std::fs::write(
        &exchanged,
        text.replacen("\"q01\": [-0.2, -0.2, 1.5686", "\"q01\": [-0.2, -0.2, 1.6", 1),
    )
    .expect("written");
    let exchanged_keys = [
        format!("actor.model.norm_stats={:?}", exchanged.display().to_string()),
        "actor.model.normalization=\"quantile\"".to_owned(),
    ];
    let wrong = [
        (keys("without_quantiles", "quantile"), "no `q01` and `q99`"),
        (exchanged_keys, "`state.q01[2]` is 1.6, above `state.q99[2]` = 1.5696"),
        // the policy of the quickstart is 4 wide
        (
            keys("padded_to_32", "z_score"),
            "`actions` have 32 dimensions (3 without the zeros at the end), expected `env_action_dim` = 3",
        ),
    ];
    let output_dir = |path: &Path| format!("runner.output_dir={:?}", path.display().to_string());
    let (output_dir, trained_dir) = (output_dir(&out), output_dir(&trained));
    let (checkpoint, bundle) = (
        checkpoint.display().to_string(),
        out.join("bundle").display().to_string(),
    );
    for (keys, reason) in &wrong {
        let set = [keys[0].as_str(), &keys[1], &output_dir]
            .map(|key| ["--set", key])
            .concat();
        let commands: [(&str, Vec<&str>); 3] = [
            ("learner", vec!["inspect", QUICKSTART]),
            ("learner", vec!["sft", "--config", QUICKSTART]),
            (
                "export",
                vec![
                    "onnx",
                    "--config",
                    QUICKSTART,
                    "--checkpoint",
                    &checkpoint,
                    "--out",
                    &bundle,
                ],
            ),
        ];
        for (name, args) in commands {
            assert_refused(&run(name, &[args, set.clone()].concat()), &[reason]);
        }
        // `train` first asks for the supervised weights
        let set = [keys[0].as_str(), &keys[1], &trained_dir]
            .map(|key| ["--set", key])
            .concat();
        let train = [&["train", "--config", QUICKSTART], set.as_slice()].concat();
        assert_refused(&run("learner", &train), &[reason]);
    }
    assert!(!out.exists(), "nothing half-written");
    let left = std::fs::read_dir(&trained).expect("folder").count();
    assert_eq!(left, 1, "nothing beside the supervised weights");
}

/// Returns a bundle of random weights with these keys.
fn bundle(dir: &Path, keys: &[String]) -> PathBuf {
    let keys: Vec<&str> = keys.iter().map(String::as_str).collect();
    random_bundle(&Programs::default(), &plan(dir, &keys), dir)
}

#[test]
fn a_bundle_that_contradicts_itself_is_refused_before_it_serves() {
    let dir = tempfile::tempdir().expect("folder");
    let bundle = bundle(dir.path(), &keys("delta", "z_score"));
    let path = bundle.join(MANIFEST);
    let sound = std::fs::read_to_string(&path).expect("manifest");
    let folder = bundle.display().to_string();
    let wrong: [(&str, serde_json::Value, &str); 4] = [
        ("normalization", "quantile".into(), "no `q01` and `q99`"),
        ("norm_stats", serde_json::Value::Null, "there are no statistics"),
        ("delta_actions", vec![4].into(), "`delta_actions` is [4]"),
        ("env_state_dim", 3.into(), "expected `env_state_dim` = 3"),
    ];
    for (key, value, reason) in wrong {
        let mut manifest: serde_json::Value = serde_json::from_str(&sound).expect("JSON");
        manifest[key] = value;
        std::fs::write(&path, manifest.to_string()).expect("written");
        assert_refused(&run("export", &["check", "--no-run", &folder]), &[reason, &folder]);
        assert_refused(&run("rollout-engine", &["check", &folder]), &[reason, &folder]);
        let serve = ["serve", "--config", QUICKSTART, "--standalone", "--bundle", &folder];
        assert_refused(&run("rollout-engine", &serve), &[reason, &folder]);
    }
}

/// `check` pushes an observation through everything, and prints the commands in the robot's units.
#[test]
fn check_says_which_commands_come_out() {
    let dir = tempfile::tempdir().expect("folder");
    let keys = [
        keys("delta", "z_score").to_vec(),
        vec!["actor.model.delta_actions=[2,-1]".to_owned()],
    ]
    .concat();
    let bundle = bundle(dir.path(), &keys).display().to_string();
    for (name, args) in [
        ("rollout-engine", vec!["check", &bundle]),
        ("export", vec!["check", &bundle]),
    ] {
        let done = run(name, &args);
        let said = String::from_utf8_lossy(&done.stdout);
        assert!(done.status.success(), "{}", String::from_utf8_lossy(&done.stderr));
        for part in [
            "self-test",
            "cameras top",
            "state of 4 numbers",
            "prompt `pick`",
            "8 rows of 3 commands",
            "[2] ",
        ] {
            assert!(said.contains(part), "`{part}` is not in: {said}");
        }
        // the state lies in 0.25 to 0.75, a difference within a few times 0.05, and dimension 2 is no difference
        let number = |dimension: &str| -> f32 {
            let text = said.rsplit_once(&format!("[{dimension}] ")).expect("dimension").1;
            text.split_whitespace()
                .next()
                .expect("number")
                .parse()
                .expect("a number")
        };
        for dimension in ["0", "1"] {
            assert!((0.0..1.0).contains(&number(dimension)), "{said}");
        }
        assert!(number("2").abs() < 0.25, "{said}");
    }
}

#[test]
fn inspect_describes_the_robot_and_names_what_it_cannot_check() {
    let near = keys("near_constant_joint", "quantile");
    let done = run(
        "learner",
        &["inspect", QUICKSTART, "--set", &near[0], "--set", &near[1]],
    );
    let said = String::from_utf8_lossy(&done.stdout);
    for part in [
        "state of 4 numbers; actions of 3 numbers, absolute",
        "warning: statistics: `state[2]` is nearly constant",
    ] {
        assert!(
            said.contains(part),
            "`{part}` is not in: {said}{}",
            String::from_utf8_lossy(&done.stderr)
        );
    }
    let absent = [
        "actor.model.norm_stats=\"absent.json\"",
        "actor.model.normalization=\"z_score\"",
    ];
    let done = run(
        "learner",
        &["inspect", QUICKSTART, "--set", absent[0], "--set", absent[1]],
    );
    let said = String::from_utf8_lossy(&done.stdout);
    assert!(
        done.status.success() && said.contains("`absent.json` does not exist here: not checked"),
        "{said}"
    );
}

/// Requests are refused with expected and found, and what is served with a doubt is reported once and counted.
#[test]
fn requests_are_held_to_the_contract() {
    let dir = tempfile::tempdir().expect("folder");
    let plan = plan(
        dir.path(),
        &keys("near_constant_joint", "quantile").each_ref().map(String::as_str),
    );
    let server = Server::engine(&Programs::default(), &plan, dir.path(), Limits::default());
    let ask = |number: u64, state: &[f32], prompt: &str| ActRow {
        observation: wire::messages::Observation {
            state: state.to_vec(),
            prompt: prompt.to_owned(),
            ..row(&plan, number, Mode::Eval).observation
        },
        record: false,
        ..row(&plan, number, Mode::Eval)
    };
    let usual = [0.5, 0.5, 1.569, 0.5];
    block_on(async {
        let mut client = Client::connect(&server.listen).await;
        for (request, state) in [&[0.1f32][..], &[], &[0.5; 3]].into_iter().enumerate() {
            let rows = vec![ask(0, state, "pick red")];
            let request = request as u64;
            client.send(&ToEngine::Act(ActRequest { request, rows })).await;
            let FromEngine::Refused(refusal) = client.receive().await else {
                panic!("a state of {} numbers is served", state.len());
            };
            let expected = format!("state has {} numbers, expected 4", state.len());
            assert!(
                refusal.reason.contains(&expected) && !refusal.retry,
                "{}",
                refusal.reason
            );
        }
        for request in 10..13 {
            // one number is far outside, and `green` has no room
            client
                .act(request, vec![ask(1, &[0.5, 0.5, 1.6, 0.5], "pick red green")])
                .await;
        }
        client.act(13, vec![ask(2, &usual, "pick red")]).await;
    });
    let http = server.http.as_deref().expect("pages");
    let counted = |name: &str| metric(http, name, PATIENCE).expect("metric");
    assert_eq!(counted("engine_prompts_cut_total") as u64, 3);
    assert_eq!(counted("engine_state_far_total{dimension=\"2\"}") as u64, 3);
    let log = std::fs::read_to_string(&server.log).expect("log");
    for line in [
        "`state[2]` is nearly constant in the training data",
        "prompt `pick red green` has 5 tokens, the policy reads the first 4",
        "state[2] is 1.6",
    ] {
        assert_eq!(log.matches(line).count(), 1, "`{line}` once in: {log}");
    }
}
