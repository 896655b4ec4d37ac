//! Reading a weight file.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    fs::File,
    path::Path,
};

use memmap2::Mmap;
use safetensors::{Dtype, SafeTensors, tensor::Metadata};

use super::{
    error::WeightsError,
    layout::{Location, locations},
    tensors::{Weight, Weights, check_finite},
};
use crate::params::{EMBEDDING, EMBEDDING_ALIAS, ParamSpec, UNUSED};

/// A weight file mapped into memory, with its parsed header.
pub struct WeightFile {
    map: Mmap,
    /// Offset of the first tensor in bytes.
    start: usize,
    header: Metadata,
}

impl std::fmt::Debug for WeightFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("WeightFile")
            .field("bytes", &self.map.len())
            .finish_non_exhaustive()
    }
}

/// A tensor's values in the file's type, little-endian.
enum Values<'a> {
    F32(&'a [[u8; 4]]),
    Bf16(&'a [[u8; 2]]),
}

fn from_bf16(bytes: [u8; 2]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes(bytes)) << 16)
}

impl WeightFile {
    /// Maps a file and parses its header.
    ///
    /// # Errors
    /// The file cannot be read or is not a complete safetensors file.
    pub fn open(path: &Path) -> Result<Self, WeightsError> {
        Self::map(&File::open(path).map_err(|e| WeightsError::Read(e.to_string()))?)
    }

    /// Maps an open file and parses its header.
    ///
    /// # Errors
    /// The file cannot be mapped or is not a complete safetensors file.
    #[expect(unsafe_code, reason = "a file can only be mapped by an unsafe call")]
    pub(crate) fn map(file: &File) -> Result<Self, WeightsError> {
        // SAFETY: bundles and checkpoints are never changed in place, since writers write a new file and rename it (see `bundle`)
        let map = unsafe { Mmap::map(file) }.map_err(|e| WeightsError::Read(e.to_string()))?;
        // the length of the header is limited before anything is allocated, and the tensors are exactly the rest of the file
        let (length, header) = SafeTensors::read_metadata(&map).map_err(|e| WeightsError::Format(e.to_string()))?;
        Ok(Self {
            map,
            start: size_of::<u64>() + length,
            header,
        })
    }

    /// Returns the names in the file, with the embedding's canonical name and without unused tensors.
    pub fn names(&self) -> BTreeSet<String> {
        let names = self.header.offset_keys().into_iter().filter(|name| name != UNUSED);
        names
            .map(|name| {
                if name == EMBEDDING_ALIAS {
                    EMBEDDING.to_owned()
                } else {
                    name
                }
            })
            .collect()
    }

    /// Checks that the file holds exactly `wanted`: names, shapes, types, and finite numbers.
    ///
    /// # Errors
    /// Names the first weight that differs.
    pub fn check(&self, wanted: &[&ParamSpec]) -> Result<(), WeightsError> {
        self.check_names(wanted)?;
        for spec in wanted {
            self.find(spec)?.check(&spec.name)?;
        }
        Ok(())
    }

    /// Checks that the file holds exactly `wanted`: names, shapes and types. No value is read.
    ///
    /// # Errors
    /// Names the first weight that differs.
    pub fn check_header(&self, wanted: &[&ParamSpec]) -> Result<(), WeightsError> {
        self.check_names(wanted)?;
        for spec in wanted {
            self.find(spec)?;
        }
        Ok(())
    }

    fn check_names(&self, wanted: &[&ParamSpec]) -> Result<(), WeightsError> {
        let known: BTreeSet<&str> = wanted.iter().map(|p| p.name.as_str()).collect();
        let names = self.names();
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

    /// Reads exactly `wanted` as f32; bf16 is widened.
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
    /// The weight is missing, misshapen, of another type or not finite.
    pub fn read(&self, spec: &ParamSpec) -> Result<Weight, WeightsError> {
        let values = self.find(spec)?;
        values.check(&spec.name)?;
        Ok(Weight {
            shape: spec.shape.clone(),
            data: match values {
                Values::F32(values) => values.iter().copied().map(f32::from_le_bytes).collect(),
                Values::Bf16(values) => values.iter().copied().map(from_bf16).collect(),
            },
        })
    }

    /// Finds a weight and checks its shape and type.
    fn find(&self, spec: &ParamSpec) -> Result<Values<'_>, WeightsError> {
        let alias = || {
            (spec.name == EMBEDDING)
                .then(|| self.header.info(EMBEDDING_ALIAS))
                .flatten()
        };
        let info = self
            .header
            .info(&spec.name)
            .or_else(alias)
            .ok_or_else(|| WeightsError::Missing(spec.name.clone()))?;
        if info.shape != spec.shape {
            return Err(WeightsError::Shape {
                name: spec.name.clone(),
                expected: spec.shape.clone(),
                found: info.shape.clone(),
            });
        }
        let (from, to) = info.data_offsets;
        #[expect(
            clippy::expect_used,
            reason = "the header was rejected unless its tensors were exactly the rest of the file"
        )]
        let bytes = self
            .map
            .get(self.start + from..self.start + to)
            .expect("a tensor inside the file");
        match info.dtype {
            Dtype::F32 => Ok(Values::F32(bytes.as_chunks().0)),
            Dtype::BF16 => Ok(Values::Bf16(bytes.as_chunks().0)),
            other => Err(WeightsError::Type {
                name: spec.name.clone(),
                found: format!("{other:?}"),
            }),
        }
    }

    /// Returns the place of every tensor in the file, for the external data of a graph.
    pub fn locations(&self) -> BTreeMap<String, Location> {
        locations(self.start, &self.header)
    }
}

impl Values<'_> {
    fn check(&self, name: &str) -> Result<(), WeightsError> {
        match self {
            Self::F32(values) => check_finite(name, values, f32::from_le_bytes),
            Self::Bf16(values) => check_finite(name, values, from_bf16),
        }
    }
}

impl Weights for WeightFile {
    fn values(&self, spec: &ParamSpec) -> Result<Cow<'_, [f32]>, WeightsError> {
        Ok(Cow::Owned(self.read(spec)?.data))
    }
}
