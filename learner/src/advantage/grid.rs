//! Row-major arrays of lock-step rollouts: masks, scores and the two reward layouts.

use super::{AdvantageError, Result};

/// Sizes of a row-major `[steps, envs]` array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// Time steps (chunks or primitive steps), outermost.
    pub steps: usize,
    /// Environments, innermost.
    pub envs: usize,
}

impl Layout {
    /// Number of elements of a `[steps, envs]` array.
    pub fn len(self) -> usize {
        self.steps * self.envs
    }

    /// Whether the array has no element.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    pub(super) fn check(self, name: &'static str, found: usize, extra_rows: usize) -> Result<()> {
        let expected = (self.steps + extra_rows) * self.envs;
        if found == expected {
            Ok(())
        } else {
            Err(AdvantageError::Length { name, expected, found })
        }
    }
}

/// Which rows of a lock-step rollout are part of each environment's first episode, and how many there are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct LossMask {
    /// `[steps, envs]`: the step began before the first end of the environment, so the ending step is in.
    pub valid: Vec<bool>,
    /// `[envs]`: number of valid steps.
    pub episode_len: Vec<usize>,
}

/// Marks the first episode of every environment. `dones` is `[steps + 1, envs]`; its row 0 is the state before the
/// first step.
pub fn loss_mask(layout: Layout, dones: &[bool]) -> Result<LossMask> {
    layout.check("dones", dones.len(), 1)?;
    let mut valid = vec![false; layout.len()];
    let mut episode_len = vec![0; layout.envs];
    for (env, len) in episode_len.iter_mut().enumerate() {
        for step in 0..layout.steps {
            let at = step * layout.envs + env;
            if dones[at] {
                break;
            }
            valid[at] = true;
            *len += 1;
        }
    }
    Ok(LossMask { valid, episode_len })
}

/// Score of every environment: the undiscounted reward of its first episode in the buffer.
/// `rewards` is `[steps, envs]`, `dones` `[steps + 1, envs]` (row 0 before the first step, not read).
pub fn episode_scores(layout: Layout, rewards: &[f32], dones: &[bool]) -> Result<Vec<f32>> {
    layout.check("rewards", rewards.len(), 0)?;
    layout.check("dones", dones.len(), 1)?;
    let score = |env: usize| {
        let mut score = 0.0;
        for step in 0..layout.steps {
            let at = step * layout.envs + env;
            score += f64::from(rewards[at]);
            if dones[at + layout.envs] {
                break;
            }
        }
        score as f32
    };
    Ok((0..layout.envs).map(score).collect())
}

/// One number per environment spread over its valid steps, `[steps, envs]`; 0 where masked.
pub fn spread(layout: Layout, per_env: &[f32], mask: &[bool]) -> Result<Vec<f32>> {
    if per_env.len() != layout.envs {
        return Err(AdvantageError::Length {
            name: "per_env",
            expected: layout.envs,
            found: per_env.len(),
        });
    }
    layout.check("mask", mask.len(), 0)?;
    let columns = per_env.iter().cycle();
    Ok(mask
        .iter()
        .zip(columns)
        .map(|(valid, value)| if *valid { *value } else { 0.0 })
        .collect())
}

/// Sizes of a row-major `[chunks, envs, chunk_len]` array: what a chunked policy records.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ChunkLayout {
    /// Action chunks in time, outermost.
    pub chunks: usize,
    /// Environments.
    pub envs: usize,
    /// Executed actions per chunk, innermost.
    pub chunk_len: usize,
}

impl ChunkLayout {
    /// The grid of whole chunks.
    pub fn chunk_grid(self) -> Layout {
        Layout {
            steps: self.chunks,
            envs: self.envs,
        }
    }

    /// The grid of primitive steps.
    pub fn step_grid(self) -> Layout {
        Layout {
            steps: self.chunks * self.chunk_len,
            envs: self.envs,
        }
    }

    fn check(self, name: &'static str, found: usize) -> Result<()> {
        let expected = self.chunks * self.envs * self.chunk_len;
        if found == expected {
            Ok(())
        } else {
            Err(AdvantageError::Length { name, expected, found })
        }
    }
}

/// Chunk-level reward: the undiscounted sum over each chunk, `[chunks, envs, chunk_len]` to `[chunks, envs]`.
pub fn chunk_sum(layout: ChunkLayout, rewards: &[f32]) -> Result<Vec<f32>> {
    layout.check("rewards", rewards.len())?;
    let chunk_len = layout.chunk_len.max(1);
    Ok(rewards
        .chunks_exact(chunk_len)
        .map(|chunk| chunk.iter().map(|r| f64::from(*r)).sum::<f64>() as f32)
        .collect())
}

/// Chunk-level flag: whether it is set anywhere in the chunk, `[chunks, envs, chunk_len]` to `[chunks, envs]`.
pub fn chunk_any(layout: ChunkLayout, flags: &[bool]) -> Result<Vec<bool>> {
    layout.check("flags", flags.len())?;
    Ok(flags
        .chunks_exact(layout.chunk_len.max(1))
        .map(|chunk| chunk.contains(&true))
        .collect())
}

/// Action-level layout: `[chunks, envs, chunk_len]` to `[chunks * chunk_len, envs]`, time running through each chunk.
pub fn steps_from_chunks<T: Copy>(layout: ChunkLayout, data: &[T]) -> Result<Vec<T>> {
    layout.check("data", data.len())?;
    let ChunkLayout {
        chunks,
        envs,
        chunk_len,
    } = layout;
    let mut steps = Vec::with_capacity(data.len());
    for chunk in 0..chunks {
        for step in 0..chunk_len {
            steps.extend((0..envs).map(|env| data[(chunk * envs + env) * chunk_len + step]));
        }
    }
    Ok(steps)
}

/// Inverse of [`steps_from_chunks`].
pub fn chunks_from_steps<T: Copy>(layout: ChunkLayout, data: &[T]) -> Result<Vec<T>> {
    layout.check("data", data.len())?;
    let ChunkLayout {
        chunks,
        envs,
        chunk_len,
    } = layout;
    let mut rows = Vec::with_capacity(data.len());
    for chunk in 0..chunks {
        for env in 0..envs {
            rows.extend((0..chunk_len).map(|step| data[(chunk * chunk_len + step) * envs + env]));
        }
    }
    Ok(rows)
}

/// Puts rollout epochs that were recorded one after the other side by side:
/// `[epochs * rows, envs * width]` to `[rows, epochs * envs * width]`.
pub fn stack_epochs<T: Copy>(epochs: usize, rows: usize, row_len: usize, data: &[T]) -> Result<Vec<T>> {
    let expected = epochs * rows * row_len;
    if data.len() != expected {
        return Err(AdvantageError::Length {
            name: "data",
            expected,
            found: data.len(),
        });
    }
    let mut stacked = Vec::with_capacity(expected);
    for row in 0..rows {
        for epoch in 0..epochs {
            let start = (epoch * rows + row) * row_len;
            stacked.extend_from_slice(&data[start..start + row_len]);
        }
    }
    Ok(stacked)
}
