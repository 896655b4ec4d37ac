//! What a run writes down: `metrics.jsonl`, TensorBoard event files, progress bars.

use std::{
    fs::{File, OpenOptions},
    io::Write,
    path::{Path, PathBuf},
    time::{SystemTime, UNIX_EPOCH},
};

use indicatif::ProgressStyle;
use prost::Message;

use crate::error::{Result, io};

/// The style of all progress bars.
pub fn progress_style() -> ProgressStyle {
    ProgressStyle::with_template("{msg:44} {wide_bar} {pos}/{len} [{elapsed_precise} < {eta_precise}]")
        .unwrap_or_else(|_e| ProgressStyle::default_bar())
}

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

/// `tensorflow.Event`, the fields that scalars need.
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

/// One `TFRecord`: length, its checksum, payload, its checksum (masked CRC-32C).
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

impl MetricsLog {
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
    fn the_record_frame_is_tensorflows() {
        // CRC-32C of "123456789" is 0xe3069283 (RFC 3720, appendix B.4 lists the polynomial; the check value is common knowledge)
        assert_eq!(crc32c::crc32c(b"123456789"), 0xe306_9283);
        let frame = record(b"abc");
        assert_eq!(&frame[..8], 3u64.to_le_bytes());
        assert_eq!(&frame[12..15], b"abc");
        assert_eq!(frame.len(), 8 + 4 + 3 + 4);
    }
}
