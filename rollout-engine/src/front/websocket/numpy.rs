//! NumPy arrays in openpi's msgpack form: a map with the keys `__ndarray__`, `data`, `dtype` and `shape`.

use policy::message::shown;

use super::msgpack::Value;

/// Most dimensions of an array.
const MAX_RANK: usize = 8;
/// Most characters of a client's text in an error.
const SHOWN: usize = 60;
/// Accepted types, in NumPy's notation.
const ACCEPTED: &str = "|u1, |i1, <i2, <u2, <i4, <u4, <i8, <u8, <f4 or <f8";

/// Element type of an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Dtype {
    U8,
    I8,
    U16,
    I16,
    U32,
    I32,
    U64,
    I64,
    F32,
    F64,
}

impl Dtype {
    fn parse(text: &str) -> Result<Self, String> {
        let expected = |found: &str| Err(format!("found {found}, expected dtype {ACCEPTED}"));
        match text {
            "|u1" => Ok(Self::U8),
            "|i1" => Ok(Self::I8),
            "<u2" => Ok(Self::U16),
            "<i2" => Ok(Self::I16),
            "<u4" => Ok(Self::U32),
            "<i4" => Ok(Self::I32),
            "<u8" => Ok(Self::U64),
            "<i8" => Ok(Self::I64),
            "<f4" => Ok(Self::F32),
            "<f8" => Ok(Self::F64),
            other if other.starts_with('>') => expected(&format!("big-endian dtype `{}`", shown(other, SHOWN))),
            other if other.contains('O') => expected(&format!("an object array (dtype `{}`)", shown(other, SHOWN))),
            other => expected(&format!("dtype `{}`", shown(other, SHOWN))),
        }
    }

    fn size(self) -> usize {
        match self {
            Self::U8 | Self::I8 => 1,
            Self::U16 | Self::I16 => 2,
            Self::U32 | Self::I32 | Self::F32 => 4,
            Self::U64 | Self::I64 | Self::F64 => 8,
        }
    }

    /// Returns the name in NumPy.
    pub(super) fn name(self) -> &'static str {
        match self {
            Self::U8 => "uint8",
            Self::I8 => "int8",
            Self::U16 => "uint16",
            Self::I16 => "int16",
            Self::U32 => "uint32",
            Self::I32 => "int32",
            Self::U64 => "uint64",
            Self::I64 => "int64",
            Self::F32 => "float32",
            Self::F64 => "float64",
        }
    }
}

/// An array of a message: C order, little-endian; the bytes match type and shape.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct NdArray<'a> {
    pub(super) dtype: Dtype,
    pub(super) shape: Vec<usize>,
    pub(super) data: &'a [u8],
}

/// An array or a scalar of NumPy.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Numpy<'a> {
    Array(NdArray<'a>),
    Scalar(f32),
}

/// Reads an array or a scalar from a map; `None` for another map. An error states what was found and expected.
pub(super) fn read<'a>(entries: &[(Value<'a>, Value<'a>)]) -> Option<Result<Numpy<'a>, String>> {
    let has = |mark| entries.iter().any(|(key, _)| key.key() == Some(mark));
    if has("__ndarray__") {
        Some(NdArray::read(entries).map(Numpy::Array))
    } else if has("__npgeneric__") {
        Some(scalar(entries).map(Numpy::Scalar))
    } else {
        None
    }
}

impl<'a> NdArray<'a> {
    fn read(entries: &[(Value<'a>, Value<'a>)]) -> Result<Self, String> {
        let (mut data, mut dtype, mut shape) = (None, None, None);
        for (key, value) in entries {
            match (key.key(), value) {
                (Some("__ndarray__"), Value::Bool(true)) => {}
                (Some("data"), Value::Bytes(bytes)) => data = Some(*bytes),
                (Some("dtype"), value) if value.key().is_some() => dtype = value.key(),
                (Some("shape"), Value::List(sides)) => shape = Some(sides),
                (Some(key @ ("__ndarray__" | "data" | "dtype" | "shape")), value) => {
                    return Err(format!("`{key}` of the array is {}", value.kind()));
                }
                (Some(key), _) => {
                    let key = shown(key, SHOWN);
                    return Err(format!(
                        "the array has the key `{key}`, expected only `__ndarray__`, `data`, `dtype` and `shape` (C order)"
                    ));
                }
                (None, key) => return Err(format!("a key of the array is {}", key.kind())),
            }
        }
        let missing = |name: &str| format!("the array has no `{name}`");
        let dtype = Dtype::parse(dtype.ok_or_else(|| missing("dtype"))?)?;
        let data = data.ok_or_else(|| missing("data"))?;
        let sides = shape.ok_or_else(|| missing("shape"))?;
        if sides.len() > MAX_RANK {
            return Err(format!(
                "the array has {} dimensions, at most {MAX_RANK} are accepted",
                sides.len()
            ));
        }
        let shape: Option<Vec<usize>> = sides
            .iter()
            .map(|side| match side {
                Value::Integer(side) => usize::try_from(*side).ok(),
                _ => None,
            })
            .collect();
        let shape = shape.ok_or_else(|| "`shape` of the array must hold integers from 0".to_owned())?;
        let bytes = shape.iter().try_fold(dtype.size(), |n, side| n.checked_mul(*side));
        if bytes != Some(data.len()) {
            return Err(format!(
                "found {} bytes, expected the bytes of {} {shape:?}",
                data.len(),
                dtype.name()
            ));
        }
        Ok(Self { dtype, shape, data })
    }

    /// Returns the values as f32, rounded as NumPy does.
    pub(super) fn to_f32(&self) -> Vec<f32> {
        fn cast<const N: usize>(data: &[u8], value: impl Fn([u8; N]) -> f32) -> Vec<f32> {
            data.as_chunks::<N>().0.iter().map(|bytes| value(*bytes)).collect()
        }
        let data = self.data;
        match self.dtype {
            Dtype::U8 => cast(data, |[byte]| f32::from(byte)),
            Dtype::I8 => cast(data, |bytes| f32::from(i8::from_le_bytes(bytes))),
            Dtype::U16 => cast(data, |bytes| f32::from(u16::from_le_bytes(bytes))),
            Dtype::I16 => cast(data, |bytes| f32::from(i16::from_le_bytes(bytes))),
            Dtype::U32 => cast(data, |bytes| u32::from_le_bytes(bytes) as f32),
            Dtype::I32 => cast(data, |bytes| i32::from_le_bytes(bytes) as f32),
            Dtype::U64 => cast(data, |bytes| u64::from_le_bytes(bytes) as f32),
            Dtype::I64 => cast(data, |bytes| i64::from_le_bytes(bytes) as f32),
            Dtype::F32 => cast(data, f32::from_le_bytes),
            Dtype::F64 => cast(data, |bytes| f64::from_le_bytes(bytes) as f32),
        }
    }
}

fn scalar(entries: &[(Value<'_>, Value<'_>)]) -> Result<f32, String> {
    let mut number = None;
    for (key, value) in entries {
        match (key.key(), value) {
            (Some("__npgeneric__"), Value::Bool(true)) => {}
            (Some("dtype"), value) if value.key().is_some() => {}
            (Some("data"), Value::Integer(value)) => number = Some(*value as f32),
            (Some("data"), Value::Float(value)) => number = Some(*value as f32),
            (Some("data"), value) => return Err(format!("the NumPy scalar is {}, expected a number", value.kind())),
            _ => return Err("the NumPy scalar has other keys than `__npgeneric__`, `data` and `dtype`".to_owned()),
        }
    }
    number.ok_or_else(|| "the NumPy scalar has no `data`".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn array<'a>(dtype: &'a str, shape: &[i64], data: &'a [u8]) -> Vec<(Value<'a>, Value<'a>)> {
        let shape = shape.iter().map(|side| Value::Integer(*side)).collect();
        vec![
            (Value::Bytes(b"__ndarray__"), Value::Bool(true)),
            (Value::Text("data"), Value::Bytes(data)),
            (Value::Bytes(b"dtype"), Value::Text(dtype)),
            (Value::Bytes(b"shape"), Value::List(shape)),
        ]
    }

    #[test]
    fn numbers_of_every_type_are_read() {
        let bytes = [0xff; 8];
        for (dtype, expected) in [
            ("|u1", 255.0),
            ("|i1", -1.0),
            ("<u2", 65_535.0),
            ("<i2", -1.0),
            ("<u4", 4_294_967_295f64 as f32),
            ("<i4", -1.0),
            ("<u8", 18_446_744_073_709_551_615f64 as f32),
            ("<i8", -1.0),
        ] {
            let size = dtype[2..].parse::<usize>().expect("a size");
            let entries = array(dtype, &[1], &bytes[..size]);
            assert_eq!(NdArray::read(&entries).expect("sound").to_f32(), [expected], "{dtype}");
        }
        let (single, double) = (1.5f32.to_le_bytes(), (-2.5f64).to_le_bytes());
        assert_eq!(
            NdArray::read(&array("<f4", &[], &single)).expect("sound").to_f32(),
            [1.5]
        );
        assert_eq!(
            NdArray::read(&array("<f8", &[1, 1], &double)).expect("sound").to_f32(),
            [-2.5]
        );
    }

    #[test]
    fn other_arrays_are_rejected() {
        let rejected = |entries: &[(Value<'_>, Value<'_>)]| NdArray::read(entries).expect_err("rejected");
        for (dtype, shape, bytes, reason) in [
            (">f4", &[1][..], 4, "big-endian"),
            ("|O", &[1], 8, "object array"),
            ("<f2", &[1], 2, "`<f2`"),
            ("<c8", &[1], 8, "`<c8`"),
            ("<U3", &[1], 12, "`<U3`"),
            ("<f4", &[2], 4, "found 4 bytes"),
            ("|u1", &[-1], 1, "integers from 0"),
            ("<f8", &[i64::MAX, i64::MAX], 1, "found 1 bytes"),
            ("|u1", &[1; 9], 1, "9 dimensions"),
        ] {
            let text = rejected(&array(dtype, shape, &vec![0; bytes]));
            assert!(text.contains(reason), "{text}");
        }
        let mut fortran = array("|u1", &[1], &[0]);
        fortran.push((Value::Bytes(b"fortran_order"), Value::Bool(true)));
        assert!(rejected(&fortran).contains("C order"));
        assert!(rejected(&array("|u1", &[1], &[0])[..3]).contains("no `shape`"));
        let listed = [(Value::Text("data"), Value::List(Vec::new()))];
        assert!(rejected(&listed).contains("is a list"));
    }
}
