//! The server: one ROUTER endpoint for env workers and clients, the link to the learner, and an orderly shutdown.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use policy::{
    bundle::{Bundle, write_atomic},
    config::{Provider, RolloutConfig},
    message::told,
};
use tokio::sync::{mpsc, watch};
use wire::{
    limits::Limits,
    messages::{FromEngine, Hello, Refusal, ToEngine, Welcome},
    socket::{Peer, RouterEvent, RouterReceiver, SocketError, bind_router},
};

use crate::{
    device::{
        DeviceError, Loader,
        cuda::{CudaDevice, CudaLoader, CudaOptions},
        onnx::{OnnxDevice, OnnxLoader, OnnxRuntime},
        versions::{LoadPolicy, Policy, PolicyError, Versions},
    },
    episodes::{Assign, Question, Shape},
    front::{
        http::{self, HttpError, Pages},
        websocket::{self, Websocket, WebsocketError, WebsocketOptions},
        zmq::{self, Clients, Executed, Replies},
    },
    inference::{self, ANSWERED_CAPACITY, Answered, EngineQueue, Shared},
    job::{JobError, JobResult, Ticket},
    learner::{
        incoming::Incoming,
        link::{FromLink, LearnerLink, ToLink},
    },
    metrics::Metrics,
    pulse::Pulse,
    queue::Queue,
};

/// Error that prevents or ends serving.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// ONNX Runtime, its provider or the device failed.
    #[error(transparent)]
    Device(#[from] DeviceError),
    /// The first bundle failed to load.
    #[error("failed to load bundle `{path}`")]
    Policy {
        /// Folder of the bundle.
        path: PathBuf,
        /// Cause.
        source: Box<PolicyError>,
    },
    /// An endpoint is wrong or failed.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The HTTP address is wrong or in use.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The websocket endpoint cannot be opened.
    #[error(transparent)]
    Websocket(#[from] WebsocketError),
    /// The state folder is not usable.
    #[error("failed to use state folder `{path}`")]
    State {
        /// Path of the folder.
        path: PathBuf,
        /// Cause.
        source: std::io::Error,
    },
    /// The file with the bound endpoints cannot be written, or the first bundle cannot be opened.
    #[error(transparent)]
    Endpoints(#[from] policy::bundle::BundleError),
    /// A metric cannot be registered.
    #[error("failed to register the metrics")]
    Metrics(#[from] prometheus::Error),
    /// The system failed to start a thread.
    #[error("failed to start the inference threads")]
    Thread(#[source] std::io::Error),
    /// The inference thread has ended.
    #[error("the inference thread ended: see the log above")]
    Inference,
}

/// Options from the command line and the configuration.
#[derive(Debug, Clone)]
pub struct Options {
    /// `[rollout]` of the configuration, with the endpoints of the command line.
    pub rollout: RolloutConfig,
    /// A bundle to serve from the start.
    pub bundle: Option<PathBuf>,
    /// The websocket endpoint; `None` opens no such endpoint.
    pub websocket: Option<WebsocketOptions>,
    /// Endpoint of the learner, `tcp://HOST:PORT`; `None` without a learner.
    pub learner: Option<String>,
    /// Folder of this engine, not shared with another.
    pub state_dir: PathBuf,
    /// Whether the last observation of a terminated episode is valued too.
    pub bootstrap_terminated: bool,
    /// File for the bound endpoints, as JSON.
    pub endpoints_file: Option<PathBuf>,
}

/// Period of the server's loop without events.
const TICK: Duration = Duration::from_secs(1);

/// Returns a name for this session, unique per start.
fn session_name() -> String {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    format!("engine-{}-{:x}", std::process::id(), since.as_nanos())
}

/// Serves until `stop` becomes true.
///
/// # Errors
/// The start fails, or the inference thread, the endpoint or the learner's endpoint fails.
pub async fn serve(options: Options, stop: watch::Receiver<bool>) -> Result<(), ServeError> {
    let (mut server, mut roads) = start(options).await?;
    let ended = server.run(&mut roads, stop).await;
    server.leave(roads).await;
    ended
}

/// Receivers of the server's loop.
struct Roads {
    receive: RouterReceiver<ToEngine>,
    answered: mpsc::Receiver<Vec<Answered>>,
    news: mpsc::Receiver<FromLink>,
    link: Option<tokio::task::JoinHandle<Result<(), SocketError>>>,
    websocket: Option<Websocket>,
}

struct Server {
    replies: Replies,
    clients: Clients,
    queue: Arc<EngineQueue>,
    pulse: Arc<Pulse>,
    versions: Arc<Versions>,
    metrics: Arc<Metrics>,
    episodes: Assign<Peer>,
    link: mpsc::UnboundedSender<ToLink>,
    /// Workers that registered before a policy was live.
    early: BTreeMap<Peer, Hello>,
    reported: (Option<u64>, u32),
    bootstrap_terminated: bool,
    max_batch: usize,
}

/// Starts the inference threads and returns the function that loads versions onto their device.
fn start_inference(rollout: &RolloutConfig, shared: Shared) -> Result<LoadPolicy, ServeError> {
    match rollout.provider {
        Provider::Cpu | Provider::Tensorrt => {
            let loader = OnnxLoader::new(OnnxRuntime::new(rollout.provider, rollout.threads)?);
            start_on(loader, OnnxDevice::default(), rollout, shared)
        }
        Provider::Cuda => {
            let options = CudaOptions {
                capture: true,
                threads: rollout.threads,
            };
            start_on(CudaLoader::new(options)?, CudaDevice::default(), rollout, shared)
        }
    }
}

fn start_on<L: Loader>(
    loader: L,
    device: L::Device,
    rollout: &RolloutConfig,
    shared: Shared,
) -> Result<LoadPolicy, ServeError> {
    let thread = inference::start(device, shared, rollout).map_err(ServeError::Thread)?;
    let free = thread.free();
    Ok(Arc::new(move |dir, live| {
        let install = |staged, test| thread.install(staged, test);
        let policy = Policy::load(&loader, dir, live, install, Arc::clone(&free))?;
        if live.is_none() {
            for line in policy.transform.contract().warnings() {
                tracing::warn!("bundle `{}`: {line}", dir.display());
            }
        }
        Ok(policy)
    }))
}

/// Opens the websocket endpoint, if there is one.
fn start_websocket(
    options: &Options,
    queue: &Arc<EngineQueue>,
    versions: &Arc<Versions>,
    metrics: &Arc<Metrics>,
    pulse: &Arc<Pulse>,
) -> Result<Option<Websocket>, WebsocketError> {
    let Some(websocket) = &options.websocket else {
        return Ok(None);
    };
    let sources = websocket::Sources {
        queue: Arc::clone(queue),
        versions: Arc::clone(versions),
        metrics: Arc::clone(metrics),
        pulse: Arc::clone(pulse),
    };
    let websocket = websocket::start(websocket, sources)?;
    tracing::info!("websockets on {}", websocket.address());
    Ok(Some(websocket))
}

async fn start(options: Options) -> Result<(Server, Roads), ServeError> {
    let metrics = Arc::new(Metrics::new()?);
    let versions = Arc::new(Versions::default());
    let pulse = Arc::new(Pulse::default());
    let queue = Arc::new(Queue::new(options.rollout.queue_capacity, options.rollout.max_batch));
    let (answered_sender, answered) = mpsc::channel(ANSWERED_CAPACITY);
    let shared = Shared {
        queue: Arc::clone(&queue),
        versions: Arc::clone(&versions),
        metrics: Arc::clone(&metrics),
        pulse: Arc::clone(&pulse),
        answered: answered_sender,
    };
    let load = start_inference(&options.rollout, shared)?;
    let mut incoming = Incoming::new(&options.state_dir.join("incoming")).map_err(|source| ServeError::State {
        path: options.state_dir.clone(),
        source,
    })?;
    if let Some(dir) = &options.bundle {
        let policy = load(dir, None).map_err(|source| ServeError::Policy {
            path: dir.clone(),
            source: Box::new(source),
        })?;
        incoming.learn(&Bundle::open(dir)?);
        versions.swap(Arc::new(policy));
    }
    let (send, receive, listen) = bind_router(&options.rollout.listen, Limits::default()).await?;
    let pages = Pages {
        versions: Arc::clone(&versions),
        metrics: Arc::clone(&metrics),
        pulse: Arc::clone(&pulse),
        connections: send.clone(),
    };
    let address = http::start(&options.rollout.http, pages)?;
    let websocket = start_websocket(&options, &queue, &versions, &metrics, &pulse)?;

    let engine = session_name();
    let (link_sender, inbox) = mpsc::unbounded_channel();
    // orders and versions are few; the link blocks while the server is behind
    let (outbox, news) = mpsc::channel(16);
    let link = options.learner.clone().map(|endpoint| {
        let link = LearnerLink {
            endpoint,
            engine: engine.clone(),
            load,
            versions: Arc::clone(&versions),
            metrics: Arc::clone(&metrics),
            pulse: Arc::clone(&pulse),
            incoming,
            inbox,
            outbox,
        };
        tokio::spawn(link.run())
    });
    if let Some(path) = &options.endpoints_file {
        let mut endpoints = serde_json::json!({ "listen": listen, "http": address.to_string() });
        if let Some(websocket) = &websocket {
            endpoints["websocket"] = websocket.address().to_string().into();
        }
        write_atomic(path, endpoints.to_string().as_bytes())?;
    }
    tracing::info!(
        "{engine} listens on {listen}, http on {address}, provider {:?}",
        options.rollout.provider
    );
    let replies = Replies::new(send, Arc::clone(&metrics));
    let mut server = Server {
        clients: Clients::new(replies.clone(), Arc::clone(&queue)),
        replies,
        queue,
        pulse,
        versions,
        metrics,
        episodes: Assign::new(engine),
        link: link_sender,
        early: BTreeMap::new(),
        reported: (None, 0),
        bootstrap_terminated: options.bootstrap_terminated,
        max_batch: options.rollout.max_batch,
    };
    if let Some(policy) = server.versions.live() {
        server.live(&policy);
    }
    Ok((
        server,
        Roads {
            receive,
            answered,
            news,
            link,
            websocket,
        },
    ))
}

enum Event {
    Router(RouterEvent<ToEngine>),
    Answered(Option<Vec<Answered>>),
    News(FromLink),
    LinkEnded(Result<(), SocketError>),
    Tick,
    Stop,
}

async fn ended(link: &mut Option<tokio::task::JoinHandle<Result<(), SocketError>>>) -> Result<(), SocketError> {
    match link {
        Some(task) => task.await.unwrap_or_else(|error| {
            tracing::error!("the learner's link ended: {error}");
            Err(SocketError::Disconnected)
        }),
        None => std::future::pending().await,
    }
}

impl Server {
    async fn run(&mut self, roads: &mut Roads, mut stop: watch::Receiver<bool>) -> Result<(), ServeError> {
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
        loop {
            self.pulse.serving(self.queue.rows());
            let event = tokio::select! {
                event = roads.receive.receive() => Event::Router(event),
                answered = roads.answered.recv() => Event::Answered(answered),
                Some(news) = roads.news.recv() => Event::News(news),
                result = ended(&mut roads.link) => Event::LinkEnded(result),
                _ = tick.tick() => Event::Tick,
                _ = stop.wait_for(|stop| *stop) => Event::Stop,
            };
            match event {
                Event::Stop => return Ok(()),
                Event::Tick => {}
                Event::Answered(None) => return Err(ServeError::Inference),
                Event::Answered(Some(answered)) => self.answered(answered),
                Event::Router(event) => self.take(event),
                Event::News(FromLink::Order(order)) => {
                    for batch in &order.batches {
                        let (count, mode) = (batch.resets.len(), batch.mode);
                        let (number, oldest, newest) = (order.order, batch.oldest, batch.newest);
                        tracing::info!("order {number}: {count} episodes of versions {oldest} to {newest} ({mode:?})");
                    }
                    self.episodes.take_order(order);
                }
                Event::News(FromLink::Retire) => self.episodes.retire(),
                Event::News(FromLink::Live(policy)) => self.live(&policy),
                Event::News(FromLink::Full(full)) => {
                    if full {
                        tracing::warn!(
                            "too many unacknowledged trajectories: no episode starts until the learner acknowledges some"
                        );
                    }
                    self.episodes.set_full(full);
                }
                Event::LinkEnded(result) => {
                    roads.link = None;
                    result?;
                }
            }
            self.carry_out();
        }
    }

    /// Shuts down: closes the queue, answers queued jobs except large requests, sends the remaining trajectories.
    async fn leave(&mut self, mut roads: Roads) {
        for job in self.queue.close() {
            zmq::fail(job, JobError::Closed);
        }
        while let Some(answered) = roads.answered.recv().await {
            self.pulse.serving(self.queue.rows());
            self.answered(answered);
            self.carry_out();
        }
        for job in self.queue.clear() {
            zmq::fail(job, JobError::Closed);
        }
        self.clients.flush().await;
        if let Some(websocket) = roads.websocket {
            websocket.stop().await;
        }
        roads.news.close();
        if self.link.send(ToLink::Finish).is_ok()
            && let Some(link) = roads.link
            && tokio::time::timeout(LEAVE, link).await.is_err()
        {
            tracing::warn!("the link to the learner did not end in time: trajectories may be lost");
        }
        tracing::info!("left");
    }

    fn live(&mut self, policy: &Policy) {
        let manifest = policy.manifest();
        if let Some(batch) = manifest.batch {
            // more rows than the graphs have would run one batch after another, and be answered together
            self.queue.limit_rows(batch.min(self.max_batch));
        }
        self.metrics.version.set(policy.version() as i64);
        let shape = Shape {
            action_chunk: manifest.action_chunk,
            env_action_dim: manifest.env_action_dim,
            critic: manifest.heads.value.is_some(),
            bootstrap_terminated: self.bootstrap_terminated,
        };
        self.episodes.went_live(policy.version(), shape);
        for (peer, hello) in std::mem::take(&mut self.early) {
            self.hello(peer, hello);
        }
    }

    fn take(&mut self, event: RouterEvent<ToEngine>) {
        let count = |kind: &str| self.metrics.messages.with_label_values(&[kind]).inc();
        match event {
            RouterEvent::Gone(peer) => {
                self.early.remove(&peer);
                self.clients.left(peer);
                self.episodes.gone(&peer);
            }
            RouterEvent::Frame(peer, Err(error)) => {
                count("malformed");
                self.replies.malformed(peer, &error);
            }
            RouterEvent::Frame(peer, Ok(ToEngine::Hello(hello))) => {
                count("hello");
                self.hello(peer, hello);
            }
            RouterEvent::Frame(peer, Ok(ToEngine::Reports(reports))) => {
                count("reports");
                self.episodes.reports(&peer, reports);
            }
            RouterEvent::Frame(peer, Ok(ToEngine::Act(request))) => {
                count("act");
                self.clients.act(peer, request, self.versions.live().as_ref());
            }
        }
    }

    fn hello(&mut self, peer: Peer, hello: Hello) {
        let Some(policy) = self.versions.live() else {
            tracing::info!("worker `{}` waits for the first policy", hello.client);
            self.early.retain(|_, h| h.client != hello.client);
            self.early.insert(peer, hello);
            return;
        };
        if let Err(error) = self.episodes.hello(peer, &hello) {
            self.replies.refuse(
                peer,
                Refusal {
                    request: None,
                    retry: false,
                    reason: error.to_string(),
                },
                "invalid",
            );
            return;
        }
        tracing::info!(
            "worker `{}` brings {} slots of `{}`",
            hello.client,
            hello.slots,
            hello.env
        );
        let manifest = policy.manifest();
        let welcome = Welcome {
            version: policy.version(),
            action_chunk: manifest.action_chunk as u32,
            env_action_dim: manifest.env_action_dim as u32,
            cameras: manifest.cameras.clone(),
        };
        self.replies.send(peer, &FromEngine::Welcome(welcome));
    }

    fn answered(&mut self, answered: Vec<Answered>) {
        for (ticket, result) in answered {
            self.deliver(ticket, result);
        }
    }

    /// Delivers the answer to a slot's question to its episode.
    fn deliver(&mut self, ticket: Ticket, result: JobResult) {
        match (ticket, result) {
            (Ticket::Chunk(ticket), Ok(answer)) => {
                // after an answer a policy is live
                let Some(policy) = self.versions.live() else { return };
                let executed = Executed::of(policy.manifest());
                for chunk in answer.rows {
                    self.episodes.acted(ticket, answer.version, executed.row(chunk));
                }
            }
            (Ticket::Bootstrap(ticket), Ok(answer)) => {
                let value = answer.rows.first().and_then(|chunk| chunk.value);
                self.episodes.bootstrapped(ticket, value);
            }
            (ticket, Err(error)) => self.episodes.failed(ticket.number(), &told(&error)),
        }
    }

    /// Queues a slot's question.
    fn ask(&mut self, question: Question) {
        let number = question.ticket.number();
        let Some(policy) = self.versions.live() else {
            self.episodes.failed(number, &JobError::NotReady.to_string());
            return;
        };
        match zmq::slot_job(&policy, question.ticket, question.row) {
            Ok(job) => self.queue.push_slots(vec![job]),
            Err(error) => self.episodes.failed(number, &told(&error)),
        }
    }

    /// Sends the effects of the last event.
    fn carry_out(&mut self) {
        loop {
            let effects = self.episodes.take_effects();
            let nothing = effects.commands.is_empty()
                && effects.questions.is_empty()
                && effects.trajectories.is_empty()
                && effects.refusals.is_empty();
            if nothing {
                break;
            }
            for question in effects.questions {
                self.ask(question);
            }
            for trajectory in effects.trajectories {
                self.metrics.trajectories.inc();
                self.send_to_link(ToLink::Trajectory(Box::new(trajectory)));
            }
            for (peer, refusal) in effects.refusals {
                self.replies.refuse(peer, refusal, "invalid");
            }
            for (peer, commands) in effects.commands {
                self.replies.send(peer, &FromEngine::Commands(commands));
            }
        }
        let state = (self.episodes.order_number(), self.episodes.slots());
        if state != self.reported {
            self.reported = state;
            self.send_to_link(ToLink::State {
                order: state.0,
                slots: state.1,
            });
        }
        self.metrics.slots.set(i64::from(state.1));
        self.metrics.pending_resets.set(self.episodes.pending() as i64);
        self.metrics.queue_rows.set(self.queue.rows() as i64);
    }

    fn send_to_link(&self, message: ToLink) {
        if self.link.send(message).is_err() {
            tracing::debug!("message dropped: the engine has no link to a learner");
        }
    }
}

/// Time for the link to send the remaining trajectories and to end; a little more than the link's own limit.
const LEAVE: Duration = Duration::from_millis(2500);
