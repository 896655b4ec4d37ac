//! Selection of the rows of an optimizer step: a seeded shuffle per epoch, an even split into minibatches, and micro-batches within
//! each minibatch. The weights of the micro-batches make the accumulated gradient equal the minibatch's gradient.
//!
//! The permutation depends only on (run seed, iteration, epoch). Every epoch of every iteration has a new permutation, and a resumed
//! run shuffles like an uninterrupted run.

use chacha20::ChaCha8Rng;
use chacha20::rand_core::{Rng, SeedableRng};

use crate::ranks::{Ranks, RanksError};

/// Seed of a shuffle: its position in a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ShuffleSeed {
    /// Seed of the run.
    pub run: u64,
    /// RL iteration, counted over the whole run.
    pub iteration: u64,
    /// Epoch within the iteration.
    pub epoch: u64,
}

impl ShuffleSeed {
    /// Returns a generator keyed by the three counters and the name `shuffle`, so that no other stream of the run repeats its numbers.
    fn generator(self) -> ChaCha8Rng {
        let mut key = [0; 32];
        for (slot, word) in
            key.chunks_exact_mut(8)
                .zip([self.run, self.iteration, self.epoch, u64::from_le_bytes(*b"shuffle\0")])
        {
            slot.copy_from_slice(&word.to_le_bytes());
        }
        ChaCha8Rng::from_seed(key)
    }
}

/// Returns a uniform permutation of `0..rows` (Fisher-Yates).
pub fn permutation(rows: usize, seed: ShuffleSeed) -> Vec<usize> {
    let mut generator = seed.generator();
    let mut order: Vec<usize> = (0..rows).collect();
    for last in (1..rows).rev() {
        order.swap(last, below(&mut generator, last as u64 + 1) as usize);
    }
    order
}

/// Returns a uniform number in `0..bound`; draws from the incomplete last interval are repeated.
fn below(generator: &mut ChaCha8Rng, bound: u64) -> u64 {
    let usable = u64::MAX - u64::MAX % bound;
    loop {
        let draw = generator.next_u64();
        if draw < usable {
            return draw % bound;
        }
    }
}

/// Returns the number of minibatches for `rows` rows of all ranks and about `minibatch_size` rows each: `max(1, round(rows / size))`,
/// at most `rows`. 0 rows give 0.
pub fn minibatch_count(rows: usize, minibatch_size: usize) -> usize {
    let size = minibatch_size.max(1);
    ((rows + size / 2) / size).clamp(1, rows.max(1)).min(rows)
}

/// Splits the rows of a rank into its parts of `count` minibatches. The sizes differ by at most one row, and every row is in exactly
/// one part. With fewer rows than minibatches, the last parts are empty.
pub fn minibatches(order: &[usize], count: usize) -> Vec<&[usize]> {
    split_evenly(order, count)
}

/// Totals of a minibatch over all ranks, the divisors of its means.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MinibatchTotals {
    rows: f64,
    valid: f64,
}

impl MinibatchTotals {
    /// Counts the rows and the valid elements of a minibatch, of which this rank has `rows`; `valid` is by row of this rank.
    ///
    /// # Errors
    /// The exchange between ranks failed.
    pub fn new(rows: &[usize], valid: &[u32], ranks: &dyn Ranks) -> Result<Self, RanksError> {
        let [rows, valid] = ranks.sum_numbers([rows.len() as f64, count_valid(rows, valid)])?;
        Ok(Self { rows, valid })
    }
}

/// Part of a minibatch that goes through the network at once.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct MicroBatch<'a> {
    /// Row indices.
    pub rows: &'a [usize],
    /// Share of the minibatch's rows, in (0, 1], the factor of this part's mean loss. The gradient accumulated over the parts of all
    /// ranks is then the gradient of the minibatch's mean.
    pub weight: f64,
    /// Share of the minibatch's valid elements divided by `weight`, the factor of a mean over valid elements.
    pub valid_share: f64,
}

/// Splits a rank's part of a minibatch into as few even parts of at most `micro_batch_size` rows as possible.
pub fn micro_batches<'a>(
    rows: &'a [usize],
    valid: &[u32],
    totals: MinibatchTotals,
    micro_batch_size: usize,
) -> Vec<MicroBatch<'a>> {
    let parts = rows.len().div_ceil(micro_batch_size.max(1));
    split_evenly(rows, parts)
        .into_iter()
        .map(|rows| {
            let weight = rows.len() as f64 / totals.rows;
            MicroBatch {
                rows,
                weight,
                valid_share: count_valid(rows, valid) / totals.valid.max(1.0) / weight,
            }
        })
        .collect()
}

fn count_valid(rows: &[usize], valid: &[u32]) -> f64 {
    rows.iter().map(|row| f64::from(valid[*row])).sum()
}

fn split_evenly(rows: &[usize], parts: usize) -> Vec<&[usize]> {
    let mut rest = rows;
    let mut split = Vec::with_capacity(parts);
    for left in (1..=parts).rev() {
        let (part, tail) = rest.split_at(rest.len().div_ceil(left));
        split.push(part);
        rest = tail;
    }
    split
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ranks::OneRank;

    const SEED: ShuffleSeed = ShuffleSeed {
        run: 7,
        iteration: 3,
        epoch: 0,
    };

    #[test]
    fn every_epoch_of_every_iteration_is_another_permutation_and_a_seed_repeats_its_own() {
        let first = permutation(100, SEED);
        assert_eq!(first, permutation(100, SEED));
        for other in [
            ShuffleSeed { epoch: 1, ..SEED },
            ShuffleSeed { iteration: 4, ..SEED },
            ShuffleSeed { run: 8, ..SEED },
        ] {
            assert_ne!(first, permutation(100, other), "{other:?}");
        }
        let mut sorted = first;
        sorted.sort_unstable();
        assert_eq!(sorted, (0..100).collect::<Vec<_>>());
    }

    #[test]
    fn the_shuffle_is_uniform() {
        // 6000 shuffles of 3 rows: each of the 6 orders about 1000 times, standard deviation 29; 150 is 5 of them
        let mut counts = std::collections::BTreeMap::new();
        for epoch in 0..6000 {
            *counts
                .entry(permutation(3, ShuffleSeed { epoch, ..SEED }))
                .or_insert(0i32) += 1;
        }
        assert_eq!(counts.len(), 6);
        assert!(counts.values().all(|count| (count - 1000).abs() < 150), "{counts:?}");
    }

    #[test]
    fn minibatches_take_every_row_once_and_differ_by_one_row_at_most() {
        for (rows, size, expected) in [
            (0, 800, 0),
            (1, 800, 1),
            (399, 800, 1),
            (1199, 800, 1),
            (1200, 800, 2),
            (2000, 800, 3),
            (5, 1, 5),
            (3, 0, 3),
        ] {
            let order = permutation(rows, SEED);
            let split = minibatches(&order, minibatch_count(rows, size));
            assert_eq!(split.len(), expected, "{rows} rows of {size}");
            assert_eq!(split.concat(), order);
            let sizes: Vec<usize> = split.iter().map(|part| part.len()).collect();
            let spread = sizes.iter().max().unwrap_or(&0) - sizes.iter().min().unwrap_or(&0);
            assert!(spread <= 1, "{sizes:?}");
        }
    }

    #[test]
    fn micro_batches_are_bounded_and_their_shares_sum_to_one() {
        let order = permutation(10, SEED);
        let valid: Vec<u32> = (0..10).collect();
        let totals = MinibatchTotals::new(&order, &valid, &OneRank).expect("one rank");
        let parts = micro_batches(&order, &valid, totals, 4);
        assert_eq!(parts.iter().map(|part| part.rows.len()).collect::<Vec<_>>(), [4, 3, 3]);
        assert!((parts.iter().map(|part| part.weight).sum::<f64>() - 1.0).abs() < 1e-12);
        let of_valid = parts.iter().map(|part| part.weight * part.valid_share);
        assert!((of_valid.sum::<f64>() - 1.0).abs() < 1e-12);
        assert!(micro_batches(&[], &valid, totals, 4).is_empty());
    }
}
