//! The environment trait, vectorized by slots.

use policy::noise::{Purpose, stream};

/// An RGB image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Row-major RGB, `[height, width, 3]`.
    pub data: Vec<u8>,
}

/// What an environment is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EnvSpec {
    /// Registered name.
    pub name: &'static str,
    /// Camera names in the order of [`Observation::images`].
    pub cameras: Vec<String>,
    /// Width of an action.
    pub action_dim: usize,
    /// Env steps after which an episode is truncated.
    pub max_episode_steps: usize,
    /// All instructions.
    pub prompts: Vec<String>,
}

/// What names an episode's start.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ResetKey {
    /// Seed of the run.
    pub seed: u64,
    /// Environment number.
    pub env: u32,
    /// Episode number.
    pub episode: u64,
    /// Start state shared by a group; replaces env and episode.
    pub reset_state: Option<u64>,
    /// Task number; `None`: drawn.
    pub task: Option<u32>,
}

impl ResetKey {
    /// The random stream of this start.
    pub fn rng(&self) -> impl rand_core::Rng + use<> {
        match self.reset_state {
            Some(state) => stream(Purpose::Reset, self.seed, u64::MAX, state, 0),
            None => stream(Purpose::Reset, self.seed, u64::from(self.env), self.episode, 0),
        }
    }
}

/// What a policy sees.
#[derive(Debug, Clone, PartialEq)]
pub struct Observation {
    /// One image per camera.
    pub images: Vec<Image>,
    /// Proprioceptive state.
    pub state: Vec<f32>,
    /// The instruction.
    pub prompt: String,
}

/// What an executed chunk brought.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ChunkOutcome {
    /// Reward of every executed env step; the episode may end before the chunk does.
    pub rewards: Vec<f32>,
    /// The task ended.
    pub terminated: bool,
    /// The time limit was reached (and the task did not end in the same step).
    pub truncated: bool,
    /// The goal is reached.
    pub success: bool,
    /// A rendered image per executed step, when asked for.
    pub frames: Vec<Image>,
}

/// A set of environments of one kind, addressed by slot.
pub trait VecEnv: Send {
    /// What it is.
    fn spec(&self) -> EnvSpec;
    /// Number of slots.
    fn num_envs(&self) -> usize;
    /// Starts an episode; `None` for a slot or a task that does not exist.
    fn reset(&mut self, slot: usize, key: &ResetKey) -> Option<Observation>;
    /// The present observation; `None` for a slot that does not exist.
    fn observe(&self, slot: usize) -> Option<Observation>;
    /// Executes `actions`, row-major `[n, action_dim]`, until the episode ends; a NaN action counts as 0, others are clipped to
    /// [-1, 1]. `None` for a slot that does not exist.
    fn step_chunk(&mut self, slot: usize, actions: &[f32], frames: bool) -> Option<ChunkOutcome>;
}

/// An environment that cannot be made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EnvError {
    /// No such name.
    #[error("environment `{name}` is not known here, expected one of: {known}")]
    Unknown {
        /// What was asked for.
        name: String,
        /// What there is.
        known: String,
    },
    /// Parameters that it does not take.
    #[error("parameters of environment `{name}`: {detail}")]
    Params {
        /// Which environment.
        name: String,
        /// What is wrong.
        detail: String,
    },
}
