//! The ZeroMQ endpoint: requests of clients become jobs, answers are sent on the connection of the request.

use std::{error::Error, sync::Arc, time::Duration};

use policy::{bundle::Manifest, message::told};
use tokio::{sync::oneshot, task::JoinSet};
use wire::{
    array::Array,
    codec::{CodecError, MAX_FRAME_BYTES},
    messages::{ActReply, ActRequest, ActRow, ActedRow, FromEngine, Refusal},
    socket::{Peer, RouterSender, SocketError},
};

use super::rows::{self, RowError};
use crate::{
    device::versions::Policy,
    inference::{EngineQueue, Progress},
    job::{Answer, Chunk, Job, JobError, JobResult, Row, Ticket},
    metrics::Metrics,
};

/// Number of rows beyond which an answer is encoded on another thread.
const LARGE_ROWS: usize = 16;
/// Pause in reading from a client whose large request was rejected by a full queue; reading rejected requests slows other clients.
const OVERLOAD_REST: Duration = Duration::from_millis(250);

/// Sender of messages to peers, which counts refusals; cheap to clone.
#[derive(Debug, Clone)]
pub struct Replies {
    send: RouterSender,
    metrics: Arc<Metrics>,
}

impl Replies {
    /// Creates a sender over a socket.
    pub fn new(send: RouterSender, metrics: Arc<Metrics>) -> Self {
        Self { send, metrics }
    }

    /// Queues a message for a peer. A peer whose buffer is full is disconnected, which is a separate event.
    pub fn send(&self, peer: Peer, message: &FromEngine) {
        let sent = self.send.send(peer, message);
        // if an answer cannot be encoded, the client receives a refusal
        let sent = match (sent, message) {
            (Err(SocketError::Codec(error)), FromEngine::Acted(reply)) => {
                let refusal = Refusal {
                    request: Some(reply.request),
                    retry: false,
                    reason: format!("the answer is too long, ask for fewer rows or without records: {error}"),
                };
                self.send.send(peer, &FromEngine::Refused(refusal))
            }
            (sent, _) => sent,
        };
        if let Err(error) = sent {
            tracing::debug!("a peer did not get an answer: {error}");
        }
    }

    /// Refuses a message; `kind` is the label of the metric.
    pub fn refuse(&self, peer: Peer, refusal: Refusal, kind: &str) {
        self.metrics.refused.with_label_values(&[kind]).inc();
        if !refusal.retry {
            tracing::warn!("refused: {}", refusal.reason);
        }
        self.send(peer, &FromEngine::Refused(refusal));
    }

    /// Refuses a message that cannot be decoded.
    pub fn malformed(&self, peer: Peer, error: &CodecError) {
        let refusal = Refusal {
            request: None,
            retry: false,
            reason: format!("malformed frame: {error}"),
        };
        self.refuse(peer, refusal, "invalid");
    }

    fn acted(&self, peer: Peer, request: u64, answer: Answer, executed: Executed) {
        let reply = ActReply {
            request,
            version: answer.version,
            rows: answer.rows.into_iter().map(|chunk| executed.row(chunk)).collect(),
        };
        self.send(peer, &FromEngine::Acted(reply));
    }

    fn refuse_request(&self, peer: Peer, request: u64, error: &(dyn Error + 'static), retry: bool) {
        let refusal = Refusal {
            request: Some(request),
            retry,
            reason: told(error),
        };
        self.refuse(peer, refusal, if retry { "overload" } else { "invalid" });
    }
}

/// Sizes of the executed part of a chunk, `[action_chunk, env_action_dim]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Executed {
    /// Rows of an action chunk.
    pub action_chunk: usize,
    /// Width of the environment's action.
    pub env_action_dim: usize,
}

impl Executed {
    /// Returns the sizes for a policy's chunks.
    pub fn of(manifest: &Manifest) -> Self {
        Self {
            action_chunk: manifest.action_chunk,
            env_action_dim: manifest.env_action_dim,
        }
    }

    /// Returns the answer to a row: the actions to execute, and the chunk record.
    pub fn row(self, chunk: Chunk) -> ActedRow {
        let mut actions = chunk.actions;
        actions.truncate(self.action_chunk * self.env_action_dim);
        ActedRow {
            actions: Array::f32(&[self.action_chunk, self.env_action_dim], &actions),
            record: chunk.record,
        }
    }
}

/// Creates the job of a slot's question.
///
/// # Errors
/// The worker's observation does not match the policy.
pub fn slot_job(policy: &Policy, ticket: Ticket, row: ActRow) -> Result<Job<Progress>, RowError> {
    Ok(Job::of_slot(ticket, rows::row(row, policy.transform.cameras())?))
}

/// Pending requests of clients.
pub struct Clients {
    replies: Replies,
    queue: Arc<EngineQueue>,
    /// Tasks that wait for an answer.
    awaited: JoinSet<()>,
}

impl Clients {
    /// Creates an empty set of requests for a queue.
    pub fn new(replies: Replies, queue: Arc<EngineQueue>) -> Self {
        Self {
            replies,
            queue,
            awaited: JoinSet::new(),
        }
    }

    /// Queues a request of a client; the finished answer is sent to `peer`.
    pub fn act(&mut self, peer: Peer, request: ActRequest, live: Option<&Arc<Policy>>) {
        let (number, count) = (request.request, request.rows.len());
        let Some(policy) = live else {
            let refusal = Refusal {
                request: Some(number),
                retry: true,
                reason: JobError::NotReady.to_string(),
            };
            self.replies.refuse(peer, refusal, "not_ready");
            return;
        };
        let bytes: usize = request
            .rows
            .iter()
            .map(|row| answer_bytes(policy.manifest(), row.record))
            .sum();
        if bytes > MAX_FRAME_BYTES {
            let refusal = Refusal {
                request: Some(number),
                retry: false,
                reason: format!(
                    "the answer would have about {bytes} bytes, at most {MAX_FRAME_BYTES} are sent: ask for fewer rows or without records"
                ),
            };
            self.replies.refuse(peer, refusal, "invalid");
            dispose(request);
            return;
        }
        let cameras = policy.transform.cameras();
        let rows: Result<Vec<Row>, RowError> = request.rows.into_iter().map(|row| rows::row(row, cameras)).collect();
        let rows = match rows {
            Ok(rows) => rows,
            Err(error) => return self.replies.refuse_request(peer, number, &error, false),
        };
        let (reply, answer) = oneshot::channel();
        let mut displaced = Vec::new();
        let pushed = self
            .queue
            .push_client(Job::of_client(peer.into(), rows, reply), &mut displaced);
        match pushed {
            Ok(()) => self.deliver_when_done(peer, number, policy, answer),
            Err(rejected) => {
                let (error, job) = *rejected;
                if error.retry() && count > LARGE_ROWS {
                    self.replies.send.rest(peer, OVERLOAD_REST);
                }
                self.replies.refuse_request(peer, number, &error, error.retry());
                dispose(job);
            }
        }
        for job in displaced {
            fail(job, JobError::Displaced);
        }
    }

    fn deliver_when_done(
        &mut self,
        peer: Peer,
        request: u64,
        policy: &Arc<Policy>,
        answer: oneshot::Receiver<JobResult>,
    ) {
        while self.awaited.try_join_next().is_some() {}
        let replies = self.replies.clone();
        let executed = Executed::of(policy.manifest());
        self.awaited.spawn(async move {
            // a job that the queue dropped has no answer
            let result = answer.await.unwrap_or(Err(JobError::Closed));
            match result {
                Ok(answer) if answer.rows.len() > LARGE_ROWS => {
                    let sent = tokio::task::spawn_blocking(move || replies.acted(peer, request, answer, executed));
                    if let Err(error) = sent.await {
                        tracing::error!("an answer of many rows was not sent: {error}");
                    }
                }
                Ok(answer) => replies.acted(peer, request, answer, executed),
                Err(error) => replies.refuse_request(peer, request, &error, error.retry()),
            }
        });
    }

    /// Drops the queued requests of a disconnected client.
    pub fn left(&self, peer: Peer) {
        let jobs = self.queue.remove_client(peer.into());
        if !jobs.is_empty() {
            dispose(jobs);
        }
    }

    /// Waits until all ready answers are queued for sending.
    pub async fn flush(&mut self) {
        while self.awaited.join_next().await.is_some() {}
    }
}

/// Answers a job with an error, and frees the job on another thread.
pub fn fail(job: Job<Progress>, error: JobError) {
    let Job {
        rows, reply, progress, ..
    } = job;
    if reply.send(Err(error)).is_some() {
        tracing::error!("a job of a slot was dropped");
    }
    dispose((rows, progress));
}

/// Returns the approximate bytes of the answer to a row.
fn answer_bytes(manifest: &Manifest, record: bool) -> usize {
    let (dims, chunk) = (&manifest.dims, 4 * manifest.action_chunk * manifest.env_action_dim);
    if !record {
        return chunk;
    }
    let side = dims.vision.image_size;
    let path = 4 * (manifest.sampling.num_steps + 1) * dims.action_horizon * dims.action_dim;
    chunk + dims.cameras * side * side * 3 + path
}

/// Frees rows on another thread: to free thousands of observations takes milliseconds, which would block the loop.
fn dispose<T: Send + 'static>(rows: T) {
    tokio::task::spawn_blocking(move || drop(rows));
}
