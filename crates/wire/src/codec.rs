//! Codec of frames: a header with magic, version and length, then the message as a `MessagePack` map.
//!
//! Layout: `b"PIRL"`, wire version (u16, little-endian), reserved zero (u16), payload length (u32), payload. The decoder accepts
//! untrusted bytes: it counts and limits the elements before it allocates, and rejects trailing bytes.

use serde::{Serialize, de::DeserializeOwned};

use crate::text::shown;

/// Version of the messages; both ends must agree.
pub const WIRE_VERSION: u16 = 4;
/// Largest frame that is read or written, in bytes.
pub const MAX_FRAME_BYTES: usize = 256 << 20;
/// Size of the header before the payload, in bytes.
pub const HEADER_BYTES: usize = 12;
const MAGIC: &[u8; 4] = b"PIRL";
/// Deepest nesting of a message. Messages nest a few levels; hostile messages would nest deeper to exhaust the stack.
const MAX_DEPTH: usize = 32;
/// Most numbers, texts, arrays and maps of one message, each array or map entry counted. 4,096 slot reports of three cameras and a
/// state of 32 numbers have about 530,000.
pub const MAX_ELEMENTS: usize = 1 << 20;

/// Longest text of a message, in bytes; names and prompts have shorter limits of their own.
pub const MAX_TEXT_BYTES: usize = 64 << 10;

/// Reason why a frame cannot be decoded or encoded.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum CodecError {
    /// The frame is shorter than the header.
    #[error("frame of {0} bytes is shorter than the header of {HEADER_BYTES} bytes")]
    Short(usize),
    /// The frame starts with other bytes than `PIRL`.
    #[error("frame does not begin with `PIRL`: the peer speaks another protocol")]
    Magic,
    /// The frame has another wire version.
    #[error("frame has wire version {found}, expected {WIRE_VERSION}: both ends must be the same release")]
    Version {
        /// Version in the frame.
        found: u16,
    },
    /// The frame is too long.
    #[error("frame of {found} bytes, at most {MAX_FRAME_BYTES} are accepted")]
    Long {
        /// Size in bytes.
        found: usize,
    },
    /// The length field does not match.
    #[error("frame announces {announced} payload bytes and carries {found}")]
    Length {
        /// Payload bytes according to the header.
        announced: usize,
        /// Payload bytes after the header.
        found: usize,
    },
    /// The payload has more than [`MAX_ELEMENTS`] elements.
    #[error("payload has more than {MAX_ELEMENTS} elements")]
    Elements,
    /// The payload has a text that is too long.
    #[error("payload has a text of {found} bytes, at most {MAX_TEXT_BYTES} are accepted")]
    Text {
        /// Size in bytes.
        found: usize,
    },
    /// The payload is not a message that this link carries.
    #[error("payload is not a message that is expected here: {0}")]
    Payload(String),
}

/// Encodes a message.
///
/// # Errors
/// The message cannot be serialized, or its frame is too long.
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

/// Checks the header and returns the payload after the header.
fn payload(frame: &[u8]) -> Result<&[u8], CodecError> {
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
    Ok(payload)
}

/// Counts the elements of a MessagePack value without allocating, and checks that the value ends where the bytes end.
///
/// # Errors
/// There are more than [`MAX_ELEMENTS`] elements, the bytes end early or continue, or the bytes are not MessagePack.
pub fn count_elements(bytes: &[u8]) -> Result<usize, CodecError> {
    let broken = |text: &str| CodecError::Payload(text.to_owned());
    let mut rest = bytes;
    let mut take = |count: usize| {
        let (taken, left) = rest
            .split_at_checked(count)
            .ok_or_else(|| broken("the bytes end inside a value"))?;
        rest = left;
        Ok::<_, CodecError>(taken)
    };
    let number = |bytes: &[u8]| bytes.iter().fold(0usize, |n, b| (n << 8) | usize::from(*b));
    let (mut count, mut open) = (0usize, 1usize);
    while open > 0 {
        open -= 1;
        count += 1;
        let marker = take(1)?.first().copied().unwrap_or_default();
        // bytes to skip, and number of entries that follow
        let (skip, entries) = match marker {
            0x00..=0x7f | 0xe0..=0xff | 0xc0 | 0xc2 | 0xc3 => (0, 0),
            0x80..=0x8f => (0, 2 * usize::from(marker & 0x0f)),
            0x90..=0x9f => (0, usize::from(marker & 0x0f)),
            0xa0..=0xbf => (usize::from(marker & 0x1f), 0),
            0xc1 => return Err(broken("it has the marker 0xc1, which MessagePack never uses")),
            0xc4 | 0xd9 => (number(take(1)?), 0),
            0xc5 | 0xda => (number(take(2)?), 0),
            0xc6 => (number(take(4)?), 0),
            0xdb => match number(take(4)?) {
                found if found > MAX_TEXT_BYTES => return Err(CodecError::Text { found }),
                length => (length, 0),
            },
            0xc7..=0xc9 | 0xd4..=0xd8 => return Err(broken("it has an extension type, none is expected")),
            0xcc | 0xd0 => (1, 0),
            0xcd | 0xd1 => (2, 0),
            0xca | 0xce | 0xd2 => (4, 0),
            0xcb | 0xcf | 0xd3 => (8, 0),
            0xdc => (0, number(take(2)?)),
            0xdd => (0, number(take(4)?)),
            0xde => (0, 2 * number(take(2)?)),
            0xdf => (0, 2 * number(take(4)?)),
        };
        take(skip)?;
        open += entries;
        if count + open > MAX_ELEMENTS {
            return Err(CodecError::Elements);
        }
    }
    let left = rest.len();
    if left != 0 {
        return Err(CodecError::Payload(format!("{left} bytes follow the message")));
    }
    Ok(count)
}

/// Checks a frame and counts its elements, without allocating.
///
/// # Errors
/// Rule that the frame breaks.
pub(crate) fn count(frame: &[u8]) -> Result<usize, CodecError> {
    count_elements(payload(frame)?)
}

/// Decodes a frame as a message of type `T`.
///
/// # Errors
/// Rule that the frame breaks.
pub fn decode<T: DeserializeOwned>(frame: &[u8]) -> Result<T, CodecError> {
    let payload = payload(frame)?;
    count_elements(payload)?;
    let mut deserializer = rmp_serde::Deserializer::from_read_ref(payload);
    deserializer.set_max_depth(MAX_DEPTH);
    T::deserialize(&mut deserializer).map_err(|e| CodecError::Payload(shown(&e.to_string())))
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
        // a failure here means that peers of an earlier release cannot decode these frames: raise WIRE_VERSION
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

    fn framed(payload: &[u8]) -> Vec<u8> {
        let mut frame = Vec::from(*MAGIC);
        frame.extend_from_slice(&WIRE_VERSION.to_le_bytes());
        frame.extend_from_slice(&[0, 0]);
        frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
        frame.extend_from_slice(payload);
        frame
    }

    #[test]
    fn elements_are_counted_as_serialized() {
        // {"reports": [{"slot": 3, "outcome": {..5 keys, 2 rewards}, "observation": {..3 keys, 2 images, 1 number}}]}
        let outcome = 1 + 10 + 2;
        let image = 1 + 6 + 3;
        let observation = 1 + 6 + image + 1 + 1;
        let report = 1 + 4 + outcome + observation;
        let elements = count(&encode(&sample()).expect("encodes")).expect("sound");
        assert_eq!(elements, 1 + 1 + 1 + report);
    }

    #[test]
    fn nothing_is_allocated_for_what_is_only_announced() {
        // an array of 2^32 - 1, a map of 2^31, a text and bytes of 2^32 - 1, each cut after its header; 19 MiB of nils
        let mut nils = vec![0xdd, 0x01, 0x30, 0x00, 0x00];
        nils.resize(5 + (19 << 20), 0xc0);
        for (payload, reason) in [
            (vec![0xdd, 0xff, 0xff, 0xff, 0xff], "more than"),
            (vec![0xdf, 0x80, 0x00, 0x00, 0x00], "more than"),
            (vec![0xdb, 0xff, 0xff, 0xff, 0xff], "text of 4294967295 bytes"),
            (vec![0xc6, 0xff, 0xff, 0xff, 0xff], "end inside"),
            (nils, "more than"),
        ] {
            let error = decode::<ToEngine>(&framed(&payload)).expect_err("rejected").to_string();
            assert!(error.contains(reason), "{error}");
        }
    }

    #[test]
    fn the_peer_s_text_is_cut_and_escaped() {
        let name = format!("x\n\u{1b}[31m{}", "y".repeat(60_000));
        let frame = encode(&std::collections::BTreeMap::from([(name, 1u8)])).expect("encodes");
        let error = decode::<ToEngine>(&frame).expect_err("rejected").to_string();
        assert!(error.len() < 1000 && !error.contains(['\n', '\u{1b}']), "{error}");
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
            // hostile payload after a valid header
            if let Ok(message) = decode::<ToEngine>(&framed(&bytes)) {
                prop_assert!(encode(&message).is_ok());
            }
        }
    }
}
