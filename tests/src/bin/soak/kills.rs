//! `soak kills`: kills a run's learner, engine and env worker at random moments and compares with an undisturbed run. Every iteration
//! occurs once, with all of its episodes, and the weights are equal bit for bit.

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant, SystemTime},
};

use clap::Args;
use integration_tests::{
    hostile::pause,
    ring::{fixed_endpoint, plan},
    standalone::{Programs, random_checkpoint},
};
use policy::{
    bundle::describe_file,
    noise::{Purpose, stream, uniform},
    params::Part,
};

use crate::shared::{Attacked, say, scratch};

/// Overrides for a run of seconds whose results do not depend on batching.
const TINY: [&str; 9] = [
    "env.train.total_num_envs=8",
    "env.eval.train_episodes=8",
    "runner.save_interval=1",
    "runner.launch=\"none\"",
    "actor.global_batch_size=40",
    "actor.micro_batch_size=20",
    "actor.optim.critic_warmup_epochs=1",
    "algorithm.update_epoch=2",
    "rollout.fixed_batch=8",
];
const NAMES: [&str; 3] = ["learner", "rollout-engine", "env-worker"];
/// Longest duration of a run.
const PATIENCE: Duration = Duration::from_mins(20);

/// The three processes of a run.
struct Run<'a> {
    programs: &'a Programs,
    dir: PathBuf,
    learner: String,
    engine: String,
    children: BTreeMap<&'static str, Child>,
}

impl<'a> Run<'a> {
    fn new(programs: &'a Programs, dir: &Path, iterations: usize) -> Self {
        let (learner, engine) = (fixed_endpoint(), fixed_endpoint());
        let epochs = format!("runner.max_epochs={iterations}");
        let (listen, serve) = (
            format!("learner.listen={learner:?}"),
            format!("rollout.listen={engine:?}"),
        );
        let sets: Vec<&str> = TINY.into_iter().chain([epochs.as_str(), &listen, &serve]).collect();
        std::fs::create_dir_all(dir).expect("creating the run's folder");
        let plan = plan(dir, &sets);
        random_checkpoint(&plan, &[Part::Vlm, Part::Expert], &dir.join("sft/model.safetensors"));
        std::fs::write(dir.join("soak.toml"), plan.config.to_toml().expect("toml")).expect("writing the configuration");
        Self {
            programs,
            dir: dir.to_owned(),
            learner,
            engine,
            children: BTreeMap::new(),
        }
    }

    fn start(&mut self, name: &'static str, again: bool) {
        let mut command = Command::new(self.programs.path(name));
        let config = self.dir.join("soak.toml");
        match name {
            "learner" => {
                command.arg("train").arg("--config").arg(config);
                if again {
                    command.args(["--resume", "auto"]);
                }
            }
            "rollout-engine" => {
                command
                    .arg("serve")
                    .arg("--config")
                    .arg(config)
                    .args(["--learner", &self.learner]);
                command.arg("--state-dir").arg(self.dir.join("engine"));
            }
            _ => {
                command.args(["serve", "--engine", &self.engine, "--num-envs", "8"]);
            }
        }
        let log = std::fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(self.dir.join(format!("{name}.log")))
            .expect("opening a log");
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn();
        self.children.insert(name, child.expect("starting a program"));
    }

    fn kill(&mut self, name: &str) {
        if let Some(mut child) = self.children.remove(name) {
            drop(child.kill());
            child.wait().expect("waiting for a child");
        }
    }

    /// Returns the learner's exit status; `None` while the learner runs.
    fn ended(&mut self) -> Option<bool> {
        let learner = self.children.get_mut("learner")?;
        let status = learner.try_wait().expect("asking for the state of a child")?;
        Some(status.success())
    }

    /// Returns the digest of the last checkpoint's weights and optimizer.
    fn digests(&self, iterations: usize) -> [String; 2] {
        let folder = checkpoint(&self.dir, iterations);
        ["model.safetensors", "optimizer.safetensors"]
            .map(|name| describe_file(&folder.join(name)).map_or_else(|error| error.to_string(), |file| file.sha256))
    }

    /// Returns the number of episodes of each training iteration, in the order of the log.
    fn episodes(&self) -> Vec<(u64, f64)> {
        let text = std::fs::read_to_string(self.dir.join("metrics.jsonl")).unwrap_or_default();
        text.lines()
            .filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok())
            .filter(|line| line["stage"] == "train")
            .map(|line| {
                let number = |key: &str| line[key].as_f64().unwrap_or(f64::NAN);
                (number("step") as u64, number("episodes"))
            })
            .collect()
    }
}

impl Drop for Run<'_> {
    fn drop(&mut self) {
        for name in NAMES {
            self.kill(name);
        }
    }
}

/// Returns the folder of the checkpoint after an iteration.
fn checkpoint(dir: &Path, iteration: usize) -> PathBuf {
    dir.join(format!("checkpoints/iteration_{iteration:06}"))
}

/// Arguments of `soak kills`.
#[derive(Debug, Args)]
pub(crate) struct KillsArgs {
    /// Number of processes to kill.
    #[arg(long, default_value_t = 18)]
    kills: u32,
    /// Number of iterations of the run.
    #[arg(long, default_value_t = 24)]
    iterations: usize,
    /// Seed of the moments and the killed processes; default: the current time.
    #[arg(long)]
    seed: Option<u64>,
    #[command(flatten)]
    attacked: Attacked,
}

/// Runs once undisturbed and once with kills, and returns whether the results are equal.
pub(crate) fn run(args: &KillsArgs) -> bool {
    let scratch = scratch();
    let programs = args.attacked.programs();
    let (kills, iterations) = (args.kills, args.iterations);
    let drawn = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    let seed = args.seed.unwrap_or(drawn.as_secs());
    let mut random = stream(Purpose::Reset, seed, 0, 0, 0);

    let mut whole = Run::new(&programs, &scratch.path().join("whole"), iterations);
    let begin = Instant::now();
    for name in NAMES {
        whole.start(name, false);
    }
    let good = loop {
        match whole.ended() {
            Some(good) => break good,
            None if begin.elapsed() > PATIENCE => break false,
            None => pause(Duration::from_millis(20)),
        }
    };
    let life = begin.elapsed();
    say(&format!(
        "undisturbed: {iterations} iterations in {:.1} s",
        life.as_secs_f64()
    ));
    if !good {
        say("FAILED: the undisturbed run did not end well");
        return false;
    }

    let mut killed = Run::new(&programs, &scratch.path().join("killed"), iterations);
    for name in NAMES {
        killed.start(name, false);
    }
    let begin = Instant::now();
    let mut counts = BTreeMap::new();
    let (mut done, mut next) = (0, Instant::now());
    let good = loop {
        if let Some(good) = killed.ended() {
            break good;
        }
        if begin.elapsed() > PATIENCE {
            break false;
        }
        if done < kills && Instant::now() >= next {
            if done > 0 || begin.elapsed() > Duration::from_millis(500) {
                let name = NAMES[(uniform(&mut random) * 3.0) as usize % 3];
                killed.kill(name);
                killed.start(name, true);
                *counts.entry(name).or_insert(0u32) += 1;
                done += 1;
            }
            let mean = life.as_secs_f64() / f64::from(kills.max(1));
            next = Instant::now() + Duration::from_secs_f64(mean * (0.4 + 0.8 * uniform(&mut random)));
        }
        pause(Duration::from_millis(10));
    };
    say(&format!(
        "killed: {done} kills {counts:?}, seed {seed}, ended after {:.1} s",
        begin.elapsed().as_secs_f64()
    ));
    let mut failed = Vec::new();
    if done < kills {
        failed.push(format!(
            "the run ended before all of {kills} kills: give it more iterations"
        ));
    }
    if !good {
        failed.push("the run did not end well".to_owned());
    }
    let expected = whole.episodes();
    if expected.len() != iterations || killed.episodes() != expected {
        failed.push(format!(
            "episodes by iteration: {:?}, expected {expected:?}",
            killed.episodes()
        ));
    }
    let (a, b) = (whole.digests(iterations), killed.digests(iterations));
    if a != b {
        failed.push(format!("digests {b:?}, expected {a:?}"));
    }
    for reason in &failed {
        say(&format!("FAILED: {reason}"));
    }
    if failed.is_empty() {
        say(&format!(
            "every iteration has its episodes once; weights and optimizer are the same bit for bit: {}",
            a[0]
        ));
    }
    failed.is_empty()
}
