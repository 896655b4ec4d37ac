//! ROUTER socket: accepts any number of peers, receives from the peers in turn and sends to each peer without waiting.

use std::{
    collections::HashMap,
    fmt,
    io::ErrorKind,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use rustix::{process::setpriority_process, thread::gettid};
use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    net::{TcpListener, TcpStream},
    runtime::Handle,
    sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot},
};

use super::{
    Limits, SocketError,
    budget::{Budget, Held},
    check_endpoint,
    closer::{Closed, Counters},
    connection::{Fault, Reader, Traffic, open},
    gate::{Admission, Gate},
    inbox::{Inbox, Turn},
    outbox::{Outbox, Unsent},
};
use crate::{
    codec::{CodecError, count, decode, encode},
    limits::{LARGE_BYTES, LARGE_ELEMENTS},
    zmtp::SocketType,
};

/// Most bytes of memory that one decoded element of a message may take.
const ELEMENT_BYTES: usize = 64;
/// Time for which a connection counts as new.
const NEW: Duration = Duration::from_secs(1);
/// Niceness of the threads for new connections and for large frames.
const NICENESS: i32 = 5;

/// Sender of a frame and address of the reply. Names one connection, not the identity that the peer announces; announcing
/// another peer's identity therefore diverts no messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer(u64);

impl From<Peer> for u64 {
    fn from(peer: Peer) -> Self {
        peer.0
    }
}

/// Event at a ROUTER.
#[derive(Debug)]
pub enum RouterEvent<T> {
    /// A frame arrived; a frame that cannot be decoded carries its error, so that the receiver can answer the sender.
    Frame(Peer, Result<T, CodecError>),
    /// A peer's connection has ended. Last event of this peer.
    Gone(Peer),
}

struct Entry<T> {
    /// `None` if the connection has ended.
    frame: Option<Result<T, CodecError>>,
    _held: Option<Held>,
    _place: Option<OwnedSemaphorePermit>,
}

type Peers = Arc<Mutex<HashMap<u64, Arc<Outbox>>>>;

fn lock(peers: &Peers) -> MutexGuard<'_, HashMap<u64, Arc<Outbox>>> {
    // every change is one insertion or one removal
    peers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Binds a ROUTER for messages of type `T` and returns its halves with the bound endpoint (port 0 selects a free port).
///
/// # Errors
/// The endpoint is invalid or in use.
pub async fn bind_router<T: DeserializeOwned + Send + 'static>(
    endpoint: &str,
    limits: Limits,
) -> Result<(RouterSender, RouterReceiver<T>, String), SocketError> {
    let address = check_endpoint(endpoint)?;
    let failed = |source: std::io::Error| SocketError::Bind {
        endpoint: endpoint.to_owned(),
        remedy: if source.kind() == ErrorKind::AddrInUse {
            " (stop the process that has the port, choose another port, or use port 0)"
        } else {
            ""
        },
        source,
    };
    let listener = TcpListener::bind(address).await.map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    if !bound.ip().is_loopback() {
        return Err(SocketError::NotLoopback(format!("{endpoint} ({bound})")));
    }
    let gate = Gate::new(limits.connections);
    let shared = Shared {
        budget: Arc::new(Budget::new(limits.received_bytes)),
        traffic: Traffic::new(limits),
        peers: Peers::default(),
        inbox: Arc::new(Inbox::new()),
        large: decode_large().map_err(failed)?,
        hall: Handle::current(),
    };
    let sender = RouterSender {
        peers: Arc::clone(&shared.peers),
        counters: Arc::clone(gate.counters()),
    };
    let inbox = Arc::clone(&shared.inbox);
    let listener = listener.into_std().map_err(failed)?;
    let closing = open_door(listener, Arc::clone(&gate), shared).map_err(failed)?;
    let receiver = RouterReceiver {
        inbox,
        gate,
        _closing: closing,
    };
    Ok((sender, receiver, format!("tcp://{bound}")))
}

/// Starts the thread of new connections, which accepts, shakes hands, and serves each connection for its first [`NEW`]. Many
/// short connections therefore do not delay the threads of established ones. Ends when the returned sender is dropped.
fn open_door<T: DeserializeOwned + Send + 'static>(
    listener: std::net::TcpListener,
    gate: Arc<Gate>,
    shared: Shared<T>,
) -> std::io::Result<oneshot::Sender<()>> {
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .max_blocking_threads(2)
        .build()?;
    let (closing, closed) = oneshot::channel();
    let accept = async move {
        let listener = TcpListener::from_std(listener)?;
        loop {
            let (stream, admission) = gate.accept(&listener).await;
            tokio::spawn(shared.clone().welcome(stream, admission));
        }
    };
    std::thread::Builder::new().name("door".to_owned()).spawn(move || {
        give_way();
        let ended: std::io::Result<()> = runtime.block_on(async {
            tokio::select! {
                ended = accept => ended,
                _dropped = closed => Ok(()),
            }
        });
        if let Err(error) = ended {
            tracing::error!("no more connections are accepted: {error}");
        }
        // do not wait for a decoder that is still running
        runtime.shutdown_background();
    })?;
    Ok(closing)
}

/// Entry in the list of peers. Dropping the entry removes the peer, so that its socket can close.
struct Listed {
    peers: Peers,
    id: u64,
}

impl Drop for Listed {
    fn drop(&mut self) {
        lock(&self.peers).remove(&self.id);
    }
}

/// One connection and its state.
struct Connection {
    reader: Reader,
    outbox: Arc<Outbox>,
    admission: Admission,
    listed: Listed,
    /// Permits for this connection's messages in the inbox.
    places: Arc<Semaphore>,
    /// Messages in a row that could not be decoded.
    malformed: u32,
    turn: Turn,
}

/// State that all connections of a ROUTER share.
struct Shared<T> {
    traffic: Arc<Traffic>,
    budget: Arc<Budget>,
    peers: Peers,
    inbox: Arc<Inbox<Entry<T>>>,
    large: mpsc::Sender<Large<T>>,
    /// Runtime that serves established connections, those that are no longer new.
    hall: Handle,
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self {
            traffic: Arc::clone(&self.traffic),
            budget: Arc::clone(&self.budget),
            peers: Arc::clone(&self.peers),
            inbox: Arc::clone(&self.inbox),
            large: self.large.clone(),
            hall: self.hall.clone(),
        }
    }
}

impl<T: DeserializeOwned + Send + 'static> Shared<T> {
    /// Serves a connection from its greeting until the connection is no longer new.
    async fn welcome(self, stream: TcpStream, admission: Admission) {
        let opened = tokio::select! {
            opened = open(stream, SocketType::Router, &self.traffic) => opened,
            reason = admission.evicted() => return admission.leave(reason),
        };
        let (reader, outbox) = match opened {
            Ok(halves) => halves,
            Err(fault) => {
                report(&admission, &fault);
                return admission.leave(fault.reason());
            }
        };
        admission.opened();
        lock(&self.peers).insert(admission.id, Arc::clone(&outbox));
        let listed = Listed {
            peers: Arc::clone(&self.peers),
            id: admission.id,
        };
        let connection = Connection {
            reader,
            outbox,
            admission,
            listed,
            places: Arc::new(Semaphore::new(self.traffic.limits.waiting_messages)),
            malformed: 0,
            turn: Turn::Door,
        };
        let new = Some(Instant::now() + NEW);
        if let Some(mut connection) = self.serve(connection, new).await {
            let hall = self.hall.clone();
            hall.spawn(async move {
                if let Err(error) = connection.reader.move_here(&connection.outbox) {
                    tracing::warn!("closed a connection from {}: {error}", connection.admission.address);
                    return self.leave(connection, Closed::Left);
                }
                let _ended = self.serve(connection, None).await;
            });
        }
    }

    /// Serves a connection to its end (`None`), or to its first message after `until` and returns the connection.
    async fn serve(&self, mut connection: Connection, until: Option<Instant>) -> Option<Connection> {
        let outbox = Arc::clone(&connection.outbox);
        let closer = Arc::clone(&connection.admission.closer);
        let reason = tokio::select! {
            reason = self.read(&mut connection, until) => reason,
            reason = outbox.run() => Some(reason),
            reason = closer.closed() => Some(reason),
        };
        let Some(reason) = reason else {
            return Some(connection);
        };
        if reason == Closed::Slow {
            let address = connection.admission.address;
            tracing::warn!("closed a connection from {address}: it accepts too little of what is sent");
        }
        self.leave(connection, reason);
        None
    }

    fn leave(&self, connection: Connection, reason: Closed) {
        let Connection {
            outbox,
            admission,
            listed,
            ..
        } = connection;
        drop(listed);
        outbox.close(Closed::Stopped);
        self.inbox.push(
            admission.id,
            Turn::Door,
            Entry {
                frame: None,
                _held: None,
                _place: None,
            },
        );
        admission.leave(reason);
    }

    /// Reads messages; returns the reason when the connection ends, `None` when the connection is no longer new.
    async fn read(&self, connection: &mut Connection, until: Option<Instant>) -> Option<Closed> {
        let Connection {
            reader,
            outbox,
            admission,
            places,
            malformed,
            turn,
            ..
        } = connection;
        loop {
            let Ok(place) = Arc::clone(places).acquire_owned().await else {
                return Some(Closed::Stopped);
            };
            let reading = reader.message(&self.budget, admission.id, &admission.closer, outbox);
            let (frame, mut receiving) = match reading.await {
                Ok(message) => message,
                Err(fault) => {
                    report(admission, &fault);
                    return Some(fault.reason());
                }
            };
            let large = frame.len() > LARGE_BYTES / 64;
            let message = match count(&frame) {
                Ok(elements) => {
                    receiving.grow(elements * ELEMENT_BYTES).await;
                    receiving.waits(true);
                    self.decode(frame, elements).await
                }
                Err(error) => Err(error),
            };
            if message.is_ok() {
                *malformed = 0;
                admission.active();
            } else {
                *malformed += 1;
            }
            self.inbox.push(
                admission.id,
                std::mem::replace(turn, Turn::Talk),
                Entry {
                    frame: Some(message),
                    _held: Some(receiving.complete()),
                    _place: Some(place),
                },
            );
            // a new connection may send one large malformed message: counting elements costs time
            let suspect = until.is_some() && large && *malformed > 0;
            if suspect || *malformed > self.traffic.limits.malformed_messages {
                tracing::warn!(
                    "closed a connection from {}: {malformed} messages in a row could not be decoded",
                    admission.address
                );
                return Some(Closed::Malformed);
            }
            if until.is_some_and(|until| Instant::now() > until) {
                return None;
            }
        }
    }

    async fn decode(&self, frame: Vec<u8>, elements: usize) -> Result<T, CodecError> {
        if frame.len() <= LARGE_BYTES && elements <= LARGE_ELEMENTS {
            return decode(&frame);
        }
        let (answer, decoded) = oneshot::channel();
        let large = Large { frame, answer };
        let lost = || CodecError::Payload("its decoder ended".to_owned());
        self.large.send(large).await.map_err(|_ended| lost())?;
        decoded.await.unwrap_or_else(|_ended| Err(lost()))
    }
}

/// Large frame and the channel for the decoded message.
struct Large<T> {
    frame: Vec<u8>,
    answer: oneshot::Sender<Result<T, CodecError>>,
}

/// Starts the thread that decodes large frames, one at a time. Ends when all senders are dropped.
fn decode_large<T: DeserializeOwned + Send + 'static>() -> std::io::Result<mpsc::Sender<Large<T>>> {
    let (sender, mut waiting) = mpsc::channel::<Large<T>>(1);
    std::thread::Builder::new().name("large".to_owned()).spawn(move || {
        give_way();
        while let Some(Large { frame, answer }) = waiting.blocking_recv() {
            // an error means that the connection has ended
            drop(answer.send(decode(&frame)));
        }
    })?;
    Ok(sender)
}

/// Lowers the priority of this thread: its work may wait when processors are busy, inference may not.
fn give_way() {
    if let Err(error) = setpriority_process(Some(gettid()), NICENESS) {
        tracing::debug!("a thread in the background keeps its priority: {error}");
    }
}

fn report(admission: &Admission, fault: &Fault) {
    match fault {
        // a client that disconnects is not a fault
        Fault::Left | Fault::Io(_) => tracing::debug!("a connection from {} ended: {fault}", admission.address),
        Fault::Handshake(_) => tracing::debug!("closed a connection from {}: {fault}", admission.address),
        fault => tracing::warn!("closed a connection from {}: {fault}", admission.address),
    }
}

/// Sending half of a ROUTER; cheap to clone.
#[derive(Clone)]
pub struct RouterSender {
    peers: Peers,
    counters: Arc<Counters>,
}

impl fmt::Debug for RouterSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RouterSender").finish_non_exhaustive()
    }
}

impl RouterSender {
    /// Queues a message for a peer and returns at once. A peer whose outbox overflows is disconnected; its
    /// [`RouterEvent::Gone`] follows.
    ///
    /// # Errors
    /// The peer is disconnected or too slow, or the message is too long.
    pub fn send<M: Serialize>(&self, peer: Peer, message: &M) -> Result<(), SocketError> {
        let frame = encode(message)?;
        let outbox = lock(&self.peers).get(&peer.0).map(Arc::clone);
        let outbox = outbox.ok_or(SocketError::Disconnected)?;
        let sent = outbox.send(frame);
        if outbox.is_too_much_for_all() {
            // disconnect the peer that has accepted no bytes for longest
            let slowest = lock(&self.peers)
                .values()
                .filter_map(|outbox| Some((outbox.waiting_since()?, outbox)))
                .min_by_key(|(since, _)| *since)
                .map(|(_, outbox)| Arc::clone(outbox));
            if let Some(slowest) = slowest {
                slowest.close(Closed::Slow);
            }
        }
        sent.map_err(|unsent| match unsent {
            Unsent::Gone => SocketError::Disconnected,
            Unsent::Slow => SocketError::Slow,
        })
    }

    /// Stops reading from a peer for `time`, for a peer that requests more than can be served.
    pub fn rest(&self, peer: Peer, time: Duration) {
        if let Some(outbox) = lock(&self.peers).get(&peer.0) {
            outbox.rest(time);
        }
    }

    /// Returns the number of bytes queued for a peer; 0 if the peer is disconnected.
    pub fn queued_bytes(&self, peer: Peer) -> usize {
        lock(&self.peers).get(&peer.0).map_or(0, |outbox| outbox.queued_bytes())
    }

    /// Returns the connection counts.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}

/// Receiving half of a ROUTER; dropping the half closes the endpoint and all connections.
pub struct RouterReceiver<T> {
    inbox: Arc<Inbox<Entry<T>>>,
    gate: Arc<Gate>,
    /// Dropping this sender stops the thread that accepts connections.
    _closing: oneshot::Sender<()>,
}

impl<T> fmt::Debug for RouterReceiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RouterReceiver").finish_non_exhaustive()
    }
}

impl<T> RouterReceiver<T> {
    /// Waits for the next frame or the next end of a connection; takes peers in turn. Safe to cancel.
    pub async fn receive(&mut self) -> RouterEvent<T> {
        let (peer, entry) = self.inbox.next().await;
        match entry.frame {
            Some(frame) => RouterEvent::Frame(Peer(peer), frame),
            None => RouterEvent::Gone(Peer(peer)),
        }
    }
}

impl<T> Drop for RouterReceiver<T> {
    fn drop(&mut self) {
        self.gate.close();
    }
}
