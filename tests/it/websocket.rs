//! The websocket endpoint: the unmodified openpi-client, many clients at once, and hostile peers over plain sockets.

use std::{
    io::{self, Read, Write},
    net::TcpStream,
    os::unix::fs::PermissionsExt,
    path::{Path, PathBuf},
    process::Command,
    thread,
    time::{Duration, Instant},
};

use integration_tests::{
    hostile::{open, pause},
    probe::{http_get, metric, readings, reset_peak},
    ring::{Client, plan},
    siege::GRACE,
    skip,
    standalone::{Limits, Programs, Server, random_bundle},
};
use policy::{noise::NoiseKey, plan::RunPlan};
use serde_json::Value;
use wire::{
    array::Array,
    messages::{ActRow, Mode, Observation},
};

use crate::{common::largest_gap, ring::block_on};

/// Longest wait for one answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Sizes of openpi's robots: three cameras, the state of two arms, the actions of one.
const ROBOTS: [&str; 3] = [
    "actor.model.cameras=[\"base_0_rgb\",\"left_wrist_0_rgb\",\"right_wrist_0_rgb\"]",
    "actor.model.action_dim=16",
    "actor.model.env_action_dim=7",
];
const OPCODE_TEXT: u8 = 1;
const OPCODE_BINARY: u8 = 2;
const OPCODE_CLOSE: u8 = 8;
const OPCODE_PING: u8 = 9;
const OPCODE_PONG: u8 = 10;

struct Robots {
    plan: RunPlan,
    server: Server,
    _dir: tempfile::TempDir,
}

impl Robots {
    fn start(arguments: &[&str]) -> Self {
        let dir = tempfile::tempdir().expect("folder");
        let plan = plan(dir.path(), &ROBOTS);
        let programs = Programs::default();
        let bundle = random_bundle(&programs, &plan, dir.path());
        let all = [&["--websocket", "127.0.0.1:0"], arguments].concat();
        let program = programs.path("rollout-engine");
        let server = Server::engine_with(&program, &bundle, &plan, dir.path(), Limits::default(), &all);
        Self {
            plan,
            server,
            _dir: dir,
        }
    }

    fn address(&self) -> &str {
        self.server.websocket.as_deref().expect("a websocket endpoint")
    }

    /// Returns `[action_horizon, env_action_dim]`.
    fn shape(&self) -> [usize; 2] {
        [
            self.plan.dims.action_horizon,
            self.plan.config.actor.model.env_action_dim,
        ]
    }
}

/// Returns the pixels of `tests/openpi/client.py`, `[side, side, 3]`.
fn pixels(number: usize, camera: usize, side: usize) -> Vec<u8> {
    let mut out = Vec::with_capacity(side * side * 3);
    for y in 0..side {
        for x in 0..side {
            out.extend((0..3).map(|c| ((7 * number + 31 * camera + 5 * y + 11 * x + 13 * c) % 256) as u8));
        }
    }
    out
}

/// Returns the state of `tests/openpi/client.py`.
fn state(number: usize, width: usize) -> Vec<f32> {
    (0..width)
        .map(|index| ((number + index) % 7) as f32 * 0.125 - 0.375)
        .collect()
}

/// Returns the observation of a robot form as the ZeroMQ endpoint takes it.
fn observation(form: &str, number: usize) -> Observation {
    let image = |camera| Some(Array::u8(&[224, 224, 3], pixels(number, camera, 224)));
    let (third, width) = if form == "aloha" { (image(2), 14) } else { (None, 8) };
    Observation {
        images: vec![image(0), image(1), third],
        state: state(number, width),
        prompt: format!("pick {}", ["red", "green", "blue"][number % 3]),
    }
}

/// Returns the interpreter with the unmodified client, or says aloud why its tests are left out.
fn openpi_client() -> Option<PathBuf> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("..");
    let python = root.join(".deps/openpi-client/bin/python");
    if root.join(".deps/openpi-client/complete").is_file() {
        return Some(python);
    }
    skip("the unmodified openpi-client", "run scripts/setup-openpi-client");
    None
}

/// Runs `tests/openpi/client.py` and returns its lines.
fn drive(python: &Path, arguments: &[&str]) -> Vec<Value> {
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("openpi/client.py");
    let done = Command::new(python)
        .arg(script)
        .args(arguments)
        .output()
        .expect("starting Python");
    let text = String::from_utf8_lossy(&done.stdout);
    assert!(done.status.success(), "{text}{}", String::from_utf8_lossy(&done.stderr));
    text.lines()
        .map(|line| serde_json::from_str(line).expect("a line of JSON"))
        .collect()
}

/// openpi's three robot forms through its own client: the whole horizon, equal to what a ZeroMQ client gets.
#[test]
fn the_unmodified_openpi_client_gets_what_a_zeromq_client_gets() {
    let Some(python) = openpi_client() else { return };
    let robots = Robots::start(&[]);
    let [rows, columns] = robots.shape();
    let count = 100;
    for form in ["libero", "droid", "aloha"] {
        let lines = drive(&python, &["one", robots.address(), "--form", form, "--count", "100"]);
        assert_eq!(lines.len(), count + 2, "metadata, the answers, the broker's row");
        let metadata = &lines[0]["metadata"];
        assert_eq!(metadata["action_horizon"], rows);
        assert_eq!(metadata["env_action_dim"], columns);
        assert_eq!(metadata["policy"], "pi0");
        assert_eq!(metadata["policy_version"], 0);
        assert_eq!(metadata["cameras"][2], "right_wrist_0_rgb");
        assert_eq!(lines[count + 1]["row"], serde_json::json!([columns]));
        let answers = &lines[1..=count];
        let mut largest = 0.0f32;
        block_on(async {
            let mut client = Client::connect(&robots.server.listen).await;
            for (chunk, answers) in answers.chunks(10).enumerate() {
                let asked = answers.iter().enumerate().map(|(index, answer)| {
                    let number = 10 * chunk + index;
                    assert_eq!(answer["shape"], serde_json::json!([rows, columns]), "the whole horizon");
                    assert_eq!(answer["key"]["chunk"], number, "the server counts the chunks");
                    assert_eq!(answer["previous"], number > 0);
                    ActRow {
                        observation: observation(form, number),
                        key: serde_json::from_value::<NoiseKey>(answer["key"].clone()).expect("a key"),
                        mode: Mode::Eval,
                        record: false,
                        guidance: None,
                    }
                });
                let reply = client.act(chunk as u64, asked.collect()).await;
                for (row, answer) in reply.rows.iter().zip(answers) {
                    let executed = row.actions.to_f32("actions", None).expect("actions");
                    let actions: Vec<f32> = serde_json::from_value(answer["actions"].clone()).expect("numbers");
                    largest = largest.max(largest_gap(&executed, &actions[..executed.len()]));
                }
            }
        });
        println!("{form}: {count} chunks, largest difference {largest:.1e}");
        assert!(largest <= 1e-4, "{form}: {largest}");
    }
}

/// The unmodified client reads one clear line about each request that is rejected, and other clients are served.
#[test]
fn the_unmodified_openpi_client_reads_why_it_is_rejected() {
    let Some(python) = openpi_client() else { return };
    let key = tempfile::NamedTempFile::new().expect("file");
    std::fs::write(key.path(), "correct-horse\n").expect("writing");
    let robots = Robots::start(&["--api-key-file", key.path().to_str().expect("a path")]);
    let mut steady = Raw::connect(robots.address(), Some("correct-horse"));
    for (damage, reason) in [
        ("dtype", "image `observation/image` has dtype int64, expected uint8"),
        (
            "endian",
            "array `observation/state`: found big-endian dtype `>f4`, expected dtype",
        ),
        ("camera", "no image of camera `left_wrist_0_rgb`"),
        ("extra", "found `observation/depth`"),
        ("huge", "bytes, at most 33554432 are accepted"),
    ] {
        let arguments = [
            "rejected",
            robots.address(),
            "--damage",
            damage,
            "--key",
            "correct-horse",
        ];
        let line = drive(&python, &arguments).remove(0);
        let error = line["error"].as_str().expect("a text");
        assert_eq!(line["kind"], "RuntimeError", "{damage}: {line}");
        assert!(error.contains(reason), "{damage}: {error}");
        assert_eq!(error.lines().count(), 2, "openpi's line and ours: {error}");
        steady.serves(&robots);
    }
    for (key, found) in [
        (&[][..], "401"),
        (&["--key", "wrong"], "401"),
        (&["--key", "correct-horse"], ""),
    ] {
        let all = [&["rejected", robots.address()], key].concat();
        let line = drive(&python, &all).remove(0);
        assert!(line["error"].as_str().expect("a text").contains(found), "{line}");
        assert_eq!(line["kind"] == "none", found.is_empty(), "{line}");
    }
    let many = [
        "many",
        robots.address(),
        "--clients",
        "8",
        "--count",
        "5",
        "--key",
        "correct-horse",
    ];
    let line = drive(&python, &many).remove(0);
    assert_eq!(line["answers"], serde_json::json!(vec![5; 8]));
}

/// Appends a text in MessagePack.
fn text(out: &mut Vec<u8>, text: &str) {
    out.extend([0xd9, text.len() as u8]);
    out.extend(text.bytes());
}

fn bin(out: &mut Vec<u8>, bytes: &[u8]) {
    out.push(0xc6);
    out.extend((bytes.len() as u32).to_be_bytes());
    out.extend(bytes);
}

/// Returns an array in openpi's form.
fn array(dtype: &str, shape: &[u16], data: &[u8]) -> Vec<u8> {
    let mut out = vec![0x84];
    bin(&mut out, b"__ndarray__");
    out.push(0xc3);
    bin(&mut out, b"data");
    bin(&mut out, data);
    bin(&mut out, b"dtype");
    text(&mut out, dtype);
    bin(&mut out, b"shape");
    out.push(0x90 | shape.len() as u8);
    for side in shape {
        out.push(0xcd);
        out.extend(side.to_be_bytes());
    }
    out
}

/// Returns a small LIBERO observation; `images` holds the keys and arrays of its cameras.
fn libero(images: &[(&str, Vec<u8>)]) -> Vec<u8> {
    let values: Vec<u8> = state(0, 8).iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut out = vec![0x82 + images.len() as u8];
    for (key, image) in images {
        text(&mut out, key);
        out.extend(image);
    }
    text(&mut out, "observation/state");
    out.extend(array("<f4", &[8], &values));
    text(&mut out, "prompt");
    text(&mut out, "pick red");
    out
}

fn picture(camera: usize) -> Vec<u8> {
    array("|u1", &[32, 32, 3], &pixels(0, camera, 32))
}

fn good() -> Vec<u8> {
    libero(&[
        ("observation/image", picture(0)),
        ("observation/wrist_image", picture(1)),
    ])
}

/// A websocket over a plain socket.
struct Raw(TcpStream);

impl Raw {
    /// Opens a session and reads the metadata.
    fn connect(address: &str, key: Option<&str>) -> Self {
        let mut stream = open(address, PATIENCE).expect("connecting");
        stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
        let key = key.map_or_else(String::new, |key| format!("Authorization: Api-Key {key}\r\n"));
        stream.write_all(upgrade(&key).as_bytes()).expect("sending");
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            stream.read_exact(&mut byte).expect("the head of the answer");
            head.extend(byte);
        }
        let head = String::from_utf8_lossy(&head);
        assert!(head.starts_with("HTTP/1.1 101"), "{head}");
        // the example of RFC 6455
        assert!(head.contains("s3pPLMBiTxaQ9kYGzzhZRbK+xOo="), "{head}");
        let mut raw = Self(stream);
        let (opcode, metadata) = raw.frame().expect("metadata");
        assert_eq!(opcode, OPCODE_BINARY);
        assert!(metadata.windows(14).any(|part| part == b"action_horizon"));
        raw
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.write_all(bytes).expect("sending");
    }

    /// Returns the opcode and the payload of the next frame.
    fn frame(&mut self) -> io::Result<(u8, Vec<u8>)> {
        let mut head = [0; 2];
        self.0.read_exact(&mut head)?;
        assert_eq!((head[0] & 0xf0, head[1] & 0x80), (0x80, 0), "final, not masked");
        let length = match head[1] {
            126 => {
                let mut bytes = [0; 2];
                self.0.read_exact(&mut bytes)?;
                usize::from(u16::from_be_bytes(bytes))
            }
            127 => panic!("a reply of more than 64 KiB"),
            short => usize::from(short),
        };
        let mut payload = vec![0; length];
        self.0.read_exact(&mut payload)?;
        Ok((head[0] & 0x0f, payload))
    }

    /// Asserts that an observation is answered with the whole horizon.
    fn serves(&mut self, robots: &Robots) {
        self.send(&frame(OPCODE_BINARY, &good()));
        self.answered(robots);
    }

    fn answered(&mut self, robots: &Robots) {
        let (opcode, payload) = self.frame().expect("an answer");
        assert_eq!(opcode, OPCODE_BINARY, "{}", String::from_utf8_lossy(&payload));
        let [rows, columns] = robots.shape();
        assert!(payload.len() > 4 * rows * columns, "{} bytes", payload.len());
    }

    /// Returns the line of the error; asserts that the close frame and the end of the connection follow.
    fn rejected(&mut self, code: u16) -> String {
        // pongs of earlier pings may come before and between the two frames
        let mut next = || loop {
            let (opcode, payload) = self.frame().expect("a text frame and a close frame");
            if opcode != OPCODE_PONG {
                return (opcode, payload);
            }
        };
        let (opcode, payload) = next();
        let line = String::from_utf8_lossy(&payload).into_owned();
        assert_eq!(opcode, OPCODE_TEXT, "{line}");
        assert_eq!(line.lines().count(), 1, "{line}");
        assert!(
            !line.contains(".rs") && !line.contains(env!("CARGO_MANIFEST_DIR")),
            "no internals: {line}"
        );
        let (opcode, payload) = next();
        assert_eq!((opcode, &payload[..2]), (OPCODE_CLOSE, &code.to_be_bytes()[..]));
        let mut rest = Vec::new();
        // a reset would lose the line
        self.0.read_to_end(&mut rest).expect("an orderly end");
        assert!(rest.is_empty());
        line
    }
}

fn upgrade(headers: &str) -> String {
    format!(
        "GET / HTTP/1.1\r\nHost: robot\r\nUpgrade: websocket\r\nConnection: Upgrade\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n{headers}\r\n"
    )
}

/// Returns the header of a masked final frame; the mask is zero.
fn header(opcode: u8, length: u64) -> Vec<u8> {
    let mut out = vec![0x80 | opcode];
    match length {
        0..126 => out.push(0x80 | length as u8),
        126..65_536 => {
            out.push(0xfe);
            out.extend((length as u16).to_be_bytes());
        }
        _ => {
            out.push(0xff);
            out.extend(length.to_be_bytes());
        }
    }
    out.extend([0; 4]);
    out
}

fn frame(opcode: u8, payload: &[u8]) -> Vec<u8> {
    [header(opcode, payload.len() as u64), payload.to_vec()].concat()
}

/// Returns the status and the text of the answer to bytes that open no session.
fn http(address: &str, bytes: &str) -> (u16, String) {
    let mut stream = open(address, PATIENCE).expect("connecting");
    stream.set_read_timeout(Some(PATIENCE)).expect("a limit");
    stream.write_all(bytes.as_bytes()).expect("sending");
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).expect("an orderly end");
    let answer = String::from_utf8_lossy(&answer).into_owned();
    let status = answer.split(' ').nth(1).and_then(|status| status.parse().ok());
    (status.unwrap_or_else(|| panic!("no status: {answer}")), answer)
}

#[test]
fn fifty_clients_are_served_in_batches() {
    let robots = Robots::start(&[]);
    let begin = Instant::now();
    thread::scope(|scope| {
        for _ in 0..50 {
            scope.spawn(|| {
                let mut client = Raw::connect(robots.address(), None);
                for _ in 0..8 {
                    client.serves(&robots);
                }
            });
        }
    });
    let read = |name: &str| metric(robots.server.http.as_deref().expect("pages"), name, GRACE).expect("a number");
    let (rows, batches) = (read("engine_batch_rows_sum"), read("engine_batch_rows_count"));
    println!(
        "400 chunks in {:.2?}, {:.1} rows per batch",
        begin.elapsed(),
        rows / batches
    );
    assert!(
        rows >= 400.0 && rows > 1.5 * batches,
        "{rows} rows in {batches} batches"
    );
}

#[test]
fn pings_are_answered_while_a_chunk_is_computed() {
    let robots = Robots::start(&[]);
    let mut client = Raw::connect(robots.address(), None);
    let both = [frame(OPCODE_BINARY, &good()), frame(OPCODE_PING, b"here?")].concat();
    client.send(&both);
    assert_eq!(client.frame().expect("a pong"), (OPCODE_PONG, b"here?".to_vec()));
    client.answered(&robots);
    // two requests at once are answered one after the other
    client.send(&[frame(OPCODE_BINARY, &good()), frame(OPCODE_BINARY, &good())].concat());
    client.answered(&robots);
    client.answered(&robots);
    // fragments, with a ping within the message
    let message = good();
    let (first, second) = message.split_at(1000);
    let mut fragments = frame(OPCODE_BINARY, first);
    fragments[0] &= 0x7f;
    fragments.extend(frame(OPCODE_PING, b""));
    fragments.extend(frame(0, second));
    client.send(&fragments);
    assert_eq!(client.frame().expect("a pong"), (OPCODE_PONG, Vec::new()));
    client.answered(&robots);
    client.send(&frame(OPCODE_CLOSE, &1000u16.to_be_bytes()));
    assert_eq!(
        client.frame().expect("the close"),
        (OPCODE_CLOSE, 1000u16.to_be_bytes().to_vec())
    );
    assert!(client.frame().is_err(), "the connection ends");
}

#[test]
fn every_wrong_request_has_one_clear_answer() {
    let robots = Robots::start(&[]);
    let address = robots.address();
    let mut steady = Raw::connect(address, None);
    assert_eq!(
        http_get(address, "/healthz", GRACE).expect("an answer"),
        (200, "OK\n".to_owned())
    );
    for (request, status, reason) in [
        ("GET / HTTP/1.1\r\nHost: robot\r\n\r\n".to_owned(), 426, "openpi-client"),
        ("POST / HTTP/1.1\r\nHost: robot\r\n\r\n".to_owned(), 405, "expected GET"),
        (
            "GET /metrics HTTP/1.1\r\nHost: robot\r\n\r\n".to_owned(),
            404,
            "`/metrics`",
        ),
        (upgrade("Origin: http://evil.example\r\n"), 403, "Origin"),
        (upgrade("").replace("Version: 13", "Version: 8"), 426, "Version"),
        ("\u{1}\u{2}garbage\r\n\r\n".to_owned(), 400, ""),
        (format!("GET /{} HTTP/1.1\r\n\r\n", "a".repeat(20_000)), 431, ""),
    ] {
        let (found, text) = http(address, &request);
        assert_eq!(found, status, "{text}");
        assert!(text.contains(reason), "{text}");
        steady.serves(&robots);
    }
    let wide = [
        ("observation/image", picture(0)),
        ("observation/wrist_image", array("<i8", &[1, 1, 3], &[0; 24])),
    ];
    for (bytes, code, reason) in [
        (frame(OPCODE_TEXT, b"{}"), 1011, "found a text frame"),
        (frame(OPCODE_BINARY, b"\xc1"), 1011, "failed to decode the message"),
        (
            frame(OPCODE_BINARY, &libero(&[("observation/image", picture(0))])),
            1011,
            "left_wrist_0_rgb",
        ),
        (frame(OPCODE_BINARY, &libero(&wide)), 1011, "int64"),
        (vec![0x82, 0x01, 0xc0], 1002, "protocol"),
        (frame(3, b"?"), 1002, "protocol"),
        (frame(OPCODE_PING, b"").repeat(200), 1008, "pings"),
        (header(OPCODE_BINARY, 1 << 30), 1009, "1073741824 bytes, at most"),
        (header(OPCODE_BINARY, u64::MAX), 1009, "at most"),
    ] {
        let mut client = Raw::connect(address, None);
        client.send(&bytes);
        if reason == "pings" {
            for _ in 0..100 {
                assert_eq!(client.frame().expect("a pong").0, OPCODE_PONG);
            }
        }
        let line = client.rejected(code);
        assert!(line.contains(reason), "{line}");
        steady.serves(&robots);
    }
}

#[test]
fn peers_that_vanish_or_stand_still_lose_only_themselves() {
    let robots = Robots::start(&[]);
    let address = robots.address();
    let mut steady = Raw::connect(address, None);
    steady.serves(&robots);
    reset_peak(robots.server.pid()).expect("own process");
    let before = readings(robots.server.pid()).expect("it runs").rss;
    let message = good();
    // a message that never ends, a frame that is only announced, a handshake that never ends
    let mut still = Raw::connect(address, None);
    still.send(&frame(OPCODE_BINARY, &message)[..100]);
    let announced: Vec<Raw> = (0..100)
        .map(|_| {
            let mut client = Raw::connect(address, None);
            client.send(&header(OPCODE_BINARY, 32 << 20));
            client
        })
        .collect();
    let mut silent = open(address, PATIENCE).expect("connecting");
    silent.set_read_timeout(Some(PATIENCE)).expect("a limit");
    for cut in [1, 10, 1000, message.len()] {
        let mut client = Raw::connect(address, None);
        client.send(&frame(OPCODE_BINARY, &message)[..cut]);
        drop(client);
        steady.serves(&robots);
    }
    // gone while its chunk is computed
    let mut gone = Raw::connect(address, None);
    gone.send(&frame(OPCODE_BINARY, &message));
    drop(gone);
    steady.serves(&robots);
    let peak = readings(robots.server.pid()).expect("it runs").peak;
    println!(
        "memory grew by {} KiB for 100 announced frames of 32 MiB",
        (peak - before) >> 10
    );
    assert!(peak - before < 64 << 20, "{before} to {peak}");
    let line = still.rejected(1011);
    assert!(line.contains("did not arrive in time"), "{line}");
    let end = silent.read_to_end(&mut Vec::new());
    assert!(end.is_ok(), "the handshake has a limit: {end:?}");
    drop(announced);
    steady.serves(&robots);
}

#[test]
fn sessions_end_with_the_engine() {
    let mut robots = Robots::start(&[]);
    let mut client = Raw::connect(robots.address(), None);
    client.serves(&robots);
    assert!(
        robots.server.terminate(GRACE).is_some(),
        "SIGTERM ends it within {GRACE:?}"
    );
    let (opcode, payload) = client.frame().expect("a close frame");
    assert_eq!((opcode, &payload[..2]), (OPCODE_CLOSE, &1001u16.to_be_bytes()[..]));
}

/// Returns the command of an engine without a policy, whose learner is absent; `dir` holds its configuration and endpoints.
fn without_policy(dir: &Path) -> Command {
    let plan = plan(dir, &[]);
    let config = dir.join("config.toml");
    std::fs::write(&config, plan.config.to_toml().expect("toml")).expect("writing");
    let mut command = Command::new(Programs::default().path("rollout-engine"));
    command
        .args(["serve", "--learner", "tcp://127.0.0.1:9", "--config"])
        .arg(config)
        .args(["--set", "rollout.listen=\"tcp://127.0.0.1:0\""])
        .args(["--set", "rollout.http=\"127.0.0.1:0\"", "--endpoints-file"])
        .arg(dir.join("endpoints.json"));
    command
}

/// A process that ends with the test.
struct Killed(std::process::Child);

impl Drop for Killed {
    fn drop(&mut self) {
        self.0.kill().expect("killing the engine");
        self.0.wait().expect("waiting for the engine");
    }
}

#[test]
fn an_engine_without_a_policy_says_so() {
    let dir = tempfile::tempdir().expect("folder");
    let mut command = without_policy(dir.path());
    let engine = command
        .args(["--websocket", "127.0.0.1:0"])
        .stderr(std::process::Stdio::null());
    let _engine = Killed(engine.spawn().expect("starting the engine"));
    let begin = Instant::now();
    let endpoints = loop {
        if let Ok(text) = std::fs::read_to_string(dir.path().join("endpoints.json")) {
            break serde_json::from_str::<Value>(&text).expect("JSON");
        }
        assert!(begin.elapsed() < PATIENCE, "no endpoints");
        pause(Duration::from_millis(5));
    };
    let address = endpoints["websocket"].as_str().expect("an address");
    let healthz = "GET /healthz HTTP/1.1\r\nHost: robot\r\n\r\n";
    for (request, reason) in [(healthz, "no policy is live yet"), (upgrade("").as_str(), "(retry: ")] {
        let (status, text) = http(address, request);
        assert_eq!(status, 503, "{text}");
        assert!(text.contains(reason), "{text}");
    }
}

#[test]
fn an_endpoint_that_is_not_safe_is_refused() {
    let dir = tempfile::tempdir().expect("folder");
    let key = dir.path().join("key");
    std::fs::write(&key, "secret").expect("writing");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).expect("mode");
    let key = key.to_str().expect("a path");
    for (arguments, reason) in [
        (&["--websocket", "0.0.0.0:0"][..], "expected HOST:PORT on loopback"),
        (&["--websocket", "127.0.0.1"], "expected HOST:PORT on loopback"),
        (
            &["--websocket", "127.0.0.1:0", "--api-key-file", key],
            "found mode 0644, expected 0600",
        ),
        (&["--api-key-file", key], "--websocket"),
    ] {
        let done = without_policy(dir.path())
            .args(arguments)
            .output()
            .expect("starting the engine");
        let text = String::from_utf8_lossy(&done.stderr);
        assert_eq!(done.status.code(), Some(2), "{text}");
        assert!(text.contains(reason), "{text}");
    }
}
