//! Data sets on disk: demonstrations and scenes in safetensors files (layout documented at the env workers that write the files),
//! read row by row.

use std::{
    collections::BTreeMap,
    fs::File,
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
    time::SystemTime,
};

use policy::{
    image::{CHANNELS, RgbImage},
    plan::RunPlan,
    transform::{ObservationError, RawObservation},
};
use safetensors::{Dtype, tensor::Metadata};
use serde::Deserialize;

use super::source::{Demo, DemoSource};
use crate::error::{DatasetError, LearnerError, Result};

/// Longest header in bytes, the limit of safetensors.
const MAX_HEADER_BYTES: u64 = 100_000_000;
/// Size of the length field before the header, in bytes.
const LENGTH_BYTES: u64 = 8;
/// Size of a block in the check of a tensor, in bytes.
const BLOCK_BYTES: usize = 1 << 20;

/// Open data set, of which only the header is in memory.
#[derive(Debug)]
pub struct DataFile {
    path: PathBuf,
    file: File,
    /// Length in bytes and modification time when the file was opened.
    stamp: (u64, SystemTime),
    rows: usize,
    /// Names of the cameras, in the order of the file's images.
    cameras: Vec<String>,
    side: usize,
    prompts: Vec<String>,
    target_shape: [usize; 2],
    images: Column,
    state: Column,
    prompt_id: Column,
    target: Column,
}

/// Tensor with one entry per row.
#[derive(Debug)]
struct Column {
    name: &'static str,
    /// Offset of the first row from the start of the file, in bytes.
    offset: u64,
    row_bytes: usize,
}

#[derive(Deserialize)]
struct Meta {
    prompts: Vec<String>,
}

impl DataFile {
    /// Opens a file with `images`, `state`, `prompt_id` and the named targets (`actions` or `keypoints`) for the policy of a plan.
    /// Reads everything except the images once, so that an unusable number is found before training.
    ///
    /// # Errors
    /// The file is missing, truncated, not a safetensors file or contains NaN or infinity, or the tensors do not fit the policy.
    pub fn open(path: &Path, targets: &'static str, plan: &RunPlan) -> Result<Self> {
        Self::open_file(path, targets, plan).map_err(|source| LearnerError::Dataset {
            path: path.to_owned(),
            source,
        })
    }

    fn open_file(path: &Path, targets: &'static str, plan: &RunPlan) -> Result<Self, DatasetError> {
        let file = File::open(path).map_err(DatasetError::Read)?;
        let stamp = stamp(&file)?;
        let (header, data_offset) = read_header(&file, stamp.0)?;
        let meta = header.metadata().as_ref().and_then(|all| all.get("meta"));
        let Meta { prompts } = serde_json::from_str(meta.ok_or(DatasetError::NoMeta)?).map_err(DatasetError::Meta)?;

        let tensor = |name: &'static str, expected: Dtype| {
            let info = header.info(name).ok_or(DatasetError::NoTensor(name))?;
            if info.dtype != expected {
                return Err(DatasetError::Type {
                    tensor: name,
                    expected,
                    found: info.dtype,
                });
            }
            let (from, to) = info.data_offsets;
            let rows = info.shape.first().copied().unwrap_or(0);
            let column = Column {
                name,
                offset: data_offset + from as u64,
                row_bytes: (to - from).checked_div(rows).unwrap_or(0),
            };
            Ok((column, info.shape.as_slice()))
        };
        let (prompt_id, prompt_shape) = tensor("prompt_id", Dtype::I64)?;
        let (images, images_shape) = tensor("images", Dtype::U8)?;
        let (state, state_shape) = tensor("state", Dtype::F32)?;
        let (target, target_shape) = tensor(targets, Dtype::F32)?;
        let (dims, side) = (&plan.dims, plan.dims.vision.image_size);
        let shape = |field: &'static str, found: &[usize], expected: String| DatasetError::Shape {
            field,
            expected,
            found: found.to_vec(),
        };
        let [rows] = *prompt_shape else {
            return Err(shape("prompt_id", prompt_shape, "[rows]".to_owned()));
        };
        if images_shape != [rows, dims.cameras, side, side, CHANNELS] {
            let expected = format!("[{rows}, {}, {side}, {side}, {CHANNELS}]", dims.cameras);
            return Err(shape("images", images_shape, expected));
        }
        if !matches!(state_shape, [n, width] if *n == rows && (1..=dims.action_dim).contains(width)) {
            let expected = format!("[{rows}, 1 to {}]", dims.action_dim);
            return Err(shape("state", state_shape, expected));
        }
        let target_shape = match *target_shape {
            [n, points, width] if n == rows => [points, width],
            _ => return Err(shape(targets, target_shape, format!("[{rows}, _, _]"))),
        };
        let opened = Self {
            path: path.to_owned(),
            file,
            stamp,
            rows,
            cameras: plan.config.actor.model.cameras.clone(),
            side,
            prompts,
            target_shape,
            images,
            state,
            prompt_id,
            target,
        };
        opened.check()?;
        Ok(opened)
    }

    /// Checks all prompt numbers, states and targets.
    fn check(&self) -> Result<(), DatasetError> {
        self.scan(&self.prompt_id, |row, bytes| self.prompt(row, bytes).map(drop))?;
        for column in [&self.state, &self.target] {
            let width = column.row_bytes / size_of::<f32>();
            self.scan(column, |index, bytes| {
                let value = f32::from_le_bytes(bytes);
                if value.is_finite() {
                    return Ok(());
                }
                Err(DatasetError::NotFinite {
                    field: column.name,
                    row: index / width,
                    column: index % width,
                    value,
                })
            })?;
        }
        Ok(())
    }

    /// Calls `check` with index and bytes of every element of a tensor, read in blocks of [`BLOCK_BYTES`].
    fn scan<const N: usize>(
        &self,
        column: &Column,
        check: impl Fn(usize, [u8; N]) -> Result<(), DatasetError>,
    ) -> Result<(), DatasetError> {
        let total = self.rows * column.row_bytes;
        let mut from = 0;
        while from < total {
            let block = self.bytes(column.offset + from as u64, BLOCK_BYTES.min(total - from))?;
            for (index, element) in block.as_chunks::<N>().0.iter().enumerate() {
                check(from / N + index, *element)?;
            }
            from += block.len();
        }
        Ok(())
    }

    fn prompt(&self, row: usize, id: [u8; 8]) -> Result<&String, DatasetError> {
        let id = i64::from_le_bytes(id);
        let prompt = usize::try_from(id).ok().and_then(|id| self.prompts.get(id));
        prompt.ok_or(DatasetError::PromptId {
            row,
            found: id,
            prompts: self.prompts.len(),
        })
    }

    fn bytes(&self, offset: u64, length: usize) -> Result<Vec<u8>, DatasetError> {
        let mut bytes = vec![0; length];
        match self.file.read_exact_at(&mut bytes, offset) {
            Ok(()) => Ok(bytes),
            Err(error) => {
                self.check_unchanged()?;
                Err(DatasetError::Read(error))
            }
        }
    }

    fn check_unchanged(&self) -> Result<(), DatasetError> {
        if stamp(&self.file)? == self.stamp {
            Ok(())
        } else {
            Err(DatasetError::Changed)
        }
    }

    fn read_row(&self, row: usize) -> Result<Demo, DatasetError> {
        if row >= self.rows {
            return Err(DatasetError::NoRow { row, rows: self.rows });
        }
        let bytes = |column: &Column| self.bytes(column.offset + (row * column.row_bytes) as u64, column.row_bytes);
        let floats = |column: &Column| -> Result<Vec<f32>, DatasetError> {
            let bytes = bytes(column)?;
            Ok(bytes.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
        };
        let pixels = bytes(&self.images)?;
        let mut images = BTreeMap::new();
        for (camera, pixels) in self
            .cameras
            .iter()
            .zip(pixels.chunks_exact(self.side * self.side * CHANNELS))
        {
            let image = RgbImage::new(self.side, self.side, pixels.to_vec()).map_err(|source| {
                let camera = camera.clone();
                let source = ObservationError::Image { camera, source };
                DatasetError::Observation { row, source }
            })?;
            images.insert(camera.clone(), image);
        }
        let mut id = [0; 8];
        id.copy_from_slice(&bytes(&self.prompt_id)?);
        Ok(Demo {
            observation: RawObservation {
                images,
                state: floats(&self.state)?,
                prompt: self.prompt(row, id)?.clone(),
            },
            target: floats(&self.target)?,
        })
    }
}

impl DemoSource for DataFile {
    fn path(&self) -> &Path {
        &self.path
    }

    fn len(&self) -> usize {
        self.rows
    }

    fn prompts(&self) -> &[String] {
        &self.prompts
    }

    fn target_shape(&self) -> [usize; 2] {
        self.target_shape
    }

    fn read(&self, rows: &[usize]) -> Result<Vec<Demo>, DatasetError> {
        let demos = rows.iter().map(|row| self.read_row(*row)).collect::<Result<_, _>>()?;
        self.check_unchanged()?;
        Ok(demos)
    }
}

fn stamp(file: &File) -> Result<(u64, SystemTime), DatasetError> {
    let metadata = file.metadata().map_err(DatasetError::Read)?;
    Ok((metadata.len(), metadata.modified().map_err(DatasetError::Read)?))
}

/// Reads the header of a file of this length in bytes. Returns the header and the offset of the first tensor. Checks that the
/// tensors follow each other without gaps and that the last tensor ends with the file.
fn read_header(file: &File, length: u64) -> Result<(Metadata, u64), DatasetError> {
    let limit = length.saturating_sub(LENGTH_BYTES).min(MAX_HEADER_BYTES);
    let mut found = [0; 8];
    if length >= LENGTH_BYTES {
        file.read_exact_at(&mut found, 0).map_err(DatasetError::Read)?;
    }
    let found = u64::from_le_bytes(found);
    if found == 0 || found > limit {
        return Err(DatasetError::HeaderLength { found, limit });
    }
    let mut text = vec![0; found as usize];
    file.read_exact_at(&mut text, LENGTH_BYTES)
        .map_err(DatasetError::Read)?;
    let header: Metadata = serde_json::from_slice(&text).map_err(DatasetError::Header)?;
    let data = LENGTH_BYTES + found;
    let expected = data.saturating_add(header.data_len() as u64);
    if expected != length {
        return Err(DatasetError::Length {
            expected,
            found: length,
        });
    }
    Ok((header, data))
}
