//! Range checks for numbers of the configuration, and the error for a rejected key.

use crate::config::ConfigError;

/// Most threads of a program.
pub(super) const MAX_THREADS: usize = 1024;

/// Returns the error that rejects a key.
pub(super) fn refuse(key: &str, detail: impl Into<String>) -> ConfigError {
    ConfigError::key(key, detail)
}

/// Checks that a count is 1 to `bound`; `bound_key` is the key or the description of the bound.
pub(super) fn at_most(key: &str, value: usize, bound_key: &str, bound: usize) -> Result<(), ConfigError> {
    if value == 0 || value > bound {
        return Err(refuse(key, format!("{value}, expected 1 to `{bound_key}` = {bound}")));
    }
    Ok(())
}

/// Checks that a number is 0 to 1.
pub(super) fn fraction(key: &str, value: f64) -> Result<(), ConfigError> {
    if (0.0..=1.0).contains(&value) {
        return Ok(());
    }
    Err(refuse(key, format!("{value}, expected 0 to 1")))
}

/// Checks that a number is finite and above 0.
pub(super) fn positive(key: &str, value: f64) -> Result<(), ConfigError> {
    if value.is_finite() && value > 0.0 {
        return Ok(());
    }
    Err(refuse(key, format!("{value}, expected a number above 0")))
}

/// Checks that a number is finite and at least 0.
pub(super) fn not_negative(key: &str, value: f64) -> Result<(), ConfigError> {
    if value.is_finite() && value >= 0.0 {
        return Ok(());
    }
    Err(refuse(key, format!("{value}, expected a number of at least 0")))
}

/// Checks the hidden widths of a head: at most 16, each 1 to 65536.
pub(super) fn hidden(key: &str, hidden: &[usize]) -> Result<(), ConfigError> {
    if hidden.len() > 16 || hidden.iter().any(|width| !(1..=65_536).contains(width)) {
        return Err(refuse(
            key,
            format!("{hidden:?}, expected at most 16 widths of 1 to 65536"),
        ));
    }
    Ok(())
}
