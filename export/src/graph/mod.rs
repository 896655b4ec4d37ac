//! The two graphs of a bundle and the parts that they share, in the order of the data's way.

pub(crate) mod siglip;
pub(crate) mod gemma;
pub(crate) mod prefix;
pub(crate) mod expert;
pub(crate) mod denoise;

/// Choices of a graph that do not change what it computes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GraphOptions {
    /// Fixed batch size; absent: symbolic.
    pub batch: Option<usize>,
    /// Intermediate values as further outputs: only the golden tests ask for them, to find a deviation where it begins.
    pub debug: bool,
}
