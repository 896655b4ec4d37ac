//! Bytes of unfinished and undecoded messages: counted per connection and over all connections, and held to a least rate.

use std::{
    collections::BTreeMap,
    io,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, ready},
    time::{Duration, Instant},
};

use tokio::{
    io::{AsyncRead, AsyncWrite, ReadBuf},
    sync::Notify,
};

/// Bytes that count as progress of a message.
const STEP_BYTES: usize = 256 << 10;
/// Bytes that a control frame has in addition to its payload: 2 of the header and 4 of the mask.
const CONTROL_BYTES: usize = 6;

/// Limits of arriving messages.
#[derive(Debug, Clone, Copy)]
pub(super) struct Pace {
    /// Time that a message and each [`STEP_BYTES`] of it may take in addition to the bytes at the least rate.
    pub(super) grace: Duration,
    /// Least rate of an arriving message.
    pub(super) bytes_per_second: usize,
}

#[derive(Debug, Default)]
struct Counts {
    total: usize,
    /// Bytes and wake-up call of each connection.
    connections: BTreeMap<u64, (usize, Arc<Notify>)>,
}

/// Bytes of messages over all connections. Beyond the limit the connection with the most bytes is closed.
#[derive(Debug)]
pub(super) struct Received {
    limit: usize,
    counts: Mutex<Counts>,
}

impl Received {
    pub(super) fn new(limit: usize) -> Self {
        Self {
            limit,
            counts: Mutex::default(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Counts> {
        // no step between two changes of the counts can panic
        self.counts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, id: u64, bytes: usize) {
        let mut counts = self.lock();
        counts.total += bytes;
        if let Some((own, _)) = counts.connections.get_mut(&id) {
            *own += bytes;
        }
        if counts.total > self.limit
            && let Some((_, largest)) = counts.connections.values().max_by_key(|(bytes, _)| *bytes)
        {
            largest.notify_one();
        }
    }

    fn free(&self, id: u64, bytes: usize) {
        let mut counts = self.lock();
        counts.total -= bytes;
        if let Some((own, _)) = counts.connections.get_mut(&id) {
            *own -= bytes;
        }
    }
}

/// An unfinished message.
#[derive(Debug)]
struct Unfinished {
    bytes: usize,
    begun: Instant,
    /// When the last [`STEP_BYTES`] were complete, and the bytes since then.
    step: Instant,
    step_bytes: usize,
}

/// Bytes of one connection's messages.
#[derive(Debug)]
pub(super) struct Arrival {
    received: Arc<Received>,
    id: u64,
    full: Arc<Notify>,
    pace: Pace,
    unfinished: Mutex<Option<Unfinished>>,
}

impl Arrival {
    /// Starts counting for a connection with this number.
    pub(super) fn new(received: &Arc<Received>, id: u64, pace: Pace) -> Arc<Self> {
        let full = Arc::new(Notify::new());
        received.lock().connections.insert(id, (0, Arc::clone(&full)));
        Arc::new(Self {
            received: Arc::clone(received),
            id,
            full,
            pace,
            unfinished: Mutex::default(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, Option<Unfinished>> {
        // every change is one assignment
        self.unfinished.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn add(&self, bytes: usize) {
        if bytes == 0 {
            return;
        }
        let now = Instant::now();
        let mut unfinished = self.lock();
        let message = unfinished.get_or_insert(Unfinished {
            bytes: 0,
            begun: now,
            step: now,
            step_bytes: 0,
        });
        message.bytes += bytes;
        message.step_bytes += bytes;
        if message.step_bytes >= STEP_BYTES {
            (message.step, message.step_bytes) = (now, 0);
        }
        drop(unfinished);
        self.received.add(self.id, bytes);
    }

    /// Subtracts a control frame, which may arrive within a message.
    pub(super) fn control(&self, payload: usize) {
        let mut unfinished = self.lock();
        let Some(message) = unfinished.as_mut() else { return };
        let bytes = (payload + CONTROL_BYTES).min(message.bytes);
        message.bytes -= bytes;
        message.step_bytes = message.step_bytes.saturating_sub(bytes);
        if message.bytes == 0 {
            *unfinished = None;
        }
        drop(unfinished);
        self.received.free(self.id, bytes);
    }

    /// Frees the bytes of a message that was decoded or dropped.
    pub(super) fn settle(&self) {
        if let Some(message) = self.lock().take() {
            self.received.free(self.id, message.bytes);
        }
    }

    /// Returns the bytes of a message that does not arrive in time, and the time since its first byte.
    pub(super) fn late(&self) -> Option<(usize, Duration)> {
        let unfinished = self.lock();
        let message = unfinished.as_ref()?;
        let elapsed = message.begun.elapsed();
        let rate = self.pace.bytes_per_second.max(1) as f64;
        let allowed = self.pace.grace + Duration::from_secs_f64(message.bytes as f64 / rate);
        let step = self.pace.grace + Duration::from_secs_f64(STEP_BYTES as f64 / rate);
        (elapsed > allowed || message.step.elapsed() > step).then_some((message.bytes, elapsed))
    }

    /// Waits until the connection must make room for other messages.
    pub(super) async fn full(&self) {
        self.full.notified().await;
    }
}

impl Drop for Arrival {
    fn drop(&mut self) {
        self.settle();
        self.received.lock().connections.remove(&self.id);
    }
}

/// A stream whose read bytes are counted.
#[derive(Debug)]
pub(super) struct Counted<S> {
    stream: S,
    arrival: Option<Arc<Arrival>>,
}

impl<S> Counted<S> {
    pub(super) fn new(stream: S, arrival: Arc<Arrival>) -> Self {
        Self {
            stream,
            arrival: Some(arrival),
        }
    }

    /// Stops counting, for bytes that are thrown away.
    pub(super) fn ignore(&mut self) {
        if let Some(arrival) = self.arrival.take() {
            arrival.settle();
        }
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Counted<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buf.filled().len();
        ready!(Pin::new(&mut self.stream).poll_read(cx, buf))?;
        if let Some(arrival) = &self.arrival {
            arrival.add(buf.filled().len() - before);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Counted<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, bytes)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const PACE: Pace = Pace {
        grace: Duration::from_secs(5),
        bytes_per_second: 256 << 10,
    };

    #[tokio::test]
    async fn the_largest_makes_room_and_bytes_are_freed() {
        let received = Arc::new(Received::new(100));
        let [small, large] = [1, 2].map(|id| Arrival::new(&received, id, PACE));
        large.add(60);
        small.add(30);
        small.settle();
        small.add(30);
        assert_eq!(received.lock().total, 90, "the message before was settled");
        small.add(20);
        large.full().await;
        drop(large);
        assert_eq!(received.lock().total, 50);
        small.control(4);
        assert_eq!(received.lock().total, 40);
        drop(small);
        let counts = received.lock();
        assert_eq!((counts.total, counts.connections.len()), (0, 0));
    }

    #[test]
    fn control_frames_within_a_message_do_not_count() {
        let received = Arc::new(Received::new(1000));
        let arrival = Arrival::new(&received, 1, PACE);
        arrival.add(16);
        arrival.control(10);
        assert!(arrival.lock().is_none(), "only a ping");
        arrival.add(26);
        arrival.control(10);
        assert_eq!(arrival.lock().as_ref().map(|message| message.bytes), Some(10));
    }

    #[test]
    fn a_message_that_arrives_too_slowly_is_late() {
        let received = Arc::new(Received::new(usize::MAX));
        let arrival = Arrival::new(&received, 1, PACE);
        let ago = |seconds| {
            Instant::now()
                .checked_sub(Duration::from_secs(seconds))
                .expect("after boot")
        };
        arrival.add(1);
        assert_eq!(arrival.late(), None);
        for (bytes, begun, step, late) in [
            (1, 6, 0, true),
            (2 << 20, 12, 1, false),
            (2 << 20, 14, 1, true),
            (64 << 20, 20, 7, true),
        ] {
            *arrival.lock() = Some(Unfinished {
                bytes,
                begun: ago(begun),
                step: ago(step),
                step_bytes: 0,
            });
            assert_eq!(arrival.late().is_some(), late, "{bytes} {begun} {step}");
        }
        *arrival.lock() = None;
        assert_eq!(arrival.late(), None, "an idle connection is never late");
    }
}
