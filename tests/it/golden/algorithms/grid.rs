//! The reference's lock-step layout: row-major `[steps, envs]` arrays with a column per environment, and chunks in `[chunks, envs, width]`.
//! Ours are episodes. Here columns are cut into episodes, and the estimates of the library are laid out as a grid again.

use std::ops::Range;

use integration_tests::Array;
use learner::advantage::{Advantages, Episode, EstimatorSettings, Result, estimator};

/// Sizes of a `[steps, envs]` array.
#[derive(Debug, Clone, Copy)]
pub(super) struct Layout {
    pub(super) steps: usize,
    pub(super) envs: usize,
}

impl Layout {
    pub(super) fn of(array: &Array) -> Self {
        Self {
            steps: array.shape[0],
            envs: array.shape[1],
        }
    }

    pub(super) fn len(self) -> usize {
        self.steps * self.envs
    }
}

/// An episode's place in a grid.
pub(super) struct Span {
    pub(super) env: usize,
    pub(super) steps: Range<usize>,
    /// Whether the episode ended; otherwise the grid ended before the episode.
    ended: bool,
}

impl Span {
    /// Returns a grid's values of the episode.
    fn column<'a, T: Copy>(&'a self, layout: Layout, grid: &'a [T]) -> impl Iterator<Item = T> + 'a {
        self.steps.clone().map(move |step| grid[step * layout.envs + self.env])
    }
}

/// Returns every environment's episodes in the order of time. Row `t + 1` of `dones` marks whether step `t` was an episode's last; row 0
/// belongs to the time before the grid and is not read.
pub(super) fn episodes(layout: Layout, dones: &[bool]) -> Vec<Span> {
    assert_eq!(dones.len(), layout.len() + layout.envs);
    let mut spans = Vec::new();
    for env in 0..layout.envs {
        let mut start = 0;
        for next in 1..=layout.steps {
            let ended = dones[next * layout.envs + env];
            if ended || next == layout.steps {
                let steps = start..next;
                spans.push(Span { env, steps, ended });
                start = next;
            }
        }
    }
    spans
}

/// Returns the first episode of every environment, the part of a column within the reference's loss masks.
pub(super) fn first_episodes(layout: Layout, dones: &[bool]) -> Vec<Span> {
    let mut spans = episodes(layout, dones);
    spans.retain(|span| span.steps.start == 0);
    spans
}

/// Returns the values of each step of every episode as a grid, with the default outside of episodes.
pub(super) fn lay_out<T: Copy + Default>(layout: Layout, spans: &[Span], per_step: &[Vec<T>]) -> Vec<T> {
    assert_eq!(spans.len(), per_step.len());
    let mut grid = vec![T::default(); layout.len()];
    for (span, values) in spans.iter().zip(per_step) {
        assert_eq!(span.steps.len(), values.len());
        for (step, value) in span.steps.clone().zip(values) {
            grid[step * layout.envs + span.env] = *value;
        }
    }
    grid
}

/// Returns the mask of these episodes' steps.
pub(super) fn mask_of(layout: Layout, spans: &[Span]) -> Vec<bool> {
    let per_step: Vec<Vec<bool>> = spans.iter().map(|span| vec![true; span.steps.len()]).collect();
    lay_out(layout, spans, &per_step)
}

/// Inputs of the estimators for a grid's episodes.
pub(super) struct Recorded<'a> {
    pub(super) layout: Layout,
    /// Rewards `[steps, envs]`.
    pub(super) rewards: &'a [f32],
    /// Values `[steps + 1, envs]`, or empty without a critic. An end counts as terminal; only an episode that is open at the grid's end is
    /// bootstrapped, from the last row.
    pub(super) values: &'a [f32],
    /// Consecutive environments of a group.
    pub(super) group_size: usize,
}

impl Recorded<'_> {
    fn with_episodes<R>(&self, spans: &[Span], of: impl FnOnce(&[Episode<'_>]) -> R) -> R {
        let columns = |grid: &[f32]| -> Vec<Vec<f32>> {
            let column = |span: &Span| span.column(self.layout, grid).collect();
            spans.iter().map(column).collect()
        };
        let critic = !self.values.is_empty();
        let rewards = columns(self.rewards);
        let values = if critic {
            columns(self.values)
        } else {
            vec![Vec::new(); spans.len()]
        };
        let episodes: Vec<Episode<'_>> = spans
            .iter()
            .zip(rewards.iter().zip(&values))
            .map(|(span, (rewards, values))| Episode {
                rewards,
                chunk_len: 1,
                values,
                final_value: if span.ended || !critic {
                    0.0
                } else {
                    self.values[span.steps.end * self.layout.envs + span.env]
                },
                group: (span.env / self.group_size) as u64,
            })
            .collect();
        of(&episodes)
    }

    /// Returns advantages and returns by the library's estimator of this name, as grids.
    pub(super) fn estimate(&self, name: &str, settings: EstimatorSettings, spans: &[Span]) -> Result<Advantages> {
        let estimate = estimator(name).unwrap_or_else(|| panic!("no estimator `{name}`"));
        let estimated = self.with_episodes(spans, |episodes| estimate(episodes, settings))?;
        let (advantages, returns): (Vec<_>, Vec<_>) = estimated.into_iter().map(|e| (e.advantages, e.returns)).unzip();
        Ok(Advantages {
            advantages: lay_out(self.layout, spans, &advantages),
            returns: lay_out(self.layout, spans, &returns),
        })
    }

    /// Returns the score of every episode.
    pub(super) fn scores(&self, spans: &[Span]) -> Vec<f32> {
        self.with_episodes(spans, |episodes| episodes.iter().map(Episode::score).collect())
    }
}

/// Returns advantages by an estimator that reads only the episodes' scores, with one episode per environment and the mask's number of
/// steps. Advantages are 0 where the mask is not set, as in the reference.
pub(super) fn of_scores(name: &str, scores: &[f32], mask: &Array, group_size: usize) -> Result<Vec<f32>> {
    let layout = Layout::of(mask);
    // in the last step
    let mut rewards = vec![0.0; layout.len()];
    rewards[layout.len() - layout.envs..].copy_from_slice(scores);
    let recorded = Recorded {
        layout,
        rewards: &rewards,
        values: &[],
        group_size,
    };
    let settings = EstimatorSettings {
        gamma: 1.0,
        gae_lambda: 1.0,
    };
    let whole = episodes(layout, &vec![false; layout.len() + layout.envs]);
    let mut advantages = recorded.estimate(name, settings, &whole)?.advantages;
    for (advantage, valid) in advantages.iter_mut().zip(mask.bool()) {
        if !valid {
            *advantage = 0.0;
        }
    }
    Ok(advantages)
}

/// Converts `[chunks, envs, width]` to `[chunks * width, envs]`; time runs through each chunk.
pub(super) fn steps_of<T: Copy>(shape: &[usize], chunks: &[T]) -> Vec<T> {
    let (envs, width) = (shape[1], shape[2]);
    (0..chunks.len())
        .map(|at| (at / envs, at % envs))
        .map(|(step, env)| chunks[(step / width * envs + env) * width + step % width])
        .collect()
}

/// Inverts [`steps_of`]; `shape` is the shape of the chunks.
pub(super) fn chunks_of<T: Copy>(shape: &[usize], steps: &[T]) -> Vec<T> {
    let (envs, width) = (shape[1], shape[2]);
    (0..steps.len())
        .map(|at| (at / width / envs, at / width % envs, at % width))
        .map(|(chunk, env, step)| steps[(chunk * width + step) * envs + env])
        .collect()
}
