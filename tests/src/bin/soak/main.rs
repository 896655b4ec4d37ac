//! The soak: an engine and a learner under hostile peers for any duration, with a well-behaved client in addition.
//!
//! `scripts/soak` builds and starts this program. Attackers are separate processes, so the measuring client keeps its memory
//! and descriptors. Attackers run at a lower priority (`nice`), like attackers on another host.
#![expect(
    clippy::expect_used,
    reason = "the soak ends with the reason when its own machine fails it"
)]

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use integration_tests::attacks::ATTACKS;

mod shared;
mod churn;
mod hostile;
mod kills;
mod latency;
mod reconnect;

use crate::shared::say;

/// Runs an engine and a learner for long under hostile and under short-lived peers; fails if a bound is exceeded.
#[derive(Debug, Parser)]
#[command(version)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve short-lived connections of 1, 2, 4 and 8 processes, with one request each.
    Churn(churn::ChurnArgs),
    /// Run every attack, and measure the round trips of a steady client during the attack and idle.
    Hostile(hostile::HostileArgs),
    /// Measure the time until an env worker and an engine reconnect when the other side returns.
    Reconnect(reconnect::ReconnectArgs),
    /// Kill learner, engine and env worker at random moments of a run, and compare with an undisturbed run.
    Kills(kills::KillsArgs),
    /// Measure round trips of well-behaved clients that request one row each from a running engine.
    Latency(latency::LatencyArgs),
    /// List the attacks.
    List,
    /// Run one attacker; ends with standard input.
    #[command(hide = true)]
    Attack(hostile::AttackArgs),
    /// Run short-lived clients in turn; ends with standard input.
    #[command(hide = true)]
    Served(churn::ServedArgs),
}

fn main() -> ExitCode {
    let good = match Cli::parse().command {
        Command::Churn(args) => churn::run(&args),
        Command::Hostile(args) => hostile::run(&args),
        Command::Reconnect(args) => reconnect::run(&args),
        Command::Kills(args) => kills::run(&args),
        Command::Latency(args) => latency::run(&args),
        Command::List => {
            for attack in &ATTACKS {
                say(&format!("{:18} {:?}", attack.name, attack.target));
            }
            true
        }
        Command::Attack(args) => hostile::attack(&args),
        Command::Served(args) => churn::served(&args),
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}
