//! Errors of a configuration.

use std::{fmt, path::PathBuf};

use super::{Origin, Origins};

/// Reason for rejecting a configuration.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// A file cannot be read.
    #[error("failed to read the configuration `{path}`{}", which_extends(.extended_by.as_ref()))]
    Read {
        /// Path of the file.
        path: PathBuf,
        /// File whose `extends` names this file; absent for the file named on the command line.
        extended_by: Option<PathBuf>,
        /// Cause.
        source: std::io::Error,
    },
    /// A file is longer than the limit.
    #[error(
        "failed to read the configuration `{path}`: found more than the {limit} bytes that a configuration may have"
    )]
    TooLong {
        /// Path of the file.
        path: PathBuf,
        /// Largest size of a file in bytes.
        limit: u64,
    },
    /// A file is not TOML.
    #[error("configuration `{path}` is not TOML: {detail}")]
    Syntax {
        /// Path of the file.
        path: PathBuf,
        /// Place and cause, on one line.
        detail: String,
    },
    /// A file extends a file that is not allowed.
    #[error("configuration key `extends` ({path}): {detail}")]
    Extends {
        /// Path of the file with the key.
        path: PathBuf,
        /// Value found and value expected.
        detail: String,
    },
    /// A key or a value is wrong.
    #[error("configuration key `{key}`{}: {detail}", Places(.origins))]
    Key {
        /// Dotted path of the key.
        key: String,
        /// Origins of the key's value; empty if unknown.
        origins: Vec<Origin>,
        /// Value found and value expected.
        detail: String,
    },
    /// A `--set` that is not `a.b=c`.
    #[error("`--set {text}`: expected KEY=VALUE with a dotted key, like `algorithm.gamma=0.99`")]
    Override {
        /// Argument as typed.
        text: String,
    },
}

impl ConfigError {
    /// Returns the error for a key; `detail` states the value found and the value expected.
    pub fn key(key: &str, detail: impl Into<String>) -> Self {
        Self::Key {
            key: key.to_owned(),
            origins: Vec::new(),
            detail: detail.into(),
        }
    }

    /// Adds the origins of the key to an error that names a key.
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

/// Origins in parentheses; empty for an empty list.
struct Places<'a>(&'a [Origin]);

impl fmt::Display for Places<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, origin) in self.0.iter().enumerate() {
            write!(f, "{}{origin}", if index == 0 { " (" } else { ", " })?;
        }
        if self.0.is_empty() { Ok(()) } else { f.write_str(")") }
    }
}
