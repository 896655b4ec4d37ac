//! The reference's lock-step layout: row-major `[steps, envs]` arrays with a column per environment, and chunks in
//! `[chunks, envs, width]`. Ours are episodes: here columns are cut into them, and what the product's estimators say of them is laid out
//! as a grid again.

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
    /// Whether it ended; else the grid ended before it.
    ended: bool,
}

impl Span {
    /// What a grid says of the episode.
    fn column<'a, T: Copy>(&'a self, layout: Layout, grid: &'a [T]) -> impl Iterator<Item = T> + 'a {
        self.steps.clone().map(move |step| grid[step * layout.envs + self.env])
    }
}

/// Every environment's episodes in time. Row `t + 1` of `dones` says whether step `t` was an episode's last; row 0, of what was before
/// the grid, is not read.
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

/// The first episode of every environment: what the reference's loss masks leave of a column.
pub(super) fn first_episodes(layout: Layout, dones: &[bool]) -> Vec<Span> {
    let mut spans = episodes(layout, dones);
    spans.retain(|span| span.steps.start == 0);
    spans
}

/// What there is for each step of every episode as a grid, with the default outside of them.
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

/// The steps of these episodes.
pub(super) fn mask_of(layout: Layout, spans: &[Span]) -> Vec<bool> {
    let per_step: Vec<Vec<bool>> = spans.iter().map(|span| vec![true; span.steps.len()]).collect();
    lay_out(layout, spans, &per_step)
}

/// What a grid's episodes are estimated from.
pub(super) struct Recorded<'a> {
    pub(super) layout: Layout,
    /// `[steps, envs]`.
    pub(super) rewards: &'a [f32],
    /// `[steps + 1, envs]`, or empty without a critic. An end counts as terminal; only an episode that is still open at the grid's end
    /// goes on, from the last row.
    pub(super) values: &'a [f32],
    /// A group is this many environments in a row.
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

    /// Advantages and returns by the product's estimator of this name, as grids.
    pub(super) fn estimate(&self, name: &str, settings: EstimatorSettings, spans: &[Span]) -> Result<Advantages> {
        let estimate = estimator(name).unwrap_or_else(|| panic!("no estimator `{name}`"));
        let estimated = self.with_episodes(spans, |episodes| estimate(episodes, settings))?;
        let (advantages, returns): (Vec<_>, Vec<_>) = estimated.into_iter().map(|e| (e.advantages, e.returns)).unzip();
        Ok(Advantages {
            advantages: lay_out(self.layout, spans, &advantages),
            returns: lay_out(self.layout, spans, &returns),
        })
    }

    /// The score of every episode.
    pub(super) fn scores(&self, spans: &[Span]) -> Vec<f32> {
        self.with_episodes(spans, |episodes| episodes.iter().map(Episode::score).collect())
    }
}

/// Advantages by an estimator that reads nothing but the episodes' scores: one episode per environment, as many steps as the mask has.
/// Where the mask is not set they are 0, as in the reference.
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

/// `[chunks, envs, width]` as `[chunks * width, envs]`: time runs through each chunk.
pub(super) fn steps_of<T: Copy>(shape: &[usize], chunks: &[T]) -> Vec<T> {
    let (envs, width) = (shape[1], shape[2]);
    (0..chunks.len())
        .map(|at| (at / envs, at % envs))
        .map(|(step, env)| chunks[(step / width * envs + env) * width + step % width])
        .collect()
}

/// The inverse of [`steps_of`]; `shape` is that of the chunks.
pub(super) fn chunks_of<T: Copy>(shape: &[usize], steps: &[T]) -> Vec<T> {
    let (envs, width) = (shape[1], shape[2]);
    (0..steps.len())
        .map(|at| (at / width / envs, at / width % envs, at % width))
        .map(|(chunk, env, step)| steps[(chunk * width + step) * envs + env])
        .collect()
}
