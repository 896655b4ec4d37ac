//! ROUTER: accepts any number of peers, hears them in turn and answers each without waiting.

use std::{
    collections::HashMap,
    fmt,
    io::ErrorKind,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

use serde::{Serialize, de::DeserializeOwned};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{OwnedSemaphorePermit, Semaphore},
    task::JoinHandle,
};

use super::{
    Limits, SocketError,
    budget::{Budget, Held},
    check_endpoint,
    closer::{Closed, Counters},
    connection::{Fault, Reader, open},
    gate::{Admission, Gate},
    inbox::Inbox,
    outbox::{Outbox, Queued, Unsent},
};
use crate::{
    codec::{CodecError, count, decode, encode},
    zmtp::SocketType,
};

/// Bytes of memory that one element of a message may take once it is decoded.
const ELEMENT_BYTES: usize = 64;
/// A frame beyond this is decoded on a thread of its own, so that no other connection waits for it.
const LARGE_BYTES: usize = 256 << 10;

/// Who sent a frame; the answer goes there. A name of one connection, not of what the peer calls itself: nobody gets the messages
/// of another by announcing its identity.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer(u64);

impl From<Peer> for u64 {
    fn from(peer: Peer) -> Self {
        peer.0
    }
}

/// What happens at a ROUTER.
#[derive(Debug)]
pub enum RouterEvent<T> {
    /// A frame came; one that cannot be read carries its error, so that the sender can be answered.
    Frame(Peer, Result<T, CodecError>),
    /// A peer's connection has ended. The last event of this peer.
    Gone(Peer),
}

struct Entry<T> {
    /// `None`: the connection has ended.
    frame: Option<Result<T, CodecError>>,
    _held: Option<Held>,
    _place: Option<OwnedSemaphorePermit>,
}

type Peers = Arc<Mutex<HashMap<u64, Arc<Outbox>>>>;

fn lock(peers: &Peers) -> MutexGuard<'_, HashMap<u64, Arc<Outbox>>> {
    // every change is one insertion or one removal
    peers.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Binds a ROUTER for messages of type `T` and returns its halves with the endpoint that it really has (port 0 picks a free one).
///
/// # Errors
/// The endpoint is wrong or in use.
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
        budget: Budget::new(limits.received_bytes),
        limits: Arc::new(limits),
        queued: Arc::default(),
        peers: Peers::default(),
        inbox: Arc::new(Inbox::new()),
        decoding: Arc::new(Semaphore::new(1)),
    };
    let sender = RouterSender {
        peers: Arc::clone(&shared.peers),
        counters: Arc::clone(gate.counters()),
    };
    let inbox = Arc::clone(&shared.inbox);
    let accepting = tokio::spawn({
        let gate = Arc::clone(&gate);
        async move {
            loop {
                let (stream, admission) = gate.accept(&listener).await;
                tokio::spawn(shared.clone().serve(stream, admission));
            }
        }
    });
    let receiver = RouterReceiver { inbox, gate, accepting };
    Ok((sender, receiver, format!("tcp://{bound}")))
}

/// What the connections of a ROUTER share.
struct Shared<T> {
    limits: Arc<Limits>,
    budget: Arc<Budget>,
    queued: Arc<Queued>,
    peers: Peers,
    inbox: Arc<Inbox<Entry<T>>>,
    /// Large frames are decoded one at a time.
    decoding: Arc<Semaphore>,
}

impl<T> Clone for Shared<T> {
    fn clone(&self) -> Self {
        Self {
            limits: Arc::clone(&self.limits),
            budget: Arc::clone(&self.budget),
            queued: Arc::clone(&self.queued),
            peers: Arc::clone(&self.peers),
            inbox: Arc::clone(&self.inbox),
            decoding: Arc::clone(&self.decoding),
        }
    }
}

impl<T: DeserializeOwned + Send + 'static> Shared<T> {
    /// One connection from its greeting to its end.
    async fn serve(self, stream: TcpStream, admission: Admission) {
        let opened = tokio::select! {
            opened = open(stream, SocketType::Router, &self.limits, &self.queued) => opened,
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
        let reason = tokio::select! {
            reason = self.read(reader, &outbox, &admission) => reason,
            reason = outbox.run() => reason,
            reason = admission.evicted() => reason,
        };
        if reason == Closed::Slow {
            tracing::warn!("closed a connection from {}: it does not take what is sent to it", admission.address);
        }
        lock(&self.peers).remove(&admission.id);
        outbox.close();
        self.inbox.push(
            admission.id,
            Entry {
                frame: None,
                _held: None,
                _place: None,
            },
        );
        admission.leave(reason);
    }

    async fn read(&self, mut reader: Reader, outbox: &Outbox, admission: &Admission) -> Closed {
        let places = Arc::new(Semaphore::new(self.limits.waiting_messages));
        let mut malformed = 0;
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else {
                return Closed::Stopped;
            };
            let mut receiving = self.budget.begin(admission.id, &admission.closer);
            let frame = match reader.message(&mut receiving, outbox).await {
                Ok(frame) => frame,
                Err(fault) => {
                    report(admission, &fault);
                    return fault.reason();
                }
            };
            let message = match count(&frame) {
                Ok(elements) => {
                    receiving.grow(elements * ELEMENT_BYTES).await;
                    self.decode(frame).await
                }
                Err(error) => Err(error),
            };
            malformed = if message.is_ok() { 0 } else { malformed + 1 };
            if message.is_ok() {
                admission.active();
            }
            self.inbox.push(
                admission.id,
                Entry {
                    frame: Some(message),
                    _held: Some(receiving.complete()),
                    _place: Some(place),
                },
            );
            if malformed > self.limits.malformed_messages {
                tracing::warn!(
                    "closed a connection from {}: {malformed} messages in a row could not be decoded",
                    admission.address
                );
                return Closed::Malformed;
            }
        }
    }

    async fn decode(&self, frame: Vec<u8>) -> Result<T, CodecError> {
        if frame.len() <= LARGE_BYTES {
            return decode(&frame);
        }
        let _turn = self.decoding.acquire().await;
        let decoding = tokio::task::spawn_blocking(move || decode(&frame));
        decoding.await.unwrap_or_else(|e| Err(CodecError::Payload(e.to_string())))
    }
}

fn report(admission: &Admission, fault: &Fault) {
    match fault {
        // a client that leaves is no fault
        Fault::Left | Fault::Io(_) => tracing::debug!("a connection from {} ended: {fault}", admission.address),
        Fault::Handshake(_) => tracing::debug!("closed a connection from {}: {fault}", admission.address),
        fault => tracing::warn!("closed a connection from {}: {fault}", admission.address),
    }
}

/// The sending half of a ROUTER; cheap to clone.
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
    /// Queues a message for a peer and returns at once. A peer that takes too little of what is sent to it is disconnected; its
    /// [`RouterEvent::Gone`] follows.
    ///
    /// # Errors
    /// The peer is gone or too slow, or the message is too long.
    pub fn send<M: Serialize>(&self, peer: Peer, message: &M) -> Result<(), SocketError> {
        let frame = encode(message)?;
        let outbox = lock(&self.peers).get(&peer.0).map(Arc::clone);
        let outbox = outbox.ok_or(SocketError::Disconnected)?;
        outbox.send(frame).map_err(|unsent| match unsent {
            Unsent::Gone => SocketError::Disconnected,
            Unsent::Slow => SocketError::Slow,
        })
    }

    /// Counts of connections.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }
}

/// The receiving half of a ROUTER; dropping it closes the endpoint and all connections.
pub struct RouterReceiver<T> {
    inbox: Arc<Inbox<Entry<T>>>,
    gate: Arc<Gate>,
    accepting: JoinHandle<()>,
}

impl<T> fmt::Debug for RouterReceiver<T> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RouterReceiver").finish_non_exhaustive()
    }
}

impl<T> RouterReceiver<T> {
    /// Waits for the next frame or the next end of a connection; peers are heard in turn. Safe to cancel.
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
        self.accepting.abort();
        self.gate.close();
    }
}
