//! A hand-written ZMTP 3 client on a plain TCP stream, which can also send what no library sends.

use std::{
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    time::{Duration, Instant},
};

use super::{pause, tally::RETRY};

/// Flag of a ZMTP frame that another frame of the message follows.
pub const MORE: u8 = 1;
/// Flag of a ZMTP frame whose length has 8 bytes.
pub const LONG: u8 = 2;
/// Flag of a ZMTP command.
pub const COMMAND: u8 = 4;
/// Longest wait in one system call, so that every loop sees its deadline.
pub(super) const SLICE: Duration = Duration::from_millis(200);

/// Returns the socket address of `tcp://HOST:PORT` or `HOST:PORT`.
///
/// # Errors
/// The text is not an address.
pub fn address(endpoint: &str) -> io::Result<SocketAddr> {
    let text = endpoint.strip_prefix("tcp://").unwrap_or(endpoint);
    text.to_socket_addrs()?
        .next()
        .ok_or_else(|| io::Error::new(ErrorKind::NotFound, format!("failed to resolve `{endpoint}`")))
}

/// Opens a TCP connection without delay of small segments. Waits if this host has no free local port.
///
/// # Errors
/// The connection is refused or late.
pub fn open(endpoint: &str, patience: Duration) -> io::Result<TcpStream> {
    let to = address(endpoint)?;
    let end = Instant::now() + patience;
    loop {
        let left = end
            .saturating_duration_since(Instant::now())
            .max(Duration::from_millis(1));
        match TcpStream::connect_timeout(&to, left) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                stream.set_write_timeout(Some(SLICE))?;
                return Ok(stream);
            }
            // ports in TIME_WAIT are this host's limit, not the attacked process's
            Err(error) if error.kind() == ErrorKind::AddrNotAvailable && Instant::now() < end => pause(RETRY),
            Err(error) => return Err(error),
        }
    }
}

/// Returns the 64 bytes of a ZMTP 3.`minor` greeting with the NULL mechanism.
pub fn greeting(minor: u8) -> Vec<u8> {
    let mut bytes = vec![0u8; 64];
    bytes[0] = 0xff;
    bytes[9] = 0x7f;
    bytes[10] = 3;
    bytes[11] = minor;
    bytes[12..16].copy_from_slice(b"NULL");
    bytes
}

/// Returns the READY command of a DEALER.
pub fn ready() -> Vec<u8> {
    ready_with(&[("Socket-Type", b"DEALER")])
}

/// Returns a READY command with these properties.
pub fn ready_with(properties: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = b"\x05READY".to_vec();
    for (name, value) in properties {
        body.push(name.len() as u8);
        body.extend_from_slice(name.as_bytes());
        body.extend_from_slice(&(value.len() as u32).to_be_bytes());
        body.extend_from_slice(value);
    }
    frame(COMMAND, &body)
}

/// Returns the PING command with a time to live in tenths of a second.
pub fn ping(ttl: u16, context: &[u8]) -> Vec<u8> {
    frame(COMMAND, &[b"\x04PING".as_slice(), &ttl.to_be_bytes(), context].concat())
}

/// Returns a frame: a header with these flags (`LONG` is added if necessary), then the body.
pub fn frame(flags: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(body.len() + 9);
    match u8::try_from(body.len()) {
        Ok(short) => bytes.extend_from_slice(&[flags, short]),
        Err(_long) => bytes.extend_from_slice(&long_header(flags, body.len() as u64)),
    }
    bytes.extend_from_slice(body);
    bytes
}

/// Returns the header of a long frame that announces `length` bytes.
pub fn long_header(flags: u8, length: u64) -> Vec<u8> {
    let mut bytes = vec![flags | LONG];
    bytes.extend_from_slice(&length.to_be_bytes());
    bytes
}

/// Message or command of a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Heard {
    /// The last frame of a message.
    Message(Vec<u8>),
    /// A PING with its context, to be answered by [`pong`].
    Ping(Vec<u8>),
}

/// Returns the command that answers a PING.
pub fn pong(context: &[u8]) -> Vec<u8> {
    frame(COMMAND, &[b"\x04PONG", context].concat())
}

/// The reading half of a ZMTP connection. A wait that ends early loses no bytes.
pub struct Incoming {
    stream: TcpStream,
    bytes: Vec<u8>,
    start: usize,
    pub(super) received: u64,
}

impl Incoming {
    fn new(stream: TcpStream) -> Self {
        Self {
            stream,
            bytes: Vec::new(),
            start: 0,
            received: 0,
        }
    }

    fn fill(&mut self, end: Instant) -> io::Result<()> {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(ErrorKind::TimedOut.into());
        }
        if self.start > 0 && self.start * 2 >= self.bytes.len() {
            self.bytes.drain(..self.start);
            self.start = 0;
        }
        let old = self.bytes.len();
        self.bytes.resize(old + (64 << 10), 0);
        self.stream.set_read_timeout(Some(left))?;
        let read = self.stream.read(&mut self.bytes[old..]);
        self.bytes.truncate(old + *read.as_ref().unwrap_or(&0));
        match read {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                self.received += count as u64;
                Ok(())
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn exactly(&mut self, count: usize, end: Instant) -> io::Result<Vec<u8>> {
        while self.bytes.len() - self.start < count {
            self.fill(end)?;
        }
        let bytes = self.bytes[self.start..self.start + count].to_vec();
        self.start += count;
        Ok(bytes)
    }

    /// Returns flags and body of the next frame.
    fn frame(&mut self, end: Instant) -> io::Result<(u8, Vec<u8>)> {
        loop {
            let bytes = &self.bytes[self.start..];
            let header = match bytes {
                [flags, a, b, c, d, e, f, g, h, ..] if flags & LONG != 0 => {
                    Some((*flags, 9, u64::from_be_bytes([*a, *b, *c, *d, *e, *f, *g, *h]) as usize))
                }
                [flags, length, ..] if flags & LONG == 0 => Some((*flags, 2, usize::from(*length))),
                _ => None,
            };
            if let Some((flags, skip, length)) = header
                && bytes.len() - skip >= length
            {
                let body = bytes[skip..skip + length].to_vec();
                self.start += skip + length;
                return Ok((flags, body));
            }
            self.fill(end)?;
        }
    }

    /// Returns the next message or PING.
    ///
    /// # Errors
    /// The connection ends, or `patience` passes (`TimedOut`).
    pub fn next(&mut self, patience: Duration) -> io::Result<Heard> {
        let end = Instant::now() + patience;
        loop {
            let (flags, body) = self.frame(end)?;
            if flags & COMMAND != 0 {
                if let Some(rest) = body.strip_prefix(b"\x04PING") {
                    return Ok(Heard::Ping(rest.get(2..).unwrap_or_default().to_vec()));
                }
            } else if flags & MORE == 0 {
                return Ok(Heard::Message(body));
            }
        }
    }
}

/// A hand-written DEALER.
pub struct RawDealer {
    pub(super) stream: TcpStream,
    pub(super) incoming: Incoming,
}

impl RawDealer {
    /// Connects and performs the handshake of a well-behaved ZMTP 3.1 DEALER.
    ///
    /// # Errors
    /// The peer refuses, is late or speaks another protocol.
    pub fn connect(endpoint: &str, patience: Duration) -> io::Result<Self> {
        let end = Instant::now() + patience;
        let mut stream = open(endpoint, patience)?;
        stream.write_all(&greeting(1))?;
        let mut incoming = Incoming::new(stream.try_clone()?);
        let theirs = incoming.exactly(64, end)?;
        if (theirs[0], theirs[9], theirs[10]) != (0xff, 0x7f, 3) {
            return Err(io::Error::new(
                ErrorKind::InvalidData,
                format!(
                    "failed to read the greeting of {endpoint}: found {:02x?}",
                    &theirs[..12]
                ),
            ));
        }
        stream.write_all(&ready())?;
        loop {
            let (flags, body) = incoming.frame(end)?;
            if flags & COMMAND != 0 && body.starts_with(b"\x05READY") {
                return Ok(Self { stream, incoming });
            }
            if flags & COMMAND == 0 || body.starts_with(b"\x05ERROR") {
                return Err(io::Error::new(
                    ErrorKind::InvalidData,
                    format!(
                        "failed to shake hands with {endpoint}: found a frame of {} bytes, expected READY",
                        body.len()
                    ),
                ));
            }
        }
    }

    /// Sends a message of one frame.
    ///
    /// # Errors
    /// The connection ends, or the peer does not read for `patience`.
    pub fn send(&mut self, body: &[u8], patience: Duration) -> io::Result<()> {
        let pushed = push(&mut self.stream, &frame(0, body), Instant::now() + patience);
        match (pushed.whole, pushed.closed) {
            (true, _) => Ok(()),
            (false, true) => Err(ErrorKind::BrokenPipe.into()),
            (false, false) => Err(ErrorKind::TimedOut.into()),
        }
    }

    /// Returns the last frame of the next message; answers PINGs meanwhile.
    ///
    /// # Errors
    /// The connection ends, or `patience` passes (`TimedOut`).
    pub fn receive(&mut self, patience: Duration) -> io::Result<Vec<u8>> {
        let end = Instant::now() + patience;
        loop {
            match self.incoming.next(end.saturating_duration_since(Instant::now()))? {
                Heard::Message(body) => return Ok(body),
                Heard::Ping(context) => self.stream.write_all(&pong(&context))?,
            }
        }
    }

    /// Returns the halves: the stream to write to, and the reader.
    pub fn split(self) -> (TcpStream, Incoming) {
        (self.stream, self.incoming)
    }
}

/// Result of a write.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pushed {
    /// Written bytes.
    pub sent: u64,
    /// Whether all bytes were written.
    pub whole: bool,
    /// Whether the peer closed the connection.
    pub closed: bool,
}

/// Writes bytes until all are written, the peer closes, or the time is up.
pub fn push(stream: &mut TcpStream, bytes: &[u8], end: Instant) -> Pushed {
    let mut pushed = Pushed::default();
    let mut rest = bytes;
    while !rest.is_empty() {
        match stream.write(rest) {
            Ok(count) => {
                pushed.sent += count as u64;
                rest = &rest[count..];
            }
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) =>
            {
                if Instant::now() >= end {
                    return pushed;
                }
            }
            Err(_closed) => {
                pushed.closed = true;
                return pushed;
            }
        }
    }
    pushed.whole = true;
    pushed
}

/// Waits until the peer closes the connection or the time is up; reads and drops all bytes. Returns whether the peer closed the connection,
/// and the number of bytes.
pub fn closed_by_peer(stream: &mut TcpStream, end: Instant) -> (bool, u64) {
    let mut scratch = vec![0; 64 << 10];
    let mut received = 0;
    loop {
        let left = end.saturating_duration_since(Instant::now()).min(SLICE);
        if left.is_zero() {
            return (false, received);
        }
        if stream.set_read_timeout(Some(left)).is_err() {
            return (true, received);
        }
        match stream.read(&mut scratch) {
            Ok(0) => return (true, received),
            Ok(count) => received += count as u64,
            Err(error)
                if matches!(
                    error.kind(),
                    ErrorKind::WouldBlock | ErrorKind::TimedOut | ErrorKind::Interrupted
                ) => {}
            Err(_reset) => return (true, received),
        }
    }
}
