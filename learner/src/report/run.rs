//! Files of a run's folder that a report shows.

use std::{collections::BTreeMap, io::ErrorKind, path::Path};

use policy::config::keys;
use serde::Deserialize;

use super::{
    bounded::read,
    curves::{Curves, Point},
};
use crate::error::{LearnerError, Result, io};

/// Largest size of `config.toml` and of `eval.json`, in bytes.
const TEXT_LIMIT: u64 = 1 << 20;
/// Largest size of an `eval.gif` that is embedded in a page, in bytes.
const VIDEO_LIMIT: u64 = 64 << 20;

/// Entry of `eval.json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Evaluation {
    /// Policy version.
    pub version: u64,
    /// Success rate, 0 to 1.
    pub success: f64,
    /// Number of unseen episodes.
    pub episodes: u64,
}

/// `eval.gif` of a run.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Video {
    /// The file does not exist.
    Absent,
    /// Reason for not embedding the file in the page.
    LeftOut(String),
    /// Content of the file.
    Gif(Vec<u8>),
}

/// Run as shown in a report.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Name in the page.
    pub name: String,
    /// Effective configuration as dotted keys with TOML values; `OUTPUT_DIR` stands for the run's folder.
    pub config: BTreeMap<String, String>,
    /// Success of the sampling policy in each training iteration.
    pub train: Vec<Point>,
    /// Success of the ODE policy on unseen episodes, at the validations of the training.
    pub eval: Vec<Point>,
    /// Number of episodes of the last point of `eval`.
    pub eval_episodes: Option<u64>,
    /// Completed training iterations.
    pub iterations: u64,
    /// Number of lines of `metrics.jsonl` that are not valid metrics, for instance a line cut when the run was killed.
    pub unreadable: usize,
    /// Entries of `eval.json` by ascending version; empty without the file.
    pub evaluations: Vec<Evaluation>,
    /// Evaluation video `eval.gif`.
    pub(super) video: Video,
}

impl Run {
    /// Loads the run in `dir`; `name` is the name in the page.
    ///
    /// # Errors
    /// `metrics.jsonl` or `config.toml` is missing, no line has a success rate, or a file is malformed or too large.
    pub fn load(dir: &Path, name: String) -> Result<Self> {
        let bad = |detail: String| LearnerError::Run {
            path: dir.to_owned(),
            detail,
        };
        let curves = Curves::read(dir)?;
        if curves.train.is_empty() && curves.eval.is_empty() {
            return Err(bad(
                "no line of its `metrics.jsonl` has the success of a `train` or `eval` stage; run `learner train` first"
                    .to_owned(),
            ));
        }
        let text = |path: &Path, bytes: Vec<u8>| {
            String::from_utf8(bytes).map_err(|e| bad(format!("`{}` is not UTF-8: {e}", path.display())))
        };
        let path = dir.join("config.toml");
        let bytes = read(&path, TEXT_LIMIT)?.ok_or_else(|| bad("it has no `config.toml`".to_owned()))?;
        let table: toml::Table = text(&path, bytes)?
            .parse()
            .map_err(|e: toml::de::Error| bad(format!("`config.toml` is not TOML: {}", e.message())))?;
        let path = dir.join("eval.json");
        let mut evaluations: Vec<Evaluation> = read(&path, TEXT_LIMIT)?
            .map(|bytes| serde_json::from_slice(&bytes))
            .transpose()
            .map_err(|e| bad(format!("`eval.json` is not as `learner eval --json` writes it: {e}")))?
            .unwrap_or_default();
        evaluations.sort_by_key(|e| e.version);
        Ok(Self {
            name,
            config: shown(&table),
            train: curves.train,
            eval: curves.eval,
            eval_episodes: curves.eval_episodes,
            iterations: curves.iterations,
            unreadable: curves.unreadable,
            evaluations,
            video: video(&dir.join("eval.gif"))?,
        })
    }

    /// Returns the seconds of training up to the last point.
    pub fn seconds(&self) -> f64 {
        self.last().map_or(0.0, |p| p.seconds)
    }

    /// Returns the training episodes up to the last point.
    pub fn episodes(&self) -> f64 {
        self.last().map_or(0.0, |p| p.episodes)
    }

    fn last(&self) -> Option<&Point> {
        let ends = [self.train.last(), self.eval.last()];
        ends.into_iter()
            .flatten()
            .max_by(|a, b| a.seconds.total_cmp(&b.seconds))
    }
}

fn video(path: &Path) -> Result<Video> {
    let length = match std::fs::metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Video::Absent),
        other => other.map_err(io("opening", path))?.len(),
    };
    if length > VIDEO_LIMIT {
        let (found, most) = (length >> 20, VIDEO_LIMIT >> 20);
        return Ok(Video::LeftOut(format!(
            "it has {found} MiB, a page takes at most {most}"
        )));
    }
    let bytes = read(path, VIDEO_LIMIT)?.unwrap_or_default();
    Ok(if bytes.starts_with(b"GIF8") {
        Video::Gif(bytes)
    } else {
        Video::LeftOut("it is not a GIF".to_owned())
    })
}

/// Returns dotted keys with TOML values; `OUTPUT_DIR` replaces the path of the run's folder.
fn shown(table: &toml::Table) -> BTreeMap<String, String> {
    let own = table
        .get("runner")
        .and_then(|r| r.get("output_dir"))
        .and_then(|d| d.as_str())
        .map(|own| own.trim_end_matches('/'));
    let inside = |text: &str| {
        let rest = own.and_then(|own| text.strip_prefix(own));
        rest.filter(|rest| rest.starts_with('/'))
            .map(|rest| format!("OUTPUT_DIR{rest}"))
    };
    let all = keys(table).into_iter();
    all.map(|(key, value)| match value.as_str().and_then(inside) {
        Some(text) => (key, toml::Value::String(text).to_string()),
        None => (key, value.to_string()),
    })
    .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_folder_is_the_same_for_all_runs() {
        let table: toml::Table = r#"
            [runner]
            output_dir = "runs/a/"
            seed = 3
            [actor.model]
            checkpoint = "runs/a/sft/model.safetensors"
            other = "runs/ab"
            betas = [0.9, 0.95]
        "#
        .parse()
        .expect("TOML");
        let want = [
            ("actor.model.betas", "[0.9, 0.95]"),
            ("actor.model.checkpoint", "\"OUTPUT_DIR/sft/model.safetensors\""),
            ("actor.model.other", "\"runs/ab\""),
            ("runner.output_dir", "\"OUTPUT_DIR/\""),
            ("runner.seed", "3"),
        ];
        let got = shown(&table);
        assert_eq!(
            got.iter().map(|(k, v)| (k.as_str(), v.as_str())).collect::<Vec<_>>(),
            want
        );
    }
}
