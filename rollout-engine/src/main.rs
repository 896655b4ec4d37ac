//! `rollout-engine`: serve, check, bench.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::Arc,
    time::Duration,
};

use anyhow::Context;
use clap::{Args, Parser, Subcommand, ValueEnum};
use policy::{
    config::{BootstrapType, Provider, RunConfig},
    plan::RunPlan,
};
use process::exit::{CODES, failed};
use rollout_engine::{
    bench::chunk_latency,
    device::{
        Device,
        onnx::{OnnxDevice, OnnxLoader, OnnxRuntime, provider_name},
        versions::Policy,
    },
    exit::{UsageError, class},
    serve::{Options, serve},
};
use tokio::sync::watch;

/// Serves a pi0 / pi0.5 policy bundle with ONNX Runtime: action chunks for env workers and robots, chunk records for training.
#[derive(Debug, Parser)]
#[command(version, after_help = CODES)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Serve until SIGTERM or ctrl-c.
    Serve(ServeArgs),
    /// Open, verify and load a bundle, and run its self-test once.
    Check(CheckArgs),
    /// Measure chunk latency by batch size.
    Bench(BenchArgs),
}

#[derive(Debug, Args)]
struct ServeArgs {
    /// Run configuration (TOML); the engine reads `[rollout]`.
    #[arg(long)]
    config: PathBuf,
    /// Override a key, like `rollout.max_batch=16`; repeatable.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Bundle to serve from the start; without a bundle the first version comes from the learner.
    #[arg(long, value_name = "DIR")]
    bundle: Option<PathBuf>,
    /// The learner's endpoint, tcp://HOST:PORT; default: `learner.listen`.
    #[arg(long, value_name = "ENDPOINT", conflicts_with = "standalone")]
    learner: Option<String>,
    /// Serve without a learner, as on a robot; needs --bundle.
    #[arg(long, requires = "bundle")]
    standalone: bool,
    /// Endpoint for env workers and clients; default: `rollout.listen`.
    #[arg(long, value_name = "ENDPOINT")]
    listen: Option<String>,
    /// HOST:PORT of /healthz and /metrics; default: `rollout.http`.
    #[arg(long, value_name = "HOST:PORT")]
    http: Option<String>,
    /// Folder for fetched bundles, not shared with another engine; default: `engine` in `runner.output_dir`.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Write the bound endpoints as JSON: {"listen": ..., "http": ...}.
    #[arg(long, value_name = "FILE")]
    endpoints_file: Option<PathBuf>,
}

#[derive(Debug, Clone, Copy, ValueEnum)]
enum ProviderArg {
    Cpu,
    Cuda,
    Tensorrt,
}

impl From<ProviderArg> for Provider {
    fn from(provider: ProviderArg) -> Self {
        match provider {
            ProviderArg::Cpu => Self::Cpu,
            ProviderArg::Cuda => Self::Cuda,
            ProviderArg::Tensorrt => Self::Tensorrt,
        }
    }
}

#[derive(Debug, Args)]
struct BackendArgs {
    /// Execution provider.
    #[arg(long, value_enum, default_value = "cpu")]
    provider: ProviderArg,
    /// Threads of ONNX Runtime per session.
    #[arg(long, default_value_t = 1)]
    threads: usize,
}

#[derive(Debug, Args)]
struct CheckArgs {
    /// Folder of the bundle.
    dir: PathBuf,
    #[command(flatten)]
    backend: BackendArgs,
}

#[derive(Debug, Args)]
struct BenchArgs {
    /// Folder of the bundle.
    #[arg(long, value_name = "DIR")]
    bundle: PathBuf,
    #[command(flatten)]
    backend: BackendArgs,
    /// Batch sizes, in rows.
    #[arg(long, value_delimiter = ',', default_values_t = [1, 2, 4, 8, 16])]
    batch: Vec<usize>,
    /// Measured batches per batch size.
    #[arg(long, default_value_t = 100)]
    batches: usize,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    process::log::start();
    let result = match cli.command {
        Command::Serve(args) => run_serve(args),
        Command::Check(args) => check(&args.dir, &args.backend),
        Command::Bench(args) => bench(&args),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => failed("rollout-engine", error.as_ref(), class),
    }
}

/// Time that the shutdown waits for a load in the background.
const LOAD_PATIENCE: Duration = Duration::from_secs(5);

fn run_serve(args: ServeArgs) -> anyhow::Result<()> {
    let (config, origins) = RunConfig::load_with_origins(&args.config, &args.set)?;
    let config = RunPlan::new(config).map_err(|error| error.locate(&origins))?.config;
    let mut rollout = config.rollout;
    if let Some(listen) = args.listen {
        rollout.listen = listen;
    }
    if let Some(http) = args.http {
        rollout.http = http;
    }
    let learner = (!args.standalone).then(|| args.learner.unwrap_or(config.learner.listen));
    if let Some(endpoint) = &learner {
        wire::socket::check_endpoint(endpoint)?;
        if endpoint.ends_with(":0") {
            return Err(UsageError::NoPort(endpoint.clone()).into());
        }
    }
    let options = Options {
        rollout,
        bundle: args.bundle,
        learner,
        state_dir: args
            .state_dir
            .unwrap_or_else(|| config.runner.output_dir.join("engine")),
        bootstrap_terminated: config.algorithm.bootstrap_type == BootstrapType::Always,
        endpoints_file: args.endpoints_file,
    };
    // one thread for the sockets, one to load bundles; inference has its own thread
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .context("starting the runtime")?;
    let result = runtime.block_on(async {
        let (stop_sender, stop) = watch::channel(false);
        process::stop::on_signal(move || {
            stop_sender.send_replace(true);
        })
        .context("listening for SIGTERM and ctrl-c")?;
        Ok(serve(options, stop).await?)
    });
    // ONNX Runtime must not be torn down while a load is still running
    runtime.shutdown_timeout(LOAD_PATIENCE);
    result
}

/// Loads a bundle onto a device owned by this thread.
fn load(dir: &Path, args: &BackendArgs) -> anyhow::Result<(OnnxDevice, Policy)> {
    let loader = OnnxLoader::new(OnnxRuntime::new(args.provider.into(), args.threads)?);
    let mut device = OnnxDevice::default();
    let install = |staged, test| device.install(staged, &test);
    let policy = Policy::load(&loader, dir, None, install, Arc::new(|_slot| {}))
        .with_context(|| format!("failed to load bundle `{}`", dir.display()))?;
    Ok((device, policy))
}

fn check(dir: &Path, args: &BackendArgs) -> anyhow::Result<()> {
    let (_device, policy) = load(dir, args)?;
    let manifest = policy.manifest();
    let bytes: u64 = manifest.files.iter().map(|f| f.bytes).sum();
    let test = policy.self_test_difference.map_or_else(
        || "finite (no reference in the manifest)".to_owned(),
        |difference| format!("within {difference:.1e} of the publisher"),
    );
    writeln!(
        std::io::stdout(),
        "bundle `{}`: policy version {}, {:?}, {} files, {bytes} bytes, provider {}, self-test {test}",
        dir.display(),
        policy.version(),
        manifest.dims.variant,
        manifest.files.len() + 1,
        provider_name(args.provider.into()),
    )
    .context("writing to stdout")
}

fn bench(args: &BenchArgs) -> anyhow::Result<()> {
    let (mut device, policy) = load(&args.bundle, &args.backend)?;
    let mut out = std::io::stdout();
    let mut rows = Vec::new();
    writeln!(
        out,
        "{:>6} {:>10} {:>10} {:>12} {:>12} {:>12}",
        "batch", "p50 ms", "p99 ms", "prefix ms", "denoise ms", "chunks/s"
    )?;
    for batch in &args.batch {
        if *batch == 0 || args.batches == 0 {
            return Err(UsageError::NoBatch.into());
        }
        let row = chunk_latency(&mut device, &policy, *batch, args.batches)?;
        writeln!(
            out,
            "{:>6} {:>10.3} {:>10.3} {:>12.3} {:>12.3} {:>12.1}",
            row.batch, row.p50_ms, row.p99_ms, row.prefix_p50_ms, row.denoise_p50_ms, row.chunks_per_second
        )?;
        rows.push(row);
    }
    for row in rows {
        writeln!(out, "{}", serde_json::to_string(&row)?)?;
    }
    Ok(())
}
