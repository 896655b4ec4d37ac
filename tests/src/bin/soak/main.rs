//! The soak: an engine and a learner under hostile peers, for as long as one likes, with a well-behaved client in addition.
//!
//! `scripts/soak` builds and starts this program. Attackers are processes of their own, so that they take neither memory nor descriptors
//! from the client that measures, and give way to it (`nice`), as attackers on another machine would.
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

/// Long runs of an engine and a learner under hostile and under short-lived peers; fails where a bound is broken.
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
    /// Carry out every attack, with the round trips of a steady client beside it and idle.
    Hostile(hostile::HostileArgs),
    /// Measure how soon an env worker and an engine are connected when the other side returns.
    Reconnect(reconnect::ReconnectArgs),
    /// Kill learner, engine and env worker at random moments of a run, and compare it with one that was left alone.
    Kills(kills::KillsArgs),
    /// Measure round trips of well-behaved clients that ask a running engine for one row each.
    Latency(latency::LatencyArgs),
    /// Name the attacks.
    List,
    /// Be one attacker; ends with standard input.
    #[command(hide = true)]
    Attack(hostile::AttackArgs),
    /// Be one short-lived client after the other; ends with standard input.
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
