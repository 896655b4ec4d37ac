//! Weights of a policy as named f32 tensors: creation, initialization, load and export.

use std::{borrow::Cow, collections::BTreeMap, path::Path};

use policy::{
    bundle::{BundleError, BundleFile, write_weights},
    dims::PolicyDims,
    noise::{Purpose, fill_normal, stream, uniform},
    params::{EMBEDDING, Heads, ParamSpec, Part, params},
    weights::{WeightFile, Weights, WeightsError},
};
use tch::{Device, Kind, Tensor, no_grad};

use super::ModelError;

/// Copy of one weight: name, sizes and row-major values.
pub type ExportedParam = (String, Vec<usize>, Vec<f32>);

/// Weights of one policy by name, as leaf tensors on one device.
///
/// A tensor's storage never changes after creation: loading and optimizing write in place, so that the network's layers,
/// which share the tensors, always have the current values.
#[derive(Debug)]
pub struct ParamStore {
    specs: Vec<ParamSpec>,
    tensors: BTreeMap<String, Tensor>,
    device: Device,
}

impl ParamStore {
    /// Creates a store of zeros, to be filled by [`ParamStore::load`] or [`ParamStore::init`].
    ///
    /// # Errors
    /// The sizes of the policy are inconsistent.
    pub fn zeros(dims: &PolicyDims, heads: &Heads, device: Device) -> Result<Self, ModelError> {
        dims.check()?;
        let specs = params(dims, heads);
        let tensors = specs
            .iter()
            .map(|spec| {
                (
                    spec.name.clone(),
                    Tensor::zeros(sizes(&spec.shape), (Kind::Float, device)),
                )
            })
            .collect();
        Ok(Self { specs, tensors, device })
    }

    /// Returns a store with copies of the tensors of these parts; the other tensors are shared with this store.
    #[must_use]
    pub fn fork(&self, parts: &[Part]) -> Self {
        let tensors = self.specs.iter().filter_map(|spec| {
            let tensor = self.tensors.get(&spec.name)?;
            let own = if parts.contains(&spec.part) {
                tensor.detach().copy()
            } else {
                tensor.shallow_clone()
            };
            Some((spec.name.clone(), own))
        });
        Self {
            tensors: tensors.collect(),
            device: self.device,
            specs: self.specs.clone(),
        }
    }

    /// Creates a store with random weights that depend on the seed only; see [`ParamStore::init`].
    ///
    /// # Errors
    /// The sizes of the policy are inconsistent.
    pub fn random(dims: &PolicyDims, heads: &Heads, seed: u64, device: Device) -> Result<Self, ModelError> {
        let store = Self::zeros(dims, heads, device)?;
        store.init(&[Part::Vlm, Part::Expert, Part::NoiseHead, Part::ValueHead], seed)?;
        Ok(store)
    }

    /// Draws the weights of these parts. Each tensor has a separate random stream, keyed by `seed` and its index in the parameter
    /// table.
    ///
    /// - Linear and patch weights and biases are uniform in `+-1/sqrt(inputs)` (He et al. 2015 with `a = sqrt(5)`, the usual
    ///   default).
    /// - The text embedding is `N(0, 1/width)`; the position table is the 2-D sine-cosine table, or
    ///   `N(0, 1/width)` if the sizes do not fit one.
    /// - RMSNorm weights are 0 (the network multiplies by `1 + w`), LayerNorm weights 1 and biases 0.
    /// - adaRMS weights are `N(0, 0.02^2)` with zero bias, so that every block starts near the identity.
    /// - The value head is `N(0, 2/outputs)` with last layer `N(0, 0.02^2)` and zero biases.
    ///
    /// # Errors
    /// A tensor of the parameter table is missing or has another size, which no store of this module has.
    pub fn init(&self, parts: &[Part], seed: u64) -> Result<(), ModelError> {
        let last_head = self
            .specs
            .iter()
            .rposition(|s| s.part == Part::ValueHead && s.shape.len() == 2);
        for (index, spec) in self.specs.iter().enumerate().filter(|(_, s)| parts.contains(&s.part)) {
            let fan_in = self.fan_in(spec);
            let mut data = vec![0.0f32; spec.shape.iter().product()];
            fill(spec, fan_in, last_head == Some(index), seed, index as u64, &mut data);
            self.assign(&spec.name, &data)?;
        }
        Ok(())
    }

    /// Returns the number of inputs of the linear layer that a weight or bias belongs to.
    fn fan_in(&self, spec: &ParamSpec) -> usize {
        let weight = spec.name.strip_suffix(".bias").map(|stem| format!("{stem}.weight"));
        let shape = weight
            .and_then(|name| self.specs.iter().find(|s| s.name == name))
            .map_or(&spec.shape, |s| &s.shape);
        shape.iter().skip(1).product::<usize>().max(1)
    }

    /// Loads these parts from a file that contains exactly the parts' tensors, with equal shapes and finite values.
    ///
    /// # Errors
    /// A tensor is missing, unexpected, not finite, or of another shape or type; the store may then be partly loaded.
    pub fn load(&self, file: &WeightFile, parts: &[Part]) -> Result<(), ModelError> {
        let wanted: Vec<&ParamSpec> = self.specs.iter().filter(|s| parts.contains(&s.part)).collect();
        file.check_header(&wanted)?;
        for spec in wanted {
            self.assign(&spec.name, &file.read(spec)?.data)?;
        }
        Ok(())
    }

    /// Overwrites one tensor in place with row-major values.
    ///
    /// # Errors
    /// The tensor is unknown or has another number of elements.
    pub fn assign(&self, name: &str, data: &[f32]) -> Result<(), ModelError> {
        let tensor = self.get(name)?;
        if tensor.numel() != data.len() {
            return Err(ModelError::Elements {
                name: name.to_owned(),
                expected: tensor.numel(),
                found: data.len(),
            });
        }
        let values = Tensor::from_slice(data).view(tensor.size().as_slice());
        no_grad(|| {
            tensor.shallow_clone().copy_(&values);
        });
        Ok(())
    }

    /// Returns the tensor of this name.
    ///
    /// # Errors
    /// The name is unknown.
    pub fn get(&self, name: &str) -> Result<&Tensor, ModelError> {
        self.tensors
            .get(name)
            .ok_or_else(|| ModelError::NoParam(name.to_owned()))
    }

    /// Returns names and tensors of one part in the order of the parameter table.
    pub fn part(&self, part: Part) -> impl Iterator<Item = (&str, &Tensor)> {
        self.specs
            .iter()
            .filter(move |s| s.part == part)
            .filter_map(|s| self.tensors.get(&s.name).map(|tensor| (s.name.as_str(), tensor)))
    }

    /// Returns the parameter table of the policy.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// Returns the device of the tensors.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Enables gradients for these parts and disables gradients for all others.
    pub fn set_trainable(&self, parts: &[Part]) {
        for spec in &self.specs {
            if let Some(tensor) = self.tensors.get(&spec.name) {
                // the flag is set on the tensor itself; the returned handle refers to the same tensor
                drop(tensor.set_requires_grad(parts.contains(&spec.part)));
            }
        }
    }

    /// Sets all gradients to zero.
    pub fn zero_grad(&self) {
        for tensor in self.tensors.values() {
            tensor.shallow_clone().zero_grad();
        }
    }

    /// Copies the tensors of one part to main memory, in the order of the parameter table.
    pub fn export(&self, part: Part) -> Vec<ExportedParam> {
        self.specs
            .iter()
            .filter(|s| s.part == part)
            .filter_map(|s| Some((s.name.clone(), s.shape.clone(), copy_out(self.tensors.get(&s.name)?))))
            .collect()
    }

    /// Writes these parts atomically to a safetensors file and returns the file's description.
    ///
    /// # Errors
    /// A tensor is not finite, or a file operation fails; an existing file is then unchanged.
    pub fn write(&self, parts: &[Part], path: &Path) -> Result<BundleFile, BundleError> {
        write_weights(path, self.specs.iter().filter(|s| parts.contains(&s.part)), self)
    }
}

impl Weights for ParamStore {
    fn values(&self, spec: &ParamSpec) -> Result<Cow<'_, [f32]>, WeightsError> {
        let tensor = self.tensors.get(&spec.name);
        let tensor = tensor.ok_or_else(|| WeightsError::Missing(spec.name.clone()))?;
        Ok(Cow::Owned(copy_out(tensor)))
    }
}

/// Copies the row-major values of a tensor on any device.
fn copy_out(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
    let mut data = vec![0.0f32; tensor.numel()];
    let elements = data.len();
    tensor.copy_data(&mut data, elements);
    data
}

/// Converts sizes to the integer type of libtorch.
pub(super) fn sizes(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|v| *v as i64).collect()
}

/// Writes the initial values of one tensor by the rules of [`ParamStore::init`].
fn fill(spec: &ParamSpec, fan_in: usize, last_head: bool, seed: u64, index: u64, data: &mut [f32]) {
    let mut rng = stream(Purpose::Init, seed, index, 0, 0);
    let mut normal = |data: &mut [f32], std: f64| {
        fill_normal(&mut rng, data);
        for value in data.iter_mut() {
            *value *= std as f32;
        }
    };
    let name = spec.name.as_str();
    let bias = name.rsplit('.').next() == Some("bias");
    if spec.part == Part::ValueHead {
        if !bias {
            let out = spec.shape.first().copied().unwrap_or(1) as f64;
            normal(data, if last_head { 0.02 } else { (2.0 / out).sqrt() });
        }
    } else if name == EMBEDDING {
        let width = spec.shape.last().copied().unwrap_or(1) as f64;
        normal(data, width.sqrt().recip());
    } else if name.ends_with("position_embedding.weight") {
        let width = spec.shape.last().copied().unwrap_or(1);
        if !position_table(width, data) {
            normal(data, (width as f64).sqrt().recip());
        }
    } else if name.contains("norm") {
        // LayerNorm has a bias in addition to its weight of one; RMSNorm has only a weight, which is added to one
        if name.ends_with("norm.dense.weight") {
            normal(data, 0.02);
        } else if name.contains("vision_tower") && !bias {
            data.fill(1.0);
        }
    } else {
        let bound = (fan_in as f64).sqrt().recip();
        for value in data.iter_mut() {
            *value = ((2.0 * uniform(&mut rng) - 1.0) * bound) as f32;
        }
    }
}

/// Writes the 2-D sine-cosine positions of a square grid, `[side * side, width]`, columns `sin x, cos x, sin y, cos y` with
/// `width / 4` frequencies from 1 to 1e-4 (Chen et al. 2021, `MoCo` v3). Returns `false` without writing if the sizes do not
/// fit: a grid that is not square, a width not divisible by 4 or below 8.
fn position_table(width: usize, data: &mut [f32]) -> bool {
    let tokens = data.len() / width.max(1);
    let side = tokens.isqrt();
    let quarter = width / 4;
    if side * side != tokens || !width.is_multiple_of(4) || quarter < 2 {
        return false;
    }
    for (token, row) in data.chunks_mut(width).enumerate() {
        let (y, x) = ((token / side) as f64, (token % side) as f64);
        for (column, slot) in row.iter_mut().enumerate() {
            let omega = 10_000f64.powf(-((column % quarter) as f64) / (quarter - 1) as f64);
            let angle = omega * if column / quarter < 2 { x } else { y };
            *slot = if (column / quarter).is_multiple_of(2) {
                angle.sin()
            } else {
                angle.cos()
            } as f32;
        }
    }
    true
}
