//! The samples of a micro-batch.

use tch::{Device, Tensor};

use crate::{
    batch::{RolloutBatch, prefix_store::PrefixStore},
    error::Result,
    model::PrefixCache,
};

/// `M` samples of a batch on the device, each with the prefix of its record.
pub(super) struct Samples<'a> {
    pub(super) batch: &'a RolloutBatch,
    /// i64 `[M]`.
    rows: Tensor,
    /// The record of each, i64 `[M]`.
    pub(super) record: Tensor,
    pub(super) cache: PrefixCache,
    /// What `V_vlm` reads.
    pub(super) pooled: Tensor,
}

impl<'a> Samples<'a> {
    /// Looks the samples `rows` up.
    ///
    /// # Errors
    /// Their prefixes cannot be read.
    pub(super) fn read(
        batch: &'a RolloutBatch,
        prefixes: &PrefixStore<'_>,
        rows: &[usize],
        device: Device,
    ) -> Result<Self> {
        let record: Vec<i64> = rows.iter().map(|row| batch.record[*row]).collect();
        let rows: Vec<i64> = rows.iter().map(|row| *row as i64).collect();
        let (cache, pooled) = prefixes.rows(&record)?;
        Ok(Self {
            batch,
            rows: Tensor::from_slice(&rows).to_device(device),
            record: Tensor::from_slice(&record).to_device(device),
            cache,
            pooled,
        })
    }

    /// The samples' rows of a tensor that has one per sample of the batch.
    pub(super) fn of_samples(&self, tensor: &Tensor) -> Tensor {
        tensor.index_select(0, &self.rows)
    }

    /// The samples' rows of a tensor that has one per record of the batch.
    pub(super) fn of_records(&self, tensor: &Tensor) -> Tensor {
        tensor.index_select(0, &self.record)
    }
}
