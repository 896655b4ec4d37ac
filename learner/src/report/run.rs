//! What a run left in its folder, as far as a report shows it.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{ErrorKind, Read},
    path::Path,
};

use policy::config::keys;
use serde::Deserialize;

use crate::error::{LearnerError, Result, io};

/// The longest `metrics.jsonl` that is read, in bytes: some 300,000 iterations.
const METRICS_LIMIT: u64 = 256 << 20;
/// The longest `config.toml` and `eval.json`, in bytes.
const TEXT_LIMIT: u64 = 1 << 20;
/// The longest `eval.gif` that is put into a page, in bytes.
const VIDEO_LIMIT: u64 = 64 << 20;

/// One measured success rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Training episodes before it.
    pub episodes: f64,
    /// Seconds of training before it.
    pub seconds: f64,
    /// Success rate, 0 to 1.
    pub success: f64,
}

/// One entry of `eval.json`.
#[derive(Debug, Clone, PartialEq, Deserialize)]
pub struct Evaluation {
    /// Policy version.
    pub version: u64,
    /// Success rate, 0 to 1.
    pub success: f64,
    /// Over how many unseen episodes.
    pub episodes: u64,
}

/// `eval.gif` of a run.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Video {
    /// There is none.
    Absent,
    /// It is not put into the page, and why.
    LeftOut(String),
    /// Its bytes.
    Gif(Vec<u8>),
}

/// A run as a report shows it.
#[derive(Debug, Clone, PartialEq)]
pub struct Run {
    /// Its name in the page.
    pub name: String,
    /// Its effective configuration: dotted key and value as TOML writes it; `OUTPUT_DIR` stands for the run's own folder.
    pub config: BTreeMap<String, String>,
    /// Success of the sampling policy in each training iteration.
    pub train: Vec<Point>,
    /// Success of the ODE policy on unseen episodes, measured now and then.
    pub eval: Vec<Point>,
    /// Over how many episodes the last of `eval` was measured.
    pub eval_episodes: Option<u64>,
    /// Training iterations done.
    pub iterations: u64,
    /// Lines of `metrics.jsonl` that are no metrics, such as one that was cut when the run was killed.
    pub unreadable: usize,
    /// `eval.json`, by rising version; empty where there is none.
    pub evaluations: Vec<Evaluation>,
    /// `eval.gif`.
    pub(super) video: Video,
}

impl Run {
    /// Reads the run in `dir`; `name` is for the page.
    ///
    /// # Errors
    /// `metrics.jsonl` or `config.toml` is missing, no line has a success rate, a file is malformed or too long.
    pub fn load(dir: &Path, name: String) -> Result<Self> {
        let bad = |detail: String| LearnerError::Run {
            path: dir.to_owned(),
            detail,
        };
        let path = dir.join("metrics.jsonl");
        let metrics = read(&path, METRICS_LIMIT)?.ok_or_else(|| {
            bad("it has no `metrics.jsonl`; give the folder (`runner.output_dir`) of a `learner train`".to_owned())
        })?;
        let curves = curves(&metrics, &sessions(dir));
        if curves.train.is_empty() && curves.eval.is_empty() {
            return Err(bad(
                "no line of its `metrics.jsonl` has the success of a `train` or `eval` stage; run `learner train` first"
                    .to_owned(),
            ));
        }
        let text = |path: &Path, bytes: Vec<u8>| {
            String::from_utf8(bytes).map_err(|e| bad(format!("`{}` is no UTF-8: {e}", path.display())))
        };
        let path = dir.join("config.toml");
        let bytes = read(&path, TEXT_LIMIT)?.ok_or_else(|| bad("it has no `config.toml`".to_owned()))?;
        let table: toml::Table = text(&path, bytes)?
            .parse()
            .map_err(|e: toml::de::Error| bad(format!("`config.toml` is no TOML: {}", e.message())))?;
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

    /// Seconds of training, up to the last point.
    pub fn seconds(&self) -> f64 {
        self.last().map_or(0.0, |p| p.seconds)
    }

    /// Training episodes, up to the last point.
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

/// The bytes of a file of at most `limit` bytes; nothing when there is no such file.
fn read(path: &Path, limit: u64) -> Result<Option<Vec<u8>>> {
    let file = match File::open(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        other => other.map_err(io("opening", path))?,
    };
    let mut bytes = Vec::new();
    file.take(limit + 1)
        .read_to_end(&mut bytes)
        .map_err(io("reading", path))?;
    if bytes.len() as u64 > limit {
        return Err(LearnerError::Run {
            path: path.to_owned(),
            detail: format!("it has more than {limit} bytes, so it is no file of a run"),
        });
    }
    Ok(Some(bytes))
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
        Video::LeftOut("it is no GIF".to_owned())
    })
}

/// When processes that wrote metrics of this run began, in seconds since 1970, rising: the names of their event files say so.
fn sessions(dir: &Path) -> Vec<f64> {
    // without the folder, time is counted from line to line
    let mut starts: Vec<f64> = std::fs::read_dir(dir.join("tensorboard"))
        .into_iter()
        .flatten()
        .filter_map(|entry| {
            let name = entry.ok()?.file_name();
            let rest = name.to_str()?.strip_prefix("events.out.tfevents.")?;
            rest.split('.').next()?.parse().ok()
        })
        .collect();
    starts.sort_by(f64::total_cmp);
    starts
}

#[derive(Deserialize)]
struct Line {
    stage: String,
    step: Option<u64>,
    wall_time: Option<f64>,
    episodes: Option<f64>,
    success: Option<f64>,
    eval_episodes: Option<f64>,
    iteration_seconds: Option<f64>,
}

#[derive(Clone, Copy, PartialEq)]
enum Stage {
    Train,
    Eval,
}

struct Entry {
    stage: Stage,
    step: u64,
    wall_time: f64,
    episodes: f64,
    success: f64,
    eval_episodes: Option<f64>,
    iteration_seconds: Option<f64>,
    /// It undid earlier lines: the process that wrote it started from an older state.
    resumed: bool,
}

#[derive(Default)]
struct Curves {
    train: Vec<Point>,
    eval: Vec<Point>,
    eval_episodes: Option<u64>,
    iterations: u64,
    unreadable: usize,
}

/// The curves of `metrics.jsonl`. A step that comes again (the run was resumed from a checkpoint or started anew) undoes what was
/// written from that step on. Seconds count from the start of the training process; the time between two processes and the
/// time of undone steps do not count.
fn curves(metrics: &[u8], sessions: &[f64]) -> Curves {
    let mut kept: Vec<Entry> = Vec::new();
    let mut curves = Curves::default();
    for bytes in metrics.split(|b| *b == b'\n').filter(|l| !l.trim_ascii().is_empty()) {
        let Ok(line) = serde_json::from_slice::<Line>(bytes) else {
            curves.unreadable += 1;
            continue;
        };
        let stage = match line.stage.as_str() {
            "train" => Stage::Train,
            "eval" => Stage::Eval,
            _ => continue,
        };
        let sound = |value: Option<f64>, most: f64| value.filter(|v| (0.0..=most).contains(v));
        let (Some(step), Some(wall_time), Some(episodes), Some(success)) = (
            line.step,
            sound(line.wall_time, 1e12),
            sound(line.episodes, 1e15),
            sound(line.success, 1.0),
        ) else {
            curves.unreadable += 1;
            continue;
        };
        let before = kept.len();
        // the validation of a version stands between the iteration that made it and the next one
        kept.retain(|old| step != 0 && (old.step < step || (stage == Stage::Eval && old.stage == Stage::Train)));
        kept.push(Entry {
            stage,
            step,
            wall_time,
            episodes,
            success,
            eval_episodes: sound(line.eval_episodes, 1e15),
            iteration_seconds: sound(line.iteration_seconds, 1e9),
            resumed: kept.len() < before,
        });
    }
    let mut seconds = 0.0;
    let mut previous: Option<f64> = None;
    for entry in &kept {
        let after_previous = |start: &&f64| previous.is_none_or(|p| **start > p) && **start <= entry.wall_time;
        let begin = sessions.iter().rev().find(after_previous).copied();
        let begin = begin.or(previous.filter(|_| !entry.resumed));
        let passed = begin.map_or(entry.iteration_seconds.unwrap_or(0.0), |b| entry.wall_time - b);
        seconds += passed.max(0.0);
        previous = Some(entry.wall_time);
        let point = Point {
            episodes: entry.episodes,
            seconds,
            success: entry.success,
        };
        match entry.stage {
            Stage::Train => {
                curves.train.push(point);
                curves.iterations = entry.step;
            }
            Stage::Eval => {
                curves.eval.push(point);
                curves.eval_episodes = entry.eval_episodes.map(|e| e as u64);
            }
        }
    }
    curves
}

/// Every key with its value as TOML writes it; `OUTPUT_DIR` stands for the run's own folder.
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

    fn line(stage: &str, step: u64, wall_time: f64, success: f64) -> String {
        let episodes = 10 * step;
        let own = if stage == "train" {
            r#","iteration_seconds":2"#
        } else {
            ""
        };
        format!(
            r#"{{"stage":"{stage}","step":{step},"wall_time":{wall_time},"episodes":{episodes},"success":{success}{own},"loss":null}}"#
        )
    }

    fn points(points: &[Point]) -> Vec<(f64, f64, f64)> {
        points.iter().map(|p| (p.episodes, p.seconds, p.success)).collect()
    }

    #[test]
    fn a_resumed_run_is_one_curve_without_the_pause() {
        let lines = [
            line("sft", 7, 90.0, 0.0),
            line("eval", 0, 103.0, 0.1),
            line("train", 1, 105.0, 0.2),
            line("train", 2, 107.0, 0.9),
            line("eval", 2, 108.0, 0.8),
            // killed; goes on from the checkpoint after iteration 1
            line("train", 2, 1004.0, 0.3),
            line("eval", 2, 1005.0, 0.4),
        ]
        .join("\n");
        // the process of SFT, of training, of the resumed training
        let got = curves(lines.as_bytes(), &[50.0, 100.0, 1000.0]);
        assert_eq!(points(&got.train), [(10.0, 5.0, 0.2), (20.0, 9.0, 0.3)]);
        assert_eq!(points(&got.eval), [(0.0, 3.0, 0.1), (20.0, 10.0, 0.4)]);
        assert_eq!((got.iterations, got.unreadable), (2, 0));
        // without event files: the first line is time 0, the resumed iteration counts with its own seconds
        let got = curves(lines.as_bytes(), &[]);
        assert_eq!(points(&got.train), [(10.0, 2.0, 0.2), (20.0, 4.0, 0.3)]);
        assert_eq!(points(&got.eval), [(0.0, 0.0, 0.1), (20.0, 5.0, 0.4)]);
    }

    #[test]
    fn a_run_started_anew_forgets_the_earlier_one() {
        let lines = [
            line("eval", 0, 10.0, 0.1),
            line("train", 1, 12.0, 0.2),
            line("train", 2, 14.0, 0.3),
            line("eval", 0, 50.0, 0.6),
            line("train", 1, 53.0, 0.7),
        ]
        .join("\n");
        let got = curves(lines.as_bytes(), &[]);
        assert_eq!(points(&got.eval), [(0.0, 0.0, 0.6)]);
        assert_eq!(points(&got.train), [(10.0, 3.0, 0.7)]);
    }

    #[test]
    fn cut_and_senseless_lines_are_counted() {
        let good = line("train", 1, 5.0, 0.5);
        let text = format!("{good}\n{{\"stage\":\"tra\n\n{}\n", line("eval", 1, 6.0, 1.5));
        let got = curves(text.as_bytes(), &[]);
        assert_eq!((got.train.len(), got.eval.len(), got.unreadable), (1, 0, 2));
    }

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
