//! Measurements of a well-behaved client and of an operator: round trips, process readings, the HTTP pages.
//!
//! The client is a plain socket with a hand-written ZMTP layer, so a measurement does not depend on the measured transport.

use std::{
    io::{self, ErrorKind, Read, Write},
    path::Path,
    thread,
    time::{Duration, Instant},
};

use policy::plan::RunPlan;
use wire::{
    codec::{decode, encode},
    messages::{ActRequest, ActRow, EngineState, Fetch, FromEngine, FromLearner, Mode, ToEngine, ToLearner},
};

use crate::{
    hostile::{RawDealer, address, open, pause},
    ring::row,
};

/// Pause before a request is sent again that was refused with `retry`.
const RETRY: Duration = Duration::from_millis(2);
/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(2);
/// Pause between heartbeats to a learner.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Requests of the steady client.
#[derive(Debug, Clone)]
pub enum Question {
    /// An action chunk for one row, from an engine.
    Act(Box<ActRow>),
    /// A part of a file from a learner, requested as an engine of this session name.
    Part(String),
}

impl Question {
    /// Returns a request for one row of the tabletop, without a record.
    pub fn act(plan: &RunPlan) -> Self {
        let mut row = row(plan, 1, Mode::Eval);
        row.record = false;
        Self::Act(Box::new(row))
    }

    /// Returns a request for a part of a file that no bundle has; the learner answers with no bytes.
    pub fn part(name: &str) -> Self {
        Self::Part(name.to_owned())
    }

    fn body(&self, request: u64) -> Vec<u8> {
        let encoded = match self {
            Self::Act(row) => encode(&ToEngine::Act(ActRequest {
                request,
                rows: vec![(**row).clone()],
            })),
            Self::Part(_) => encode(&ToLearner::Fetch(Fetch {
                version: u64::MAX,
                file: "absent".to_owned(),
                offset: request,
            })),
        };
        encoded.expect("a question that can be encoded")
    }

    /// Returns the message that a connection sends before its first request and as a heartbeat.
    fn heartbeat(&self) -> Option<Vec<u8>> {
        let Self::Part(name) = self else { return None };
        let state = ToLearner::State(EngineState {
            engine: name.clone(),
            version: None,
            order: None,
            slots: 0,
        });
        Some(encode(&state).expect("a state that can be encoded"))
    }

    fn verdict(&self, request: u64, body: &[u8]) -> Verdict {
        match self {
            Self::Act(_) => match decode::<FromEngine>(body) {
                Ok(FromEngine::Acted(reply)) if reply.request == request && reply.rows.len() == 1 => Verdict::Answer,
                Ok(FromEngine::Refused(refusal)) if refusal.request == Some(request) && refusal.retry => Verdict::Later,
                _ => Verdict::Wrong,
            },
            Self::Part(_) => match decode::<FromLearner>(body) {
                Ok(FromLearner::FilePart(part)) if part.offset == request && part.data.is_empty() => Verdict::Answer,
                Ok(FromLearner::Announce(_) | FromLearner::Order(_)) => Verdict::Other,
                _ => Verdict::Wrong,
            },
        }
    }
}

enum Verdict {
    Answer,
    Later,
    Other,
    Wrong,
}

/// Bounds of a measurement.
#[derive(Debug, Clone, Copy)]
pub struct Pace {
    /// Duration of the measurement.
    pub duration: Duration,
    /// Number of answers after which the measurement ends early; `None`: no limit.
    pub requests: Option<u64>,
    /// Pause after each answer.
    pub between: Duration,
}

/// Round trips of well-behaved clients.
#[derive(Debug, Clone, Default)]
pub struct Trips {
    /// Time from the first sending of each request to its answer, sorted. A request that was refused with `retry`, or whose connection was
    /// lost, is sent again and counts once with the whole time. A request without an answer at the end counts with its waiting time.
    pub times: Vec<Duration>,
    /// Answered requests.
    pub answered: u64,
    /// Refusals with `retry`.
    pub refused: u64,
    /// Connections that were lost or could not be opened.
    pub lost: u64,
    /// Answers that do not fit the request.
    pub wrong: u64,
    /// Requests without an answer at the end of the measurement.
    pub unanswered: u64,
}

impl Trips {
    /// Returns a quantile (0 to 1) of the times; zero without times.
    pub fn quantile(&self, q: f64) -> Duration {
        let place = (q * self.times.len() as f64) as usize;
        let last = self.times.len().saturating_sub(1);
        self.times.get(place.min(last)).copied().unwrap_or_default()
    }

    /// Returns the quantile for a client that sends a request every `interval` instead of after each answer. A wait of many intervals
    /// counts once per interval, each time shorter by one interval (`HdrHistogram`'s correction for coordinated omission).
    pub fn paced_quantile(&self, q: f64, interval: Duration) -> Duration {
        let mut times = self.times.clone();
        for time in &self.times {
            let mut rest = time.saturating_sub(interval);
            while !interval.is_zero() && rest > interval {
                times.push(rest);
                rest = rest.saturating_sub(interval);
            }
        }
        times.sort_unstable();
        let paced = Self {
            times,
            ..Self::default()
        };
        paced.quantile(q)
    }

    /// Adds the round trips of another client.
    pub fn merge(&mut self, other: Self) {
        self.times.extend(other.times);
        self.times.sort_unstable();
        self.answered += other.answered;
        self.refused += other.refused;
        self.lost += other.lost;
        self.wrong += other.wrong;
        self.unanswered += other.unanswered;
    }
}

/// Sends one request after the other on one connection, for `pace.duration` or until `pace.requests` are answered. Reconnects when the
/// connection ends.
pub fn steady(endpoint: &str, question: &Question, pace: Pace) -> Trips {
    let end = Instant::now() + pace.duration;
    let left = || end.saturating_duration_since(Instant::now());
    let mut trips = Trips::default();
    let mut link: Option<RawDealer> = None;
    let mut heartbeat = Instant::now();
    let mut request = 0;
    while !left().is_zero() && pace.requests != Some(trips.answered) {
        request += 1;
        let body = question.body(request);
        let begin = Instant::now();
        let answered = loop {
            if left().is_zero() {
                break false;
            }
            if link.is_none() {
                match RawDealer::connect(endpoint, CONNECT.min(left())) {
                    Ok(dealer) => {
                        link = Some(dealer);
                        heartbeat = Instant::now();
                    }
                    Err(_error) => {
                        trips.lost += u64::from(!left().is_zero());
                        pause(RETRY.min(left()));
                        continue;
                    }
                }
            }
            let Some(dealer) = &mut link else { continue };
            let due = heartbeat <= Instant::now();
            let greeted = match question.heartbeat().filter(|_| due) {
                Some(state) => dealer.send(&state, left()),
                None => Ok(()),
            };
            if due {
                heartbeat = Instant::now() + HEARTBEAT;
            }
            let verdict = greeted.and_then(|()| dealer.send(&body, left())).and_then(|()| {
                loop {
                    let answer = dealer.receive(left())?;
                    match question.verdict(request, &answer) {
                        Verdict::Other => {}
                        verdict => return Ok(verdict),
                    }
                }
            });
            match verdict {
                Ok(Verdict::Answer) => break true,
                Ok(Verdict::Later) => {
                    trips.refused += 1;
                    pause(RETRY.min(left()));
                }
                Ok(Verdict::Wrong | Verdict::Other) => {
                    trips.wrong += 1;
                    link = None;
                    pause(RETRY.min(left()));
                }
                Err(error) => {
                    trips.lost += u64::from(error.kind() != ErrorKind::TimedOut);
                    link = None;
                }
            }
        };
        let waited = begin.elapsed();
        if answered {
            trips.answered += 1;
            trips.times.push(waited);
            if !pace.between.is_zero() {
                pause(pace.between.min(left()));
            }
        } else if waited > trips.times.iter().max().copied().unwrap_or_default() {
            // a request that is cut off within its usual time is not counted
            trips.unanswered += 1;
            trips.times.push(waited);
        }
    }
    trips.times.sort_unstable();
    trips
}

/// Runs `clients` steady clients at the same time and adds up their round trips.
pub fn steady_clients(endpoint: &str, question: &Question, clients: usize, pace: Pace) -> Trips {
    let mut sum = Trips::default();
    thread::scope(|scope| {
        let running: Vec<_> = (0..clients)
            .map(|_| scope.spawn(|| steady(endpoint, question, pace)))
            .collect();
        for client in running {
            sum.merge(client.join().expect("a client that does not panic"));
        }
    });
    sum
}

/// Returns whether a request on a new connection is answered within `patience`.
pub fn answers(endpoint: &str, question: &Question, patience: Duration) -> bool {
    let end = Instant::now() + patience;
    let asked = RawDealer::connect(endpoint, patience).and_then(|mut dealer| {
        if let Some(state) = question.heartbeat() {
            dealer.send(&state, patience)?;
        }
        dealer.send(&question.body(1), patience)?;
        loop {
            let body = dealer.receive(end.saturating_duration_since(Instant::now()))?;
            if !matches!(question.verdict(1, &body), Verdict::Other) {
                return Ok(question.verdict(1, &body));
            }
        }
    });
    matches!(asked, Ok(Verdict::Answer))
}

/// System readings of a process.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Readings {
    /// Resident bytes.
    pub rss: u64,
    /// Largest resident bytes since the process's start or since [`reset_peak`].
    pub peak: u64,
    /// Processor seconds, user and system.
    pub cpu_seconds: f64,
    /// Open file descriptors.
    pub descriptors: usize,
    /// Threads.
    pub threads: u64,
}

/// Returns the readings of a process.
///
/// # Errors
/// The process is gone.
pub fn readings(pid: u32) -> io::Result<Readings> {
    let folder = format!("/proc/{pid}");
    let status = std::fs::read_to_string(format!("{folder}/status"))?;
    let field = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.split_whitespace().next()?.parse::<u64>().ok()
    };
    let stat = std::fs::read_to_string(format!("{folder}/stat"))?;
    // the name in parentheses may hold blanks; user and system time are the 12th and 13th field after the name, in hundredths of a second
    let fields = stat.rsplit_once(')').map_or("", |(_, rest)| rest);
    let ticks: u64 = fields
        .split_whitespace()
        .skip(11)
        .take(2)
        .filter_map(|field| field.parse::<u64>().ok())
        .sum();
    Ok(Readings {
        rss: field("VmRSS:").unwrap_or_default() << 10,
        peak: field("VmHWM:").unwrap_or_default() << 10,
        cpu_seconds: ticks as f64 / 100.0,
        descriptors: std::fs::read_dir(format!("{folder}/fd"))?.count(),
        threads: field("Threads:").unwrap_or_default(),
    })
}

/// Sets the peak of a process of this user to its present resident bytes.
///
/// # Errors
/// The process is gone, or the kernel does not allow it.
pub fn reset_peak(pid: u32) -> io::Result<()> {
    std::fs::write(format!("/proc/{pid}/clear_refs"), "5")
}

/// Returns the size of a log file in bytes; zero for a missing file.
pub fn file_bytes(path: &Path) -> u64 {
    std::fs::metadata(path).map_or(0, |file| file.len())
}

/// Gets a page by HTTP/1.1 and returns its status and body.
///
/// # Errors
/// The server is unreachable, late, or does not speak HTTP.
pub fn http_get(http: &str, path: &str, patience: Duration) -> io::Result<(u16, String)> {
    let end = Instant::now() + patience;
    let mut stream = open(http, patience)?;
    let host = address(http)?;
    write!(
        stream,
        "GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n\r\n"
    )?;
    let mut bytes = Vec::new();
    let mut scratch = [0; 16 << 10];
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        stream.set_read_timeout(Some(left))?;
        match stream.read(&mut scratch) {
            Ok(0) => break,
            Ok(count) => bytes.extend_from_slice(scratch.get(..count).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    let text = String::from_utf8_lossy(&bytes);
    let bad = || {
        let start: String = text.chars().take(40).collect();
        io::Error::new(
            ErrorKind::InvalidData,
            format!("failed to read http://{http}{path}: found `{start}`, expected HTTP"),
        )
    };
    let (head, body) = text.split_once("\r\n\r\n").ok_or_else(bad)?;
    let status = head
        .split(' ')
        .nth(1)
        .and_then(|code| code.parse().ok())
        .ok_or_else(bad)?;
    Ok((status, body.to_owned()))
}

/// Returns whether `/healthz` answers 200 within `patience`.
pub fn healthy(http: &str, patience: Duration) -> bool {
    matches!(http_get(http, "/healthz", patience), Ok((200, _)))
}

/// Returns a value of `/metrics`; `name` includes any labels.
///
/// # Errors
/// The page is unavailable or lacks this value.
pub fn metric(http: &str, name: &str, patience: Duration) -> io::Result<f64> {
    let (_, text) = http_get(http, "/metrics", patience)?;
    let value = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(' ')?.trim().parse().ok());
    value.ok_or_else(|| {
        io::Error::new(
            ErrorKind::NotFound,
            format!("failed to find `{name}` in http://{http}/metrics"),
        )
    })
}
