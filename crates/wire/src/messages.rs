//! The messages of the ring.
//!
//! Three roads: env worker and engine ([`ToEngine`], [`FromEngine`]), a robot or another client on the same endpoint
//! ([`ToEngine::Act`], [`FromEngine::Acted`]), engine and learner ([`ToLearner`], [`FromLearner`]).
//!
//! An env worker owns *slots*. A slot is idle until the engine sends a [`Command::Reset`]; the worker resets and reports the
//! first observation; the engine answers with [`Command::Act`]; the worker executes the chunk and reports outcome and next
//! observation. A finished episode carries its last (the engine estimates its value; a terminated one may leave it out).
//! After either the slot is idle again. Answers come in any order and any grouping, also only for some slots. An empty report is a
//! sign of life; an engine that does not know the worker refuses it with `retry`, and the worker says hello again.

use policy::{bundle::BundleFile, noise::NoiseKey};
use serde::{Deserialize, Serialize};

use crate::{
    array::Array,
    text::{at_most, name, prompt},
};

/// Most cameras of an observation.
pub const MAX_CAMERAS: usize = 16;
/// Most slots of one worker, and so reports of one message.
pub const MAX_SLOTS: usize = 4096;

/// What a robot or simulator sees.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Observation {
    /// One u8 array `[height, width, 3]` (RGB) per camera of the policy, in its order; `None` for an absent camera.
    #[serde(deserialize_with = "at_most::<_, _, MAX_CAMERAS>")]
    pub images: Vec<Option<Array>>,
    /// Proprioceptive state in the environment's units.
    pub state: Vec<f32>,
    /// The instruction, at most 8,192 bytes.
    #[serde(deserialize_with = "prompt")]
    pub prompt: String,
}

/// What an executed chunk brought.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Outcome {
    /// Reward of every executed env step; shorter than the chunk when the episode ended in it.
    pub rewards: Vec<f32>,
    /// The task ended (goal or failure): no value beyond.
    pub terminated: bool,
    /// The time limit ended the episode: the value beyond is estimated.
    pub truncated: bool,
    /// The goal is reached.
    pub success: bool,
    /// Rendered images `[height, width, 3]` of every env step, when the reset asked for a video.
    pub frames: Vec<Array>,
}

/// One slot's report.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotReport {
    /// The worker's slot.
    pub slot: u32,
    /// What the last chunk brought; `None` after a reset and for an idle slot.
    pub outcome: Option<Outcome>,
    /// The present observation, after the end of an episode its last; `None` for an idle slot, allowed after termination.
    pub observation: Option<Observation>,
}

/// Who connects to the engine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Hello {
    /// Name that a worker keeps over reconnects: its unfinished episodes start anew when it says hello again.
    /// At most 128 bytes, without control characters.
    #[serde(deserialize_with = "name")]
    pub client: String,
    /// Environment name, for the log; of the same form.
    #[serde(deserialize_with = "name")]
    pub env: String,
    /// Width of the environment's action; the engine refuses one that differs from the policy's.
    pub action_dim: u32,
    /// Number of slots, numbered from 0.
    pub slots: u32,
}

/// How a client's chunk is sampled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Mode {
    /// With the stochastic denoise steps of the policy's sampling, recorded.
    Train,
    /// All ODE.
    Eval,
}

/// One observation of a client that resets itself (a robot, a replay).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActRow {
    /// What it sees.
    pub observation: Observation,
    /// Which noise; a robot counts its chunks here.
    pub key: NoiseKey,
    /// Sampling.
    pub mode: Mode,
    /// Whether the reply carries the chunk record.
    pub record: bool,
    /// What the client is still executing; in [`Mode::Eval`] without a record only.
    pub guidance: Option<Guidance>,
}

/// The chunk that a client executes while it waits: the new one goes on from it without a jump (real-time chunking).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Guidance {
    /// Its actions that were still to come when the observation was made, f32 `[rows, env_action_dim]` in the environment's units.
    pub previous: Array,
    /// How many of these rows will have been executed when the answer is there: they stand, the later ones may change.
    pub delay: u32,
    /// Largest weight of the correction after a denoise step, above 0; the reference's is 5.
    pub max_weight: f32,
}

/// A request for action chunks.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActRequest {
    /// Number that the reply repeats.
    pub request: u64,
    /// Observations; all are answered by the same policy version.
    pub rows: Vec<ActRow>,
}

/// From env workers and clients to the engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToEngine {
    /// First message of a worker, repeated after every reconnect.
    Hello(Hello),
    /// Reports of slots.
    Reports(#[serde(deserialize_with = "at_most::<_, _, MAX_SLOTS>")] Vec<SlotReport>),
    /// A client's request.
    Act(ActRequest),
}

/// A reset as the learner orders it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reset {
    /// Seed of the run.
    pub seed: u64,
    /// Environment number: names the episode's random numbers, not the slot.
    pub env: u32,
    /// Episode number.
    pub episode: u64,
    /// Start state shared by a GRPO group; replaces env and episode as the key of the reset.
    pub reset_state: Option<u64>,
    /// Task number of a multi-task environment.
    pub task: Option<u32>,
    /// GRPO group.
    pub group: Option<u32>,
    /// Send rendered frames.
    pub video: bool,
}

/// What a slot shall do.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Command {
    /// Start an episode.
    Reset(Reset),
    /// Execute these actions, f32 `[action_chunk, env_action_dim]` in the environment's units.
    Act(Array),
}

/// A command for one slot.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SlotCommand {
    /// The worker's slot.
    pub slot: u32,
    /// What to do.
    pub command: Command,
}

/// The engine's answer to [`Hello`].
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

/// Everything about one recorded chunk.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ChunkRecord {
    /// Noise key.
    pub key: NoiseKey,
    /// Policy version of all its denoise steps.
    pub version: u64,
    /// Pixels as the network saw them, u8 `[cameras, size, size, 3]`.
    pub images: Array,
    /// Which cameras were there.
    pub image_mask: Vec<bool>,
    /// Prompt ids, padded.
    pub prompt: Vec<i64>,
    /// Which of them are valid.
    pub prompt_mask: Vec<bool>,
    /// Normalised, padded state, f32 `[action_dim]`.
    pub state: Array,
    /// The stochastic denoise steps in order, `S` of them; none in evaluation.
    pub denoise_steps: Vec<u32>,
    /// `x` before each step and after the last, f32 `[num_steps + 1, action_horizon, action_dim]`.
    pub chain: Array,
    /// Log-probability per element of each stochastic step, f32 `[S, action_chunk, env_action_dim]`; `None` in evaluation.
    pub logprob: Option<Array>,
    /// Value estimates: one per stochastic step where `V_expert` is read there, else one; none without a critic.
    pub values: Vec<f32>,
}

/// One row of the answer to a client.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ActedRow {
    /// f32 `[action_chunk, env_action_dim]` in the environment's units.
    pub actions: Array,
    /// The record, when asked for.
    pub record: Option<Box<ChunkRecord>>,
}

/// The answer to a client.
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

/// A request that was not served.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// Number of the request; `None` when it could not be read.
    pub request: Option<u64>,
    /// Whether the same request may succeed later (overload).
    pub retry: bool,
    /// What was expected and found.
    pub reason: String,
}

/// From the engine to env workers and clients.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromEngine {
    /// Answer to [`ToEngine::Hello`].
    Welcome(Welcome),
    /// Commands for slots.
    Commands(Vec<SlotCommand>),
    /// Answer to [`ToEngine::Act`].
    Acted(ActReply),
    /// A message that was not served.
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

/// One whole episode.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trajectory {
    /// Number that the acknowledgement repeats; unique per engine session.
    pub id: u64,
    /// Which engine session.
    #[serde(deserialize_with = "name")]
    pub engine: String,
    /// The order that asked for it.
    pub order: u64,
    /// The reset that began it.
    pub reset: Reset,
    /// How it was sampled.
    pub mode: Mode,
    /// The instruction.
    pub prompt: String,
    /// Chunks in order.
    pub chunks: Vec<TrajectoryChunk>,
    /// It ended by itself (true) or by the time limit (false).
    pub terminated: bool,
    /// The goal was reached.
    pub success: bool,
    /// Value estimate of the last observation; `None` without a critic, and for a terminated episode unless the run values those.
    pub final_value: Option<f32>,
}

/// Liveness and state of an engine, sent on connect and then regularly.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EngineState {
    /// Session name, unique per start; at most 128 bytes, without control characters.
    #[serde(deserialize_with = "name")]
    pub engine: String,
    /// Live version; `None` before the first bundle.
    pub version: Option<u64>,
    /// The newest order that it knows.
    pub order: Option<u64>,
    /// Slots of its workers.
    pub slots: u32,
}

/// A part of a bundle's file is wanted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fetch {
    /// Version of the bundle.
    pub version: u64,
    /// File name in it.
    pub file: String,
    /// First byte.
    pub offset: u64,
}

/// What became of an announced version.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReloadReport {
    /// Which engine session.
    #[serde(deserialize_with = "name")]
    pub engine: String,
    /// The announced version.
    pub version: u64,
    /// Why it was refused; `None`: it is live.
    pub refused: Option<String>,
    /// Seconds from announce to live (or to the refusal).
    pub seconds: f64,
}

/// From an engine to the learner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ToLearner {
    /// Liveness.
    State(EngineState),
    /// A file is wanted.
    Fetch(Fetch),
    /// A reload went live or was refused.
    Reload(ReloadReport),
    /// An episode; sent again until acknowledged.
    Trajectory(Box<Trajectory>),
}

/// A new policy version.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Announce {
    /// The version.
    pub version: u64,
    /// Its files, `manifest.json` among them.
    pub files: Vec<BundleFile>,
}

/// A part of a file.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FilePart {
    /// Version of the bundle.
    pub version: u64,
    /// File name.
    pub file: String,
    /// First byte.
    pub offset: u64,
    /// The bytes; empty when the learner does not have the file.
    #[serde(with = "serde_bytes")]
    pub data: Vec<u8>,
}

/// Episodes that the learner wants from the same versions. They wait (are parked) until one of these is live. Every chunk is made
/// by one of them; an episode has chunks of several where several are allowed (asynchronous training).
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Batch {
    /// The oldest version that may make their chunks.
    pub oldest: u64,
    /// The newest; synchronous training and evaluation allow one version only.
    pub newest: u64,
    /// Sampling.
    pub mode: Mode,
    /// One episode each.
    pub resets: Vec<Reset>,
}

/// Episodes that the learner wants from an engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Order {
    /// Number of the order, rising.
    pub order: u64,
    /// Whether this is all that is wanted from the engine, so that what it has pending is dropped; otherwise it is wanted too,
    /// evaluations before and training after what is pending.
    pub replaces: bool,
    /// The first that may begin begins first.
    pub batches: Vec<Batch>,
}

/// From the learner to an engine.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FromLearner {
    /// A version is there to fetch.
    Announce(Announce),
    /// A part of a file.
    FilePart(FilePart),
    /// Episodes wanted.
    Order(Order),
    /// Trajectories that arrived.
    Ack(Vec<u64>),
}
