//! The command line of `export`.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use policy::config::WeightMode;
use process::exit::CODES;

/// Writes pi0 and pi0.5 policies as ONNX bundles and checks bundles.
#[derive(Debug, Parser)]
#[command(version, arg_required_else_help = true, after_help = CODES)]
pub(crate) struct Cli {
    /// The subcommand.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The subcommands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Write a policy bundle from an openpi checkpoint
    Onnx(OnnxArgs),
    /// Check a bundle: digests, manifest, weights, graphs, and one golden run in the engine
    Check(CheckArgs),
}

/// `export onnx`
#[derive(Debug, Args)]
pub(crate) struct OnnxArgs {
    /// Run configuration with the policy's sizes
    #[arg(long, value_name = "CONFIG.toml")]
    pub(crate) config: PathBuf,
    /// Checkpoint in the layout of openpi
    #[arg(long, value_name = "MODEL.safetensors")]
    pub(crate) checkpoint: PathBuf,
    /// Folder of the new bundle; it must not exist
    #[arg(long, value_name = "DIR")]
    pub(crate) out: PathBuf,
    /// Policy version of the bundle
    #[arg(long, value_name = "N", default_value_t = 0)]
    pub(crate) policy_version: u64,
    /// Batch size of the graphs: a number, or `dynamic` (with `rollout.provider = "cuda"`: `rollout.max_batch`)
    #[arg(long, value_name = "N|dynamic", default_value = "dynamic", value_parser = batch)]
    pub(crate) batch: Batch,
    /// Location of the denoise graph's weights; default: as in the configuration
    #[arg(long, value_enum)]
    pub(crate) weights: Option<Weights>,
    /// Export without a value head even if the configuration has one (an SFT checkpoint has no value head)
    #[arg(long)]
    pub(crate) without_value_head: bool,
    /// Override a key of the configuration, like `actor.model.num_steps=4`; repeatable
    #[arg(long = "set", value_name = "KEY=VALUE")]
    pub(crate) overrides: Vec<String>,
}

/// `export check`
#[derive(Debug, Args)]
pub(crate) struct CheckArgs {
    /// Folder of the bundle
    #[arg(value_name = "DIR")]
    pub(crate) dir: PathBuf,
    /// Skip the golden run, which needs the program `rollout-engine` in the folder of `export`
    #[arg(long)]
    pub(crate) no_run: bool,
}

/// Batch size of the graphs; `None` is the symbolic batch.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Batch(pub(crate) Option<usize>);

fn batch(text: &str) -> Result<Batch, String> {
    if text == "dynamic" {
        return Ok(Batch(None));
    }
    match text.parse() {
        Ok(n @ 1..=65_536) => Ok(Batch(Some(n))),
        _ => Err("expected a number from 1 to 65536, or `dynamic`".to_owned()),
    }
}

/// Weight mode on the command line.
#[derive(Debug, Clone, Copy, ValueEnum)]
pub(crate) enum Weights {
    /// External data at offsets in the safetensors file
    Constants,
    /// Graph inputs, bound by the engine
    Inputs,
}

impl From<Weights> for WeightMode {
    fn from(weights: Weights) -> Self {
        match weights {
            Weights::Constants => Self::Constants,
            Weights::Inputs => Self::Inputs,
        }
    }
}
