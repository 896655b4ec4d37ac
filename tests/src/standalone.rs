//! Programs with a random policy and without training: an engine without a learner, and a learner without an engine.

use std::{
    borrow::Cow,
    path::{Path, PathBuf},
    process::{Child, Command, ExitStatus, Stdio},
    time::{Duration, Instant},
};

use policy::{
    bundle::write_weights,
    noise::{Purpose, fill_normal, stream},
    params::{ParamSpec, Part, params},
    plan::RunPlan,
    weights::{Weights, WeightsError},
};

use crate::{
    hostile::{open, pause},
    probe::{file_bytes, healthy},
    ring::program,
};

/// Standard deviation of the random weights: small, so that every activation stays finite.
const SCALE: f32 = 0.05;
/// Interval between two checks of a wait.
const POLL: Duration = Duration::from_millis(5);

/// Folder of the programs under test.
#[derive(Debug, Clone, Default)]
pub struct Programs(Option<PathBuf>);

impl Programs {
    /// Finds the programs in `folder`, otherwise in `PIRL_PROGRAMS`, otherwise in this executable's folder.
    pub fn new(folder: Option<&str>) -> Self {
        let set = std::env::var_os("PIRL_PROGRAMS").filter(|value| !value.is_empty());
        Self(folder.map(PathBuf::from).or(set.map(PathBuf::from)))
    }

    /// Returns the path of a program.
    pub fn path(&self, name: &str) -> PathBuf {
        self.0
            .as_ref()
            .map_or_else(|| program(name), |folder| folder.join(name))
    }
}

/// Seeded random weights of these parameters.
#[derive(Debug)]
struct Random(Vec<ParamSpec>);

impl Weights for Random {
    fn values(&self, spec: &ParamSpec) -> Result<Cow<'_, [f32]>, WeightsError> {
        let number = self.0.iter().position(|known| known == spec).expect("a known weight") as u64;
        let mut values = vec![0.0; spec.shape.iter().product()];
        fill_normal(&mut stream(Purpose::Init, 1, number, 0, 0), &mut values);
        for value in &mut values {
            *value *= SCALE;
        }
        Ok(Cow::Owned(values))
    }
}

/// Writes a checkpoint of seeded random weights of these parts.
pub fn random_checkpoint(plan: &RunPlan, parts: &[Part], path: &Path) {
    let specs: Vec<ParamSpec> = params(&plan.dims, &plan.heads)
        .into_iter()
        .filter(|spec| parts.contains(&spec.part))
        .collect();
    write_weights(path, &specs, &Random(specs.clone())).expect("writing the checkpoint");
}

/// Writes `config.toml` of the plan into `dir` and returns its path.
fn config_file(plan: &RunPlan, dir: &Path) -> PathBuf {
    let path = dir.join("config.toml");
    std::fs::write(&path, plan.config.to_toml().expect("toml")).expect("writing the configuration");
    path
}

/// Exports a bundle of random weights into `dir/bundle` and returns its path; reuses the bundle of an earlier call.
pub fn random_bundle(programs: &Programs, plan: &RunPlan, dir: &Path) -> PathBuf {
    let out = dir.join("bundle");
    if out.exists() {
        return out;
    }
    let checkpoint = dir.join("random.safetensors");
    let all = [Part::Vlm, Part::Expert, Part::NoiseHead, Part::ValueHead];
    random_checkpoint(plan, &all, &checkpoint);
    let done = Command::new(programs.path("export"))
        .args(["onnx", "--config"])
        .arg(config_file(plan, dir))
        .arg("--checkpoint")
        .arg(&checkpoint)
        .arg("--out")
        .arg(&out)
        .output()
        .expect("starting `export`");
    assert!(
        done.status.success(),
        "`export onnx` failed: {}",
        String::from_utf8_lossy(&done.stderr)
    );
    out
}

/// Resource limits of a started program.
#[derive(Debug, Clone, Copy, Default)]
pub struct Limits {
    /// Open file descriptors (`ulimit -n`).
    pub descriptors: Option<u64>,
    /// Bytes of address space (`ulimit -v`): protects the host from a program with unbounded memory.
    pub address_space: Option<u64>,
}

/// Returns a command that starts a program with limits, in the same process.
pub fn limited(program: &Path, limits: Limits) -> Command {
    let limit = |flag: char, value: Option<u64>| {
        value.map_or_else(String::new, |value| format!("ulimit -{flag} {value} || exit 97; "))
    };
    let mut script = limit('n', limits.descriptors);
    script.push_str(&limit('v', limits.address_space.map(|bytes| bytes >> 10)));
    // with util-linux installed, the program ends with its parent, even if the parent is killed
    script.push_str("command -v setpriv >/dev/null && exec setpriv --pdeathsig KILL \"$@\"; exec \"$@\"");
    let mut command = Command::new("sh");
    command.arg("-c").arg(script).arg("sh").arg(program);
    command
}

/// Returns a command that starts a program with an attacker's descriptors (8,192, or the system's limit), in the same process.
/// The soft limit of many systems is 1,024.
pub fn many_descriptors(program: &Path) -> Command {
    let mut command = Command::new("sh");
    let script = "ulimit -n 8192 2>/dev/null || ulimit -n $(ulimit -H -n); exec \"$@\"";
    command.arg("-c").arg(script).arg("sh").arg(program);
    command
}

/// Opens an empty log in append mode, so that the file can be emptied while the program writes.
fn log_file(path: &Path) -> std::fs::File {
    drop(std::fs::remove_file(path));
    let mut options = std::fs::OpenOptions::new();
    options.append(true).create(true).open(path).expect("creating the log")
}

/// A program under test, which ends when this value is dropped.
#[derive(Debug)]
pub struct Server {
    child: Child,
    ended: Option<ExitStatus>,
    /// Endpoint for clients of an engine, or for engines of a learner.
    pub listen: String,
    /// `HOST:PORT` of an engine's HTTP pages; `None` for a learner.
    pub http: Option<String>,
    /// `HOST:PORT` of an engine's websockets, if it has such an endpoint.
    pub websocket: Option<String>,
    /// Log file.
    pub log: PathBuf,
}

impl Server {
    /// Starts an engine with a random policy, without a learner, on free ports; `dir` holds its bundle, log and state.
    pub fn engine(programs: &Programs, plan: &RunPlan, dir: &Path, limits: Limits) -> Self {
        let bundle = random_bundle(programs, plan, dir);
        Self::engine_of(&programs.path("rollout-engine"), &bundle, plan, dir, limits)
    }

    /// Starts this engine with this bundle, without a learner, on free ports; `dir` holds its log and state.
    pub fn engine_of(program: &Path, bundle: &Path, plan: &RunPlan, dir: &Path, limits: Limits) -> Self {
        Self::engine_with(program, bundle, plan, dir, limits, &[])
    }

    /// Starts an engine like [`Server::engine_of`], with more arguments of `serve`.
    pub fn engine_with(
        program: &Path,
        bundle: &Path,
        plan: &RunPlan,
        dir: &Path,
        limits: Limits,
        arguments: &[&str],
    ) -> Self {
        let endpoints = dir.join("endpoints.json");
        drop(std::fs::remove_file(&endpoints));
        let log = dir.join("engine.log");
        let file = log_file(&log);
        let mut command = limited(program, limits);
        command
            .args(["serve", "--standalone", "--config"])
            .arg(config_file(plan, dir))
            .arg("--bundle")
            .arg(bundle)
            .arg("--state-dir")
            .arg(dir.join("engine"))
            .arg("--endpoints-file")
            .arg(&endpoints)
            .args(arguments);
        let mut server = Self::spawn(command, file, log);
        server.wait_for("endpoints", |server| {
            let Ok(text) = std::fs::read_to_string(&endpoints) else {
                return false;
            };
            let value: serde_json::Value = serde_json::from_str(&text).expect("endpoints file");
            value["listen"].as_str().expect("listen").clone_into(&mut server.listen);
            server.http = Some(value["http"].as_str().expect("http").to_owned());
            server.websocket = value["websocket"].as_str().map(str::to_owned);
            true
        });
        let http = server.http.clone().expect("an engine has pages");
        server.wait_for("/healthz", |_| healthy(&http, Duration::from_secs(1)));
        server
    }

    /// Starts `learner train` from random supervised weights, without engine and env workers, on a free port; `dir` holds its log and output.
    pub fn learner(programs: &Programs, plan: &RunPlan, dir: &Path, limits: Limits) -> Self {
        let output = dir.join("run");
        drop(std::fs::remove_dir_all(&output));
        random_checkpoint(plan, &[Part::Vlm, Part::Expert], &output.join("sft/model.safetensors"));
        let listen = crate::ring::fixed_endpoint();
        let log = dir.join("learner.log");
        let file = log_file(&log);
        let mut command = limited(&programs.path("learner"), limits);
        command.args(["train", "--config"]).arg(config_file(plan, dir));
        for (key, value) in [
            ("runner.launch", "none"),
            ("runner.output_dir", &output.display().to_string()),
            ("learner.listen", &listen),
        ] {
            command.arg("--set").arg(format!("{key}={value:?}"));
        }
        let mut server = Self::spawn(command, file, log);
        server.wait_for("endpoint", |_| open(&listen, Duration::from_secs(1)).is_ok());
        server.listen = listen;
        server
    }

    fn spawn(mut command: Command, file: std::fs::File, log: PathBuf) -> Self {
        // the line that names a failure, not the stack trace below
        let child = command
            .env_remove("RUST_BACKTRACE")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(file)
            .spawn()
            .expect("starting the program");
        Self {
            child,
            ended: None,
            listen: String::new(),
            http: None,
            websocket: None,
            log,
        }
    }

    fn wait_for(&mut self, what: &str, mut there: impl FnMut(&mut Self) -> bool) {
        let begin = Instant::now();
        while !there(self) {
            let ended = self.ended();
            assert!(
                ended.is_none() && begin.elapsed() < Duration::from_mins(1),
                "failed to wait for the {what} of a program (ended: {ended:?}); its log: {}",
                self.log_tail()
            );
            pause(POLL);
        }
    }

    /// Returns the process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Returns the exit status; `None` while the process runs.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("asking for the state of a child");
        }
        self.ended
    }

    /// Returns the size of the log in bytes.
    pub fn log_bytes(&self) -> u64 {
        file_bytes(&self.log)
    }

    /// Empties the log.
    pub fn empty_log(&self) {
        let file = std::fs::OpenOptions::new().write(true).open(&self.log);
        file.and_then(|file| file.set_len(0)).expect("emptying the log");
    }

    /// Returns the last bytes of the log, control characters escaped.
    pub fn log_tail(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        let tail = bytes.get(bytes.len().saturating_sub(1000)..).unwrap_or_default();
        String::from_utf8_lossy(tail).escape_debug().to_string()
    }

    /// Sends SIGTERM and returns the time to the end. Kills the process and returns `None` after `patience`.
    pub fn terminate(&mut self, patience: Duration) -> Option<Duration> {
        let begin = Instant::now();
        if self.ended().is_none() {
            signal("TERM", self.pid());
        }
        while self.ended().is_none() {
            if begin.elapsed() > patience {
                self.kill();
                return None;
            }
            pause(POLL);
        }
        Some(begin.elapsed())
    }

    /// Kills the process.
    pub fn kill(&mut self) {
        if self.ended().is_none() {
            self.child.kill().expect("killing a child");
            self.ended = Some(self.child.wait().expect("waiting for a child"));
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}

/// Sends a signal to a process by name (`TERM`, `STOP`, `CONT`).
pub fn signal(name: &str, pid: u32) {
    // the shell's own `kill`: calling the system directly would need unsafe code
    let sent = Command::new("sh").arg("-c").arg(format!("kill -{name} {pid}")).status();
    sent.expect("starting `sh`");
}

/// Stops a child process by SIGSTOP and returns when all its threads are stopped.
///
/// # Panics
/// The process is not a child of this one.
pub fn stop(pid: u32) {
    signal("STOP", pid);
    let pid = rustix::process::Pid::from_raw(pid as i32).expect("a process number");
    rustix::process::waitpid(Some(pid), rustix::process::WaitOptions::UNTRACED).expect("a child that stops");
}
