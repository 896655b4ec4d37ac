//! The program `export`: writes policy bundles from checkpoints, and checks bundles.

mod args;

use std::{io::Write, path::Path, process::ExitCode};

use anyhow::Context;
use clap::Parser;
use export::{
    BundleSpec, ExportError, GraphSource, WeightSource, check_bundle,
    exit::{CommandError, class},
    manifest_of, tokenizer_of, write_bundle,
};
use policy::{
    bundle::BundleError,
    config::{Flavour, RunConfig},
    params::{ParamSpec, params},
    plan::RunPlan,
    transform::Transform,
    weights::WeightFile,
};
use process::exit::failed;

use crate::args::{CheckArgs, Cli, Command, OnnxArgs};

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match &cli.command {
        Command::Onnx(args) => onnx(args),
        Command::Check(args) => check(args),
    };
    match done.and_then(|line| writeln!(std::io::stdout(), "{line}").context("writing to standard output")) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed("export", error.as_ref(), class),
    }
}

fn onnx(args: &OnnxArgs) -> anyhow::Result<String> {
    if args.out.exists() {
        return Err(BundleError::Exists(args.out.clone()).into());
    }
    let (mut config, origins) = RunConfig::load_with_origins(&args.config, &args.overrides)?;
    if let Some(weights) = args.weights {
        config.rollout.weights = weights.into();
    }
    let mut plan = RunPlan::new(config).map_err(|error| error.locate(&origins))?;
    let transform = Transform::load(&plan.config.actor.model).map_err(ExportError::from)?;
    for line in transform.contract().warnings() {
        writeln!(std::io::stderr(), "export: warning: {line}").context("writing to standard error")?;
    }
    let path = args.checkpoint.display();
    let checkpoint = WeightFile::open(&args.checkpoint).with_context(|| format!("checkpoint `{path}`"))?;
    if args.without_value_head {
        plan.heads.value = None;
    } else if plan.heads.value.is_some() && !checkpoint.names().iter().any(|name| name.starts_with("value_head.")) {
        return Err(CommandError::NoValueHead(args.checkpoint.clone()).into());
    }
    let all = params(&plan.dims, &plan.heads);
    let wanted: Vec<&ParamSpec> = all.iter().collect();
    checkpoint
        .check_header(&wanted)
        .with_context(|| format!("checkpoint `{path}`"))?;

    let norm_stats = transform.contract().norm_stats.clone();
    let manifest = manifest_of(&plan, args.policy_version, args.batch.0, norm_stats, None);
    let spec = BundleSpec {
        manifest,
        vlm: WeightSource::Weights(&checkpoint),
        expert: WeightSource::Weights(&checkpoint),
        graphs: GraphSource::Build,
        tokenizer: tokenizer_of(&plan)?,
    };
    let bundle = write_bundle(&args.out, spec).map_err(|error| match error {
        ExportError::Weights { source, .. } => anyhow::Error::new(source).context(format!("checkpoint `{path}`")),
        other => other.into(),
    })?;
    let bytes: u64 = bundle.manifest.files.iter().map(|file| file.bytes).sum();
    Ok(format!(
        "wrote bundle {}: policy version {}, {} weights, {:.1} MiB, batch {}, weights as {}",
        args.out.display(),
        bundle.manifest.policy_version,
        all.len(),
        bytes as f64 / f64::from(1 << 20),
        bundle
            .manifest
            .batch
            .map_or_else(|| "dynamic".to_owned(), |n| n.to_string()),
        match bundle.manifest.weights {
            policy::config::WeightMode::Constants => "constants",
            policy::config::WeightMode::Inputs => "inputs",
        }
    ))
}

fn check(args: &CheckArgs) -> anyhow::Result<String> {
    let report = check_bundle(&args.dir)?;
    let checked = format!(
        "bundle {}: policy version {}, {} files, {} weights, {} graph nodes",
        args.dir.display(),
        report.policy_version,
        report.files,
        report.weights,
        report.nodes
    );
    if args.no_run {
        return Ok(format!("{checked}: good, golden run left out"));
    }
    // the golden run is made by the engine, because this program links no runtime
    let own = std::env::current_exe().context("finding this program's folder")?;
    let engine = own.with_file_name("rollout-engine");
    if !engine.is_file() {
        let folder = own.parent().unwrap_or(Path::new(".")).to_owned();
        return Err(CommandError::NoEngine { checked, folder }.into());
    }
    let provider = match report.flavour {
        Flavour::Plain => "cpu",
        Flavour::Cuda => "cuda",
    };
    let run = std::process::Command::new(&engine)
        .arg("check")
        .arg(&args.dir)
        .args(["--provider", provider])
        .output()
        .with_context(|| format!("starting `{}` for the golden run", engine.display()))?;
    if !run.status.success() {
        let said = String::from_utf8_lossy(&run.stderr);
        let last = said
            .lines()
            .rev()
            .find(|line| !line.trim().is_empty())
            .unwrap_or("no message")
            .trim();
        return Err(CommandError::GoldenRun {
            checked,
            status: run.status,
            said: last.to_owned(),
        }
        .into());
    }
    let said = String::from_utf8_lossy(&run.stdout);
    let lines: Vec<&str> = said.lines().map(str::trim).filter(|line| !line.is_empty()).collect();
    Ok(format!("{checked}: good; golden run: {}", lines.join("; ")))
}
