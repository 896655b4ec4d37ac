//! Errors of weights.

/// Reason for rejecting a weight file or a tensor.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum WeightsError {
    /// A file that cannot be opened or mapped.
    #[error("cannot be read: {0}")]
    Read(String),
    /// A file that is not a complete safetensors file, or a layout that is too large for one.
    #[error("not a complete safetensors file ({0}): it may be truncated, copy or export it again")]
    Format(String),
    /// A missing weight.
    #[error("tensor `{0}` is missing")]
    Missing(String),
    /// A weight that the policy does not have.
    #[error("tensor `{name}` does not belong to this policy{hint}")]
    Extra {
        /// Name of the tensor.
        name: String,
        /// Nearest name of the policy, if one is near; otherwise empty.
        hint: String,
    },
    /// A weight of another shape.
    #[error("tensor `{name}` has shape {found:?}, expected {expected:?}")]
    Shape {
        /// Name of the tensor.
        name: String,
        /// Shape in the policy.
        expected: Vec<usize>,
        /// Shape in the file.
        found: Vec<usize>,
    },
    /// A weight of an unsupported type.
    #[error("tensor `{name}` has type {found}, expected F32 or BF16")]
    Type {
        /// Name of the tensor.
        name: String,
        /// Type in the file.
        found: String,
    },
    /// A weight with a value that is not finite.
    #[error("tensor `{name}` holds {value} at element {index}: a diverged or damaged checkpoint")]
    NotFinite {
        /// Name of the tensor.
        name: String,
        /// Index of the element.
        index: usize,
        /// Value of the element: NaN, inf or -inf.
        value: String,
    },
}
