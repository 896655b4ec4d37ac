//! Texts and lists of a peer: cut and escaped before display, bounded while read.

use policy::message;
use serde::{Deserialize, Deserializer, de};

/// Most characters of a peer's text that an error or a log line shows.
const SHOWN_CHARS: usize = 200;
/// Most bytes of a name.
const NAME_BYTES: usize = 128;
/// Most bytes of a prompt.
const PROMPT_BYTES: usize = 8192;

/// Returns a peer's text for display: control characters escaped, at most 200 characters.
pub fn shown(text: &str) -> String {
    message::shown(text, SHOWN_CHARS)
}

/// Reads a name: at most 128 bytes, no control characters.
pub(crate) fn name<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.len() > NAME_BYTES || text.chars().any(char::is_control) {
        let expected = format!("a name of at most {NAME_BYTES} bytes without control characters");
        return Err(de::Error::invalid_value(
            de::Unexpected::Str(&shown(&text)),
            &expected.as_str(),
        ));
    }
    Ok(text)
}

/// Reads a prompt: at most 8,192 bytes.
pub(crate) fn prompt<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.len() > PROMPT_BYTES {
        let expected = format!("a prompt of at most {PROMPT_BYTES} bytes");
        return Err(de::Error::invalid_length(text.len(), &expected.as_str()));
    }
    Ok(text)
}

/// Reads a list of at most `MOST` items and stops at the first item beyond.
pub(crate) fn at_most<'de, D, T, const MOST: usize>(deserializer: D) -> Result<Vec<T>, D::Error>
where
    D: Deserializer<'de>,
    T: Deserialize<'de>,
{
    struct Visitor<T, const MOST: usize>(std::marker::PhantomData<T>);
    impl<'de, T: Deserialize<'de>, const MOST: usize> de::Visitor<'de> for Visitor<T, MOST> {
        type Value = Vec<T>;

        fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
            write!(f, "a list of at most {MOST} items")
        }

        fn visit_seq<A: de::SeqAccess<'de>>(self, mut list: A) -> Result<Vec<T>, A::Error> {
            let announced = list.size_hint().unwrap_or(0);
            if announced > MOST {
                return Err(de::Error::invalid_length(announced, &self));
            }
            let mut items = Vec::with_capacity(announced);
            while let Some(item) = list.next_element()? {
                if items.len() == MOST {
                    return Err(de::Error::invalid_length(MOST + 1, &self));
                }
                items.push(item);
            }
            Ok(items)
        }
    }
    deserializer.deserialize_seq(Visitor::<T, MOST>(std::marker::PhantomData))
}
