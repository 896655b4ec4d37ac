//! The graphs of a bundle and their shared parts, in the order of the data path.

pub(crate) mod siglip;
pub(crate) mod gemma;
pub(crate) mod prefix;
pub(crate) mod expert;
pub(crate) mod denoise;
pub(crate) mod cuda;

/// Options of a graph that do not change its results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct GraphOptions {
    /// Fixed batch size; `None` is symbolic.
    pub batch: Option<usize>,
    /// Whether intermediate values are additional outputs, with which the golden tests locate a deviation.
    pub debug: bool,
}
