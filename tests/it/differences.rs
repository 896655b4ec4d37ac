//! `docs/differences.md` and the tests agree: every difference of a golden test has a row with the same numbers, and every row has a test.

use std::{collections::BTreeSet, path::Path};

use integration_tests::{COMMITTED_GOLDEN, golden_dir, skip};
use learner::loss::mean_entropy;
use tch::{Kind, Tensor};

const ROOT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/..");

/// A row of the table with numbers.
struct Row {
    reference: String,
    ours: String,
    shown: String,
}

/// Returns the cells of the rows below `heading`, without the table's header.
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

/// Returns whether the golden set is the committed set, to which the document's numbers and cases belong. The tests compare another set
/// with the reference, but not with the document.
pub(crate) fn of_the_committed_set(what: &str) -> bool {
    let sums = |dir: &Path| std::fs::read(dir.join("SHA256SUMS"));
    let committed = sums(Path::new(COMMITTED_GOLDEN)).expect("SHA256SUMS of the committed golden set");
    let same = sums(&golden_dir()).is_ok_and(|of_this| of_this == committed);
    if !same {
        let why = "this golden set is not the committed one";
        skip(&format!("the numbers of {what} in docs/differences.md"), why);
    }
    same
}

/// Returns whether `number` is a complete number in the text: 0 is not in 0.5, nor 1 in c001.
fn says(text: &str, number: f64) -> bool {
    text.split(|c: char| !(c.is_ascii_alphanumeric() || ['.', '-', '+'].contains(&c)))
        .filter_map(|word| word.trim_end_matches('.').parse::<f64>().ok())
        .any(|found| found.to_bits() == number.to_bits())
}

/// Asserts that the differing cases of a golden file, with their numbers, are those of the rows that name the file.
pub(crate) fn check_cases(stem: &str, differs: &[(String, String)]) {
    if !of_the_committed_set(stem) {
        return;
    }
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
        for cell in [&row.reference, &row.ours] {
            if let Ok(number) = cell.parse::<f64>()
                && number.is_finite()
            {
                assert!(
                    found.iter().any(|why| says(why, number)),
                    "{stem} {cases:?}: {cell} is not in {found:?}"
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

/// Asserts that the row of the golden case `shown` has these numbers, if the golden set is the committed set.
pub(crate) fn check_numbers(shown: &str, reference: f64, ours: f64) {
    if of_the_committed_set(shown) {
        check_row(shown, reference, ours);
    }
}

/// Asserts that the row of `shown` has these numbers.
fn check_row(shown: &str, reference: f64, ours: f64) {
    let row = rows().into_iter().find(|row| row.shown == format!("`{shown}`"));
    let row = row.unwrap_or_else(|| panic!("docs/differences.md has no row shown by `{shown}`"));
    for (cell, number) in [(&row.reference, reference), (&row.ours, ours)] {
        let written: f64 = cell
            .parse()
            .unwrap_or_else(|_| panic!("{shown}: `{cell}` is not a number"));
        // the document has four decimals
        assert!(
            (written - number).abs() < 1e-4,
            "{shown}: the document says {written}, found {number}"
        );
    }
}

#[test]
fn a_number_of_the_document_is_a_whole_one_of_the_text() {
    let text = "c001: a loss of -0.40982, ours 0.4 (floor 1.0e-7), 10 elements.";
    for number in [-0.40982, 0.4, 1e-7, 10.0] {
        assert!(says(text, number), "{number}");
    }
    for number in [0.0, 1.0, 0.40982, 40982.0, 7.0] {
        assert!(!says(text, number), "{number}");
    }
}

/// With an entropy per row `[N]` and a mask `[N, 1]`, the reference's product is `[N, N]`.
#[test]
fn the_document_has_both_numbers_of_the_entropy_bonus() {
    let entropy = Tensor::from_slice(&[1.0f32, 2.0, 3.0, 4.0]);
    let mask = Tensor::from_slice(&[true, true, true, false]).reshape([4, 1]);
    let reference = (&entropy * &mask).sum(Kind::Float) / mask.sum(Kind::Float);
    let ours = mean_entropy(&entropy, Some(&mask)).expect("entropy");
    check_row(
        "the_entropy_bonus_is_a_mean_whatever_the_masks_shape",
        reference.double_value(&[]),
        ours.double_value(&[]),
    );
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
    // numbers of golden cases are checked by their tests, names of test functions here
    for row in rows() {
        let name = row.shown.trim_matches('`');
        let by_golden = row.shown.starts_with("`rlinf_") || row.shown.starts_with("`pi0");
        assert!(by_golden || all.contains(&format!("fn {name}(")), "no test `{name}`");
    }
}
