//! One `encode`, one `decode`: a header with magic, version and length, then the message as a `MessagePack` map.
//!
//! Layout: `b"PIRL"`, wire version (u16, little-endian), reserved zero (u16), payload length (u32), payload. The decoder takes bytes
//! from anyone: it limits, checks, and refuses trailing bytes.

use serde::{Serialize, de::DeserializeOwned};

/// Version of the messages; both ends must agree.
pub const WIRE_VERSION: u16 = 4;
/// Largest frame that is read or written.
pub const MAX_FRAME_BYTES: usize = 256 << 20;
/// Bytes before the payload.
pub const HEADER_BYTES: usize = 12;
const MAGIC: &[u8; 4] = b"PIRL";
/// Messages nest a few levels; hostile ones would nest deeper to exhaust the stack.
const MAX_DEPTH: usize = 32;

/// A frame that cannot be read or written.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// Shorter than the header.
    #[error("frame of {0} bytes is shorter than the header of {HEADER_BYTES} bytes")]
    Short(usize),
    /// Other first bytes.
    #[error("frame does not begin with `PIRL`: the peer speaks another protocol")]
    Magic,
    /// Another version.
    #[error("frame has wire version {found}, expected {WIRE_VERSION}: both ends must be the same release")]
    Version {
        /// What the frame says.
        found: u16,
    },
    /// Too long.
    #[error("frame of {found} bytes, at most {MAX_FRAME_BYTES} are taken")]
    Long {
        /// Its size.
        found: usize,
    },
    /// The length field does not match.
    #[error("frame announces {announced} payload bytes and carries {found}")]
    Length {
        /// What the header says.
        announced: usize,
        /// What follows it.
        found: usize,
    },
    /// The payload is no such message.
    #[error("payload is no message of this road: {0}")]
    Payload(String),
}

/// Encodes a message.
///
/// # Errors
/// It is too long.
pub fn encode<T: Serialize>(message: &T) -> Result<Vec<u8>, CodecError> {
    let mut frame = Vec::with_capacity(256);
    frame.extend_from_slice(MAGIC);
    frame.extend_from_slice(&WIRE_VERSION.to_le_bytes());
    frame.extend_from_slice(&[0; 6]);
    let mut serializer = rmp_serde::Serializer::new(&mut frame).with_struct_map();
    message
        .serialize(&mut serializer)
        .map_err(|e| CodecError::Payload(e.to_string()))?;
    if frame.len() > MAX_FRAME_BYTES {
        return Err(CodecError::Long { found: frame.len() });
    }
    let length = (frame.len() - HEADER_BYTES) as u32;
    if let Some(field) = frame.get_mut(8..HEADER_BYTES) {
        field.copy_from_slice(&length.to_le_bytes());
    }
    Ok(frame)
}

/// Decodes a frame as a message of type `T`.
///
/// # Errors
/// Says which rule the frame breaks.
pub fn decode<T: DeserializeOwned>(frame: &[u8]) -> Result<T, CodecError> {
    if frame.len() > MAX_FRAME_BYTES {
        return Err(CodecError::Long { found: frame.len() });
    }
    let (header, payload) = frame
        .split_at_checked(HEADER_BYTES)
        .ok_or(CodecError::Short(frame.len()))?;
    let [m0, m1, m2, m3, v0, v1, _, _, l0, l1, l2, l3] = header else {
        return Err(CodecError::Short(frame.len()));
    };
    if [*m0, *m1, *m2, *m3] != *MAGIC {
        return Err(CodecError::Magic);
    }
    let found = u16::from_le_bytes([*v0, *v1]);
    if found != WIRE_VERSION {
        return Err(CodecError::Version { found });
    }
    let announced = u32::from_le_bytes([*l0, *l1, *l2, *l3]) as usize;
    if announced != payload.len() {
        return Err(CodecError::Length {
            announced,
            found: payload.len(),
        });
    }
    let mut deserializer = rmp_serde::Deserializer::new(payload);
    deserializer.set_max_depth(MAX_DEPTH);
    let message = T::deserialize(&mut deserializer).map_err(|e| CodecError::Payload(e.to_string()))?;
    let rest = deserializer.get_ref().len();
    if rest != 0 {
        return Err(CodecError::Payload(format!("{rest} bytes follow the message")));
    }
    Ok(message)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{array::Array, messages::*};

    fn sample() -> ToEngine {
        ToEngine::Reports(vec![SlotReport {
            slot: 3,
            outcome: Some(Outcome {
                rewards: vec![0.0, 1.0],
                terminated: true,
                truncated: false,
                success: true,
                frames: Vec::new(),
            }),
            observation: Some(Observation {
                images: vec![Some(Array::u8(&[1, 2, 3], vec![1, 2, 3, 4, 5, 6])), None],
                state: vec![0.5],
                prompt: "pick red".to_owned(),
            }),
        }])
    }

    #[test]
    fn golden_bytes() {
        // a failure here means that every peer of an earlier release stops understanding us: raise WIRE_VERSION
        let frame = encode(&sample()).expect("encodes");
        assert_eq!(policy::config::hex(&frame), GOLDEN);
        assert_eq!(decode::<ToEngine>(&frame).expect("decodes"), sample());
    }

    const GOLDEN: &str = concat!(
        "5049524c04000000a800000081a77265706f7274739183a4736c6f7403a76f7574636f6d6585a77265776172647392ca0000",
        "0000ca3f800000aa7465726d696e61746564c3a97472756e6361746564c2a773756363657373c3a66672616d657390ab6f62",
        "736572766174696f6e83a6696d616765739283a56474797065a27538a5736861706593010203a464617461c4060102030405",
        "06c0a5737461746591ca3f000000a670726f6d7074a87069636b20726564",
    );

    #[test]
    fn every_cut_is_refused() {
        let frame = encode(&sample()).expect("encodes");
        for end in 0..frame.len() {
            assert!(decode::<ToEngine>(&frame[..end]).is_err(), "cut at {end}");
        }
        let mut longer = frame.clone();
        longer.push(0);
        assert!(matches!(decode::<ToEngine>(&longer), Err(CodecError::Length { .. })));
    }

    #[test]
    fn other_version_says_both() {
        let mut frame = encode(&sample()).expect("encodes");
        frame[4] = 9;
        let text = decode::<ToEngine>(&frame).expect_err("refused").to_string();
        assert!(text.contains('9') && text.contains(&WIRE_VERSION.to_string()), "{text}");
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in proptest::collection::vec(any::<u8>(), 0..2000), at in 0usize..300, with in any::<u8>()) {
            prop_assert!(decode::<ToEngine>(&bytes).is_err());
            // a valid frame with one byte changed is refused or is another valid message, never a panic
            let mut frame = encode(&sample()).expect("encodes");
            let place = at % frame.len();
            frame[place] = with;
            if let Ok(message) = decode::<ToEngine>(&frame) {
                prop_assert!(encode(&message).is_ok());
            }
            // hostile payload behind a right header
            let mut framed = Vec::from(*MAGIC);
            framed.extend_from_slice(&WIRE_VERSION.to_le_bytes());
            framed.extend_from_slice(&[0, 0]);
            framed.extend_from_slice(&(bytes.len() as u32).to_le_bytes());
            framed.extend_from_slice(&bytes);
            if let Ok(message) = decode::<ToEngine>(&framed) {
                prop_assert!(encode(&message).is_ok());
            }
        }
    }
}
