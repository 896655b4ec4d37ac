//! What can be wrong with weights.

/// What is wrong with a weight file.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// It cannot be opened or mapped.
    #[error("cannot be read: {0}")]
    Read(String),
    /// It is no whole safetensors file.
    #[error("no whole safetensors file ({0}): it may be truncated, copy or export it again")]
    Format(String),
    /// A weight is not there.
    #[error("tensor `{0}` is missing")]
    Missing(String),
    /// A weight that the policy does not have.
    #[error("tensor `{name}` does not belong to this policy{hint}")]
    Extra {
        /// Its name.
        name: String,
        /// The nearest name that does belong, when one is near.
        hint: String,
    },
    /// Another shape.
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Its name.
        name: String,
        /// What the policy has.
        expected: Vec<usize>,
        /// What the file has.
        found: Vec<usize>,
    },
    /// A type that is not read.
    #[error("tensor `{name}` has type {found}, expected F32 or BF16")]
    Type {
        /// Its name.
        name: String,
        /// What the file has.
        found: String,
    },
    /// NaN or infinity.
    #[error("tensor `{name}` holds {value} at element {index}: a diverged or damaged checkpoint")]
    NotFinite {
        /// Its name.
        name: String,
        /// Which element.
        index: usize,
        /// NaN, inf or -inf.
        value: String,
    },
}
