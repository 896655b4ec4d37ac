//! Success curves of a run, read from `metrics.jsonl`.

use std::path::Path;

use serde::Deserialize;

use super::bounded::read;
use crate::error::{LearnerError, Result};

/// Largest size of `metrics.jsonl` in bytes, about 300,000 iterations.
const METRICS_LIMIT: u64 = 256 << 20;

/// Measured success rate.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Point {
    /// Training episodes before the measurement.
    pub episodes: f64,
    /// Seconds of training before the measurement.
    pub seconds: f64,
    /// Success rate, 0 to 1.
    pub success: f64,
}

/// Returns the start times of the processes that wrote metrics of this run, in seconds since 1970, ascending. The times are read
/// from the names of the event files.
fn sessions(dir: &Path) -> Vec<f64> {
    // without the folder, time is counted between lines
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

/// Fields of a line of `metrics.jsonl` that the curves use.
#[derive(Deserialize)]
struct MetricsLine {
    stage: String,
    step: Option<u64>,
    wall_time: Option<f64>,
    episodes: Option<f64>,
    success: Option<f64>,
    eval_episodes: Option<f64>,
    iteration_seconds: Option<f64>,
}

/// Success over training.
#[derive(Debug, Default)]
pub(super) struct Curves {
    /// Success of the sampling policy in each training iteration.
    pub(super) train: Vec<Point>,
    /// Success of the ODE policy on unseen episodes.
    pub(super) eval: Vec<Point>,
    /// Number of episodes of the last point of `eval`.
    pub(super) eval_episodes: Option<u64>,
    /// Completed training iterations.
    pub(super) iterations: u64,
    /// Number of lines that are not valid metrics.
    pub(super) unreadable: usize,
}

impl Curves {
    /// Reads the curves of the run in `dir`.
    ///
    /// # Errors
    /// `metrics.jsonl` is missing, unreadable or too large.
    pub(super) fn read(dir: &Path) -> Result<Self> {
        let metrics = read(&dir.join("metrics.jsonl"), METRICS_LIMIT)?.ok_or_else(|| LearnerError::Run {
            path: dir.to_owned(),
            detail: "it has no `metrics.jsonl`; give the folder (`runner.output_dir`) of a `learner train`".to_owned(),
        })?;
        Ok(Self::parse(&metrics, &sessions(dir)))
    }

    /// Parses lines in the order of training, which a resumed run keeps (`MetricsLog::open_after`). Seconds count from the start
    /// of the training process. The time between two processes and iterations undone by resuming from a checkpoint do not count.
    fn parse(metrics: &[u8], sessions: &[f64]) -> Self {
        let mut curves = Self::default();
        let mut seconds = 0.0;
        let mut previous: Option<f64> = None;
        for bytes in metrics.split(|b| *b == b'\n').filter(|l| !l.trim_ascii().is_empty()) {
            let Ok(line) = serde_json::from_slice::<MetricsLine>(bytes) else {
                curves.unreadable += 1;
                continue;
            };
            let train = match line.stage.as_str() {
                "train" => true,
                "eval" => false,
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
            let after_previous = |start: &&f64| previous.is_none_or(|p| **start > p) && **start <= wall_time;
            let begin = sessions.iter().rev().find(after_previous).copied().or(previous);
            let own = sound(line.iteration_seconds, 1e9).unwrap_or(0.0);
            seconds += begin.map_or(own, |begin| wall_time - begin).max(0.0);
            previous = Some(wall_time);
            let point = Point {
                episodes,
                seconds,
                success,
            };
            if train {
                curves.train.push(point);
                curves.iterations = step;
            } else {
                curves.eval.push(point);
                curves.eval_episodes = sound(line.eval_episodes, 1e15).map(|e| e as u64);
            }
        }
        curves
    }
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
    fn a_run_that_went_on_is_one_curve_without_the_pause() {
        let lines = [
            line("sft", 7, 90.0, 0.0),
            line("eval", 0, 103.0, 0.1),
            line("train", 1, 105.0, 0.2),
            // killed in iteration 2, resumed from the checkpoint after iteration 1
            line("train", 2, 1004.0, 0.3),
            line("eval", 2, 1005.0, 0.4),
        ]
        .join("\n");
        // processes of SFT, of training and of the resumed training
        let got = Curves::parse(lines.as_bytes(), &[50.0, 100.0, 1000.0]);
        assert_eq!(points(&got.train), [(10.0, 5.0, 0.2), (20.0, 9.0, 0.3)]);
        assert_eq!(points(&got.eval), [(0.0, 3.0, 0.1), (20.0, 10.0, 0.4)]);
        assert_eq!((got.iterations, got.unreadable), (2, 0));
    }

    #[test]
    fn without_event_files_time_is_counted_from_the_first_line() {
        let lines = [
            line("train", 1, 105.0, 0.2),
            line("eval", 1, 106.0, 0.1),
            line("train", 2, 109.0, 0.3),
        ]
        .join("\n");
        // the first line has `iteration_seconds`
        let got = Curves::parse(lines.as_bytes(), &[]);
        assert_eq!(points(&got.train), [(10.0, 2.0, 0.2), (20.0, 6.0, 0.3)]);
        assert_eq!(points(&got.eval), [(10.0, 3.0, 0.1)]);
    }

    #[test]
    fn cut_and_senseless_lines_are_counted() {
        let good = line("train", 1, 5.0, 0.5);
        let text = format!("{good}\n{{\"stage\":\"tra\n\n{}\n", line("eval", 1, 6.0, 1.5));
        let got = Curves::parse(text.as_bytes(), &[]);
        assert_eq!((got.train.len(), got.eval.len(), got.unreadable), (1, 0, 2));
    }
}
