//! Asynchronous training: episodes of later iterations are ordered before an earlier iteration is trained, so that the engine has
//! work during the update.
//!
//! The episodes of iteration `i` are ordered as soon as version `i - max_staleness` is published. The update of iteration `i` takes
//! exactly these episodes: no record is older, and no episode is dropped for its length.

use std::{
    collections::{BTreeMap, VecDeque},
    time::Instant,
};

use policy::plan::RunPlan;
use wire::messages::{Batch, Mode, Reset, Trajectory};

use super::{
    collecting::{CollectReport, Collected, Waited, success_rate, wait},
    evaluation,
    sampling::{Sampled, group_count, label, sample_from, training_resets},
};
use crate::{
    error::{LearnerError, Result},
    ring::{hub::Hub, launch::Children},
};

/// Iteration whose episodes are ordered.
#[derive(Debug)]
struct Ordered {
    iteration: u32,
    begin: Instant,
    missing: usize,
    trajectories: Vec<Trajectory>,
}

/// Iterations whose episodes are on their way or wait for their update.
#[derive(Debug)]
pub struct Ahead {
    /// First iteration whose episodes are not ordered.
    next: u32,
    ordered: VecDeque<Ordered>,
    /// Iteration of each training episode that has not come, by environment and episode number.
    iteration_of: BTreeMap<(u32, u64), u32>,
    /// Stale episodes since the last update.
    stale: usize,
    reload_seconds: f64,
}

fn number(reset: &Reset) -> (u32, u64) {
    (reset.env, reset.episode)
}

impl Ahead {
    /// Returns a state without orders; `first` is the next iteration.
    pub fn new(first: u32) -> Self {
        Self {
            next: first,
            ordered: VecDeque::new(),
            iteration_of: BTreeMap::new(),
            stale: 0,
            reload_seconds: 0.0,
        }
    }

    /// Returns the batches that `version` allows and that were not returned before, one per iteration.
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

    /// Orders the episodes that `version` allows and that were not ordered before.
    ///
    /// # Errors
    /// The network thread has ended.
    pub fn order(&mut self, hub: &Hub, plan: &RunPlan, version: u64) -> Result<()> {
        self.batches(plan, version)
            .into_iter()
            .try_for_each(|batch| hub.add(batch))
    }

    /// Stores a training episode for its update. Returns its iteration, or `None` for an episode that was not ordered or came already.
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

    /// Returns the episodes of `iteration`, the oldest ordered iteration. Stores episodes of later iterations meanwhile.
    ///
    /// # Errors
    /// A child ends, an engine rejects the version, or no episode or reload report comes for two minutes.
    pub fn sample(&mut self, hub: &Hub, children: &mut Children, plan: &RunPlan, iteration: u32) -> Result<Sampled> {
        let begin = Instant::now();
        let next = self.ordered.front().filter(|ordered| ordered.iteration == iteration);
        let missing = next.ok_or(LearnerError::NotOrdered { iteration })?.missing;
        let version = u64::from(iteration);
        let waited = wait(hub, children, version, missing, &label(plan, iteration), |trajectory| {
            self.keep(trajectory) == Some(iteration)
        })?;
        self.note(waited);
        let mut complete = self.ordered.pop_front().ok_or(LearnerError::NotOrdered { iteration })?;
        complete.trajectories.sort_by_key(|t| number(&t.reset));
        let got = Collected {
            trajectories: complete.trajectories,
            report: CollectReport {
                reload_seconds: std::mem::take(&mut self.reload_seconds),
                seconds: complete.begin.elapsed().as_secs_f64(),
                waited: begin.elapsed().as_secs_f64(),
                stale: std::mem::take(&mut self.stale),
            },
        };
        // the plan allows no filter that orders groups again
        sample_from(plan, got, |_, _| Ok(Collected::default()))
    }

    /// Returns the success rate of `version` on the evaluation's episodes. Stores training episodes that come meanwhile.
    ///
    /// # Errors
    /// See [`Ahead::sample`].
    pub fn evaluate(&mut self, hub: &Hub, children: &mut Children, version: u64, episodes: usize) -> Result<f64> {
        hub.add(Batch {
            oldest: version,
            newest: version,
            mode: Mode::Eval,
            resets: evaluation::resets(episodes, 0),
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

#[cfg(test)]
mod tests {
    use std::path::Path;

    use policy::config::RunConfig;

    use super::*;

    fn plan(staleness: u32) -> RunPlan {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/tabletop_async.toml");
        let overrides = [
            format!("rollout.max_staleness={staleness}"),
            "runner.max_epochs=6".to_owned(),
            "env.train.total_num_envs=4".to_owned(),
            "env.train.rollout_epoch=2".to_owned(),
        ];
        RunPlan::new(RunConfig::load(&path, &overrides).expect("configuration")).expect("plan")
    }

    fn finished(reset: Reset) -> Trajectory {
        Trajectory {
            id: 1,
            engine: "e".to_owned(),
            order: 1,
            reset,
            mode: Mode::Train,
            prompt: String::new(),
            chunks: Vec::new(),
            terminated: true,
            success: false,
            final_value: None,
        }
    }

    #[test]
    fn an_iteration_is_ordered_once_as_soon_as_the_oldest_version_that_it_may_read_is_there() {
        let plan = plan(2);
        let mut ahead = Ahead::new(1);
        let mut windows = Vec::new();
        for (version, count) in [(1, 3), (2, 1), (3, 1), (4, 0)] {
            let batches = ahead.batches(&plan, version);
            assert_eq!(batches.len(), count, "version {version}");
            for batch in batches {
                // the episodes are the same as in synchronous training
                assert_eq!(batch.resets, training_resets(&plan, batch.newest as u32, 0, 8));
                assert_eq!((batch.resets.len(), batch.mode), (8, Mode::Train));
                assert!(batch.oldest <= version, "it may begin");
                windows.push((batch.oldest, batch.newest));
            }
        }
        // iterations 1 to 5 of 0 to 5; a version is at most two behind
        assert_eq!(windows, [(0, 1), (0, 2), (1, 3), (2, 4), (3, 5)]);
    }

    #[test]
    fn every_episode_is_kept_for_its_own_iteration_in_whatever_order_they_come() {
        let plan = plan(1);
        let mut ahead = Ahead::new(0);
        let [first, second] = ahead.batches(&plan, 0).try_into().expect("two iterations");
        let own = |batch: &Batch| {
            batch
                .resets
                .clone()
                .into_iter()
                .zip(std::iter::repeat(batch.newest as u32))
        };
        for (reset, iteration) in own(&second).chain(own(&first)) {
            assert_eq!(ahead.keep(finished(reset)), Some(iteration));
        }
        assert_eq!(ahead.keep(finished(first.resets[0].clone())), None, "it came already");
        let missing: Vec<_> = ahead
            .ordered
            .iter()
            .map(|o| (o.missing, o.trajectories.len()))
            .collect();
        assert_eq!(missing, [(0, 8), (0, 8)]);
    }
}
