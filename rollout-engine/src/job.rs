//! Jobs for the policy: rows that are answered together, and the receiver of the answer. Independent of transport and device.

use std::{collections::VecDeque, error::Error, sync::Arc, time::Instant};

use policy::{
    noise::NoiseKey,
    transform::{ObservationError, RawGuidance, RawObservation},
};
use tokio::sync::oneshot;
use wire::messages::{ChunkRecord, Mode};

/// An observation for which an action chunk is requested.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// The observation.
    pub observation: RawObservation,
    /// Key of the chunk's noise.
    pub key: NoiseKey,
    /// Sampling mode of the chunk.
    pub mode: Mode,
    /// Whether the answer contains the chunk record.
    pub record: bool,
    /// The chunk that the client is executing; only in [`Mode::Eval`] without a record.
    pub guidance: Option<RawGuidance>,
}

impl Row {
    /// Returns the bytes of images, state, guidance and prompt.
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
    /// The value of the observation; `None` without a critic.
    pub value: Option<f32>,
    /// The chunk record, if requested.
    pub record: Option<Box<ChunkRecord>>,
}

/// The answer to a job.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// Policy version of all rows.
    pub version: u64,
    /// Chunks in the order of the job's rows.
    pub rows: Vec<Chunk>,
}

/// Reason why a job has no answer.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum JobError {
    /// A row is invalid for the policy.
    #[error(transparent)]
    Observation(#[from] ObservationError),
    /// A guided chunk was requested in a mode other than `eval` or with a record.
    #[error("a guided chunk is not a sample of the policy: ask for it in mode `eval` and without a record")]
    Guided,
    /// The critic reads the first image, which is absent; graphs of flavour `cuda` have no token for an absent image.
    #[error("the image of camera `{camera}` is absent, but the critic of this policy reads its first token")]
    FirstCamera {
        /// Name of the first camera.
        camera: String,
    },
    /// The policy's actions are not finite.
    #[error("the policy gave {value} at element {index} of the denoise chain")]
    NotFinite {
        /// Index of the element in the denoise chain.
        index: usize,
        /// NaN or infinity.
        value: f32,
    },
    /// An action is not finite in the environment's units.
    #[error(
        "the action of row {row}, dimension {dimension}, is {value} in the robot's units, expected a finite number: check the statistics"
    )]
    NotFiniteAction {
        /// Row of the chunk.
        row: usize,
        /// Dimension of the action.
        dimension: usize,
        /// NaN or infinity.
        value: f32,
    },
    /// The normalization statistics do not match the row.
    #[error(transparent)]
    Norm(#[from] policy::norm::NormError),
    /// The device failed; another batch, or another version, may succeed.
    #[error("inference failed")]
    Inference(#[source] Arc<dyn Error + Send + Sync>),
    /// No policy version is live.
    #[error("no policy is live yet")]
    NotReady,
    /// Too many rows are waiting.
    #[error("overloaded: {waiting} of {capacity} rows wait, ask again")]
    Overloaded {
        /// Waiting rows.
        waiting: usize,
        /// Maximum number of waiting rows.
        capacity: usize,
    },
    /// The job was displaced by jobs of other clients.
    #[error("overloaded: the request made room for clients that wait for less, ask again")]
    Displaced,
    /// The request has no rows, or more rows than the queue's capacity.
    #[error("request has {rows} rows, expected 1 to {capacity} (`rollout.queue_capacity`)")]
    Size {
        /// Rows of the request.
        rows: usize,
        /// Maximum number of waiting rows.
        capacity: usize,
    },
    /// The version that answered the first part of a large job was dropped.
    #[error(
        "version {version} was replaced twice while the request was answered in parts: ask again, or for fewer rows"
    )]
    Replaced {
        /// The dropped version.
        version: u64,
    },
    /// The engine is shutting down.
    #[error("the engine is shutting down")]
    Closed,
}

impl JobError {
    /// Returns whether the same request may succeed later.
    pub fn retry(&self) -> bool {
        match self {
            Self::Observation(_)
            | Self::FirstCamera { .. }
            | Self::Guided
            | Self::NotFinite { .. }
            | Self::NotFiniteAction { .. }
            | Self::Norm(_)
            | Self::Size { .. } => false,
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

/// A request of an env worker's slot.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ticket {
    /// The current chunk of an episode.
    Chunk(u64),
    /// The value of the last observation of a finished episode.
    Bootstrap(u64),
}

impl Ticket {
    /// Returns the number of the ticket.
    pub fn number(self) -> u64 {
        match self {
            Self::Chunk(number) | Self::Bootstrap(number) => number,
        }
    }
}

/// Receiver of the result of a [`Job`].
#[derive(Debug)]
pub enum Reply {
    /// A slot of an env worker; its job has one row.
    Ticket(Ticket),
    /// A client's request.
    Once(oneshot::Sender<JobResult>),
}

impl Reply {
    /// Sends a result to a receiver, or returns the result for a ticket. A closed receiver is ignored.
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

/// The line of the env workers' slots; lines of clients are numbered from 1.
pub const SLOTS: u64 = 0;

/// Rows that are answered together, by one policy version. `P` is the state of a large job between two parts.
#[derive(Debug)]
pub struct Job<P = ()> {
    /// The rows that are not prepared yet, in the order of the answer.
    pub rows: VecDeque<Row>,
    /// The line of the job: [`SLOTS`], or the number of a client.
    pub line: u64,
    /// Receiver of the result.
    pub reply: Reply,
    /// When the job was queued.
    pub queued: Instant,
    /// The answered parts of a large job.
    pub progress: Option<P>,
    /// Bytes of the rows.
    pub bytes: usize,
}

impl<P> Job<P> {
    /// Creates the job of a client.
    pub fn of_client(line: u64, rows: Vec<Row>, reply: oneshot::Sender<JobResult>) -> Self {
        Self::new(line, rows, Reply::Once(reply))
    }

    /// Creates the job of a slot.
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
