//! Tests of ROUTER and DEALER against well-behaved and hostile peers that write ZMTP byte by byte.

use std::time::{Duration, Instant};

use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    net::{TcpListener, TcpStream},
    time::timeout,
};

use super::*;
use crate::{
    codec::{HEADER_BYTES, decode, encode},
    zmtp::{self, GREETING_BYTES, SocketType, frame_header, message_header},
};

/// Time limit of every expected event.
const PATIENCE: Duration = Duration::from_secs(20);

fn quick() -> Limits {
    Limits {
        message_bytes: 4 << 20,
        // a busy machine must not make a well-behaved peer late
        handshake: Duration::from_secs(1),
        message_grace: Duration::from_millis(700),
        bytes_per_second: 1 << 20,
        send_stall: Duration::from_secs(1),
        ..Limits::default()
    }
}

async fn router(limits: Limits) -> (RouterSender, RouterReceiver<String>, String) {
    bind_router("tcp://127.0.0.1:0", limits).await.expect("a free port")
}

/// Peer whose every byte the test chooses.
struct Raw {
    stream: TcpStream,
    seen: Vec<u8>,
}

impl Raw {
    async fn connect(endpoint: &str) -> Self {
        let address = check_endpoint(endpoint).expect("an endpoint");
        Self {
            stream: TcpStream::connect(address).await.expect("connecting"),
            seen: Vec::new(),
        }
    }

    /// Connects and shakes hands as a DEALER.
    async fn open(endpoint: &str) -> Self {
        let mut raw = Self::connect(endpoint).await;
        raw.write(&zmtp::greeting()).await;
        raw.write(&zmtp::ready(SocketType::Dealer)).await;
        raw.shake().await;
        raw
    }

    /// Reads the other side's greeting and READY.
    async fn shake(&mut self) {
        self.read_exact(GREETING_BYTES).await;
        self.frame().await.expect("READY");
    }

    async fn write(&mut self, bytes: &[u8]) {
        self.stream.write_all(bytes).await.expect("writing");
    }

    async fn write_frame(&mut self, body: &[u8]) {
        let (header, length) = message_header(body.len());
        self.write(&[&header[..length], body].concat()).await;
    }

    async fn say(&mut self, text: &str) {
        self.write_frame(&encode(&text.to_owned()).expect("encodes")).await;
    }

    async fn fill(&mut self) -> bool {
        let mut bytes = [0u8; 4096];
        let read = timeout(PATIENCE, self.stream.read(&mut bytes)).await.expect("in time");
        let count = read.unwrap_or(0);
        self.seen.extend_from_slice(&bytes[..count]);
        count > 0
    }

    async fn read_exact(&mut self, count: usize) -> Vec<u8> {
        while self.seen.len() < count {
            assert!(self.fill().await, "the connection ended");
        }
        self.seen.drain(..count).collect()
    }

    /// Returns the body of the next frame; `None` when the connection ends.
    async fn frame(&mut self) -> Option<Vec<u8>> {
        loop {
            if let Some((header, length)) = frame_header(&self.seen).expect("a sound header") {
                let end = length + header.bytes as usize;
                if self.seen.len() >= end {
                    return Some(self.seen.drain(..end).skip(length).collect());
                }
            }
            if !self.fill().await {
                return None;
            }
        }
    }

    async fn hears(&mut self) -> String {
        decode(&self.frame().await.expect("a message")).expect("decodes")
    }

    /// Waits until the other side has closed the connection.
    async fn is_closed(&mut self) {
        while self.fill().await {}
    }
}

async fn event(receive: &mut RouterReceiver<String>) -> RouterEvent<String> {
    timeout(PATIENCE, receive.receive()).await.expect("an event in time")
}

async fn message(receive: &mut RouterReceiver<String>) -> (Peer, String) {
    match event(receive).await {
        RouterEvent::Frame(peer, Ok(text)) => (peer, text),
        other => panic!("expected a message, got {other:?}"),
    }
}

/// Waits until `expected` connections were closed for `reason`: a peer sees the end shortly before the counter changes.
async fn closed(send: &RouterSender, reason: Closed, expected: u64) {
    let count = || {
        send.counters()
            .closed()
            .find(|(r, _)| *r == reason)
            .map_or(0, |(_, count)| count)
    };
    let waiting = async {
        let mut pause = tokio::time::interval(Duration::from_millis(5));
        while count() < expected {
            pause.tick().await;
        }
    };
    drop(timeout(PATIENCE, waiting).await);
    assert_eq!(count(), expected, "{reason:?} of {:?}", send.counters());
}

/// Asserts that the endpoint answers a well-behaved peer after the preceding test steps.
async fn serves(endpoint: &str, send: &RouterSender, receive: &mut RouterReceiver<String>) {
    let mut peer = Raw::open(endpoint).await;
    peer.say("are you there").await;
    loop {
        match event(receive).await {
            RouterEvent::Frame(from, Ok(text)) if text == "are you there" => {
                send.send(from, &"yes").expect("sent");
                break;
            }
            _ => {}
        }
    }
    assert_eq!(peer.hears().await, "yes");
}

/// Byte string of any length; texts have a limit of their own.
#[derive(Debug, PartialEq, serde::Serialize, serde::Deserialize)]
struct Bytes(#[serde(with = "serde_bytes")] Vec<u8>);

#[tokio::test]
async fn a_dealer_and_a_router_talk_both_ways() {
    let bound = bind_router::<Bytes>("tcp://127.0.0.1:0", Limits::default()).await;
    let (send, mut receive, endpoint) = bound.expect("a free port");
    let (mut out, mut back) = connect_dealer(&endpoint).await.expect("connected");
    // short, long and more than a socket accepts at once
    for size in [0, 1, 255, 256, 100_000, 8 << 20] {
        let sent = Bytes(vec![7; size]);
        out.send(&sent).await.expect("sent");
        let heard = timeout(PATIENCE, receive.receive()).await.expect("in time");
        let RouterEvent::Frame(peer, Ok(heard)) = heard else {
            panic!("expected {size} bytes, got {heard:?}")
        };
        assert_eq!(heard.0.len(), size);
        send.send(peer, &sent).expect("sent");
        let answer: Bytes = timeout(PATIENCE, back.receive())
            .await
            .expect("in time")
            .expect("an answer");
        assert_eq!(answer, sent);
    }
    drop((out, back));
    let end = timeout(PATIENCE, receive.receive()).await.expect("in time");
    assert!(matches!(end, RouterEvent::Gone(_)), "{end:?}");
}

#[tokio::test]
async fn a_dealer_sends_more_than_may_wait() {
    let bound = bind_router::<Bytes>("tcp://127.0.0.1:0", Limits::default()).await;
    let (_send, mut receive, endpoint) = bound.expect("a free port");
    let (mut out, _back) = connect_dealer(&endpoint).await.expect("connected");
    let (count, size) = (100, 1 << 20);
    assert!(count * size > Limits::default().queued_bytes_per_peer);
    let sending = tokio::spawn(async move {
        for _ in 0..count {
            out.send(&Bytes(vec![7; size])).await.expect("sent");
        }
        out
    });
    for _ in 0..count {
        let heard = timeout(PATIENCE, receive.receive()).await.expect("in time");
        assert!(matches!(heard, RouterEvent::Frame(_, Ok(Bytes(bytes))) if bytes.len() == size));
    }
    drop(sending.await.expect("all are sent"));
}

#[tokio::test]
async fn a_dealer_waits_for_the_router_and_hears_of_its_end() {
    let free = TcpListener::bind("127.0.0.1:0").await.expect("port");
    let endpoint = format!("tcp://{}", free.local_addr().expect("address"));
    drop(free);
    let connecting = tokio::spawn({
        let endpoint = endpoint.clone();
        async move { connect_dealer(&endpoint).await }
    });
    let (_send, receive, _) = bind_router::<String>(&endpoint, Limits::default())
        .await
        .expect("bound");
    let (_out, mut back) = timeout(PATIENCE, connecting)
        .await
        .expect("in time")
        .expect("no panic")
        .expect("connected");
    drop(receive);
    let end = timeout(PATIENCE, back.receive::<String>()).await.expect("in time");
    assert!(matches!(end, Err(SocketError::Disconnected)), "{end:?}");
}

#[tokio::test]
async fn a_req_socket_gets_its_delimiter_back() {
    let (send, mut receive, endpoint) = router(quick()).await;
    let mut peer = Raw::connect(&endpoint).await;
    peer.write(&zmtp::greeting()).await;
    peer.write(b"\x04\x19\x05READY\x0bSocket-Type\x00\x00\x00\x03REQ").await;
    peer.shake().await;
    peer.write(&[1, 0]).await;
    peer.say("ask").await;
    let (from, text) = message(&mut receive).await;
    assert_eq!(text, "ask");
    send.send(from, &"answer").expect("sent");
    assert_eq!(peer.read_exact(2).await, [1, 0]);
    assert_eq!(peer.hears().await, "answer");
}

#[tokio::test]
async fn no_peer_gets_the_messages_of_another_by_its_identity() {
    let (send, mut receive, endpoint) = router(quick()).await;
    let mut peers = Vec::new();
    for name in ["first", "second"] {
        let mut peer = Raw::connect(&endpoint).await;
        peer.write(&zmtp::greeting()).await;
        let mut ready =
            b"\x04\x2b\x05READY\x0bSocket-Type\x00\x00\x00\x06DEALER\x08Identity\x00\x00\x00\x02me".to_vec();
        ready[1] = (ready.len() - 2) as u8;
        peer.write(&ready).await;
        peer.shake().await;
        peer.say(name).await;
        let (from, _) = message(&mut receive).await;
        peers.push((peer, from, name));
    }
    for (_, from, name) in &peers {
        send.send(*from, name).expect("sent");
    }
    for (peer, _, name) in &mut peers {
        assert_eq!(peer.hears().await, *name);
    }
}

#[tokio::test]
async fn a_ping_is_answered_between_messages() {
    let (_send, mut receive, endpoint) = router(quick()).await;
    let mut peer = Raw::open(&endpoint).await;
    for _ in 0..3 {
        peer.write(b"\x04\x0a\x04PING\x00\x14abc").await;
        assert_eq!(peer.frame().await.as_deref(), Some(b"\x04PONGabc".as_slice()));
    }
    peer.say("after").await;
    assert_eq!(message(&mut receive).await.1, "after");
}

#[tokio::test]
async fn what_a_header_announces_is_not_allocated() {
    let (send, mut receive, endpoint) = router(quick()).await;
    for flags in [2u8, 6, 3, 7, 0x82] {
        for length in [1u64 << 62, 1 << 40, 5 << 30] {
            let mut before = Raw::connect(&endpoint).await;
            before.write(&zmtp::greeting()).await;
            let mut bomb = vec![flags];
            bomb.extend_from_slice(&length.to_be_bytes());
            before.write(&bomb).await;
            before.is_closed().await;
            let mut after = Raw::open(&endpoint).await;
            after.write(&bomb).await;
            after.is_closed().await;
        }
    }
    closed(&send, Closed::Protocol, 30).await;
    serves(&endpoint, &send, &mut receive).await;
}

#[tokio::test]
async fn endless_parts_end_the_connection() {
    let (send, mut receive, endpoint) = router(quick()).await;
    for part in [[1, 0, 1, 0].as_slice(), &[1, 1, 7], &[3, 0, 0, 0, 0, 0, 0, 1, 0]] {
        let mut peer = Raw::open(&endpoint).await;
        peer.write(part).await;
        peer.is_closed().await;
    }
    serves(&endpoint, &send, &mut receive).await;
}

#[tokio::test]
async fn other_protocols_are_turned_away_at_once() {
    let limits = Limits {
        handshake: PATIENCE,
        ..quick()
    };
    let (send, mut receive, endpoint) = router(limits).await;
    for bytes in [
        b"GET / HTTP/1.1\r\n\r\n".as_slice(),
        b"\xff\0\0\0\0\0\0\0\x01\x7f\x01",
        &[0x16, 3, 1, 2, 0],
    ] {
        let mut peer = Raw::connect(&endpoint).await;
        peer.write(bytes).await;
        peer.is_closed().await;
    }
    serves(&endpoint, &send, &mut receive).await;
}

#[tokio::test]
async fn half_open_connections_are_closed() {
    let (send, mut receive, endpoint) = router(quick()).await;
    let mut silent = Raw::connect(&endpoint).await;
    let mut greeted = Raw::connect(&endpoint).await;
    greeted.write(&zmtp::greeting()).await;
    silent.is_closed().await;
    greeted.is_closed().await;
    closed(&send, Closed::Handshake, 2).await;
    serves(&endpoint, &send, &mut receive).await;
}

#[tokio::test]
async fn a_message_that_does_not_arrive_ends_its_connection() {
    let (send, mut receive, endpoint) = router(quick()).await;
    for started in [&[2u8][..], &[2, 0, 0, 0, 0, 0, 16, 0, 0], &[1, 0], &[4, 9, 4]] {
        let mut peer = Raw::open(&endpoint).await;
        peer.write(started).await;
        peer.is_closed().await;
    }
    // a message that arrives too slowly: single bytes for as long as the other side accepts them
    let mut peer = Raw::open(&endpoint).await;
    peer.write(&[2, 0, 0, 0, 0, 0, 16, 0, 0]).await;
    let begun = Instant::now();
    let mut pause = tokio::time::interval(Duration::from_millis(50));
    while peer.stream.write_all(&[0]).await.is_ok() {
        pause.tick().await;
        assert!(
            begun.elapsed() < PATIENCE,
            "a dripped message holds its connection for ever"
        );
    }
    closed(&send, Closed::Late, 5).await;
    serves(&endpoint, &send, &mut receive).await;
}

#[tokio::test]
async fn an_idle_peer_stays_connected() {
    let (send, mut receive, endpoint) = router(quick()).await;
    let mut peer = Raw::open(&endpoint).await;
    // longer than all of the limits
    assert!(
        timeout(Duration::from_millis(1500), peer.fill()).await.is_err(),
        "nothing is sent, nothing is closed"
    );
    peer.say("still here").await;
    assert_eq!(message(&mut receive).await.1, "still here");
    drop(send);
}

#[tokio::test]
async fn a_peer_that_does_not_read_is_disconnected_and_holds_up_nobody() {
    let limits = Limits {
        queued_bytes_per_peer: 1 << 20,
        queued_messages_per_peer: 100,
        ..quick()
    };
    let (send, mut receive, endpoint) = router(limits).await;
    for size in [10, 100_000] {
        let mut deaf = Raw::open(&endpoint).await;
        deaf.say("answer me").await;
        let (peer, _) = message(&mut receive).await;
        let text = "x".repeat(size);
        let begun = Instant::now();
        let mut sent = 0u64;
        while send.send(peer, &text).is_ok() {
            sent += 1;
            assert!(
                begun.elapsed() < PATIENCE,
                "{sent} messages wait for a peer that reads none"
            );
        }
        loop {
            if let RouterEvent::Gone(gone) = event(&mut receive).await {
                assert_eq!(gone, peer);
                break;
            }
        }
        assert!(matches!(send.send(peer, &text), Err(SocketError::Disconnected)));
    }
    closed(&send, Closed::Slow, 2).await;
    serves(&endpoint, &send, &mut receive).await;
}

#[tokio::test]
async fn a_peer_that_takes_nothing_for_long_is_disconnected() {
    let (send, mut receive, endpoint) = router(quick()).await;
    let mut deaf = Raw::open(&endpoint).await;
    deaf.say("answer me").await;
    let (peer, _) = message(&mut receive).await;
    // more than both sockets hold, less than the queue limit
    send.send(peer, &"x".repeat(30 << 20)).expect("queued");
    assert!(matches!(event(&mut receive).await, RouterEvent::Gone(gone) if gone == peer));
    closed(&send, Closed::Slow, 1).await;
}

#[tokio::test]
async fn messages_that_cannot_be_decoded_are_answered_and_then_end_the_connection() {
    let limits = Limits {
        malformed_messages: 3,
        ..quick()
    };
    let (send, mut receive, endpoint) = router(limits).await;
    let mut peer = Raw::open(&endpoint).await;
    for _ in 0..4 {
        peer.write_frame(&[7; HEADER_BYTES]).await;
        let RouterEvent::Frame(from, Err(error)) = event(&mut receive).await else {
            panic!("malformed")
        };
        assert!(error.to_string().contains("PIRL"), "{error}");
        // the last one may find the connection closed
        drop(send.send(from, &"what?"));
    }
    assert!(matches!(event(&mut receive).await, RouterEvent::Gone(_)));
    closed(&send, Closed::Malformed, 1).await;
}

#[tokio::test]
async fn places_are_taken_from_idle_connections_only() {
    // of 4 places one address has 3
    let limits = Limits {
        connections: 4,
        handshake: PATIENCE,
        ..quick()
    };
    let (send, mut receive, endpoint) = router(limits).await;
    let mut idle = Vec::new();
    for _ in 0..3 {
        idle.push(Raw::connect(&endpoint).await);
    }
    let mut peers = Vec::new();
    for number in 0..3 {
        let mut peer = Raw::open(&endpoint).await;
        peer.say(&number.to_string()).await;
        message(&mut receive).await;
        peers.push(peer);
    }
    for mut one in idle {
        one.is_closed().await;
    }
    closed(&send, Closed::Evicted, 3).await;
    Raw::connect(&endpoint).await.is_closed().await;
    closed(&send, Closed::Full, 1).await;
    peers.pop();
    assert!(matches!(event(&mut receive).await, RouterEvent::Gone(_)));
    serves(&endpoint, &send, &mut receive).await;
}

#[tokio::test]
async fn a_flood_does_not_hold_up_the_others() {
    let (send, mut receive, endpoint) = router(quick()).await;
    let mut flood = Raw::open(&endpoint).await;
    let mut quiet = Raw::open(&endpoint).await;
    for _ in 0..200 {
        flood.say("flood").await;
    }
    // the flood is queued before any message is received
    let (first, _) = message(&mut receive).await;
    quiet.say("quiet").await;
    let mut before = 0;
    while message(&mut receive).await.0 == first {
        before += 1;
        tokio::task::yield_now().await;
    }
    let waiting = Limits::default().waiting_messages;
    assert!(before <= waiting + 1, "{before} messages of another peer came first");
    drop(send);
}

#[tokio::test]
async fn a_dealer_survives_a_hostile_router() {
    let listener = TcpListener::bind("127.0.0.1:0").await.expect("port");
    let endpoint = format!("tcp://{}", listener.local_addr().expect("address"));
    let hostile = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.expect("accepted");
        let mut raw = Raw {
            stream,
            seen: Vec::new(),
        };
        raw.write(&zmtp::greeting()).await;
        raw.write(&zmtp::ready(SocketType::Router)).await;
        raw.shake().await;
        raw.write(&[2, 0x40, 0, 0, 0, 0, 0, 0, 0]).await;
        raw
    });
    let (_out, mut back) = connect_dealer(&endpoint).await.expect("connected");
    let end = timeout(PATIENCE, back.receive::<String>()).await.expect("in time");
    assert!(matches!(end, Err(SocketError::Disconnected)), "{end:?}");
    drop(hostile);
}

#[test]
fn endpoints_are_checked() {
    for good in ["tcp://127.0.0.1:1", "tcp://localhost:0", "tcp://[::1]:9"] {
        assert!(check_endpoint(good).is_ok(), "{good}");
    }
    for bad in [
        "127.0.0.1:1",
        "tcp://127.0.0.1",
        "tcp://127.0.0.1:x",
        "udp://127.0.0.1:1",
    ] {
        assert!(matches!(check_endpoint(bad), Err(SocketError::Endpoint(_))), "{bad}");
    }
    for far in [
        "tcp://0.0.0.0:1",
        "tcp://10.0.0.1:1",
        "tcp://example.org:1",
        "tcp://[::]:1",
    ] {
        assert!(matches!(check_endpoint(far), Err(SocketError::NotLoopback(_))), "{far}");
    }
}
