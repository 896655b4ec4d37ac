//! Episodes as estimators see them, and their advantages.

/// Advantages of every step and the value targets of every chunk.
#[derive(Debug, Clone, PartialEq)]
pub struct Advantages {
    /// How much better the taken action was than the value said.
    pub advantages: Vec<f32>,
    /// What the critic is trained towards.
    pub returns: Vec<f32>,
}

/// One episode as an estimator of the registry sees it.
#[derive(Debug, Clone, Copy)]
pub struct Episode<'a> {
    /// Reward of each step. A step is a chunk, or an executed action where rewards are at the action level.
    pub rewards: &'a [f32],
    /// Steps per chunk, at least 1: 1 where a step is a chunk, else the executed actions of a full chunk. Only the last
    /// chunk may have fewer.
    pub chunk_len: usize,
    /// Value of the observation before each chunk; empty where no critic is trained.
    pub values: &'a [f32],
    /// Value of the observation after the last chunk: 0 where nothing is bootstrapped.
    pub final_value: f32,
    /// Episodes of one group have the same task and started from the same state.
    pub group: u64,
}

impl Episode<'_> {
    /// Undiscounted reward of the whole episode.
    pub fn score(&self) -> f32 {
        self.rewards.iter().map(|reward| f64::from(*reward)).sum::<f64>() as f32
    }

    /// Number of chunks.
    pub fn chunks(&self) -> usize {
        self.rewards.len().div_ceil(self.chunk_len.max(1))
    }
}

/// One episode whose denoise steps are transitions of their own.
#[derive(Debug, Clone, Copy)]
pub struct LayeredEpisode<'a> {
    /// Reward of each chunk.
    pub rewards: &'a [f32],
    /// Value before each denoise step, `[chunks * steps]` in time order.
    pub values: &'a [f32],
    /// Denoise steps of a chunk.
    pub steps: usize,
    /// Value of the observation after the last chunk: 0 where nothing is bootstrapped.
    pub final_value: f32,
}
