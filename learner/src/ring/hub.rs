//! The learner's side of the wire: announces versions, serves their files, sends orders, receives trajectories.
//!
//! One thread owns the socket. A trajectory is acknowledged after the hand-over to the training thread; a repeated trajectory is
//! dropped. A new or reconnected engine gets the newest announce and the open episodes.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
        mpsc as std_mpsc,
    },
    time::{Duration, Instant},
};

use policy::bundle::{Bundle, MANIFEST, describe_file};
use tokio::sync::mpsc;
use wire::{
    limits::Limits,
    messages::{
        Announce, Batch, EngineState, Fetch, FilePart, FromLearner, Mode, Order, ReloadReport, Reset, ToLearner,
        Trajectory,
    },
    socket::{Peer, RouterEvent, RouterReceiver, RouterSender, bind_router},
};

use crate::{
    error::{LearnerError, Result},
    versions::{VersionError, check_version},
};

/// Bytes of a file per message.
const PART_BYTES: usize = 4 << 20;
/// Most file parts that wait to be read, over all engines.
const MAX_PARTS: usize = 1024;
/// Most bytes per second from one engine, and from all engines: trajectories with their images, read as fast as they arrive.
const ENGINE_BYTES_PER_SECOND: usize = 1 << 30;
/// Shortest time between two forwards of an engine's unchanged state; a changed state is forwarded at once.
const STATE_INTERVAL: Duration = Duration::from_millis(500);
/// Most reload reports of one connection that reach the training thread, per announced version.
const MAX_REPORTS: u32 = 16;
/// Longest reason of a reload report, in characters.
const MAX_REASON: usize = 4096;
/// Waiting events above which states and reports are dropped. Trajectories are never dropped, because each was ordered.
const MAX_WAITING: usize = 65_536;

/// Event from an engine.
#[derive(Debug)]
pub enum HubEvent {
    /// State of a connected engine.
    State(EngineState),
    /// Closed connection of an engine.
    Gone,
    /// Result of a reload: live or rejected.
    Reload(ReloadReport),
    /// Ordered episode.
    Trajectory(Box<Trajectory>),
    /// Dropped episode with a chunk of a version that its batch does not allow; the episode is ordered again.
    Stale,
}

enum Command {
    Announce(Box<(Announce, PathBuf)>),
    /// Replaces all open batches.
    Order(Batch),
    /// Is added to the open batches.
    Add(Batch),
}

/// Handle to the hub's thread.
#[derive(Debug)]
pub struct Hub {
    commands: mpsc::UnboundedSender<Command>,
    events: std_mpsc::Receiver<HubEvent>,
    waiting: Arc<AtomicUsize>,
    /// Endpoint where engines connect.
    pub endpoint: String,
}

type EpisodeKey = (u64, u32, u64);

fn episode_key(reset: &Reset) -> EpisodeKey {
    (reset.seed, reset.env, reset.episode)
}

/// Batch whose episodes have not all arrived.
struct Wanted {
    oldest: u64,
    newest: u64,
    mode: Mode,
    /// Open episodes, each with its engine and the number of the order that assigned the engine; `None` while unassigned.
    episodes: BTreeMap<EpisodeKey, (Reset, Option<(Peer, u64)>)>,
}

impl Wanted {
    fn new(batch: Batch) -> Self {
        Self {
            oldest: batch.oldest,
            newest: batch.newest,
            mode: batch.mode,
            episodes: batch
                .resets
                .into_iter()
                .map(|reset| (episode_key(&reset), (reset, None)))
                .collect(),
        }
    }

    /// Rejects an episode with a chunk of a version that the batch does not allow or that is newer than the announced version. An engine
    /// may have a newer version from a learner that was replaced.
    fn check(&self, trajectory: &Trajectory, announced: u64) -> Result<(), VersionError> {
        let versions = self.oldest..=self.newest.min(announced);
        // the chunks of an evaluation have no record
        let mut records = trajectory.chunks.iter().filter_map(|chunk| chunk.record.as_deref());
        records.try_for_each(|record| check_version(record.key.chunk, record.version, versions.clone()))
    }
}

/// A connected engine.
struct Engine {
    state: EngineState,
    /// Time when the training thread last got the state.
    forwarded: Instant,
    /// Reload reports since the last announce.
    reports: u32,
}

struct State {
    sender: RouterSender,
    parts: Parts,
    events: std_mpsc::Sender<HubEvent>,
    /// Events that the training thread has not received.
    waiting: Arc<AtomicUsize>,
    engines: BTreeMap<Peer, Engine>,
    announce: Option<(Announce, PathBuf)>,
    /// Open batches by priority, highest first; evaluations come before training.
    wanted: Vec<Wanted>,
    orders: u64,
    /// Engines with a current order. Such an engine gets only the additional episodes, so that an episode whose trajectory is on its way
    /// is not made twice.
    told: BTreeSet<Peer>,
    /// Acknowledged trajectories as engine session and trajectory id, to drop repetitions.
    seen: BTreeSet<(String, u64)>,
}

/// File part that an engine requested.
struct Asked {
    peer: Peer,
    fetch: Fetch,
    /// Path of the file; `None` for a file outside the announced version.
    path: Option<PathBuf>,
}

/// Thread that reads file parts, so that only the requesting engine waits for the disk.
struct Parts {
    asked: std_mpsc::SyncSender<Asked>,
    /// Engines whose part is being read.
    reading: Arc<Mutex<BTreeSet<Peer>>>,
}

impl Parts {
    fn start(sender: RouterSender) -> std::io::Result<Self> {
        let (asked, receiver) = std_mpsc::sync_channel::<Asked>(MAX_PARTS);
        let reading = Arc::new(Mutex::new(BTreeSet::new()));
        let done = Arc::clone(&reading);
        std::thread::Builder::new().name("parts".to_owned()).spawn(move || {
            for asked in receiver {
                let peer = asked.peer;
                let part = FromLearner::FilePart(read_part(asked));
                done.lock().unwrap_or_else(PoisonError::into_inner).remove(&peer);
                if let Err(error) = sender.send(peer, &part) {
                    tracing::debug!("an engine did not get its part: {error}");
                }
            }
        })?;
        Ok(Self { asked, reading })
    }

    /// Queues a part and returns true. Returns false while the engine's last part is being read, or while [`MAX_PARTS`] parts wait.
    fn ask(&self, asked: Asked) -> bool {
        let mut reading = self.reading.lock().unwrap_or_else(PoisonError::into_inner);
        let peer = asked.peer;
        if !reading.insert(peer) {
            return false;
        }
        let accepted = self.asked.try_send(asked).is_ok();
        if !accepted {
            reading.remove(&peer);
        }
        accepted
    }
}

fn read_part(asked: Asked) -> FilePart {
    let Asked { fetch, path, .. } = asked;
    let read = |path: PathBuf| -> std::io::Result<Vec<u8>> {
        let mut file = File::open(path)?;
        file.seek(SeekFrom::Start(fetch.offset))?;
        let mut data = Vec::new();
        file.take(PART_BYTES as u64).read_to_end(&mut data)?;
        Ok(data)
    };
    let data = path.map_or_else(|| Ok(Vec::new()), read).unwrap_or_else(|error| {
        tracing::error!(
            "failed to read `{}` of version {} for an engine: {error}",
            fetch.file,
            fetch.version
        );
        Vec::new()
    });
    FilePart {
        version: fetch.version,
        file: fetch.file,
        offset: fetch.offset,
        data,
    }
}

impl Hub {
    /// Binds the endpoint and starts the thread.
    ///
    /// # Errors
    /// The endpoint is invalid or in use.
    pub fn start(listen: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(crate::error::io(
                "starting the network thread of",
                std::path::Path::new(listen),
            ))?;
        let limits = Limits {
            peer_bytes_per_second: ENGINE_BYTES_PER_SECOND,
            large_bytes_per_second: ENGINE_BYTES_PER_SECOND,
            ..Limits::default()
        };
        let (sender, receiver, endpoint) = runtime.block_on(bind_router(listen, limits))?;
        let parts = Parts::start(sender.clone()).map_err(crate::error::io(
            "starting the thread for file parts of",
            std::path::Path::new(listen),
        ))?;
        // both channels are unbounded, because neither thread may wait for the other: commands are calls of the training thread; events are
        // the ordered episodes, once each, and at most `MAX_WAITING` others
        let waiting = Arc::new(AtomicUsize::new(0));
        let (commands, command_receiver) = mpsc::unbounded_channel();
        let (event_sender, events) = std_mpsc::channel();
        let state = State {
            sender,
            parts,
            events: event_sender,
            waiting: Arc::clone(&waiting),
            engines: BTreeMap::new(),
            announce: None,
            wanted: Vec::new(),
            orders: 0,
            told: BTreeSet::new(),
            seen: BTreeSet::new(),
        };
        std::thread::spawn(move || runtime.block_on(state.run(receiver, command_receiver)));
        Ok(Self {
            commands,
            events,
            waiting,
            endpoint,
        })
    }

    /// Announces a version to all engines, present and future.
    ///
    /// # Errors
    /// The bundle's manifest cannot be read.
    pub fn announce(&self, bundle: &Bundle) -> Result<()> {
        let mut files = bundle.manifest.files.clone();
        let mut manifest = describe_file(&bundle.path(MANIFEST))?;
        MANIFEST.clone_into(&mut manifest.name);
        files.push(manifest);
        let announce = Announce {
            version: bundle.manifest.policy_version,
            files,
        };
        self.command(Command::Announce(Box::new((announce, bundle.dir().to_owned()))))
    }

    /// Orders episodes from a version; replaces all open batches.
    ///
    /// # Errors
    /// The network thread has ended.
    pub fn order(&self, version: u64, mode: Mode, resets: Vec<Reset>) -> Result<()> {
        self.command(Command::Order(Batch {
            oldest: version,
            newest: version,
            mode,
            resets,
        }))
    }

    /// Orders episodes in addition to the open batches; an evaluation goes to the front, training to the end.
    ///
    /// # Errors
    /// The network thread has ended.
    pub fn add(&self, batch: Batch) -> Result<()> {
        self.command(Command::Add(batch))
    }

    fn command(&self, command: Command) -> Result<()> {
        self.commands
            .send(command)
            .map_err(|_closed| LearnerError::NetworkEnded)
    }

    /// Waits for the next event; `None` when `timeout` passes without one.
    ///
    /// # Errors
    /// The network thread has ended.
    pub fn next(&self, timeout: std::time::Duration) -> Result<Option<HubEvent>> {
        match self.events.recv_timeout(timeout) {
            Ok(event) => {
                self.waiting.fetch_sub(1, Ordering::Relaxed);
                Ok(Some(event))
            }
            Err(std_mpsc::RecvTimeoutError::Timeout) => Ok(None),
            Err(std_mpsc::RecvTimeoutError::Disconnected) => Err(LearnerError::NetworkEnded),
        }
    }
}

impl State {
    async fn run(mut self, mut receiver: RouterReceiver<ToLearner>, mut commands: mpsc::UnboundedReceiver<Command>) {
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    None => return,
                    Some(Command::Announce(new)) => {
                        self.announce = Some(*new);
                        for engine in self.engines.values_mut() {
                            engine.reports = 0;
                        }
                        for peer in self.engines.keys().copied().collect::<Vec<_>>() {
                            self.send_announce(peer);
                        }
                    }
                    Some(Command::Order(batch)) => {
                        self.wanted = vec![Wanted::new(batch)];
                        self.told.clear();
                        self.hand_out();
                    }
                    Some(Command::Add(batch)) => {
                        let place = if batch.mode == Mode::Eval { 0 } else { self.wanted.len() };
                        self.wanted.insert(place, Wanted::new(batch));
                        self.hand_out();
                    }
                },
                event = receiver.receive() => match event {
                    RouterEvent::Gone(peer) => self.gone(peer),
                    RouterEvent::Frame(_, Err(error)) => tracing::warn!("rejected a frame from an engine: {error}"),
                    RouterEvent::Frame(peer, Ok(message)) => {
                        if self.take(peer, message).is_err() {
                            return;
                        }
                    }
                },
            }
        }
    }

    fn take(&mut self, peer: Peer, message: ToLearner) -> Result<(), std_mpsc::SendError<HubEvent>> {
        match message {
            ToLearner::State(state) => self.state(peer, state),
            ToLearner::Fetch(fetch) => {
                self.send_part(peer, fetch);
                Ok(())
            }
            ToLearner::Reload(mut report) => {
                let Some(engine) = self
                    .engines
                    .get_mut(&peer)
                    .filter(|engine| engine.reports < MAX_REPORTS)
                else {
                    return Ok(());
                };
                engine.reports += 1;
                report.refused = report.refused.map(|reason| reason.chars().take(MAX_REASON).collect());
                self.forward(HubEvent::Reload(report))
            }
            ToLearner::Trajectory(trajectory) => {
                let (id, name) = (trajectory.id, (trajectory.engine.clone(), trajectory.id));
                // only ordered episodes are stored, so that no engine can make `seen` grow without bound
                if !self.seen.contains(&name)
                    && let Some(event) = self.claim(trajectory)
                {
                    self.seen.insert(name);
                    let stale = matches!(event, HubEvent::Stale);
                    self.send_event(event)?;
                    if stale {
                        self.hand_out();
                    }
                }
                self.send(peer, &FromLearner::Ack(vec![id]));
                Ok(())
            }
        }
    }

    fn state(&mut self, peer: Peer, state: EngineState) -> Result<(), std_mpsc::SendError<HubEvent>> {
        let known = self.engines.get(&peer);
        let restarted = known.is_none_or(|known| known.state.engine != state.engine);
        let recent = known.is_some_and(|known| known.state == state && known.forwarded.elapsed() < STATE_INTERVAL);
        let engine = Engine {
            state: state.clone(),
            forwarded: known
                .filter(|_| recent)
                .map_or_else(Instant::now, |known| known.forwarded),
            reports: known.map_or(0, |known| known.reports),
        };
        self.engines.insert(peer, engine);
        if restarted {
            self.release(peer);
            self.send_announce(peer);
            self.hand_out();
        }
        if recent {
            return Ok(());
        }
        self.forward(HubEvent::State(state))
    }

    /// Forwards a state or a report, unless too many events wait.
    fn forward(&self, event: HubEvent) -> Result<(), std_mpsc::SendError<HubEvent>> {
        if self.waiting.load(Ordering::Relaxed) > MAX_WAITING {
            tracing::warn!("an engine's report is dropped: {MAX_WAITING} wait for the training thread");
            return Ok(());
        }
        self.send_event(event)
    }

    fn send_event(&self, event: HubEvent) -> Result<(), std_mpsc::SendError<HubEvent>> {
        self.waiting.fetch_add(1, Ordering::Relaxed);
        self.events.send(event)
    }

    fn gone(&mut self, peer: Peer) {
        if self.engines.remove(&peer).is_some() {
            self.release(peer);
            self.hand_out();
            // the training thread decides whether the loss of an engine ends the run
            drop(self.forward(HubEvent::Gone));
        }
    }

    /// Converts a new trajectory into an event; returns `None` if the episode is not open or no version has been announced.
    fn claim(&mut self, trajectory: Box<Trajectory>) -> Option<HubEvent> {
        let key = episode_key(&trajectory.reset);
        let (announce, _) = self.announce.as_ref()?;
        let announced = announce.version;
        let place = self
            .wanted
            .iter()
            .position(|batch| batch.mode == trajectory.mode && batch.episodes.contains_key(&key))?;
        let batch = self.wanted.get_mut(place)?;
        if let Err(reason) = batch.check(&trajectory, announced) {
            let Reset { env, episode, .. } = trajectory.reset;
            tracing::warn!("episode {episode} of env {env} is left out and ordered again: {reason}");
            if let Some((_, owner)) = batch.episodes.get_mut(&key) {
                *owner = None;
            }
            return Some(HubEvent::Stale);
        }
        batch.episodes.remove(&key);
        if batch.episodes.is_empty() {
            self.wanted.remove(place);
        }
        Some(HubEvent::Trajectory(trajectory))
    }

    /// Unassigns the episodes of an engine, so that other engines can make these episodes.
    fn release(&mut self, peer: Peer) {
        self.told.remove(&peer);
        for (_, owner) in self.wanted.iter_mut().flat_map(|batch| batch.episodes.values_mut()) {
            if owner.as_ref().is_some_and(|(owner, _)| *owner == peer) {
                *owner = None;
            }
        }
    }

    /// Assigns the unassigned episodes to the connected engines in turn, and sends each engine its order.
    fn hand_out(&mut self) {
        let peers: Vec<Peer> = self.engines.keys().copied().collect();
        let all = self.wanted.iter_mut().flat_map(|batch| batch.episodes.values_mut());
        let mut free = all.filter(|(_, owner)| owner.is_none()).peekable();
        if peers.is_empty() || free.peek().is_none() {
            return;
        }
        self.orders += 1;
        let number = self.orders;
        for ((_, owner), peer) in free.zip(peers.iter().cycle()) {
            *owner = Some((*peer, number));
        }
        for peer in peers {
            let replaces = self.told.insert(peer);
            let tell = |owner: &Option<(Peer, u64)>| {
                let owner = owner.as_ref().filter(|(owner, _)| *owner == peer);
                owner.is_some_and(|(_, since)| replaces || *since == number)
            };
            let batch_of = |wanted: &Wanted| Batch {
                oldest: wanted.oldest,
                newest: wanted.newest,
                mode: wanted.mode,
                resets: wanted
                    .episodes
                    .values()
                    .filter(|(_, owner)| tell(owner))
                    .map(|(reset, _)| reset.clone())
                    .collect(),
            };
            let batches = self.wanted.iter().map(batch_of);
            let batches: Vec<Batch> = batches.filter(|batch| !batch.resets.is_empty()).collect();
            if replaces || !batches.is_empty() {
                let order = Order {
                    order: number,
                    replaces,
                    batches,
                };
                self.send(peer, &FromLearner::Order(order));
            }
        }
    }

    fn send_announce(&self, peer: Peer) {
        if let Some((announce, _)) = &self.announce {
            let message = FromLearner::Announce(announce.clone());
            self.send(peer, &message);
        }
    }

    /// Queues the reading and sending of a part of the announced version; any other request gets an empty part. An engine that requests
    /// more before it received the last part is not served, and must request the part again.
    fn send_part(&self, peer: Peer, fetch: Fetch) {
        let path = self
            .announce
            .as_ref()
            .filter(|(announce, _)| {
                announce.version == fetch.version && announce.files.iter().any(|f| f.name == fetch.file)
            })
            .map(|(_, dir)| dir.join(&fetch.file));
        let asked = Asked { peer, fetch, path };
        if self.sender.queued_bytes(peer) > PART_BYTES || !self.parts.ask(asked) {
            tracing::debug!("an engine asks for more parts than it takes");
        }
    }

    fn send(&self, peer: Peer, message: &FromLearner) {
        if let Err(error) = self.sender.send(peer, message) {
            tracing::debug!("an engine did not get a message: {error}");
        }
    }
}
