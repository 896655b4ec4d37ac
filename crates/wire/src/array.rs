//! Arrays on the wire: dtype, shape and little-endian bytes, checked before they are used.

use serde::{Deserialize, Serialize};

/// Element type of an [`Array`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ElementType {
    /// 32-bit float.
    F32,
    /// Unsigned byte.
    U8,
}

impl ElementType {
    fn size(self) -> usize {
        match self {
            Self::F32 => 4,
            Self::U8 => 1,
        }
    }
}

/// Array as sent between processes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Array {
    /// Element type.
    pub dtype: ElementType,
    /// Sizes, outermost first.
    pub shape: Vec<u32>,
    /// Row-major little-endian bytes.
    #[serde(with = "serde_bytes")]
    pub data: Vec<u8>,
}

/// Array with an unexpected type, shape or length.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("array `{what}`: expected {expected}, found {found}")]
pub struct ArrayError {
    what: String,
    expected: String,
    found: String,
}

impl Array {
    /// Returns an f32 array; `shape` must multiply to the number of values.
    pub fn f32(shape: &[usize], values: &[f32]) -> Self {
        debug_assert_eq!(shape.iter().product::<usize>(), values.len());
        Self {
            dtype: ElementType::F32,
            shape: shape.iter().map(|s| *s as u32).collect(),
            data: values.iter().flat_map(|v| v.to_le_bytes()).collect(),
        }
    }

    /// Returns a byte array; `shape` must multiply to the number of values.
    pub fn u8(shape: &[usize], values: Vec<u8>) -> Self {
        debug_assert_eq!(shape.iter().product::<usize>(), values.len());
        Self {
            dtype: ElementType::U8,
            shape: shape.iter().map(|s| *s as u32).collect(),
            data: values,
        }
    }

    /// Returns the sizes, outermost first.
    pub fn dims(&self) -> Vec<usize> {
        self.shape.iter().map(|s| *s as usize).collect()
    }

    fn check(&self, what: &str, dtype: ElementType, shape: Option<&[usize]>) -> Result<(), ArrayError> {
        let fail = |expected: String, found: String| {
            Err(ArrayError {
                what: what.to_owned(),
                expected,
                found,
            })
        };
        if self.dtype != dtype {
            return fail(format!("{dtype:?}"), format!("{:?}", self.dtype));
        }
        if let Some(shape) = shape
            && self.dims() != shape
        {
            return fail(format!("shape {shape:?}"), format!("{:?}", self.shape));
        }
        let bytes = self
            .shape
            .iter()
            .try_fold(dtype.size(), |n, s| n.checked_mul(*s as usize));
        if bytes != Some(self.data.len()) {
            return fail(
                format!("the bytes of shape {:?}", self.shape),
                format!("{} bytes", self.data.len()),
            );
        }
        Ok(())
    }

    /// Returns the values as f32 after checking type, shape (when given) and length.
    ///
    /// # Errors
    /// Names the array, what was expected and what was found.
    pub fn to_f32(&self, what: &str, shape: Option<&[usize]>) -> Result<Vec<f32>, ArrayError> {
        self.check(what, ElementType::F32, shape)?;
        Ok(self
            .data
            .as_chunks::<4>()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect())
    }

    /// Returns the bytes after checking type, shape (when given) and length.
    ///
    /// # Errors
    /// Names the array, what was expected and what was found.
    pub fn as_u8(&self, what: &str, shape: Option<&[usize]>) -> Result<&[u8], ArrayError> {
        self.check(what, ElementType::U8, shape)?;
        Ok(&self.data)
    }
}
