//! Frozen prefixes of one iteration's records: each is computed once and stored, up to a bound, in memory or in a file.

use std::{
    fs::{File, OpenOptions},
    os::unix::fs::FileExt,
    path::{Path, PathBuf},
};

use policy::{config::PrefixCachePlace, dims::PolicyDims, plan::RunPlan};
use tch::{Device, Kind, Tensor};

use super::observation::ObservationBatch;
use crate::{
    error::{Result, io},
    model::{Pi0, PrefixCache},
};

/// Most rows of one prefix pass, for any micro-batch size.
pub(crate) const MAX_PASS_ROWS: usize = 256;
/// Bytes of a stored number: f32, so that a stored prefix equals the computed prefix bit for bit.
const NUMBER: usize = 4;

/// Prefixes of records by record number. The first records are stored, as many as the bound admits. The prefix of any other record
/// is computed again for every request.
#[derive(Debug)]
pub struct PrefixStore<'a> {
    policy: &'a Pi0,
    observations: &'a ObservationBatch,
    layout: Layout,
    /// Most rows of one pass.
    pass: usize,
    /// Number of stored records, from record 0.
    held: i64,
    kept: Kept,
}

#[derive(Debug)]
enum Kept {
    Nothing,
    /// Packed rows, f32 `[held, numbers]`, in main memory.
    Memory(Tensor),
    Disk(Scratch),
}

impl<'a> PrefixStore<'a> {
    /// Computes and stores prefixes. In addition, at most one pass of up to `actor.micro_batch_size` rows is in memory.
    ///
    /// # Errors
    /// A shape does not fit the policy, or the file cannot be written.
    pub fn fill(plan: &RunPlan, policy: &'a Pi0, observations: &'a ObservationBatch) -> Result<Self> {
        let (place, bytes) = plan.prefix_cache();
        let layout = Layout::of(policy.dims());
        let held = (bytes / layout.bytes() as u64).min(observations.len() as u64) as i64;
        let mut store = Self {
            policy,
            observations,
            layout,
            pass: plan.config.actor.micro_batch_size.min(MAX_PASS_ROWS),
            held,
            kept: Kept::Nothing,
        };
        let shape = [held, store.layout.numbers() as i64];
        let mut kept = match place {
            PrefixCachePlace::Off => return Ok(store),
            PrefixCachePlace::Memory => Kept::Memory(Tensor::empty(shape, (Kind::Float, Device::Cpu))),
            PrefixCachePlace::Disk => Kept::Disk(Scratch::create(&file(&plan.config.runner.output_dir))?),
        };
        let records: Vec<i64> = (0..held).collect();
        for part in records.chunks(store.pass) {
            let from = part[0];
            let rows = store.pass(part)?;
            match &mut kept {
                Kept::Nothing => {}
                Kept::Memory(all) => all.narrow(0, from, part.len() as i64).copy_(&rows),
                Kept::Disk(scratch) => scratch.write(from as u64, &rows)?,
            }
        }
        store.kept = kept;
        Ok(store)
    }

    /// Returns keys, values and mask of these records, in any order and repeated or not, and the input of `V_vlm`, `[n, vlm width]`.
    ///
    /// # Errors
    /// The file cannot be read.
    pub fn rows(&self, records: &[i64]) -> Result<(PrefixCache, Tensor)> {
        let packed = match &self.kept {
            Kept::Memory(all) if records.iter().all(|record| *record < self.held) => {
                all.index_select(0, &Tensor::from_slice(records))
            }
            _ => self.gather(records)?,
        };
        self.layout.unpack(&packed.to_device(self.policy.device()))
    }

    /// Returns the packed rows of `wanted`. Reads or computes each record once: stored records first, in rising order, then the others.
    fn gather(&self, wanted: &[i64]) -> Result<Tensor> {
        let mut distinct = wanted.to_vec();
        distinct.sort_unstable();
        distinct.dedup();
        let split = distinct.partition_point(|record| *record < self.held);
        let (held, others) = distinct.split_at(split);
        let mut parts = Vec::new();
        if !held.is_empty() {
            match &self.kept {
                Kept::Nothing => {}
                Kept::Memory(all) => parts.push(all.index_select(0, &Tensor::from_slice(held))),
                Kept::Disk(scratch) => parts.push(scratch.read(held, self.layout.numbers())?),
            }
        }
        for part in others.chunks(self.pass) {
            parts.push(self.pass(part)?);
        }
        if parts.is_empty() {
            return Ok(Tensor::zeros(
                [0, self.layout.numbers() as i64],
                (Kind::Float, Device::Cpu),
            ));
        }
        let all = Tensor::cat(&parts, 0);
        if distinct == wanted {
            return Ok(all);
        }
        // every record is in `distinct`, at a position equal to the number of smaller records
        let position = |record: &i64| distinct.partition_point(|other| other < record) as i64;
        let order: Vec<i64> = wanted.iter().map(position).collect();
        Ok(all.index_select(0, &Tensor::from_slice(&order)))
    }

    /// Computes one pass and returns the packed rows, in main memory.
    fn pass(&self, records: &[i64]) -> Result<Tensor> {
        let (cache, pooled) = self.observations.frozen_rows(self.policy, records)?;
        Ok(packed(&cache, &pooled).to_device(Device::Cpu))
    }

    /// Returns the most rows of one pass.
    pub(crate) fn pass_rows(&self) -> usize {
        self.pass
    }

    /// Returns the number of stored records.
    pub fn held(&self) -> usize {
        self.held as usize
    }

    /// Returns the number of stored bytes.
    ///
    /// # Errors
    /// The file cannot be examined.
    pub fn bytes(&self) -> Result<u64> {
        match &self.kept {
            Kept::Nothing => Ok(0),
            Kept::Memory(all) => Ok((all.numel() * NUMBER) as u64),
            Kept::Disk(scratch) => scratch.bytes(),
        }
    }

    /// Returns the number of bytes that the prefixes of all records would take.
    pub fn wanted_bytes(&self) -> u64 {
        self.observations.len() as u64 * self.layout.bytes() as u64
    }
}

/// Returns the number of bytes of one record's prefix.
pub fn prefix_bytes(dims: &PolicyDims) -> usize {
    Layout::of(dims).bytes()
}

/// Returns the path of the file of `actor.prefix_cache = "disk"`.
fn file(output_dir: &Path) -> PathBuf {
    output_dir.join("prefix_cache.bin")
}

/// Layout of a record's prefix in a row of numbers: keys, values, pooled output, mask (0 or 1).
#[derive(Debug)]
struct Layout {
    depth: usize,
    kv_heads: usize,
    tokens: usize,
    head_dim: usize,
    pooled: usize,
}

impl Layout {
    fn of(dims: &PolicyDims) -> Self {
        Self {
            depth: dims.depth,
            kv_heads: dims.kv_heads,
            tokens: dims.prefix_len(),
            head_dim: dims.head_dim,
            pooled: dims.vlm.width,
        }
    }

    fn keys(&self) -> usize {
        self.depth * self.kv_heads * self.tokens * self.head_dim
    }

    fn numbers(&self) -> usize {
        2 * self.keys() + self.pooled + self.tokens
    }

    fn bytes(&self) -> usize {
        self.numbers() * NUMBER
    }

    fn unpack(&self, packed: &Tensor) -> Result<(PrefixCache, Tensor)> {
        let batch = packed.size()[0];
        let [depth, kv_heads, tokens, head_dim] =
            [self.depth, self.kv_heads, self.tokens, self.head_dim].map(|n| n as i64);
        let (keys, pooled) = (self.keys() as i64, self.pooled as i64);
        let cut = |from: i64, count: i64| packed.narrow(1, from, count);
        let heads = |t: Tensor| t.view([batch, depth, kv_heads, tokens, head_dim]);
        let cache = PrefixCache::new(
            heads(cut(0, keys)),
            heads(cut(keys, keys)),
            cut(2 * keys + pooled, tokens).not_equal(0.0),
        )?;
        Ok((cache, cut(2 * keys, pooled)))
    }
}

/// Packs prefixes into rows of [`Layout`], f32 `[n, numbers]`.
fn packed(cache: &PrefixCache, pooled: &Tensor) -> Tensor {
    let flat = |t: &Tensor| t.flatten(1, -1).to_kind(Kind::Float);
    Tensor::cat(&[flat(&cache.k), flat(&cache.v), flat(pooled), flat(&cache.mask)], 1)
}

/// File that is unlinked as soon as it is open, so that nothing remains, however the process ends.
#[derive(Debug)]
struct Scratch {
    file: File,
    path: PathBuf,
}

impl Scratch {
    fn create(path: &Path) -> Result<Self> {
        if let Some(dir) = path.parent() {
            std::fs::create_dir_all(dir).map_err(io("creating the folder of the prefix cache", dir))?;
        }
        if path.exists() {
            std::fs::remove_file(path).map_err(io("removing an earlier prefix cache", path))?;
        }
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create_new(true)
            .open(path)
            .map_err(io("creating the prefix cache", path))?;
        std::fs::remove_file(path).map_err(io("taking the name from the prefix cache", path))?;
        Ok(Self {
            file,
            path: path.to_owned(),
        })
    }

    fn write(&self, from: u64, rows: &Tensor) -> Result<()> {
        let mut bytes = vec![0u8; rows.numel() * NUMBER];
        rows.contiguous().copy_data_u8(&mut bytes, rows.numel());
        let row = rows.size()[1] as u64 * NUMBER as u64;
        self.file.write_all_at(&bytes, from * row).map_err(io(
            "writing the prefix cache (`actor.prefix_cache_mb` bounds its size)",
            &self.path,
        ))
    }

    /// Reads rows of `numbers` numbers each, f32 `[n, numbers]`.
    fn read(&self, records: &[i64], numbers: usize) -> Result<Tensor> {
        let row = numbers * NUMBER;
        let mut bytes = vec![0u8; records.len() * row];
        for (record, slot) in records.iter().zip(bytes.chunks_exact_mut(row)) {
            self.file
                .read_exact_at(slot, *record as u64 * row as u64)
                .map_err(io("reading the prefix cache", &self.path))?;
        }
        Ok(Tensor::from_data_size(
            &bytes,
            &[records.len() as i64, numbers as i64],
            Kind::Float,
        ))
    }

    fn bytes(&self) -> Result<u64> {
        let length = self.file.metadata().map(|metadata| metadata.len());
        length.map_err(io("examining the prefix cache", &self.path))
    }
}
