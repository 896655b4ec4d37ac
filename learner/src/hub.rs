//! The learner's side of the wire: announces versions, serves their files, hands out orders, takes trajectories.
//!
//! One thread owns the socket. Trajectories are acknowledged when they have been handed to the training thread; one that comes
//! twice is dropped. An engine that comes back (or a new one) gets the newest announce and what is left of the order.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    io::{Read, Seek, SeekFrom},
    path::PathBuf,
    sync::mpsc as std_mpsc,
};

use policy::bundle::{Bundle, MANIFEST, describe_file};
use tokio::sync::mpsc;
use wire::{
    messages::{
        Announce, EngineState, Fetch, FilePart, FromLearner, Mode, Order, ReloadReport, Reset, ToLearner, Trajectory,
    },
    socket::{Peer, RouterEvent, RouterReceiver, RouterSender, bind_router},
};

use crate::error::{LearnerError, Result};

/// Bytes of a file per message.
const PART_BYTES: usize = 4 << 20;

/// What engines report.
#[derive(Debug)]
pub enum HubEvent {
    /// An engine is there.
    State(EngineState),
    /// An engine closed its connection.
    Gone,
    /// A reload went live or was refused.
    Reload(ReloadReport),
    /// An episode of the present order.
    Trajectory(Box<Trajectory>),
}

enum Command {
    Announce(Box<(Announce, PathBuf)>),
    Order {
        version: u64,
        mode: Mode,
        resets: Vec<Reset>,
    },
}

/// A handle to the hub's thread.
#[derive(Debug)]
pub struct Hub {
    commands: mpsc::UnboundedSender<Command>,
    events: std_mpsc::Receiver<HubEvent>,
    /// Where engines connect.
    pub endpoint: String,
}

type EpisodeKey = (u64, u32, u64);

fn episode_key(reset: &Reset) -> EpisodeKey {
    (reset.seed, reset.env, reset.episode)
}

struct State {
    sender: RouterSender,
    events: std_mpsc::Sender<HubEvent>,
    engines: BTreeMap<Peer, EngineState>,
    announce: Option<(Announce, PathBuf)>,
    /// Episodes still wanted and which engine has them.
    wanted: BTreeMap<EpisodeKey, (Reset, Option<Peer>)>,
    version: u64,
    mode: Mode,
    orders: u64,
    /// Acknowledged trajectories by engine session, to drop repetitions.
    seen: BTreeSet<(String, u64)>,
}

impl Hub {
    /// Binds the endpoint and starts the thread.
    ///
    /// # Errors
    /// The endpoint is wrong or in use.
    pub fn start(listen: &str) -> Result<Self> {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(1)
            .enable_all()
            .build()
            .map_err(crate::error::io(
                "starting the network thread of",
                std::path::Path::new(listen),
            ))?;
        let (sender, receiver, endpoint) = runtime.block_on(bind_router(listen))?;
        let (commands, command_receiver) = mpsc::unbounded_channel();
        let (event_sender, events) = std_mpsc::channel();
        let state = State {
            sender,
            events: event_sender,
            engines: BTreeMap::new(),
            announce: None,
            wanted: BTreeMap::new(),
            version: 0,
            mode: Mode::Eval,
            orders: 0,
            seen: BTreeSet::new(),
        };
        std::thread::spawn(move || runtime.block_on(state.run(receiver, command_receiver)));
        Ok(Self {
            commands,
            events,
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

    /// Orders episodes from a version; replaces what was wanted before.
    ///
    /// # Errors
    /// The network thread has ended.
    pub fn order(&self, version: u64, mode: Mode, resets: Vec<Reset>) -> Result<()> {
        self.command(Command::Order { version, mode, resets })
    }

    fn command(&self, command: Command) -> Result<()> {
        self.commands
            .send(command)
            .map_err(|_closed| LearnerError::Missing("the network thread has ended, see the log above".to_owned()))
    }

    /// Waits for the next event; `None` when `timeout` passes without one.
    ///
    /// # Errors
    /// The network thread has ended.
    pub fn next(&self, timeout: std::time::Duration) -> Result<Option<HubEvent>> {
        match self.events.recv_timeout(timeout) {
            Ok(event) => Ok(Some(event)),
            Err(std_mpsc::RecvTimeoutError::Timeout) => Ok(None),
            Err(std_mpsc::RecvTimeoutError::Disconnected) => Err(LearnerError::Missing(
                "the network thread has ended, see the log above".to_owned(),
            )),
        }
    }
}

impl State {
    async fn run(mut self, mut receiver: RouterReceiver, mut commands: mpsc::UnboundedReceiver<Command>) {
        loop {
            tokio::select! {
                command = commands.recv() => match command {
                    None => return,
                    Some(Command::Announce(new)) => {
                        self.announce = Some(*new);
                        for peer in self.engines.keys().cloned().collect::<Vec<_>>() {
                            self.send_announce(&peer).await;
                        }
                    }
                    Some(Command::Order { version, mode, resets }) => {
                        self.version = version;
                        self.mode = mode;
                        self.wanted = resets.into_iter().map(|r| (episode_key(&r), (r, None))).collect();
                        self.hand_out().await;
                    }
                },
                event = receiver.receive::<ToLearner>() => match event {
                    Err(error) => {
                        tracing::error!("the learner's endpoint failed: {error}");
                        return;
                    }
                    Ok(RouterEvent::Gone(peer)) => self.gone(&peer).await,
                    Ok(RouterEvent::Frame(_, Err(error))) => tracing::warn!("refused a frame from an engine: {error}"),
                    Ok(RouterEvent::Frame(peer, Ok(message))) => {
                        if self.take(peer, message).await.is_err() {
                            return;
                        }
                    }
                },
            }
        }
    }

    async fn take(&mut self, peer: Peer, message: ToLearner) -> Result<(), std_mpsc::SendError<HubEvent>> {
        match message {
            ToLearner::State(state) => {
                let known = self.engines.insert(peer.clone(), state.clone());
                let restarted = known.as_ref().is_some_and(|k| k.engine != state.engine);
                if known.is_none() || restarted {
                    self.release(&peer);
                    self.send_announce(&peer).await;
                    self.hand_out().await;
                }
                self.events.send(HubEvent::State(state))
            }
            ToLearner::Fetch(fetch) => {
                self.send_part(&peer, fetch).await;
                Ok(())
            }
            ToLearner::Reload(report) => self.events.send(HubEvent::Reload(report)),
            ToLearner::Trajectory(trajectory) => {
                let id = trajectory.id;
                let fresh = self.seen.insert((trajectory.engine.clone(), id));
                let wanted = self.wanted.remove(&episode_key(&trajectory.reset)).is_some();
                if fresh && wanted {
                    self.events.send(HubEvent::Trajectory(trajectory))?;
                }
                self.send(&peer, &FromLearner::Ack(vec![id])).await;
                Ok(())
            }
        }
    }

    async fn gone(&mut self, peer: &Peer) {
        if self.engines.remove(peer).is_some() {
            self.release(peer);
            self.hand_out().await;
            // the training thread decides whether an engine less ends the run
            drop(self.events.send(HubEvent::Gone));
        }
    }

    /// What an engine had is wanted from others.
    fn release(&mut self, peer: &Peer) {
        for (_, owner) in self.wanted.values_mut() {
            if owner.as_ref() == Some(peer) {
                *owner = None;
            }
        }
    }

    /// Spreads the episodes that no engine has over the engines that are there, and sends each its order.
    async fn hand_out(&mut self) {
        let peers: Vec<Peer> = self.engines.keys().cloned().collect();
        if peers.is_empty() || self.wanted.values().all(|(_, owner)| owner.is_some()) {
            return;
        }
        let free = self.wanted.values_mut().filter(|(_, owner)| owner.is_none());
        for ((_, owner), peer) in free.zip(peers.iter().cycle()) {
            *owner = Some(peer.clone());
        }
        self.orders += 1;
        for peer in peers {
            let resets: Vec<Reset> = self
                .wanted
                .values()
                .filter(|(_, owner)| owner.as_ref() == Some(&peer))
                .map(|(reset, _)| reset.clone())
                .collect();
            let order = Order {
                order: self.orders,
                version: self.version,
                mode: self.mode,
                resets,
            };
            self.send(&peer, &FromLearner::Order(order)).await;
        }
    }

    async fn send_announce(&mut self, peer: &Peer) {
        if let Some((announce, _)) = &self.announce {
            let message = FromLearner::Announce(announce.clone());
            self.send(peer, &message).await;
        }
    }

    /// Serves a part of a file of the announced version; anything else is answered with no bytes.
    async fn send_part(&mut self, peer: &Peer, fetch: Fetch) {
        let path = self
            .announce
            .as_ref()
            .filter(|(announce, _)| {
                announce.version == fetch.version && announce.files.iter().any(|f| f.name == fetch.file)
            })
            .map(|(_, dir)| dir.join(&fetch.file));
        let read = |path: PathBuf| -> std::io::Result<Vec<u8>> {
            let mut file = File::open(path)?;
            file.seek(SeekFrom::Start(fetch.offset))?;
            let mut data = Vec::new();
            file.take(PART_BYTES as u64).read_to_end(&mut data)?;
            Ok(data)
        };
        let data = match path.map(read) {
            Some(Ok(data)) => data,
            Some(Err(error)) => {
                tracing::error!(
                    "reading `{}` of version {} for an engine: {error}",
                    fetch.file,
                    fetch.version
                );
                Vec::new()
            }
            None => Vec::new(),
        };
        let part = FilePart {
            version: fetch.version,
            file: fetch.file,
            offset: fetch.offset,
            data,
        };
        self.send(peer, &FromLearner::FilePart(part)).await;
    }

    async fn send(&mut self, peer: &Peer, message: &FromLearner) {
        if let Err(error) = self.sender.send(peer, message).await {
            tracing::warn!("an engine did not take a message: {error}");
        }
    }
}
