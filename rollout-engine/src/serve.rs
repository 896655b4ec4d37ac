//! The server: one ROUTER endpoint for env workers and clients, the road to the learner, and a clean end.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, SystemTime},
};

use policy::{
    bundle::{Bundle, Manifest, write_atomic},
    config::RolloutConfig,
};
use tokio::sync::{mpsc, watch};
use wire::{
    codec::{CodecError, MAX_FRAME_BYTES},
    limits::Limits,
    messages::{ActReply, ActRequest, FromEngine, Hello, Refusal, ToEngine, Welcome},
    socket::{Peer, RouterEvent, RouterReceiver, RouterSender, SocketError, bind_router},
};

use crate::{
    assign::{Assign, Shape},
    backend::{Backend, BackendError},
    http::{self, HttpError, Pages},
    incoming::Incoming,
    inference::{self, Answer, DONE_CAPACITY, Done, Failure, Progress},
    learner_link::{FromLink, LearnerLink, ToLink},
    metrics::Metrics,
    policy_slot::{LoadedPolicy, PolicyError, PolicySlot},
    pulse::Pulse,
    queue::{Job, Queue, Target},
};

/// What ends or prevents serving.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ServeError {
    /// ONNX Runtime or its provider.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// The first bundle.
    #[error("bundle `{path}`: {source}")]
    Policy {
        /// Which bundle.
        path: PathBuf,
        /// Why it is refused.
        source: PolicyError,
    },
    /// An endpoint.
    #[error(transparent)]
    Socket(#[from] SocketError),
    /// The HTTP address.
    #[error(transparent)]
    Http(#[from] HttpError),
    /// The state folder.
    #[error("state folder `{path}`: {source}")]
    State {
        /// Which folder.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The file that tells a parent the ports.
    #[error(transparent)]
    Endpoints(#[from] policy::bundle::BundleError),
    /// A metric.
    #[error("metrics: {0}")]
    Metrics(#[from] prometheus::Error),
    /// No thread.
    #[error("starting the inference thread: {0}")]
    Thread(std::io::Error),
    /// The inference thread is gone.
    #[error("the inference thread ended: see the log above")]
    Inference,
}

/// What the command line and the configuration say.
#[derive(Debug, Clone)]
pub struct Options {
    /// `[rollout]`, with the command line's endpoints on top.
    pub rollout: RolloutConfig,
    /// A bundle to serve from the start.
    pub bundle: Option<PathBuf>,
    /// Where the learner listens; `None`: serve without one.
    pub learner: Option<String>,
    /// Folder of this engine alone.
    pub state_dir: PathBuf,
    /// Estimate the value of a terminated episode's last observation too.
    pub bootstrap_terminated: bool,
    /// Where to write the endpoints as JSON.
    pub endpoints_file: Option<PathBuf>,
}

/// An answer of more rows is encoded on another thread.
const LARGE_ROWS: usize = 16;
/// A client whose large request found no place is heard again after so long: reading what cannot be served costs the others.
const OVERLOAD_REST: Duration = Duration::from_millis(250);
/// How often the server's loop comes round when nothing happens.
const TICK: Duration = Duration::from_secs(1);

/// Name of this session: unique per start.
fn session_name() -> String {
    let since = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    format!("engine-{}-{:x}", std::process::id(), since.as_nanos())
}

/// Serves until `stop` becomes true.
///
/// # Errors
/// It cannot start, or the inference thread or the endpoint fails.
pub async fn serve(options: Options, stop: watch::Receiver<bool>) -> Result<(), ServeError> {
    let (mut server, mut roads) = start(options).await?;
    let ended = server.run(&mut roads, stop).await;
    server.leave(roads).await;
    ended
}

/// What the server listens to.
struct Roads {
    receive: RouterReceiver<ToEngine>,
    done: mpsc::Receiver<Vec<Done>>,
    news: mpsc::Receiver<FromLink>,
    link: Option<tokio::task::JoinHandle<Result<(), SocketError>>>,
}

struct Server {
    send: RouterSender,
    queue: Arc<Queue<Progress>>,
    /// Connections by the number that the queue knows them by.
    peers: BTreeMap<u64, Peer>,
    pulse: Arc<Pulse>,
    slot: Arc<PolicySlot>,
    metrics: Arc<Metrics>,
    assign: Assign<Peer>,
    link: mpsc::UnboundedSender<ToLink>,
    /// Workers that said hello before a policy was live.
    early: BTreeMap<Peer, Hello>,
    told: (Option<u64>, u32),
    bootstrap_terminated: bool,
}

async fn start(options: Options) -> Result<(Server, Roads), ServeError> {
    let metrics = Arc::new(Metrics::new()?);
    let backend = Backend::new(options.rollout.provider, options.rollout.threads)?;
    let slot = Arc::new(PolicySlot::default());
    let mut incoming = Incoming::new(&options.state_dir.join("incoming")).map_err(|source| ServeError::State {
        path: options.state_dir.clone(),
        source,
    })?;
    if let Some(dir) = &options.bundle {
        let refused = |source| ServeError::Policy {
            path: dir.clone(),
            source,
        };
        let policy = LoadedPolicy::load(&backend, dir, None).map_err(refused)?;
        incoming.learn(&Bundle::open(dir)?);
        slot.swap(Arc::new(policy));
    }
    let pulse = Arc::new(Pulse::default());
    let (send, receive, listen) = bind_router(&options.rollout.listen, Limits::default()).await?;
    let pages = Pages {
        slot: Arc::clone(&slot),
        metrics: Arc::clone(&metrics),
        pulse: Arc::clone(&pulse),
        connections: send.clone(),
    };
    let address = http::start(&options.rollout.http, pages)?;
    let queue = Arc::new(Queue::new(options.rollout.queue_capacity, options.rollout.max_batch));
    let (done_sender, done) = mpsc::channel(DONE_CAPACITY);
    inference::start(
        Arc::clone(&queue),
        Arc::clone(&slot),
        Arc::clone(&metrics),
        Arc::clone(&pulse),
        &options.rollout,
        done_sender,
    )
    .map_err(ServeError::Thread)?;

    let engine = session_name();
    let (link_sender, inbox) = mpsc::unbounded_channel();
    // orders and versions are few; the link waits when the server does not keep up
    let (outbox, news) = mpsc::channel(16);
    let link = options.learner.clone().map(|endpoint| {
        let link = LearnerLink {
            endpoint,
            engine: engine.clone(),
            backend,
            slot: Arc::clone(&slot),
            metrics: Arc::clone(&metrics),
            pulse: Arc::clone(&pulse),
            incoming,
            inbox,
            outbox,
        };
        tokio::spawn(link.run())
    });
    if let Some(path) = &options.endpoints_file {
        let text = serde_json::json!({ "listen": listen, "http": address.to_string() }).to_string();
        write_atomic(path, text.as_bytes())?;
    }
    tracing::info!(
        "{engine} listens on {listen}, http on {address}, provider {:?}",
        options.rollout.provider
    );
    let mut server = Server {
        send,
        queue,
        peers: BTreeMap::new(),
        pulse,
        slot,
        metrics,
        assign: Assign::new(engine),
        link: link_sender,
        early: BTreeMap::new(),
        told: (None, 0),
        bootstrap_terminated: options.bootstrap_terminated,
    };
    if let Some(policy) = server.slot.live() {
        server.live(&policy);
    }
    Ok((
        server,
        Roads {
            receive,
            done,
            news,
            link,
        },
    ))
}

enum Event {
    Router(RouterEvent<ToEngine>),
    Done(Option<Vec<Done>>),
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
                done = roads.done.recv() => Event::Done(done),
                Some(news) = roads.news.recv() => Event::News(news),
                result = ended(&mut roads.link) => Event::LinkEnded(result),
                _ = tick.tick() => Event::Tick,
                _ = stop.wait_for(|stop| *stop) => Event::Stop,
            };
            match event {
                Event::Stop => return Ok(()),
                Event::Tick => {}
                Event::Done(None) => return Err(ServeError::Inference),
                Event::Done(Some(done)) => self.done(done),
                Event::Router(event) => self.take(event),
                Event::News(FromLink::Order(order)) => {
                    for batch in &order.batches {
                        let (count, mode) = (batch.resets.len(), batch.mode);
                        let (number, oldest, newest) = (order.order, batch.oldest, batch.newest);
                        tracing::info!("order {number}: {count} episodes of versions {oldest} to {newest} ({mode:?})");
                    }
                    self.assign.take_order(order);
                }
                Event::News(FromLink::Retire) => self.assign.retire(),
                Event::News(FromLink::Live(policy)) => self.live(&policy),
                Event::News(FromLink::Full(full)) => {
                    if full {
                        tracing::warn!(
                            "the learner does not keep up: no new episode until it acknowledges trajectories"
                        );
                    }
                    self.assign.set_full(full);
                }
                Event::LinkEnded(result) => {
                    roads.link = None;
                    result?;
                }
            }
            self.carry_out();
        }
    }

    /// Ends: nothing more is accepted, what is queued is answered but for large requests, trajectories are flushed.
    async fn leave(&mut self, mut roads: Roads) {
        let large = self.queue.close();
        self.done(large.iter().map(|job| inference::closed(job.target)).collect());
        while let Some(done) = roads.done.recv().await {
            self.pulse.serving(self.queue.rows());
            self.done(done);
            self.carry_out();
        }
        roads.news.close();
        if self.link.send(ToLink::Finish).is_ok()
            && let Some(link) = roads.link
            && tokio::time::timeout(LEAVE, link).await.is_err()
        {
            tracing::warn!("the learner did not take all trajectories in time");
        }
        tracing::info!("left");
    }

    /// Queues a message for a peer. One that does not take it is disconnected, which is an event of its own.
    fn reply(&self, peer: Peer, message: &FromEngine) {
        deliver(&self.send, peer, message);
    }

    fn refuse(&self, peer: Peer, refusal: Refusal, reason: &str) {
        self.metrics.refused.with_label_values(&[reason]).inc();
        if !refusal.retry {
            tracing::warn!("refused: {}", refusal.reason);
        }
        self.reply(peer, &FromEngine::Refused(refusal));
    }

    fn live(&mut self, policy: &LoadedPolicy) {
        let manifest = &policy.manifest;
        self.metrics.version.set(policy.version() as i64);
        let shape = Shape {
            action_chunk: manifest.action_chunk,
            env_action_dim: manifest.env_action_dim,
            critic: manifest.heads.value.is_some(),
            bootstrap_terminated: self.bootstrap_terminated,
        };
        self.assign.went_live(policy.version(), shape);
        for (peer, hello) in std::mem::take(&mut self.early) {
            self.hello(peer, hello);
        }
    }

    fn take(&mut self, event: RouterEvent<ToEngine>) {
        let count = |kind: &str| self.metrics.messages.with_label_values(&[kind]).inc();
        match event {
            RouterEvent::Gone(peer) => {
                self.early.remove(&peer);
                if self.peers.remove(&peer.into()).is_some() {
                    dispose(self.queue.remove_client(peer.into()));
                }
                self.assign.gone(&peer);
            }
            RouterEvent::Frame(peer, Err(error)) => {
                count("malformed");
                self.refuse(peer, malformed(&error), "invalid");
            }
            RouterEvent::Frame(peer, Ok(ToEngine::Hello(hello))) => {
                count("hello");
                self.hello(peer, hello);
            }
            RouterEvent::Frame(peer, Ok(ToEngine::Reports(reports))) => {
                count("reports");
                self.assign.reports(&peer, reports);
            }
            RouterEvent::Frame(peer, Ok(ToEngine::Act(request))) => {
                count("act");
                self.act(peer, request);
            }
        }
    }

    fn hello(&mut self, peer: Peer, hello: Hello) {
        let Some(policy) = self.slot.live() else {
            tracing::info!("worker `{}` waits for the first policy", hello.client);
            self.early.retain(|_, h| h.client != hello.client);
            self.early.insert(peer, hello);
            return;
        };
        if let Err(reason) = self.assign.hello(peer, &hello) {
            self.refuse(
                peer,
                Refusal {
                    request: None,
                    retry: false,
                    reason,
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
        let manifest = &policy.manifest;
        let welcome = Welcome {
            version: policy.version(),
            action_chunk: manifest.action_chunk as u32,
            env_action_dim: manifest.env_action_dim as u32,
            cameras: manifest.cameras.clone(),
        };
        self.reply(peer, &FromEngine::Welcome(welcome));
    }

    fn act(&mut self, peer: Peer, request: ActRequest) {
        let number = request.request;
        let refusal = |retry, reason| Refusal {
            request: Some(number),
            retry,
            reason,
        };
        let Some(policy) = self.slot.live() else {
            self.refuse(peer, refusal(true, "no policy is live yet".to_owned()), "not_ready");
            return;
        };
        let answer: usize = request
            .rows
            .iter()
            .map(|row| answer_bytes(&policy.manifest, row.record))
            .sum();
        if answer > MAX_FRAME_BYTES {
            let reason = format!(
                "the answer would have about {answer} bytes, at most {MAX_FRAME_BYTES} are sent: ask for fewer rows or without records"
            );
            self.refuse(peer, refusal(false, reason), "invalid");
            dispose(request);
            return;
        }
        let target = Target::Client {
            client: peer.into(),
            request: number,
        };
        self.peers.insert(peer.into(), peer);
        let mut displaced = Vec::new();
        let pushed = self.queue.push_client(Job::new(target, request.rows), &mut displaced);
        if let Err((error, job)) = pushed {
            let reason = if error.retry() { "overload" } else { "invalid" };
            if error.retry() && job.rows.len() > LARGE_ROWS {
                self.send.rest(peer, OVERLOAD_REST);
            }
            self.refuse(peer, refusal(error.retry(), error.to_string()), reason);
            dispose(job);
        }
        for job in displaced {
            self.deliver(
                job.target,
                Err(Failure {
                    retry: true,
                    reason: "overloaded: the request made room for clients that wait for less, ask again".to_owned(),
                }),
            );
            dispose(job);
        }
    }

    fn done(&mut self, done: Vec<Done>) {
        for Done { target, result } in done {
            self.deliver(target, result);
        }
    }

    fn deliver(&mut self, target: Target, result: Result<Answer, Failure>) {
        match (target, result) {
            (Target::Slot(ticket), Ok(Answer { version, rows, .. })) => {
                for row in rows {
                    self.assign.acted(ticket, version, row);
                }
            }
            (Target::Bootstrap(ticket), Ok(answer)) => {
                self.assign
                    .bootstrapped(ticket, answer.values.first().copied().flatten());
            }
            (Target::Slot(ticket) | Target::Bootstrap(ticket), Err(failure)) => {
                self.assign.failed(ticket, &failure.reason);
            }
            (Target::Client { client, request }, result) => {
                let Some(peer) = self.peers.get(&client).copied() else {
                    return;
                };
                match result {
                    Ok(Answer { version, rows, .. }) => {
                        let large = rows.len() > LARGE_ROWS;
                        let reply = FromEngine::Acted(ActReply { request, version, rows });
                        if large {
                            let send = self.send.clone();
                            tokio::task::spawn_blocking(move || deliver(&send, peer, &reply));
                        } else {
                            self.reply(peer, &reply);
                        }
                    }
                    Err(Failure { retry, reason }) => {
                        let refusal = Refusal {
                            request: Some(request),
                            retry,
                            reason,
                        };
                        self.refuse(peer, refusal, if retry { "overload" } else { "invalid" });
                    }
                }
            }
        }
    }

    /// Sends what the last event led to.
    fn carry_out(&mut self) {
        loop {
            let effects = self.assign.take_effects();
            let nothing = effects.commands.is_empty()
                && effects.jobs.is_empty()
                && effects.trajectories.is_empty()
                && effects.refusals.is_empty();
            if nothing {
                break;
            }
            self.queue
                .push_slots(effects.jobs.into_iter().map(Job::begin).collect());
            for trajectory in effects.trajectories {
                self.metrics.trajectories.inc();
                self.tell(ToLink::Trajectory(Box::new(trajectory)));
            }
            for (peer, refusal) in effects.refusals {
                self.refuse(peer, refusal, "invalid");
            }
            for (peer, commands) in effects.commands {
                self.reply(peer, &FromEngine::Commands(commands));
            }
        }
        let state = (self.assign.order_number(), self.assign.slots());
        if state != self.told {
            self.told = state;
            self.tell(ToLink::State {
                order: state.0,
                slots: state.1,
            });
        }
        self.metrics.slots.set(i64::from(state.1));
        self.metrics.pending_resets.set(self.assign.pending() as i64);
        self.metrics.queue_rows.set(self.queue.rows() as i64);
    }

    fn tell(&self, what: ToLink) {
        if self.link.send(what).is_err() {
            tracing::debug!("no learner takes this");
        }
    }
}

fn deliver(send: &RouterSender, peer: Peer, message: &FromEngine) {
    let sent = send.send(peer, message);
    // a request whose answer cannot be sent is not left without one
    let sent = match (sent, message) {
        (Err(SocketError::Codec(error)), FromEngine::Acted(reply)) => {
            let refusal = Refusal {
                request: Some(reply.request),
                retry: false,
                reason: format!("the answer is too long, ask for fewer rows or without records: {error}"),
            };
            send.send(peer, &FromEngine::Refused(refusal))
        }
        (sent, _) => sent,
    };
    if let Err(error) = sent {
        tracing::debug!("a peer did not get an answer: {error}");
    }
}

/// About how many bytes the answer to a row has.
fn answer_bytes(manifest: &Manifest, record: bool) -> usize {
    let (dims, chunk) = (&manifest.dims, 4 * manifest.action_chunk * manifest.env_action_dim);
    if !record {
        return chunk;
    }
    let side = dims.vision.image_size;
    let path = 4 * (manifest.sampling.num_steps + 1) * dims.action_horizon * dims.action_dim;
    chunk + dims.cameras * side * side * 3 + path
}

/// Frees the rows of a job on another thread: thousands of observations take milliseconds, in which the loop would stand still.
fn dispose<T: Send + 'static>(jobs: T) {
    tokio::task::spawn_blocking(move || drop(jobs));
}

/// Time for the link to flush and end: a little more than its own limit.
const LEAVE: Duration = Duration::from_millis(2500);

fn malformed(error: &CodecError) -> Refusal {
    Refusal {
        request: None,
        retry: false,
        reason: format!("malformed frame: {error}"),
    }
}
