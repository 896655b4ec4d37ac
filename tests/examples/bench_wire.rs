//! Round trip and throughput of the wire's sockets and of the `zeromq` crate, over loopback and in turn: `scripts/bench-wire`.
//!
//! Both libraries carry the same messages through the same codec. The server runs on two separate threads, like an engine.
#![expect(
    clippy::expect_used,
    clippy::infinite_loop,
    clippy::print_stdout,
    reason = "a benchmark prints, ends where its machine fails it, and its servers serve until then"
)]

use std::{
    sync::mpsc,
    time::{Duration, Instant},
};

use wire::{
    codec::{decode, encode},
    limits::Limits,
    messages::FilePart,
    socket::{RouterEvent, bind_router, connect_dealer},
};
use zeromq::{DealerSocket, RouterSocket, Socket, SocketRecv, SocketSend, ZmqMessage};

const ROUNDS: usize = 5;
const TRIPS: usize = 5000;
const TRIP_BYTES: usize = 1 << 10;
const PARTS: usize = 1000;
const PART_BYTES: usize = 1 << 20;
/// Largest number of bytes that wait in the server for a client.
const WINDOW: usize = 32 << 20;

fn part(bytes: usize, offset: u64) -> FilePart {
    FilePart {
        version: 0,
        file: "weights".to_owned(),
        offset,
        data: vec![7; bytes],
    }
}

/// Returns the number and size of the parts that answer a message. A part named `echo` is returned; for `send`, `offset` is the number of
/// parts of `PART_BYTES`.
fn answers(asked: &FilePart) -> (usize, usize) {
    match asked.file.as_str() {
        "echo" => (1, asked.data.len()),
        "send" => (asked.offset as usize, PART_BYTES),
        "last" => (1, 0),
        _ => (0, 0),
    }
}

fn named(file: &str, part: FilePart) -> FilePart {
    FilePart {
        file: file.to_owned(),
        ..part
    }
}

/// Starts a server on a thread and returns its endpoint.
fn serve(start: impl AsyncFnOnce(mpsc::Sender<String>) + Send + 'static) -> String {
    let (sender, endpoint) = mpsc::channel();
    std::thread::spawn(move || {
        let runtime = tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build();
        runtime.expect("a runtime").block_on(start(sender));
    });
    endpoint.recv().expect("an endpoint")
}

async fn serve_wire(endpoint: mpsc::Sender<String>) {
    let limits = Limits {
        messages_per_second: u32::MAX,
        peer_bytes_per_second: usize::MAX,
        large_bytes_per_second: usize::MAX,
        ..Limits::default()
    };
    let bound = bind_router::<FilePart>("tcp://127.0.0.1:0", limits).await;
    let (send, mut receive, own) = bound.expect("a port");
    endpoint.send(own).expect("the client waits");
    loop {
        if let RouterEvent::Frame(peer, Ok(asked)) = receive.receive().await {
            let (count, bytes) = answers(&asked);
            for number in 0..count {
                while send.queued_bytes(peer) > WINDOW {
                    tokio::time::sleep(Duration::from_millis(1)).await;
                }
                send.send(peer, &part(bytes, number as u64)).expect("sent");
            }
        }
    }
}

async fn serve_zeromq(endpoint: mpsc::Sender<String>) {
    let mut socket = RouterSocket::new();
    let own = socket.bind("tcp://127.0.0.1:0").await.expect("a port");
    endpoint.send(own.to_string()).expect("the client waits");
    loop {
        let mut frames = socket.recv().await.expect("a message").into_vec();
        let asked: FilePart = decode(&frames.pop().expect("a body")).expect("decodes");
        let peer = frames.remove(0);
        let (count, bytes) = answers(&asked);
        for number in 0..count {
            let mut out = ZmqMessage::from(encode(&part(bytes, number as u64)).expect("encodes"));
            out.push_front(peer.clone());
            socket.send(out).await.expect("sent");
        }
    }
}

/// Microseconds of a round trip (median and p99), and MB/s each way.
#[derive(Debug, Default, Clone, Copy)]
struct Figures {
    p50: f64,
    p99: f64,
    up: f64,
    down: f64,
}

/// Number of a table's row.
type Figure = fn(&Figures) -> f64;

trait Peer {
    async fn say(&mut self, message: &FilePart);
    async fn hear(&mut self) -> FilePart;
}

struct Ours(wire::socket::DealerSender, wire::socket::DealerReceiver);

impl Peer for Ours {
    async fn say(&mut self, message: &FilePart) {
        self.0.send(message).await.expect("sent");
    }

    async fn hear(&mut self) -> FilePart {
        self.1.receive().await.expect("a message")
    }
}

struct Theirs(DealerSocket);

impl Peer for Theirs {
    async fn say(&mut self, message: &FilePart) {
        let out = ZmqMessage::from(encode(message).expect("encodes"));
        self.0.send(out).await.expect("sent");
    }

    async fn hear(&mut self) -> FilePart {
        let mut frames = self.0.recv().await.expect("a message").into_vec();
        decode(&frames.pop().expect("a body")).expect("decodes")
    }
}

async fn measure(peer: &mut impl Peer) -> Figures {
    let ping = named("echo", part(TRIP_BYTES, 0));
    let mut trips = Vec::with_capacity(TRIPS);
    for _ in 0..TRIPS {
        let begun = Instant::now();
        peer.say(&ping).await;
        peer.hear().await;
        trips.push(begun.elapsed().as_secs_f64() * 1e6);
    }
    trips.sort_by(f64::total_cmp);
    let megabytes = (PARTS * PART_BYTES) as f64 / 1e6;
    let begun = Instant::now();
    for _ in 0..PARTS {
        peer.say(&part(PART_BYTES, 0)).await;
    }
    peer.say(&named("last", part(0, 0))).await;
    peer.hear().await;
    let up = megabytes / begun.elapsed().as_secs_f64();
    let begun = Instant::now();
    peer.say(&named("send", part(0, PARTS as u64))).await;
    for _ in 0..PARTS {
        peer.hear().await;
    }
    let down = megabytes / begun.elapsed().as_secs_f64();
    let at = |place: usize| trips.get(place).copied().unwrap_or_default();
    Figures {
        p50: at(TRIPS / 2),
        p99: at(TRIPS * 99 / 100),
        up,
        down,
    }
}

fn median(figures: &[Figures], of: impl Fn(&Figures) -> f64) -> f64 {
    let mut values: Vec<f64> = figures.iter().map(of).collect();
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied().unwrap_or_default()
}

fn main() {
    let (ours, theirs) = (serve(serve_wire), serve(serve_zeromq));
    let client = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let (wire, zeromq) = client.expect("a runtime").block_on(async {
        let (send, receive) = connect_dealer(&ours).await.expect("connected");
        let mut wire = Ours(send, receive);
        let mut socket = DealerSocket::new();
        socket.connect(&theirs).await.expect("connected");
        let mut zeromq = Theirs(socket);
        let mut figures = (Vec::new(), Vec::new());
        for _ in 0..ROUNDS {
            figures.0.push(measure(&mut wire).await);
            figures.1.push(measure(&mut zeromq).await);
        }
        figures
    });
    println!(
        "{:34} {:>10} {:>12} {:>10}",
        "median of 5 rounds, in turn", "pirl", "zeromq 0.7.0", "ratio"
    );
    let rows: [(&str, Figure, bool); 4] = [
        ("1 KiB round trip, p50, us", |f| f.p50, true),
        ("1 KiB round trip, p99, us", |f| f.p99, true),
        ("1 MiB to the ROUTER, MB/s", |f| f.up, false),
        ("1 MiB to the DEALER, MB/s", |f| f.down, false),
    ];
    for (name, of, time) in rows {
        let (own, other) = (median(&wire, of), median(&zeromq, of));
        // above 1: slower than the other
        let ratio = if time { own / other } else { other / own };
        println!("{name:34} {own:10.1} {other:12.1} {ratio:10.2}");
    }
}
