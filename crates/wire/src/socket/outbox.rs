//! Send queue of one peer, bounded in bytes and messages. The sender writes without waiting; the connection's task writes the
//! rest once the socket accepts more.

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

/// Buffers of one system call; a message has two.
const PIECES: usize = 32;
/// Frame header of the empty delimiter.
const DELIMITER: [u8; 2] = [1, 0];

/// Bytes queued for all peers of an endpoint.
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
    /// Bytes of the first item already written.
    written: usize,
    bytes: usize,
    /// When the peer last accepted bytes, or when the first queued item arrived, whichever is later.
    taken: Instant,
    /// Until when the peer is not read.
    rest_until: Option<Instant>,
    closed: Option<Closed>,
}

/// Reason for not queuing a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unsent {
    /// The connection has ended.
    Gone,
    /// The queue is full.
    Slow,
}

/// Outbox of a connection.
#[derive(Debug)]
pub(super) struct Outbox {
    limits: Arc<Limits>,
    all: Arc<Queued>,
    state: Mutex<State>,
    /// Items are queued that the socket did not accept at once.
    filled: Notify,
    /// Notified when the queue has room again, or the connection has ended.
    drained: Notify,
    /// Whether the peer is a REQ socket, whose replies start with an empty delimiter.
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

    /// Switches writing to `stream`, the same connection in another runtime.
    pub(super) fn write_to(&self, stream: Arc<TcpStream>) {
        self.lock().stream = stream;
    }

    /// Starts every later message with an empty delimiter.
    pub(super) fn delimit(&self) {
        self.delimited.store(true, Ordering::Relaxed);
    }

    /// Stops reading from the peer for `time`.
    pub(super) fn rest(&self, time: Duration) {
        self.lock().rest_until = Some(Instant::now() + time);
    }

    /// Returns the time for which the peer is still not read.
    pub(super) fn rest_left(&self) -> Duration {
        let until = self.lock().rest_until;
        until.map_or(Duration::ZERO, |until| until.saturating_duration_since(Instant::now()))
    }

    /// Queues a message and writes what the socket accepts at once. A peer whose queue overflows is disconnected.
    pub(super) fn send(&self, body: Vec<u8>) -> Result<(), Unsent> {
        self.push(self.item(body), true)
    }

    /// Waits for room, then queues a message and writes what the socket accepts at once. One sender at a time.
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
        // with other items queued the socket is full: the connection's task writes when the socket accepts more
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

    /// Updates the sum over all peers after a change from `before` bytes.
    fn account(&self, before: usize, state: &State) {
        let after = state.bytes;
        if after > before {
            self.all.bytes.fetch_add(after - before, Ordering::Relaxed);
        } else {
            self.all.bytes.fetch_sub(before - after, Ordering::Relaxed);
        }
    }

    /// Writes until the queue is empty or the socket accepts no more. A failed socket closes the outbox.
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

    /// Closes the outbox: drops queued items and rejects later messages.
    pub(super) fn close(&self, reason: Closed) {
        self.finish(&mut self.lock(), reason);
    }

    /// Returns whether the bytes queued for all peers of the endpoint exceed the limit.
    pub(super) fn is_too_much_for_all(&self) -> bool {
        self.all.bytes.load(Ordering::Relaxed) > self.limits.queued_bytes
    }

    /// Returns since when the peer has accepted no queued bytes; `None` if the queue is empty.
    pub(super) fn waiting_since(&self) -> Option<Instant> {
        let state = self.lock();
        (state.bytes > 0).then_some(state.taken)
    }

    /// Returns the number of queued bytes.
    pub(super) fn queued_bytes(&self) -> usize {
        self.lock().bytes
    }

    /// Waits until the queue has room for another message.
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

    /// Writes queued items whenever the socket accepts more; ends when the connection fails or the peer accepts nothing.
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
