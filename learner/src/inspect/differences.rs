//! Rows of `docs/differences.md` that apply to a configuration.

use std::collections::BTreeMap;

const DOCUMENT: &str = include_str!("../../../docs/differences.md");

/// Returns whether a condition holds: `key` is present, or `key = value`.
fn holds(condition: &str, keys: &BTreeMap<String, String>) -> bool {
    match condition.split_once(" = ") {
        Some((key, value)) => keys.get(key).is_some_and(|found| found == value),
        None => keys
            .range(condition.to_owned()..)
            .next()
            .is_some_and(|(key, _)| key == condition || key.starts_with(&format!("{condition}."))),
    }
}

/// Returns a line for each row that applies: subject, the reference's behavior, the behavior here.
pub(super) fn applying(keys: &BTreeMap<String, String>) -> Vec<String> {
    let rows = DOCUMENT.lines().filter(|line| line.starts_with("| "));
    rows.filter_map(|line| {
        let cells: Vec<&str> = line.trim_matches('|').split(" | ").map(str::trim).collect();
        let [what, applies, reference, ours, ..] = cells[..] else {
            return None;
        };
        // table heads and separators have no condition
        let conditions = applies.split(", ").map(|condition| condition.trim_matches('`'));
        let applies = applies == "all" || (applies.starts_with('`') && conditions.into_iter().any(|c| holds(c, keys)));
        applies.then(|| format!("{what}: reference {reference}, here {ours}"))
    })
    .collect()
}
