//! Errors of a configuration.

use std::{fmt, path::PathBuf};

use super::{Origin, Origins};

/// A configuration that cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("failed to read the configuration `{path}`{}", which_extends(.extended_by.as_ref()))]
    Read {
        /// Which file.
        path: PathBuf,
        /// The file that extends it; absent for the file that was named on the command line.
        extended_by: Option<PathBuf>,
        /// Why.
        source: std::io::Error,
    },
    /// A file is longer than a configuration may be.
    #[error(
        "failed to read the configuration `{path}`: found more than the {limit} bytes that a configuration may have"
    )]
    TooLong {
        /// Which file.
        path: PathBuf,
        /// Most bytes of a file.
        limit: u64,
    },
    /// A file is not TOML.
    #[error("configuration `{path}` is not TOML: {detail}")]
    Syntax {
        /// Which file.
        path: PathBuf,
        /// Where and why, on one line.
        detail: String,
    },
    /// A file extends what it may not.
    #[error("configuration key `extends` ({path}): {detail}")]
    Extends {
        /// The file with the key.
        path: PathBuf,
        /// What is wrong and what would be right.
        detail: String,
    },
    /// A key or a value is wrong.
    #[error("configuration key `{key}`{}: {detail}", Places(.origins))]
    Key {
        /// Path of the key.
        key: String,
        /// Where the key has its value from; empty when unknown.
        origins: Vec<Origin>,
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

impl ConfigError {
    /// Returns the refusal of a key: `detail` says found and expected.
    pub fn key(key: &str, detail: impl Into<String>) -> Self {
        Self::Key {
            key: key.to_owned(),
            origins: Vec::new(),
            detail: detail.into(),
        }
    }

    /// Completes an error that names a key by the origins of that key.
    #[must_use]
    pub fn locate(mut self, all: &Origins) -> Self {
        if let Self::Key { key, origins, .. } = &mut self
            && origins.is_empty()
        {
            *origins = all.under(key);
        }
        self
    }
}

fn which_extends(by: Option<&PathBuf>) -> String {
    by.map_or_else(String::new, |path| format!(", which `{}` extends", path.display()))
}

/// Origins in brackets; nothing when there are none.
struct Places<'a>(&'a [Origin]);

impl fmt::Display for Places<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, origin) in self.0.iter().enumerate() {
            write!(f, "{}{origin}", if index == 0 { " (" } else { ", " })?;
        }
        if self.0.is_empty() { Ok(()) } else { f.write_str(")") }
    }
}
