//! An engine process, sockets and small policies for the tests of the ring.

use std::{
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread::{self, JoinHandle},
    time::Duration,
};

use policy::{config::RunConfig, noise::NoiseKey, plan::RunPlan};
use wire::{
    array::Array,
    messages::{ActReply, ActRequest, ActRow, FromEngine, Mode, Observation, ToEngine},
    socket::{DealerReceiver, DealerSender, connect_dealer},
};

/// Returns the quickstart's plan with these overrides and with its output in `dir`.
pub fn plan(dir: &Path, overrides: &[&str]) -> RunPlan {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/quickstart.toml");
    let mut all: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
    all.push(format!("runner.output_dir={:?}", dir.display().to_string()));
    RunPlan::new(RunConfig::load(&path, &all).expect("quickstart configuration")).expect("plan")
}

/// Returns an endpoint whose port was free a moment ago, for a program that restarts under the same address.
pub fn fixed_endpoint() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    format!("tcp://{}", listener.local_addr().expect("address"))
}

/// Returns the path of a program of this workspace, built by the same command as the tests.
pub fn program(name: &str) -> PathBuf {
    let own = std::env::current_exe().expect("own path");
    let found = own
        .ancestors()
        .skip(1)
        .take(2)
        .map(|d| d.join(name))
        .find(|p| p.is_file());
    found.unwrap_or_else(|| panic!("`{name}` is not built; run scripts/setup"))
}

/// Log text of an engine whose endpoints are open and in their file.
const LISTENS: &str = " listens on ";
/// Longest time from the start of an engine to the log line of its open endpoints.
const START: Duration = Duration::from_mins(1);

/// An engine process that ends with the test.
pub struct Engine {
    child: Child,
    /// Thread that copies the log to its file until the process ends.
    copy: Option<JoinHandle<()>>,
    /// Endpoint for clients and env workers.
    pub listen: String,
    /// `HOST:PORT` of `/healthz` and `/metrics`.
    pub http: String,
}

impl Engine {
    /// Starts `rollout-engine serve` for a plan; `learner` is the hub's endpoint.
    pub fn start(plan: &RunPlan, dir: &Path, learner: &str) -> Self {
        let config = dir.join("config.toml");
        std::fs::write(&config, plan.config.to_toml().expect("toml")).expect("writing the configuration");
        let endpoints = dir.join("endpoints.json");
        if endpoints.exists() {
            std::fs::remove_file(&endpoints).expect("removing the endpoints of an earlier engine");
        }
        let file = File::create(dir.join("engine.log")).expect("log");
        let mut child = Command::new(program("rollout-engine"))
            .arg("serve")
            .arg("--config")
            .arg(&config)
            .arg("--learner")
            .arg(learner)
            .arg("--state-dir")
            .arg(dir.join("engine"))
            .arg("--endpoints-file")
            .arg(&endpoints)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("starting the engine");
        let log = child.stderr.take().expect("a pipe");
        let (open, opened) = mpsc::channel();
        let mut engine = Self {
            child,
            copy: Some(thread::spawn(move || copy_log(log, file, &open))),
            listen: String::new(),
            http: String::new(),
        };
        // an error if the engine ends first
        let opened = opened.recv_timeout(START);
        assert!(
            opened.is_ok(),
            "the engine opened no endpoint ({opened:?}): {}",
            Self::log(dir)
        );
        let text = std::fs::read_to_string(&endpoints).expect("endpoints file");
        let value: serde_json::Value = serde_json::from_str(&text).expect("endpoints file");
        value["listen"].as_str().expect("listen").clone_into(&mut engine.listen);
        value["http"].as_str().expect("http").clone_into(&mut engine.http);
        engine
    }

    /// Returns the log of the engine of this folder.
    pub fn log(dir: &Path) -> String {
        std::fs::read_to_string(dir.join("engine.log")).unwrap_or_default()
    }

    /// Returns the process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills the engine by SIGKILL, so that no message is sent.
    pub fn kill(&mut self) {
        self.child.kill().expect("killing the engine");
        self.wait();
    }

    /// Waits for the end of the process and of its log, and returns whether the exit code is 0.
    pub fn wait(&mut self) -> bool {
        let status = self.child.wait().expect("waiting for the engine");
        if let Some(copy) = self.copy.take() {
            copy.join().expect("copying the log");
        }
        status.success()
    }
}

/// Copies a log to its file, line by line, and reports when the endpoints are open.
fn copy_log(log: impl Read, mut file: File, open: &mpsc::Sender<()>) {
    for line in BufReader::new(log).split(b'\n') {
        let line = line.expect("reading the engine's log");
        file.write_all(&[&line[..], b"\n"].concat()).expect("writing the log");
        if String::from_utf8_lossy(&line).contains(LISTENS) {
            // the receiver has stopped waiting if the line is late
            let _late = open.send(());
        }
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|s| s.is_none()) {
            self.kill();
        }
    }
}

/// An env worker process that ends with the test.
pub struct Worker(Child);

impl Worker {
    /// Starts `env-worker serve` with tabletop slots.
    pub fn start(engine: &str, slots: usize) -> Self {
        let child = Command::new(program("env-worker"))
            .args(["serve", "--engine", engine, "--num-envs", &slots.to_string()])
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("starting the env worker");
        Self(child)
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.0.kill().expect("killing the env worker");
        self.0.wait().expect("waiting for the env worker");
    }
}

/// A client of the engine, such as a robot.
pub struct Client {
    send: DealerSender,
    receive: DealerReceiver,
}

impl Client {
    /// Connects to the engine.
    pub async fn connect(engine: &str) -> Self {
        let (send, receive) = connect_dealer(engine).await.expect("connecting to the engine");
        Self { send, receive }
    }

    /// Sends a message.
    pub async fn send(&mut self, message: &ToEngine) {
        self.send.send(message).await.expect("sending");
    }

    /// Returns the next message, within a minute.
    pub async fn receive(&mut self) -> FromEngine {
        let next = tokio::time::timeout(Duration::from_mins(1), self.receive.receive::<FromEngine>());
        next.await
            .expect("the engine answers within a minute")
            .expect("receiving")
    }

    /// Sends one request and returns the answer.
    pub async fn act(&mut self, request: u64, rows: Vec<ActRow>) -> ActReply {
        self.send(&ToEngine::Act(ActRequest { request, rows })).await;
        match self.receive().await {
            FromEngine::Acted(reply) => {
                assert_eq!(reply.request, request);
                reply
            }
            other => panic!("expected an answer, got {other:?}"),
        }
    }
}

/// Returns a deterministic observation of the tabletop's sizes, different for each number.
pub fn observation(plan: &RunPlan, number: u64) -> Observation {
    let side = plan.dims.vision.image_size;
    let mut bytes = vec![0.0f32; side * side * 3];
    let mut rng = policy::noise::stream(policy::noise::Purpose::Reset, 99, number, 0, 0);
    policy::noise::fill_normal(&mut rng, &mut bytes);
    let pixels = bytes
        .iter()
        .map(|v| (128.0 + 60.0 * v).clamp(0.0, 255.0) as u8)
        .collect();
    let colour = ["red", "green", "blue"][number as usize % 3];
    Observation {
        images: vec![Some(Array::u8(&[side, side, 3], pixels))],
        state: vec![0.1 * (number % 7) as f32, -0.2, 1.0, -1.0],
        prompt: format!("pick {colour}"),
    }
}

/// Returns a row of a request.
pub fn row(plan: &RunPlan, number: u64, mode: Mode) -> ActRow {
    let key = NoiseKey {
        seed: 5,
        env: number as u32,
        episode: number / 3,
        chunk: (number % 4) as u32,
    };
    ActRow {
        observation: observation(plan, number),
        key,
        mode,
        record: true,
        guidance: None,
    }
}
