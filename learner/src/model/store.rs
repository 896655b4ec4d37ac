//! The weights of a policy as named f32 tensors: created, filled, loaded, exported.

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

/// One weight taken out of the store: name, sizes and row-major values.
pub type ExportedParam = (String, Vec<usize>, Vec<f32>);

/// All weights of one policy, by name, as leaf tensors of one device.
///
/// A tensor's storage never changes after creation: loading and optimizing write in place, so that the network's layers,
/// which hold the same tensors, always see the current values.
#[derive(Debug)]
pub struct ParamStore {
    specs: Vec<ParamSpec>,
    tensors: BTreeMap<String, Tensor>,
    device: Device,
}

impl ParamStore {
    /// All weights zero: to be filled by [`ParamStore::load`] or [`ParamStore::init`].
    ///
    /// # Errors
    /// The sizes do not fit together.
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

    /// A store whose tensors of these parts are copies and whose others are shared with this one.
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

    /// Random weights, the same for the same seed: see [`ParamStore::init`].
    ///
    /// # Errors
    /// The sizes do not fit together.
    pub fn random(dims: &PolicyDims, heads: &Heads, seed: u64, device: Device) -> Result<Self, ModelError> {
        let store = Self::zeros(dims, heads, device)?;
        store.init(&[Part::Vlm, Part::Expert, Part::NoiseHead, Part::ValueHead], seed)?;
        Ok(store)
    }

    /// Draws the weights of these parts. Each tensor has a random stream of its own, keyed by `seed` and its place in the table.
    ///
    /// Linear and patch weights and biases are uniform in `+-1/sqrt(inputs)` (He et al. 2015 with `a = sqrt(5)`, the usual
    /// default); the text embedding is `N(0, 1/width)`; RMSNorm weights are 0 (the network multiplies by `1 + w`), LayerNorm 1
    /// and 0; the position table is the 2-D sine-cosine one; adaRMS weights are `N(0, 0.02^2)` with zero bias, so that every
    /// block starts near the identity; the value head is `N(0, 2/outputs)` with its last layer `N(0, 0.02^2)`, zero biases.
    ///
    /// # Errors
    /// None in a store made by this module.
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

    /// Inputs of the linear layer that a weight or bias belongs to.
    fn fan_in(&self, spec: &ParamSpec) -> usize {
        let weight = spec.name.strip_suffix(".bias").map(|stem| format!("{stem}.weight"));
        let shape = weight
            .and_then(|name| self.specs.iter().find(|s| s.name == name))
            .map_or(&spec.shape, |s| &s.shape);
        shape.iter().skip(1).product::<usize>().max(1)
    }

    /// Fills these parts from a file that holds exactly their tensors, each with its shape and only finite numbers.
    ///
    /// # Errors
    /// The first tensor that is missing, extra, misshapen, of another type or not finite; the store is then partly loaded.
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
    /// There is no such tensor, or it has another number of elements.
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

    /// The tensor of this name.
    ///
    /// # Errors
    /// There is none.
    pub fn get(&self, name: &str) -> Result<&Tensor, ModelError> {
        self.tensors
            .get(name)
            .ok_or_else(|| ModelError::NoParam(name.to_owned()))
    }

    /// Names and tensors of one part in the order of the parameter table.
    pub fn part(&self, part: Part) -> impl Iterator<Item = (&str, &Tensor)> {
        self.specs
            .iter()
            .filter(move |s| s.part == part)
            .filter_map(|s| self.tensors.get(&s.name).map(|tensor| (s.name.as_str(), tensor)))
    }

    /// The parameter table that the store was made from.
    pub fn specs(&self) -> &[ParamSpec] {
        &self.specs
    }

    /// Where the tensors live.
    pub fn device(&self) -> Device {
        self.device
    }

    /// Gradients are computed for these parts and for no other.
    pub fn set_trainable(&self, parts: &[Part]) {
        for spec in &self.specs {
            if let Some(tensor) = self.tensors.get(&spec.name) {
                // the flag is set on the tensor itself, the returned handle is another name of it
                drop(tensor.set_requires_grad(parts.contains(&spec.part)));
            }
        }
    }

    /// Drops all gradients to zero.
    pub fn zero_grad(&self) {
        for tensor in self.tensors.values() {
            tensor.shallow_clone().zero_grad();
        }
    }

    /// Copies one part out, in the order of the parameter table.
    pub fn export(&self, part: Part) -> Vec<ExportedParam> {
        self.specs
            .iter()
            .filter(|s| s.part == part)
            .filter_map(|s| Some((s.name.clone(), s.shape.clone(), copy_out(self.tensors.get(&s.name)?))))
            .collect()
    }

    /// Writes a safetensors file with these parts atomically and describes it.
    ///
    /// # Errors
    /// A tensor is not finite, or a file operation fails; then the old file, if any, is untouched.
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

/// Row-major values of a tensor on any device.
fn copy_out(tensor: &Tensor) -> Vec<f32> {
    let tensor = tensor.detach().to_device(Device::Cpu).contiguous();
    let mut data = vec![0.0f32; tensor.numel()];
    let elements = data.len();
    tensor.copy_data(&mut data, elements);
    data
}

/// Sizes as libtorch takes them.
pub(super) fn sizes(shape: &[usize]) -> Vec<i64> {
    shape.iter().map(|v| *v as i64).collect()
}

/// Writes the initial values of one tensor; the rules are at [`ParamStore::init`].
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
        // LayerNorm has a bias beside its weight of one; RMSNorm a lone weight that is added to one
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

/// 2-D sine-cosine positions of a square grid, `[side * side, width]`, columns `sin x, cos x, sin y, cos y` with `width / 4`
/// frequencies from 1 to 1e-4 (Chen et al. 2021, `MoCo` v3). False when the sizes do not allow it.
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
