//! Meaning of configuration keys, read from the tables of `configs/README.md`, the only place that documents keys.

const README: &str = include_str!("../../../configs/README.md");

/// Documented key with its full path; `*` stands for any section.
struct Entry {
    path: String,
    /// Loss that the key belongs to; `None` for keys of every loss.
    of: Option<&'static str>,
    meaning: &'static str,
}

/// Returns the words in backticks.
fn quoted(text: &'static str) -> impl Iterator<Item = &'static str> {
    text.split('`').skip(1).step_by(2)
}

fn entries() -> Vec<Entry> {
    let mut all = Vec::new();
    let mut section: Option<&str> = None;
    for line in README.lines() {
        if let Some(heading) = line.strip_prefix("## ") {
            let names: Vec<&str> = quoted(heading).map(|name| name.trim_matches(['[', ']'])).collect();
            // under a heading of several sections, keys have full paths
            section = if let [name] = names[..] { Some(name) } else { None };
            continue;
        }
        let Some((keys, meaning)) = line
            .strip_prefix("| `")
            .and_then(|_| line.trim_matches('|').split_once(" | "))
        else {
            continue;
        };
        let (keys, of) = keys.split_once(" of ").unwrap_or((keys, ""));
        let mut prefix = "";
        for key in quoted(keys) {
            // `train.a`, `b` means train.a and train.b
            let key = match key.rsplit_once('.') {
                Some((own, _)) => {
                    prefix = own;
                    key.to_owned()
                }
                None if prefix.is_empty() => key.to_owned(),
                None => format!("{prefix}.{key}"),
            };
            all.push(Entry {
                path: section.map_or_else(|| key.clone(), |section| format!("{section}.{key}")),
                of: quoted(of).next(),
                meaning: meaning.trim(),
            });
        }
    }
    all
}

/// Returns the length of the path by which an entry matches a key; `None` without a match.
fn fit(entry: &Entry, key: &str) -> Option<usize> {
    let rest = match entry.path.strip_prefix("*.") {
        Some(tail) => key.split_once('.')?.1.strip_prefix(tail)?,
        None => key.strip_prefix(entry.path.as_str())?,
    };
    (rest.is_empty() || rest.starts_with('.')).then_some(entry.path.len())
}

/// Returns the meaning of a dotted key in a run with this loss. A key inside a table that is documented as a whole has the
/// table's meaning.
pub(super) fn meaning(key: &str, loss: &str) -> Option<&'static str> {
    entries()
        .iter()
        .filter(|entry| entry.of.is_none_or(|of| of == loss))
        .filter_map(|entry| Some((fit(entry, key)?, entry.meaning)))
        .max_by_key(|(length, _)| *length)
        .map(|(_, meaning)| meaning)
}
