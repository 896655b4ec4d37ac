//! Layers of a configuration: the extended files, the file itself, and `--set`, each overriding the layers before.

use std::{
    collections::BTreeSet,
    fmt::Display,
    fs::{self, File},
    io::Read,
    path::{Path, PathBuf},
};

use super::{ConfigError, Origin, Origins};
use crate::message::{one_line, shown};

/// Key that names the files that a configuration extends.
pub(super) const EXTENDS: &str = "extends";
/// Largest depth of `extends` below a configuration.
const MAX_LEVELS: usize = 4;
/// Largest size of a file in bytes.
const MAX_BYTES: u64 = 1 << 20;
/// Most characters quoted from a file in an error.
pub(super) const MAX_SHOWN: usize = 1000;

/// Merged layers of a configuration.
#[derive(Default)]
pub(super) struct Layers {
    /// Merged values.
    pub(super) table: toml::Table,
    /// Origin of each value.
    pub(super) origins: Origins,
    /// Canonical paths of all files read so far.
    seen: BTreeSet<PathBuf>,
}

/// Paths from a configuration to the file being read, as written in `extends`.
type Chain<'a> = &'a [&'a Path];

impl Layers {
    /// Reads the file and the files that it extends.
    pub(super) fn read(path: &Path) -> Result<Self, ConfigError> {
        Self::parse(&read(path, None)?, path)
    }

    /// Merges the text of the file `path` over the files that it extends.
    pub(super) fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let mut layers = Self::default();
        layers.seen.insert(canonical(path));
        layers.add(text, path, &[])?;
        Ok(layers)
    }

    /// Merges the files that a file extends, then the file itself. `above` is the chain of files that extend the file.
    fn add(&mut self, text: &str, path: &Path, above: Chain<'_>) -> Result<(), ConfigError> {
        let mut table: toml::Table = text.parse().map_err(|e: toml::de::Error| syntax_error(path, e))?;
        let chain = [above, &[path]].concat();
        for base in take_bases(&mut table, path)? {
            let text = self.read_base(&base, path, &chain)?;
            self.add(&text, &base, &chain)?;
        }
        let origin = Origin::File(path.to_owned());
        merge(&mut self.table, table, "", &origin, &mut self.origins);
        self.origins.push(path);
        Ok(())
    }

    /// Reads a file that `by` extends. `chain` is the chain of extending files and ends with `by`.
    fn read_base(&mut self, base: &Path, by: &Path, chain: Chain<'_>) -> Result<String, ConfigError> {
        let refuse = |detail: String| ConfigError::Extends {
            path: by.to_owned(),
            detail,
        };
        let names = || {
            let all = chain.iter().copied().chain([base]);
            all.map(|path| format!("`{}`", path.display()))
                .collect::<Vec<_>>()
                .join(" -> ")
        };
        let id = canonical(base);
        if chain.iter().any(|above| canonical(above) == id) {
            return Err(refuse(format!("found a cycle: {}", names())));
        }
        if chain.len() > MAX_LEVELS {
            return Err(refuse(format!(
                "found {} levels of bases, expected at most {MAX_LEVELS}: {}",
                chain.len(),
                names()
            )));
        }
        if !self.seen.insert(id) {
            return Err(refuse(format!(
                "found `{}` a second time, expected once: its values would replace those of the files in between",
                base.display()
            )));
        }
        read(base, Some(by))
    }

    /// Applies a `--set` override.
    pub(super) fn set(&mut self, item: &str) -> Result<(), ConfigError> {
        let bad = || ConfigError::Override { text: item.to_owned() };
        let (key, value) = item.split_once('=').ok_or_else(bad)?;
        let value: toml::Value = format!("v = {value}")
            .parse::<toml::Table>()
            .ok()
            .and_then(|mut t| t.remove("v"))
            .unwrap_or_else(|| toml::Value::String(value.to_owned()));
        let key = key.trim();
        let refuse = |detail: String| ConfigError::Key {
            key: key.to_owned(),
            origins: vec![Origin::Set],
            detail,
        };
        if key.split('.').next() == Some(EXTENDS) {
            return Err(refuse("only a file extends another one".to_owned()));
        }
        let mut parts: Vec<&str> = key.split('.').collect();
        let last = parts.pop().filter(|p| !p.is_empty()).ok_or_else(bad)?;
        let mut at = &mut self.table;
        for part in parts {
            let next = at.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
            at = next
                .as_table_mut()
                .ok_or_else(|| refuse(format!("`{part}` holds a value, not a section")))?;
        }
        self.origins.record(key, &value, &Origin::Set);
        at.insert(last.to_owned(), value);
        Ok(())
    }
}

/// Removes `extends` from a file's table and returns its paths, joined to the file's folder.
fn take_bases(table: &mut toml::Table, path: &Path) -> Result<Vec<PathBuf>, ConfigError> {
    let folder = path.parent().unwrap_or(Path::new(""));
    let names = match table.remove(EXTENDS) {
        None => return Ok(Vec::new()),
        Some(toml::Value::Array(names)) => names,
        Some(name) => vec![name],
    };
    let bases = names.iter().map(|name| match name.as_str() {
        Some(name) => Ok(folder.join(name)),
        None => Err(ConfigError::Extends {
            path: path.to_owned(),
            detail: format!(
                "found a value of type {}, expected the name of a file or a list of names",
                name.type_str()
            ),
        }),
    });
    bases.collect()
}

/// Merges the section `key` (empty: the whole table) key by key. A value that is not a section replaces the earlier value.
fn merge(into: &mut toml::Table, over: toml::Table, key: &str, origin: &Origin, origins: &mut Origins) {
    for (name, value) in over {
        let key = if key.is_empty() {
            name.clone()
        } else {
            format!("{key}.{name}")
        };
        match (into.get_mut(&name), value) {
            (Some(toml::Value::Table(inner)), toml::Value::Table(over)) => merge(inner, over, &key, origin, origins),
            (_, value) => {
                origins.record(&key, &value, origin);
                into.insert(name, value);
            }
        }
    }
}

/// Returns the canonical path of a file, or `path` for a file that does not exist.
fn canonical(path: &Path) -> PathBuf {
    fs::canonicalize(path).unwrap_or_else(|_| path.to_owned())
}

/// Reads a file of at most [`MAX_BYTES`] bytes.
fn read(path: &Path, extended_by: Option<&Path>) -> Result<String, ConfigError> {
    let failed = |source| ConfigError::Read {
        path: path.to_owned(),
        extended_by: extended_by.map(Path::to_owned),
        source,
    };
    let mut bytes = Vec::new();
    // one byte above the limit suffices to detect a file that is too long
    let file = File::open(path).map_err(failed)?;
    file.take(MAX_BYTES + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > MAX_BYTES {
        return Err(ConfigError::TooLong {
            path: path.to_owned(),
            limit: MAX_BYTES,
        });
    }
    String::from_utf8(bytes).map_err(|e| syntax_error(path, e))
}

/// Returns the error for a text that is not TOML, truncated because the parser quotes the whole faulty line.
fn syntax_error(path: &Path, error: impl Display) -> ConfigError {
    ConfigError::Syntax {
        path: path.to_owned(),
        detail: shown(&one_line(error), MAX_SHOWN),
    }
}
