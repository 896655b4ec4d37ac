//! One session of a client: metadata, then an answer to each observation. Reads go on while an answer is computed, so pings are
//! answered and a client that leaves is noticed.

use std::{
    convert::Infallible,
    sync::Arc,
    time::{Duration, Instant},
};

use futures_util::{SinkExt, StreamExt};
use hyper::upgrade::Upgraded;
use hyper_util::rt::TokioIo;
use policy::{message::told, noise::NoiseKey};
use tokio::{
    io::{AsyncReadExt, AsyncWriteExt},
    sync::{oneshot, watch},
    time::{Interval, MissedTickBehavior, interval, timeout},
};
use tokio_tungstenite::{
    WebSocketStream,
    tungstenite::{
        Bytes, Error as SocketError, Message, Utf8Bytes,
        error::{CapacityError, ProtocolError},
        protocol::{CloseFrame, Role, WebSocketConfig, frame::coding::CloseCode},
    },
};
use wire::{
    limits::LARGE_BYTES,
    messages::Mode,
    socket::{Closed, gate::Admission},
};

use super::{
    arrival::{Arrival, Counted},
    observation::{self, RequestError},
    reply::{self, REPLY_OVERHEAD, Times},
};
use crate::{
    device::versions::{Policy, Versions},
    front::zmq,
    inference::EngineQueue,
    job::{Answer, Job, JobError, JobResult, Row},
    metrics::Metrics,
};

/// Largest message in bytes. The library reserves address space for an announced frame, so the limit is smaller than ZeroMQ's;
/// 3 cameras of 1920 x 1080 pixels have 19 MB.
pub(super) const MESSAGE_BYTES: usize = 32 << 20;
/// Bytes that a connection reads ahead of its current message.
const READ_AHEAD_BYTES: usize = 16 << 10;
/// Bytes of unsent control frames in addition to a reply.
const UNSENT_BYTES: usize = 64 << 10;
/// Time for which a peer may accept nothing of what is sent.
const SEND_STALL: Duration = Duration::from_secs(10);
/// Interval between two checks of a connection.
const TICK: Duration = Duration::from_secs(1);
/// Pings and pongs of a peer between two checks, at most.
const CONTROL_FRAMES: u32 = 100;
/// Time in which the rest of a rejected message is read and thrown away, so that the peer reads the reason.
const LINGER: Duration = Duration::from_secs(5);
/// Reason in the close frame after a text frame with the error.
const SEE_TEXT: &str = "error: see the text frame before";

/// Lines of the queue above this number are websocket sessions; ZeroMQ's peers count from 1.
const LINES: u64 = 1 << 63;

/// State of the engine for sessions.
#[derive(Clone)]
pub(super) struct Shared {
    pub(super) queue: Arc<EngineQueue>,
    pub(super) versions: Arc<Versions>,
    pub(super) metrics: Arc<Metrics>,
    pub(super) stop: watch::Receiver<bool>,
}

/// Reason for the end of a session.
#[derive(Debug)]
enum End {
    /// The peer left.
    Left,
    /// The peer accepts nothing of what is sent.
    Slow,
    /// The connection made room for others.
    Evicted(Closed),
    /// The engine is shutting down.
    Stopped,
    /// A rejected request.
    Rejected {
        text: String,
        retry: bool,
        code: CloseCode,
        reason: Closed,
    },
}

impl End {
    fn rejected(text: String, reason: Closed) -> Self {
        Self::Rejected {
            text,
            retry: false,
            code: CloseCode::Error,
            reason,
        }
    }
}

impl From<JobError> for End {
    fn from(error: JobError) -> Self {
        let text = match &error {
            // causes of the device hold paths and names of the library
            JobError::Inference(cause) => {
                tracing::warn!("failed to answer a websocket client: {}", told(cause.as_ref()));
                error.to_string()
            }
            error => told(error),
        };
        Self::Rejected {
            text,
            retry: error.retry(),
            code: if matches!(error, JobError::Closed) {
                CloseCode::Away
            } else {
                CloseCode::Error
            },
            reason: Closed::Left,
        }
    }
}

impl From<RequestError> for End {
    fn from(error: RequestError) -> Self {
        Self::rejected(error.to_string(), Closed::Malformed)
    }
}

type Socket = WebSocketStream<Counted<TokioIo<Upgraded>>>;

/// A client's session.
pub(super) struct Session {
    socket: Socket,
    arrival: Arc<Arrival>,
    admission: Admission,
    shared: Shared,
    /// Line of the queue.
    line: u64,
    /// Key of the next chunk.
    key: NoiseKey,
    /// A request that arrived before the answer to the previous one; the socket is not read meanwhile.
    waiting: Option<Bytes>,
    previous: Option<Duration>,
    tick: Interval,
    control_frames: u32,
}

impl Session {
    /// Starts a session; `number` counts the sessions from 0.
    pub(super) async fn new(
        upgraded: Upgraded,
        arrival: Arc<Arrival>,
        admission: Admission,
        shared: Shared,
        policy: &Policy,
        number: u64,
    ) -> Self {
        let manifest = policy.manifest();
        let reply = 4 * manifest.dims.action_horizon * manifest.env_action_dim + REPLY_OVERHEAD;
        let config = WebSocketConfig::default()
            .read_buffer_size(READ_AHEAD_BYTES)
            .write_buffer_size(0)
            .max_write_buffer_size(reply + UNSENT_BYTES)
            .max_message_size(Some(MESSAGE_BYTES))
            .max_frame_size(Some(MESSAGE_BYTES));
        let stream = Counted::new(TokioIo::new(upgraded), Arc::clone(&arrival));
        let mut tick = interval(TICK);
        tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
        Self {
            socket: WebSocketStream::from_raw_socket(stream, Role::Server, Some(config)).await,
            arrival,
            admission,
            shared,
            line: LINES | number,
            key: NoiseKey {
                seed: 0,
                env: 0,
                episode: number,
                chunk: 0,
            },
            waiting: None,
            previous: None,
            tick,
            control_frames: 0,
        }
    }

    /// Runs the session until its end.
    pub(super) async fn run(mut self, policy: Arc<Policy>) {
        let Err(end) = self.serve(policy).await;
        // at most one request
        drop(self.shared.queue.remove_client(self.line));
        let reason = self.end(end).await;
        self.admission.leave(reason);
    }

    async fn serve(&mut self, policy: Arc<Policy>) -> Result<Infallible, End> {
        let metadata = reply::metadata(policy.manifest(), self.key).map_err(|error| unencodable(&error))?;
        drop(policy);
        self.send(Message::Binary(metadata.into())).await?;
        loop {
            let message = self.receive().await?;
            let begun = Instant::now();
            self.admission.active();
            self.shared.metrics.messages.with_label_values(&["observation"]).inc();
            let reply = self.answer(message).await?;
            self.send(Message::Binary(reply.into())).await?;
            self.previous = Some(begun.elapsed());
        }
    }

    /// Returns the next request.
    async fn receive(&mut self) -> Result<Bytes, End> {
        if let Some(message) = self.waiting.take() {
            return Ok(message);
        }
        let mut stop = self.shared.stop.clone();
        loop {
            tokio::select! {
                input = self.input() => {
                    if let Some(message) = input? {
                        return Ok(message);
                    }
                }
                _ = stop.wait_for(|stop| *stop) => return Err(End::Stopped),
            }
        }
    }

    /// Waits for one event of the connection; returns a complete request. Safe to cancel.
    async fn input(&mut self) -> Result<Option<Bytes>, End> {
        tokio::select! {
            message = self.socket.next() => self.message(message),
            _ = self.tick.tick() => {
                self.control_frames = 0;
                match self.arrival.late() {
                    Some((bytes, elapsed)) => Err(End::rejected(
                        format!(
                            "a message did not arrive in time: {bytes} bytes came within {:.0} s",
                            elapsed.as_secs_f64()
                        ),
                        Closed::Late,
                    )),
                    None => Ok(None),
                }
            }
            () = self.arrival.full() => Err(End::Rejected {
                text: "the messages of all clients need too much memory".to_owned(),
                retry: true,
                code: CloseCode::Again,
                reason: Closed::Full,
            }),
            reason = self.admission.evicted() => Err(End::Evicted(reason)),
        }
    }

    fn message(&mut self, message: Option<Result<Message, SocketError>>) -> Result<Option<Bytes>, End> {
        match message {
            Some(Ok(Message::Binary(bytes))) => Ok(Some(bytes)),
            Some(Ok(Message::Text(_))) => Err(End::rejected(
                "found a text frame, expected a binary frame with a MessagePack map".to_owned(),
                Closed::Malformed,
            )),
            Some(Ok(Message::Ping(payload) | Message::Pong(payload))) => {
                self.arrival.control(payload.len());
                self.control_frames += 1;
                if self.control_frames > CONTROL_FRAMES {
                    let text = format!("found more than {CONTROL_FRAMES} pings and pongs within a second");
                    return Err(End::Rejected {
                        text,
                        retry: false,
                        code: CloseCode::Policy,
                        reason: Closed::Protocol,
                    });
                }
                Ok(None)
            }
            Some(Err(SocketError::Capacity(CapacityError::MessageTooLong { size, max_size }))) => Err(End::Rejected {
                text: format!("message of {size} bytes, at most {max_size} are accepted"),
                retry: false,
                code: CloseCode::Size,
                reason: Closed::Protocol,
            }),
            Some(Err(SocketError::Protocol(ProtocolError::ResetWithoutClosingHandshake))) => Err(End::Left),
            Some(Err(error @ (SocketError::Protocol(_) | SocketError::Utf8(_) | SocketError::AttackAttempt))) => {
                Err(End::Rejected {
                    text: format!("the websocket protocol is broken: {error}"),
                    retry: false,
                    code: CloseCode::Protocol,
                    reason: Closed::Protocol,
                })
            }
            Some(Ok(Message::Close(_) | Message::Frame(_)) | Err(_)) | None => Err(End::Left),
        }
    }

    /// Returns the encoded reply to a request.
    async fn answer(&mut self, message: Bytes) -> Result<Vec<u8>, End> {
        let policy = self.shared.versions.live().ok_or(JobError::NotReady)?;
        let columns = policy.manifest().env_action_dim;
        let observation = if message.len() > LARGE_BYTES {
            let policy = Arc::clone(&policy);
            let decoded =
                tokio::task::spawn_blocking(move || observation::read(&message, policy.transform.cameras())).await;
            // the runtime ends
            decoded.map_err(|_ended| JobError::Closed)?
        } else {
            observation::read(&message, policy.transform.cameras())
        };
        self.arrival.settle();
        let row = Row {
            observation: observation?,
            key: self.key,
            mode: Mode::Eval,
            record: false,
            guidance: None,
        };
        drop(policy);
        let begun = Instant::now();
        let answer = self.infer(row).await?;
        let key = self.key;
        self.key.chunk = self.key.chunk.wrapping_add(1);
        let times = Times {
            infer: begun.elapsed(),
            previous: self.previous,
        };
        let actions = answer
            .rows
            .first()
            .map(|chunk| chunk.actions.as_slice())
            .unwrap_or_default();
        reply::reply(actions, columns, answer.version, key, times).map_err(|error| unencodable(&error))
    }

    /// Queues a row and waits for the answer, while the socket is read.
    async fn infer(&mut self, row: Row) -> Result<Answer, End> {
        let (reply, mut answer) = oneshot::channel();
        let mut displaced = Vec::new();
        let job = Job::of_client(self.line, vec![row], reply);
        let pushed = self.shared.queue.push_client(job, &mut displaced);
        for job in displaced {
            zmq::fail(job, JobError::Displaced);
        }
        if let Err(rejected) = pushed {
            let (error, job) = *rejected;
            drop(job);
            return Err(error.into());
        }
        loop {
            let open = self.waiting.is_none();
            tokio::select! {
                result = &mut answer => {
                    // a job that the queue dropped has no answer
                    let result: JobResult = result.unwrap_or(Err(JobError::Closed));
                    return Ok(result?);
                }
                input = self.input(), if open => self.waiting = input?,
            }
        }
    }

    async fn send(&mut self, message: Message) -> Result<(), End> {
        match timeout(SEND_STALL, self.socket.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(SocketError::WriteBufferFull(_))) | Err(_) => Err(End::Slow),
            Ok(Err(_)) => Err(End::Left),
        }
    }

    /// Sends what the peer should know about the end, and returns the reason for the counters.
    async fn end(&mut self, end: End) -> Closed {
        match end {
            End::Left => {
                // the answer to a close frame
                drop(timeout(TICK, self.socket.flush()).await);
                Closed::Left
            }
            End::Slow => Closed::Slow,
            End::Evicted(reason) => {
                self.close(CloseCode::Again, "the connection was idle and made room for another")
                    .await;
                reason
            }
            End::Stopped => {
                self.close(CloseCode::Away, "the engine is shutting down").await;
                Closed::Stopped
            }
            End::Rejected {
                text,
                retry,
                code,
                reason,
            } => {
                let kind = if retry { "overload" } else { "invalid" };
                self.shared.metrics.refused.with_label_values(&[kind]).inc();
                let text = if retry {
                    format!("{text} (retry: the same request may succeed later)")
                } else {
                    tracing::warn!("refused a websocket client: {text}");
                    text
                };
                if self.send(Message::Text(text.into())).await.is_ok() {
                    self.close(code, SEE_TEXT).await;
                    self.linger().await;
                }
                reason
            }
        }
    }

    async fn close(&mut self, code: CloseCode, reason: &'static str) {
        let frame = CloseFrame {
            code,
            reason: Utf8Bytes::from_static(reason),
        };
        // the peer may be gone
        drop(timeout(TICK, self.socket.close(Some(frame))).await);
    }

    /// Throws away what the peer still sends: a socket that is closed with unread bytes would reset the connection, and the peer
    /// could not read the reason.
    async fn linger(&mut self) {
        let mut stop = self.shared.stop.clone();
        let stream = self.socket.get_mut();
        stream.ignore();
        let discard = async {
            if stream.shutdown().await.is_err() {
                return;
            }
            let mut scratch = vec![0; 64 << 10];
            while matches!(stream.read(&mut scratch).await, Ok(1..)) {}
        };
        tokio::select! {
            _ = timeout(LINGER, discard) => {}
            _reason = self.admission.evicted() => {}
            _ = stop.wait_for(|stop| *stop) => {}
        }
    }
}

/// Returns the end of a session whose reply cannot be encoded; a defect.
fn unencodable(error: &rmp_serde::encode::Error) -> End {
    tracing::error!("failed to encode a reply: {error}");
    End::rejected("failed to encode the reply".to_owned(), Closed::Left)
}
