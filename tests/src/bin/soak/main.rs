//! The soak: an engine and a learner under hostile peers, for as long as one likes, with a well-behaved client in addition.
//!
//! `scripts/soak` builds and starts this program. Attackers are processes of their own, so that they take neither memory nor descriptors
//! from the client that measures, and give way to it (`nice`), as attackers on another machine would.
#![expect(
    clippy::expect_used,
    reason = "the soak ends with the reason when its own machine fails it"
)]

use std::{
    io::{Read, Write},
    path::{Path, PathBuf},
    process::ExitCode,
    thread,
};

use clap::{Args, Parser, Subcommand};
use integration_tests::{
    attacks::ATTACKS,
    ring,
    siege::GRACE,
    standalone::{Programs, Server},
};
use policy::plan::RunPlan;

mod churn;
mod hostile;
mod kills;
mod latency;
mod reconnect;

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

/// The attacked programs.
#[derive(Debug, Args)]
struct Attacked {
    /// Folder of rollout-engine, learner, export and env-worker; default: `PIRL_PROGRAMS`, else beside this program.
    #[arg(long, value_name = "DIR")]
    programs: Option<String>,
    /// Address space of an attacked process in GiB (`ulimit -v`); default: no limit.
    #[arg(long, value_name = "GIB")]
    address_space_gib: Option<u64>,
}

impl Attacked {
    fn programs(&self) -> Programs {
        Programs::new(self.programs.as_deref())
    }

    /// Bytes of address space.
    fn address_space(&self) -> Option<u64> {
        self.address_space_gib.map(|gib| gib << 30)
    }
}

/// Writes a line to standard output.
fn say(line: &str) {
    let mut out = std::io::stdout().lock();
    writeln!(out, "{line}").expect("writing to standard output");
    out.flush().expect("writing to standard output");
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
