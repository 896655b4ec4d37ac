//! Attacks on connections and frames, before any message is complete.

use std::{
    collections::VecDeque,
    io::{self, ErrorKind, Read, Write},
    net::TcpStream,
    time::{Duration, Instant},
};

use policy::noise::{Purpose, below, stream};

use super::{
    COMMAND, MORE, RawDealer, Tally, closed_by_peer, crowd, frame, greeting, long_header, open, pause, ping, push,
    ready, ready_with, repeat, tally::RETRY, zmtp::SLICE,
};

/// Place of a length bomb in a connection.
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

/// Every place of a length bomb.
pub const PLACES: [Place; 5] = [
    Place::CommandForReady,
    Place::MessageForReady,
    Place::Message,
    Place::FirstPart,
    Place::Command,
];
/// Announced lengths in bytes that exceed any memory, or all but a large one.
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

/// Opens `connections` connections in turn, sends 1 to `longest` random bytes on each, after a greeting on every other, and closes.
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
        // waits a moment for the peer's answer: a fast close would hide the bytes from the peer
        let (closed, received) = closed_by_peer(&mut stream, Instant::now() + Duration::from_millis(2));
        tally.received += received;
        tally.closed += u64::from(closed || pushed.closed);
    }
    tally
}

/// Returns first bytes of a connection that break ZMTP or request what an engine does not offer.
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

/// Opens connections with each of the [`bad_openings`] and sends a frame, until `duration` has passed. Holds the last 50 connections.
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

/// Stage at which a connection idles.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// No byte is sent.
    Silent,
    /// The greeting is sent.
    Greeting,
    /// The handshake is complete.
    Ready,
    /// The greeting is sent at one byte per half second.
    SlowGreeting,
    /// Half of an HTTP request's head is sent.
    HalfRequest,
}

/// Opens `connections` connections to a ZeroMQ or HTTP port and idles for `hold`; replaces each connection that the peer closes.
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
            // a later connection joins in the middle, which is accepted: its greeting is late or wrong
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

/// A message that is sent slowly or never completed.
#[derive(Debug, Clone, Copy)]
pub struct Drip {
    /// Concurrent connections.
    pub connections: usize,
    /// Length in bytes that the frame's header announces.
    pub announced: u64,
    /// Number of bytes that are sent at once.
    pub at_once: usize,
    /// Pause between the single bytes that follow; `None`: no more bytes are sent.
    pub every: Option<Duration>,
    /// Duration of the attack.
    pub hold: Duration,
}

/// Starts an endless message on each of several connections; reconnects and starts again when the peer closes a connection.
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
