//! Hostile peers of an engine or a learner, on plain TCP streams and a hand-written ZMTP 3 client.
//!
//! Every attack takes its size as parameters, so that the same code runs for a second in a test and for minutes in the soak. An attack never
//! panics on what the network does: a [`Tally`] says how the attacked process answered.

use std::{
    collections::VecDeque,
    fmt,
    io::{self, ErrorKind, Read, Write},
    net::{SocketAddr, TcpStream, ToSocketAddrs},
    ops::AddAssign,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use policy::{
    noise::{Purpose, below, stream},
    plan::RunPlan,
};
use wire::{
    codec::{WIRE_VERSION, decode, encode},
    messages::{ActRequest, EngineState, Fetch, FromEngine, FromLearner, Hello, Mode, ToEngine, ToLearner},
};

use crate::ring::row;

/// Flag of a ZMTP frame that another frame of the message follows.
pub const MORE: u8 = 1;
/// Flag of a ZMTP frame whose length has 8 bytes.
pub const LONG: u8 = 2;
/// Flag of a ZMTP command.
pub const COMMAND: u8 = 4;
/// Longest wait in one system call, so that every loop sees its deadline.
const SLICE: Duration = Duration::from_millis(200);
/// Pause before a refused connection is tried again.
const RETRY: Duration = Duration::from_millis(50);
/// Bytes in one write of a flood.
const BLOCK: usize = 192 << 10;

/// Waits; attackers pace themselves by the clock.
#[expect(
    clippy::disallowed_methods,
    reason = "a slow attacker is slow by the clock, there is no event to wait for"
)]
pub fn pause(duration: Duration) {
    thread::sleep(duration);
}

/// Counts of an attack.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Connections opened, with what the attack needs of greeting and handshake.
    pub opened: u64,
    /// Connections that were refused, cut or late before the attack began on them.
    pub unopened: u64,
    /// Connections that the attacked process closed.
    pub closed: u64,
    /// Bytes sent.
    pub sent: u64,
    /// Bytes received.
    pub received: u64,
    /// Requests answered.
    pub answered: u64,
    /// Requests refused by a message.
    pub refused: u64,
    /// Requests with neither answer nor refusal.
    pub failed: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.opened += other.opened;
        self.unopened += other.unopened;
        self.closed += other.closed;
        self.sent += other.sent;
        self.received += other.received;
        self.answered += other.answered;
        self.refused += other.refused;
        self.failed += other.failed;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "opened {}, unopened {}, closed by the peer {}, sent {:.1} MB, received {:.1} MB, answered {}, refused {}, failed {}",
            self.opened,
            self.unopened,
            self.closed,
            self.sent as f64 / 1e6,
            self.received as f64 / 1e6,
            self.answered,
            self.refused,
            self.failed
        )
    }
}

/// Runs `attackers` copies of an attack in threads and adds up their counts.
pub fn crowd(attackers: usize, attack: impl Fn(usize) -> Tally + Sync) -> Tally {
    let mut sum = Tally::default();
    thread::scope(|scope| {
        let attack = &attack;
        let running: Vec<_> = (0..attackers).map(|i| scope.spawn(move || attack(i))).collect();
        for thread in running {
            sum += thread.join().expect("an attacker ends without a panic");
        }
    });
    sum
}

/// Repeats an attack until `duration` has passed; an attack without a connection is followed by a short pause.
pub fn repeat(duration: Duration, mut attack: impl FnMut(Duration) -> Tally) -> Tally {
    let end = Instant::now() + duration;
    let mut sum = Tally::default();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return sum;
        }
        let one = attack(left);
        sum += one;
        if one.opened == 0 {
            pause(RETRY.min(left));
        }
    }
}

// ---- ZMTP by hand

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

/// Opens a TCP connection without delay of small segments. Waits when this machine is out of local ports.
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
            // ports in TIME_WAIT are this machine's limit, not the attacked process's
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

/// Returns a frame: header with these flags (`LONG` is added when needed), then the body.
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

/// What a peer sent.
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

/// The reading half of a ZMTP connection. A wait that ends early loses nothing.
pub struct Incoming {
    stream: TcpStream,
    bytes: Vec<u8>,
    start: usize,
    received: u64,
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

/// A DEALER written by hand.
pub struct RawDealer {
    stream: TcpStream,
    incoming: Incoming,
}

impl RawDealer {
    /// Connects and shakes hands as a well-behaved ZMTP 3.1 DEALER.
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

/// What a write brought.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Pushed {
    /// Bytes written.
    pub sent: u64,
    /// All bytes were written.
    pub whole: bool,
    /// The peer closed the connection.
    pub closed: bool,
}

/// Writes bytes until they are out, the peer closes, or the time is up.
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

/// Waits until the peer closes the connection or the time is up; reads and drops what comes. Returns whether the peer closed it, and the
/// bytes that came.
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

// ---- frames

/// Returns an encoded request of `rows` equal rows.
pub fn act_frame(plan: &RunPlan, request: u64, rows: usize, record: bool) -> Vec<u8> {
    let mut one = row(plan, 1, Mode::Eval);
    one.record = record;
    let rows = vec![one; rows];
    encode(&ToEngine::Act(ActRequest { request, rows })).expect("a request that can be encoded")
}

/// Returns an encoded hello.
pub fn hello_frame(client: &str, env: &str, action_dim: u32, slots: u32) -> Vec<u8> {
    let hello = Hello {
        client: client.to_owned(),
        env: env.to_owned(),
        action_dim,
        slots,
    };
    encode(&ToEngine::Hello(hello)).expect("a hello that can be encoded")
}

/// Returns a frame with a right header around any payload.
pub fn enveloped(payload: &[u8]) -> Vec<u8> {
    let mut bytes = b"PIRL".to_vec();
    bytes.extend_from_slice(&WIRE_VERSION.to_le_bytes());
    bytes.extend_from_slice(&[0, 0]);
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// `MessagePack`: a text.
fn text(out: &mut Vec<u8>, value: &str) {
    out.push(0xdb);
    out.extend_from_slice(&(value.len() as u32).to_be_bytes());
    out.extend_from_slice(value.as_bytes());
}

/// `MessagePack`: an array of nils.
fn nil_array(out: &mut Vec<u8>, count: usize) {
    out.push(0xdd);
    out.extend_from_slice(&(count as u32).to_be_bytes());
    out.resize(out.len() + count, 0xc0);
}

/// Where the nils of [`nil_frame`] stand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Nils {
    /// In place of reports.
    Reports,
    /// In place of the images of one report.
    ReportImages,
    /// In place of the rows of a request.
    Rows,
    /// In place of the images of one row of a request.
    RowImages,
}

/// Returns a frame with `count` nils, one byte each, in place of elements that are large in memory.
pub fn nil_frame(nils: Nils, count: usize) -> Vec<u8> {
    let mut out = vec![0x81];
    let observation = |out: &mut Vec<u8>| {
        text(out, "observation");
        out.push(0x83);
        text(out, "images");
        nil_array(out, count);
        text(out, "state");
        out.push(0x90);
        text(out, "prompt");
        text(out, "pick red");
    };
    match nils {
        Nils::Reports => {
            text(&mut out, "reports");
            nil_array(&mut out, count);
        }
        Nils::ReportImages => {
            text(&mut out, "reports");
            out.extend_from_slice(&[0x91, 0x83]);
            text(&mut out, "slot");
            out.push(0);
            text(&mut out, "outcome");
            out.push(0xc0);
            observation(&mut out);
        }
        Nils::Rows | Nils::RowImages => {
            text(&mut out, "act");
            out.push(0x82);
            text(&mut out, "request");
            out.push(1);
            text(&mut out, "rows");
            if nils == Nils::Rows {
                nil_array(&mut out, count);
            } else {
                out.extend_from_slice(&[0x91, 0x85]);
                observation(&mut out);
                text(&mut out, "key");
                out.push(0x84);
                for name in ["seed", "env", "episode", "chunk"] {
                    text(&mut out, name);
                    out.push(0);
                }
                text(&mut out, "mode");
                text(&mut out, "eval");
                text(&mut out, "record");
                out.push(0xc2);
                text(&mut out, "guidance");
                out.push(0xc0);
            }
        }
    }
    enveloped(&out)
}

/// Returns a frame whose message has an unknown name of `bytes` bytes.
pub fn unknown_variant_frame(bytes: usize) -> Vec<u8> {
    let mut out = vec![0x81];
    text(&mut out, &"x".repeat(bytes));
    out.push(0xc0);
    enveloped(&out)
}

/// Returns names that forge log lines, drive a terminal, or are long.
pub fn forged_names() -> Vec<String> {
    vec![
        "robot\n2026-01-01T00:00:00.000000Z  INFO FORGED policy version 999 is live".to_owned(),
        "robot\r\nFORGED second line\r\n\r\n".to_owned(),
        "\u{1b}[2J\u{1b}[31mFORGED red\u{1b}]0;title\u{7}".to_owned(),
        "robot\u{202e}DEGROF\u{0}\u{8}\u{8}\u{7f}\u{85}\u{2028}".to_owned(),
        "FORGED".repeat((1 << 20) / 6),
        String::new(),
    ]
}

// ---- attacks

/// Bounds of a churn.
#[derive(Debug, Clone, Copy)]
pub struct Churn {
    /// Connections of this client.
    pub connections: u64,
    /// Longest time of the whole attack.
    pub duration: Duration,
    /// Longest wait for a handshake and for an answer.
    pub patience: Duration,
}

/// Connects, shakes hands, sends one frame, reads one answer and closes, again and again. `progress` sees the counts after each connection.
/// With a valid request this is a well-behaved client: `answered` is the number served.
pub fn churn(endpoint: &str, body: &[u8], bounds: Churn, mut progress: impl FnMut(&Tally)) -> Tally {
    let end = Instant::now() + bounds.duration;
    let mut tally = Tally::default();
    while tally.opened + tally.unopened < bounds.connections && Instant::now() < end {
        match RawDealer::connect(endpoint, bounds.patience) {
            Err(_error) => tally.unopened += 1,
            Ok(mut dealer) => {
                tally.opened += 1;
                let answer = dealer
                    .send(body, bounds.patience)
                    .and_then(|()| dealer.receive(bounds.patience));
                match answer.map(|answer| decode::<FromEngine>(&answer)) {
                    Ok(Ok(FromEngine::Refused(_))) => tally.refused += 1,
                    Ok(Ok(_)) => tally.answered += 1,
                    Ok(Err(_)) => tally.failed += 1,
                    Err(error) => {
                        tally.failed += 1;
                        tally.closed += u64::from(error.kind() != ErrorKind::TimedOut);
                    }
                }
                tally.sent += body.len() as u64;
                tally.received += dealer.incoming.received;
            }
        }
        progress(&tally);
    }
    tally
}

/// Where in a connection a length bomb stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// A command in place of READY.
    CommandForReady,
    /// A message in place of READY.
    MessageForReady,
    /// A message after the handshake.
    Message,
    /// A message with more parts to come, after the handshake.
    FirstPart,
    /// A command after the handshake.
    Command,
}

/// All places of a length bomb.
pub const PLACES: [Place; 5] = [
    Place::CommandForReady,
    Place::MessageForReady,
    Place::Message,
    Place::FirstPart,
    Place::Command,
];
/// Lengths that no memory holds, or only a large one.
pub const BOMBS: [u64; 5] = [1 << 62, u64::MAX, 1 << 63, 1 << 40, 5 << 30];

/// Announces a frame of `length` bytes, sends 100 of them and waits up to `patience` for the peer to close.
pub fn length_bomb(endpoint: &str, length: u64, place: Place, patience: Duration) -> Tally {
    let mut tally = Tally::default();
    let stream = match place {
        Place::CommandForReady | Place::MessageForReady => open(endpoint, patience).and_then(|mut stream| {
            stream.write_all(&greeting(0))?;
            Ok(stream)
        }),
        Place::Message | Place::FirstPart | Place::Command => {
            RawDealer::connect(endpoint, patience).map(|dealer| dealer.split().0)
        }
    };
    let Ok(mut stream) = stream else {
        tally.unopened += 1;
        return tally;
    };
    tally.opened += 1;
    let flags = match place {
        Place::CommandForReady | Place::Command => COMMAND,
        Place::MessageForReady | Place::Message => 0,
        Place::FirstPart => MORE,
    };
    let mut bytes = long_header(flags, length);
    bytes.resize(bytes.len() + 100, b'x');
    let end = Instant::now() + patience;
    let pushed = push(&mut stream, &bytes, end);
    tally.sent += pushed.sent;
    let (closed, received) = closed_by_peer(&mut stream, end);
    tally.received += received;
    tally.closed += u64::from(closed || pushed.closed);
    tally
}

/// Opens `connections` connections one after the other; sends each 1 to `longest` random bytes, after a greeting on every other, and closes.
pub fn random_bytes(endpoint: &str, connections: u64, longest: usize, seed: u64, duration: Duration) -> Tally {
    let end = Instant::now() + duration;
    let mut rng = stream(Purpose::Reset, seed, 7, 0, 0);
    let mut tally = Tally::default();
    for number in 0..connections {
        if Instant::now() >= end {
            break;
        }
        let mut bytes = if number % 2 == 0 {
            greeting((number % 4 / 2) as u8)
        } else {
            Vec::new()
        };
        let count = 1 + below(&mut rng, longest);
        bytes.extend((0..count).map(|_| below(&mut rng, 256) as u8));
        let Ok(mut stream) = open(endpoint, Duration::from_secs(1)) else {
            tally.unopened += 1;
            pause(RETRY);
            continue;
        };
        tally.opened += 1;
        let pushed = push(&mut stream, &bytes, Instant::now() + SLICE);
        tally.sent += pushed.sent;
        // what the peer answers must have a moment to arrive, else a fast close hides the bytes from it
        let (closed, received) = closed_by_peer(&mut stream, Instant::now() + Duration::from_millis(2));
        tally.received += received;
        tally.closed += u64::from(closed || pushed.closed);
    }
    tally
}

/// Returns openings of a connection that break ZMTP or ask for what an engine does not offer.
pub fn bad_openings() -> Vec<Vec<u8>> {
    let greeted = |rest: Vec<u8>| [greeting(1), rest].concat();
    let mut mechanism = greeting(1);
    mechanism[12..17].copy_from_slice(b"CURVE");
    let mut server = greeting(1);
    server[32] = 1;
    let mut older = greeting(0);
    older[10] = 2;
    let mut later = greeting(9);
    later[10] = 200;
    let long = vec![b'i'; 300];
    let huge = vec![b'i'; 1 << 20];
    let dealer = ("Socket-Type", b"DEALER".as_slice());
    // a property that announces more than its command holds
    let mut cut = b"\x05READY\x0bSocket-Type".to_vec();
    cut.extend_from_slice(&u32::MAX.to_be_bytes());
    cut.extend_from_slice(b"DEALER");
    // many properties without a name
    let mut empty = b"\x05READY".to_vec();
    empty.resize(1 << 20, 0);
    vec![
        [mechanism, ready()].concat(),
        [server, ready()].concat(),
        [older, ready()].concat(),
        [later, ready()].concat(),
        greeted(ready_with(&[])),
        greeted(ready_with(&[("Socket-Type", b"PUB")])),
        greeted(ready_with(&[("Socket-Type", b"\xff\xfe\x00")])),
        greeted(ready_with(&[dealer, ("Identity", b"")])),
        greeted(ready_with(&[dealer, ("Identity", b"same")])),
        greeted(ready_with(&[dealer, ("Identity", b"same"), ("Identity", b"other")])),
        greeted(ready_with(&[dealer, ("Identity", b"\x00\x00\x00\x00\x01")])),
        greeted(ready_with(&[dealer, ("Identity", &long)])),
        greeted(ready_with(&[dealer, ("Identity", &huge)])),
        greeted(frame(COMMAND, &cut)),
        greeted(frame(COMMAND, &empty)),
        greeted(frame(COMMAND, b"")),
        greeted(frame(COMMAND, b"\xffREADY")),
        greeted(frame(COMMAND, b"\x05ERROR\x04oops")),
        greeted([ready(), ready()].concat()),
        greeted(
            [
                ready(),
                frame(COMMAND, b""),
                frame(COMMAND, b"\x04PING"),
                frame(COMMAND, b"\x04PONG"),
            ]
            .concat(),
        ),
        greeted([ready(), ping(u16::MAX, &[b'c'; 1000]), ping(1, b"")].concat()),
        greeted([ready(), frame(COMMAND | MORE, b"\x04PING\0\0"), frame(0xf8, b"x")].concat()),
        greeted(
            [
                ready(),
                frame(MORE, b""),
                frame(COMMAND, b"\x04PING\0\0"),
                frame(0, b""),
            ]
            .concat(),
        ),
        b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".to_vec(),
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03".to_vec(),
    ]
}

/// Opens connections with each of the [`bad_openings`], sends a frame after them, and holds the last 50 connections, until `duration` has
/// passed.
pub fn bad_handshakes(endpoint: &str, body: &[u8], duration: Duration) -> Tally {
    let all = bad_openings();
    let mut next = all.iter().cycle();
    let mut held = VecDeque::new();
    let message = frame(0, body);
    repeat(duration, |_left| {
        let mut tally = Tally::default();
        let (Some(opening), Ok(mut stream)) = (next.next(), open(endpoint, Duration::from_secs(1))) else {
            tally.unopened += 1;
            return tally;
        };
        tally.opened += 1;
        for bytes in [opening, &message] {
            let pushed = push(&mut stream, bytes, Instant::now() + SLICE);
            tally.sent += pushed.sent;
            let (closed, received) = closed_by_peer(&mut stream, Instant::now() + Duration::from_millis(2));
            tally.received += received;
            if pushed.closed || closed {
                tally.closed += 1;
                return tally;
            }
        }
        held.push_back(stream);
        if held.len() > 50 {
            held.pop_front();
        }
        tally
    })
}

/// How a flood treats answers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answers {
    /// Never read.
    Unread,
    /// Read and dropped.
    Read,
}

/// Sends `count` copies of a frame (with header) on one connection as fast as the peer takes them, then holds the connection. Ends when the
/// peer closes it or `hold` has passed.
pub fn flood(endpoint: &str, one: &[u8], count: u64, answers: Answers, hold: Duration) -> Tally {
    let end = Instant::now() + hold;
    let mut tally = Tally::default();
    let Ok(dealer) = RawDealer::connect(endpoint, hold) else {
        tally.unopened += 1;
        return tally;
    };
    tally.opened += 1;
    let (mut stream, _) = dealer.split();
    let reader = match answers {
        Answers::Unread => None,
        Answers::Read => stream
            .try_clone()
            .ok()
            .map(|mut clone| thread::spawn(move || closed_by_peer(&mut clone, end))),
    };
    let together = (BLOCK / one.len()).max(1) as u64;
    let block = one.repeat(together as usize);
    let mut left = count;
    let mut closed = false;
    while left > 0 && !closed && Instant::now() < end {
        let now = left.min(together);
        let pushed = push(&mut stream, &block[..one.len() * now as usize], end);
        tally.sent += pushed.sent;
        closed = pushed.closed;
        left -= now;
    }
    if let Some(reader) = reader {
        let (ended, received) = reader.join().expect("a reader that does not panic");
        tally.received += received;
        closed |= ended;
    } else if !closed {
        closed = closed_unread(&mut stream, one, end);
    }
    tally.closed += u64::from(closed);
    tally
}

/// Waits until the peer resets the connection or the time is up, and reads nothing: the peer's bytes stay where they are. A close without a
/// reset cannot be seen without reading, so a byte of the next frame is sent now and then, which a closed connection answers with a reset.
fn closed_unread(stream: &mut TcpStream, one: &[u8], end: Instant) -> bool {
    let mut bytes = one.iter().cycle();
    while Instant::now() < end {
        pause(SLICE.min(end.saturating_duration_since(Instant::now())));
        let byte = bytes.next().copied().unwrap_or_default();
        if !matches!(stream.take_error(), Ok(None)) || push(stream, &[byte], Instant::now()).closed {
            return true;
        }
    }
    false
}

/// Sends `bytes` bytes of one message of parts of `part_bytes` bytes that does not end, then holds the connection.
pub fn endless_parts(endpoint: &str, part_bytes: u8, bytes: u64, hold: Duration) -> Tally {
    let one = frame(MORE, &vec![b'x'; usize::from(part_bytes)]);
    flood(endpoint, &one, bytes / one.len() as u64, Answers::Unread, hold)
}

/// How far an idle connection goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Not a byte is sent.
    Silent,
    /// The greeting is sent.
    Greeting,
    /// The handshake is complete.
    Ready,
    /// The greeting comes by one byte every half second.
    SlowGreeting,
    /// Half the head of an HTTP request is sent.
    HalfRequest,
}

/// Opens `connections` connections to a ZeroMQ or HTTP port and lets them be idle for `hold`; opens one anew for each that the peer closes.
pub fn idle(endpoint: &str, connections: usize, stage: Stage, hold: Duration) -> Tally {
    let end = Instant::now() + hold;
    let wait = Duration::from_secs(1);
    let mut tally = Tally::default();
    let mut held: Vec<TcpStream> = Vec::with_capacity(connections);
    let begin = || -> io::Result<TcpStream> {
        let stream = match stage {
            Stage::Ready => RawDealer::connect(endpoint, wait)?.split().0,
            Stage::Silent | Stage::SlowGreeting => open(endpoint, wait)?,
            Stage::Greeting => {
                let mut stream = open(endpoint, wait)?;
                stream.write_all(&greeting(1))?;
                stream
            }
            Stage::HalfRequest => {
                let mut stream = open(endpoint, wait)?;
                stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: ")?;
                stream
            }
        };
        stream.set_nonblocking(true)?;
        Ok(stream)
    };
    let mut scratch = [0; 4096];
    let slow = greeting(1);
    let mut sweeps = 0;
    while Instant::now() < end {
        sweeps += 1;
        if stage == Stage::SlowGreeting && sweeps % 5 == 0 {
            // a connection that came later joins in the middle, which is as well: its greeting is late or wrong
            let byte = slow.get(sweeps / 5 % slow.len()).copied().unwrap_or_default();
            for stream in &mut held {
                tally.sent += stream.write(&[byte]).unwrap_or(0) as u64;
            }
        }
        held.retain_mut(|stream| match stream.read(&mut scratch) {
            Ok(0) => {
                tally.closed += 1;
                false
            }
            Ok(count) => {
                tally.received += count as u64;
                true
            }
            Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => true,
            Err(_reset) => {
                tally.closed += 1;
                false
            }
        });
        while held.len() < connections && Instant::now() < end {
            if let Ok(stream) = begin() {
                tally.opened += 1;
                held.push(stream);
            } else {
                tally.unopened += 1;
                break;
            }
        }
        pause(Duration::from_millis(100).min(end.saturating_duration_since(Instant::now())));
    }
    tally
}

/// Acts as an engine that asks for the announced bundle again and again and never reads a part. Ends when the learner closes the connection
/// or `duration` has passed.
pub fn fetch_unread(learner: &str, name: &str, duration: Duration) -> Tally {
    let end = Instant::now() + duration;
    let mut tally = Tally::default();
    let announced = RawDealer::connect(learner, duration).and_then(|mut dealer| {
        let state = ToLearner::State(EngineState {
            engine: name.to_owned(),
            version: None,
            order: None,
            slots: 0,
        });
        dealer.send(&encode(&state).expect("a state that can be encoded"), duration)?;
        loop {
            let body = dealer.receive(end.saturating_duration_since(Instant::now()))?;
            if let Ok(FromLearner::Announce(announce)) = decode(&body) {
                return Ok((dealer, announce));
            }
        }
    });
    let Ok((dealer, announce)) = announced else {
        tally.unopened += 1;
        return tally;
    };
    tally.opened += 1;
    let largest = announce.files.iter().max_by_key(|file| file.bytes);
    let file = largest.map(|file| file.name.clone()).unwrap_or_default();
    let fetch = ToLearner::Fetch(Fetch {
        version: announce.version,
        file,
        offset: 0,
    });
    let one = frame(0, &encode(&fetch).expect("a fetch that can be encoded"));
    let block = one.repeat(16);
    let (mut stream, _) = dealer.split();
    while Instant::now() < end {
        let pushed = push(&mut stream, &block, end);
        tally.sent += pushed.sent;
        if pushed.closed {
            tally.closed += 1;
            break;
        }
    }
    tally
}

/// Sends one body, waits up to `patience` for an answer or the end of the connection, and closes.
pub fn one_message(endpoint: &str, body: &[u8], patience: Duration) -> Tally {
    let once = Churn {
        connections: 1,
        duration: patience,
        patience,
    };
    churn(endpoint, body, once, |_| {})
}

/// Keeps `pending` requests in flight on one connection, reads every answer, and sends a refused request again after 1 ms.
pub fn in_flight(endpoint: &str, body: &[u8], pending: usize, duration: Duration) -> Tally {
    let end = Instant::now() + duration;
    let mut tally = Tally::default();
    let Ok(dealer) = RawDealer::connect(endpoint, duration) else {
        tally.unopened += 1;
        return tally;
    };
    tally.opened += 1;
    let (mut stream, mut incoming) = dealer.split();
    let (heard_sender, heard) = mpsc::channel();
    let reader = thread::spawn(move || {
        while let left = end.saturating_duration_since(Instant::now())
            && !left.is_zero()
        {
            match incoming.next(left) {
                Ok(next) => {
                    if heard_sender.send(next).is_err() {
                        break;
                    }
                }
                Err(error) => return (error.kind() != ErrorKind::TimedOut, incoming.received),
            }
        }
        (false, incoming.received)
    });
    let request = frame(0, body);
    let mut alive = true;
    for _ in 0..pending {
        let pushed = push(&mut stream, &request, end);
        tally.sent += pushed.sent;
        alive &= pushed.whole;
    }
    while alive && let Ok(next) = heard.recv_timeout(end.saturating_duration_since(Instant::now())) {
        let again = match next {
            Heard::Ping(context) => {
                alive = push(&mut stream, &pong(&context), end).whole;
                continue;
            }
            Heard::Message(body) => match decode::<FromEngine>(&body) {
                Ok(FromEngine::Acted(_)) => {
                    tally.answered += 1;
                    true
                }
                Ok(FromEngine::Refused(refusal)) => {
                    tally.refused += 1;
                    pause(Duration::from_millis(1));
                    refusal.retry || refusal.request.is_some()
                }
                Ok(_) => false,
                Err(_) => {
                    tally.failed += 1;
                    false
                }
            },
        };
        if again {
            let pushed = push(&mut stream, &request, end);
            tally.sent += pushed.sent;
            alive = pushed.whole;
        }
    }
    drop(heard);
    let (closed, received) = reader.join().expect("a reader that does not panic");
    tally.closed += u64::from(closed);
    tally.received += received;
    tally
}

/// How workers leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// By the end of the stream.
    Close,
    /// By a reset: the welcome is left unread.
    Reset,
}

/// Connects `workers` workers that say hello with `slots` slots each, waits for every welcome, then cuts all connections at once.
pub fn vanishing_workers(endpoint: &str, name: &str, workers: usize, slots: u32, action_dim: u32, cut: Cut) -> Tally {
    let patience = Duration::from_secs(5);
    let mut tally = Tally::default();
    let mut held = Vec::with_capacity(workers);
    for number in 0..workers {
        let body = hello_frame(&format!("{name}-{number}"), "tabletop", action_dim, slots);
        let said = RawDealer::connect(endpoint, patience).and_then(|mut dealer| {
            dealer.send(&body, patience)?;
            if cut == Cut::Close {
                dealer.receive(patience)?;
            } else {
                dealer.stream.set_read_timeout(Some(patience))?;
                dealer.stream.peek(&mut [0])?;
            }
            Ok(dealer)
        });
        match said {
            Ok(dealer) => {
                tally.opened += 1;
                held.push(dealer);
            }
            Err(_error) => tally.unopened += 1,
        }
    }
    drop(held);
    tally
}

/// Says hello and asks for chunks under each of the [`forged_names`], with right and wrong sizes, one connection a name, until `duration` has
/// passed.
pub fn forge(endpoint: &str, plan: &RunPlan, action_dim: u32, duration: Duration) -> Tally {
    let patience = Duration::from_secs(2);
    let mut bodies = Vec::new();
    for name in forged_names() {
        bodies.push(hello_frame(&name, &name, action_dim, 1));
        bodies.push(hello_frame(&name, &name, action_dim + 1, 1));
        let mut one = row(plan, 1, Mode::Eval);
        one.observation.prompt.clone_from(&name);
        let rows = vec![one];
        bodies.push(encode(&ToEngine::Act(ActRequest { request: 1, rows })).expect("a request that can be encoded"));
        let mut unknown = vec![0x81];
        text(&mut unknown, &name);
        unknown.push(0xc0);
        bodies.push(enveloped(&unknown));
    }
    let mut next = bodies.iter().cycle();
    repeat(duration, |left| {
        next.next()
            .map(|body| one_message(endpoint, body, patience.min(left)))
            .unwrap_or_default()
    })
}

/// A message that comes slowly or never to its end.
#[derive(Debug, Clone, Copy)]
pub struct Drip {
    /// Connections at the same time.
    pub connections: usize,
    /// Bytes that the frame's header announces.
    pub announced: u64,
    /// Bytes that are sent at once.
    pub at_once: usize,
    /// Pause between the single bytes after them; `None`: nothing more is sent.
    pub every: Option<Duration>,
    /// Time of the attack.
    pub hold: Duration,
}

/// Begins a message on each of several connections and does not end it; begins anew on a connection that the peer closes.
pub fn drip(endpoint: &str, plan: Drip) -> Tally {
    let zeros = vec![0; plan.at_once];
    crowd(plan.connections, |_| {
        repeat(plan.hold, |left| {
            let end = Instant::now() + left;
            let mut tally = Tally::default();
            let Ok(dealer) = RawDealer::connect(endpoint, left) else {
                tally.unopened += 1;
                return tally;
            };
            tally.opened += 1;
            let (mut stream, _) = dealer.split();
            let mut pushed = push(&mut stream, &long_header(0, plan.announced), end);
            if pushed.whole {
                let more = push(&mut stream, &zeros, end);
                pushed.sent += more.sent;
                pushed.closed = more.closed;
            }
            tally.sent += pushed.sent;
            while !pushed.closed && Instant::now() < end {
                let pace = plan.every.unwrap_or(SLICE);
                let (closed, received) = closed_by_peer(&mut stream, (Instant::now() + pace).min(end));
                tally.received += received;
                pushed.closed = closed;
                if !closed && plan.every.is_some() {
                    let one = push(&mut stream, &[0], end);
                    tally.sent += one.sent;
                    pushed.closed = one.closed;
                }
            }
            tally.closed += u64::from(pushed.closed);
            tally
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hostile_frames_are_what_they_say() {
        // nils in place of images are a valid message that is 56 times as large in memory; in place of other elements they are not valid
        assert!(matches!(
            decode(&nil_frame(Nils::ReportImages, 3)),
            Ok(ToEngine::Reports(_))
        ));
        assert!(matches!(decode(&nil_frame(Nils::RowImages, 3)), Ok(ToEngine::Act(_))));
        for nils in [Nils::Reports, Nils::Rows] {
            decode::<ToEngine>(&nil_frame(nils, 3)).expect_err("refused");
        }
        decode::<ToEngine>(&unknown_variant_frame(10)).expect_err("refused");
        assert!(matches!(
            decode(&hello_frame("a robot", "e", 3, 1)),
            Ok(ToEngine::Hello(_))
        ));
        decode::<ToEngine>(&hello_frame(&forged_names()[0], "e", 3, 1)).expect_err("a name with a line break");
    }

    #[test]
    fn zmtp_by_hand_is_zmtp() {
        assert_eq!(greeting(1).len(), 64);
        assert_eq!(ready(), *b"\x04\x1c\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER");
        assert_eq!(frame(MORE, b"ab"), *b"\x01\x02ab");
        let long = frame(0, &[7; 256]);
        assert_eq!(long.get(..9), Some(b"\x02\x00\x00\x00\x00\x00\x00\x01\x00".as_slice()));
        assert_eq!(long.len(), 265);
    }
}
