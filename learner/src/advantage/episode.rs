//! Episodes as inputs of the estimators, and their advantages.

/// Advantages and value targets of one episode.
#[derive(Debug, Clone, PartialEq)]
pub struct Advantages {
    /// Advantage of each step, or of each denoise step in a two-layer MDP.
    pub advantages: Vec<f32>,
    /// Value target of each chunk, or of each denoise step in a two-layer MDP.
    pub returns: Vec<f32>,
}

/// One episode, the input of an estimator of the registry.
#[derive(Debug, Clone, Copy)]
pub struct Episode<'a> {
    /// Reward of each step. A step is a chunk, or an executed action if rewards are at the action level.
    pub rewards: &'a [f32],
    /// Steps per chunk, at least 1: 1 if a step is a chunk, else the executed actions of a full chunk. Only the last
    /// chunk may be shorter.
    pub chunk_len: usize,
    /// Value of the observation before each chunk; empty if no critic is trained.
    pub values: &'a [f32],
    /// Value of the observation after the last chunk, 0 without bootstrapping.
    pub final_value: f32,
    /// Number of the group, whose episodes share the task and the start state.
    pub group: u64,
}

impl Episode<'_> {
    /// Returns the undiscounted reward of the whole episode.
    pub fn score(&self) -> f32 {
        self.rewards.iter().map(|reward| f64::from(*reward)).sum::<f64>() as f32
    }

    /// Returns the number of chunks.
    pub fn chunks(&self) -> usize {
        self.rewards.len().div_ceil(self.chunk_len.max(1))
    }
}

/// One episode of a two-layer MDP, in which every denoise step is a transition.
#[derive(Debug, Clone, Copy)]
pub struct LayeredEpisode<'a> {
    /// Reward of each chunk.
    pub rewards: &'a [f32],
    /// Value before each denoise step, `[chunks * steps]` in time order.
    pub values: &'a [f32],
    /// Denoise steps per chunk.
    pub steps: usize,
    /// Value of the observation after the last chunk, 0 without bootstrapping.
    pub final_value: f32,
}
