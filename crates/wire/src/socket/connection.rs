//! One connection: handshake, and messages read under the limits of the endpoint.

use std::{
    io,
    sync::Arc,
    time::{Duration, Instant},
};

use bytes::{Buf, BytesMut};
use rustix::net::sockopt;
use tokio::{
    io::AsyncReadExt,
    net::{TcpStream, tcp::OwnedReadHalf},
    time::timeout,
};

use super::{
    budget::Receiving,
    closer::Closed,
    outbox::{Outbox, Queued, Unsent},
};
use crate::{
    limits::{Limits, MAX_PARTS, READ_AHEAD_BYTES},
    zmtp::{self, GREETING_BYTES, SocketType, ZmtpError},
};

/// Bytes that are reserved, and made room for, at a time.
const STEP_BYTES: usize = 1 << 20;
/// Keep-alive: a host that vanished is found after 15 s + 4 x 5 s, by the system itself, however busy the peer's process is.
const KEEPALIVE_IDLE: Duration = Duration::from_secs(15);
const KEEPALIVE_INTERVAL: Duration = Duration::from_secs(5);
const KEEPALIVE_PROBES: u32 = 4;

/// Why a connection cannot go on.
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
    #[error("it does not take what is sent to it")]
    Slow,
}

impl Fault {
    pub(super) fn reason(&self) -> Closed {
        match self {
            Self::Left | Self::Io(_) => Closed::Left,
            Self::Zmtp(_) => Closed::Protocol,
            Self::Late { .. } => Closed::Late,
            Self::Handshake(_) => Closed::Handshake,
            Self::Slow => Closed::Slow,
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

fn prepare(stream: &TcpStream) -> io::Result<()> {
    stream.set_nodelay(true)?;
    sockopt::set_socket_keepalive(stream, true)?;
    sockopt::set_tcp_keepidle(stream, KEEPALIVE_IDLE)?;
    sockopt::set_tcp_keepintvl(stream, KEEPALIVE_INTERVAL)?;
    sockopt::set_tcp_keepcnt(stream, KEEPALIVE_PROBES)?;
    Ok(())
}

/// Opens a connection: greeting and READY both ways, within the time for it.
pub(super) async fn open(
    stream: TcpStream,
    own: SocketType,
    limits: &Arc<Limits>,
    all: &Arc<Queued>,
) -> Result<(Reader, Arc<Outbox>), Fault> {
    prepare(&stream).map_err(Fault::Io)?;
    let (read, write) = stream.into_split();
    let outbox = Outbox::new(write, Arc::clone(limits), Arc::clone(all));
    let mut reader = Reader {
        half: read,
        buffer: BytesMut::with_capacity(READ_AHEAD_BYTES),
        limits: Arc::clone(limits),
        bucket: Bucket::new(limits.messages_per_second),
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

/// Spreads a peer's messages over time.
#[derive(Debug)]
struct Bucket {
    per_second: u32,
    tokens: u32,
    since: Instant,
}

impl Bucket {
    fn new(per_second: u32) -> Self {
        Self {
            per_second,
            tokens: per_second,
            since: Instant::now(),
        }
    }

    async fn take(&mut self) {
        while self.tokens == 0 {
            let elapsed = self.since.elapsed();
            let earned = elapsed.as_secs_f64() * f64::from(self.per_second);
            self.tokens = (earned as u32).min(self.per_second);
            if self.tokens == 0 {
                // the timer's resolution; a busy peer then has a few tokens at once
                tokio::time::sleep(Duration::from_millis(1)).await;
            } else {
                self.since = Instant::now();
            }
        }
        self.tokens -= 1;
    }
}

/// Reads a message's bytes against the clock.
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

    /// Time until the next byte must be here.
    fn left(&self, received: usize) -> Duration {
        let earned = Duration::from_secs_f64(received as f64 / self.bytes_per_second as f64);
        (self.begun + self.grace + earned).saturating_duration_since(Instant::now())
    }

    /// Time that this side took does not count.
    fn pause(&mut self, time: Duration) {
        self.begun += time;
    }
}

/// The reading half.
#[derive(Debug)]
pub(super) struct Reader {
    half: OwnedReadHalf,
    buffer: BytesMut,
    limits: Arc<Limits>,
    bucket: Bucket,
}

impl Reader {
    /// Reads ahead; the end of the stream is a fault.
    async fn fill(&mut self) -> Result<(), Fault> {
        if self.buffer.capacity() - self.buffer.len() < zmtp::MAX_HEADER_BYTES {
            self.buffer.reserve(READ_AHEAD_BYTES);
        }
        match self.half.read_buf(&mut self.buffer).await {
            Ok(0) => Err(Fault::Left),
            Ok(_count) => Ok(()),
            Err(error) => Err(Fault::Io(error)),
        }
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

    /// Waits for the next message and reads it; commands in between are answered. The message holds what it takes of the
    /// budget through `receiving`.
    pub(super) async fn message(&mut self, receiving: &mut Receiving, outbox: &Outbox) -> Result<Vec<u8>, Fault> {
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
            let paused = Instant::now();
            self.bucket.take().await;
            clock.pause(paused.elapsed());
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
            return self.body(size, clock, receiving).await;
        }
    }

    async fn fill_in_time(&mut self, clock: &Clock, expected: usize) -> Result<(), Fault> {
        let received = self.buffer.len();
        timeout(clock.left(0), self.fill())
            .await
            .unwrap_or(Err(Fault::Late { received, expected }))
    }

    /// Reads a body of `size` bytes; memory grows with what arrives, not with what is announced.
    async fn body(&mut self, size: usize, clock: &mut Clock, receiving: &mut Receiving) -> Result<Vec<u8>, Fault> {
        let mut body = Vec::new();
        while body.len() < size {
            let step = (size - body.len()).min(STEP_BYTES);
            clock.pause(receiving.grow(step).await);
            if body.capacity() < body.len() + step {
                // doubling copies every byte once on average; the last step is exact
                let wanted = (2 * body.capacity()).clamp(body.len() + step, size);
                body.reserve_exact(wanted - body.len());
            }
            let end = body.len() + step;
            let ahead = self.buffer.len().min(step);
            body.extend_from_slice(self.buffer.get(..ahead).unwrap_or_default());
            self.buffer.advance(ahead);
            while body.len() < end {
                let received = body.len();
                let mut rest = (&mut self.half).take((end - received) as u64);
                let read = timeout(clock.left(received), rest.read_buf(&mut body)).await;
                match read {
                    Ok(Ok(0)) => return Err(Fault::Left),
                    Ok(Ok(_count)) => receiving.moved(),
                    Ok(Err(error)) => return Err(Fault::Io(error)),
                    Err(_late) => return Err(Fault::Late { received, expected: size }),
                }
            }
        }
        Ok(body)
    }
}
