//! The soak: an engine and a learner under hostile peers, for as long as one likes, with a well-behaved client in addition.
//!
//! `scripts/soak` builds and starts this program; `soak help` lists what it does. Attackers are processes of their own, so that they take
//! neither memory nor descriptors from the client that measures, and give way to it (`nice`), as attackers on another machine would.
#![expect(
    clippy::expect_used,
    clippy::panic,
    reason = "the soak ends with the reason when its own machine fails it"
)]

use std::{
    collections::BTreeMap,
    io::{BufRead, BufReader, Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use integration_tests::{
    attacks::{ATTACKS, PATIENCE, Scene, Target},
    hostile::{Churn, Tally, act_frame, churn, pause},
    probe::{Pace, Question, readings, steady_clients},
    ring,
    siege::{Bounds, GRACE, header, lines, measure, millis, own_process},
    standalone::{Limits, Programs, Server},
};
use policy::plan::RunPlan;

const USAGE: &str = "usage:
  soak churn [--connections N=200000] [--frame act|junk]
      short-lived connections from 1, 2, 4 and 8 processes, N in each phase, with one valid request each, or with junk in its place
  soak hostile [--seconds S=60] [--only NAME[,NAME...]] [--idle-seconds S=5] [--nice N=10]
      every attack for S seconds, with the round trips of a steady client during the attack and idle
  soak list
      names the attacks
  soak latency --engine ENDPOINT [--clients N=1] [--seconds S=10] [--between-micros U=0]
      round trips of N well-behaved clients that ask a running engine for one row each
common to churn and hostile:
  --programs DIR            folder of rollout-engine, learner and export (default: PIRL_PROGRAMS, else beside this program)
  --address-space-gib G     `ulimit -v` of the attacked process (default: none)";

/// Time without one served connection that counts as a hang.
const HANG: Duration = Duration::from_secs(20);
/// Descriptors of the engine in the attacks on them.
const SCARCE_DESCRIPTORS: u64 = 1024;

/// Writes a line to standard output.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").expect("writing to standard output");
    out.flush().expect("writing to standard output");
}

/// The command line after the subcommand: `--key value` pairs and words.
struct Options {
    flags: BTreeMap<String, String>,
    words: Vec<String>,
}

impl Options {
    fn parse(args: impl Iterator<Item = String>, known: &[&str]) -> Self {
        let (mut flags, mut words) = (BTreeMap::new(), Vec::new());
        let mut args = args;
        while let Some(arg) = args.next() {
            if let Some(key) = arg.strip_prefix("--") {
                assert!(
                    known.contains(&key),
                    "failed to read the command line: found `{arg}`\n{USAGE}"
                );
                let value = args.next();
                flags.insert(
                    key.to_owned(),
                    value.unwrap_or_else(|| panic!("failed to read the command line: `{arg}` needs a value")),
                );
            } else {
                words.push(arg);
            }
        }
        Self { flags, words }
    }

    fn text(&self, key: &str) -> Option<&str> {
        self.flags.get(key).map(String::as_str)
    }

    fn number(&self, key: &str, default: f64) -> f64 {
        self.text(key).map_or(default, |value| {
            value
                .parse()
                .unwrap_or_else(|_| panic!("failed to read `--{key} {value}`: expected a number"))
        })
    }

    fn seconds(&self, key: &str, default: f64) -> Duration {
        Duration::from_secs_f64(self.number(key, default))
    }

    fn required(&self, key: &str) -> &str {
        self.text(key)
            .unwrap_or_else(|| panic!("failed to read the command line: `--{key}` is missing\n{USAGE}"))
    }

    fn programs(&self) -> Programs {
        Programs::new(self.text("programs"))
    }

    fn address_space(&self) -> Option<u64> {
        self.text("address-space-gib")
            .map(|_| (self.number("address-space-gib", 0.0) * f64::from(1 << 30)) as u64)
    }
}

/// A folder that is removed with this value.
struct Scratch(PathBuf);

impl Scratch {
    fn new() -> Self {
        let path = std::env::temp_dir().join(format!("pirl-soak-{}", std::process::id()));
        std::fs::create_dir_all(&path).expect("creating a folder for the soak");
        Self(path)
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(std::fs::remove_dir_all(&self.0));
    }
}

/// The plan of the tabletop, its output in `dir`.
fn plan(dir: &Path) -> RunPlan {
    ring::plan(dir, &[])
}

/// Ends this process when its parent closes its standard input, so that no attacker outlives the soak.
fn end_with_parent() {
    thread::spawn(|| {
        drop(std::io::stdin().read_to_end(&mut Vec::new()));
        #[expect(
            clippy::exit,
            reason = "the attack runs in other threads, which have nothing to save"
        )]
        std::process::exit(3);
    });
}

/// `soak attack NAME`: one attacker process.
fn run_attack(options: &Options) {
    end_with_parent();
    let name = options.words.first().expect("the name of an attack");
    let found = ATTACKS.iter().find(|attack| attack.name == name);
    let attack = found.unwrap_or_else(|| panic!("failed to find the attack `{name}`; `soak list` names them"));
    let scene = Scene {
        plan: plan(&std::env::temp_dir()),
        endpoint: options.required("endpoint").to_owned(),
        http: options.text("http").unwrap_or_default().to_owned(),
        duration: options.seconds("seconds", 10.0),
    };
    say(&(attack.run)(&scene).to_string());
}

/// `soak served`: one well-behaved churning client; prints served and failed connections twice a second.
fn run_served(options: &Options) {
    end_with_parent();
    let plan = plan(&std::env::temp_dir());
    let junk = options.text("frame") == Some("junk");
    let body = if junk {
        b"junk".to_vec()
    } else {
        act_frame(&plan, 1, 1, false)
    };
    let bounds = Churn {
        connections: options.number("connections", 1.0) as u64,
        duration: Duration::from_hours(24),
        patience: HANG + PATIENCE,
    };
    let mut said = Instant::now();
    let line = |tally: &Tally| {
        // junk is served by a refusal or by the end of the connection
        let refused = tally.refused + tally.closed;
        let served = tally.answered + if junk { refused } else { 0 };
        format!("{served} {}", tally.opened + tally.unopened - served)
    };
    let tally = churn(options.required("endpoint"), &body, bounds, |tally| {
        if said.elapsed() >= Duration::from_millis(500) {
            said = Instant::now();
            say(&line(tally));
        }
    });
    say(&line(&tally));
}

// ---- churn

fn run_churn(options: &Options) -> bool {
    let scratch = Scratch::new();
    let connections = options.words.first().map_or_else(
        || options.number("connections", 200_000.0),
        |word| word.parse().expect("a number of connections"),
    ) as u64;
    let limits = Limits {
        address_space: options.address_space(),
        ..Limits::default()
    };
    let mut server = Server::engine(&options.programs(), &plan(&scratch.0), &scratch.0, limits);
    let mut good = true;
    say("processes connections served failed seconds connections/s rss MB peak MB log kB");
    for processes in [1, 2, 4, 8] {
        let log = server.log_bytes();
        let phase = churn_phase(
            &mut server,
            connections,
            processes,
            options.text("frame").unwrap_or("act"),
        );
        let now = readings(server.pid()).unwrap_or_default();
        say(&format!(
            "{processes:9} {:11} {:6} {:6} {:7.1} {:13.0} {:6.1} {:7.1} {:6.1}{}",
            connections,
            phase.served,
            phase.failed,
            phase.seconds,
            phase.served as f64 / phase.seconds,
            now.rss as f64 / 1e6,
            now.peak as f64 / 1e6,
            server.log_bytes().saturating_sub(log) as f64 / 1e3,
            phase
                .verdict
                .as_ref()
                .map_or_else(String::new, |verdict| format!("  FAILED: {verdict}")),
        ));
        good &= phase.verdict.is_none();
        if phase.hung {
            break;
        }
    }
    good &= finish(&mut server);
    good
}

struct Phase {
    served: u64,
    failed: u64,
    seconds: f64,
    hung: bool,
    verdict: Option<String>,
}

fn churn_phase(server: &mut Server, connections: u64, processes: u64, frame: &str) -> Phase {
    let begin = Instant::now();
    let each = connections.div_ceil(processes).to_string();
    let counts: Arc<Vec<(AtomicU64, AtomicU64)>> = Arc::new((0..processes).map(|_| Default::default()).collect());
    let mut clients = Vec::new();
    let mut readers = Vec::new();
    for number in 0..processes as usize {
        let args = [
            "served",
            "--endpoint",
            &server.listen,
            "--connections",
            &each,
            "--frame",
            frame,
        ];
        let mut client = own_process(None, &args);
        let out = client.stdout.take().expect("a pipe");
        let counts = Arc::clone(&counts);
        readers.push(thread::spawn(move || {
            for line in BufReader::new(out).lines().map_while(Result::ok) {
                let mut numbers = line.split(' ').filter_map(|text| text.parse::<u64>().ok());
                if let (Some(served), Some(failed), Some((s, f))) = (numbers.next(), numbers.next(), counts.get(number))
                {
                    s.store(served, Ordering::Relaxed);
                    f.store(failed, Ordering::Relaxed);
                }
            }
        }));
        clients.push(client);
    }
    let sum = || {
        counts.iter().fold((0, 0), |(served, failed), (s, f)| {
            (served + s.load(Ordering::Relaxed), failed + f.load(Ordering::Relaxed))
        })
    };
    let (mut last, mut since, mut hung) = (0, Instant::now(), false);
    while clients.iter_mut().any(|c| c.try_wait().expect("a client").is_none()) {
        pause(Duration::from_millis(100));
        let (served, _) = sum();
        if served > last {
            (last, since) = (served, Instant::now());
        }
        if since.elapsed() > HANG || server.ended().is_some() {
            hung = true;
            break;
        }
    }
    let seconds = begin.elapsed().as_secs_f64();
    for client in &mut clients {
        // a client that has ended is only collected
        drop(client.kill());
        client.wait().expect("waiting for a client");
    }
    for reader in readers {
        reader.join().expect("a reader that does not panic");
    }
    let (served, failed) = sum();
    let verdict = match server.ended() {
        Some(status) => Some(format!("the engine ended: {status}")),
        None if hung => Some(format!("nothing was served for {} s", HANG.as_secs())),
        None if failed > 0 => Some(format!("{failed} requests failed")),
        None if served < connections => Some("not all were served".to_owned()),
        None => None,
    };
    Phase {
        served,
        failed,
        seconds,
        hung,
        verdict,
    }
}

/// Asks a server to end and says how that went.
fn finish(server: &mut Server) -> bool {
    if let Some(status) = server.ended() {
        say(&format!(
            "  the process ended before SIGTERM: {status}; its log: {}",
            server.log_tail()
        ));
        return false;
    }
    if let Some(time) = server.terminate(GRACE) {
        say(&format!("  SIGTERM: ended after {:.2} s", time.as_secs_f64()));
        true
    } else {
        say(&format!(
            "  FAILED: not ended {} s after SIGTERM, killed",
            GRACE.as_secs()
        ));
        false
    }
}

// ---- hostile

fn run_hostile(options: &Options) -> bool {
    let scratch = Scratch::new();
    let programs = options.programs();
    let bounds = Bounds {
        seconds: options.words.first().map_or_else(
            || options.seconds("seconds", 60.0),
            |word| Duration::from_secs_f64(word.parse().expect("a number of seconds")),
        ),
        idle: options.seconds("idle-seconds", 5.0),
        nice: options.number("nice", 10.0),
    };
    let only: Option<Vec<&str>> = options.text("only").map(|names| names.split(',').collect());
    for name in only.iter().flatten() {
        assert!(
            ATTACKS.iter().any(|attack| attack.name == *name),
            "failed to find the attack `{name}`; `soak list` names them"
        );
    }
    let plan = plan(&scratch.0);
    let mut running: Option<(Target, Server)> = None;
    let mut failed = Vec::new();
    let mut end = |running: &mut Option<(Target, Server)>| {
        if let Some((target, mut server)) = running.take()
            && !finish(&mut server)
        {
            failed.push(format!("end of the {target:?}"));
        }
    };
    let mut breached = Vec::new();
    say(&header());
    for attack in &ATTACKS {
        if only.as_ref().is_some_and(|names| !names.contains(&attack.name)) {
            continue;
        }
        if running.as_ref().is_some_and(|(target, _)| *target != attack.target) {
            end(&mut running);
        }
        let (_, server) = running.get_or_insert_with(|| {
            let limits = Limits {
                descriptors: (attack.target == Target::ScarceEngine).then_some(SCARCE_DESCRIPTORS),
                address_space: options.address_space(),
            };
            let server = match attack.target {
                Target::Engine | Target::ScarceEngine => Server::engine(&programs, &plan, &scratch.0, limits),
                Target::Learner => Server::learner(&programs, &plan, &scratch.0, limits),
            };
            (attack.target, server)
        });
        let question = match attack.target {
            Target::Engine | Target::ScarceEngine => Question::act(&plan),
            Target::Learner => Question::part("steady"),
        };
        let measured = measure(server, attack, &bounds, &question);
        say(&lines(attack, &bounds, &measured));
        if !measured.breaches.is_empty() {
            breached.push(attack.name.to_owned());
        }
        if measured.broken {
            end(&mut running);
        }
    }
    end(&mut running);
    failed.extend(breached);
    if failed.is_empty() {
        say("every attack stayed within its bounds");
    } else {
        say(&format!("FAILED: {}", failed.join(", ")));
    }
    failed.is_empty()
}

// ---- latency

fn run_latency(options: &Options) {
    let clients = options.number("clients", 1.0) as usize;
    let seconds = options.seconds("seconds", 10.0);
    let pace = Pace {
        duration: seconds,
        between: Duration::from_secs_f64(options.number("between-micros", 0.0) / 1e6),
    };
    let question = Question::act(&plan(&std::env::temp_dir()));
    let engine = options.required("engine");
    let warm = Pace {
        duration: Duration::from_secs(1),
        ..pace
    };
    steady_clients(engine, &question, clients, warm);
    let trips = steady_clients(engine, &question, clients, pace);
    assert!(
        trips.answered > 0,
        "failed to measure {engine}: no request was answered: {trips:?}"
    );
    say(&format!(
        "clients {clients}: p50 {:.3} ms, p99 {:.3} ms, max {:.2} ms, {} answers, {:.0}/s, refused {}, lost {}, wrong {}",
        millis(trips.quantile(0.5)),
        millis(trips.quantile(0.99)),
        millis(trips.quantile(1.0)),
        trips.answered,
        trips.answered as f64 / seconds.as_secs_f64(),
        trips.refused,
        trips.lost,
        trips.wrong
    ));
}

fn main() -> ExitCode {
    let mut args = std::env::args().skip(1);
    let command = args.next().unwrap_or_default();
    let common = ["programs", "address-space-gib"];
    let with = |own: &[&'static str]| [&common, own].concat();
    let good = match command.as_str() {
        "churn" => run_churn(&Options::parse(args, &with(&["connections", "frame"]))),
        "hostile" => run_hostile(&Options::parse(
            args,
            &with(&["seconds", "only", "idle-seconds", "nice"]),
        )),
        "latency" => {
            run_latency(&Options::parse(
                args,
                &["engine", "clients", "seconds", "between-micros"],
            ));
            true
        }
        "list" => {
            for attack in &ATTACKS {
                say(&format!("{:18} {:?}", attack.name, attack.target));
            }
            true
        }
        "attack" => {
            run_attack(&Options::parse(args, &["endpoint", "http", "seconds"]));
            true
        }
        "served" => {
            run_served(&Options::parse(args, &["endpoint", "connections", "frame"]));
            true
        }
        "help" | "--help" | "-h" => {
            say(USAGE);
            true
        }
        other => {
            say(&format!("failed to read the command line: found `{other}`\n{USAGE}"));
            false
        }
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
