//! Keys in which two runs of the same experiment may differ.

/// Effect of a neutral key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Neutral {
    /// Folders, endpoints and caches of a run, which do not change a result.
    Place,
    /// Start of the processes, time of evaluations and choice of kept checkpoints, which do not change a weight.
    Upkeep,
    /// Number of iterations. With a constant learning rate, the shorter run is the beginning of the longer run.
    Length,
    /// Seed, which selects one of the random runs of a configuration.
    Seed,
}

/// Every neutral key.
const NEUTRAL: [(&str, Neutral); 13] = [
    ("actor.prefix_cache", Neutral::Place),
    ("actor.prefix_cache_mb", Neutral::Place),
    ("learner.listen", Neutral::Place),
    ("rollout.http", Neutral::Place),
    ("rollout.listen", Neutral::Place),
    ("runner.keep_best", Neutral::Upkeep),
    ("runner.keep_last", Neutral::Upkeep),
    ("runner.launch", Neutral::Upkeep),
    ("runner.max_epochs", Neutral::Length),
    ("runner.output_dir", Neutral::Place),
    ("runner.save_interval", Neutral::Upkeep),
    ("runner.seed", Neutral::Seed),
    ("runner.val_check_interval", Neutral::Upkeep),
];

impl Neutral {
    /// Returns the effect of a neutral dotted key; `None`: another value is another experiment.
    pub fn of(key: &str) -> Option<Self> {
        NEUTRAL.iter().find(|(name, _)| *name == key).map(|(_, what)| *what)
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::config::RunConfig;

    #[test]
    fn every_neutral_key_is_a_key() {
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/quickstart.toml");
        let optional = [
            "runner.keep_last=2",
            "actor.prefix_cache=\"memory\"",
            "actor.prefix_cache_mb=7",
        ];
        let keys = RunConfig::load(&path, &optional.map(str::to_owned))
            .expect("quickstart")
            .keys()
            .expect("keys");
        for (key, _) in NEUTRAL {
            assert!(keys.contains_key(key), "{key}");
        }
    }
}
