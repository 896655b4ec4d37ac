//! Environment trait, vectorized by slots.

use policy::noise::{Purpose, stream};

/// RGB image.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// Number of rows.
    pub height: usize,
    /// Number of columns.
    pub width: usize,
    /// Row-major RGB, `[height, width, 3]`.
    pub data: Vec<u8>,
}

/// Sizes, limits and names of an environment.
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
    /// All instructions that the environment may give.
    pub prompts: Vec<String>,
}

/// Key of an episode's start state.
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
    /// Task number; `None` to draw the task.
    pub task: Option<u32>,
}

impl ResetKey {
    /// Returns the random stream of this start state.
    pub fn rng(&self) -> impl rand_core::Rng + use<> {
        match self.reset_state {
            Some(state) => stream(Purpose::Reset, self.seed, u64::MAX, state, 0),
            None => stream(Purpose::Reset, self.seed, u64::from(self.env), self.episode, 0),
        }
    }
}

/// Observation of a policy.
#[derive(Debug, Clone, PartialEq)]
pub struct Observation {
    /// One image per camera.
    pub images: Vec<Image>,
    /// Proprioceptive state.
    pub state: Vec<f32>,
    /// Instruction.
    pub prompt: String,
}

/// Outcome of an executed action chunk.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct ChunkOutcome {
    /// Reward of each executed env step; shorter than the chunk if the episode ended within the chunk.
    pub rewards: Vec<f32>,
    /// Whether the task ended.
    pub terminated: bool,
    /// Whether the time limit was reached (and the task did not end in the same step).
    pub truncated: bool,
    /// Whether the goal is reached.
    pub success: bool,
    /// One rendered image per executed env step, if requested.
    pub frames: Vec<Image>,
}

/// Set of environments of one kind, addressed by slot.
pub trait VecEnv: Send {
    /// Returns the specification of one environment.
    fn spec(&self) -> EnvSpec;
    /// Returns the number of slots.
    fn num_envs(&self) -> usize;
    /// Starts an episode and returns its first observation; `None` for a slot or a task that does not exist.
    fn reset(&mut self, slot: usize, key: &ResetKey) -> Option<Observation>;
    /// Returns the current observation; `None` for a slot that does not exist or has not been reset.
    fn observe(&self, slot: usize) -> Option<Observation>;
    /// Executes `actions`, row-major `[n, action_dim]`, until the episode ends. A NaN counts as 0; other values are clipped to
    /// [-1, 1]. Renders a frame per env step if `frames`. Returns `None` for a slot that does not exist or has not been reset.
    fn step_chunk(&mut self, slot: usize, actions: &[f32], frames: bool) -> Option<ChunkOutcome>;
}

/// Failure to make an environment.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum EnvError {
    /// The name is not registered.
    #[error("environment `{name}` is not known here, expected one of: {known}")]
    Unknown {
        /// Requested name.
        name: String,
        /// Registered names, separated by commas.
        known: String,
    },
    /// The environment rejects the parameters.
    #[error("parameters of environment `{name}`: {detail}")]
    Params {
        /// Name of the environment.
        name: String,
        /// Name of the parameter, its value and the expected range.
        detail: String,
    },
}
