//! Learners that train one policy together, each on episodes of its own (data parallelism).
//!
//! [`Ranks`] exchanges gradients and every statistic over a minibatch or an iteration. Groups of episodes are whole on a rank, so that
//! group-relative advantages need no exchange.

use std::{error::Error, fmt::Debug};

use tch::Tensor;

/// Failed exchange between ranks.
#[derive(Debug, thiserror::Error)]
#[error("failed to {operation} over {size} ranks")]
pub struct RanksError {
    /// The attempted operation.
    pub operation: &'static str,
    /// Number of ranks.
    pub size: usize,
    /// Cause.
    pub source: Box<dyn Error + Send + Sync>,
}

/// Result of this module.
pub type Result<T, E = RanksError> = std::result::Result<T, E>;

/// The learners of one run. All ranks make the same calls in the same order, with tensors of equal number, shapes and kinds.
pub trait Ranks: Debug {
    /// Returns the number of this rank, below [`Ranks::size`].
    fn rank(&self) -> usize;

    /// Returns the number of ranks, at least 1.
    fn size(&self) -> usize;

    /// Replaces the numbers in each tensor by their sums over all ranks; every rank gets the same bits.
    ///
    /// # Errors
    /// The exchange failed.
    fn sum(&self, tensors: &mut [Tensor]) -> Result<()>;

    /// Replaces the numbers in each tensor by the numbers of rank `root`.
    ///
    /// # Errors
    /// The exchange failed.
    fn broadcast(&self, tensors: &mut [Tensor], root: usize) -> Result<()>;
}

impl dyn Ranks + '_ {
    /// Returns the sums of the ranks' numbers.
    ///
    /// # Errors
    /// The exchange failed.
    pub fn sum_numbers<const N: usize>(&self, mut numbers: [f64; N]) -> Result<[f64; N]> {
        self.sum_in_place(&mut numbers)?;
        Ok(numbers)
    }

    /// Returns the numbers of all ranks, indexed by rank.
    ///
    /// # Errors
    /// The exchange failed.
    pub fn gather(&self, number: f64) -> Result<Vec<f64>> {
        let mut numbers = vec![0.0; self.size()];
        numbers[self.rank()] = number;
        self.sum_in_place(&mut numbers)?;
        Ok(numbers)
    }

    /// Replaces the numbers by the sums of the ranks' numbers.
    ///
    /// # Errors
    /// The exchange failed.
    pub fn sum_in_place(&self, numbers: &mut [f64]) -> Result<()> {
        let mut tensors = [Tensor::from_slice(numbers)];
        self.sum(&mut tensors)?;
        let [sums] = tensors;
        sums.f_copy_data(numbers, numbers.len()).map_err(|source| RanksError {
            operation: "read sums of numbers",
            size: self.size(),
            source: Box::new(source),
        })
    }

    /// Returns the largest of the ranks' numbers, all at least 0.
    ///
    /// # Errors
    /// The exchange failed.
    pub fn largest(&self, number: f64) -> Result<f64> {
        Ok(self.gather(number)?.into_iter().fold(0.0, f64::max))
    }
}

/// A run of a single learner: nothing is exchanged and no bit changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct OneRank;

impl Ranks for OneRank {
    fn rank(&self) -> usize {
        0
    }

    fn size(&self) -> usize {
        1
    }

    fn sum(&self, _tensors: &mut [Tensor]) -> Result<()> {
        Ok(())
    }

    fn broadcast(&self, _tensors: &mut [Tensor], _root: usize) -> Result<()> {
        Ok(())
    }
}
