//! `env-worker`: serves environments to an engine, and writes their data sets.

use std::{io::Write, num::NonZeroUsize, path::PathBuf};

use anyhow::Context;
use clap::{Parser, Subcommand};
use envs::{dataset, exit::class, registry, tabletop};
use process::exit::{CODES, failed};

/// Environments of pirl: serve them to an engine, or write their data sets.
#[derive(Parser)]
#[command(version, after_help = CODES)]
struct Args {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Drive slots of an environment against a rollout engine; waits for the engine and reconnects.
    Serve {
        /// Endpoint of the engine.
        #[arg(long, default_value = "tcp://127.0.0.1:5555")]
        engine: String,
        /// Environment name.
        #[arg(long, default_value = "tabletop")]
        env: String,
        /// Parameters of the environment as TOML, like `grasp_tol = 0.05`; one key per line.
        #[arg(long, default_value = "")]
        params: String,
        /// Number of slots.
        #[arg(long)]
        num_envs: NonZeroUsize,
        /// Name of this worker, unchanged across restarts.
        #[arg(long, default_value = "env-worker-0")]
        name: String,
    },
    /// Write demonstrations of the tabletop's scripted demonstrator.
    Demos {
        /// Parameters as TOML; `demo_bias` and `demo_noise` set the demonstrator's error.
        #[arg(long, default_value = "")]
        params: String,
        /// Number of successful episodes to write.
        #[arg(long)]
        episodes: NonZeroUsize,
        /// Actions per row.
        #[arg(long)]
        horizon: NonZeroUsize,
        /// Seed.
        #[arg(long)]
        seed: u64,
        /// File to write.
        #[arg(long)]
        out: PathBuf,
    },
    /// Write random scenes of the tabletop with key points, for vision-language pre-training.
    Scenes {
        /// Parameters as TOML.
        #[arg(long, default_value = "")]
        params: String,
        /// Number of scenes.
        #[arg(long)]
        count: NonZeroUsize,
        /// Seed.
        #[arg(long)]
        seed: u64,
        /// File to write.
        #[arg(long)]
        out: PathBuf,
    },
}

fn table(text: &str) -> anyhow::Result<toml::Table> {
    text.parse().with_context(|| format!("--params `{text}` is not TOML"))
}

fn tabletop_params(text: &str) -> anyhow::Result<tabletop::TabletopParams> {
    Ok(tabletop::TabletopParams::parse(table(text)?)?)
}

fn run(args: Args) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    match args.command {
        Command::Serve {
            engine,
            env,
            params,
            num_envs,
            name,
        } => {
            let mut env = registry::make(&env, num_envs.get(), table(&params)?)?;
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            let (stop_sender, mut stop) = tokio::sync::watch::channel(false);
            process::stop::on_signal(move || {
                stop_sender.send_replace(true);
            })
            .context("listening for SIGTERM and ctrl-c")?;
            runtime.block_on(async {
                tokio::select! {
                    served = envs::worker::serve(&engine, &name, env.as_mut()) => Ok(served?),
                    _ = stop.wait_for(|stop| *stop) => Ok(()),
                }
            })
        }
        Command::Demos {
            params,
            episodes,
            horizon,
            seed,
            out: path,
        } => {
            let rows = dataset::write_demos(&path, &tabletop_params(&params)?, episodes.get(), horizon.get(), seed)?;
            Ok(writeln!(out, "{}: {episodes} episodes, {rows} rows", path.display())?)
        }
        Command::Scenes {
            params,
            count,
            seed,
            out: path,
        } => {
            dataset::write_scenes(&path, &tabletop_params(&params)?, count.get(), seed)?;
            Ok(writeln!(out, "{}: {count} scenes", path.display())?)
        }
    }
}

fn main() -> std::process::ExitCode {
    process::log::start();
    match run(Args::parse()) {
        Ok(()) => std::process::ExitCode::SUCCESS,
        Err(error) => failed("env-worker", error.as_ref(), class),
    }
}
