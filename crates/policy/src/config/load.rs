//! Reading a configuration: overrides, errors that name the key, and the effective configuration with its digest.

use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::{Neutral, RunConfig};
use crate::message::one_line;

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("reading the configuration `{path}`: {source}")]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// It is no TOML.
    #[error("configuration `{path}` is no TOML: {detail}")]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// Where and why, on one line.
        detail: String,
    },
    /// A key or a value is wrong.
    #[error("configuration key `{key}`: {detail}")]
    Key {
        /// Path of the key.
        key: String,
        /// What is wrong and what would be right.
        detail: String,
    },
    /// A `--set` that is not `a.b=c`.
    #[error("`--set {text}`: expected KEY=VALUE with a dotted key, like `algorithm.gamma=0.99`")]
    Override {
        /// What was typed.
        text: String,
    },
}

impl RunConfig {
    /// Reads a configuration and puts the overrides (`a.b=c`) on top.
    ///
    /// # Errors
    /// Names the file or the key; for an unknown key also the nearest right one.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let text = std::fs::read_to_string(path).map_err(|source| ConfigError::Read {
            path: path.to_owned(),
            source,
        })?;
        Self::parse(&text, path, overrides)
    }

    /// The same from a text; `path` is for messages.
    ///
    /// # Errors
    /// See [`RunConfig::load`].
    pub fn parse(text: &str, path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        let mut table: toml::Table = text.parse().map_err(|e: toml::de::Error| ConfigError::Syntax {
            path: path.to_owned(),
            detail: one_line(e),
        })?;
        for item in overrides {
            apply_override(&mut table, item)?;
        }
        serde_path_to_error::deserialize(toml::Value::Table(table)).map_err(|e| {
            let mut key = e.path().to_string();
            let message = one_line(e.inner());
            let detail = match unknown_field(&message) {
                Some((unknown, known)) => {
                    if !key.ends_with(&unknown) {
                        key = if key == "." {
                            unknown.clone()
                        } else {
                            format!("{key}.{unknown}")
                        };
                    }
                    nearest(&unknown, &known)
                }
                None => message,
            };
            ConfigError::Key { key, detail }
        })
    }

    /// The effective configuration as TOML.
    ///
    /// # Errors
    /// A value that TOML cannot hold (an integer beyond i64).
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        toml::to_string_pretty(self).map_err(|e| ConfigError::Key {
            key: "(all)".to_owned(),
            detail: one_line(e),
        })
    }

    /// SHA-256 over every key and value of the effective configuration but those of [`Neutral::Place`], which change no result.
    ///
    /// # Errors
    /// See [`RunConfig::to_toml`].
    pub fn digest(&self) -> Result<String, ConfigError> {
        let mut hash = Sha256::new();
        for (key, value) in self.keys()? {
            if Neutral::of(&key) != Some(Neutral::Place) {
                hash.update(format!("{key} = {value}\n"));
            }
        }
        Ok(hex(&hash.finalize()))
    }
}

/// Lower-case hexadecimal.
pub fn hex(bytes: &[u8]) -> String {
    bytes
        .iter()
        .fold(String::with_capacity(2 * bytes.len()), |mut text, b| {
            for nibble in [b >> 4, b & 15] {
                text.extend(char::from_digit(u32::from(nibble), 16));
            }
            text
        })
}

/// Takes serde's "unknown field `a`, expected one of `b`, `c`" apart.
fn unknown_field(message: &str) -> Option<(String, Vec<String>)> {
    let rest = message.split_once("unknown field `")?.1;
    let (unknown, rest) = rest.split_once('`')?;
    // what follows " in `" names the section, not a key
    let list = rest.split(" in `").next().unwrap_or_default();
    let known = list.split('`').skip(1).step_by(2).map(str::to_owned).collect();
    Some((unknown.to_owned(), known))
}

fn nearest(unknown: &str, known: &[String]) -> String {
    let best = known.iter().min_by_key(|k| strsim::damerau_levenshtein(unknown, k));
    match best {
        Some(best) => format!("unknown key, did you mean `{best}`? (known here: {})", known.join(", ")),
        None => "unknown key, none is known here".to_owned(),
    }
}

fn apply_override(table: &mut toml::Table, item: &str) -> Result<(), ConfigError> {
    let bad = || ConfigError::Override { text: item.to_owned() };
    let (key, value) = item.split_once('=').ok_or_else(bad)?;
    let value: toml::Value = format!("v = {value}")
        .parse::<toml::Table>()
        .ok()
        .and_then(|mut t| t.remove("v"))
        .unwrap_or_else(|| toml::Value::String(value.to_owned()));
    let mut parts: Vec<&str> = key.trim().split('.').collect();
    let last = parts.pop().filter(|p| !p.is_empty()).ok_or_else(bad)?;
    let mut at = table;
    for part in parts {
        let next = at.entry(part).or_insert_with(|| toml::Value::Table(toml::Table::new()));
        at = next.as_table_mut().ok_or_else(|| ConfigError::Key {
            key: key.trim().to_owned(),
            detail: format!("`{part}` holds a value, not a section"),
        })?;
    }
    at.insert(last.to_owned(), value);
    Ok(())
}
