//! Test of the effective configuration of every recipe, value by value, against the committed digests in `effective.txt`.
//!
//! The file has a SHA-256 for each recipe over its sorted `key = value` lines, and for each key over its sorted `recipe = value`
//! lines. A differing recipe and a differing key together identify the differing value. After an intended
//! change, `PIRL_WRITE_EFFECTIVE=1 cargo test --release -p policy effective` rewrites the file.

use std::{collections::BTreeMap, path::Path};

use sha2::{Digest, Sha256};

use super::recipes;
use crate::config::hex;

/// Values of one recipe by key, or of one key by recipe.
type Values = BTreeMap<String, String>;

/// Returns the `name = value` lines in the order of the names.
fn listing(values: &Values) -> String {
    let lines = values.iter().map(|(name, value)| format!("{name} = {value}\n"));
    lines.collect::<Vec<_>>().concat()
}

/// Returns every line of `effective.txt` (`recipe NAME` or `key NAME`) with the values in its digest.
fn effective() -> BTreeMap<String, Values> {
    let mut all: BTreeMap<String, Values> = BTreeMap::new();
    for (name, plan) in recipes() {
        for (key, value) in plan.config.keys().expect("keys") {
            let recipe = all.entry(format!("recipe {name}")).or_default();
            recipe.insert(key.clone(), value.clone());
            let by_recipe = all.entry(format!("key {key}")).or_default();
            by_recipe.insert(name.clone(), value);
        }
    }
    all
}

#[test]
fn every_recipe_has_the_committed_effective_configuration() {
    let all = effective();
    let found: BTreeMap<&str, String> = all
        .iter()
        .map(|(line, values)| (line.as_str(), hex(&Sha256::digest(listing(values)))))
        .collect();
    if std::env::var_os("PIRL_WRITE_EFFECTIVE").is_some() {
        let lines = found.iter().map(|(line, digest)| format!("{digest}  {line}\n"));
        let text = lines.collect::<Vec<_>>().concat();
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/recipes/effective.txt");
        std::fs::write(path, text).expect("writing effective.txt");
        return;
    }
    let committed: BTreeMap<&str, &str> = include_str!("effective.txt")
        .lines()
        .map(|line| line.split_once("  ").expect("a digest and a name"))
        .map(|(digest, line)| (line, digest))
        .collect();
    let mut differing: Vec<&str> = found
        .iter()
        .filter(|(line, digest)| committed.get(*line) != Some(&digest.as_str()))
        .map(|(line, _)| *line)
        .collect();
    differing.extend(committed.keys().filter(|line| !found.contains_key(*line)));
    for line in differing.iter().filter(|line| line.starts_with("key ")) {
        println!("{line}, now:\n{}", all.get(*line).map(listing).unwrap_or_default());
    }
    assert!(
        differing.is_empty(),
        "differs from effective.txt (the present values of these keys are above): {differing:#?}"
    );
}
