//! Observations of openpi's clients: which key holds which camera, the state and the prompt.
//!
//! Nested maps are read as flat keys with slashes, so `{"images": {"cam_high": ..}}` is `images/cam_high`. Three forms of openpi are
//! accepted for every policy: LIBERO, DROID and ALOHA.
//!
//! - **Prompt**: `prompt`, a text.
//! - **State**: `observation/state` (LIBERO), `state` (ALOHA), or `observation/joint_position` followed by
//!   `observation/gripper_position` (DROID). Numbers of any type, as an array of at most one dimension, a list or a number.
//! - **Images**: for a camera NAME of the policy `images/NAME`, `observation/images/NAME`, `observation/NAME` or `NAME`; otherwise
//!   the keys of [`ALIASES`]. `nil` states that a camera is absent. A LIBERO or DROID robot has no right wrist camera, so the camera
//!   `right_wrist_0_rgb` may be left out beside `observation/image` and `observation/exterior_image_1_left`, as in openpi. All
//!   other cameras must be present.
//!
//! An image is uint8 or float, `[height, width, 3]` or `[3, height, width]`; an image with 3 rows is read as the latter, as in openpi.
//! A float image holds numbers from 0 to 1, and becomes `floor(255 * x)`, computed in its own type as openpi does.

use std::collections::BTreeMap;

use policy::{
    image::{CHANNELS, ImageError, MAX_SIDE, RgbImage},
    transform::RawObservation,
};
use wire::text::shown;

use super::{
    msgpack::{MsgpackError, Value},
    numpy::{self, Dtype, NdArray, Numpy},
};

/// Keys of openpi's robots for the cameras of openpi's policies.
const ALIASES: [(&str, &[&str]); 3] = [
    (
        "base_0_rgb",
        &[
            "observation/image",
            "observation/exterior_image_1_left",
            "images/cam_high",
        ],
    ),
    (
        "left_wrist_0_rgb",
        &[
            "observation/wrist_image",
            "observation/wrist_image_left",
            "images/cam_left_wrist",
        ],
    ),
    (RIGHT_WRIST, &["images/cam_right_wrist"]),
];

/// Camera that robots with one arm do not have.
const RIGHT_WRIST: &str = "right_wrist_0_rgb";
/// Base cameras of robots with one arm.
const ONE_ARM: [&str; 2] = ["observation/image", "observation/exterior_image_1_left"];
const PROMPT: &str = "prompt";
const STATES: [&[&str]; 3] = [
    &["observation/state"],
    &["state"],
    &["observation/joint_position", "observation/gripper_position"],
];
/// Longest prompt in bytes, as on the ZeroMQ endpoint.
const MAX_PROMPT_BYTES: usize = 8192;
/// Most keys that an error lists.
const LISTED: usize = 12;

/// A message that is not an observation of the policy.
#[derive(Debug, thiserror::Error)]
pub(super) enum RequestError {
    /// The message cannot be decoded.
    #[error(transparent)]
    Msgpack(#[from] MsgpackError),
    /// A value has another type than expected.
    #[error("`{key}` is {found}, expected {expected}")]
    Kind {
        key: String,
        found: &'static str,
        expected: &'static str,
    },
    /// A key of a map is not a text.
    #[error("the observation has a key that is {found}, expected a text")]
    Key { found: &'static str },
    /// Two values have the same key.
    #[error("the observation has `{key}` twice")]
    Twice { key: String },
    /// An array cannot be read.
    #[error("array `{key}`: {reason}")]
    Array { key: String, reason: String },
    /// A key is missing.
    #[error("the observation has no {what}: found {found}, expected {expected}")]
    Missing {
        what: String,
        found: String,
        expected: String,
    },
    /// Keys that mean the same.
    #[error("the observation has {what} twice: found {found}, expected one of them")]
    Ambiguous { what: String, found: String },
    /// Keys that the policy does not use.
    #[error("the observation has keys that the policy does not use: found {found}, expected only {expected}")]
    Unused { found: String, expected: String },
    /// The prompt is too long.
    #[error("the prompt has {found} bytes, expected at most {MAX_PROMPT_BYTES}")]
    Prompt { found: usize },
    /// An image has another shape.
    #[error("image `{key}` has shape {found:?}, expected [height, width, 3] or [3, height, width]")]
    Shape { key: String, found: Vec<usize> },
    /// An image has another type.
    #[error("image `{key}` has dtype {found}, expected uint8, or float32 or float64 from 0 to 1")]
    Pixels { key: String, found: &'static str },
    /// A float image has a number out of range.
    #[error("image `{key}` holds {found}, expected numbers from 0 to 1 in a float image")]
    Range { key: String, found: f64 },
    /// The size of an image is invalid.
    #[error("image `{key}`: {source}")]
    Image { key: String, source: ImageError },
}

/// A value of an observation.
#[derive(Debug)]
enum Leaf<'v, 'a> {
    Array(NdArray<'a>),
    Scalar(f32),
    Value(&'v Value<'a>),
}

impl Leaf<'_, '_> {
    fn kind(&self) -> &'static str {
        match self {
            Self::Array(_) => "a NumPy array",
            Self::Scalar(_) => "a number",
            Self::Value(value) => value.kind(),
        }
    }
}

type Leaves<'v, 'a> = BTreeMap<String, Leaf<'v, 'a>>;

/// Decodes a message as an observation for a policy with these cameras.
pub(super) fn read(message: &[u8], cameras: &[String]) -> Result<RawObservation, RequestError> {
    let value = Value::decode(message)?;
    let Value::Map(entries) = &value else {
        return Err(RequestError::Kind {
            key: "observation".to_owned(),
            found: value.kind(),
            expected: "a map",
        });
    };
    let mut leaves = Leaves::new();
    flatten("", entries, &mut leaves)?;
    let found = listed(leaves.keys());
    let prompt = take_prompt(&mut leaves, &found)?;
    let state = take_state(&mut leaves, &found)?;
    let images = take_images(&mut leaves, cameras, &found)?;
    if !leaves.is_empty() {
        let all = |camera: &String| names(camera).join(" or ");
        return Err(RequestError::Unused {
            found: listed(leaves.keys()),
            expected: format!(
                "`prompt`, one state and the cameras {}",
                cameras.iter().map(all).collect::<Vec<_>>().join(", ")
            ),
        });
    }
    Ok(RawObservation { images, state, prompt })
}

/// Returns keys for an error.
fn listed<'k>(keys: impl ExactSizeIterator<Item = &'k String>) -> String {
    let rest = keys.len().saturating_sub(LISTED);
    let mut text: Vec<String> = keys.take(LISTED).map(|key| format!("`{}`", shown(key))).collect();
    if text.is_empty() {
        return "no keys".to_owned();
    }
    if rest > 0 {
        text.push(format!("{rest} more"));
    }
    text.join(", ")
}

fn flatten<'v, 'a>(
    prefix: &str,
    entries: &'v [(Value<'a>, Value<'a>)],
    leaves: &mut Leaves<'v, 'a>,
) -> Result<(), RequestError> {
    for (key, value) in entries {
        let name = key.key().ok_or_else(|| RequestError::Key { found: key.kind() })?;
        let path = if prefix.is_empty() {
            name.to_owned()
        } else {
            format!("{prefix}/{name}")
        };
        let leaf = match value {
            Value::Map(entries) => match numpy::read(entries) {
                Some(Ok(Numpy::Array(array))) => Leaf::Array(array),
                Some(Ok(Numpy::Scalar(number))) => Leaf::Scalar(number),
                Some(Err(reason)) => {
                    let key = shown(&path);
                    return Err(RequestError::Array { key, reason });
                }
                None => {
                    flatten(&path, entries, leaves)?;
                    continue;
                }
            },
            value => Leaf::Value(value),
        };
        if leaves.insert(path.clone(), leaf).is_some() {
            return Err(RequestError::Twice { key: shown(&path) });
        }
    }
    Ok(())
}

fn take_prompt(leaves: &mut Leaves<'_, '_>, found: &str) -> Result<String, RequestError> {
    match leaves.remove(PROMPT) {
        Some(Leaf::Value(Value::Text(text))) if text.len() > MAX_PROMPT_BYTES => {
            Err(RequestError::Prompt { found: text.len() })
        }
        Some(Leaf::Value(Value::Text(text))) => Ok((*text).to_owned()),
        Some(leaf) => Err(RequestError::Kind {
            key: PROMPT.to_owned(),
            found: leaf.kind(),
            expected: "a text",
        }),
        None => Err(RequestError::Missing {
            what: "prompt".to_owned(),
            found: found.to_owned(),
            expected: "`prompt`".to_owned(),
        }),
    }
}

fn take_state(leaves: &mut Leaves<'_, '_>, found: &str) -> Result<Vec<f32>, RequestError> {
    let quoted = |keys: &&[&str]| {
        let keys: Vec<String> = keys.iter().map(|key| format!("`{key}`")).collect();
        keys.join(" and ")
    };
    let mut present = STATES
        .iter()
        .filter(|keys| keys.iter().any(|key| leaves.contains_key(*key)));
    let Some(keys) = present.next() else {
        return Err(RequestError::Missing {
            what: "state".to_owned(),
            found: found.to_owned(),
            expected: STATES.iter().map(quoted).collect::<Vec<_>>().join(", or "),
        });
    };
    if let Some(other) = present.next() {
        return Err(RequestError::Ambiguous {
            what: "the state".to_owned(),
            found: format!("{}, {}", quoted(keys), quoted(other)),
        });
    }
    let mut state = Vec::new();
    for key in *keys {
        let leaf = leaves.remove(*key).ok_or_else(|| RequestError::Missing {
            what: format!("`{key}`"),
            found: found.to_owned(),
            expected: quoted(keys),
        })?;
        append_numbers(key, &leaf, &mut state)?;
    }
    Ok(state)
}

/// Appends the numbers of a state: an array of at most one dimension, a list, or one number.
fn append_numbers(key: &str, leaf: &Leaf<'_, '_>, state: &mut Vec<f32>) -> Result<(), RequestError> {
    let wrong = |found| RequestError::Kind {
        key: key.to_owned(),
        found,
        expected: "an array of one dimension or a list of numbers",
    };
    let number = |value: &Value<'_>| match value {
        Value::Integer(value) => Ok(*value as f32),
        Value::Float(value) => Ok(*value as f32),
        other => Err(wrong(other.kind())),
    };
    match leaf {
        Leaf::Array(array) if array.shape.len() <= 1 => state.extend(array.to_f32()),
        Leaf::Array(array) => {
            return Err(RequestError::Array {
                key: key.to_owned(),
                reason: format!("found shape {:?}, expected one dimension", array.shape),
            });
        }
        Leaf::Scalar(value) => state.push(*value),
        Leaf::Value(Value::List(values)) => {
            for value in values {
                state.push(number(value)?);
            }
        }
        Leaf::Value(value) => state.push(number(value)?),
    }
    Ok(())
}

/// Returns the keys under which a camera's image is accepted; keys with the camera's own name come first.
fn names(camera: &str) -> Vec<String> {
    let aliases = ALIASES
        .iter()
        .filter(|(name, _)| *name == camera)
        .flat_map(|(_, keys)| *keys);
    let own = ["images/", "observation/images/", "observation/", ""].map(|prefix| format!("{prefix}{camera}"));
    own.into_iter().chain(aliases.map(|key| (*key).to_owned())).collect()
}

fn take_images(
    leaves: &mut Leaves<'_, '_>,
    cameras: &[String],
    found: &str,
) -> Result<BTreeMap<String, RgbImage>, RequestError> {
    let one_arm = ONE_ARM.iter().any(|key| leaves.contains_key(*key));
    let mut images = BTreeMap::new();
    for camera in cameras {
        let names = names(camera);
        let present: Vec<&String> = names.iter().filter(|name| leaves.contains_key(*name)).collect();
        if present.len() > 1 {
            return Err(RequestError::Ambiguous {
                what: format!("the image of camera `{camera}`"),
                found: listed(present.into_iter()),
            });
        }
        let key = present.first().copied();
        match key.and_then(|key| Some((key, leaves.remove(key)?))) {
            Some((key, Leaf::Array(array))) => {
                images.insert(camera.clone(), image(key, array)?);
            }
            Some((_, Leaf::Value(Value::Nil))) => {}
            Some((key, leaf)) => {
                return Err(RequestError::Kind {
                    key: key.clone(),
                    found: leaf.kind(),
                    expected: "a NumPy array (nil: the camera is absent)",
                });
            }
            None if one_arm && camera == RIGHT_WRIST => {}
            None => {
                return Err(RequestError::Missing {
                    what: format!("image of camera `{camera}`"),
                    found: found.to_owned(),
                    expected: names
                        .iter()
                        .map(|name| format!("`{name}`"))
                        .collect::<Vec<_>>()
                        .join(" or "),
                });
            }
        }
    }
    Ok(images)
}

/// Converts an array to an image of bytes.
fn image(key: &str, array: NdArray<'_>) -> Result<RgbImage, RequestError> {
    let shape = |found| RequestError::Shape {
        key: key.to_owned(),
        found,
    };
    let (height, width, planes) = match *array.shape.as_slice() {
        [CHANNELS, height, width] => (height, width, true),
        [height, width, CHANNELS] => (height, width, false),
        _ => return Err(shape(array.shape)),
    };
    let source = |source| RequestError::Image {
        key: key.to_owned(),
        source,
    };
    if height.max(width) > MAX_SIDE {
        return Err(source(ImageError::Side { height, width }));
    }
    let range = |found| RequestError::Range {
        key: key.to_owned(),
        found,
    };
    let mut pixels = match array.dtype {
        Dtype::U8 => array.data.to_vec(),
        Dtype::F32 => floats(array.data, |bytes| {
            let value = f32::from_le_bytes(bytes);
            (f64::from(value), (255.0 * value) as u8)
        })
        .map_err(range)?,
        Dtype::F64 => floats(array.data, |bytes| {
            let value = f64::from_le_bytes(bytes);
            (value, (255.0 * value) as u8)
        })
        .map_err(range)?,
        other => {
            return Err(RequestError::Pixels {
                key: key.to_owned(),
                found: other.name(),
            });
        }
    };
    if planes {
        pixels = interleave(&pixels, height * width);
    }
    RgbImage::new(height, width, pixels).map_err(source)
}

/// Converts floats to bytes; `convert` returns the value and its byte. Fails with the first value outside of 0 to 1.
fn floats<const N: usize>(data: &[u8], convert: impl Fn([u8; N]) -> (f64, u8)) -> Result<Vec<u8>, f64> {
    let convert = |bytes: &[u8; N]| match convert(*bytes) {
        (value, byte) if (0.0..=1.0).contains(&value) => Ok(byte),
        (value, _) => Err(value),
    };
    data.as_chunks::<N>().0.iter().map(convert).collect()
}

/// Converts `[3, pixels]` to `[pixels, 3]`.
fn interleave(planes: &[u8], pixels: usize) -> Vec<u8> {
    let mut out = vec![0; planes.len()];
    for (channel, plane) in planes.chunks_exact(pixels.max(1)).enumerate() {
        for (pixel, value) in out.iter_mut().skip(channel).step_by(CHANNELS).zip(plane) {
            *pixel = *value;
        }
    }
    out
}

#[cfg(test)]
mod tests;
