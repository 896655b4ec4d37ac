//! A server under attack and a steady client: the client's round trips, the process's resources, and the exceeded bounds.

use std::{
    fmt::Write,
    io::Read,
    path::Path,
    process::{Child, Stdio},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use crate::{
    attacks::{Attack, Target},
    hostile::pause,
    probe::{Pace, Question, Readings, Trips, answers, healthy, metric, readings, reset_peak, steady},
    ring::program,
    standalone::{Server, many_descriptors},
};

/// Largest p99 with an attack, as a multiple of the idle p99.
const RATIO: f64 = 2.0;
/// Largest p99 with exhausted descriptors, as a multiple of the idle p99.
const RATIO_SCARCE: f64 = 5.0;
/// A p99 of the learner that is accepted whatever the idle p99 is: no engine is slowed.
const LEARNER_EASE: Duration = Duration::from_millis(5);
/// Longest accepted time without an answer to the steady client.
const WORST: Duration = Duration::from_millis(500);
/// Largest growth of a log per minute, in bytes.
const LOG_PER_MINUTE: f64 = 1e6;
/// Largest growth of a log in a shorter time, in bytes: ten lines for each of many reasons.
const LOG_AT_ONCE: f64 = 1e5;
/// Longest time for a process to end after SIGTERM, and for an engine to drop what belonged to closed connections.
pub const GRACE: Duration = Duration::from_secs(10);
/// Pause of the steady client after an answer.
const BETWEEN: Duration = Duration::from_millis(2);
/// Size of a log in bytes above which the log is emptied before the next attack.
const LOG_KEPT: u64 = 50_000_000;

/// Starts a process of the soak with its own limit of descriptors.
pub fn own_process(nice: Option<u8>, args: &[&str]) -> Child {
    let own = program("soak");
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

/// Settings of a measurement.
#[derive(Debug, Clone, Copy)]
pub struct Bounds {
    /// Duration of the attack.
    pub seconds: Duration,
    /// Duration of the idle measurement before the attack; zero: latency is not judged.
    pub idle: Duration,
    /// Niceness of the attacker's process.
    pub nice: u8,
}

/// Result of an attack.
#[derive(Debug)]
pub struct Measured {
    idle: Trips,
    trips: Trips,
    before: Readings,
    after: Readings,
    log_per_minute: f64,
    health: (u64, u64),
    tally: String,
    /// Exceeded bounds.
    pub breaches: Vec<String>,
    /// Whether the process is unusable for the next attack.
    pub broken: bool,
}

impl Measured {
    /// Returns the p99 as a multiple of the idle one.
    fn ratio(&self) -> f64 {
        self.trips.quantile(0.99).as_secs_f64() / self.idle.quantile(0.99).as_secs_f64()
    }

    /// Returns the time from one request to the next when idle.
    fn interval(&self) -> Duration {
        BETWEEN + self.idle.quantile(0.5)
    }
}

/// Returns a time in milliseconds.
pub fn millis(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Polls `/healthz` every second until `stop`; returns the number of answers with 200, and of polls.
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

/// Attacks a server while a steady client sends requests, and judges the result.
pub fn measure(server: &mut Server, attack: &Attack, bounds: &Bounds, question: &Question) -> Measured {
    if server.log_bytes() > LOG_KEPT {
        server.empty_log();
    }
    let pace = |duration| Pace {
        duration,
        requests: None,
        between: BETWEEN,
    };
    let idle = if bounds.idle.is_zero() {
        Trips::default()
    } else {
        steady(&server.listen, question, pace(bounds.idle))
    };
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
        // the steady client connects before the attack
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

/// Waits for the end of an attacker, a little beyond its duration, and returns its last line.
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
    let timed = !bounds.idle.is_zero();
    let allowed = match attack.target {
        Target::Engine | Target::Learner => RATIO,
        Target::ScarceEngine => RATIO_SCARCE,
    };
    let at_ease = attack.target == Target::Learner && trips.quantile(0.99) <= LEARNER_EASE;
    if timed && (measured.ratio() > allowed && !at_ease || measured.idle.answered == 0) {
        breaches.push(format!("p99 is {:.1} x idle, allowed {allowed} x", measured.ratio()));
    }
    let worst = trips.quantile(1.0);
    if worst > if timed { WORST } else { GRACE } {
        breaches.push(format!("{:.1} s without an answer", worst.as_secs_f64()));
    }
    if trips.answered == 0 {
        breaches.push("the steady client was never answered".to_owned());
    }
    if trips.wrong > 0 || trips.lost > 0 {
        breaches.push(format!(
            "{} wrong answers, {} lost connections",
            trips.wrong, trips.lost
        ));
    }
    if measured.after.peak > attack.memory {
        let (peak, allowed) = (measured.after.peak as f64 / 1e6, attack.memory as f64 / 1e6);
        breaches.push(format!("peak of {peak:.0} MB, allowed {allowed:.0} MB"));
    }
    let minutes = bounds.seconds.as_secs_f64() / 60.0;
    if measured.log_per_minute * minutes > (LOG_PER_MINUTE * minutes).max(LOG_AT_ONCE) {
        breaches.push(format!("log of {:.1} MB a minute", measured.log_per_minute / 1e6));
    }
    measured.breaches = breaches;
    measured.broken = broken;
}

/// Returns the header of the table.
pub fn header() -> String {
    format!(
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
    )
}

/// Returns the table's lines for an attack.
pub fn lines(attack: &Attack, bounds: &Bounds, measured: &Measured) -> String {
    let Measured {
        idle,
        trips,
        before,
        after,
        ..
    } = measured;
    let mut lines = format!(
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
    );
    let _written = write!(
        lines,
        "\n    idle p50 {:.2} p99 {:.2} ms; {} descriptors; attacker: {}",
        millis(idle.quantile(0.5)),
        millis(idle.quantile(0.99)),
        after.descriptors,
        measured.tally
    );
    for breach in &measured.breaches {
        let _written = write!(lines, "\n    FAILED: {breach}");
    }
    lines
}
