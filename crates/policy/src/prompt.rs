//! Prompt tokens: conversion of an instruction (and of pi0.5's state in words) to padded ids.

use std::{
    collections::BTreeMap,
    fmt,
    io::Read,
    path::{Path, PathBuf},
    sync::Arc,
};

use kitoken::{Definition, InsertionPosition, Kitoken};

use crate::config::TokenizerConfig;

/// Padding id of both kinds of tokenizer.
const PAD: i64 = 0;
/// Begin-of-sequence id of a word list.
const BOS: i64 = 1;
/// Newline id of a word list.
const NEWLINE: i64 = 2;
/// Id of the first word; 3 is reserved for the unknown token, which a closed vocabulary never produces.
const FIRST_WORD: i64 = 4;
/// Most words of a word list.
const MAX_WORDS: usize = 1 << 16;
/// Longest prompt, in bytes.
const MAX_PROMPT_BYTES: usize = 1 << 16;
/// Largest size of a `tokenizer.model` in bytes; `PaliGemma`'s has 4 MiB.
const MAX_MODEL_BYTES: u64 = 64 << 20;
/// Number of bins of pi0.5's discrete state.
const STATE_BINS: f64 = 256.0;

/// Ids of a prompt, padded to the policy's length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptTokens {
    /// Token ids; 0 for padding.
    pub ids: Vec<i64>,
    /// Whether each id is valid, not padding.
    pub mask: Vec<bool>,
    /// Number of ids before the cut to the policy's length; at most the length if nothing was cut.
    pub found: usize,
}

impl PromptTokens {
    /// Truncates ids to `max_len`, or pads the ids on the right with id 0 and mask false.
    pub fn fit(mut ids: Vec<i64>, max_len: usize) -> Self {
        let found = ids.len();
        ids.truncate(max_len);
        let mask = (0..max_len).map(|i| i < ids.len()).collect();
        ids.resize(max_len, PAD);
        Self { ids, mask, found }
    }

    /// Returns whether ids at the end were dropped.
    pub fn is_cut(&self) -> bool {
        self.found > self.ids.len()
    }
}

/// Reason for rejecting a tokenizer or a prompt.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PromptError {
    /// A word outside the closed vocabulary.
    #[error("prompt `{prompt}`: the word `{word}` is not in `actor.model.tokenizer.words`, the nearest is `{nearest}`")]
    UnknownWord {
        /// Instruction.
        prompt: String,
        /// Unknown word.
        word: String,
        /// Most similar known word.
        nearest: String,
    },
    /// A prompt that is too long.
    #[error("prompt of {found} bytes, expected at most {MAX_PROMPT_BYTES}")]
    TooLong {
        /// Length of the prompt in bytes.
        found: usize,
    },
    /// An invalid list of words.
    #[error("`actor.model.tokenizer.words`: {0}")]
    Words(String),
    /// A `SentencePiece` model that cannot be read.
    #[error("tokenizer model `{path}`: {detail}")]
    Model {
        /// Path of the model.
        path: PathBuf,
        /// Cause.
        detail: String,
    },
    /// A text that the `SentencePiece` model cannot encode.
    #[error("prompt `{prompt}`: {detail}")]
    Encode {
        /// Instruction.
        prompt: String,
        /// Cause.
        detail: String,
    },
}

/// Tokenizer of instructions; a clone shares the vocabulary.
#[derive(Debug, Clone)]
pub struct Tokenizer {
    kind: Kind,
}

#[derive(Clone)]
enum Kind {
    Words(Arc<BTreeMap<String, i64>>),
    SentencePiece {
        encoder: Arc<Kitoken>,
        bos: i64,
        vocab_size: usize,
    },
}

impl fmt::Debug for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Words(words) => f.debug_tuple("Words").field(words).finish(),
            Self::SentencePiece { bos, vocab_size, .. } => f
                .debug_struct("SentencePiece")
                .field("bos", bos)
                .field("vocab_size", vocab_size)
                .finish_non_exhaustive(),
        }
    }
}

/// Returns the instruction as pi0 reads it: without surrounding white space, with spaces for `_` and newlines.
pub fn clean(prompt: &str) -> String {
    // Python's `strip` removes these four separators, which are not white space in Unicode
    prompt
        .trim_matches(|c: char| c.is_whitespace() || ('\x1c'..='\x1f').contains(&c))
        .replace(['_', '\n'], " ")
}

/// Returns pi0.5's discrete state: the bin of each number of the normalized, not yet padded state.
///
/// `[-1, 1]` has 256 equal bins; the index is -1 below and 255 above the interval and for NaN
/// (`numpy.digitize(state, linspace(-1, 1, 257)[:-1]) - 1`, where NaN sorts last).
pub fn discretize_state<T: Copy + Into<f64>>(state: &[T]) -> Vec<i64> {
    let bin = |v: f64| {
        // the edges are multiples of 2^-7, so the product is exact and floor finds the edge below
        let index = (v * (STATE_BINS / 2.0)).floor() + STATE_BINS / 2.0;
        if v.is_nan() {
            STATE_BINS as i64 - 1
        } else {
            index.clamp(-1.0, STATE_BINS - 1.0) as i64
        }
    };
    state.iter().map(|v| bin((*v).into())).collect()
}

/// Returns pi0.5's prompt with the state in words: `Task: .., State: 127 3 ..;`, a newline, `Action: `.
pub fn pi05_prompt<T: Copy + Into<f64>>(prompt: &str, state: &[T]) -> String {
    let bins: Vec<String> = discretize_state(state).iter().map(i64::to_string).collect();
    format!("Task: {}, State: {};\nAction: ", clean(prompt), bins.join(" "))
}

/// Reads the bytes of a `tokenizer.model`.
///
/// # Errors
/// The file cannot be read or is above 64 MiB.
pub fn read_model(path: &Path) -> Result<Vec<u8>, PromptError> {
    let bad = |detail: String| PromptError::Model {
        path: path.to_owned(),
        detail,
    };
    let file = std::fs::File::open(path).map_err(|e| bad(e.to_string()))?;
    let mut bytes = Vec::new();
    file.take(MAX_MODEL_BYTES + 1)
        .read_to_end(&mut bytes)
        .map_err(|e| bad(e.to_string()))?;
    if bytes.len() as u64 > MAX_MODEL_BYTES {
        return Err(bad(format!("longer than {MAX_MODEL_BYTES} bytes")));
    }
    Ok(bytes)
}

impl Tokenizer {
    /// Makes the tokenizer of a configuration; `model_dir` is the folder of the bundle that holds the tokenizer model.
    ///
    /// # Errors
    /// An invalid list of words, or a model file that cannot be read.
    pub fn from_config(config: &TokenizerConfig, model_dir: Option<&Path>) -> Result<Self, PromptError> {
        match config {
            TokenizerConfig::Words { words } => Self::from_words(words),
            TokenizerConfig::SentencePiece { model } => {
                Self::from_sentencepiece(&model_dir.map_or_else(|| model.clone(), |dir| dir.join(model)))
            }
        }
    }

    /// Makes a closed vocabulary: 0 padding, 1 begin of sequence, 2 newline, 3 unused, then the words in order.
    ///
    /// A text is split at white space, and each `:`, `,` and `;` is a separate word, as in pi0.5's prompt.
    ///
    /// # Errors
    /// More than 65536 words, a repeated word, or a word that the split never produces.
    pub fn from_words(words: &[String]) -> Result<Self, PromptError> {
        if words.len() > MAX_WORDS {
            return Err(PromptError::Words(format!(
                "{} words, expected at most {MAX_WORDS}",
                words.len()
            )));
        }
        let mut ids = BTreeMap::new();
        for (id, word) in (FIRST_WORD..).zip(words) {
            if split_words(word) != [word.as_str()] || word == "\n" || word.contains('_') {
                return Err(PromptError::Words(format!(
                    "`{}` is not one word: expected no white space, `_`, `:`, `,` or `;` in it",
                    word.escape_debug()
                )));
            }
            if ids.insert(word.clone(), id).is_some() {
                return Err(PromptError::Words(format!("`{word}` is there twice")));
            }
        }
        Ok(Self {
            kind: Kind::Words(Arc::new(ids)),
        })
    }

    /// Reads a `SentencePiece` model (`tokenizer.model`, BPE or unigram); pi0 and pi0.5 use `PaliGemma`'s model.
    ///
    /// # Errors
    /// The file is missing, above 64 MiB, not a `SentencePiece` model, or lacks a begin-of-sequence piece.
    pub fn from_sentencepiece(path: &Path) -> Result<Self, PromptError> {
        let bad = |detail: String| PromptError::Model {
            path: path.to_owned(),
            detail,
        };
        let bytes = read_model(path)?;
        let definition = Definition::from_sentencepiece_slice(&bytes).map_err(|e| bad(e.to_string()))?;
        let bos = begin_of_sequence(&definition).ok_or_else(|| bad("it has no begin-of-sequence piece".to_owned()))?;
        let ids = definition
            .model
            .vocab()
            .iter()
            .map(|t| t.id)
            .chain(definition.specials.iter().map(|s| s.id));
        let vocab_size = ids
            .filter(|id| i32::try_from(*id).is_ok())
            .max()
            .map_or(0, |id| id as usize + 1);
        let encoder = Arc::new(Kitoken::from_definition(definition).map_err(|e| bad(e.to_string()))?);
        Ok(Self {
            kind: Kind::SentencePiece {
                encoder,
                bos,
                vocab_size,
            },
        })
    }

    /// Returns one above the largest id, the number of rows that the policy's embedding needs.
    pub fn vocab_size(&self) -> usize {
        match &self.kind {
            Kind::Words(words) => FIRST_WORD as usize + words.len(),
            Kind::SentencePiece { vocab_size, .. } => *vocab_size,
        }
    }

    /// Encodes an uncleaned text, after a begin-of-sequence id if `add_bos`.
    ///
    /// # Errors
    /// A word that is not in the vocabulary, a text above 64 KiB, or a text that the model cannot encode.
    pub fn encode(&self, text: &str, add_bos: bool) -> Result<Vec<i64>, PromptError> {
        if text.len() > MAX_PROMPT_BYTES {
            return Err(PromptError::TooLong { found: text.len() });
        }
        match &self.kind {
            Kind::Words(words) => {
                let begin = add_bos.then_some(Ok(BOS));
                begin
                    .into_iter()
                    .chain(split_words(text).into_iter().map(|w| word_id(words, text, w)))
                    .collect()
            }
            Kind::SentencePiece { encoder, bos, .. } => {
                let ids = encoder.encode(text, false).map_err(|e| PromptError::Encode {
                    prompt: text.to_owned(),
                    detail: e.to_string(),
                })?;
                Ok(add_bos
                    .then_some(*bos)
                    .into_iter()
                    .chain(ids.into_iter().map(i64::from))
                    .collect())
            }
        }
    }

    /// Tokenizes a prompt of pi0, or of pi0.5 without a discrete state, truncated or padded to `max_len`.
    ///
    /// The format is begin of sequence, the cleaned text, a newline.
    ///
    /// # Errors
    /// See [`Self::encode`].
    pub fn tokenize(&self, prompt: &str, max_len: usize) -> Result<PromptTokens, PromptError> {
        let mut ids = self.encode(&clean(prompt), true)?;
        ids.extend(self.encode("\n", false)?);
        Ok(PromptTokens::fit(ids, max_len))
    }

    /// Tokenizes a prompt of pi0.5 with a discrete state (see [`pi05_prompt`]), truncated or padded to `max_len`.
    ///
    /// # Errors
    /// See [`Self::encode`].
    pub fn tokenize_with_state<T: Copy + Into<f64>>(
        &self,
        prompt: &str,
        state: &[T],
        max_len: usize,
    ) -> Result<PromptTokens, PromptError> {
        Ok(PromptTokens::fit(
            self.encode(&pi05_prompt(prompt, state), true)?,
            max_len,
        ))
    }
}

fn begin_of_sequence(definition: &Definition) -> Option<i64> {
    let start = |t: &&kitoken::Template| t.position == InsertionPosition::SequenceStart;
    let piece = definition.config.templates.iter().find(start)?.content.as_bytes();
    let id = definition.specials.iter().find(|s| s.bytes == piece)?.id;
    i32::try_from(id).ok().map(i64::from)
}

/// Returns the words, the separators `:` `,` `;` and newlines, in the order of the text.
fn split_words(text: &str) -> Vec<&str> {
    text.split_inclusive(|c: char| c.is_whitespace() || is_separator(c))
        .flat_map(|part| {
            let end = part
                .char_indices()
                .next_back()
                .filter(|(_, c)| c.is_whitespace() || is_separator(*c));
            let (word, stop) = part.split_at(end.map_or(part.len(), |(i, _)| i));
            [
                word,
                if stop == "\n" || stop.starts_with(is_separator) {
                    stop
                } else {
                    ""
                },
            ]
        })
        .filter(|part| !part.is_empty())
        .collect()
}

fn is_separator(c: char) -> bool {
    matches!(c, ':' | ',' | ';')
}

fn word_id(words: &BTreeMap<String, i64>, text: &str, word: &str) -> Result<i64, PromptError> {
    if word == "\n" {
        return Ok(NEWLINE);
    }
    words.get(word).copied().ok_or_else(|| {
        let nearest = words
            .keys()
            .min_by_key(|known| strsim::damerau_levenshtein(word, known));
        PromptError::UnknownWord {
            prompt: text.to_owned(),
            word: word.to_owned(),
            nearest: nearest.cloned().unwrap_or_default(),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(list: &[&str]) -> Result<Tokenizer, PromptError> {
        Tokenizer::from_words(&list.iter().map(|w| (*w).to_owned()).collect::<Vec<_>>())
    }

    #[test]
    fn words_are_framed_padded_and_cut() {
        let tokenizer = words(&["pick", "red"]).expect("two words");
        let tokens = tokenizer.tokenize(" pick_red\n", 6).expect("known words");
        assert_eq!(tokens.ids, [1, 4, 5, 2, 0, 0]);
        assert_eq!(tokens.mask, [true, true, true, true, false, false]);
        assert_eq!(tokenizer.tokenize("pick red", 2).expect("known words").ids, [1, 4]);
        let error = tokenizer.tokenize("pick rad", 6).expect_err("unknown").to_string();
        assert!(error.contains("`rad`") && error.contains("`red`"), "{error}");
        assert_eq!(tokenizer.vocab_size(), 6);
    }

    #[test]
    fn pi05_words_keep_their_separators() {
        let tokenizer = words(&["Task", "State", "Action", ":", ",", ";", "pick", "-1", "192"]).expect("nine words");
        let tokens = tokenizer
            .tokenize_with_state("pick", &[-2.0f32, 0.5], 14)
            .expect("known words");
        assert_eq!(tokens.ids, [1, 4, 7, 10, 8, 5, 7, 11, 12, 9, 2, 6, 7, 0]);
    }

    #[test]
    fn what_the_split_never_makes_is_no_word() {
        for bad in ["", "two words", "x:", "\n", "a_b", "pick"] {
            assert!(matches!(words(&["pick", bad]), Err(PromptError::Words(_))), "{bad:?}");
        }
    }

    #[test]
    fn a_file_that_is_no_model_is_refused() {
        let dir = tempfile::tempdir().expect("folder");
        let path = dir.path().join("tokenizer.model");
        for bytes in [&b""[..], b"not a model", &[0xff; 64]] {
            std::fs::write(&path, bytes).expect("written");
            assert!(
                matches!(Tokenizer::from_sentencepiece(&path), Err(PromptError::Model { .. })),
                "{bytes:?}"
            );
        }
        let missing = TokenizerConfig::SentencePiece {
            model: "missing.model".into(),
        };
        assert!(matches!(
            Tokenizer::from_config(&missing, Some(dir.path())),
            Err(PromptError::Model { .. })
        ));
    }

    proptest::proptest! {
        #[test]
        fn bins_are_the_count_of_edges_not_above(value in -1.5f64..1.5, edge in -10i64..270) {
            let on_edge = -1.0 + edge as f64 / 128.0;
            for v in [value, on_edge, on_edge.next_down(), on_edge.next_up()] {
                let below = (0..256).filter(|i| -1.0 + f64::from(*i) / 128.0 <= v).count() as i64;
                proptest::prop_assert_eq!(discretize_state(&[v]), vec![below - 1]);
            }
        }
    }
}
