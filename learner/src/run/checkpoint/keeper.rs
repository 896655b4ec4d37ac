//! Selection of the checkpoints that stay: the newest and the best.

use std::{
    fs,
    path::{Path, PathBuf},
};

use policy::{bundle::write_atomic, config::RunConfig, plan::RunPlan};

use super::{BEST, Best, Counters, discard, json, list, remove, write};
use crate::{
    error::{Result, io},
    update::Updater,
};

/// Success rates that differ by less are equal: a rate may come from a file, and one more episode changes a rate far more.
const SAME_SUCCESS: f64 = 1e-9;

/// Returns the checkpoints to remove: all except the newest `keep_last` and the best; none without `keep_last`.
fn superfluous(existing: &[u32], keep_last: Option<u32>, best: Option<u32>) -> Vec<u32> {
    let Some(keep_last) = keep_last else {
        return Vec::new();
    };
    let gone = existing.len().saturating_sub(keep_last as usize);
    let old = existing.iter().take(gone).copied();
    old.filter(|iteration| Some(*iteration) != best).collect()
}

/// Writer of a run's checkpoints that also removes superfluous checkpoints.
#[derive(Debug)]
pub struct Keeper {
    dir: PathBuf,
    config: RunConfig,
    config_digest: String,
    best: Option<Best>,
    /// Last checkpoint that this process wrote or resumed from.
    saved: Option<u32>,
}

impl Keeper {
    /// Returns a keeper of the checkpoints in `dir`, for a fresh run or a run resumed after `from`. Removes the incomplete checkpoints
    /// of a killed run.
    ///
    /// # Errors
    /// The folder cannot be listed, or an incomplete checkpoint cannot be removed.
    pub fn new(dir: &Path, plan: &RunPlan, from: Option<&Counters>) -> Result<Self> {
        if dir.exists() {
            for entry in fs::read_dir(dir).map_err(io("listing", dir))? {
                let entry = entry.map_err(io("listing", dir))?;
                if entry.file_name().to_string_lossy().starts_with(".iteration_") {
                    remove(&entry.path())?;
                }
            }
        }
        Ok(Self {
            dir: dir.to_owned(),
            config: plan.config.clone(),
            config_digest: plan.config_digest.clone(),
            best: from.and_then(|counters| counters.best),
            saved: from.map(|counters| counters.iteration),
        })
    }

    /// Writes the checkpoint after `iteration` iterations and removes superfluous checkpoints.
    ///
    /// # Errors
    /// A file operation fails.
    pub fn save(&mut self, updater: &mut Updater<'_>, iteration: u32, episodes: u64) -> Result<()> {
        let counters = Counters {
            iteration,
            episodes,
            best: self.best,
            config_digest: self.config_digest.clone(),
        };
        write(&self.dir, updater, &counters, &self.config)?;
        self.saved = Some(iteration);
        self.prune()
    }

    /// Records an evaluation of the policy after `iteration` iterations. With `runner.keep_best` and a new best success rate, writes the
    /// checkpoint unless present, and names the checkpoint in `best.json`. Of equal rates, the first is the best.
    ///
    /// # Errors
    /// A file operation fails.
    pub fn evaluated(&mut self, updater: &mut Updater<'_>, iteration: u32, episodes: u64, success: f64) -> Result<()> {
        let better = self.best.is_none_or(|best| success > best.success + SAME_SUCCESS);
        if !self.config.runner.keep_best || !better {
            return Ok(());
        }
        let best = Best { iteration, success };
        self.best = Some(best);
        if self.saved != Some(iteration) {
            self.save(updater, iteration, episodes)?;
        }
        write_atomic(&self.dir.join(BEST), &json(&best)?)?;
        self.prune()
    }

    fn prune(&self) -> Result<()> {
        let best = self.best.map(|best| best.iteration);
        for iteration in superfluous(&list(&self.dir)?, self.config.runner.keep_last, best) {
            discard(&self.dir, iteration)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_newest_and_the_best_stay() {
        let all = [10, 20, 30, 40, 50];
        assert!(superfluous(&all, None, Some(20)).is_empty());
        assert_eq!(superfluous(&all, Some(2), None), [10, 20, 30]);
        assert_eq!(superfluous(&all, Some(2), Some(20)), [10, 30]);
        assert_eq!(
            superfluous(&all, Some(2), Some(50)),
            [10, 20, 30],
            "the best is among the newest"
        );
        assert_eq!(
            superfluous(&all, Some(2), Some(15)),
            [10, 20, 30],
            "the best is not there"
        );
        assert!(superfluous(&all, Some(9), None).is_empty());
        assert!(superfluous(&[], Some(1), None).is_empty());
    }
}
