//! `learner`: supervised stages, online RL and evaluation of pi0 and pi0.5 policies.

use std::{io::Write, path::PathBuf, process::ExitCode};

use clap::{Args, Parser, Subcommand};
use learner::{
    bench, exit, inspect, method, report,
    ring::native,
    run::{evaluate, resume::Resume, train},
    supervised,
};
use policy::{
    bundle::write_atomic,
    config::{ConfigError, Origins, RunConfig},
    plan::RunPlan,
};
use process::exit::{CODES, failed};
use tch::Cuda;

/// Trains pi0 and pi0.5 policies: pre-training and SFT, then online RL against a rollout engine.
#[derive(Parser)]
#[command(version, after_help = CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Args)]
struct Config {
    /// Configuration of the run (configs/README.md explains every key).
    #[arg(long)]
    config: PathBuf,
    /// Override a key, like `--set algorithm.gamma=0.99`; may be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    overrides: Vec<String>,
}

#[derive(Subcommand)]
enum Command {
    /// Describe a configuration: sizes, batch arithmetic, each key's effect and source file, differences from the reference. Starts nothing
    /// and needs no checkpoint.
    Inspect {
        /// The configuration.
        config: PathBuf,
        /// Override a key, like `--set algorithm.gamma=0.99`; may be repeated.
        #[arg(long = "set", value_name = "KEY=VALUE")]
        overrides: Vec<String>,
    },
    /// Pre-train (when configured) and fine-tune on demonstrations; writes `OUTPUT_DIR/sft/model.safetensors`.
    Sft(Config),
    /// Train with online RL from the SFT checkpoint; publishes a policy version per iteration.
    Train {
        #[command(flatten)]
        config: Config,
        /// Resume from a checkpoint: a folder `OUTPUT_DIR/checkpoints/iteration_N`, or `auto` for the run's newest complete checkpoint
        /// (a fresh start if the run has none).
        #[arg(long, value_name = "auto|PATH")]
        resume: Option<Resume>,
    },
    /// Measure success of bundles on unseen episodes (ODE sampling, fixed seeds).
    Eval {
        #[command(flatten)]
        config: Config,
        /// Bundle to evaluate; several bundles are compared on the same episodes.
        #[arg(long, required = true)]
        bundle: Vec<PathBuf>,
        /// Number of episodes; `env.eval.episodes` of the configuration when absent.
        #[arg(long)]
        episodes: Option<usize>,
        /// Write a GIF of one episode with every bundle.
        #[arg(long)]
        gif: Option<PathBuf>,
        /// Write the results as JSON.
        #[arg(long)]
        json: Option<PathBuf>,
    },
    /// Measure the update with the prefix cache off, in memory and on disk, on drawn observations of the configured sizes.
    Bench {
        #[command(flatten)]
        config: Config,
        /// Number of chunk records of the iteration.
        #[arg(long, default_value_t = 512)]
        records: usize,
        /// Number of updates for each place of the prefix cache.
        #[arg(long, default_value_t = 3)]
        repeats: usize,
    },
    /// Write one HTML page about several runs: success curves, final numbers, evaluation videos, configuration differences.
    Report {
        /// Folder of a run (`runner.output_dir`); runs that differ only in `runner.seed` become one curve with its range.
        #[arg(required = true)]
        run: Vec<PathBuf>,
        /// Output page; when absent, `report.html` in the folder that contains the first run.
        #[arg(long)]
        out: Option<PathBuf>,
        /// Also write the success curves as a PNG. Runs in folders named FACTOR.VALUE are drawn in a panel for each factor, other runs in
        /// every panel.
        #[arg(long)]
        picture: Option<PathBuf>,
    },
}

fn plan(config: &Config) -> Result<RunPlan, ConfigError> {
    Ok(plan_with_origins(config)?.0)
}

fn plan_with_origins(config: &Config) -> Result<(RunPlan, Origins), ConfigError> {
    let (config, origins) = RunConfig::load_with_origins(&config.config, &config.overrides)?;
    match RunPlan::new(config) {
        Ok(plan) => Ok((plan, origins)),
        Err(error) => Err(error.locate(&origins)),
    }
}

fn run(cli: Cli) -> anyhow::Result<()> {
    match cli.command {
        Command::Inspect { config, overrides } => {
            let (plan, origins) = plan_with_origins(&Config { config, overrides })?;
            method::check(&plan).map_err(|error| error.locate(&origins))?;
            Ok(std::io::stdout().write_all(inspect::describe(&plan, &origins)?.as_bytes())?)
        }
        Command::Sft(config) => Ok(supervised::supervised(&plan(&config)?)?),
        Command::Train { config, resume } => {
            let (plan, origins) = plan_with_origins(&config)?;
            Ok(train::train(&plan, resume.as_ref()).map_err(|error| error.locate(&origins))?)
        }
        Command::Eval {
            config,
            bundle,
            episodes,
            gif,
            json,
        } => {
            let plan = plan(&config)?;
            let episodes = episodes.unwrap_or(plan.config.env.eval.episodes);
            let results = evaluate::bundles(&plan, &bundle, episodes, gif.as_deref())?;
            let mut out = std::io::stdout();
            for (version, success) in &results {
                writeln!(
                    out,
                    "version {version}: success {success:.3} on {episodes} unseen episodes"
                )?;
            }
            if let Some(path) = json {
                let list: Vec<_> = results
                    .iter()
                    .map(|(version, success)| {
                        serde_json::json!({ "version": version, "success": success, "episodes": episodes })
                    })
                    .collect();
                write_atomic(&path, &serde_json::to_vec_pretty(&list)?)?;
            }
            Ok(())
        }
        Command::Bench {
            config,
            records,
            repeats,
        } => {
            let table = bench::update(&plan(&config)?, records, repeats)?;
            Ok(write!(std::io::stdout(), "{table}")?)
        }
        Command::Report { run, out, picture } => {
            let page = report::write(&run, out.as_deref(), picture.as_deref())?;
            Ok(writeln!(std::io::stdout(), "{}", page.display())?)
        }
    }
}

fn main() -> ExitCode {
    process::log::start();
    if native::register_cuda() {
        // cuDNN rounds the inputs of convolutions to tf32; log-probabilities then differ from the engine's by 1e-3
        Cuda::set_user_enabled_cudnn(false);
    }
    match run(Cli::parse()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let code = failed("learner", error.as_ref(), exit::class);
            for line in error.chain().find_map(exit::log_tail).unwrap_or_default().lines() {
                // when standard error is closed too, only the exit code reports the failure
                drop(writeln!(std::io::stderr(), "    {line}"));
            }
            code
        }
    }
}
