//! `launch = "local"`: engine and env workers as child processes with logs, terminated with this process.

use std::{
    fs::File,
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use policy::config::{EnvConfig, WorkerKind};
use policy::plan::RunPlan;

use super::native;
use crate::error::{LearnerError, Result, io};

/// Time for a child to finish after SIGTERM.
const GRACE: Duration = Duration::from_secs(8);
/// Time for the engine to open its endpoints.
const START: Duration = Duration::from_mins(1);
/// Interval between two polls.
const POLL: Duration = Duration::from_millis(20);
/// Number of a log's last lines that an error shows.
const TAIL_LINES: usize = 20;

struct Running {
    name: String,
    log: PathBuf,
    child: Child,
}

/// Child processes of a run; dropping this value terminates all child processes.
#[derive(Default)]
pub struct Children {
    running: Vec<Running>,
}

impl std::fmt::Debug for Children {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.running.iter().map(|r| &r.name)).finish()
    }
}

/// Returns the path of a program of this release, in the folder of this executable.
fn sibling(name: &str) -> Result<PathBuf> {
    let own = std::env::current_exe().map_err(io("finding this executable", Path::new("learner")))?;
    // a test binary is one folder deeper
    let found = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|dir| dir.join(name))
        .find(|path| path.is_file());
    found.ok_or_else(|| LearnerError::NoProgram {
        name: name.to_owned(),
        own,
    })
}

/// Returns a command of the Python that has the simulator, with the worker package on `PYTHONPATH`.
fn python(env: &EnvConfig) -> Result<Command> {
    let own = std::env::current_exe().map_err(io("finding this executable", Path::new("learner")))?;
    let root = own
        .ancestors()
        .find(|dir| dir.join("crates/envs/python").is_dir())
        .ok_or(LearnerError::NoPython)?;
    let (interpreter, remedy) = match &env.python {
        Some(path) => (
            path.clone(),
            "`env.python` names it: configs/README.md says how it is made",
        ),
        None => (
            root.join(".deps/metaworld-venv/bin/python"),
            "run scripts/setup-metaworld",
        ),
    };
    if !interpreter.is_file() {
        return Err(LearnerError::NoFile {
            path: interpreter,
            remedy,
        });
    }
    let mut command = Command::new(interpreter);
    command
        .env("PYTHONPATH", root.join("crates/envs/python"))
        .arg("-m")
        .arg("pirl_env_worker");
    Ok(command)
}

fn tail(log: &Path) -> String {
    let text = std::fs::read_to_string(log).unwrap_or_default();
    let lines: Vec<&str> = text.lines().collect();
    lines
        .get(lines.len().saturating_sub(TAIL_LINES)..)
        .unwrap_or_default()
        .join("\n")
}

/// Returns the environment's parameters as JSON for the Python worker, as TOML for the Rust worker.
fn params(kind: WorkerKind, table: &toml::Table) -> Result<String> {
    match kind {
        WorkerKind::Rust => toml::to_string(table).map_err(|e| LearnerError::Params(e.into())),
        WorkerKind::Python => serde_json::to_string(table).map_err(|e| LearnerError::Params(e.into())),
    }
}

impl Children {
    fn spawn(&mut self, name: &str, mut command: Command, log: &Path) -> Result<()> {
        if let Some(dir) = log.parent() {
            std::fs::create_dir_all(dir).map_err(io("creating the folder", dir))?;
        }
        let out = File::create(log).map_err(io("creating the log", log))?;
        let err = out.try_clone().map_err(io("opening the log", log))?;
        command.stdin(Stdio::null()).stdout(out).stderr(err);
        native::die_with_parent(&mut command);
        let child = command.spawn().map_err(io("starting", Path::new(name)))?;
        self.running.push(Running {
            name: name.to_owned(),
            log: log.to_owned(),
            child,
        });
        Ok(())
    }

    /// Starts the engine, waits until its endpoints are open, and returns the endpoint for env workers.
    ///
    /// # Errors
    /// The engine cannot be started, ends, or opens no endpoints in time; the error carries the end of the log.
    pub fn engine(&mut self, config: &Path, learner: &str, dir: &Path) -> Result<String> {
        let endpoints = dir.join("engine").join("endpoints.json");
        if endpoints.exists() {
            std::fs::remove_file(&endpoints).map_err(io("removing", &endpoints))?;
        }
        let mut command = Command::new(sibling("rollout-engine")?);
        command
            .arg("serve")
            .arg("--config")
            .arg(config)
            .arg("--learner")
            .arg(learner);
        command
            .arg("--endpoints-file")
            .arg(&endpoints)
            .arg("--state-dir")
            .arg(dir.join("engine"));
        self.spawn("rollout-engine", command, &dir.join("logs/rollout-engine.log"))?;
        let begin = Instant::now();
        loop {
            self.check()?;
            if let Ok(text) = std::fs::read_to_string(&endpoints) {
                let listen = serde_json::from_str::<serde_json::Value>(&text)
                    .ok()
                    .and_then(|v| v.get("listen").and_then(|l| l.as_str().map(str::to_owned)));
                return listen.ok_or_else(|| LearnerError::Endpoints(endpoints.clone()));
            }
            if begin.elapsed() > START {
                return Err(LearnerError::Silence {
                    waiting_for: "the engine's endpoints".to_owned(),
                    seconds: START.as_secs(),
                    state: tail(&dir.join("logs/rollout-engine.log")),
                });
            }
            wait(POLL);
        }
    }

    /// Starts the env workers.
    ///
    /// # Errors
    /// A worker cannot be started.
    pub fn workers(&mut self, plan: &RunPlan, engine: &str, dir: &Path) -> Result<()> {
        let env = &plan.config.env;
        let (total, workers) = (env.train.total_num_envs, env.train.workers);
        for worker in 0..workers {
            let slots = total * (worker + 1) / workers - total * worker / workers;
            let name = format!("env-worker-{worker}");
            let mut command = match env.worker {
                WorkerKind::Rust => Command::new(sibling("env-worker")?),
                WorkerKind::Python => python(env)?,
            };
            command
                .arg("serve")
                .arg("--engine")
                .arg(engine)
                .arg("--env")
                .arg(&env.name);
            command.arg("--params").arg(params(env.worker, &env.params)?);
            command
                .arg("--num-envs")
                .arg(slots.to_string())
                .arg("--name")
                .arg(&name);
            self.spawn(&name, command, &dir.join(format!("logs/{name}.log")))?;
        }
        Ok(())
    }

    /// Writes a data set: runs `env-worker` or the Python worker to its end.
    ///
    /// # Errors
    /// The worker fails; the error carries the end of the log.
    pub fn write_data(&mut self, plan: &RunPlan, what: &str, args: &[String], dir: &Path) -> Result<()> {
        let env = &plan.config.env;
        let mut table = env.params.clone();
        let mut flaws = Vec::new();
        if what == "demos" {
            match env.worker {
                WorkerKind::Rust => table.extend(env.demo_params.clone()),
                // the Python worker takes the demonstrator's parameters as options
                WorkerKind::Python => {
                    for (name, value) in &env.demo_params {
                        let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                        flaws.push(format!("--{name}={value}"));
                    }
                }
            }
        }
        let mut command = match env.worker {
            WorkerKind::Rust => Command::new(sibling("env-worker")?),
            WorkerKind::Python => {
                let mut command = python(env)?;
                command.arg(what).arg("--env").arg(&env.name);
                command
            }
        };
        if env.worker == WorkerKind::Rust {
            command.arg(what);
        }
        command
            .arg("--params")
            .arg(params(env.worker, &table)?)
            .args(args)
            .args(flaws);
        let name = format!("env-worker {what}");
        self.spawn(&name, command, &dir.join(format!("logs/{what}.log")))?;
        let Some(mut running) = self.running.pop() else {
            return Ok(());
        };
        let status = running.child.wait().map_err(io("waiting for", Path::new(&name)))?;
        if status.success() {
            return Ok(());
        }
        Err(LearnerError::Child {
            name,
            what: format!("ended with {status}"),
            tail: tail(&running.log),
            log: running.log,
        })
    }

    /// Checks that all children still run.
    ///
    /// # Errors
    /// A child has ended; no child is restarted.
    pub fn check(&mut self) -> Result<()> {
        for running in &mut self.running {
            if let Some(status) = running
                .child
                .try_wait()
                .map_err(io("looking after", Path::new(&running.name)))?
            {
                return Err(LearnerError::Child {
                    name: running.name.clone(),
                    what: format!("ended with {status}"),
                    tail: tail(&running.log),
                    log: running.log.clone(),
                });
            }
        }
        Ok(())
    }
}

/// Sleeps between two polls of a child, because the start of a child sends no event.
#[expect(clippy::disallowed_methods, reason = "a child's start can only be polled")]
fn wait(pause: Duration) {
    std::thread::sleep(pause);
}

impl Drop for Children {
    fn drop(&mut self) {
        // workers first, so that the engine has nothing left to finish
        for running in self.running.iter().rev() {
            native::terminate(running.child.id());
        }
        let begin = Instant::now();
        for running in &mut self.running {
            loop {
                match running.child.try_wait() {
                    Ok(None) if begin.elapsed() < GRACE => wait(POLL),
                    Ok(None) => {
                        tracing::warn!("{} did not finish in {} s and is killed", running.name, GRACE.as_secs());
                        if let Err(error) = running.child.kill().and_then(|()| running.child.wait().map(drop)) {
                            tracing::warn!("{} could not be killed: {error}", running.name);
                        }
                        break;
                    }
                    Ok(Some(_)) | Err(_) => break,
                }
            }
        }
    }
}
