//! Loading a configuration from its layers, errors that name key and file, and the effective configuration with its digest.

use std::path::Path;

use sha2::{Digest, Sha256};

use super::{
    ConfigError, Neutral, Origins, RunConfig,
    layers::{EXTENDS, Layers, MAX_SHOWN},
};
use crate::message::{one_line, shown};

impl RunConfig {
    /// Loads a configuration with the files that it extends, and applies the overrides (`a.b=c`).
    ///
    /// # Errors
    /// Names the file or the key; for an unknown key also the nearest known key.
    pub fn load(path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        Ok(Self::load_with_origins(path, overrides)?.0)
    }

    /// Loads a configuration together with the origins of its values.
    ///
    /// # Errors
    /// See [`RunConfig::load`].
    pub fn load_with_origins(path: &Path, overrides: &[String]) -> Result<(Self, Origins), ConfigError> {
        Self::from_layers(Layers::read(path)?, overrides)
    }

    /// Loads a configuration from `text`. Paths in `extends` are relative to the folder of `path`.
    ///
    /// # Errors
    /// See [`RunConfig::load`].
    pub fn parse(text: &str, path: &Path, overrides: &[String]) -> Result<Self, ConfigError> {
        Ok(Self::from_layers(Layers::parse(text, path)?, overrides)?.0)
    }

    fn from_layers(mut layers: Layers, overrides: &[String]) -> Result<(Self, Origins), ConfigError> {
        for item in overrides {
            layers.set(item)?;
        }
        let Layers { table, origins, .. } = layers;
        match serde_path_to_error::deserialize(toml::Value::Table(table)) {
            Ok(config) => Ok((config, origins)),
            Err(error) => Err(refusal(&error).locate(&origins)),
        }
    }

    /// Returns the effective configuration as TOML.
    ///
    /// # Errors
    /// A value that TOML cannot hold (an integer beyond i64).
    pub fn to_toml(&self) -> Result<String, ConfigError> {
        toml::to_string_pretty(self).map_err(|e| ConfigError::Key {
            key: "(all)".to_owned(),
            origins: Vec::new(),
            detail: one_line(e),
        })
    }

    /// Returns the SHA-256 of the effective configuration without the keys of [`Neutral::Place`], which do not change a result.
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

/// Returns the lower-case hexadecimal form of bytes.
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

/// Converts serde's error into an error that names the key and, for an unknown key, the nearest known key.
fn refusal(error: &serde_path_to_error::Error<toml::de::Error>) -> ConfigError {
    let mut key = error.path().to_string();
    let message = one_line(error.inner());
    let detail = match unknown_field(&message) {
        Some((unknown, mut known)) => {
            if key == "." {
                key.clone_from(&unknown);
            } else if key.rsplit('.').next() != Some(unknown.as_str()) {
                key = format!("{key}.{unknown}");
            }
            if key == unknown {
                known.push(EXTENDS.to_owned());
            }
            nearest(&unknown, &known)
        }
        None => message,
    };
    ConfigError::Key {
        key: shown(&key, MAX_SHOWN),
        origins: Vec::new(),
        detail: shown(&detail, MAX_SHOWN),
    }
}

/// Parses serde's "unknown field `a`, expected one of `b`, `c`" into the unknown and the known keys.
fn unknown_field(message: &str) -> Option<(String, Vec<String>)> {
    let rest = message.split_once("unknown field `")?.1;
    let (unknown, rest) = rest.split_once('`')?;
    // the text after " in `" names the section, not a key
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
