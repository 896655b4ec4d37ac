//! The keys in which two runs may differ and still be the same experiment.

/// What such a key changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Neutral {
    /// Where a run lies, where it listens, and where it keeps what it could compute again: no bit of a result.
    Place,
    /// Who starts its processes, when it is evaluated and which of its states are kept: no weight.
    Upkeep,
    /// How many iterations it has: the shorter run is the beginning of the longer one where the learning rate does not fall.
    Length,
    /// Which of the random runs of a configuration it is.
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
    /// What a dotted key changes when it is neutral; `None`: another value is another experiment.
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
