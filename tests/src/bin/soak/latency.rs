//! `soak latency`: round trips of well-behaved clients of a running engine.

use std::time::Duration;

use clap::Args;
use integration_tests::{
    probe::{Pace, Question, steady_clients},
    siege::millis,
};

use crate::shared::{plan, say};

/// Arguments of `soak latency`.
#[derive(Debug, Args)]
pub(crate) struct LatencyArgs {
    /// Endpoint of the engine.
    #[arg(long)]
    engine: String,
    /// Number of concurrent clients.
    #[arg(long, default_value_t = 1)]
    clients: usize,
    /// Duration of the measurement in seconds.
    #[arg(long, default_value_t = 10)]
    seconds: u64,
    /// Pause of a client after each answer.
    #[arg(long, value_name = "MICROSECONDS", default_value_t = 0)]
    between_micros: u64,
}

/// Measures and prints one line.
pub(crate) fn run(args: &LatencyArgs) -> bool {
    let pace = Pace {
        duration: Duration::from_secs(args.seconds),
        requests: None,
        between: Duration::from_micros(args.between_micros),
    };
    let question = Question::act(&plan(&std::env::temp_dir()));
    let warm = Pace {
        duration: Duration::from_secs(1),
        ..pace
    };
    steady_clients(&args.engine, &question, args.clients, warm);
    let trips = steady_clients(&args.engine, &question, args.clients, pace);
    say(&format!(
        "clients {}: p50 {:.3} ms, p99 {:.3} ms, max {:.2} ms, {} answers, {:.0}/s, refused {}, lost {}, wrong {}",
        args.clients,
        millis(trips.quantile(0.5)),
        millis(trips.quantile(0.99)),
        millis(trips.quantile(1.0)),
        trips.answered,
        trips.answered as f64 / pace.duration.as_secs_f64(),
        trips.refused,
        trips.lost,
        trips.wrong
    ));
    if trips.answered == 0 {
        say(&format!("FAILED: `{}` answered no request", args.engine));
    }
    trips.answered > 0
}
