//! A real engine process, real sockets and small real policies for the tests of the ring.

use std::{
    path::{Path, PathBuf},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use policy::{config::RunConfig, noise::NoiseKey, plan::RunPlan};
use wire::{
    array::Array,
    messages::{ActReply, ActRequest, ActRow, FromEngine, Mode, Observation, ToEngine},
    socket::{DealerReceiver, DealerSender, connect_dealer},
};

/// The quickstart's configuration with these overrides, output into `dir`.
pub fn plan(dir: &Path, overrides: &[&str]) -> RunPlan {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/quickstart.toml");
    let mut all: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
    all.push(format!("runner.output_dir={:?}", dir.display().to_string()));
    RunPlan::new(RunConfig::load(&path, &all).expect("quickstart configuration")).expect("plan")
}

/// An address whose port was free a moment ago, for a program that must come back under the same one.
pub fn fixed_endpoint() -> String {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    format!("tcp://{}", listener.local_addr().expect("address"))
}

/// A program of this workspace, built by the same command as the tests.
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

/// An engine process that is taken down with the test.
pub struct Engine {
    child: Child,
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
        let log = std::fs::File::create(dir.join("engine.log")).expect("log");
        let child = Command::new(program("rollout-engine"))
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
            .stderr(log)
            .spawn()
            .expect("starting the engine");
        let mut engine = Self {
            child,
            listen: String::new(),
            http: String::new(),
        };
        let begin = Instant::now();
        while begin.elapsed() < Duration::from_mins(1) {
            if let Ok(text) = std::fs::read_to_string(&endpoints) {
                let value: serde_json::Value = serde_json::from_str(&text).expect("endpoints file");
                value["listen"].as_str().expect("listen").clone_into(&mut engine.listen);
                value["http"].as_str().expect("http").clone_into(&mut engine.http);
                return engine;
            }
            assert!(
                engine.child.try_wait().expect("engine").is_none(),
                "the engine ended: {}",
                Self::log(dir)
            );
            std::thread::yield_now();
        }
        panic!("the engine opened no endpoint: {}", Self::log(dir));
    }

    /// What the engine of this folder has logged.
    pub fn log(dir: &Path) -> String {
        std::fs::read_to_string(dir.join("engine.log")).unwrap_or_default()
    }

    /// Process number.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Ends it without a chance to say farewell.
    pub fn kill(&mut self) {
        self.child.kill().expect("killing the engine");
        self.child.wait().expect("waiting for the engine");
    }

    /// Waits for the end and returns whether it was a success.
    pub fn wait(&mut self) -> bool {
        self.child.wait().expect("waiting for the engine").success()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        if self.child.try_wait().is_ok_and(|s| s.is_none()) {
            self.kill();
        }
    }
}

/// An env worker process that is taken down with the test.
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

/// A client of the engine, as a robot is one.
pub struct Client {
    send: DealerSender,
    receive: DealerReceiver,
}

impl Client {
    /// Connects.
    pub async fn connect(engine: &str) -> Self {
        let (send, receive) = connect_dealer(engine).await.expect("connecting to the engine");
        Self { send, receive }
    }

    /// Sends a message.
    pub async fn send(&mut self, message: &ToEngine) {
        self.send.send(message).await.expect("sending");
    }

    /// The next message, within a minute.
    pub async fn receive(&mut self) -> FromEngine {
        let next = tokio::time::timeout(Duration::from_mins(1), self.receive.receive::<FromEngine>());
        next.await
            .expect("the engine answers within a minute")
            .expect("receiving")
    }

    /// One request, one answer.
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

/// A deterministic observation of the tabletop's sizes, different for each number.
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

/// A row of a request.
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
