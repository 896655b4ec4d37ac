//! `bench-engine`: requests per second and round trips of one engine or of several side by side, by the number of clients.
//!
//! `scripts/bench-engine` builds and starts this program. The engines serve the same random policy of the tabletop's sizes over the real
//! wire; while one engine is measured, the others wait.
#![expect(
    clippy::expect_used,
    reason = "a measurement ends with the reason when its own machine fails it"
)]

use std::{
    fs::OpenOptions,
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    time::Duration,
};

use clap::Parser;
use integration_tests::{
    load::{Load, interleaved},
    probe::{Pace, Question, steady_clients},
    ring::{plan, program},
    siege::millis,
    standalone::{Limits, Programs, Server, random_bundle},
};

/// Duration of the requests to an engine before each measurement of a number of clients.
const WARM_UP: Duration = Duration::from_millis(500);

/// Measures requests per second and round trips of engines that serve the tabletop policy, by the number of clients.
#[derive(Debug, Parser)]
#[command(version)]
struct Args {
    /// A rollout-engine; may be repeated to compare several. The `export` in its folder makes its bundle. Default: the rollout-engine in
    /// this program's folder.
    #[arg(long, value_name = "PROGRAM")]
    engine: Vec<PathBuf>,
    /// Numbers of concurrent clients, each with one row per request, without a pause.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 4, 16, 64])]
    clients: Vec<usize>,
    /// Number of rounds for each number of clients; a round measures every engine once.
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Duration of an engine's measurement in a round, in seconds.
    #[arg(long, default_value_t = 2.0)]
    seconds: f64,
    /// Override a key of the quickstart's configuration, such as `rollout.threads=2`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// File to which one JSON object per number of clients and engine is appended.
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn start(engine: &Path, dir: &Path, overrides: &[&str]) -> Server {
    std::fs::create_dir_all(dir).expect("creating a folder for an engine");
    let plan = plan(dir, overrides);
    let beside = engine.parent().filter(|folder| folder.join("export").is_file());
    let programs = Programs::new(beside.and_then(Path::to_str));
    let bundle = random_bundle(&programs, &plan, dir);
    Server::engine_of(engine, &bundle, &plan, dir, Limits::default())
}

/// Returns one line of the table.
fn row(clients: usize, name: &str, load: &Load) -> String {
    let trips = &load.trips;
    let (p50, p99) = (millis(trips.quantile(0.5)), millis(trips.quantile(0.99)));
    let faults = if load.good() {
        String::new()
    } else {
        format!(
            "  FAILED: answered {}, lost {}, wrong {}",
            trips.answered, trips.lost, trips.wrong
        )
    };
    format!("{clients:7}  {name:6} {:10.1} {p50:9.3} {p99:9.3}{faults}", load.rate())
}

/// Returns the line with an engine's numbers divided by those of the first engine.
fn ratio(name: &str, first: &Load, load: &Load) -> String {
    let quantile = |q| load.trips.quantile(q).as_secs_f64() / first.trips.quantile(q).as_secs_f64();
    let mut rounds: Vec<f64> = load
        .rates
        .iter()
        .zip(&first.rates)
        .map(|(one, other)| one / other)
        .collect();
    rounds.sort_by(f64::total_cmp);
    format!(
        "         {:6} {:10.3} {:9.3} {:9.3}  requests/s by round: {:.3} to {:.3}",
        format!("{name}/A"),
        load.rate() / first.rate(),
        quantile(0.5),
        quantile(0.99),
        rounds.first().copied().unwrap_or(f64::NAN),
        rounds.last().copied().unwrap_or(f64::NAN)
    )
}

fn main() -> ExitCode {
    let args = Args::parse();
    let engines = if args.engine.is_empty() {
        vec![program("rollout-engine")]
    } else {
        args.engine
    };
    let names: Vec<String> = (b'A'..=b'Z')
        .take(engines.len())
        .map(|letter| char::from(letter).to_string())
        .collect();
    let scratch = tempfile::tempdir().expect("creating a folder for the engines");
    let overrides: Vec<&str> = args.set.iter().map(String::as_str).collect();
    let servers: Vec<Server> = engines
        .iter()
        .zip(&names)
        .map(|(engine, name)| start(engine, &scratch.path().join(name), &overrides))
        .collect();
    let endpoints: Vec<String> = servers.iter().map(|server| server.listen.clone()).collect();
    let question = Question::act(&plan(scratch.path(), &overrides));
    let pace = |duration| Pace {
        duration,
        requests: None,
        between: Duration::ZERO,
    };

    let mut out = std::io::stdout();
    let mut say = |line: &str| writeln!(out, "{line}").expect("writing to standard output");
    for (name, engine) in names.iter().zip(&engines) {
        say(&format!("{name}: {}", engine.display()));
    }
    say("clients  engine requests/s    p50 ms    p99 ms");
    let mut good = true;
    for &clients in &args.clients {
        for endpoint in &endpoints {
            steady_clients(endpoint, &question, clients, pace(WARM_UP));
        }
        let loads = interleaved(
            &endpoints,
            &question,
            clients,
            args.rounds,
            pace(Duration::from_secs_f64(args.seconds)),
        );
        for (name, load) in names.iter().zip(&loads) {
            say(&row(clients, name, load));
            good &= load.good();
        }
        for (name, load) in names.iter().zip(&loads).skip(1) {
            say(&ratio(name, &loads[0], load));
        }
        if let Some(path) = &args.json {
            let mut file = OpenOptions::new()
                .append(true)
                .create(true)
                .open(path)
                .expect("opening the JSON file");
            for (engine, load) in engines.iter().zip(&loads) {
                let line = serde_json::json!({
                    "name": "requests_per_second",
                    "clients": clients,
                    "value": load.rate(),
                    "unit": "1/s",
                    "p50_ms": millis(load.trips.quantile(0.5)),
                    "p99_ms": millis(load.trips.quantile(0.99)),
                    "source": engine,
                });
                writeln!(file, "{line}").expect("writing the JSON file");
            }
        }
    }
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
