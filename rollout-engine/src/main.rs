//! `rollout-engine`: serve, check, bench, compare.

use std::{
    io::Write,
    path::{Path, PathBuf},
    process::ExitCode,
    sync::{Arc, mpsc},
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
    bench::{chunk_latency, reload_latency},
    compare::compare,
    device::{
        Device, Loader, Slot,
        cuda::{CudaDevice, CudaLoader, CudaOptions},
        library::provider_name,
        onnx::{OnnxDevice, OnnxLoader, OnnxRuntime},
        versions::{Free, Policy},
    },
    exit::{UsageError, class},
    front::websocket::WebsocketOptions,
    rehearse::rehearse,
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
    /// Open, verify and load a bundle, run its self-test, and push a drawn observation through everything.
    Check(CheckArgs),
    /// Measure chunk latency by batch size.
    Bench(BenchArgs),
    /// Compare a policy on a device with the same policy in f32 on the CPU.
    Compare(CompareArgs),
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
    /// HOST:PORT on loopback of the websocket endpoint for openpi's clients; port 0 picks a free port.
    #[arg(long, value_name = "HOST:PORT")]
    websocket: Option<String>,
    /// File of mode 0600 with the key that websocket clients must send (`Authorization: Api-Key KEY`).
    #[arg(long, value_name = "FILE", requires = "websocket")]
    api_key_file: Option<PathBuf>,
    /// Folder for fetched bundles, not shared with another engine; default: `engine` in `runner.output_dir`.
    #[arg(long, value_name = "DIR")]
    state_dir: Option<PathBuf>,
    /// Write the bound endpoints as JSON: {"listen": ..., "http": ..., "websocket": ...}.
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
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    threads: u16,
    /// Launch the operations of a graph one by one; provider cuda only.
    #[arg(long)]
    without_cuda_graphs: bool,
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
    /// Numbers of present cameras; default: all.
    #[arg(long, value_delimiter = ',')]
    cameras: Vec<usize>,
    /// Measured batches per batch size.
    #[arg(long, default_value_t = 100)]
    batches: usize,
    /// Folder of a bundle of the same policy; measures chunks while both bundles are loaded in turn.
    #[arg(long, value_name = "DIR")]
    reload: Option<PathBuf>,
    /// Number of loads.
    #[arg(long, default_value_t = 20, requires = "reload")]
    reloads: usize,
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    process::log::start();
    let result = match cli.command {
        Command::Serve(args) => run_serve(args),
        Command::Check(args) => on_device(&args.dir, &args.backend, &args),
        Command::Compare(args) => on_device(&args.bundle, &args.backend, &args),
        Command::Bench(args) => on_device(&args.bundle, &args.backend, &args),
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
        websocket: args.websocket.map(|address| WebsocketOptions {
            address,
            key_file: args.api_key_file,
        }),
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

#[derive(Debug, Args)]
struct CompareArgs {
    /// Folder of the bundle.
    #[arg(long, value_name = "DIR")]
    bundle: PathBuf,
    #[command(flatten)]
    backend: BackendArgs,
    /// Folder of a bundle with the same weights, of flavour plain; runs on the CPU.
    #[arg(long, value_name = "DIR")]
    reference: PathBuf,
    /// Threads of ONNX Runtime for the reference.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    reference_threads: u16,
    /// Compared chunks.
    #[arg(long, default_value_t = 8, value_parser = clap::value_parser!(u32).range(1..))]
    chunks: u32,
}

/// What a command does with a policy on a device.
trait Task {
    fn run<L: Loader>(&self, loaded: Loaded<'_, L>) -> anyhow::Result<()>;
}

/// A policy on a device owned by this thread.
struct Loaded<'a, L: Loader> {
    loader: &'a L,
    device: L::Device,
    policy: Policy,
    /// Returns slots to `freed`.
    free: Free,
    freed: mpsc::Receiver<Slot>,
}

/// Loads a bundle onto a device owned by this thread, and runs the task on it.
fn on_device(dir: &Path, args: &BackendArgs, task: &impl Task) -> anyhow::Result<()> {
    match args.provider {
        ProviderArg::Cpu | ProviderArg::Tensorrt if args.without_cuda_graphs => Err(UsageError::NoCuda.into()),
        ProviderArg::Cpu | ProviderArg::Tensorrt => {
            let loader = OnnxLoader::new(OnnxRuntime::new(args.provider.into(), args.threads.into())?);
            on(&loader, OnnxDevice::default(), dir, task)
        }
        ProviderArg::Cuda => {
            let options = CudaOptions {
                capture: !args.without_cuda_graphs,
                threads: args.threads.into(),
            };
            on(&CudaLoader::new(options)?, CudaDevice::default(), dir, task)
        }
    }
}

fn on<L: Loader>(loader: &L, mut device: L::Device, dir: &Path, task: &impl Task) -> anyhow::Result<()> {
    let (sender, freed) = mpsc::channel();
    let free: Free = Arc::new(move |slot| {
        // at the end of the program nobody receives
        let _ended = sender.send(slot);
    });
    let install = |staged, test| device.install(staged, &test);
    let policy = Policy::load(loader, dir, None, install, Arc::clone(&free))
        .with_context(|| format!("failed to load bundle `{}`", dir.display()))?;
    task.run(Loaded {
        loader,
        device,
        policy,
        free,
        freed,
    })
}

impl Task for CheckArgs {
    fn run<L: Loader>(&self, mut loaded: Loaded<'_, L>) -> anyhow::Result<()> {
        check(&self.dir, &self.backend, &mut loaded)
    }
}

impl Task for BenchArgs {
    fn run<L: Loader>(&self, loaded: Loaded<'_, L>) -> anyhow::Result<()> {
        bench(self, loaded)
    }
}

impl Task for CompareArgs {
    fn run<L: Loader>(&self, mut loaded: Loaded<'_, L>) -> anyhow::Result<()> {
        let mut reference = OnnxDevice::default();
        let loader = OnnxLoader::new(OnnxRuntime::new(Provider::Cpu, self.reference_threads.into())?);
        let install = |staged, test| reference.install(staged, &test);
        let expected = Policy::load(&loader, &self.reference, None, install, Arc::new(|_slot| {}))
            .with_context(|| format!("failed to load bundle `{}`", self.reference.display()))?;
        let result = compare(
            (&mut loaded.device, &loaded.policy),
            (&mut reference, &expected),
            self.chunks as usize,
        )?;
        writeln!(
            std::io::stdout(),
            "{} chunks: actions up to {:.3} differ by at most {:.2e}, cosine at least {:.6}, log-ratio of a denoise step at most {:.2e} (mean over the executed actions), {:.2e} (sum)\n{}",
            result.chunks,
            result.magnitude,
            result.difference,
            result.cosine,
            result.log_ratio_mean,
            result.log_ratio_sum,
            serde_json::to_string(&result)?
        )
        .context("writing to stdout")
    }
}

fn check<L: Loader>(dir: &Path, args: &BackendArgs, loaded: &mut Loaded<'_, L>) -> anyhow::Result<()> {
    let policy = &loaded.policy;
    for line in policy.transform.contract().warnings() {
        tracing::warn!("{line}");
    }
    let commands = rehearse(&mut loaded.device, policy, 0)
        .with_context(|| format!("failed to run a drawn observation through bundle `{}`", dir.display()))?;
    for line in commands
        .remarks
        .iter()
        .filter_map(|remark| policy.transform.report(remark, &commands.observation.prompt))
    {
        tracing::warn!("{line}");
    }
    let manifest = policy.manifest();
    let bytes: u64 = manifest.files.iter().map(|f| f.bytes).sum();
    let test = policy.self_test_difference.map_or_else(
        || "finite (no reference in the manifest)".to_owned(),
        |difference| format!("within {difference:.1e} of the publisher"),
    );
    writeln!(
        std::io::stdout(),
        "bundle `{}`: policy version {}, {:?}, {} files, {bytes} bytes, provider {}, self-test {test}\n{commands}",
        dir.display(),
        policy.version(),
        manifest.dims.variant,
        manifest.files.len() + 1,
        provider_name(args.provider.into()),
    )
    .context("writing to stdout")
}

fn bench<L: Loader>(args: &BenchArgs, mut loaded: Loaded<'_, L>) -> anyhow::Result<()> {
    let mut out = std::io::stdout();
    let mut rows = Vec::new();
    writeln!(
        out,
        "{:>6} {:>8} {:>10} {:>10} {:>12} {:>12} {:>12}",
        "batch", "cameras", "p50 ms", "p99 ms", "prefix ms", "denoise ms", "chunks/s"
    )?;
    let all = loaded.policy.manifest().dims.cameras;
    let cameras = if args.cameras.is_empty() {
        &[all][..]
    } else {
        &args.cameras
    };
    if let Some(found) = cameras.iter().find(|cameras| !(1..=all).contains(*cameras)) {
        return Err(UsageError::Cameras { found: *found, all }.into());
    }
    for (batch, cameras) in args
        .batch
        .iter()
        .flat_map(|batch| cameras.iter().map(move |cameras| (batch, cameras)))
    {
        if *batch == 0 || args.batches == 0 {
            return Err(UsageError::NoBatch.into());
        }
        let row = chunk_latency(&mut loaded.device, &loaded.policy, (*batch, *cameras), args.batches)?;
        writeln!(
            out,
            "{:>6} {:>8} {:>10.3} {:>10.3} {:>12.3} {:>12.3} {:>12.1}",
            row.batch,
            row.cameras,
            row.p50_ms,
            row.p99_ms,
            row.prefix_p50_ms,
            row.denoise_p50_ms,
            row.chunks_per_second
        )?;
        rows.push(row);
    }
    for row in rows {
        writeln!(out, "{}", serde_json::to_string(&row)?)?;
    }
    let Some(other) = &args.reload else { return Ok(()) };
    let row = reload_latency(
        loaded.loader,
        &mut loaded.device,
        Arc::new(loaded.policy),
        (&loaded.free, &loaded.freed),
        [&args.bundle, other],
        args.reloads,
    )?;
    writeln!(
        out,
        "{} reloads under load: p50 {:.3} ms, p99 {:.3} ms, longest {:.3} ms; {:.1} ms from the start of a load until it serves, {:.1} ms at most\n{}",
        row.reloads,
        row.p50_ms,
        row.p99_ms,
        row.longest_ms,
        row.live_p50_ms,
        row.live_longest_ms,
        serde_json::to_string(&row)?
    )?;
    Ok(())
}
