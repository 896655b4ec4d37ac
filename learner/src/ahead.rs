//! Asynchronous training: episodes of later iterations are ordered while an earlier one trains, so that the engine never waits
//! for an update.
//!
//! The episodes of iteration `i` are ordered as soon as version `i - max_staleness` is published, and the update `i` takes
//! exactly those: none of its records is older, and an episode is not left out for being long.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use policy::plan::RunPlan;
use wire::messages::{Batch, Mode, Reset, Trajectory};

use crate::{
    error::{LearnerError, Result},
    evaluate,
    hub::Hub,
    launch::Children,
    rollout::{Collected, Waited, success_rate, wait},
    sampling::{Sampled, group_count, label, sample_from, training_resets},
};

/// An iteration whose episodes are ordered.
#[derive(Debug)]
struct Ordered {
    iteration: u32,
    begin: Instant,
    missing: usize,
    trajectories: Vec<Trajectory>,
}

/// The iterations whose episodes are on their way or wait for their update.
#[derive(Debug)]
pub struct Ahead {
    /// The first iteration whose episodes are not ordered.
    next: u32,
    ordered: VecDeque<Ordered>,
    /// Which iteration a training episode is of, by environment and episode number.
    iteration_of: BTreeMap<(u32, u64), u32>,
    /// Since the last update.
    stale: usize,
    reload_seconds: f64,
}

fn number(reset: &Reset) -> (u32, u64) {
    (reset.env, reset.episode)
}

impl Ahead {
    /// Nothing is ordered yet; `first` is the iteration that comes next.
    pub fn new(first: u32) -> Self {
        Self {
            next: first,
            ordered: VecDeque::new(),
            iteration_of: BTreeMap::new(),
            stale: 0,
            reload_seconds: 0.0,
        }
    }

    /// What may be ordered once `version` is published, one batch per iteration, and not again.
    fn batches(&mut self, plan: &RunPlan, version: u64) -> Vec<Batch> {
        let mut batches = Vec::new();
        while self.next < plan.config.runner.max_epochs && plan.oldest(u64::from(self.next)) <= version {
            let (iteration, newest) = (self.next, u64::from(self.next));
            let resets = training_resets(plan, iteration, 0, group_count(plan));
            self.iteration_of
                .extend(resets.iter().map(|reset| (number(reset), iteration)));
            self.ordered.push_back(Ordered {
                iteration,
                begin: Instant::now(),
                missing: resets.len(),
                trajectories: Vec::with_capacity(resets.len()),
            });
            batches.push(Batch {
                oldest: plan.oldest(newest),
                newest,
                mode: Mode::Train,
                resets,
            });
            self.next += 1;
        }
        batches
    }

    /// Orders what may be ordered once `version` is published.
    ///
    /// # Errors
    /// The network thread has ended.
    pub fn order(&mut self, hub: &Hub, plan: &RunPlan, version: u64) -> Result<()> {
        self.batches(plan, version)
            .into_iter()
            .try_for_each(|batch| hub.add(batch))
    }

    /// Keeps a training episode for its update; returns its iteration.
    fn keep(&mut self, trajectory: Trajectory) -> Option<u32> {
        let iteration = self.iteration_of.remove(&number(&trajectory.reset))?;
        let ordered = self.ordered.iter_mut().find(|ordered| ordered.iteration == iteration)?;
        ordered.missing -= 1;
        ordered.trajectories.push(trajectory);
        Some(iteration)
    }

    fn note(&mut self, waited: Waited) {
        self.stale += waited.stale;
        self.reload_seconds = waited.reload_seconds.unwrap_or(self.reload_seconds);
    }

    /// The episodes of `iteration`, the oldest that is ordered. Those of later ones are kept meanwhile.
    ///
    /// # Errors
    /// A child ends, an engine refuses the version, or nothing comes for two minutes.
    pub fn sample(&mut self, hub: &Hub, children: &mut Children, plan: &RunPlan, iteration: u32) -> Result<Sampled> {
        let begin = Instant::now();
        let missing = self.ordered.front().map_or(0, |ordered| ordered.missing);
        let version = u64::from(iteration);
        let waited = wait(hub, children, version, missing, &label(plan, iteration), |trajectory| {
            self.keep(trajectory) == Some(iteration)
        })?;
        self.note(waited);
        let complete = self
            .ordered
            .pop_front()
            .filter(|ordered| ordered.iteration == iteration);
        let mut complete = complete.ok_or_else(|| {
            LearnerError::Missing(format!("the episodes of iteration {} were not ordered", iteration + 1))
        })?;
        complete.trajectories.sort_by_key(|t| number(&t.reset));
        let got = Collected {
            trajectories: complete.trajectories,
            reload_seconds: std::mem::take(&mut self.reload_seconds),
            seconds: complete.begin.elapsed().as_secs_f64(),
            waited: begin.elapsed().as_secs_f64(),
            stale: std::mem::take(&mut self.stale),
        };
        // the plan allows no filter that orders groups again
        sample_from(plan, got, |_, _| Ok(Collected::default()))
    }

    /// Success of `version` on the evaluation's episodes. Training's go on meanwhile and are kept.
    ///
    /// # Errors
    /// See [`Ahead::sample`].
    pub fn evaluate(&mut self, hub: &Hub, children: &mut Children, version: u64, episodes: usize) -> Result<f64> {
        hub.add(Batch {
            oldest: version,
            newest: version,
            mode: Mode::Eval,
            resets: evaluate::resets(episodes, 0),
        })?;
        let mut seen = Vec::with_capacity(episodes);
        let label = format!("evaluating version {version}");
        let waited = wait(hub, children, version, episodes, &label, |trajectory| {
            let evaluated = trajectory.mode == Mode::Eval;
            if evaluated {
                seen.push(trajectory);
            } else {
                self.keep(trajectory);
            }
            evaluated
        })?;
        self.note(waited);
        Ok(success_rate(&seen))
    }
}
