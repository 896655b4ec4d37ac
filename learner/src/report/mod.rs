//! Report on runs: one HTML page (success curves, final numbers, evaluation videos, differences of the configurations) and the
//! success curves as a PNG. The page is self-contained: it loads nothing from the network and runs no script.

mod bounded;
mod curves;
mod run;
mod series;
mod html;
mod chart;
mod panels;
mod plot;
mod page;

use std::path::{Path, PathBuf};

use policy::bundle::write_atomic;

pub use curves::Point;
pub(crate) use panels::font;
pub use run::{Evaluation, Run};
pub use series::{Difference, Spread, differences, group, spread};

use crate::error::{LearnerError, Result};

/// Default file name of the page.
const PAGE: &str = "report.html";

/// Writes the page about the runs in `dirs` and returns its path. Each folder has `metrics.jsonl` and `config.toml`, optionally
/// `eval.json` and `eval.gif`. The page is written to `out`, by default to `report.html` in the parent folder of the first run.
/// `picture` is the path of an optional PNG of the success curves.
///
/// # Errors
/// `dirs` is empty or names a run twice, a run has no success values, or a file is unreadable or malformed. The page or the
/// picture cannot be written. No partial page is left.
pub fn write(dirs: &[PathBuf], out: Option<&Path>, picture: Option<&Path>) -> Result<PathBuf> {
    let mut full = Vec::new();
    for dir in dirs {
        let path = dir.canonicalize().map_err(|e| LearnerError::Run {
            path: dir.clone(),
            detail: format!("it cannot be opened ({e}); give the folder (`runner.output_dir`) of a `learner train`"),
        })?;
        if full.contains(&path) {
            return Err(LearnerError::Run {
                path: dir.clone(),
                detail: "it is given twice, name each run once".to_owned(),
            });
        }
        full.push(path);
    }
    let Some(first) = dirs.first() else {
        return Err(LearnerError::Zero { what: "RUN" });
    };
    let runs = full
        .iter()
        .zip(names(&full))
        .map(|(dir, name)| Run::load(dir, name))
        .collect::<Result<Vec<_>>>()?;
    // `.` and `..` have no file name: the parent of the canonical path is used
    let parent = match first.file_name() {
        Some(_) => first.parent().map(Path::to_owned),
        None => full.first().and_then(|d| d.parent()).map(Path::to_owned),
    };
    let out = out.map_or_else(|| parent.unwrap_or_default().join(PAGE), Path::to_owned);
    write_atomic(&out, page::page(&runs).as_bytes())?;
    if let Some(picture) = picture {
        plot::draw(&runs, picture)?;
    }
    Ok(out)
}

/// Draws the success curves of the run in `dir` (training, unseen episodes) over training episodes to `DIR/success.png`.
///
/// # Errors
/// The metrics cannot be read, or the picture cannot be written.
pub fn success_curve(dir: &Path) -> Result<()> {
    plot::draw_one(dir, &dir.join("success.png"))
}

/// Returns the names of the runs: the shortest path suffixes that distinguish all runs.
fn names(dirs: &[PathBuf]) -> Vec<String> {
    let most = dirs.iter().map(|d| d.components().count()).max().unwrap_or(0);
    let ends = |count: usize| -> Vec<String> {
        dirs.iter()
            .map(|dir| {
                let skip = dir.components().count().saturating_sub(count);
                let end: PathBuf = dir.components().skip(skip).collect();
                end.display().to_string()
            })
            .collect()
    };
    (1..=most)
        .map(ends)
        .find(|names| {
            names
                .iter()
                .enumerate()
                .all(|(i, n)| !names.iter().take(i).any(|m| m == n))
        })
        .unwrap_or_else(|| ends(most))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_as_short_as_they_can_be() {
        let names = |dirs: &[&str]| super::names(&dirs.iter().map(PathBuf::from).collect::<Vec<_>>());
        assert_eq!(names(&["/runs/a", "/runs/b"]), ["a", "b"]);
        assert_eq!(names(&["/x/seed1", "/y/seed1"]), ["x/seed1", "y/seed1"]);
        assert_eq!(names(&["/runs/only"]), ["only"]);
    }
}
