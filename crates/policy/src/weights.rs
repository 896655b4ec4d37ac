//! Weight files: safetensors read strictly, written with a byte order that depends on nothing but the content.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::Path,
};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors};

use crate::params::{EMBEDDING, EMBEDDING_ALIAS, ParamSpec, UNUSED};

/// What is wrong with a weight file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// It cannot be opened or mapped.
    #[error("cannot be read: {0}")]
    Read(String),
    /// It is no whole safetensors file.
    #[error("no whole safetensors file ({0}): it may be truncated, copy or export it again")]
    Format(String),
    /// A weight is not there.
    #[error("tensor `{0}` is missing")]
    Missing(String),
    /// A weight that the policy does not have.
    #[error("tensor `{name}` does not belong to this policy{hint}")]
    Extra {
        /// Its name.
        name: String,
        /// The nearest name that does belong, when one is near.
        hint: String,
    },
    /// Another shape.
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Its name.
        name: String,
        /// What the policy has.
        expected: Vec<usize>,
        /// What the file has.
        found: Vec<usize>,
    },
    /// A type that is not read.
    #[error("tensor `{name}` has type {found}, expected F32 or BF16")]
    Type {
        /// Its name.
        name: String,
        /// What the file has.
        found: String,
    },
    /// NaN or infinity.
    #[error("tensor `{name}` holds {value} at element {index}: a diverged or damaged checkpoint")]
    NotFinite {
        /// Its name.
        name: String,
        /// Which element.
        index: usize,
        /// NaN, inf or -inf.
        value: String,
    },
}

/// A weight file mapped into memory.
pub struct WeightFile {
    map: Mmap,
}

impl std::fmt::Debug for WeightFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WeightFile").field("bytes", &self.map.len()).finish()
    }
}

/// A named f32 tensor in memory.
#[derive(Debug, Clone, PartialEq)]
pub struct Weight {
    /// Sizes.
    pub shape: Vec<usize>,
    /// Row-major values.
    pub data: Vec<f32>,
}

/// Where a tensor's bytes lie in its file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// Sizes.
    pub shape: Vec<usize>,
    /// Offset from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

impl WeightFile {
    /// Maps a file and checks its header.
    ///
    /// # Errors
    /// It cannot be read or is no whole safetensors file.
    #[expect(unsafe_code, reason = "a file can only be mapped by an unsafe call")]
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        let file = File::open(path).map_err(|e| WeightsError::Read(e.to_string()))?;
        // SAFETY: bundles and checkpoints are never changed in place: writers write beside and rename (see `bundle`)
        let map = unsafe { Mmap::map(&file) }.map_err(|e| WeightsError::Read(e.to_string()))?;
        let opened = Self { map };
        opened.tensors()?;
        Ok(opened)
    }

    fn tensors(&self) -> Result<SafeTensors<'_>, WeightsError> {
        SafeTensors::deserialize(&self.map).map_err(|e| WeightsError::Format(e.to_string()))
    }

    /// Names in the file, the embedding under its canonical name, unused tensors left out.
    ///
    /// # Errors
    /// The header is broken.
    pub fn names(&self) -> Result<BTreeSet<String>, WeightsError> {
        Ok(self
            .tensors()?
            .names()
            .into_iter()
            .filter(|n| *n != UNUSED)
            .map(|n| {
                if n == EMBEDDING_ALIAS {
                    EMBEDDING.to_owned()
                } else {
                    n.to_owned()
                }
            })
            .collect())
    }

    /// Checks that the file holds exactly `wanted`: every name, shape, type, and only finite numbers.
    ///
    /// # Errors
    /// The first weight that differs.
    pub fn check(&self, wanted: &[&ParamSpec]) -> Result<(), WeightsError> {
        self.check_names(wanted)?;
        for spec in wanted {
            self.read(spec)?;
        }
        Ok(())
    }

    fn check_names(&self, wanted: &[&ParamSpec]) -> Result<(), WeightsError> {
        let known: BTreeSet<&str> = wanted.iter().map(|p| p.name.as_str()).collect();
        let names = self.names()?;
        if let Some(spec) = wanted.iter().find(|p| !names.contains(&p.name)) {
            return Err(WeightsError::Missing(spec.name.clone()));
        }
        if let Some(name) = names.iter().find(|n| !known.contains(n.as_str())) {
            let hint = known
                .iter()
                .map(|k| (strsim::levenshtein(name, k), k))
                .min()
                .filter(|(distance, _)| *distance <= 4)
                .map_or_else(String::new, |(_, k)| format!(", the nearest that does is `{k}`"));
            return Err(WeightsError::Extra {
                name: name.clone(),
                hint,
            });
        }
        Ok(())
    }

    /// Reads exactly `wanted` as f32 (bf16 is widened).
    ///
    /// # Errors
    /// See [`WeightFile::check`].
    pub fn read_all(&self, wanted: &[&ParamSpec]) -> Result<BTreeMap<String, Weight>, WeightsError> {
        self.check_names(wanted)?;
        wanted
            .iter()
            .map(|spec| Ok((spec.name.clone(), self.read(spec)?)))
            .collect()
    }

    /// Reads one weight as f32 and checks it.
    ///
    /// # Errors
    /// It is missing, misshapen, of another type or not finite.
    pub fn read(&self, spec: &ParamSpec) -> Result<Weight, WeightsError> {
        let tensors = self.tensors()?;
        let view = match tensors.tensor(&spec.name) {
            Ok(view) => view,
            Err(_) if spec.name == EMBEDDING => tensors.tensor(EMBEDDING_ALIAS).map_err(|e| missing(&spec.name, &e))?,
            Err(e) => return Err(missing(&spec.name, &e)),
        };
        if view.shape() != spec.shape {
            return Err(WeightsError::Shape {
                name: spec.name.clone(),
                expected: spec.shape.clone(),
                found: view.shape().to_vec(),
            });
        }
        let data: Vec<f32> = match view.dtype() {
            Dtype::F32 => view
                .data()
                .as_chunks::<4>()
                .0
                .iter()
                .map(|b| f32::from_le_bytes(*b))
                .collect(),
            Dtype::BF16 => view
                .data()
                .as_chunks::<2>()
                .0
                .iter()
                .map(|b| f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16))
                .collect(),
            other => {
                return Err(WeightsError::Type {
                    name: spec.name.clone(),
                    found: format!("{other:?}"),
                });
            }
        };
        if let Some((index, value)) = data.iter().enumerate().find(|(_, v)| !v.is_finite()) {
            return Err(WeightsError::NotFinite {
                name: spec.name.clone(),
                index,
                value: value.to_string(),
            });
        }
        Ok(Weight {
            shape: spec.shape.clone(),
            data,
        })
    }

    /// Offset and length of every tensor from the start of the file, for the external data of a graph.
    ///
    /// # Errors
    /// The header is broken.
    pub fn locations(&self) -> Result<BTreeMap<String, Location>, WeightsError> {
        locations(&self.map)
    }
}

/// Offset and length of every tensor of a safetensors file in memory.
///
/// # Errors
/// The header is broken.
pub fn locations(bytes: &[u8]) -> Result<BTreeMap<String, Location>, WeightsError> {
    let (header, metadata) = SafeTensors::read_metadata(bytes).map_err(|e| WeightsError::Format(e.to_string()))?;
    let start = 8 + header as u64;
    Ok(metadata
        .tensors()
        .into_iter()
        .map(|(name, info)| {
            let (from, to) = info.data_offsets;
            let location = Location {
                shape: info.shape.clone(),
                offset: start + from as u64,
                length: (to - from) as u64,
            };
            (name, location)
        })
        .collect())
}

fn missing(name: &str, error: &safetensors::SafeTensorError) -> WeightsError {
    match error {
        safetensors::SafeTensorError::TensorNotFound(_) => WeightsError::Missing(name.to_owned()),
        other => WeightsError::Format(other.to_string()),
    }
}

/// The bytes of a safetensors file with these f32 tensors; the same content gives the same bytes.
///
/// # Errors
/// A shape that does not fit its data.
pub fn to_safetensors<'a>(
    weights: impl IntoIterator<Item = (&'a str, &'a [usize], &'a [f32])>,
) -> Result<Vec<u8>, WeightsError> {
    let bytes: Vec<(&str, &[usize], Vec<u8>)> = weights
        .into_iter()
        .map(|(name, shape, data)| (name, shape, data.iter().flat_map(|v| v.to_le_bytes()).collect()))
        .collect();
    let views = bytes
        .iter()
        .map(|(name, shape, data)| {
            let view = safetensors::tensor::TensorView::new(Dtype::F32, shape.to_vec(), data)
                .map_err(|e| WeightsError::Format(format!("`{name}`: {e}")))?;
            Ok(((*name).to_owned(), view))
        })
        .collect::<Result<Vec<_>, WeightsError>>()?;
    safetensors::serialize(views, None).map_err(|e| WeightsError::Format(e.to_string()))
}
