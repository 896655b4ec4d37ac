//! Jobs for the policy: rows that are answered together, and who waits for the answer. No transport and no device in here.

use std::{collections::VecDeque, error::Error, sync::Arc, time::Instant};

use policy::{
    noise::NoiseKey,
    transform::{ObservationError, RawGuidance, RawObservation},
};
use tokio::sync::oneshot;
use wire::messages::{ChunkRecord, Mode};

/// One observation that asks for an action chunk.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The observation.
    pub observation: RawObservation,
    /// Key of the chunk's noise.
    pub key: NoiseKey,
    /// How the chunk is sampled.
    pub mode: Mode,
    /// Whether the answer carries the chunk record.
    pub record: bool,
    /// The chunk that the client is executing; in [`Mode::Eval`] without a record only.
    pub guidance: Option<RawGuidance>,
}

impl Row {
    /// Returns the bytes of the observation and what comes with it.
    fn bytes(&self) -> usize {
        let seen = &self.observation;
        let images: usize = seen.images.values().map(|image| image.data().len()).sum();
        let guidance = self.guidance.as_ref().map_or(0, |guidance| guidance.previous.len());
        images + 4 * (seen.state.len() + guidance) + seen.prompt.len()
    }
}

/// The answer to a row.
#[derive(Debug, Clone, PartialEq)]
pub struct Chunk {
    /// Actions in the environment's units, `[action_horizon, env_action_dim]`.
    pub actions: Vec<f32>,
    /// The value of the observation, with a critic.
    pub value: Option<f32>,
    /// The record, when asked for.
    pub record: Option<Box<ChunkRecord>>,
}

/// The answer to a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Policy version of all rows.
    pub version: u64,
    /// In the order of the job.
    pub rows: Vec<Chunk>,
}

/// Why a job has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// A row that the policy cannot read.
    #[error(transparent)]
    Observation(#[from] ObservationError),
    /// A guided chunk is not a sample of the policy.
    #[error("a guided chunk is not a sample of the policy: ask for it in mode `eval` and without a record")]
    Guided,
    /// The policy's actions are not finite.
    #[error("the policy gave {value} at element {index} of the denoise chain")]
    NotFinite {
        /// Which element.
        index: usize,
        /// NaN or infinity.
        value: f32,
    },
    /// The statistics do not fit.
    #[error(transparent)]
    Norm(#[from] policy::norm::NormError),
    /// The device failed; another batch, or another version, may succeed.
    #[error("inference failed")]
    Inference(#[source] Arc<dyn Error + Send + Sync>),
    /// No policy is live.
    #[error("no policy is live yet")]
    NotReady,
    /// Too many rows wait.
    #[error("overloaded: {waiting} of {capacity} rows wait, ask again")]
    Overloaded {
        /// Rows that wait.
        waiting: usize,
        /// Rows that may wait.
        capacity: usize,
    },
    /// The job made room for others.
    #[error("overloaded: the request made room for clients that wait for less, ask again")]
    Displaced,
    /// A request that can never fit.
    #[error("request has {rows} rows, expected 1 to {capacity} (`rollout.queue_capacity`)")]
    Size {
        /// Its rows.
        rows: usize,
        /// Rows that may wait.
        capacity: usize,
    },
    /// The version that began a large job is not kept any more.
    #[error(
        "version {version} was replaced twice while the request was answered in parts: ask again, or for fewer rows"
    )]
    Replaced {
        /// Which version.
        version: u64,
    },
    /// The engine is leaving.
    #[error("the engine is shutting down")]
    Closed,
}

impl JobError {
    /// Whether the same request may succeed later.
    pub fn retry(&self) -> bool {
        match self {
            Self::Observation(_) | Self::Guided | Self::NotFinite { .. } | Self::Norm(_) | Self::Size { .. } => false,
            Self::Inference(_)
            | Self::NotReady
            | Self::Overloaded { .. }
            | Self::Displaced
            | Self::Replaced { .. }
            | Self::Closed => true,
        }
    }
}

/// The result of a job.
pub type JobResult = Result<Answer, JobError>;

/// A question of an env worker's slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ticket {
    /// The present chunk of an episode.
    Chunk(u64),
    /// The value of the last observation of a finished episode.
    Bootstrap(u64),
}

impl Ticket {
    /// Returns its number.
    pub fn number(self) -> u64 {
        match self {
            Self::Chunk(number) | Self::Bootstrap(number) => number,
        }
    }
}

/// Who waits for the result of a [`Job`].
#[derive(Debug)]
pub enum Reply {
    /// A slot of an env worker; its job has one row.
    Ticket(Ticket),
    /// One receiver.
    Once(oneshot::Sender<JobResult>),
}

impl Reply {
    /// Sends a result to a receiver, or returns it for a ticket. A receiver that is gone is passed over.
    pub fn send(self, result: JobResult) -> Option<(Ticket, JobResult)> {
        match self {
            Self::Ticket(ticket) => Some((ticket, result)),
            Self::Once(sender) => {
                drop(sender.send(result));
                None
            }
        }
    }
}

/// The line of the env workers' slots; other lines are numbered from 1.
pub const SLOTS: u64 = 0;

/// Rows that are answered together, by one policy version. `P` is what a large job carries from one part to the next.
#[derive(Debug)]
pub struct Job<P = ()> {
    /// The rows that are not prepared yet, in the order of the answer.
    pub rows: VecDeque<Row>,
    /// The line in which it waits: [`SLOTS`], or the number of a client.
    pub line: u64,
    /// Who waits.
    pub reply: Reply,
    /// When it was queued.
    pub queued: Instant,
    /// The parts that are answered.
    pub progress: Option<P>,
    /// Bytes of its rows.
    pub bytes: usize,
}

impl<P> Job<P> {
    /// Makes the job of a client.
    pub fn of_client(line: u64, rows: Vec<Row>, reply: oneshot::Sender<JobResult>) -> Self {
        Self::new(line, rows, Reply::Once(reply))
    }

    /// Makes the job of a slot.
    pub fn of_slot(ticket: Ticket, row: Row) -> Self {
        Self::new(SLOTS, vec![row], Reply::Ticket(ticket))
    }

    fn new(line: u64, rows: Vec<Row>, reply: Reply) -> Self {
        Self {
            bytes: rows.iter().map(Row::bytes).sum(),
            rows: rows.into(),
            line,
            reply,
            queued: Instant::now(),
            progress: None,
        }
    }
}
