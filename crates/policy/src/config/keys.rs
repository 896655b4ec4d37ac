//! The keys of a configuration as dotted paths, with their values.

use std::collections::BTreeMap;

use super::{ConfigError, RunConfig};
use crate::message::one_line;

/// Returns every key of a TOML table by dotted path; a section has no entry.
pub fn keys(table: &toml::Table) -> BTreeMap<String, &toml::Value> {
    let mut keys = BTreeMap::new();
    walk("", table, &mut keys);
    keys
}

fn walk<'a>(section: &str, table: &'a toml::Table, keys: &mut BTreeMap<String, &'a toml::Value>) {
    for (name, value) in table {
        let key = if section.is_empty() {
            name.clone()
        } else {
            format!("{section}.{name}")
        };
        match value {
            toml::Value::Table(inner) => walk(&key, inner, keys),
            value => {
                keys.insert(key, value);
            }
        }
    }
}

impl RunConfig {
    /// Returns every key of the effective configuration by dotted path, with its value in TOML.
    ///
    /// # Errors
    /// See [`RunConfig::to_toml`].
    pub fn keys(&self) -> Result<BTreeMap<String, String>, ConfigError> {
        let table: toml::Table = self.to_toml()?.parse().map_err(|e: toml::de::Error| ConfigError::Key {
            key: "(all)".to_owned(),
            origins: Vec::new(),
            detail: one_line(e),
        })?;
        let all = keys(&table).into_iter();
        Ok(all.map(|(key, value)| (key, value.to_string())).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_are_dotted_and_sections_have_none() {
        let table: toml::Table = "top = 1\n[a]\nb = [1, 2]\n[a.c]\nd = \"text\"\n[a.empty]\n"
            .parse()
            .expect("TOML");
        let found: Vec<(String, String)> = keys(&table).into_iter().map(|(k, v)| (k, v.to_string())).collect();
        let want = [("a.b", "[1, 2]"), ("a.c.d", "\"text\""), ("top", "1")];
        assert_eq!(found, want.map(|(k, v)| (k.to_owned(), v.to_owned())));
    }
}
