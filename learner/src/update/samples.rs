//! Samples of a micro-batch.

use tch::{Device, Tensor};

use crate::{
    batch::{RolloutBatch, prefix_store::PrefixStore},
    error::Result,
    model::PrefixCache,
};

/// `M` samples of a batch on the device, each with the prefix of its record.
pub(super) struct Samples<'a> {
    pub(super) batch: &'a RolloutBatch,
    /// Index of each sample in the batch, i64 `[M]`.
    rows: Tensor,
    /// Index of each sample's record, i64 `[M]`.
    pub(super) record: Tensor,
    pub(super) cache: PrefixCache,
    /// Input of `V_vlm`, `[M, vlm width]`.
    pub(super) pooled: Tensor,
}

impl<'a> Samples<'a> {
    /// Reads the samples with the indices `rows`.
    ///
    /// # Errors
    /// The prefixes of the samples cannot be read.
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

    /// Returns the samples' rows of a tensor that has one row per sample of the batch.
    pub(super) fn of_samples(&self, tensor: &Tensor) -> Tensor {
        tensor.index_select(0, &self.rows)
    }

    /// Returns the samples' rows of a tensor that has one row per record of the batch.
    pub(super) fn of_records(&self, tensor: &Tensor) -> Tensor {
        tensor.index_select(0, &self.record)
    }
}
