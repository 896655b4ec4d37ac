//! Cache of the frozen prefixes of a data set's rows, up to a bound, for rows that are drawn again.

use std::collections::{BTreeMap, HashMap};

use policy::{
    config::PrefixCachePlace,
    plan::{DEFAULT_PREFIX_CACHE_MB, RunPlan},
};
use tch::{Device, Kind, Tensor};

use crate::{
    batch::{
        observation::ObservationBatch,
        prefix_store::{MAX_PASS_ROWS, prefix_bytes},
    },
    error::Result,
    model::{Pi0, PrefixCache},
};

/// Cache of prefixes by row. The first drawn rows are kept, up to the bound; the prefix of any other row is computed at each
/// draw. Kept rows are never evicted, because all rows are drawn with the same probability.
pub(crate) struct Prefixes<'a> {
    policy: &'a Pi0,
    /// Largest number of kept rows.
    capacity: usize,
    /// Slot of each kept row in `kept`.
    slots: HashMap<usize, i64>,
    /// Keys, values and masks, `[capacity, ..]` in main memory, whose pages the system commits as rows are written.
    kept: [Tensor; 3],
}

impl<'a> Prefixes<'a> {
    /// Creates an empty cache of at most `bytes` for a data set of `rows` rows.
    pub(crate) fn new(policy: &'a Pi0, rows: usize, bytes: u64) -> Self {
        let dims = policy.dims();
        let capacity = (bytes / prefix_bytes(dims) as u64).min(rows as u64) as usize;
        let [n, depth, kv_heads, tokens, head_dim] =
            [capacity, dims.depth, dims.kv_heads, dims.prefix_len(), dims.head_dim].map(|n| n as i64);
        let heads = || Tensor::empty([n, depth, kv_heads, tokens, head_dim], (Kind::Float, Device::Cpu));
        Self {
            policy,
            capacity,
            slots: HashMap::new(),
            kept: [heads(), heads(), Tensor::empty([n, tokens], (Kind::Bool, Device::Cpu))],
        }
    }

    /// Returns the prefixes of these rows on the policy's device, from `observations` of the same rows if they are not kept.
    ///
    /// # Errors
    /// A shape does not fit the policy.
    pub(crate) fn of(&mut self, rows: &[usize], observations: &ObservationBatch) -> Result<PrefixCache> {
        let device = self.policy.device();
        // each row once, with the place of its first occurrence in the minibatch
        let mut places = BTreeMap::new();
        for (place, row) in rows.iter().enumerate() {
            places.entry(*row).or_insert(place as i64);
        }
        let (known, new): (Vec<_>, Vec<_>) = places.into_iter().partition(|(row, _)| self.slots.contains_key(row));
        let slots: Vec<i64> = known.iter().map(|(row, _)| self.slots[row]).collect();
        let slots = Tensor::from_slice(&slots);
        let mut parts = vec![
            self.kept
                .each_ref()
                .map(|all| all.index_select(0, &slots).to_device(device)),
        ];
        for pass in new.chunks(MAX_PASS_ROWS) {
            let places: Vec<i64> = pass.iter().map(|(_, place)| *place).collect();
            let (cache, _) = observations.frozen_rows(self.policy, &places)?;
            let computed = [cache.k, cache.v, cache.mask];
            let from = self.slots.len();
            let count = pass.len().min(self.capacity - from) as i64;
            for (all, part) in self.kept.iter().zip(&computed) {
                all.narrow(0, from as i64, count).copy_(&part.narrow(0, 0, count));
            }
            let slots = (from as i64..).take(count as usize);
            self.slots.extend(pass.iter().map(|(row, _)| *row).zip(slots));
            parts.push(computed);
        }
        let found: HashMap<usize, i64> = known.iter().chain(&new).map(|(row, _)| *row).zip(0..).collect();
        let order: Vec<i64> = rows.iter().map(|row| found[row]).collect();
        let order = Tensor::from_slice(&order).to_device(device);
        let all = |field: usize| {
            let parts: Vec<&Tensor> = parts.iter().map(|part| &part[field]).collect();
            Tensor::cat(&parts, 0).index_select(0, &order)
        };
        Ok(PrefixCache::new(all(0), all(1), all(2))?)
    }
}

/// Returns the bound of the prefixes that SFT keeps in main memory, in bytes: `actor.prefix_cache_mb`. With `actor.prefix_cache =
/// "disk"` the bound is at most the default.
pub(crate) fn bound(plan: &RunPlan) -> u64 {
    match plan.prefix_cache() {
        (PrefixCachePlace::Disk, bytes) => bytes.min(DEFAULT_PREFIX_CACHE_MB * 1_000_000),
        (PrefixCachePlace::Memory | PrefixCachePlace::Off, bytes) => bytes,
    }
}
