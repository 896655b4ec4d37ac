//! The link to the learner: receives orders and versions, sends trajectories and keeps each trajectory until the acknowledgment.

use std::{
    collections::BTreeMap,
    path::PathBuf,
    sync::Arc,
    time::{Duration, Instant},
};

use policy::message::told;
use tokio::{
    sync::mpsc,
    task::{JoinHandle, block_in_place},
    time::{MissedTickBehavior, interval},
};
use wire::{
    messages::{EngineState, FilePart, FromLearner, Order, ReloadReport, ToLearner, Trajectory},
    socket::{DealerReceiver, DealerSender, SocketError, connect_dealer},
};

use super::incoming::{Incoming, Progress, digests};
use crate::{
    device::versions::{LoadPolicy, Policy, PolicyError, Versions},
    metrics::Metrics,
    pulse::Pulse,
};

/// Message from the assignment to the link. The channel is unbounded; beyond [`MAX_UNACKED_BYTES`] no episode starts.
#[derive(Debug)]
pub enum ToLink {
    /// A finished episode.
    Trajectory(Box<Trajectory>),
    /// Content of the heartbeat.
    State {
        /// The newest order.
        order: Option<u64>,
        /// Slots of all workers.
        slots: u32,
    },
    /// The engine is shutting down: send the remaining trajectories, then end.
    Finish,
}

/// Message from the link to the assignment.
#[derive(Debug)]
pub enum FromLink {
    /// An order of episodes.
    Order(Order),
    /// Other weights with the live version's number are announced, because the learner restarted.
    Retire,
    /// Another version is live.
    Live(Arc<Policy>),
    /// Whether the buffer of unacknowledged trajectories is full.
    Full(bool),
}

/// Bytes of unacknowledged trajectories beyond which no episode starts.
pub const MAX_UNACKED_BYTES: usize = 1 << 30;
const HEARTBEAT: Duration = Duration::from_secs(1);
/// Time after which an unacknowledged trajectory is sent again on the same connection.
const RESEND: Duration = Duration::from_mins(1);
/// Time after which a missing part of a file is requested again.
const PART_PATIENCE: Duration = Duration::from_secs(10);
/// Maximum number of trajectories between two receives from the learner.
const AT_ONCE: usize = 8;
/// Time to send trajectories when the engine is shutting down.
const FLUSH: Duration = Duration::from_secs(2);

struct Unacked {
    trajectory: Box<Trajectory>,
    bytes: usize,
    sent: Option<Instant>,
}

/// The link, with the state that is kept over reconnects.
pub struct LearnerLink {
    /// Endpoint of the learner, `tcp://HOST:PORT`.
    pub endpoint: String,
    /// Name of this session.
    pub engine: String,
    /// Loads versions onto the device.
    pub load: LoadPolicy,
    /// Versions in use; a loaded version becomes the live one.
    pub versions: Arc<Versions>,
    /// Metrics of the engine.
    pub metrics: Arc<Metrics>,
    /// Record of the link's rounds.
    pub pulse: Arc<Pulse>,
    /// Files of announced versions.
    pub incoming: Incoming,
    /// Messages for the link.
    pub inbox: mpsc::UnboundedReceiver<ToLink>,
    /// Messages for the assignment.
    pub outbox: mpsc::Sender<FromLink>,
}

/// State of the link over reconnects.
#[derive(Default)]
struct Memory {
    unacked: BTreeMap<u64, Unacked>,
    unacked_bytes: usize,
    full: bool,
    order: Option<u64>,
    slots: u32,
    reports: Vec<ReloadReport>,
    loading: Option<Loading>,
    finishing: Option<Instant>,
}

struct Loading {
    version: u64,
    begun: Instant,
    dir: PathBuf,
    work: JoinHandle<Result<Arc<Policy>, LoadError>>,
}

/// Reason for rejecting a fetched version.
#[derive(Debug, thiserror::Error)]
enum LoadError {
    #[error(transparent)]
    Policy(#[from] PolicyError),
    #[error("its manifest has version {found}, announced was {announced}")]
    Version { announced: u64, found: u64 },
    #[error("its file `{name}` has the digest {found}, announced was {announced}")]
    Digest {
        name: String,
        announced: String,
        found: String,
    },
    #[error("loading ended early")]
    Ended(#[source] tokio::task::JoinError),
}

/// Checks that a loaded version is the announced one.
fn check_announced(policy: &Policy, version: u64, digests: &BTreeMap<String, String>) -> Result<(), LoadError> {
    if policy.version() != version {
        return Err(LoadError::Version {
            announced: version,
            found: policy.version(),
        });
    }
    // the manifest's own digests have already been compared with the content
    match digests
        .iter()
        .find(|(name, digest)| policy.digests.get(*name) != Some(digest))
    {
        Some((name, announced)) => Err(LoadError::Digest {
            name: name.clone(),
            announced: announced.clone(),
            found: policy
                .digests
                .get(name)
                .map_or("no such file", String::as_str)
                .to_owned(),
        }),
        None => Ok(()),
    }
}

enum Event {
    Message(Result<FromLearner, SocketError>),
    Inbox(Option<ToLink>),
    Beat,
    /// Trajectories remain to be sent.
    More,
    Loaded(Result<Arc<Policy>, LoadError>),
}

async fn loaded(loading: &mut Option<Loading>) -> Result<Arc<Policy>, LoadError> {
    match loading {
        Some(loading) => (&mut loading.work)
            .await
            .unwrap_or_else(|ended| Err(LoadError::Ended(ended))),
        None => std::future::pending().await,
    }
}

impl LearnerLink {
    /// Runs until [`ToLink::Finish`], or until the assignment has ended.
    ///
    /// # Errors
    /// The endpoint is wrong. An unreachable learner is not an error: the link retries.
    pub async fn run(mut self) -> Result<(), SocketError> {
        let mut memory = Memory::default();
        loop {
            let endpoint = self.endpoint.clone();
            let connecting = connect_dealer(&endpoint);
            tokio::pin!(connecting);
            let mut beat = interval(HEARTBEAT);
            let (send, receive) = loop {
                self.pulse.link();
                tokio::select! {
                    _ = beat.tick() => {}
                    connected = &mut connecting => break connected?,
                    item = self.inbox.recv() => {
                        self.absorb(&mut memory, item).await;
                        if memory.finishing.is_some() {
                            if !memory.unacked.is_empty() {
                                tracing::warn!("the learner is gone: {} trajectories are lost", memory.unacked.len());
                            }
                            return Ok(());
                        }
                    }
                    result = loaded(&mut memory.loading) => self.settle(&mut memory, result).await,
                }
            };
            self.metrics.learner_connected.set(1);
            tracing::info!("connected to the learner at {endpoint}");
            let ended = self.session(&mut memory, send, receive).await;
            self.metrics.learner_connected.set(0);
            block_in_place(|| self.incoming.abandon());
            match ended {
                Ok(()) => return Ok(()),
                Err(error) => tracing::warn!("learner: {error}; the live version remains live, reconnecting"),
            }
        }
    }

    async fn session(
        &mut self,
        memory: &mut Memory,
        mut send: DealerSender,
        mut receive: DealerReceiver,
    ) -> Result<(), SocketError> {
        send.send(&self.state(memory)).await?;
        for waiting in memory.unacked.values_mut() {
            waiting.sent = None;
        }
        let mut more = self.deliver(memory, &mut send).await?;
        let mut beat = interval(HEARTBEAT);
        beat.set_missed_tick_behavior(MissedTickBehavior::Skip);
        loop {
            self.pulse.link();
            let event = tokio::select! {
                message = receive.receive::<FromLearner>() => Event::Message(message),
                item = self.inbox.recv() => Event::Inbox(item),
                _ = beat.tick() => Event::Beat,
                result = loaded(&mut memory.loading) => Event::Loaded(result),
                () = tokio::task::yield_now(), if more => Event::More,
            };
            match event {
                Event::More => {}
                Event::Message(Err(SocketError::Codec(error))) => tracing::warn!("frame from the learner: {error}"),
                Event::Message(Err(error)) => return Err(error),
                Event::Message(Ok(message)) => self.take(memory, message).await,
                Event::Inbox(item) => self.absorb(memory, item).await,
                Event::Beat => {
                    send.send(&self.state(memory)).await?;
                    self.incoming.ask_again_after(PART_PATIENCE);
                    for waiting in memory.unacked.values_mut() {
                        if waiting.sent.is_some_and(|sent| sent.elapsed() > RESEND) {
                            waiting.sent = None;
                        }
                    }
                }
                Event::Loaded(result) => self.settle(memory, result).await,
            }
            self.advance(memory).await;
            if let Some(fetch) = self.incoming.wanted() {
                send.send(&ToLearner::Fetch(fetch)).await?;
            }
            more = self.deliver(memory, &mut send).await?;
            if let Some(since) = memory.finishing
                && (memory.unacked.is_empty() || since.elapsed() > FLUSH)
            {
                if !memory.unacked.is_empty() {
                    tracing::warn!("{} trajectories were not acknowledged in time", memory.unacked.len());
                }
                return Ok(());
            }
        }
    }

    fn state(&self, memory: &Memory) -> ToLearner {
        ToLearner::State(EngineState {
            engine: self.engine.clone(),
            version: self.versions.live().map(|p| p.version()),
            order: memory.order,
            slots: memory.slots,
        })
    }

    /// Sends reports and up to [`AT_ONCE`] unsent trajectories; returns whether more are left. The limit lets the link receive in
    /// between.
    async fn deliver(&self, memory: &mut Memory, send: &mut DealerSender) -> Result<bool, SocketError> {
        while let Some(report) = memory.reports.first() {
            send.send(&ToLearner::Reload(report.clone())).await?;
            memory.reports.remove(0);
        }
        let unsent: Vec<u64> = memory
            .unacked
            .iter()
            .filter(|(_, u)| u.sent.is_none())
            .map(|(id, _)| *id)
            .take(AT_ONCE + 1)
            .collect();
        let more = unsent.len() > AT_ONCE;
        for id in unsent.into_iter().take(AT_ONCE) {
            let Some(waiting) = memory.unacked.remove(&id) else {
                continue;
            };
            // moved into the message and back: the trajectory is kept until the acknowledgment
            let message = ToLearner::Trajectory(waiting.trajectory);
            let sent = send.send(&message).await;
            let ToLearner::Trajectory(trajectory) = message else {
                continue;
            };
            match sent {
                Err(SocketError::Codec(error)) => {
                    memory.unacked_bytes -= waiting.bytes;
                    tracing::error!("trajectory {id} cannot be sent and is dropped: {error}");
                }
                Err(error) => {
                    memory.unacked.insert(
                        id,
                        Unacked {
                            trajectory,
                            bytes: waiting.bytes,
                            sent: None,
                        },
                    );
                    return Err(error);
                }
                Ok(()) => {
                    memory.unacked.insert(
                        id,
                        Unacked {
                            trajectory,
                            bytes: waiting.bytes,
                            sent: Some(Instant::now()),
                        },
                    );
                }
            }
        }
        self.metrics.unacked.set(memory.unacked.len() as i64);
        Ok(more)
    }

    async fn absorb(&self, memory: &mut Memory, item: Option<ToLink>) {
        match item {
            Some(ToLink::Trajectory(trajectory)) => {
                let bytes = size(&trajectory);
                memory.unacked_bytes += bytes;
                memory.unacked.insert(
                    trajectory.id,
                    Unacked {
                        trajectory,
                        bytes,
                        sent: None,
                    },
                );
                self.metrics.unacked.set(memory.unacked.len() as i64);
                self.tell_full(memory).await;
            }
            Some(ToLink::State { order, slots }) => {
                memory.order = order;
                memory.slots = slots;
            }
            Some(ToLink::Finish) | None => {
                memory.finishing.get_or_insert_with(Instant::now);
            }
        }
    }

    async fn tell_full(&self, memory: &mut Memory) {
        let limit = if memory.full {
            MAX_UNACKED_BYTES / 2
        } else {
            MAX_UNACKED_BYTES
        };
        let full = memory.unacked_bytes > limit;
        if full != memory.full {
            memory.full = full;
            self.tell(FromLink::Full(full)).await;
        }
    }

    async fn tell(&self, news: FromLink) {
        if self.outbox.send(news).await.is_err() {
            tracing::debug!("the assignment has ended");
        }
    }

    async fn take(&mut self, memory: &mut Memory, message: FromLearner) {
        match message {
            FromLearner::Order(order) => self.tell(FromLink::Order(order)).await,
            FromLearner::Ack(ids) => {
                for id in ids {
                    if let Some(done) = memory.unacked.remove(&id) {
                        memory.unacked_bytes -= done.bytes;
                    }
                }
                self.tell_full(memory).await;
            }
            FromLearner::Announce(announce) => {
                let live = self.versions.live();
                if live.is_some_and(|p| p.version() == announce.version && p.digests != digests(&announce)) {
                    self.tell(FromLink::Retire).await;
                }
                if let Some(replaced) = block_in_place(|| self.incoming.announce(announce)) {
                    self.report(memory, replaced.version, replaced.begun, Some(told(&replaced.error)));
                }
            }
            FromLearner::FilePart(part) => self.part(memory, &part),
        }
    }

    fn part(&mut self, memory: &mut Memory, part: &FilePart) {
        if let Err(failed) = block_in_place(|| self.incoming.part(part)) {
            self.report(memory, failed.version, failed.begun, Some(told(&failed.error)));
        }
    }

    /// Starts the next step: fetching an announced version, or loading a fetched one.
    async fn advance(&mut self, memory: &mut Memory) {
        if memory.loading.is_some() {
            return;
        }
        let live = self.versions.live();
        let progress = block_in_place(|| self.incoming.advance(live.as_deref().map(|p| &p.digests)));
        match progress {
            Progress::Nothing => {}
            Progress::Already { version, begun } => {
                if let Some(policy) = live {
                    self.tell(FromLink::Live(policy)).await;
                }
                self.report(memory, version, begun, None);
            }
            Progress::Failed(failed) => self.report(memory, failed.version, failed.begun, Some(told(&failed.error))),
            Progress::Fetched {
                version,
                begun,
                dir,
                digests,
            } => {
                let (load, versions, from) = (Arc::clone(&self.load), Arc::clone(&self.versions), dir.clone());
                let work = tokio::task::spawn_blocking(move || {
                    let policy = load(&from, versions.live().as_deref())?;
                    check_announced(&policy, version, &digests)?;
                    let policy = Arc::new(policy);
                    versions.swap(Arc::clone(&policy));
                    Ok(policy)
                });
                memory.loading = Some(Loading {
                    version,
                    begun,
                    dir,
                    work,
                });
            }
        }
    }

    /// Handles the end of a load: the version is live or rejected.
    async fn settle(&mut self, memory: &mut Memory, result: Result<Arc<Policy>, LoadError>) {
        let Some(loading) = memory.loading.take() else { return };
        match result {
            Ok(policy) => {
                block_in_place(|| self.incoming.keep(&loading.dir));
                self.tell(FromLink::Live(policy)).await;
                self.report(memory, loading.version, loading.begun, None);
            }
            Err(error) => {
                block_in_place(|| self.incoming.discard(&loading.dir));
                self.report(memory, loading.version, loading.begun, Some(told(&error)));
            }
        }
    }

    fn report(&self, memory: &mut Memory, version: u64, begun: Instant, refused: Option<String>) {
        let seconds = begun.elapsed().as_secs_f64();
        if let Some(reason) = &refused {
            self.metrics.reloads.with_label_values(&["refused"]).inc();
            tracing::error!("policy version {version} is refused: {reason}");
        } else {
            self.metrics.reloads.with_label_values(&["live"]).inc();
            self.metrics.reload_seconds.observe(seconds);
            tracing::info!("policy version {version} is live after {seconds:.2} s");
        }
        memory.reports.push(ReloadReport {
            engine: self.engine.clone(),
            version,
            refused,
            seconds,
        });
    }
}

/// Returns the approximate bytes of a trajectory.
fn size(trajectory: &Trajectory) -> usize {
    let chunk = |c: &wire::messages::TrajectoryChunk| {
        let record = c
            .record
            .as_ref()
            .map_or(0, |r| r.images.data.len() + r.chain.data.len() + r.prompt.len() * 9);
        record + c.rewards.len() * 4 + c.frames.iter().map(|f| f.data.len()).sum::<usize>() + 256
    };
    trajectory.chunks.iter().map(chunk).sum()
}
