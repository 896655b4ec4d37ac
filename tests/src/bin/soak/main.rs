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
    io::{Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
    time::Duration,
};

use integration_tests::{
    attacks::{ATTACKS, Scene, Target},
    probe::{Pace, Question, steady_clients},
    ring,
    siege::{Bounds, GRACE, header, lines, measure, millis},
    standalone::{Limits, Programs, Server},
};
use policy::plan::RunPlan;

mod churn;
mod kills;
mod reconnect;

const USAGE: &str = "usage:
  soak churn [--connections N=200000] [--frame act|junk]
      short-lived connections from 1, 2, 4 and 8 processes, N in each phase, with one valid request each, or with junk in its place
  soak hostile [--seconds S=60] [--only NAME[,NAME...]] [--idle-seconds S=5] [--nice N=10]
      every attack for S seconds, with the round trips of a steady client during the attack and idle
  soak reconnect [--absences S[,S...]=1,5,60]
      time from the return of the other side to a connection, of an env worker and of an engine, after these absences
  soak kills [--kills N=18] [--iterations N=24]
      kills learner, engine and env worker at random moments of a run and compares it with one that was left alone
  soak list
      names the attacks
  soak latency --engine ENDPOINT [--clients N=1] [--seconds S=10] [--between-micros U=0]
      round trips of N well-behaved clients that ask a running engine for one row each
common to churn and hostile:
  --programs DIR            folder of rollout-engine, learner and export (default: PIRL_PROGRAMS, else beside this program)
  --address-space-gib G     `ulimit -v` of the attacked process (default: none)";

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
        // a learner gives up when no engine delivers for two minutes: each attack has its own
        if measured.broken || attack.target == Target::Learner {
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
        "churn" => churn::run_churn(&Options::parse(args, &with(&["connections", "frame"]))),
        "hostile" => run_hostile(&Options::parse(
            args,
            &with(&["seconds", "only", "idle-seconds", "nice"]),
        )),
        "reconnect" => reconnect::run(&Options::parse(args, &with(&["absences"]))),
        "kills" => kills::run(&Options::parse(args, &with(&["kills", "iterations", "seed"]))),
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
            churn::run_served(&Options::parse(args, &["endpoint", "connections", "frame"]));
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
