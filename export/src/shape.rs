//! Shapes of graph values: fixed sizes, or a multiple of the symbolic batch.

use std::fmt;

use policy::graph::{Axis, BATCH};

/// One axis of a graph value: `count`, or `count * batch` where the batch is symbolic.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dim {
    count: usize,
    batched: bool,
}

impl Dim {
    /// Returns an axis of fixed size.
    pub const fn fixed(count: usize) -> Self {
        Self { count, batched: false }
    }

    /// Returns an axis of `count` times the symbolic batch.
    pub const fn batch(count: usize) -> Self {
        Self { count, batched: true }
    }

    /// Returns the size, without the batch factor.
    pub const fn count(self) -> usize {
        self.count
    }

    /// Returns whether the symbolic batch is a factor.
    pub const fn is_batched(self) -> bool {
        self.batched
    }

    /// Returns an axis that is `factor` times as long.
    #[must_use]
    pub const fn times(self, factor: usize) -> Self {
        Self {
            count: self.count * factor,
            batched: self.batched,
        }
    }

    const fn is_one(self) -> bool {
        self.count == 1 && !self.batched
    }
}

impl From<Axis> for Dim {
    fn from(axis: Axis) -> Self {
        match axis {
            Axis::Batch => Self::batch(1),
            Axis::Fixed(size) => Self::fixed(size),
        }
    }
}

impl fmt::Display for Dim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self.batched, self.count) {
            (true, 1) => f.write_str(BATCH),
            (true, count) => write!(f, "{count}*{BATCH}"),
            (false, count) => write!(f, "{count}"),
        }
    }
}

/// Returns fixed sizes as axes.
pub fn fixed(sizes: &[usize]) -> Vec<Dim> {
    sizes.iter().map(|n| Dim::fixed(*n)).collect()
}

/// Returns a shape as text, like `[2, batch, 3]`.
pub fn text(shape: &[Dim]) -> String {
    let axes: Vec<String> = shape.iter().map(Dim::to_string).collect();
    format!("[{}]", axes.join(", "))
}

/// Returns the number of elements; `None` if the batch is a factor of two axes.
pub(crate) fn elements(shape: &[Dim]) -> Option<Dim> {
    shape.iter().try_fold(Dim::fixed(1), |all, axis| {
        (!(all.batched && axis.batched)).then(|| Dim {
            count: all.count * axis.count,
            batched: all.batched || axis.batched,
        })
    })
}

/// Returns the shape of an elementwise operation (numpy's rule); `None` if the shapes do not broadcast.
pub(crate) fn broadcast(a: &[Dim], b: &[Dim]) -> Option<Vec<Dim>> {
    let rank = a.len().max(b.len());
    let axis = |shape: &[Dim], i: usize| -> Dim {
        (i + shape.len())
            .checked_sub(rank)
            .and_then(|at| shape.get(at).copied())
            .unwrap_or(Dim::fixed(1))
    };
    (0..rank)
        .map(|i| match (axis(a, i), axis(b, i)) {
            (x, y) if x == y || y.is_one() => Some(x),
            (x, y) if x.is_one() => Some(y),
            _ => None,
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn broadcasting_follows_numpy() {
        let b = Dim::batch(1);
        assert_eq!(
            broadcast(&[b, Dim::fixed(1)], &fixed(&[5])),
            Some(vec![b, Dim::fixed(5)])
        );
        assert_eq!(broadcast(&fixed(&[3, 1]), &fixed(&[2, 3, 4])), Some(fixed(&[2, 3, 4])));
        assert_eq!(broadcast(&fixed(&[3]), &fixed(&[4])), None);
        assert_eq!(
            broadcast(&[Dim::batch(2)], &[b]),
            None,
            "two multiples of the batch differ"
        );
    }

    #[test]
    fn the_batch_counts_once() {
        assert_eq!(elements(&[Dim::batch(2), Dim::fixed(3)]), Some(Dim::batch(6)));
        assert_eq!(elements(&[Dim::batch(1), Dim::batch(1)]), None);
    }
}
