//! Prompt tokens: from an instruction to padded ids.

use std::path::{Path, PathBuf};

use crate::config::TokenizerConfig;

/// Ids of a prompt, padded to the policy's length.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PromptTokens {
    /// Token ids; 0 where padded.
    pub ids: Vec<i64>,
    /// Which of them are valid.
    pub mask: Vec<bool>,
}

/// A prompt that cannot be tokenized.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum PromptError {
    /// A word outside the closed vocabulary.
    #[error("prompt `{prompt}`: the word `{word}` is not in `actor.model.tokenizer.words` ({known})")]
    UnknownWord {
        /// The instruction.
        prompt: String,
        /// The word.
        word: String,
        /// All known words.
        known: String,
    },
    /// A tokenizer that is not read.
    #[error("tokenizer model `{0}`: SentencePiece models are not read yet, use `kind = \"words\"`")]
    Unsupported(PathBuf),
}

/// Begin of sequence.
const BOS: i64 = 1;
/// The newline that ends pi0's prompt.
const NEWLINE: i64 = 2;
/// Id of the first word.
const FIRST_WORD: i64 = 4;

/// Turns instructions into ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Tokenizer {
    words: Vec<String>,
}

/// The instruction as pi0 reads it: no space around it, `_` and newlines become spaces.
pub fn clean(prompt: &str) -> String {
    prompt.trim().replace(['_', '\n'], " ")
}

/// Bins of pi0.5's discrete state: the index of the value in 256 equal bins of `[-1, 1]`, -1 below (`numpy.digitize - 1`).
pub fn discretize_state(state: &[f64]) -> Vec<i64> {
    let edge = |i: i64| -1.0 + 2.0 * i as f64 / 256.0;
    state.iter().map(|v| (0..256).take_while(|i| *v >= edge(*i)).count() as i64 - 1).collect()
}

/// pi0.5's prompt with the state in words.
pub fn pi05_prompt(prompt: &str, state: &[f64]) -> String {
    let bins: Vec<String> = discretize_state(state).iter().map(i64::to_string).collect();
    format!("Task: {}, State: {};\nAction: ", clean(prompt), bins.join(" "))
}

impl Tokenizer {
    /// The tokenizer of a configuration; `model_dir` is the bundle that carries a tokenizer model.
    ///
    /// # Errors
    /// A kind that is not read.
    pub fn from_config(config: &TokenizerConfig, model_dir: Option<&Path>) -> Result<Self, PromptError> {
        match config {
            TokenizerConfig::Words { words } => Ok(Self { words: words.clone() }),
            TokenizerConfig::SentencePiece { model } => {
                Err(PromptError::Unsupported(model_dir.map_or_else(|| model.clone(), |dir| dir.join(model))))
            }
        }
    }

    /// Ids of `bos, words, newline`, cut at or padded to `max_len` with id 0.
    ///
    /// # Errors
    /// A word that is not in the vocabulary.
    pub fn tokenize(&self, prompt: &str, max_len: usize) -> Result<PromptTokens, PromptError> {
        let text = clean(prompt);
        let mut ids = vec![BOS];
        for word in text.split_whitespace() {
            let index = self.words.iter().position(|w| w == word).ok_or_else(|| PromptError::UnknownWord {
                prompt: prompt.to_owned(),
                word: word.to_owned(),
                known: self.words.join(", "),
            })?;
            ids.push(FIRST_WORD + index as i64);
        }
        ids.push(NEWLINE);
        ids.truncate(max_len);
        let mask = (0..max_len).map(|i| i < ids.len()).collect();
        ids.resize(max_len, 0);
        Ok(PromptTokens { ids, mask })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_framed_padded_and_cut() {
        let words = ["pick", "red"].map(str::to_owned).to_vec();
        let tokenizer = Tokenizer { words };
        let tokens = tokenizer.tokenize(" pick_red\n", 6).expect("known words");
        assert_eq!(tokens.ids, [1, 4, 5, 2, 0, 0]);
        assert_eq!(tokens.mask, [true, true, true, true, false, false]);
        assert_eq!(tokenizer.tokenize("pick red", 2).expect("known words").ids, [1, 4]);
        let error = tokenizer.tokenize("pick blue", 6).expect_err("unknown").to_string();
        assert!(error.contains("`blue`") && error.contains("pick, red"), "{error}");
    }
}
