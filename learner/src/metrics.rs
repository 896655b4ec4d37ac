//! Metrics of a run: `metrics.jsonl` and TensorBoard event files.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use prost::Message;

use crate::error::{Result, io};

/// Metrics of a run, appended line by line.
#[derive(Debug)]
pub struct MetricsLog {
    path: PathBuf,
    lines: File,
    events_path: PathBuf,
    events: File,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryValue {
    #[prost(string, optional, tag = "1")]
    tag: Option<String>,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<SummaryValue>,
}

/// Fields of `tensorflow.Event` that scalars need.
#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, optional, tag = "1")]
    wall_time: Option<f64>,
    #[prost(int64, optional, tag = "2")]
    step: Option<i64>,
    #[prost(string, optional, tag = "3")]
    file_version: Option<String>,
    #[prost(message, optional, tag = "5")]
    summary: Option<Summary>,
}

fn now() -> f64 {
    SystemTime::now()
        .duration_since(UNIX_EPOCH)
        .map_or(0.0, |d| d.as_secs_f64())
}

/// Returns one `TFRecord`: length, checksum of the length, payload, checksum of the payload (masked CRC-32C).
fn record(payload: &[u8]) -> Vec<u8> {
    let masked = |bytes: &[u8]| {
        crc32c::crc32c(bytes)
            .rotate_right(15)
            .wrapping_add(0xa282_ead8)
            .to_le_bytes()
    };
    let length = (payload.len() as u64).to_le_bytes();
    [&length[..], &masked(&length), payload, &masked(payload)].concat()
}

/// Returns whether a line of `metrics.jsonl` belongs to the run as it was at a checkpoint of `iteration`.
///
/// Lines of `train` belong up to `iteration`. Lines of `eval` belong before `iteration`, because the checkpoint's version is evaluated
/// again. All lines of the supervised stages belong. A line that was cut while it was written does not belong.
fn belongs(line: &str, iteration: u64) -> bool {
    let Ok(line) = serde_json::from_str::<serde_json::Value>(line) else {
        return false;
    };
    let Some(step) = line.get("step").and_then(serde_json::Value::as_u64) else {
        return false;
    };
    match line.get("stage").and_then(serde_json::Value::as_str) {
        Some("train") => step <= iteration,
        Some("eval") => step < iteration,
        other => other.is_some(),
    }
}

impl MetricsLog {
    /// Opens the log of a run that resumes after `iteration` (0: from its start). Drops the lines of `DIR/metrics.jsonl` that will be
    /// written again. Event files of `TensorBoard` stay, so that repeated steps also stand in the new event file.
    ///
    /// # Errors
    /// See [`MetricsLog::open`].
    pub fn open_after(dir: &Path, iteration: u64) -> Result<Self> {
        let path = dir.join("metrics.jsonl");
        if path.exists() {
            let bytes = std::fs::read(&path).map_err(io("reading the metrics", &path))?;
            let text = String::from_utf8_lossy(&bytes);
            let (kept, dropped): (Vec<&str>, Vec<&str>) = text.lines().partition(|line| belongs(line, iteration));
            if !dropped.is_empty() {
                tracing::info!(
                    "{} lines of `{}` after iteration {iteration} are dropped: they are made again",
                    dropped.len(),
                    path.display()
                );
                let text: String = kept.iter().flat_map(|line| [*line, "\n"]).collect();
                policy::bundle::write_atomic(&path, text.as_bytes())?;
            }
        }
        Self::open(dir)
    }

    /// Opens `DIR/metrics.jsonl` for appending and a new event file in `DIR/tensorboard`.
    ///
    /// # Errors
    /// The folder or a file cannot be written.
    pub fn open(dir: &Path) -> Result<Self> {
        let board = dir.join("tensorboard");
        std::fs::create_dir_all(&board).map_err(io("creating the folder", &board))?;
        let path = dir.join("metrics.jsonl");
        let lines = OpenOptions::new()
            .create(true)
            .append(true)
            .open(&path)
            .map_err(io("opening the metrics", &path))?;
        let events_path = board.join(format!("events.out.tfevents.{}.{}", now() as u64, std::process::id()));
        let mut events = File::create(&events_path).map_err(io("creating the event file", &events_path))?;
        let head = Event {
            wall_time: Some(now()),
            file_version: Some("brain.Event:2".to_owned()),
            ..Event::default()
        };
        events
            .write_all(&record(&head.encode_to_vec()))
            .map_err(io("writing the event file", &events_path))?;
        Ok(Self {
            path,
            lines,
            events_path,
            events,
        })
    }

    /// Writes one line `{"stage": .., "step": .., "wall_time": .., NAME: VALUE, ..}` and the same scalars as `STAGE/NAME` events.
    /// A value that is not finite is written as null.
    ///
    /// # Errors
    /// The file cannot be written.
    pub fn write(&mut self, stage: &str, step: u64, values: &[(&str, f64)]) -> Result<()> {
        let mut line = serde_json::Map::new();
        line.insert("stage".to_owned(), stage.into());
        line.insert("step".to_owned(), step.into());
        line.insert("wall_time".to_owned(), now().into());
        for (name, value) in values {
            line.insert((*name).to_owned(), serde_json::json!(value));
        }
        let text = serde_json::Value::Object(line).to_string();
        writeln!(self.lines, "{text}").map_err(io("writing the metrics", &self.path))?;
        let value = values
            .iter()
            .map(|(name, v)| SummaryValue {
                tag: Some(format!("{stage}/{name}")),
                simple_value: Some(*v as f32),
            })
            .collect();
        let event = Event {
            wall_time: Some(now()),
            step: Some(step as i64),
            summary: Some(Summary { value }),
            ..Event::default()
        };
        self.events
            .write_all(&record(&event.encode_to_vec()))
            .and_then(|()| self.events.flush())
            .map_err(io("writing the event file", &self.events_path))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_that_goes_on_has_no_line_twice_and_none_cut() {
        let dir = tempfile::tempdir().expect("folder");
        let mut log = MetricsLog::open(dir.path()).expect("log");
        log.write("sft", 900, &[("loss", 0.5)]).expect("line");
        for step in 0..=3 {
            log.write("eval", step, &[("success", 0.5)]).expect("line");
            log.write("train", step + 1, &[("success", 0.5)]).expect("line");
        }
        write!(log.lines, "{{\"stage\": \"eval\", \"st").expect("a cut line");
        drop(log);
        let mut log = MetricsLog::open_after(dir.path(), 2).expect("log");
        log.write("eval", 2, &[("success", 0.5)]).expect("line");
        let lines: Vec<(String, u64)> = std::fs::read_to_string(dir.path().join("metrics.jsonl"))
            .expect("metrics")
            .lines()
            .map(|line| {
                let line: serde_json::Value = serde_json::from_str(line).expect("a whole line");
                let stage = line["stage"].as_str().expect("stage").to_owned();
                (stage, line["step"].as_u64().expect("step"))
            })
            .collect();
        let want = [
            ("sft", 900),
            ("eval", 0),
            ("train", 1),
            ("eval", 1),
            ("train", 2),
            ("eval", 2),
        ];
        assert_eq!(lines, want.map(|(stage, step)| (stage.to_owned(), step)));
    }

    #[test]
    fn the_record_frame_is_tensorflows() {
        // CRC-32C of "123456789" is 0xe3069283 (RFC 3720, appendix B.4 lists the polynomial; the check value is common knowledge)
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        let frame = record(b"abc");
        assert_eq!(&frame[..8], 3u64.to_le_bytes());
        assert_eq!(&frame[12..15], b"abc");
        assert_eq!(frame.len(), 8 + 4 + 3 + 4);
    }
}
