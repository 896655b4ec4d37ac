//! `soak churn`: short-lived well-behaved clients from several processes, and the process of such a client.

use std::{
    io::{BufRead, BufReader},
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use clap::{Args, ValueEnum};
use integration_tests::{
    attacks::PATIENCE,
    hostile::{Churn, Tally, act_frame, churn, pause},
    probe::readings,
    siege::own_process,
    standalone::{Limits, Server},
};

use crate::shared::{Attacked, end_with_parent, finish, plan, say, scratch};

/// Time without a served connection after which a phase counts as hung.
const HANG: Duration = Duration::from_secs(20);

/// Message of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Frame {
    /// A valid request, which is answered.
    Act,
    /// Bytes that are not a message, which are refused.
    Junk,
}

impl Frame {
    fn name(self) -> &'static str {
        match self {
            Self::Act => "act",
            Self::Junk => "junk",
        }
    }
}

/// Arguments of `soak churn`.
#[derive(Debug, Args)]
pub(crate) struct ChurnArgs {
    /// Number of connections of each phase.
    #[arg(default_value_t = 200_000)]
    connections: u64,
    /// Message of each connection.
    #[arg(long, value_enum, default_value_t = Frame::Act)]
    frame: Frame,
    #[command(flatten)]
    attacked: Attacked,
}

/// Arguments of a client process.
#[derive(Debug, Args)]
pub(crate) struct ServedArgs {
    #[arg(long)]
    endpoint: String,
    #[arg(long)]
    connections: u64,
    #[arg(long, value_enum)]
    frame: Frame,
}

/// Runs `soak served`, one well-behaved churning client; prints served and failed connections twice a second.
pub(crate) fn served(args: &ServedArgs) -> bool {
    end_with_parent();
    let plan = plan(&std::env::temp_dir());
    let junk = args.frame == Frame::Junk;
    let body = if junk {
        b"junk".to_vec()
    } else {
        act_frame(&plan, 1, 1, false)
    };
    let bounds = Churn {
        connections: args.connections,
        duration: Duration::from_hours(24),
        patience: HANG + PATIENCE,
    };
    let mut said = Instant::now();
    let line = |tally: &Tally| {
        // a refusal or the end of the connection counts as served for junk
        let refused = tally.refused + tally.closed;
        let served = tally.answered + if junk { refused } else { 0 };
        format!("{served} {}", tally.opened + tally.unopened - served)
    };
    let tally = churn(&args.endpoint, &body, bounds, |tally| {
        if said.elapsed() >= Duration::from_millis(500) {
            said = Instant::now();
            say(&line(tally));
        }
    });
    say(&line(&tally));
    true
}

/// Runs the phases, prints their table and returns whether every bound was kept.
pub(crate) fn run(args: &ChurnArgs) -> bool {
    let scratch = scratch();
    let connections = args.connections;
    let limits = Limits {
        address_space: args.attacked.address_space(),
        ..Limits::default()
    };
    let mut server = Server::engine(&args.attacked.programs(), &plan(scratch.path()), scratch.path(), limits);
    let mut good = true;
    say("processes connections served failed seconds connections/s rss MB peak MB log kB");
    for processes in [1, 2, 4, 8] {
        let log = server.log_bytes();
        let phase = churn_phase(&mut server, connections, processes, args.frame.name());
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
        // a client that has ended is only reaped
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
