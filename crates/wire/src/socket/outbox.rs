//! What waits to be sent to one peer: bounded in bytes and messages, written without waiting by whoever sends, and by the
//! connection's task once the socket takes more.

use std::{
    collections::VecDeque,
    io::{ErrorKind, IoSlice},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use tokio::{net::TcpStream, sync::Notify, time::timeout};

use super::closer::Closed;
use crate::{
    limits::Limits,
    zmtp::{MAX_HEADER_BYTES, message_header},
};

/// Pieces of one system call; a message has two.
const PIECES: usize = 32;
/// Frame header of an empty delimiter.
const DELIMITER: [u8; 2] = [1, 0];

/// Bytes that wait to be sent to all peers of an endpoint.
#[derive(Debug, Default)]
pub(super) struct Queued {
    bytes: AtomicUsize,
}

#[derive(Debug)]
struct Item {
    head: [u8; DELIMITER.len() + MAX_HEADER_BYTES],
    head_bytes: usize,
    body: Vec<u8>,
}

impl Item {
    fn bytes(&self) -> usize {
        self.head_bytes + self.body.len()
    }
}

#[derive(Debug)]
struct State {
    stream: Arc<TcpStream>,
    items: VecDeque<Item>,
    /// Bytes of the first item that are written.
    written: usize,
    bytes: usize,
    /// When the peer last took bytes, or the first of those that wait came.
    taken: Instant,
    /// The peer is not heard before.
    rest_until: Option<Instant>,
    closed: Option<Closed>,
}

/// Why a message was not queued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unsent {
    /// The connection has ended.
    Gone,
    /// Too much waits already.
    Slow,
}

/// The outbox of a connection.
#[derive(Debug)]
pub(super) struct Outbox {
    limits: Arc<Limits>,
    all: Arc<Queued>,
    state: Mutex<State>,
    /// Something waits that the socket did not take at once.
    filled: Notify,
    /// There is room again, or the connection has ended.
    drained: Notify,
    /// The peer is a REQ socket: its answers begin with an empty delimiter.
    delimited: AtomicBool,
}

impl Outbox {
    pub(super) fn new(stream: Arc<TcpStream>, limits: Arc<Limits>, all: Arc<Queued>) -> Arc<Self> {
        let state = State {
            stream,
            items: VecDeque::new(),
            written: 0,
            bytes: 0,
            taken: Instant::now(),
            rest_until: None,
            closed: None,
        };
        Arc::new(Self {
            limits,
            all,
            state: Mutex::new(state),
            filled: Notify::new(),
            drained: Notify::new(),
            delimited: AtomicBool::new(false),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // no step between two changes of the state can panic
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// From now on the bytes go to `stream`, the same connection in another runtime.
    pub(super) fn write_to(&self, stream: Arc<TcpStream>) {
        self.lock().stream = stream;
    }

    /// From now on messages begin with an empty delimiter.
    pub(super) fn delimit(&self) {
        self.delimited.store(true, Ordering::Relaxed);
    }

    /// The peer is not heard for a while.
    pub(super) fn rest(&self, time: Duration) {
        self.lock().rest_until = Some(Instant::now() + time);
    }

    /// How long the peer is not heard yet.
    pub(super) fn rest_left(&self) -> Duration {
        let until = self.lock().rest_until;
        until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()))
    }

    /// Queues a message and writes what the socket takes at once. A peer for whom too much waits is disconnected.
    pub(super) fn send(&self, body: Vec<u8>) -> Result<(), Unsent> {
        self.push(self.item(body), true)
    }

    /// Waits for room, then queues a message and writes what the socket takes at once. One sender at a time.
    pub(super) async fn send_in_time(&self, body: Vec<u8>) -> Result<(), Unsent> {
        self.room().await?;
        self.push(self.item(body), false)
    }

    fn item(&self, body: Vec<u8>) -> Item {
        let mut head = [0u8; DELIMITER.len() + MAX_HEADER_BYTES];
        let delimiter: &[u8] = if self.delimited.load(Ordering::Relaxed) {
            &DELIMITER
        } else {
            &[]
        };
        let (header, length) = message_header(body.len());
        let header = header.iter().take(length);
        for (byte, value) in head.iter_mut().zip(delimiter.iter().chain(header)) {
            *byte = *value;
        }
        Item {
            head,
            head_bytes: delimiter.len() + length,
            body,
        }
    }

    /// Queues the bytes of a whole command frame.
    pub(super) fn send_raw(&self, frame: Vec<u8>) -> Result<(), Unsent> {
        let item = Item {
            head: Default::default(),
            head_bytes: 0,
            body: frame,
        };
        self.push(item, true)
    }

    fn push(&self, item: Item, bounded: bool) -> Result<(), Unsent> {
        let mut state = self.lock();
        if state.closed.is_some() {
            return Err(Unsent::Gone);
        }
        let before = state.bytes;
        state.bytes += item.bytes();
        state.items.push_back(item);
        // behind others the socket is full: its task writes when it takes more
        if state.items.len() == 1 {
            state.taken = Instant::now();
            self.write(&mut state);
        }
        self.account(before, &state);
        if state.closed.is_some() {
            return Err(Unsent::Gone);
        }
        if state.items.is_empty() {
            return Ok(());
        }
        let limits = &self.limits;
        let alone = state.items.len() == 1;
        let too_much = !alone
            && (state.items.len() > limits.queued_messages_per_peer || state.bytes > limits.queued_bytes_per_peer);
        if bounded && too_much {
            self.finish(&mut state, Closed::Slow);
            return Err(Unsent::Slow);
        }
        drop(state);
        self.filled.notify_one();
        Ok(())
    }

    /// Keeps the sums over all peers.
    fn account(&self, before: usize, state: &State) {
        let after = state.bytes;
        if after > before {
            self.all.bytes.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.all.bytes.fetch_sub(before - after, Ordering::Relaxed);
        }
    }

    /// Writes until all is written or the socket takes no more. A failed socket closes the outbox.
    fn write(&self, state: &mut State) {
        while !state.items.is_empty() {
            let mut pieces = [IoSlice::new(&[]); PIECES];
            let mut skip = state.written;
            let parts = state.items.iter().flat_map(|item| {
                [
                    item.head.get(..item.head_bytes).unwrap_or_default(),
                    item.body.as_slice(),
                ]
            });
            let mut used = 0;
            for (piece, part) in pieces.iter_mut().zip(parts) {
                let here = skip.min(part.len());
                skip -= here;
                *piece = IoSlice::new(part.get(here..).unwrap_or_default());
                used += 1;
            }
            match state.stream.try_write_vectored(pieces.get(..used).unwrap_or_default()) {
                Ok(0) => return self.discard(state, Closed::Left),
                Ok(count) => {
                    state.written += count;
                    state.bytes -= count;
                    state.taken = Instant::now();
                    while let Some(first) = state.items.front()
                        && state.written >= first.bytes()
                    {
                        state.written -= first.bytes();
                        state.items.pop_front();
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return,
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_gone) => return self.discard(state, Closed::Left),
            }
        }
    }

    fn discard(&self, state: &mut State, reason: Closed) {
        state.closed.get_or_insert(reason);
        state.items.clear();
        state.bytes = 0;
        state.written = 0;
        self.drained.notify_waiters();
    }

    fn finish(&self, state: &mut State, reason: Closed) {
        let before = state.bytes;
        self.discard(state, reason);
        self.account(before, state);
        self.filled.notify_one();
    }

    /// Ends it: what waits is dropped, later messages are rejected.
    pub(super) fn close(&self, reason: Closed) {
        self.finish(&mut self.lock(), reason);
    }

    /// Whether more waits for all peers of the endpoint than may.
    pub(super) fn is_too_much_for_all(&self) -> bool {
        self.all.bytes.load(Ordering::Relaxed) > self.limits.queued_bytes
    }

    /// Since when the peer has taken nothing of what waits; `None` when nothing waits.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        let state = self.lock();
        (state.bytes > 0).then_some(state.taken)
    }

    /// Bytes that wait.
    pub(super) fn queued_bytes(&self) -> usize {
        self.lock().bytes
    }

    /// Waits until the peer has taken enough that another message may wait.
    async fn room(&self) -> Result<(), Unsent> {
        loop {
            let drained = self.drained.notified();
            {
                let state = self.lock();
                if state.closed.is_some() {
                    return Err(Unsent::Gone);
                }
                if state.items.len() < self.limits.queued_messages_per_peer
                    && state.bytes < self.limits.queued_bytes_per_peer
                {
                    return Ok(());
                }
            }
            drained.await;
        }
    }

    /// Writes what waits whenever the socket takes more; ends when the connection has failed or the peer takes nothing.
    pub(super) async fn run(&self) -> Closed {
        loop {
            loop {
                let stream = {
                    let mut state = self.lock();
                    let before = state.bytes;
                    self.write(&mut state);
                    self.account(before, &state);
                    if let Some(reason) = state.closed {
                        return reason;
                    }
                    if state.bytes < before {
                        self.drained.notify_waiters();
                    }
                    if state.items.is_empty() {
                        break;
                    }
                    Arc::clone(&state.stream)
                };
                match timeout(self.limits.send_stall, stream.writable()).await {
                    Ok(Ok(())) => {}
                    Ok(Err(_gone)) => return Closed::Left,
                    Err(_late) => return Closed::Slow,
                }
            }
            self.filled.notified().await;
        }
    }
}

impl Drop for Outbox {
    fn drop(&mut self) {
        self.close(Closed::Stopped);
    }
}
