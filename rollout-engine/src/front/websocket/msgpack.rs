//! MessagePack values that borrow from a message; bounded before anything is allocated.

use std::fmt;

use serde::{
    Deserialize, Deserializer,
    de::{self, MapAccess, SeqAccess, Visitor},
};
use wire::{codec::count_elements, text::shown};

/// Most numbers, texts, arrays and maps of a message, each array or map entry counted. An observation of 16 cameras has about 200.
const MAX_ELEMENTS: usize = 4096;
/// Deepest nesting of a message; `images` with arrays has 4 levels.
const MAX_DEPTH: usize = 16;

/// A message that is not a MessagePack value, or has too many elements.
#[derive(Debug, thiserror::Error)]
pub(super) enum MsgpackError {
    /// The bytes are not one MessagePack value.
    #[error("failed to decode the message: expected one MessagePack map, {0}")]
    Broken(String),
    /// Too many elements.
    #[error(
        "message has {found} elements, at most {MAX_ELEMENTS} are accepted: send images and states as NumPy arrays"
    )]
    Elements {
        /// Elements of the message.
        found: usize,
    },
}

/// A MessagePack value; texts and bytes lie in the message.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Value<'a> {
    Nil,
    Bool(bool),
    Integer(i64),
    Float(f64),
    Text(&'a str),
    Bytes(&'a [u8]),
    List(Vec<Self>),
    Map(Vec<(Self, Self)>),
}

impl<'a> Value<'a> {
    /// Decodes a message.
    pub(super) fn decode(message: &'a [u8]) -> Result<Self, MsgpackError> {
        let broken = |error: String| MsgpackError::Broken(shown(&error));
        let found = count_elements(message).map_err(|error| broken(error.to_string()))?;
        if found > MAX_ELEMENTS {
            return Err(MsgpackError::Elements { found });
        }
        let mut deserializer = rmp_serde::Deserializer::from_read_ref(message);
        deserializer.set_max_depth(MAX_DEPTH);
        Value::deserialize(&mut deserializer).map_err(|error| broken(error.to_string()))
    }

    /// Returns a text, also one that a client packed as bytes; used for keys.
    pub(super) fn key(&self) -> Option<&'a str> {
        match self {
            Self::Text(text) => Some(text),
            Self::Bytes(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }

    /// Returns the name of the type, for errors.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Nil => "nil",
            Self::Bool(_) => "a boolean",
            Self::Integer(_) => "an integer",
            Self::Float(_) => "a number",
            Self::Text(_) => "a text",
            Self::Bytes(_) => "bytes",
            Self::List(_) => "a list",
            Self::Map(_) => "a map",
        }
    }
}

impl<'de> Deserialize<'de> for Value<'de> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(ValueVisitor)
    }
}

struct ValueVisitor;

impl<'de> Visitor<'de> for ValueVisitor {
    type Value = Value<'de>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("nil, a boolean, a number, a text, bytes, a list or a map")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Self::Value, E> {
        Ok(Value::Nil)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Self::Value, E> {
        Ok(Value::Bool(value))
    }

    fn visit_i64<E: de::Error>(self, value: i64) -> Result<Self::Value, E> {
        Ok(Value::Integer(value))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Self::Value, E> {
        i64::try_from(value)
            .map(Value::Integer)
            .map_err(|_large| E::invalid_value(de::Unexpected::Unsigned(value), &"an integer below 2^63"))
    }

    fn visit_f64<E: de::Error>(self, value: f64) -> Result<Self::Value, E> {
        Ok(Value::Float(value))
    }

    fn visit_borrowed_str<E: de::Error>(self, value: &'de str) -> Result<Self::Value, E> {
        Ok(Value::Text(value))
    }

    fn visit_borrowed_bytes<E: de::Error>(self, value: &'de [u8]) -> Result<Self::Value, E> {
        Ok(Value::Bytes(value))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Self::Value, A::Error> {
        let mut values = Vec::new();
        while let Some(value) = list.next_element()? {
            values.push(value);
        }
        Ok(Value::List(values))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(Value::Map(entries))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn texts_and_bytes_lie_in_the_message() {
        // {"a": [1, -1, 0.5, nil, true], b"b": b"\xff"}
        let mut message = vec![0x82, 0xa1, b'a', 0x95, 0x01, 0xff, 0xcb];
        message.extend(0.5f64.to_be_bytes());
        message.extend([0xc0, 0xc3, 0xc4, 0x01, b'b', 0xc4, 0x01, 0xff]);
        let Value::Map(entries) = Value::decode(&message).expect("sound") else {
            panic!("a map");
        };
        let keys: Vec<_> = entries.iter().filter_map(|(key, _)| key.key()).collect();
        assert_eq!(keys, ["a", "b"]);
        let list = [
            Value::Integer(1),
            Value::Integer(-1),
            Value::Float(0.5),
            Value::Nil,
            Value::Bool(true),
        ];
        assert_eq!(entries[0].1, Value::List(list.to_vec()));
        assert_eq!(entries[1].1, Value::Bytes(&[0xff]));
    }

    #[test]
    fn what_is_only_announced_is_rejected() {
        let mut nils = vec![0xdd, 0x00, 0x00, 0x20, 0x00];
        nils.resize(5 + 0x2000, 0xc0);
        let mut deep = vec![0x91; 40];
        deep.push(0xc0);
        for (message, reason) in [
            (vec![0xdd, 0xff, 0xff, 0xff, 0xff], "more than"),
            (vec![0xc6, 0x40, 0x00, 0x00, 0x00], "end inside"),
            (vec![0xc0, 0xc0], "1 bytes follow"),
            (vec![0xd4, 0x00, 0x00], "extension"),
            (vec![0xcf, 0xff, 0, 0, 0, 0, 0, 0, 0], "below 2^63"),
            (nils, "8193 elements"),
            (deep, "depth"),
            (Vec::new(), "end inside"),
        ] {
            let error = Value::decode(&message).expect_err("rejected").to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000)) {
            drop(Value::decode(&bytes));
        }
    }
}
