//! The contract of a robot: what the policy reads and commands, checked as a whole before anything starts.
//!
//! Configuration and bundle give the same contract, so that every program refuses the same combinations.

use std::fmt;

use crate::{
    config::ModelConfig,
    norm::{DimStats, NormError, NormStats, Normalization, bool_mask, mask_fits},
    prompt::{PromptError, Tokenizer, pi05_prompt},
};

/// Reason for rejecting a combination of configuration, statistics and tokenizer.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum ContractError {
    /// The statistics cannot be read.
    #[error(transparent)]
    Norm(#[from] NormError),
    /// The tokenizer cannot be made.
    #[error(transparent)]
    Tokenizer(#[from] PromptError),
    /// A width outside of the model's width.
    #[error("`{key}` is {found}, expected 1 to `action_dim` = {most}")]
    Width {
        /// `env_action_dim` or `env_state_dim`.
        key: &'static str,
        /// Width found.
        found: usize,
        /// Width of the model.
        most: usize,
    },
    /// A camera without a name of its own.
    #[error("`cameras` has `{name}` twice or empty, expected a name of its own for each camera")]
    Camera {
        /// Name found.
        name: String,
    },
    /// Normalization without statistics.
    #[error("`normalization` is `{}`, but there are no statistics: name a `norm_stats.json` in `norm_stats`", .normalization.name())]
    NoStats {
        /// Normalization of the policy.
        normalization: Normalization,
    },
    /// Quantile normalization without quantiles.
    #[error(
        "`normalization` is `quantile`, but the statistics of `{key}` have no `q01` and `q99`: compute the statistics with quantiles, or \
         set `normalization = \"z_score\"` for a policy that was trained so"
    )]
    NoQuantiles {
        /// `state` or `actions`.
        key: &'static str,
    },
    /// Statistics of another width than the robot.
    #[error("the statistics of `{key}` have {found} dimensions{}, expected {expected}: take the statistics of this robot", padding(*.found, *.used))]
    StatsWidth {
        /// `state` or `actions`.
        key: &'static str,
        /// Dimensions found, padding included.
        found: usize,
        /// Dimensions without zeros at the end.
        used: usize,
        /// Widths expected.
        expected: String,
    },
    /// Delta actions of dimensions that the action or the state does not have.
    #[error(
        "`delta_actions` is {runs:?}, which covers {found} dimensions, expected runs other than 0 over 1 to {actions} dimensions of the \
         action and at most {state} of the state"
    )]
    DeltaMask {
        /// Run lengths.
        runs: Vec<i32>,
        /// Dimensions of the runs.
        found: u64,
        /// Action width of the environment.
        actions: usize,
        /// Largest state width of the robot.
        state: usize,
    },
    /// A tokenizer with more ids than the embedding has rows.
    #[error("the tokenizer has {found} ids, `vocab` is {vocab}: take the tokenizer of the checkpoint")]
    Vocabulary {
        /// Ids of the tokenizer.
        found: usize,
        /// Rows of the embedding.
        vocab: usize,
    },
    /// A tokenizer that cannot write the state.
    #[error("`discrete_state_input` is true, but the tokenizer cannot encode the state in the prompt")]
    StateWords(#[source] PromptError),
    /// No room for the state in the prompt.
    #[error(
        "`prompt_len` is {expected}, but a state of {width} numbers needs at least {found} tokens without any instruction: set a longer \
         `prompt_len`"
    )]
    PromptLength {
        /// Numbers of the state.
        width: usize,
        /// Tokens of the shortest prompt.
        found: usize,
        /// Tokens of the policy's prompt.
        expected: usize,
    },
}

fn padding(found: usize, used: usize) -> String {
    if used == found {
        String::new()
    } else {
        format!(" ({used} without the zeros at the end)")
    }
}

/// Accepted widths of a robot's state.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StateWidth {
    /// Fewest numbers.
    pub least: usize,
    /// Most numbers.
    pub most: usize,
}

impl StateWidth {
    /// Returns whether a state of this width is accepted.
    pub fn accepts(self, width: usize) -> bool {
        (self.least..=self.most).contains(&width)
    }
}

impl fmt::Display for StateWidth {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.least == self.most {
            write!(f, "{}", self.most)
        } else {
            write!(f, "{} to {}", self.least, self.most)
        }
    }
}

/// What a policy reads from a robot and commands to the robot.
#[derive(Debug, Clone, PartialEq)]
pub struct Contract {
    /// Camera names in the policy's order.
    pub cameras: Vec<String>,
    /// Side of an image at the input of the network, in pixels.
    pub image_size: usize,
    /// Rows of the text embedding.
    pub vocab: usize,
    /// Prompt tokens, padding included.
    pub prompt_len: usize,
    /// Padded action and state width of the model.
    pub action_dim: usize,
    /// Action rows of a chunk.
    pub action_horizon: usize,
    /// Action width of the environment.
    pub env_action_dim: usize,
    /// State width of the environment; `None`: the width of the statistics.
    pub env_state_dim: Option<usize>,
    /// Whether the prompt holds the state in words.
    pub discrete_state_input: bool,
    /// Normalization of state and actions.
    pub normalization: Normalization,
    /// Statistics of the normalization.
    pub norm_stats: Option<NormStats>,
    /// Run lengths of the action dimensions that are differences from the state.
    pub delta_actions: Option<Vec<i32>>,
}

impl Contract {
    /// Returns the contract of a configuration; `norm_stats` holds the statistics of the configured file.
    pub fn of_config(model: &ModelConfig, norm_stats: Option<NormStats>) -> Self {
        Self {
            cameras: model.cameras.clone(),
            image_size: model.vision.image_size,
            vocab: model.vocab,
            prompt_len: model.prompt_len,
            action_dim: model.action_dim,
            action_horizon: model.action_horizon,
            env_action_dim: model.env_action_dim,
            env_state_dim: model.env_state_dim,
            discrete_state_input: model.discrete_state_input,
            normalization: model.normalization,
            norm_stats,
            delta_actions: model.delta_actions.clone(),
        }
    }

    /// Checks widths, cameras, statistics and delta mask against each other, and the tokenizer where the caller has one.
    ///
    /// # Errors
    /// The first contradiction, with the value found and the value expected.
    pub fn check(&self, tokenizer: Option<&Tokenizer>) -> Result<(), ContractError> {
        let widths = [
            ("env_action_dim", Some(self.env_action_dim)),
            ("env_state_dim", self.env_state_dim),
        ];
        for (key, found) in widths {
            if let Some(found) = found.filter(|width| !(1..=self.action_dim).contains(width)) {
                let most = self.action_dim;
                return Err(ContractError::Width { key, found, most });
            }
        }
        let mut cameras = self.cameras.iter().enumerate();
        let repeated =
            cameras.find(|(index, name)| name.is_empty() || self.cameras.iter().take(*index).any(|n| n == *name));
        if let Some((_, name)) = repeated {
            return Err(ContractError::Camera { name: name.clone() });
        }
        self.check_stats()?;
        let state = self.state_width();
        if let Some(runs) = &self.delta_actions {
            let found = runs.iter().map(|n| u64::from(n.unsigned_abs())).sum();
            if !mask_fits(runs, self.env_action_dim) || found > state.most as u64 {
                return Err(ContractError::DeltaMask {
                    runs: runs.clone(),
                    found,
                    actions: self.env_action_dim,
                    state: state.most,
                });
            }
        }
        tokenizer.map_or(Ok(()), |tokenizer| self.check_tokenizer(tokenizer))
    }

    fn check_stats(&self) -> Result<(), ContractError> {
        if self.normalization == Normalization::None {
            return Ok(());
        }
        let Some(stats) = &self.norm_stats else {
            return Err(ContractError::NoStats {
                normalization: self.normalization,
            });
        };
        for (key, dims) in [("state", &stats.state), ("actions", &stats.actions)] {
            if self.normalization == Normalization::Quantile && (dims.q01.is_none() || dims.q99.is_none()) {
                return Err(ContractError::NoQuantiles { key });
            }
        }
        let width = |key, dims: &DimStats, expected: String| ContractError::StatsWidth {
            key,
            found: dims.width(),
            used: dims.used(),
            expected,
        };
        let most = self.action_dim;
        // openpi unnormalizes the model's whole action row, and cuts the row afterwards
        if !(self.env_action_dim..=most).contains(&stats.actions.width()) {
            let expected = format!("`env_action_dim` = {} to `action_dim` = {most}", self.env_action_dim);
            return Err(width("actions", &stats.actions, expected));
        }
        match self.env_state_dim {
            _ if stats.state.width() > most => {
                Err(width("state", &stats.state, format!("at most `action_dim` = {most}")))
            }
            Some(own) if stats.state.width() < own || stats.state.used() > own => Err(width(
                "state",
                &stats.state,
                format!("`env_state_dim` = {own}, padded with zeros or not"),
            )),
            _ => Ok(()),
        }
    }

    fn check_tokenizer(&self, tokenizer: &Tokenizer) -> Result<(), ContractError> {
        let found = tokenizer.vocab_size();
        if found > self.vocab {
            return Err(ContractError::Vocabulary {
                found,
                vocab: self.vocab,
            });
        }
        if !self.discrete_state_input {
            return Ok(());
        }
        let tokens = |state: &[f64]| tokenizer.encode(&pi05_prompt("", state), true);
        // the middle of every bin, and both ends beyond
        let bins: Vec<f64> = (-1..=256).map(|bin| (f64::from(bin) + 0.5) / 128.0 - 1.0).collect();
        tokens(&bins).map_err(ContractError::StateWords)?;
        let width = self.state_width().least;
        // bin 0 has the shortest text
        let found = tokens(&vec![-1.0; width]).map_err(ContractError::StateWords)?.len();
        if found > self.prompt_len {
            return Err(ContractError::PromptLength {
                width,
                found,
                expected: self.prompt_len,
            });
        }
        Ok(())
    }

    /// Returns the accepted widths of the state.
    ///
    /// The width is `env_state_dim`, else the width of the statistics, where zeros at the end may be padding. Without both, every width
    /// that covers the delta mask and fits the model is accepted.
    pub fn state_width(&self) -> StateWidth {
        let stats = self
            .norm_stats
            .as_ref()
            .filter(|_| self.normalization != Normalization::None);
        let mask = self.delta_mask().map_or(0, |mask| mask.len());
        let (least, most) = match (self.env_state_dim, stats) {
            (Some(own), _) => (own, own),
            (None, Some(stats)) => (stats.state.used(), stats.state.width()),
            (None, None) => (0, self.action_dim),
        };
        StateWidth {
            least: least.max(mask),
            most,
        }
    }

    /// Returns which action dimensions are differences from the state; `None`: none of them.
    pub fn delta_mask(&self) -> Option<Vec<bool>> {
        let runs = self.delta_actions.as_deref()?;
        // runs that do not fit are rejected by the check, and may be long
        mask_fits(runs, self.env_action_dim).then(|| bool_mask(runs))
    }

    /// Returns a line for each property that is accepted, but needs attention; programs log the lines at the start.
    pub fn warnings(&self) -> Vec<String> {
        let Some(stats) = &self.norm_stats else {
            return Vec::new();
        };
        if self.normalization == Normalization::None {
            return vec![
                "there are normalization statistics, but `normalization` is `none`: the statistics are not used"
                    .to_owned(),
            ];
        }
        let mut lines = Vec::new();
        for (key, dims) in [("state", &stats.state), ("actions", &stats.actions)] {
            for near in dims.near_constant(self.normalization) {
                let effect = if key == "state" {
                    "a small deviation becomes a large number for the policy; check that the robot holds the dimension there"
                } else {
                    "the policy cannot move the dimension"
                };
                lines.push(format!(
                    "statistics: `{key}[{}]` is nearly constant in the training data (spread {:e}, largest {:e}): {effect}",
                    near.index, near.spread, near.largest
                ));
            }
        }
        if stats.actions.used() > self.env_action_dim {
            lines.push(format!(
                "statistics: `actions` has {} dimensions in use, but `env_action_dim` is {}: the others are dropped",
                stats.actions.used(),
                self.env_action_dim
            ));
        }
        lines
    }
}
