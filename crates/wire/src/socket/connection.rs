//! One connection: the handshake, and reading of messages under the limits of the endpoint.

use std::{
    collections::TryReserveError,
    io,
    os::fd::AsFd,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

use bytes::{Buf, BufMut, BytesMut};
use rustix::net::sockopt;
use tokio::{net::TcpStream, sync::Semaphore, time::timeout};

use super::{
    budget::{Budget, Receiving},
    closer::{Closed, Closer},
    outbox::{Outbox, Queued, Unsent},
    pace::Pace,
};
use crate::{
    limits::{LARGE_BYTES, Limits, MAX_PARTS, READ_AHEAD_BYTES},
    zmtp::{self, GREETING_BYTES, SocketType, ZmtpError},
};

/// Bytes that are reserved, allocated and read in one step; other connections run between steps.
const STEP_BYTES: usize = 256 << 10;
/// Bytes of a step while little of the message has arrived: a header alone must not reserve much.
const FIRST_STEP_BYTES: usize = 16 << 10;
/// Received bytes of a body after which memory for the whole body is reserved, so that the body is copied at most once. Reserved
/// memory costs only address space until bytes arrive.
const PROVEN_BYTES: usize = 4 << 20;
/// Burst of a peer's messages (and, below, bytes) that may arrive at once, in seconds.
const MESSAGE_BURST: f64 = 1.0;
const BYTE_BURST: f64 = 0.1;
/// Resolution of the timer; shorter waits are added to the next wait.
const LEAST_WAIT: Duration = Duration::from_millis(1);
/// Keep-alive: the kernel detects a vanished host after 15 s + 4 x 5 s, however busy the peer's process is.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 4;
const VANISHED: Duration = Duration::from_secs(35);

/// Reason for closing a connection.
#[derive(Debug, thiserror::Error)]
pub(super) enum Fault {
    #[error("it closed the connection")]
    Left,
    #[error("the connection failed")]
    Io(#[source] io::Error),
    #[error(transparent)]
    Zmtp(#[from] ZmtpError),
    #[error("a message did not arrive in time: {received} of {expected} bytes came")]
    Late { received: usize, expected: usize },
    #[error("the handshake took longer than {0:?}")]
    Handshake(Duration),
    #[error("it accepts too little of what is sent")]
    Slow,
    #[error("there is no memory for its message")]
    Memory(#[source] TryReserveError),
}

impl Fault {
    pub(super) fn reason(&self) -> Closed {
        match self {
            Self::Left | Self::Io(_) => Closed::Left,
            Self::Zmtp(_) => Closed::Protocol,
            Self::Late { .. } => Closed::Late,
            Self::Handshake(_) => Closed::Handshake,
            Self::Slow => Closed::Slow,
            Self::Memory(_) => Closed::Full,
        }
    }
}

impl From<Unsent> for Fault {
    fn from(unsent: Unsent) -> Self {
        match unsent {
            Unsent::Gone => Self::Left,
            Unsent::Slow => Self::Slow,
        }
    }
}

/// Lets the kernel detect a vanished peer of an accepted connection within 35 s, and send small messages at once.
///
/// # Errors
/// The connection is gone.
pub fn detect_vanished(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    // the same limit while sent bytes are unacknowledged, when the kernel sends no probes
    sockopt::set_tcp_user_timeout(stream, VANISHED.as_millis() as u32)?;
    Ok(())
}

/// State that the connections of an endpoint share.
#[derive(Debug)]
pub(super) struct Traffic {
    pub(super) limits: Arc<Limits>,
    queued: Arc<Queued>,
    large: Mutex<Pace>,
    /// One connection at a time reads a step of a large message, so that other connections run between steps.
    reading: Semaphore,
}

impl Traffic {
    pub(super) fn new(limits: Limits) -> Arc<Self> {
        let large = Pace::new(limits.large_bytes_per_second as f64, BYTE_BURST);
        Arc::new(Self {
            limits: Arc::new(limits),
            queued: Arc::default(),
            large: Mutex::new(large),
            reading: Semaphore::new(1),
        })
    }

    fn take_large(&self, bytes: usize, now: Instant) -> Duration {
        self.large
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take(bytes, now)
    }
}

/// Opens a connection: greeting and READY both ways, within [`Limits::handshake`].
pub(super) async fn open(
    stream: TcpStream,
    own: SocketType,
    traffic: &Arc<Traffic>,
) -> Result<(Reader, Arc<Outbox>), Fault> {
    detect_vanished(&stream).map_err(Fault::Io)?;
    let limits = &traffic.limits;
    let stream = Arc::new(stream);
    let outbox = Outbox::new(Arc::clone(&stream), Arc::clone(limits), Arc::clone(&traffic.queued));
    let mut reader = Reader {
        stream,
        buffer: BytesMut::with_capacity(READ_AHEAD_BYTES),
        limits: Arc::clone(limits),
        traffic: Arc::clone(traffic),
        messages: Pace::new(f64::from(limits.messages_per_second), MESSAGE_BURST),
        bytes: Pace::new(limits.peer_bytes_per_second as f64, BYTE_BURST),
    };
    let handshake = async {
        outbox.send_raw(zmtp::greeting().to_vec())?;
        reader.greeting().await?;
        outbox.send_raw(zmtp::ready(own))?;
        reader.ready(own).await
    };
    tokio::select! {
        done = timeout(limits.handshake, handshake) => done.unwrap_or(Err(Fault::Handshake(limits.handshake)))?,
        _closed = outbox.run() => return Err(Fault::Left),
    }
    Ok((reader, outbox))
}

/// Deadline of a message's bytes.
struct Clock {
    begun: Instant,
    grace: Duration,
    bytes_per_second: usize,
}

impl Clock {
    fn new(limits: &Limits) -> Self {
        Self {
            begun: Instant::now(),
            grace: limits.message_grace,
            bytes_per_second: limits.bytes_per_second.max(1),
        }
    }

    /// Returns the time left until `expected` bytes must have arrived.
    fn left(&self, expected: usize) -> Duration {
        let time = Duration::from_secs_f64(expected as f64 / self.bytes_per_second as f64);
        (self.begun + self.grace + time).saturating_duration_since(Instant::now())
    }

    /// Starts the time of the next step; unused time of earlier steps is not added.
    fn restart(&mut self) {
        self.begun = Instant::now();
    }

    /// Extends the deadline by a delay that this side caused.
    fn pause(&mut self, time: Duration) {
        self.begun += time;
    }
}

/// Reading half of a connection.
#[derive(Debug)]
pub(super) struct Reader {
    stream: Arc<TcpStream>,
    buffer: BytesMut,
    limits: Arc<Limits>,
    traffic: Arc<Traffic>,
    messages: Pace,
    bytes: Pace,
}

/// Waits and returns the elapsed time.
async fn rest(wait: Duration) -> Duration {
    if wait < LEAST_WAIT {
        return Duration::ZERO;
    }
    let begun = Instant::now();
    tokio::time::sleep(wait).await;
    begun.elapsed()
}

/// Reads the available bytes, at least one; the end of the stream is a fault.
async fn read(stream: &TcpStream, into: &mut impl BufMut) -> Result<(), Fault> {
    loop {
        stream.readable().await.map_err(Fault::Io)?;
        match stream.try_read_buf(into) {
            Ok(0) => return Err(Fault::Left),
            Ok(_count) => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(Fault::Io(error)),
        }
    }
}

/// Bytes of a message. Large bodies are freed on another thread: returning their pages takes milliseconds.
#[derive(Debug, Default)]
struct Body(Vec<u8>);

impl Drop for Body {
    fn drop(&mut self) {
        if self.0.len() > LARGE_BYTES
            && let Ok(runtime) = tokio::runtime::Handle::try_current()
        {
            let bytes = std::mem::take(&mut self.0);
            runtime.spawn_blocking(move || drop(bytes));
        }
    }
}

impl Reader {
    /// Registers the connection with the calling runtime, which does all later reads and writes.
    pub(super) fn move_here(&mut self, outbox: &Outbox) -> io::Result<()> {
        let stream = Arc::new(TcpStream::from_std(self.stream.as_fd().try_clone_to_owned()?.into())?);
        outbox.write_to(Arc::clone(&stream));
        self.stream = stream;
        Ok(())
    }

    /// Reads available bytes into the buffer; the end of the stream is a fault.
    async fn fill(&mut self) -> Result<(), Fault> {
        if self.buffer.capacity() - self.buffer.len() < zmtp::MAX_HEADER_BYTES {
            self.buffer.reserve(READ_AHEAD_BYTES);
        }
        read(&self.stream, &mut self.buffer).await
    }

    async fn greeting(&mut self) -> Result<(), Fault> {
        loop {
            let seen = self.buffer.get(..self.buffer.len().min(GREETING_BYTES));
            zmtp::check_greeting(seen.unwrap_or_default())?;
            if self.buffer.len() >= GREETING_BYTES {
                self.buffer.advance(GREETING_BYTES);
                return Ok(());
            }
            self.fill().await?;
        }
    }

    async fn ready(&mut self, own: SocketType) -> Result<(), Fault> {
        loop {
            if let Some((header, length)) = zmtp::frame_header(&self.buffer)? {
                if !header.command {
                    return Err(ZmtpError::Handshake("its first frame is not a command").into());
                }
                let end = length + zmtp::check_command(header.bytes)?;
                if let Some(body) = self.buffer.get(length..end) {
                    zmtp::check_ready(body, own)?;
                    self.buffer.advance(end);
                    return Ok(());
                }
            }
            self.fill().await?;
        }
    }

    /// Waits for the next message, reads its body, and answers commands in between. Returns the body and its budget share.
    pub(super) async fn message(
        &mut self,
        budget: &Budget,
        connection: u64,
        closer: &Arc<Closer>,
        outbox: &Outbox,
    ) -> Result<(Vec<u8>, Receiving), Fault> {
        let limits = Arc::clone(&self.limits);
        let mut parts = 0;
        let mut begun: Option<Clock> = None;
        loop {
            if self.buffer.is_empty() && begun.is_none() {
                self.fill().await?;
            }
            let clock = begun.get_or_insert_with(|| Clock::new(&limits));
            let (header, length) = loop {
                match zmtp::frame_header(&self.buffer)? {
                    Some(found) => break found,
                    None => self.fill_in_time(clock, zmtp::MAX_HEADER_BYTES).await?,
                }
            };
            let wait = self.messages.take(1, Instant::now()).max(outbox.rest_left());
            clock.pause(rest(wait).await);
            if header.command {
                let end = length + zmtp::check_command(header.bytes)?;
                while self.buffer.len() < end {
                    self.fill_in_time(clock, end).await?;
                }
                if let Some(pong) = self.buffer.get(length..end).and_then(zmtp::pong) {
                    outbox.send_raw(pong)?;
                }
                self.buffer.advance(end);
                if parts == 0 {
                    begun = None;
                }
                continue;
            }
            parts += 1;
            if header.more {
                if parts == MAX_PARTS {
                    return Err(ZmtpError::Parts(MAX_PARTS).into());
                }
                if header.bytes != 0 {
                    return Err(ZmtpError::Delimiter(header.bytes).into());
                }
                self.buffer.advance(length);
                outbox.delimit();
                continue;
            }
            let size = usize::try_from(header.bytes)
                .ok()
                .filter(|size| *size <= limits.message_bytes)
                .ok_or(ZmtpError::Long {
                    found: header.bytes,
                    most: limits.message_bytes,
                })?;
            self.buffer.advance(length);
            let mut receiving = budget.begin(size > LARGE_BYTES, connection, closer);
            let body = self.body(size, clock, &mut receiving).await?;
            return Ok((body, receiving));
        }
    }

    async fn fill_in_time(&mut self, clock: &Clock, expected: usize) -> Result<(), Fault> {
        let received = self.buffer.len();
        timeout(clock.left(0), self.fill())
            .await
            .unwrap_or(Err(Fault::Late { received, expected }))
    }

    /// Reads a body of `size` bytes; touched memory grows with the bytes that arrive, not with the announced size.
    async fn body(&mut self, size: usize, clock: &mut Clock, receiving: &mut Receiving) -> Result<Vec<u8>, Fault> {
        let large = size > LARGE_BYTES;
        let mut whole = Body::default();
        let body = &mut whole.0;
        while body.len() < size {
            let step = (size - body.len()).min(body.len().clamp(FIRST_STEP_BYTES, STEP_BYTES));
            clock.pause(receiving.grow(step).await);
            if body.capacity() < body.len() + step {
                let wanted = if body.len() < PROVEN_BYTES {
                    PROVEN_BYTES.min(size)
                } else {
                    size
                };
                body.try_reserve_exact(wanted - body.len()).map_err(Fault::Memory)?;
            }
            let (begin, end) = (body.len(), body.len() + step);
            let ahead = self.buffer.len().min(step);
            body.extend_from_slice(self.buffer.get(..ahead).unwrap_or_default());
            self.buffer.advance(ahead);
            while body.len() < end {
                let received = body.len();
                let left = clock.left(step);
                let late = |_late| Fault::Late {
                    received,
                    expected: size,
                };
                let mut room = (&mut *body).limit(end - received);
                if large {
                    timeout(left, self.stream.readable())
                        .await
                        .map_err(late)?
                        .map_err(Fault::Io)?;
                    let waited = Instant::now();
                    receiving.waits(true);
                    // the semaphore is never closed
                    let turn = self.traffic.reading.acquire().await;
                    receiving.waits(false);
                    clock.pause(waited.elapsed());
                    match self.stream.try_read_buf(&mut room) {
                        Ok(0) => return Err(Fault::Left),
                        Ok(_count) => {}
                        Err(error) if error.kind() == io::ErrorKind::WouldBlock => continue,
                        Err(error) => return Err(Fault::Io(error)),
                    }
                    drop(turn);
                } else {
                    timeout(left, read(&self.stream, &mut room)).await.map_err(late)??;
                }
                receiving.arrived(body.len() - received);
            }
            // the pace counts bytes that arrived, not bytes that were announced
            let now = Instant::now();
            let mut wait = self.bytes.take(body.len() - begin, now);
            if large {
                wait = wait.max(self.traffic.take_large(body.len() - begin, now));
            }
            if wait >= LEAST_WAIT {
                receiving.waits(true);
                rest(wait).await;
                receiving.waits(false);
            }
            clock.restart();
        }
        Ok(std::mem::take(&mut whole.0))
    }
}
