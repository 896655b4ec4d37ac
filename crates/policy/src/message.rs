//! Error messages on one line, with each cause once.

use std::{error::Error, fmt::Display};

/// Returns a text on one line, with one space for every run of white space.
pub fn one_line(text: impl Display) -> String {
    text.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Returns an untrusted text for display: on one line, with escaped control characters, truncated after `most` characters.
pub fn shown(text: &str, most: usize) -> String {
    let mut out = String::with_capacity(text.len().min(most));
    for (index, c) in text.chars().enumerate() {
        if index == most {
            out.push('…');
            break;
        }
        if c.is_control() {
            out.extend(c.escape_default());
        } else {
            out.push(c);
        }
    }
    out
}

/// Returns an error and its causes on one line, without causes that the text contains already.
pub fn told(error: &(dyn Error + 'static)) -> String {
    let mut text = one_line(error);
    let mut cause = error.source();
    while let Some(error) = cause {
        let next = one_line(error);
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{text}")]
    struct Layer {
        text: &'static str,
        source: Option<Box<Self>>,
    }

    #[test]
    fn a_stranger_s_text_is_escaped_and_cut() {
        assert_eq!(shown("a\n\u{1b}é", 9), "a\\n\\u{1b}é");
        assert_eq!(shown("abcd", 3), "abc…");
        assert_eq!(shown("abc", 3), "abc");
    }

    #[test]
    fn causes_are_told_once_on_one_line() {
        let layer = |text, source: Option<Layer>| Layer {
            text,
            source: source.map(Box::new),
        };
        let disk = layer("disk\n  full", None);
        let error = layer("saving failed", Some(layer("writing `a`: disk full", Some(disk))));
        assert_eq!(told(&error), "saving failed: writing `a`: disk full");
    }
}
