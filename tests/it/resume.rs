//! A killed and resumed run gives the same weights as an undisturbed run; unusable checkpoints are rejected by name.

use std::{
    collections::BTreeMap,
    fs,
    io::{BufRead, BufReader},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc::{Receiver, channel},
    time::{Duration, Instant, SystemTime},
};

use integration_tests::ring::{Client, Engine, plan, program, row};
use learner::{
    model::ParamStore,
    ring::hub::{Hub, HubEvent},
    run::{
        checkpoint::{self, MODEL, OPTIMIZER, STATE},
        publish::Publisher,
    },
};
use policy::{
    bundle::describe_file,
    noise::{Purpose, stream, uniform},
    params::{Heads, Part},
    weights::WeightFile,
};
use tch::{Device, Tensor};
use wire::messages::{ActRow, ChunkRecord, Mode};

use crate::common::network;

/// Overrides for a run of seconds with the critic's warm-up, evaluations, a best checkpoint and retention.
const TINY: [&str; 12] = [
    "env.train.total_num_envs=8",
    "env.eval.train_episodes=8",
    "runner.max_epochs=4",
    "runner.save_interval=1",
    "runner.val_check_interval=2",
    "runner.keep_last=2",
    "runner.keep_best=true",
    "actor.global_batch_size=40",
    "actor.micro_batch_size=20",
    "actor.optim.critic_warmup_epochs=1",
    "algorithm.update_epoch=2",
    "rollout.fixed_batch=8",
];

/// A run's folder with start weights in SFT's place.
struct Run {
    dir: tempfile::TempDir,
    config: &'static str,
}

impl Run {
    fn new() -> Self {
        Self::of("quickstart.toml")
    }

    /// Makes a run of this recipe with the quickstart's network.
    fn of(config: &'static str) -> Self {
        let dir = tempfile::tempdir().expect("folder");
        let plan = plan(dir.path(), &TINY);
        let store = ParamStore::random(&plan.dims, &Heads::default(), 77, Device::Cpu).expect("weights");
        let start = dir.path().join("sft").join(MODEL);
        store.write(&[Part::Vlm, Part::Expert], &start).expect("start weights");
        Self { dir, config }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn checkpoint(&self, iteration: u32) -> PathBuf {
        checkpoint::path(&self.path("checkpoints"), iteration)
    }

    fn checkpoints(&self) -> Vec<u32> {
        checkpoint::list(&self.path("checkpoints")).expect("checkpoints")
    }

    /// Starts `learner train` on this folder.
    fn train(&self, resume: Option<&str>, overrides: &[&str]) -> Learner {
        let config = Path::new(env!("CARGO_MANIFEST_DIR"))
            .join("../configs")
            .join(self.config);
        let mut command = Command::new(program("learner"));
        command.arg("train").arg("--config").arg(config);
        let output = format!("runner.output_dir={:?}", self.dir.path().display().to_string());
        for set in TINY.iter().chain(overrides).copied().chain([output.as_str()]) {
            command.arg("--set").arg(set);
        }
        if let Some(resume) = resume {
            command.arg("--resume").arg(resume);
        }
        let child = command
            .env("NO_COLOR", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starting the learner");
        Learner::new(child)
    }

    fn sha256(&self, iteration: u32) -> [String; 2] {
        [MODEL, OPTIMIZER].map(|name| {
            describe_file(&self.checkpoint(iteration).join(name))
                .expect("file")
                .sha256
        })
    }

    /// Returns the metrics line by line, without times.
    fn metrics(&self) -> Vec<serde_json::Value> {
        let text = fs::read_to_string(self.path("metrics.jsonl")).expect("metrics");
        text.lines()
            .map(|line| {
                let mut line: serde_json::Value = serde_json::from_str(line).expect("a whole line");
                let values = line.as_object_mut().expect("an object");
                values.retain(|name, _| !name.contains("seconds") && name != "wall_time");
                line
            })
            .collect()
    }

    /// Returns the files that a rejection must leave unchanged, with their bytes.
    fn snapshot(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        fn walk(dir: &Path, files: &mut BTreeMap<PathBuf, Vec<u8>>) {
            for entry in fs::read_dir(dir).expect("listing") {
                let path = entry.expect("entry").path();
                if path.is_dir() {
                    walk(&path, files);
                } else {
                    files.insert(path.clone(), fs::read(&path).expect("file"));
                }
            }
        }
        let mut files = BTreeMap::new();
        walk(self.dir.path(), &mut files);
        files
    }

    #[track_caller]
    fn assert_refused(&self, resume: Option<&str>, overrides: &[&str], wanted: &[&str]) {
        let before = self.snapshot();
        let log = self.train(resume, overrides).end(false);
        for part in wanted {
            assert!(log.contains(part), "`{part}` is not in: {log}");
        }
        assert!(before == self.snapshot(), "the refusal changed a file: {log}");
    }
}

struct Learner {
    child: Child,
    lines: Receiver<String>,
    log: String,
}

impl Learner {
    /// Forwards the lines of the log as they arrive, so that a test can wait for a moment of the run.
    fn new(mut child: Child) -> Self {
        let log = BufReader::new(child.stderr.take().expect("log"));
        let (send, lines) = channel();
        std::thread::spawn(move || {
            for line in log.lines() {
                // the test may be done with the log
                if send.send(line.expect("log line") + "\n").is_err() {
                    return;
                }
            }
        });
        Self {
            child,
            lines,
            log: String::new(),
        }
    }

    /// Kills the learner by SIGKILL after this time, unless the learner ended before. Returns the last line of the log.
    fn kill_after(mut self, life: Duration) -> String {
        let moment = Instant::now() + life;
        while let Ok(line) = self
            .lines
            .recv_timeout(moment.saturating_duration_since(Instant::now()))
        {
            self.log += &line;
        }
        self.child.kill().expect("killing the learner");
        self.child.wait().expect("waiting for the learner");
        self.log.lines().last().unwrap_or_default().to_owned()
    }

    /// Reads the log until a line holds `text`.
    fn until(&mut self, text: &str) {
        for line in &self.lines {
            self.log += &line;
            if line.contains(text) {
                return;
            }
        }
        panic!("`{text}` did not come: {}", self.log);
    }

    /// Kills the learner by SIGKILL as soon as its log holds `text`.
    fn kill_at(mut self, text: &str) {
        self.until(text);
        self.child.kill().expect("killing the learner");
        self.child.wait().expect("waiting for the learner");
    }

    /// Waits for the end and returns the log.
    #[track_caller]
    fn end(mut self, success: bool) -> String {
        for line in &self.lines {
            self.log += &line;
        }
        let status = self.child.wait().expect("waiting for the learner");
        assert_eq!(status.success(), success, "{}", self.log);
        self.log
    }
}

/// A run is killed twice during the write of a checkpoint and once in the middle of a rollout. The run ends with the same bytes of weights
/// and optimizer state, the same checkpoints and the same metrics as an undisturbed run.
#[test]
fn a_killed_run_that_goes_on_gives_the_same_weights_bit_for_bit() {
    let whole = Run::new();
    whole.train(None, &[]).end(true);

    let killed = Run::new();
    // the line comes right before the iteration's checkpoint is written
    killed.train(None, &[]).kill_at("iteration 1/4");
    killed.train(Some("auto"), &[]).kill_at("iteration 2/4");
    // right before the rollout of the third iteration
    killed.train(Some("auto"), &[]).kill_at("version 2: success");
    let log = killed.train(Some("auto"), &[]).end(true);
    assert!(log.contains("resuming from"), "{log}");

    assert_eq!(whole.sha256(4), killed.sha256(4));
    assert_eq!(whole.checkpoints(), killed.checkpoints());
    assert!(whole.checkpoints().ends_with(&[3, 4]), "the newest two stay");
    let best = |run: &Run| fs::read_to_string(run.path("checkpoints").join(checkpoint::BEST)).expect("the best");
    assert_eq!(best(&whole), best(&killed));
    assert_eq!(whole.metrics(), killed.metrics());
    assert!(
        killed.path("policy/v000000").is_dir(),
        "the first version is there to compare with"
    );

    // the oracle is meaningful only if the weights changed
    let weights = |path: &Path| {
        let plan = plan(killed.dir.path(), &TINY);
        let store = ParamStore::zeros(&plan.dims, &Heads::default(), Device::Cpu).expect("store");
        let spec = store.specs().iter().find(|s| s.name == "action_out_proj.weight");
        let file = WeightFile::open(path).expect("weights");
        file.read(spec.expect("weight")).expect("weight").data
    };
    let start = weights(&killed.path("sft").join(MODEL));
    let end = weights(&killed.checkpoint(4).join(MODEL));
    assert_ne!(start, end, "the policy was trained");
}

/// Asserts that an undisturbed run and a run that is killed `kills` times end with the same bytes. The moments are drawn from the whole
/// run: start of the ring, rollout, update, publication, checkpoint, evaluation.
fn assert_killed_at_any_moment_is_the_same(recipe: &'static str, overrides: &[&str], kills: u32) {
    let (whole, killed) = (Run::of(recipe), Run::of(recipe));
    let begin = Instant::now();
    whole.train(None, overrides).end(true);
    let life = begin.elapsed();
    // other moments in every run of the test; the seed repeats the moments up to the host's timing
    let seed = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .expect("a clock");
    let seed = seed.as_micros() as u64;
    let mut rng = stream(Purpose::SelfTest, seed, 0, 0, 0);
    for _ in 0..kills {
        // of the remaining time: a run resumes from its newest checkpoint
        let left = 1.0 - f64::from(killed.checkpoints().last().copied().unwrap_or(0)) / 4.0;
        if left == 0.0 {
            break;
        }
        let fraction = left * uniform(&mut rng);
        let last = killed.train(Some("auto"), overrides).kill_after(life.mul_f64(fraction));
        println!("{recipe}, seed {seed}: killed after {fraction:.3} of {life:.2?}, after `{last}`");
    }
    let log = killed.train(Some("auto"), overrides).end(true);
    println!("{recipe}: went on as `{}`", log.lines().next().unwrap_or_default());
    assert_eq!(whole.sha256(4), killed.sha256(4), "{recipe}, seed {seed}");
    assert_eq!(whole.checkpoints(), killed.checkpoints(), "{recipe}, seed {seed}");
    assert_eq!(whole.metrics(), killed.metrics(), "{recipe}, seed {seed}");
    let updates = whole
        .metrics()
        .iter()
        .filter_map(|line| line["updates"].as_f64())
        .sum::<f64>();
    assert!(updates > 0.0, "{recipe}: there was something to learn");
}

#[test]
fn a_run_that_was_killed_at_any_moment_gives_the_same_weights() {
    assert_killed_at_any_moment_is_the_same("quickstart.toml", &[], 5);
}

#[test]
fn other_formulations_killed_at_any_moment_give_the_same_weights() {
    assert_killed_at_any_moment_is_the_same("tabletop_flow_noise.toml", &[], 2);
    assert_killed_at_any_moment_is_the_same("tabletop_two_layer.toml", &[], 2);
}

/// Groups are ordered again until enough are mixed; a resumed run repeats the number of orders.
#[test]
fn a_run_that_samples_groups_again_gives_the_same_weights_when_killed() {
    let overrides = [
        // no critic
        "actor.optim.critic_warmup_epochs=0",
        "algorithm.group_size=4",
        "algorithm.filter_rewards={lower=0.1,upper=0.9,mode=\"resample\",max_rounds=3}",
        // an untrained policy sometimes succeeds with wide tolerances
        "env.params={image_size=32,grasp_tol=0.6,place_tol=0.6,max_episode_steps=40}",
    ];
    assert_killed_at_any_moment_is_the_same("tabletop_grpo.toml", &overrides, 2);
}

/// A reference policy that is a mean over the iterations is part of a checkpoint.
#[test]
fn a_reference_policy_goes_on_bit_for_bit() {
    let recipe = "tabletop_flow_ipo.toml";
    let (whole, killed) = (Run::of(recipe), Run::of(recipe));
    let no_critic = ["actor.optim.critic_warmup_epochs=0"];
    whole.train(None, &no_critic).end(true);
    killed.train(None, &no_critic).kill_at("iteration 3/4");
    killed.train(Some("auto"), &no_critic).end(true);
    assert_eq!(whole.sha256(4), killed.sha256(4));
    assert_eq!(whole.metrics(), killed.metrics());
    let optimizer = Tensor::read_safetensors(killed.checkpoint(4).join(OPTIMIZER)).expect("tensors");
    let reference = optimizer
        .iter()
        .filter(|(name, _)| name.starts_with("reference."))
        .count();
    assert!(reference > 0, "the checkpoint holds the reference");

    drop_tensor(&killed.checkpoint(4), OPTIMIZER, "reference.action_out_proj.weight");
    let from = killed.checkpoint(4).display().to_string();
    killed.assert_refused(
        Some(&from),
        &["runner.max_epochs=5", no_critic[0]],
        &["reference", "`action_out_proj.weight` is missing"],
    );
}

/// Replaces a file of a checkpoint by a file that lacks a tensor, with a valid digest, so that only the content is wrong.
fn drop_tensor(dir: &Path, file: &str, tensor: &str) {
    let path = dir.join(file);
    let mut tensors = Tensor::read_safetensors(&path).expect("tensors");
    tensors.sort_by(|a, b| a.0.cmp(&b.0));
    let before = tensors.len();
    tensors.retain(|(name, _)| name != tensor);
    assert_eq!(tensors.len() + 1, before, "`{tensor}` was there");
    Tensor::write_safetensors(&tensors, &path).expect("writing");
    let text = fs::read_to_string(dir.join(STATE)).expect("state");
    let mut state: checkpoint::State = serde_json::from_str(&text).expect("state");
    let entry = state.files.iter_mut().find(|f| f.name == file).expect("entry");
    *entry = describe_file(&path).expect("file");
    fs::write(dir.join(STATE), serde_json::to_string(&state).expect("state")).expect("state");
}

#[test]
fn what_cannot_be_resumed_from_is_refused_by_name_and_auto_takes_the_one_before() {
    let run = Run::new();
    let no_warm_up = "actor.optim.critic_warmup_epochs=0";
    let two = ["runner.max_epochs=2", "runner.val_check_interval=1", no_warm_up];
    let log = run.train(Some("auto"), &two).end(true);
    assert!(log.contains("no checkpoint in") && log.contains("begins anew"), "{log}");
    let want = run.sha256(2);
    let (first, second) = (run.checkpoint(1), run.checkpoint(2));
    let (older, newer) = (first.display().to_string(), second.display().to_string());

    run.assert_refused(None, &two, &["iteration_000002", "--resume auto"]);
    let other = [two[0], two[1], no_warm_up, "algorithm.gamma=0.5"];
    run.assert_refused(
        Some("auto"),
        &other,
        &["iteration_000002", "`algorithm.gamma` is 0.99 there, 0.5 here"],
    );
    let other = [two[0], two[1], no_warm_up, "actor.model.expert.mlp=64"];
    run.assert_refused(
        Some(&newer),
        &other,
        &["`actor.model.expert.mlp` is 128 there, 64 here"],
    );
    let other = ["runner.max_epochs=1", two[1], no_warm_up];
    run.assert_refused(
        Some("auto"),
        &other,
        &["it has 2 iterations", "`runner.max_epochs` is 1"],
    );
    run.assert_refused(Some(&older), &two, &["iteration_000002", "newer than"]);
    run.assert_refused(
        Some("nowhere/iteration_000009"),
        &two,
        &["nowhere/iteration_000009", STATE],
    );

    for (file, tensor) in [
        (MODEL, "action_out_proj.weight"),
        (OPTIMIZER, "actor.m.action_out_proj.weight"),
    ] {
        let whole = run.snapshot();
        drop_tensor(&second, file, tensor);
        let name = tensor.trim_start_matches("actor.");
        run.assert_refused(Some(&newer), &two, &["iteration_000002", file, name]);
        for name in [file, STATE] {
            fs::write(second.join(name), &whole[&second.join(name)]).expect("restoring the file");
        }
    }

    let path = second.join(MODEL);
    let mut bytes = fs::read(&path).expect("weights");
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&path, &bytes).expect("flipping a bit");
    run.assert_refused(Some(&newer), &two, &["iteration_000002", MODEL, "sha256", "damaged"]);
    fs::write(&path, &bytes[..middle]).expect("cutting");
    run.assert_refused(Some(&newer), &two, &["iteration_000002", MODEL, "bytes", "cut"]);
    let log = run.train(Some("auto"), &two).end(true);
    for part in ["WARN", "trying the one before", "resuming from", "iteration_000001"] {
        assert!(log.contains(part), "`{part}` is not in: {log}");
    }
    assert_eq!(run.sha256(2), want, "from the one before to the same weights");

    for iteration in run.checkpoints() {
        fs::remove_file(run.checkpoint(iteration).join(STATE)).expect("removing the state");
    }
    run.assert_refused(
        Some("auto"),
        &two,
        &["none of its", "checkpoints is whole", "begin anew"],
    );
}

/// With `rollout.fixed_batch` no bit of a row's chunk depends on the number of requested rows or on the row's place. Weights as graph
/// inputs and the expert critic are the cases that differ otherwise (a single row is multiplied as a vector).
#[test]
fn a_fixed_batch_makes_a_row_independent_of_its_neighbours() {
    for special in [
        vec![],
        vec!["rollout.weights=\"inputs\""],
        vec![
            "actor.model.value_head.input=\"expert\"",
            "actor.model.value_head.state=false",
        ],
    ] {
        let overrides = [special.as_slice(), &["rollout.fixed_batch=4"]].concat();
        let dir = tempfile::tempdir().expect("folder");
        let plan = plan(dir.path(), &overrides);
        let policy = network(&plan, 3);
        let hub = Hub::start("tcp://127.0.0.1:0").expect("hub");
        let engine = Engine::start(&plan, dir.path(), &hub.endpoint);
        let bundle = Publisher::new(&dir.path().join("policy"), &plan, None)
            .publish(&policy, 0)
            .expect("bundle");
        hub.announce(&bundle).expect("announce");
        let live = (0..600).any(|_| {
            let event = hub.next(Duration::from_millis(100)).expect("hub");
            matches!(event, Some(HubEvent::Reload(report)) if report.refused.is_none())
        });
        assert!(live, "the version did not go live");
        let runtime = tokio::runtime::Builder::new_current_thread()
            .enable_all()
            .build()
            .expect("runtime");
        runtime.block_on(async {
            let mut client = Client::connect(&engine.listen).await;
            let rows: Vec<ActRow> = (0..24).map(|n| row(&plan, n, Mode::Train)).collect();
            let mut act = async |rows: Vec<ActRow>| -> Vec<ChunkRecord> {
                let reply = client.act(1, rows).await;
                reply.rows.into_iter().map(|r| *r.record.expect("record")).collect()
            };
            let together = act(rows.clone()).await;
            for size in [1, 2, 3, 5, 7, 23] {
                let mut parts = Vec::new();
                for part in rows.chunks(size) {
                    parts.extend(act(part.to_vec()).await);
                }
                assert!(parts == together, "{overrides:?}: asked for by {size}");
            }
            let mut backwards = act(rows.iter().rev().cloned().collect()).await;
            backwards.reverse();
            assert!(backwards == together, "{overrides:?}: in another order");
        });
    }
}
