//! Element types of tensors.

use half::bf16;

/// Element type of a tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ElementType {
    /// 32-bit float.
    F32,
    /// 16-bit float with the exponent of a 32-bit float.
    Bf16,
    /// 8-bit unsigned integer.
    U8,
    /// 32-bit integer.
    I32,
    /// 64-bit integer.
    I64,
    /// Boolean.
    Bool,
}

impl ElementType {
    /// Returns the bytes of one element.
    pub const fn size(self) -> usize {
        match self {
            Self::F32 | Self::I32 => 4,
            Self::Bf16 => 2,
            Self::I64 => 8,
            Self::U8 | Self::Bool => 1,
        }
    }
}

/// Returns the little-endian bytes of values.
pub fn f32_bytes(values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; size_of_val(values)];
    for (to, value) in bytes.as_chunks_mut::<4>().0.iter_mut().zip(values) {
        *to = value.to_le_bytes();
    }
    bytes
}

/// Returns the little-endian bytes of values in bf16, rounded to nearest, ties to even.
pub fn bf16_bytes(values: &[f32]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * size_of::<bf16>()];
    for (to, value) in bytes.as_chunks_mut::<2>().0.iter_mut().zip(values) {
        *to = bf16::from_f32(*value).to_le_bytes();
    }
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bf16_is_rounded_to_nearest_even() {
        // 1 + 2^-8 lies between 1 and 1 + 2^-7; the even neighbour is 1. 1 + 3 * 2^-8 goes up to 1 + 2^-6
        assert_eq!(bf16_bytes(&[1.0 + 0.003_906_25]), 0x3f80u16.to_le_bytes());
        assert_eq!(bf16_bytes(&[1.0 + 0.011_718_75]), 0x3f82u16.to_le_bytes());
        assert_eq!(f32_bytes(&[1.0, -2.5]), [0, 0, 128, 63, 0, 0, 32, 192]);
    }
}
