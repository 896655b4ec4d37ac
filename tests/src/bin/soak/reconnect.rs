//! `soak reconnect`: time until an env worker and an engine reconnect when the other side returns after an absence.

use std::{
    io::{ErrorKind, Read},
    net::{TcpListener, TcpStream},
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

use clap::Args;
use integration_tests::{hostile::pause, ring::fixed_endpoint};

use crate::shared::{Attacked, plan, say, scratch};

/// Longest accepted time from the return of the other side to a connection.
const ALLOWED: Duration = Duration::from_secs(2);
/// Longest wait for a connection.
const PATIENCE: Duration = Duration::from_secs(30);

/// Listens on an address and returns the time to a peer's greeting; `None` without a greeting.
fn greeted(address: &str) -> Option<Duration> {
    let listener = TcpListener::bind(address).expect("the port is free again");
    listener.set_nonblocking(true).expect("a socket");
    let begin = Instant::now();
    while begin.elapsed() < PATIENCE {
        match listener.accept() {
            Ok((stream, _)) if greets(&stream) => return Some(begin.elapsed()),
            // connection of an attempt that has already ended
            Ok(_) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::WouldBlock, "{error}"),
        }
        pause(Duration::from_millis(1));
    }
    None
}

fn greets(mut stream: &TcpStream) -> bool {
    stream.set_nonblocking(false).expect("a socket");
    stream.set_read_timeout(Some(PATIENCE)).expect("a socket");
    let mut greeting = [0u8; 64];
    stream.read_exact(&mut greeting).is_ok() && greeting[0] == 0xff
}

/// A program that ends when this value is dropped.
struct Running(Child);

impl Drop for Running {
    fn drop(&mut self) {
        self.0.kill().expect("killing a child");
        self.0.wait().expect("waiting for a child");
    }
}

/// Arguments of `soak reconnect`.
#[derive(Debug, Args)]
pub(crate) struct ReconnectArgs {
    /// Durations of the absences in seconds.
    #[arg(long, value_name = "SECONDS", value_delimiter = ',', default_values_t = [1, 5, 60])]
    absences: Vec<u64>,
    #[command(flatten)]
    attacked: Attacked,
}

/// Measures a worker and an engine, prints one line per absence and returns whether every bound was kept.
pub(crate) fn run(args: &ReconnectArgs) -> bool {
    let scratch = scratch();
    let (programs, plan) = (args.attacked.programs(), plan(scratch.path()));
    let config = scratch.path().join("config.toml");
    std::fs::write(&config, plan.config.to_toml().expect("toml")).expect("writing the configuration");
    let mut good = true;
    for name in ["env-worker", "rollout-engine"] {
        let endpoint = fixed_endpoint();
        let address = endpoint.strip_prefix("tcp://").expect("an endpoint");
        let mut command = Command::new(programs.path(name));
        command.arg("serve");
        if name == "env-worker" {
            command.args(["--engine", &endpoint, "--num-envs", "1"]);
        } else {
            command.arg("--config").arg(&config).args(["--learner", &endpoint]);
            command.arg("--state-dir").arg(scratch.path().join("engine"));
        }
        let child = command.stdin(Stdio::null()).stderr(Stdio::null()).spawn();
        let _running = Running(child.expect("starting the program"));
        for absence in std::iter::once(&0).chain(&args.absences) {
            pause(Duration::from_secs(*absence));
            let time = greeted(address);
            let (verdict, text) = match time {
                Some(time) => (time <= ALLOWED, format!("{:.2} s", time.as_secs_f64())),
                None => (false, "never".to_owned()),
            };
            // the first time is the program's start
            let counts = *absence > 0;
            good &= verdict || !counts;
            let mark = if verdict || !counts { "" } else { "  FAILED" };
            say(&format!("{name:14} absent {absence:5} s: connected after {text}{mark}"));
        }
    }
    good
}
