//! Origins of the values of a configuration.

use std::{
    collections::BTreeMap,
    fmt,
    path::{Path, PathBuf},
};

/// Origin of a key's value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Origin {
    /// The last file with the key, among a configuration and the files that it extends.
    File(PathBuf),
    /// `--set` on the command line.
    Set,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::File(path) => path.display().fmt(f),
            Self::Set => f.write_str("--set"),
        }
    }
}

/// Origins of a configuration's values, by key.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origins {
    files: Vec<PathBuf>,
    keys: BTreeMap<String, Origin>,
}

impl Origins {
    /// Returns the merged files in order. A later file overrides an earlier file; the last file is the configuration itself.
    pub fn files(&self) -> &[PathBuf] {
        &self.files
    }

    /// Returns the origin of a dotted key's value; `None`: the value is the default.
    pub fn get(&self, key: &str) -> Option<&Origin> {
        self.keys.get(key)
    }

    /// Returns the origins of a dotted key and of all keys below it, each once.
    pub(super) fn under(&self, key: &str) -> Vec<Origin> {
        let own = self.keys.get(key).into_iter();
        let mut origins = Vec::new();
        for origin in own.chain(self.below(key).map(|(_, origin)| origin)) {
            if !origins.contains(origin) {
                origins.push(origin.clone());
            }
        }
        origins
    }

    /// Adds a file.
    pub(super) fn push(&mut self, path: &Path) {
        self.files.push(path.to_owned());
    }

    /// Records `origin` for a dotted key with `value`. A section is recorded key by key.
    pub(super) fn record(&mut self, key: &str, value: &toml::Value, origin: &Origin) {
        self.forget(key);
        match value {
            toml::Value::Table(section) if !section.is_empty() => {
                for (name, value) in section {
                    self.record(&format!("{key}.{name}"), value, origin);
                }
            }
            _ => {
                self.keys.insert(key.to_owned(), origin.clone());
            }
        }
    }

    /// Removes a dotted key and all keys below it.
    fn forget(&mut self, key: &str) {
        let below = self.below(key).map(|(name, _)| name.clone()).collect::<Vec<_>>();
        for name in below {
            self.keys.remove(&name);
        }
        self.keys.remove(key);
    }

    /// Returns the keys below a dotted key, with their origins.
    fn below(&self, key: &str) -> impl Iterator<Item = (&String, &Origin)> {
        let prefix = format!("{key}.");
        let keys = self.keys.range(prefix.clone()..);
        keys.take_while(move |(name, _)| name.starts_with(&prefix))
    }
}
