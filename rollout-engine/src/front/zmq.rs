//! The ZeroMQ endpoint: requests of clients become jobs, answers go back to the connection that asked.

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

/// An answer of more rows is encoded on another thread.
const LARGE_ROWS: usize = 16;
/// A client whose large request found no place is heard again after so long: reading what cannot be served costs the others.
const OVERLOAD_REST: Duration = Duration::from_millis(250);

/// Sends messages to peers and counts what is refused; cheap to clone.
#[derive(Debug, Clone)]
pub struct Replies {
    send: RouterSender,
    metrics: Arc<Metrics>,
}

impl Replies {
    /// Makes replies over a socket.
    pub fn new(send: RouterSender, metrics: Arc<Metrics>) -> Self {
        Self { send, metrics }
    }

    /// Queues a message for a peer. One that does not take it is disconnected, which is an event of its own.
    pub fn send(&self, peer: Peer, message: &FromEngine) {
        let sent = self.send.send(peer, message);
        // a request whose answer cannot be sent is not left without one
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

    /// Refuses a message; `kind` is the metric's label.
    pub fn refuse(&self, peer: Peer, refusal: Refusal, kind: &str) {
        self.metrics.refused.with_label_values(&[kind]).inc();
        if !refusal.retry {
            tracing::warn!("refused: {}", refusal.reason);
        }
        self.send(peer, &FromEngine::Refused(refusal));
    }

    /// Refuses a message that is not one of the protocol.
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

/// The executed part of a chunk, `[action_chunk, env_action_dim]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Executed {
    /// Rows of an action chunk.
    pub action_chunk: usize,
    /// Width of the environment's action.
    pub env_action_dim: usize,
}

impl Executed {
    /// Returns the executed part of a policy's chunks.
    pub fn of(manifest: &Manifest) -> Self {
        Self {
            action_chunk: manifest.action_chunk,
            env_action_dim: manifest.env_action_dim,
        }
    }

    /// Returns what a worker or client gets for a row: the actions to execute, and the record.
    pub fn row(self, chunk: Chunk) -> ActedRow {
        let mut actions = chunk.actions;
        actions.truncate(self.action_chunk * self.env_action_dim);
        ActedRow {
            actions: Array::f32(&[self.action_chunk, self.env_action_dim], &actions),
            record: chunk.record,
        }
    }
}

/// Makes the job of a slot's question.
///
/// # Errors
/// The worker's observation is not one of the policy.
pub fn slot_job(policy: &Policy, ticket: Ticket, row: ActRow) -> Result<Job<Progress>, RowError> {
    Ok(Job::of_slot(ticket, rows::row(row, policy.transform.cameras())?))
}

/// Clients and their requests.
pub struct Clients {
    replies: Replies,
    queue: Arc<EngineQueue>,
    /// Answers that are awaited.
    awaited: JoinSet<()>,
}

impl Clients {
    /// Makes the clients of a queue.
    pub fn new(replies: Replies, queue: Arc<EngineQueue>) -> Self {
        Self {
            replies,
            queue,
            awaited: JoinSet::new(),
        }
    }

    /// Queues a request of a client. Its answer goes to `peer` when it is there.
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
            // a job whose queue has gone has no answer
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

    /// Forgets a client that has left: what it waits for is not computed.
    pub fn left(&self, peer: Peer) {
        let jobs = self.queue.remove_client(peer.into());
        if !jobs.is_empty() {
            dispose(jobs);
        }
    }

    /// Waits until all answers that are there are queued to their clients.
    pub async fn flush(&mut self) {
        while self.awaited.join_next().await.is_some() {}
    }
}

/// Answers a job with an error, and frees it on another thread.
pub fn fail(job: Job<Progress>, error: JobError) {
    let Job {
        rows, reply, progress, ..
    } = job;
    if reply.send(Err(error)).is_some() {
        tracing::error!("a job of a slot was dropped");
    }
    dispose((rows, progress));
}

/// Returns about how many bytes the answer to a row has.
fn answer_bytes(manifest: &Manifest, record: bool) -> usize {
    let (dims, chunk) = (&manifest.dims, 4 * manifest.action_chunk * manifest.env_action_dim);
    if !record {
        return chunk;
    }
    let side = dims.vision.image_size;
    let path = 4 * (manifest.sampling.num_steps + 1) * dims.action_horizon * dims.action_dim;
    chunk + dims.cameras * side * side * 3 + path
}

/// Frees rows on another thread: thousands of observations take milliseconds, in which the loop would stand still.
fn dispose<T: Send + 'static>(rows: T) {
    tokio::task::spawn_blocking(move || drop(rows));
}
