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
    process::{Child, ExitCode, Stdio},
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use integration_tests::{
    hostile::{
        Answers, BOMBS, Churn, Cut, Drip, Nils, PLACES, Stage, Tally, act_frame, bad_handshakes, churn, crowd, drip,
        endless_parts, fetch_unread, flood, forge, frame, idle, in_flight, length_bomb, nil_frame, one_message, pause,
        ping, random_bytes, repeat, unknown_variant_frame, vanishing_workers,
    },
    probe::{Pace, Question, Readings, Trips, answers, healthy, metric, readings, reset_peak, steady, steady_clients},
    ring,
    standalone::{Limits, Programs, Server, many_descriptors},
};
use policy::plan::RunPlan;

const USAGE: &str = "usage:
  soak churn [--connections N=200000] [--frame act|junk]
      short-lived connections from 1, 2, 4 and 8 processes, N in each phase, with one valid request each, or with junk in its place
  soak hostile [--seconds S=60] [--only NAME[,NAME...]] [--memory-gib G=2] [--idle-seconds S=5] [--nice N=10]
      every attack for S seconds, with the round trips of a steady client during the attack and idle
  soak list
      names the attacks
  soak latency --engine ENDPOINT [--clients N=1] [--seconds S=10] [--between-micros U=0]
      round trips of N well-behaved clients that ask a running engine for one row each
common to churn and hostile:
  --programs DIR            folder of rollout-engine, learner and export (default: PIRL_PROGRAMS, else beside this program)
  --address-space-gib G     `ulimit -v` of the attacked process (default: none)";

/// Largest p99 with an attack, as a multiple of the idle p99.
const RATIO: f64 = 2.0;
/// The same while descriptors are exhausted.
const RATIO_SCARCE: f64 = 5.0;
/// Longest time without an answer to the steady client.
const WORST: Duration = Duration::from_secs(2);
/// Bytes that a log may grow in a minute.
const LOG_PER_MINUTE: f64 = 1e6;
/// Time that a process has to end after SIGTERM, and that an engine has to forget what is gone.
const GRACE: Duration = Duration::from_secs(10);
/// Time without one served connection that counts as a hang.
const HANG: Duration = Duration::from_secs(20);
/// Pause of the steady client after an answer.
const BETWEEN: Duration = Duration::from_millis(2);
/// Descriptors of the engine in the attacks on them.
const SCARCE_DESCRIPTORS: u64 = 1024;
/// Connections of those attacks.
const SCARCE_CONNECTIONS: usize = 1100;
/// A larger log is emptied before the next attack.
const LOG_KEPT: u64 = 50_000_000;
/// Patience of an attacker that waits for one answer.
const PATIENCE: Duration = Duration::from_secs(5);
/// Rows of a large request; the tabletop's `rollout.queue_capacity`.
const MANY_ROWS: usize = 4096;

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

// ---- attacks

/// What is attacked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Target {
    /// An engine.
    Engine,
    /// An engine with few descriptors.
    ScarceEngine,
    /// A learner.
    Learner,
}

/// What an attack knows.
struct Scene {
    plan: RunPlan,
    endpoint: String,
    http: String,
    duration: Duration,
}

impl Scene {
    fn action_dim(&self) -> u32 {
        self.plan.config.actor.model.env_action_dim as u32
    }
}

struct Attack {
    name: &'static str,
    target: Target,
    run: fn(&Scene) -> Tally,
}

const fn attack(name: &'static str, target: Target, run: fn(&Scene) -> Tally) -> Attack {
    Attack { name, target, run }
}

fn churn_of(scene: &Scene, clients: usize, body: &[u8], patience: Duration) -> Tally {
    let bounds = Churn {
        connections: u64::MAX,
        duration: scene.duration,
        patience,
    };
    crowd(clients, |_| churn(&scene.endpoint, body, bounds, |_| {}))
}

fn bombs(scene: &Scene) -> Tally {
    let all: Vec<_> = PLACES
        .iter()
        .flat_map(|place| BOMBS.iter().map(move |length| (*length, *place)))
        .collect();
    let mut next = all.iter().cycle();
    repeat(scene.duration, |left| {
        next.next().map_or_else(Tally::default, |(length, place)| {
            length_bomb(&scene.endpoint, *length, *place, left.min(Duration::from_secs(1)))
        })
    })
}

fn random(scene: &Scene) -> Tally {
    random_bytes(&scene.endpoint, u64::MAX, 3000, 5, scene.duration)
}

fn parts(scene: &Scene, part_bytes: u8) -> Tally {
    repeat(scene.duration, |left| {
        endless_parts(&scene.endpoint, part_bytes, 38 << 20, left.min(Duration::from_secs(10)))
    })
}

fn flood_of(scene: &Scene, one: &[u8], answers: Answers) -> Tally {
    repeat(scene.duration, |left| {
        flood(&scene.endpoint, one, u64::MAX, answers, left)
    })
}

fn idle_of(scene: &Scene, endpoint: &str, stage: Stage) -> Tally {
    idle(endpoint, SCARCE_CONNECTIONS, stage, scene.duration)
}

fn nils(scene: &Scene, kinds: [Nils; 2]) -> Tally {
    let bodies = kinds.map(|kind| nil_frame(kind, 19 << 20));
    let mut next = bodies.iter().cycle();
    repeat(scene.duration, |left| {
        next.next()
            .map(|body| one_message(&scene.endpoint, body, left.min(PATIENCE)))
            .unwrap_or_default()
    })
}

fn workers(scene: &Scene, cut: Cut) -> Tally {
    let mut round = 0;
    repeat(scene.duration, |_left| {
        round += 1;
        vanishing_workers(
            &scene.endpoint,
            &format!("{cut:?}-{round}"),
            2500,
            1,
            scene.action_dim(),
            cut,
        )
    })
}

fn slow(scene: &Scene, at_once: usize, every: Option<Duration>) -> Tally {
    let plan = Drip {
        connections: 20,
        announced: 50 << 20,
        at_once,
        every,
        hold: scene.duration,
    };
    drip(&scene.endpoint, plan)
}

const ATTACKS: [Attack; 36] = [
    attack("churn", Target::Engine, |s| {
        churn_of(s, 2, &act_frame(&s.plan, 1, 1, false), PATIENCE)
    }),
    attack("churn-junk", Target::Engine, |s| {
        churn_of(s, 2, b"junk", Duration::from_secs(1))
    }),
    attack("bombs", Target::Engine, bombs),
    attack("random", Target::Engine, random),
    attack("parts-empty", Target::Engine, |s| parts(s, 0)),
    attack("parts-one-byte", Target::Engine, |s| parts(s, 1)),
    attack("flood-unread", Target::Engine, |s| {
        flood_of(s, &frame(0, b"x"), Answers::Unread)
    }),
    attack("rows-unread", Target::Engine, |s| {
        flood_of(s, &frame(0, &act_frame(&s.plan, 1, MANY_ROWS, true)), Answers::Unread)
    }),
    attack("rows-read", Target::Engine, |s| {
        flood_of(s, &frame(0, &act_frame(&s.plan, 1, MANY_ROWS, true)), Answers::Read)
    }),
    attack("in-flight", Target::Engine, |s| {
        let body = act_frame(&s.plan, 1, MANY_ROWS, false);
        crowd(3, |_| repeat(s.duration, |left| in_flight(&s.endpoint, &body, 1, left)))
    }),
    attack("nil-elements", Target::Engine, |s| nils(s, [Nils::Reports, Nils::Rows])),
    attack("nil-images", Target::Engine, |s| {
        nils(s, [Nils::ReportImages, Nils::RowImages])
    }),
    attack("workers-reset", Target::Engine, |s| workers(s, Cut::Reset)),
    attack("workers-close", Target::Engine, |s| workers(s, Cut::Close)),
    attack("junk", Target::Engine, |s| flood_of(s, &frame(0, b"?"), Answers::Read)),
    attack("variant", Target::Engine, |s| {
        let body = unknown_variant_frame(30_000_000);
        repeat(s.duration, |left| one_message(&s.endpoint, &body, left.min(PATIENCE)))
    }),
    attack("names", Target::Engine, |s| {
        forge(&s.endpoint, &s.plan, s.action_dim(), s.duration)
    }),
    attack("drip", Target::Engine, |s| slow(s, 0, Some(Duration::from_millis(500)))),
    attack("partial", Target::Engine, |s| slow(s, 49 << 20, None)),
    attack("handshakes", Target::Engine, |s| {
        bad_handshakes(&s.endpoint, &act_frame(&s.plan, 1, 1, false), s.duration)
    }),
    attack("pings-unread", Target::Engine, |s| {
        flood_of(s, &ping(0, b"context"), Answers::Unread)
    }),
    attack("pings-read", Target::Engine, |s| {
        flood_of(s, &ping(0, b"context"), Answers::Read)
    }),
    attack("idle-silent", Target::ScarceEngine, |s| {
        idle_of(s, &s.endpoint, Stage::Silent)
    }),
    attack("idle-greeting", Target::ScarceEngine, |s| {
        idle_of(s, &s.endpoint, Stage::Greeting)
    }),
    attack("idle-slow", Target::ScarceEngine, |s| {
        idle_of(s, &s.endpoint, Stage::SlowGreeting)
    }),
    attack("idle-ready", Target::ScarceEngine, |s| {
        idle_of(s, &s.endpoint, Stage::Ready)
    }),
    attack("idle-http", Target::ScarceEngine, |s| {
        idle_of(s, &s.http, Stage::Silent)
    }),
    attack("half-http", Target::ScarceEngine, |s| {
        idle_of(s, &s.http, Stage::HalfRequest)
    }),
    attack("learner-fetch", Target::Learner, |s| {
        let mut round = 0;
        repeat(s.duration, |left| {
            round += 1;
            fetch_unread(&s.endpoint, &format!("greedy-{round}"), left)
        })
    }),
    attack("learner-bombs", Target::Learner, bombs),
    attack("learner-random", Target::Learner, random),
    attack("learner-handshakes", Target::Learner, |s| {
        bad_handshakes(&s.endpoint, b"junk", s.duration)
    }),
    attack("learner-parts", Target::Learner, |s| parts(s, 0)),
    attack("learner-junk", Target::Learner, |s| {
        flood_of(s, &frame(0, b"?"), Answers::Unread)
    }),
    attack("learner-churn", Target::Learner, |s| {
        churn_of(s, 2, b"junk", Duration::from_millis(200))
    }),
    attack("learner-partial", Target::Learner, |s| slow(s, 49 << 20, None)),
];

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

/// Starts a process of this program with its own descriptors.
fn own_process(nice: Option<f64>, args: &[&str]) -> Child {
    let own = std::env::current_exe().expect("own path");
    let mut command = if let Some(nice) = nice {
        let mut command = many_descriptors(Path::new("nice"));
        command.arg("-n").arg(nice.to_string()).arg(own);
        command
    } else {
        many_descriptors(&own)
    };
    command
        .args(args)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .expect("starting a process of the soak")
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

struct Bounds {
    seconds: Duration,
    idle: Duration,
    memory: u64,
    nice: f64,
}

struct Measured {
    idle: Trips,
    trips: Trips,
    before: Readings,
    after: Readings,
    log_per_minute: f64,
    health: (u64, u64),
    tally: String,
    breaches: Vec<String>,
    /// The process cannot be used for the next attack.
    broken: bool,
}

impl Measured {
    /// Returns the p99 at the idle pace as a multiple of the idle one: a client that waits asks less often, which would hide its wait.
    fn ratio(&self) -> f64 {
        let interval = self.interval();
        self.trips.paced_quantile(0.99, interval).as_secs_f64() / self.idle.paced_quantile(0.99, interval).as_secs_f64()
    }

    /// Returns the time from one request to the next when idle.
    fn interval(&self) -> Duration {
        BETWEEN + self.idle.quantile(0.5)
    }
}

fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Polls `/healthz` every second until `stop`; returns polls that were answered by 200, and polls.
fn watch_health(http: &str, stop: &AtomicBool) -> (u64, u64) {
    let mut counts = (0, 0);
    while !stop.load(Ordering::Relaxed) {
        let begin = Instant::now();
        counts.0 += u64::from(healthy(http, Duration::from_secs(2)));
        counts.1 += 1;
        while begin.elapsed() < Duration::from_secs(1) && !stop.load(Ordering::Relaxed) {
            pause(Duration::from_millis(50));
        }
    }
    counts
}

fn measure(server: &mut Server, attack: &Attack, bounds: &Bounds, question: &Question) -> Measured {
    if server.log_bytes() > LOG_KEPT {
        server.empty_log();
    }
    let pace = |duration| Pace {
        duration,
        between: BETWEEN,
    };
    let idle = steady(&server.listen, question, pace(bounds.idle));
    let pid = server.pid();
    drop(reset_peak(pid));
    let before = readings(pid).unwrap_or_default();
    let log = server.log_bytes();
    let stop = AtomicBool::new(false);
    let (listen, http) = (server.listen.clone(), server.http.clone());
    let lead = Duration::from_millis(300);
    let (trips, health, tally) = thread::scope(|scope| {
        let client = scope.spawn(|| steady(&listen, question, pace(lead + bounds.seconds)));
        let health = http.as_deref().map(|http| scope.spawn(|| watch_health(http, &stop)));
        // the steady client is there before the attack
        pause(lead);
        let seconds = bounds.seconds.as_secs_f64().to_string();
        let mut args = vec!["attack", attack.name, "--endpoint", &listen, "--seconds", &seconds];
        if let Some(http) = &http {
            args.extend(["--http", http]);
        }
        let mut attacker = own_process(Some(bounds.nice), &args);
        let trips = client.join().expect("the steady client");
        stop.store(true, Ordering::Relaxed);
        let health = health.map_or((0, 0), |thread| thread.join().expect("the health watch"));
        (trips, health, attacker_end(&mut attacker))
    });
    let log_bytes = server.log_bytes().saturating_sub(log);
    let mut measured = Measured {
        idle,
        trips,
        before,
        after: readings(pid).unwrap_or_default(),
        log_per_minute: log_bytes as f64 * 60.0 / bounds.seconds.as_secs_f64(),
        health,
        tally,
        breaches: Vec::new(),
        broken: false,
    };
    judge(server, attack, bounds, question, &mut measured);
    measured
}

/// Waits for the end of an attacker, a little longer than it should take, and returns its last line.
fn attacker_end(attacker: &mut Child) -> String {
    let begin = Instant::now();
    while begin.elapsed() < GRACE && attacker.try_wait().expect("an attacker").is_none() {
        pause(Duration::from_millis(20));
    }
    drop(attacker.kill());
    attacker.wait().expect("waiting for an attacker");
    let mut said = String::new();
    let mut out = attacker.stdout.take().expect("a pipe");
    out.read_to_string(&mut said).expect("reading from an attacker");
    said.lines().last().unwrap_or("did not end in time, killed").to_owned()
}

fn judge(server: &mut Server, attack: &Attack, bounds: &Bounds, question: &Question, measured: &mut Measured) {
    let mut breaches = Vec::new();
    let mut broken = false;
    if let Some(status) = server.ended() {
        breaches.push(format!("the process ended: {status}"));
        broken = true;
    } else {
        if !answers(&server.listen, question, GRACE) {
            breaches.push(format!(
                "a new client was not answered within {} s after the attack",
                GRACE.as_secs()
            ));
            broken = true;
        }
        if let Some(http) = &server.http {
            if healthy(http, Duration::from_secs(2)) {
                let begin = Instant::now();
                let slots = loop {
                    let slots = metric(http, "engine_slots", Duration::from_secs(2)).unwrap_or(f64::NAN);
                    if slots == 0.0 || begin.elapsed() > GRACE {
                        break slots;
                    }
                    pause(Duration::from_millis(100));
                };
                if slots != 0.0 {
                    breaches.push(format!("engine_slots is {slots}, expected 0"));
                    broken = true;
                }
            } else {
                breaches.push("/healthz does not answer after the attack".to_owned());
                broken = true;
            }
            let (good, polls) = measured.health;
            if good * 10 < polls * 9 {
                breaches.push(format!("/healthz answered {good} of {polls} times"));
            }
        }
    }
    let trips = &measured.trips;
    let ratio = measured.ratio();
    let allowed = if attack.target == Target::ScarceEngine {
        RATIO_SCARCE
    } else {
        RATIO
    };
    if ratio > allowed || measured.idle.answered == 0 {
        breaches.push(format!("paced p99 is {ratio:.1} x idle, allowed {allowed} x"));
    }
    let worst = trips.quantile(1.0);
    if worst > WORST {
        breaches.push(format!("{:.1} s without an answer", worst.as_secs_f64()));
    }
    if trips.wrong > 0 || trips.lost > 0 {
        breaches.push(format!(
            "{} wrong answers, {} lost connections",
            trips.wrong, trips.lost
        ));
    }
    if measured.after.peak > bounds.memory {
        breaches.push(format!("peak of {:.2} GB", measured.after.peak as f64 / 1e9));
    }
    if measured.log_per_minute > LOG_PER_MINUTE {
        breaches.push(format!("log of {:.1} MB a minute", measured.log_per_minute / 1e6));
    }
    measured.breaches = breaches;
    measured.broken = broken;
}

fn print_header() {
    say(&format!(
        "{:18} {:>8} {:>8} {:>8} {:>6} {:>9} {:>8} {:>8} {:>8} {:>8} {:>9} {:>5} {:>7}",
        "attack",
        "p50 ms",
        "p99 ms",
        "paced",
        "ratio",
        "worst ms",
        "answers",
        "refused",
        "rss MB",
        "peak MB",
        "log kB/m",
        "cpu",
        "healthz"
    ));
}

fn print_row(attack: &Attack, bounds: &Bounds, measured: &Measured) {
    let Measured {
        idle,
        trips,
        before,
        after,
        ..
    } = measured;
    say(&format!(
        "{:18} {:8.2} {:8.2} {:8.2} {:6.1} {:9.1} {:8} {:8} {:8.1} {:8.1} {:9.1} {:5.2} {:>7}",
        attack.name,
        millis(trips.quantile(0.5)),
        millis(trips.quantile(0.99)),
        millis(trips.paced_quantile(0.99, measured.interval())),
        measured.ratio(),
        millis(trips.quantile(1.0)),
        trips.answered,
        trips.refused,
        after.rss as f64 / 1e6,
        after.peak as f64 / 1e6,
        measured.log_per_minute / 1e3,
        (after.cpu_seconds - before.cpu_seconds) / bounds.seconds.as_secs_f64(),
        format!("{}/{}", measured.health.0, measured.health.1),
    ));
    say(&format!(
        "    idle p50 {:.2} p99 {:.2} ms; {} descriptors; attacker: {}",
        millis(idle.quantile(0.5)),
        millis(idle.quantile(0.99)),
        after.descriptors,
        measured.tally
    ));
    for breach in &measured.breaches {
        say(&format!("    FAILED: {breach}"));
    }
}

fn run_hostile(options: &Options) -> bool {
    let scratch = Scratch::new();
    let programs = options.programs();
    let bounds = Bounds {
        seconds: options.words.first().map_or_else(
            || options.seconds("seconds", 60.0),
            |word| Duration::from_secs_f64(word.parse().expect("a number of seconds")),
        ),
        idle: options.seconds("idle-seconds", 5.0),
        memory: (options.number("memory-gib", 2.0) * f64::from(1 << 30)) as u64,
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
    print_header();
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
        print_row(attack, &bounds, &measured);
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
            &with(&["seconds", "only", "memory-gib", "idle-seconds", "nice"]),
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
