//! `docs/differences.md` and the tests say the same: every difference that a golden test finds has its row with the numbers that were
//! found, and every row has its test.

use std::{collections::BTreeSet, path::Path};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// A row of the table with numbers.
struct Row {
    reference: String,
    ours: String,
    shown: String,
}

/// The cells of the rows below `heading`, the head of the table left out.
fn table(heading: &str) -> Vec<Vec<String>> {
    let text = std::fs::read_to_string(Path::new(ROOT).join("docs/differences.md")).expect("docs/differences.md");
    let (_, below) = text
        .split_once(heading)
        .unwrap_or_else(|| panic!("no `{heading}` in the document"));
    let lines = below
        .lines()
        .skip_while(|line| !line.starts_with('|'))
        .take_while(|line| line.starts_with('|'));
    let cells = |line: &str| {
        line.trim_matches('|')
            .split(" | ")
            .map(|cell| cell.trim().to_owned())
            .collect()
    };
    lines.skip(2).map(cells).collect()
}

fn rows() -> Vec<Row> {
    let rows = table("## With numbers").into_iter().map(|cells| {
        let [_, _, reference, ours, _, shown] = cells.try_into().unwrap_or_else(|row| panic!("six cells: {row:?}"));
        Row { reference, ours, shown }
    });
    rows.collect()
}

/// The cases of a golden file that differ, with what was found, are those of the rows that name the file.
pub(crate) fn check_cases(stem: &str, differs: &[(String, String)]) {
    let mut documented = BTreeSet::new();
    for row in rows() {
        let Some(cases) = row.shown.strip_prefix(&format!("`{stem}` ")) else {
            continue;
        };
        let cases: Vec<&str> = cases.split(' ').collect();
        let found: Vec<&str> = differs
            .iter()
            .filter(|(case, _)| cases.contains(&case.as_str()))
            .map(|(_, why)| why.as_str())
            .collect();
        for number in [&row.reference, &row.ours] {
            if number.parse::<f64>().is_ok_and(f64::is_finite) {
                assert!(
                    found.iter().any(|why| why.contains(number)),
                    "{stem} {cases:?}: {number} is not in {found:?}"
                );
            }
        }
        documented.extend(cases.into_iter().map(str::to_owned));
    }
    let differing: BTreeSet<String> = differs.iter().map(|(case, _)| case.clone()).collect();
    assert_eq!(
        documented, differing,
        "{stem}: cases in docs/differences.md, and cases that differ"
    );
}

/// The row that is shown by `shown` has these numbers.
pub(crate) fn check_numbers(shown: &str, reference: f64, ours: f64) {
    let row = rows().into_iter().find(|row| row.shown == format!("`{shown}`"));
    let row = row.unwrap_or_else(|| panic!("docs/differences.md has no row shown by `{shown}`"));
    for (cell, number) in [(&row.reference, reference), (&row.ours, ours)] {
        let written: f64 = cell
            .parse()
            .unwrap_or_else(|_| panic!("{shown}: `{cell}` is no number"));
        // the document has four decimals
        assert!(
            (written - number).abs() < 1e-4,
            "{shown}: the document says {written}, found {number}"
        );
    }
}

#[test]
fn what_shows_a_difference_is_there() {
    fn source(dir: &Path, all: &mut String) {
        for entry in std::fs::read_dir(dir).expect("listing") {
            let path = entry.expect("entry").path();
            if path.is_dir() {
                source(&path, all);
            } else if path.extension().is_some_and(|e| e == "rs") {
                all.push_str(&std::fs::read_to_string(&path).expect("source"));
            }
        }
    }
    let mut all = String::new();
    for dir in ["crates", "learner/src", "rollout-engine/src", "export/src", "tests/it"] {
        source(&Path::new(ROOT).join(dir), &mut all);
    }
    let behaviour = table("## In behaviour");
    assert!(behaviour.len() > 5);
    for row in behaviour {
        let shown = row.last().expect("a cell");
        for name in shown.split(", ").map(|name| name.trim_matches('`')) {
            assert!(all.contains(&format!("fn {name}(")), "no test `{name}`: {row:?}");
        }
    }
    // tests and golden cases that have numbers are named by their tests, functions by this one
    for row in rows() {
        let name = row.shown.trim_matches('`');
        let by_golden = row.shown.starts_with("`rlinf_") || row.shown.starts_with("`pi0");
        assert!(by_golden || all.contains(&format!("fn {name}(")), "no test `{name}`");
    }
}
