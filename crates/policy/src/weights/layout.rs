//! Layout of a weight file, and the writer of its bytes.

use std::{collections::BTreeMap, io::Write};

use safetensors::{
    Dtype,
    tensor::{Metadata, TensorInfo},
};

use super::{
    error::WeightsError,
    tensors::{Weights, check_finite},
};
use crate::{
    element::{ElementType, bf16_bytes},
    params::ParamSpec,
};

/// Number of values that are converted and written at once.
const BLOCK: usize = 1 << 18;

/// Place of a tensor's bytes in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Location {
    /// Shape of the tensor.
    pub shape: Vec<usize>,
    /// Offset from the start of the file.
    pub offset: u64,
    /// Length in bytes.
    pub length: u64,
}

/// Returns the places of the tensors after a header of `start` bytes.
pub(super) fn locations(start: usize, header: &Metadata) -> BTreeMap<String, Location> {
    let located = header.tensors().into_iter().map(|(name, info)| {
        let (from, to) = info.data_offsets;
        let location = Location {
            shape: info.shape.clone(),
            offset: (start + from) as u64,
            length: (to - from) as u64,
        };
        (name, location)
    });
    located.collect()
}

/// Header and order of a safetensors file of f32 or bf16 tensors.
///
/// Both depend on names and shapes alone, so that one graph reads the file of every version.
#[derive(Debug)]
pub struct Layout {
    /// Length of the header, header and padding, as in the file.
    head: Vec<u8>,
    /// Tensors in the order of the file.
    specs: Vec<ParamSpec>,
    locations: BTreeMap<String, Location>,
    element: ElementType,
}

/// Reason why a weight file was not written.
#[derive(Debug)]
pub(crate) enum WriteError {
    Io(std::io::Error),
    Weights(WeightsError),
}

impl From<std::io::Error> for WriteError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl From<WeightsError> for WriteError {
    fn from(error: WeightsError) -> Self {
        Self::Weights(error)
    }
}

impl Layout {
    /// Computes the layout of a file with these tensors in f32, in the order of names.
    ///
    /// # Errors
    /// The tensors are larger than an address space.
    pub fn of<'a>(specs: impl IntoIterator<Item = &'a ParamSpec>) -> Result<Self, WeightsError> {
        Self::in_type(specs, ElementType::F32)
    }

    /// Computes the layout of a file with these tensors in bf16, in the order of names.
    ///
    /// # Errors
    /// The tensors are larger than an address space.
    pub fn bf16<'a>(specs: impl IntoIterator<Item = &'a ParamSpec>) -> Result<Self, WeightsError> {
        Self::in_type(specs, ElementType::Bf16)
    }

    fn in_type<'a>(specs: impl IntoIterator<Item = &'a ParamSpec>, element: ElementType) -> Result<Self, WeightsError> {
        let mut specs: Vec<ParamSpec> = specs.into_iter().cloned().collect();
        specs.sort_by(|a, b| a.name.cmp(&b.name));
        let mut end = 0usize;
        let infos = specs.iter().map(|spec| {
            let start = end;
            end += elements(spec) * element.size();
            let info = TensorInfo {
                dtype: if element == ElementType::Bf16 {
                    Dtype::BF16
                } else {
                    Dtype::F32
                },
                shape: spec.shape.clone(),
                data_offsets: (start, end),
            };
            (spec.name.clone(), info)
        });
        let header = Metadata::new(None, infos.collect()).map_err(|error| WeightsError::Format(error.to_string()))?;
        let mut text = serde_json::to_vec(&header).map_err(|error| WeightsError::Format(error.to_string()))?;
        // the tensors begin at a multiple of 8 bytes, as the crate `safetensors` writes them
        text.resize(text.len().next_multiple_of(size_of::<u64>()), b' ');
        let head = [&(text.len() as u64).to_le_bytes()[..], &text].concat();
        let locations = locations(head.len(), &header);
        Ok(Self {
            head,
            specs,
            locations,
            element,
        })
    }

    /// Returns the place of every tensor in the file, for the external data of a graph.
    pub fn locations(&self) -> &BTreeMap<String, Location> {
        &self.locations
    }

    /// Writes the file, with at most one tensor in memory in addition to the memory of `weights`.
    ///
    /// # Errors
    /// `weights` lacks a tensor or has one that is misshapen or not finite, or the writer fails.
    pub(crate) fn write(&self, weights: &dyn Weights, to: &mut impl Write) -> Result<(), WriteError> {
        to.write_all(&self.head)?;
        let mut bytes = Vec::new();
        for spec in &self.specs {
            let values = weights.values(spec)?;
            if values.len() != elements(spec) {
                return Err(WriteError::Weights(WeightsError::Shape {
                    name: spec.name.clone(),
                    expected: spec.shape.clone(),
                    found: vec![values.len()],
                }));
            }
            check_finite(&spec.name, &values, std::convert::identity)?;
            for block in values.chunks(BLOCK) {
                if self.element == ElementType::Bf16 {
                    to.write_all(&bf16_bytes(block))?;
                    continue;
                }
                bytes.resize(size_of_val(block), 0);
                for (to, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(block) {
                    *to = value.to_le_bytes();
                }
                to.write_all(&bytes)?;
            }
        }
        Ok(())
    }
}

fn elements(spec: &ParamSpec) -> usize {
    spec.shape.iter().product()
}

#[cfg(test)]
mod tests {
    use sha2::{Digest, Sha256};

    use super::{super::Weight, *};
    use crate::{config::hex, params::Part};

    fn weights(shapes: &[(&str, &[usize])]) -> BTreeMap<String, Weight> {
        let named = shapes.iter().enumerate().map(|(number, (name, shape))| {
            let count: usize = shape.iter().product();
            let weight = Weight {
                shape: shape.to_vec(),
                data: (0..count).map(|i| i as f32 * 0.25 - number as f32).collect(),
            };
            ((*name).to_owned(), weight)
        });
        named.collect()
    }

    fn written(weights: &BTreeMap<String, Weight>) -> Result<Vec<u8>, WriteError> {
        let specs = weights.iter().rev().map(|(name, weight)| ParamSpec {
            name: name.clone(),
            shape: weight.shape.clone(),
            part: Part::Expert,
        });
        let layout = Layout::of(&specs.collect::<Vec<_>>())?;
        let mut bytes = Vec::new();
        layout.write(weights, &mut bytes)?;
        for (name, weight) in weights {
            let location = &layout.locations()[name];
            let stored = &bytes[location.offset as usize..][..location.length as usize];
            let stored = stored.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b));
            assert!(
                stored.eq(weight.data.iter().copied()),
                "`{name}` lies where the layout says"
            );
        }
        Ok(bytes)
    }

    #[test]
    fn the_bytes_are_those_of_the_first_writer() {
        // more than a block; no values; a scalar; names in another order than the shapes
        let weights = weights(&[
            ("layers.10.weight", &[BLOCK + 3]),
            ("layers.2.weight", &[2, 3]),
            ("layers.2.bias", &[3]),
            ("empty", &[0, 4]),
            ("scale", &[]),
        ]);
        let bytes = written(&weights).expect("written");
        // computed with an earlier writer that held all tensors in memory
        let expected = "6e7e378ddb581145b91992d2d87d01ea2f27eaf850e2f5f60b228da909d56b51";
        assert_eq!(hex(&Sha256::digest(&bytes)), expected);
    }

    #[test]
    fn bf16_takes_half_the_bytes_and_reads_back_rounded() {
        let spec = ParamSpec {
            name: "w".to_owned(),
            shape: vec![3],
            part: Part::Expert,
        };
        let weights: BTreeMap<String, Weight> = [(
            "w".to_owned(),
            Weight {
                shape: vec![3],
                data: vec![1.0, 1.004, -0.1],
            },
        )]
        .into();
        let layout = Layout::bf16([&spec]).expect("layout");
        let mut bytes = Vec::new();
        layout.write(&weights, &mut bytes).expect("written");
        let location = &layout.locations()["w"];
        assert_eq!((location.offset as usize + 6, location.length), (bytes.len(), 6));
        // 1.00390625 is halfway between two bf16 numbers, 1.004 is above; -0.1 is nearest to -0x3dcd
        let want: Vec<u8> = [0x3f80u16, 0x3f81, 0xbdcd]
            .iter()
            .flat_map(|b| b.to_le_bytes())
            .collect();
        assert_eq!(bytes[location.offset as usize..], want);
    }

    #[test]
    fn values_that_are_not_finite_are_named() {
        for at in [0, 4095, 4096, BLOCK + 2] {
            let mut weights = weights(&[("w", &[BLOCK + 3])]);
            weights.get_mut("w").expect("weight").data[at] = f32::NEG_INFINITY;
            let error = WeightsError::NotFinite {
                name: "w".to_owned(),
                index: at,
                value: "-inf".to_owned(),
            };
            match written(&weights) {
                Err(WriteError::Weights(found)) => assert_eq!(found, error),
                other => panic!("expected {error}, found {other:?}"),
            }
        }
    }
}
