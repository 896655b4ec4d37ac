//! Attacks by complete messages: floods, unread answers, unclaimed work, vanishing workers.

use std::{
    io::ErrorKind,
    net::TcpStream,
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use policy::plan::RunPlan;
use wire::{
    codec::{decode, encode},
    messages::{ActRequest, EngineState, Fetch, FromEngine, FromLearner, Mode, ToEngine, ToLearner},
};

use super::{
    Heard, MORE, RawDealer, Tally, closed_by_peer, enveloped, forged_names, frame, frames::text, hello_frame, pause,
    pong, push, repeat, zmtp::SLICE,
};

use crate::ring::row;

/// Bytes in one write of a flood.
const BLOCK: usize = 192 << 10;

/// Bounds of [`churn`].
#[derive(Debug, Clone, Copy)]
pub struct Churn {
    /// Connections of this client.
    pub connections: u64,
    /// Longest time of the whole attack.
    pub duration: Duration,
    /// Longest wait for a handshake and for an answer.
    pub patience: Duration,
}

/// Connects, shakes hands, sends one frame, reads one answer and closes, repeatedly. Calls `progress` with the counts after each
/// connection. With a valid request the client is well-behaved, and `answered` is the number of served connections.
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

/// Treatment of answers by a flood.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answers {
    /// Answers are never read.
    Unread,
    /// Answers are read and dropped.
    Read,
}

/// Sends `count` copies of a frame (with header) on one connection at the peer's pace, then holds the connection. Ends when the peer closes
/// the connection or `hold` has passed.
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

/// Waits until the peer resets the connection or the time is up, without reading the peer's bytes. A close without a reset is invisible
/// without reading; therefore a byte of the next frame is sent periodically, and a closed connection answers with a reset.
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

/// Sends `bytes` bytes of one endless message in parts of `part_bytes` bytes, then holds the connection.
pub fn endless_parts(endpoint: &str, part_bytes: u8, bytes: u64, hold: Duration) -> Tally {
    let one = frame(MORE, &vec![b'x'; usize::from(part_bytes)]);
    flood(endpoint, &one, bytes / one.len() as u64, Answers::Unread, hold)
}

/// Acts as an engine that requests the announced bundle repeatedly and never reads a part. Ends when the learner closes the connection or
/// `duration` has passed.
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

/// Way in which workers leave.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Cut {
    /// The stream is closed.
    Close,
    /// The connection is reset, because the welcome is unread.
    Reset,
}

/// Connects `workers` workers, registers `slots` slots for each, waits for every welcome, then cuts all connections at once.
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

/// Registers and requests chunks under each of the [`forged_names`], with right and wrong sizes, one connection per name, until `duration`
/// has passed.
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
