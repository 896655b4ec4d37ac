//! Messages of the ring.
//!
//! Three links: env worker and engine ([`ToEngine`], [`FromEngine`]), a robot or another client on the same endpoint
//! ([`ToEngine::Act`], [`FromEngine::Acted`]), engine and learner ([`ToLearner`], [`FromLearner`]).
//!
//! An env worker owns *slots*. A slot is idle until the engine sends [`Command::Reset`]; the worker resets the environment and
//! reports the first observation. The engine sends [`Command::Act`]; the worker executes the chunk and reports the outcome and
//! the next observation. The report at the end of an episode carries the last observation, whose value the engine estimates.
//! A terminated episode may omit the last observation. After termination or truncation the slot is idle again.
//!
//! Commands and reports come in any order and any grouping, also for some slots only. An empty report is a heartbeat. An engine
//! that does not know the worker refuses the heartbeat with `retry`, and the worker registers again.

use policy::{bundle::BundleFile, noise::NoiseKey};
use serde::{Deserialize, Serialize};

use crate::{
    array::Array,
    text::{at_most, name, prompt},
};

/// Most cameras of an observation.
pub const MAX_CAMERAS: usize = 16;
/// Most slots of one worker, and therefore most reports of one message.
pub const MAX_SLOTS: usize = 4096;

/// Observation of a robot or simulator.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Observation {
    /// One u8 array `[height, width, 3]` (RGB) per camera of the policy, in its order; `None` for an absent camera.
    #[serde(deserialize_with = "at_most::<_, _, MAX_CAMERAS>")]
    pub images: Vec<Option<Array>>,
    /// Proprioceptive state in the environment's units.
    pub state: Vec<f32>,
    /// Instruction, at most 8,192 bytes.
    #[serde(deserialize_with = "prompt")]
    pub prompt: String,
}

/// Outcome of an executed action chunk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outcome {
    /// Reward of each executed env step; shorter than the chunk if the episode ended within the chunk.
    pub rewards: Vec<f32>,
    /// Whether the task ended (goal or failure); no value is bootstrapped.
    pub terminated: bool,
    /// Whether the time limit ended the episode; the value of the last observation is bootstrapped.
    pub truncated: bool,
    /// Whether the goal is reached.
    pub success: bool,
    /// Rendered images `[height, width, 3]`, one per env step, if the reset requested a video.
    pub frames: Vec<Array>,
}

/// Report of one slot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotReport {
    /// Slot number within the worker.
    pub slot: u32,
    /// Outcome of the last chunk; `None` after a reset and for an idle slot.
    pub outcome: Option<Outcome>,
    /// Current observation, or the last of an ended episode; `None` for an idle slot, allowed after termination.
    pub observation: Option<Observation>,
}

/// Registration of an env worker with the engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// Name that a worker keeps across reconnects; registering again restarts the worker's unfinished episodes.
    /// At most 128 bytes, without control characters.
    #[serde(deserialize_with = "name")]
    pub client: String,
    /// Environment name, for the log; at most 128 bytes, without control characters.
    #[serde(deserialize_with = "name")]
    pub env: String,
    /// Width of the environment's action; the engine refuses a width that differs from the policy's.
    pub action_dim: u32,
    /// Number of slots, numbered from 0.
    pub slots: u32,
}

/// Sampling mode of action chunks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// Sampling with the stochastic denoise steps of the policy's configuration, which are recorded.
    Train,
    /// Sampling with deterministic (ODE) denoise steps only.
    Eval,
}

/// One observation of a client that resets itself (a robot, a replay).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActRow {
    /// Observation of the client.
    pub observation: Observation,
    /// Noise key; a robot counts its chunks in the key.
    pub key: NoiseKey,
    /// Sampling mode.
    pub mode: Mode,
    /// Whether the reply carries the chunk record.
    pub record: bool,
    /// Chunk that the client is still executing; only in [`Mode::Eval`] without a record.
    pub guidance: Option<Guidance>,
}

/// Chunk that a client still executes while waiting; the new chunk joins without a jump (real-time chunking).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guidance {
    /// Actions not yet executed when the observation was made, f32 `[rows, env_action_dim]` in the environment's units.
    pub previous: Array,
    /// Rows of `previous` that will have been executed when the reply arrives: fixed, while later rows may change.
    pub delay: u32,
    /// Largest weight of the correction after a denoise step, above 0; the reference uses 5.
    pub max_weight: f32,
}

/// Request for action chunks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActRequest {
    /// Number that the reply repeats.
    pub request: u64,
    /// Observations; one policy version answers all rows.
    pub rows: Vec<ActRow>,
}

/// Message from env workers and clients to the engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToEngine {
    /// Registration: the first message of a worker, repeated after every reconnect.
    Hello(Hello),
    /// Reports of slots.
    Reports(#[serde(deserialize_with = "at_most::<_, _, MAX_SLOTS>")] Vec<SlotReport>),
    /// Request of a client.
    Act(ActRequest),
}

/// Reset ordered by the learner.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reset {
    /// Seed of the run.
    pub seed: u64,
    /// Environment number; selects the episode's random stream, not the slot.
    pub env: u32,
    /// Episode number.
    pub episode: u64,
    /// Start state shared by a GRPO group; replaces env and episode as the key of the reset.
    pub reset_state: Option<u64>,
    /// Task number of a multi-task environment.
    pub task: Option<u32>,
    /// GRPO group.
    pub group: Option<u32>,
    /// Whether to send rendered frames.
    pub video: bool,
}

/// Command to a slot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Start of an episode.
    Reset(Reset),
    /// Actions to execute, f32 `[action_chunk, env_action_dim]` in the environment's units.
    Act(Array),
}

/// Command with its slot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotCommand {
    /// Slot number within the worker.
    pub slot: u32,
    /// Reset or actions.
    pub command: Command,
}

/// Reply of the engine to [`Hello`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Welcome {
    /// Live policy version.
    pub version: u64,
    /// Rows of an action chunk.
    pub action_chunk: u32,
    /// Width of an action.
    pub env_action_dim: u32,
    /// Camera names in the order of [`Observation::images`].
    pub cameras: Vec<String>,
}

/// Record of one chunk: inputs, denoise chain, log-probabilities and values.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkRecord {
    /// Noise key.
    pub key: NoiseKey,
    /// Policy version of all denoise steps.
    pub version: u64,
    /// Pixels at the input of the network, u8 `[cameras, size, size, 3]`.
    pub images: Array,
    /// Whether each camera was present.
    pub image_mask: Vec<bool>,
    /// Prompt ids, padded.
    pub prompt: Vec<i64>,
    /// Which prompt ids are valid.
    pub prompt_mask: Vec<bool>,
    /// Normalized, padded state, f32 `[action_dim]`.
    pub state: Array,
    /// Indices of the `S` stochastic denoise steps, in order; empty in evaluation.
    pub denoise_steps: Vec<u32>,
    /// `x` before each step and after the last, f32 `[num_steps + 1, action_horizon, action_dim]`.
    pub chain: Array,
    /// Log-probability per element of each stochastic step, f32 `[S, action_chunk, env_action_dim]`; `None` in evaluation.
    pub logprob: Option<Array>,
    /// Value estimates: one per stochastic denoise step where `V_expert` is evaluated per step, otherwise one; empty without a
    /// critic.
    pub values: Vec<f32>,
}

/// One row of a reply to a client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActedRow {
    /// f32 `[action_chunk, env_action_dim]` in the environment's units.
    pub actions: Array,
    /// Chunk record, if requested.
    pub record: Option<Box<ChunkRecord>>,
}

/// Reply to a client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActReply {
    /// Number of the request.
    pub request: u64,
    /// Policy version of all rows.
    pub version: u64,
    /// Rows in the order of the request.
    pub rows: Vec<ActedRow>,
}

/// Refusal of a request or another message.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// Number of the request; `None` if the number could not be read.
    pub request: Option<u64>,
    /// Whether the same request may succeed later (overload).
    pub retry: bool,
    /// What was expected and what was found.
    pub reason: String,
}

/// Message from the engine to env workers and clients.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromEngine {
    /// Reply to [`ToEngine::Hello`].
    Welcome(Welcome),
    /// Commands for slots.
    Commands(Vec<SlotCommand>),
    /// Reply to [`ToEngine::Act`].
    Acted(ActReply),
    /// Refusal of a message.
    Refused(Refusal),
}

/// One executed chunk of a trajectory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrajectoryChunk {
    /// The record; `None` in evaluation.
    pub record: Option<Box<ChunkRecord>>,
    /// Reward of every executed env step.
    pub rewards: Vec<f32>,
    /// Video frames.
    pub frames: Vec<Array>,
}

/// Whole episode, as the learner receives it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trajectory {
    /// Number that the acknowledgment repeats; unique per engine session.
    pub id: u64,
    /// Name of the engine session.
    #[serde(deserialize_with = "name")]
    pub engine: String,
    /// Number of the order that requested the episode.
    pub order: u64,
    /// Reset that started the episode.
    pub reset: Reset,
    /// Sampling mode.
    pub mode: Mode,
    /// Instruction.
    pub prompt: String,
    /// Chunks in order.
    pub chunks: Vec<TrajectoryChunk>,
    /// Whether the task ended (true) or the time limit was reached (false).
    pub terminated: bool,
    /// Whether the goal was reached.
    pub success: bool,
    /// Value estimate of the last observation. `None` without a critic; also `None` for a terminated episode, unless the run
    /// estimates values of terminated episodes.
    pub final_value: Option<f32>,
}

/// State of an engine and heartbeat, sent on connect and then regularly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineState {
    /// Session name, unique per start; at most 128 bytes, without control characters.
    #[serde(deserialize_with = "name")]
    pub engine: String,
    /// Live version; `None` before the first bundle.
    pub version: Option<u64>,
    /// Newest order that the engine has received.
    pub order: Option<u64>,
    /// Number of slots of all registered workers.
    pub slots: u32,
}

/// Request for a part of a bundle's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fetch {
    /// Version of the bundle.
    pub version: u64,
    /// File name in the bundle.
    pub file: String,
    /// Offset of the first byte in the file.
    pub offset: u64,
}

/// Result of reloading an announced version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReloadReport {
    /// Name of the engine session.
    #[serde(deserialize_with = "name")]
    pub engine: String,
    /// The announced version.
    pub version: u64,
    /// Reason for the refusal; `None` if the version is live.
    pub refused: Option<String>,
    /// Seconds from the announcement until the version is live or refused.
    pub seconds: f64,
}

/// Message from an engine to the learner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToLearner {
    /// State and heartbeat.
    State(EngineState),
    /// Request for a part of a file.
    Fetch(Fetch),
    /// Result of a reload.
    Reload(ReloadReport),
    /// An episode; sent again until acknowledged.
    Trajectory(Box<Trajectory>),
}

/// Announcement of a new policy version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Announce {
    /// Version to fetch.
    pub version: u64,
    /// Files of the bundle, `manifest.json` included.
    pub files: Vec<BundleFile>,
}

/// Part of a bundle's file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilePart {
    /// Version of the bundle.
    pub version: u64,
    /// File name.
    pub file: String,
    /// Offset of the first byte in the file.
    pub offset: u64,
    /// The bytes; empty when the learner does not have the file.
    #[serde(with = "serde_bytes")]
    pub data: Vec<u8>,
}

/// Episodes ordered from one range of policy versions; parked until a version in the range is live. Each chunk comes from one
/// version in the range. Chunks of one episode may come from several versions where the range has several (asynchronous training).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Batch {
    /// Oldest version that may produce chunks of the batch.
    pub oldest: u64,
    /// Newest version that may produce chunks; synchronous training and evaluation allow one version only.
    pub newest: u64,
    /// Sampling mode.
    pub mode: Mode,
    /// Resets, one per episode.
    pub resets: Vec<Reset>,
}

/// Order of episodes for an engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// Number of the order, increasing.
    pub order: u64,
    /// Whether the engine drops its pending episodes. Otherwise the order adds to the pending episodes: evaluations before,
    /// training after.
    pub replaces: bool,
    /// Batches by priority: of the batches that may start, the first in the list starts first.
    pub batches: Vec<Batch>,
}

/// Message from the learner to an engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromLearner {
    /// Announcement of a version that can be fetched.
    Announce(Announce),
    /// Part of a bundle's file.
    FilePart(FilePart),
    /// Order of episodes.
    Order(Order),
    /// Numbers of trajectories that arrived.
    Ack(Vec<u64>),
}
