//! Conversion between environment units and model units: raw observations to model inputs, model actions to environment actions.
//!
//! The engine and the learner's data sets share one transform, so that both convert observations and actions the same way.

use std::{
    collections::{BTreeMap, BTreeSet},
    path::Path,
    sync::{Mutex, PoisonError},
};

use crate::{
    bundle::{BundleError, Manifest},
    config::ModelConfig,
    contract::{Contract, ContractError, StateWidth},
    guidance::Guidance,
    image::{CHANNELS, ImageError, RgbImage, resize_with_pad},
    message::shown,
    norm::{DimStats, NormError, NormStats, Normalization, absolute_from_delta, delta_from_absolute},
    prompt::{PromptError, PromptTokens, Tokenizer},
};

/// Magnitude of a number of the state in model units beyond which the number is far outside of the statistics. The training data lies
/// near [-1, 1] with quantiles, and within 3 with mean and standard deviation.
pub const FAR: f32 = 10.0;
/// Most different prompts of which a cut is reported; further cuts are only counted.
const MAX_REPORTED: usize = 1024;
/// Most characters of a prompt in a report.
const SHOWN_PROMPT: usize = 80;

/// Reason for rejecting an observation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObservationError {
    /// A camera that the policy does not have.
    #[error("observation has an image of camera `{found}`, the policy has the cameras {expected}")]
    Camera {
        /// Cameras of the policy.
        expected: String,
        /// Name in the observation.
        found: String,
    },
    /// No image.
    #[error("observation has no image: at least one camera must be there")]
    Blind,
    /// An image that cannot be resized.
    #[error("image of camera `{camera}` cannot be resized")]
    Image {
        /// Which camera.
        camera: String,
        /// Cause.
        source: ImageError,
    },
    /// A state of another width than the robot's.
    #[error("state has {found} numbers, expected {expected}")]
    State {
        /// Accepted widths.
        expected: StateWidth,
        /// Numbers in the observation.
        found: usize,
    },
    /// A number that is not finite.
    #[error("{field} holds {value} at element {index}, expected finite numbers")]
    NotFinite {
        /// Field, `state` or `guidance.previous`.
        field: &'static str,
        /// Index of the element.
        index: usize,
        /// NaN or infinity.
        value: f32,
    },
    /// A chunk to continue from with a shape that does not fit.
    #[error("guidance.previous has {rows} rows of {columns} numbers, expected 1 to {horizon} rows of {width}")]
    Previous {
        /// Rows of the chunk to continue from.
        rows: usize,
        /// Numbers per row.
        columns: usize,
        /// Action width of the environment.
        width: usize,
        /// Rows of a chunk, `action_horizon`.
        horizon: usize,
    },
    /// A largest guidance weight out of range.
    #[error("guidance.max_weight is {0}, expected a finite number above 0")]
    MaxWeight(f32),
    /// A prompt with the state inside that is longer than the policy's prompt.
    #[error(
        "prompt `{}` has {found} tokens with the state inside, expected at most {expected} (`prompt_len`): the state would be cut, send a \
         shorter prompt",
        shown(.prompt, SHOWN_PROMPT)
    )]
    PromptLength {
        /// Instruction.
        prompt: String,
        /// Tokens of the policy's prompt.
        expected: usize,
        /// Tokens of the instruction and the state.
        found: usize,
    },
    /// A prompt that cannot be tokenized.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// Normalization statistics that do not fit.
    #[error(transparent)]
    Norm(#[from] NormError),
}

/// Observation of a robot or simulator, in environment units.
#[derive(Debug, Clone, PartialEq)]
pub struct RawObservation {
    /// Images by camera name; a missing camera has no entry.
    pub images: BTreeMap<String, RgbImage>,
    /// Proprioceptive state.
    pub state: Vec<f32>,
    /// Instruction.
    pub prompt: String,
}

/// One observation in model units.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInput {
    /// Resized pixels, `[cameras, size, size, 3]`, 0 to 255; zero for a missing camera.
    pub images: Vec<u8>,
    /// Whether each camera has an image, `[cameras]`.
    pub image_mask: Vec<bool>,
    /// Prompt ids, padded, `[prompt_len]`.
    pub prompt: Vec<i64>,
    /// Whether each prompt id is valid, `[prompt_len]`.
    pub prompt_mask: Vec<bool>,
    /// Normalized state padded with zeros, `[action_dim]`.
    pub state: Vec<f32>,
}

/// Chunk that a client executes while its request is pending, in environment units; see [`Guidance`].
#[derive(Debug, Clone, PartialEq)]
pub struct RawGuidance {
    /// Actions that are not executed yet, row-major.
    pub previous: Vec<f32>,
    /// Numbers per row.
    pub columns: usize,
    /// Rows that are executed before the new chunk arrives.
    pub delay: usize,
    /// Largest weight of the correction, above 0.
    pub max_weight: f32,
}

/// Property of an accepted observation that needs attention.
#[derive(Debug, Clone, PartialEq)]
pub enum Remark {
    /// The end of the prompt was dropped.
    CutPrompt {
        /// Tokens of the instruction.
        found: usize,
        /// Tokens of the policy's prompt.
        kept: usize,
    },
    /// A number of the state is beyond [`FAR`].
    Far {
        /// Dimension of the state.
        dimension: usize,
        /// Number in the robot's units.
        raw: f32,
        /// Number in model units.
        model: f32,
    },
}

/// Conversion between environment units and the model units of one policy.
#[derive(Debug)]
pub struct Transform {
    contract: Contract,
    state_width: StateWidth,
    /// Which action dimensions are differences from the state.
    delta_mask: Option<Vec<bool>>,
    tokenizer: Tokenizer,
    reported: Mutex<Reported>,
}

/// Remarks that were reported already.
#[derive(Debug, Default)]
struct Reported {
    prompts: BTreeSet<String>,
    dimensions: BTreeSet<usize>,
}

impl Transform {
    /// Returns the transform of a contract, after the check of the contract.
    ///
    /// # Errors
    /// See [`Contract::check`].
    pub fn new(contract: Contract, tokenizer: Tokenizer) -> Result<Self, ContractError> {
        contract.check(Some(&tokenizer))?;
        Ok(Self {
            state_width: contract.state_width(),
            delta_mask: contract.delta_mask(),
            contract,
            tokenizer,
            reported: Mutex::default(),
        })
    }

    /// Returns the transform of the bundle in `dir`.
    ///
    /// # Errors
    /// The tokenizer cannot be read, or the contract of the bundle contradicts itself.
    pub fn of_bundle(manifest: &Manifest, dir: &Path) -> Result<Self, BundleError> {
        Tokenizer::from_config(&manifest.tokenizer, Some(dir))
            .map_err(ContractError::from)
            .and_then(|tokenizer| Self::new(manifest.contract(), tokenizer))
            .map_err(|source| BundleError::Contract {
                path: dir.to_owned(),
                source,
            })
    }

    /// Returns the transform of a configuration; `norm_stats` holds the statistics of the configured file.
    ///
    /// # Errors
    /// The tokenizer cannot be read, or the contract of the configuration contradicts itself.
    pub fn of_config(model: &ModelConfig, norm_stats: Option<NormStats>) -> Result<Self, ContractError> {
        let tokenizer = Tokenizer::from_config(&model.tokenizer, None)?;
        Self::new(Contract::of_config(model, norm_stats), tokenizer)
    }

    /// Returns the transform of a configuration, with the statistics and the tokenizer from the configured files.
    ///
    /// # Errors
    /// A file cannot be read, or the contract of the configuration contradicts itself.
    pub fn load(model: &ModelConfig) -> Result<Self, ContractError> {
        let norm_stats = model.norm_stats.as_deref().map(NormStats::load).transpose()?;
        Self::of_config(model, norm_stats)
    }

    /// Returns what the policy reads from a robot and commands to the robot.
    pub fn contract(&self) -> &Contract {
        &self.contract
    }

    /// Returns the camera names in the policy's order.
    pub fn cameras(&self) -> &[String] {
        &self.contract.cameras
    }

    /// Returns an observation in model units.
    ///
    /// # Errors
    /// An unknown camera, no image, a state of another width or not finite, a prompt that cannot be tokenized or has no room for the
    /// state, or statistics that do not fit.
    pub fn input(&self, raw: &RawObservation) -> Result<ModelInput, ObservationError> {
        Ok(self.input_with_remarks(raw)?.0)
    }

    /// Returns an observation in model units, with the properties that need attention.
    ///
    /// # Errors
    /// See [`Transform::input`].
    pub fn input_with_remarks(&self, raw: &RawObservation) -> Result<(ModelInput, Vec<Remark>), ObservationError> {
        let cameras = self.cameras();
        if let Some(found) = raw.images.keys().find(|name| !cameras.contains(name)) {
            return Err(ObservationError::Camera {
                expected: cameras.join(", "),
                found: found.clone(),
            });
        }
        if raw.images.is_empty() {
            return Err(ObservationError::Blind);
        }
        let size = self.contract.image_size;
        let mut images = Vec::with_capacity(cameras.len() * size * size * CHANNELS);
        for camera in cameras {
            match raw.images.get(camera) {
                None => images.resize(images.len() + size * size * CHANNELS, 0),
                Some(image) if (image.height(), image.width()) == (size, size) => {
                    images.extend_from_slice(image.data());
                }
                Some(image) => {
                    let fitted = resize_with_pad(image, size, size).map_err(|source| ObservationError::Image {
                        camera: camera.clone(),
                        source,
                    })?;
                    images.extend_from_slice(fitted.data());
                }
            }
        }
        let mut state = self.state(&raw.state)?;
        let tokens = self.tokens(&raw.prompt, &state)?;
        let mut remarks = Vec::new();
        if tokens.is_cut() {
            if self.contract.discrete_state_input {
                return Err(ObservationError::PromptLength {
                    prompt: raw.prompt.clone(),
                    expected: tokens.ids.len(),
                    found: tokens.found,
                });
            }
            remarks.push(self.cut(&tokens));
        }
        if self.contract.normalization != Normalization::None {
            let numbers = raw.state.iter().zip(&state).enumerate();
            let far = numbers.filter(|(_, (_, model))| model.abs() > FAR);
            remarks.extend(far.map(|(dimension, (raw, model))| Remark::Far {
                dimension,
                raw: *raw,
                model: *model,
            }));
        }
        state.resize(self.contract.action_dim, 0.0);
        let input = ModelInput {
            images,
            image_mask: cameras.iter().map(|name| raw.images.contains_key(name)).collect(),
            prompt: tokens.ids,
            prompt_mask: tokens.mask,
            state,
        };
        Ok((input, remarks))
    }

    fn cut(&self, tokens: &PromptTokens) -> Remark {
        Remark::CutPrompt {
            found: tokens.found,
            kept: self.contract.prompt_len,
        }
    }

    /// Returns the text of a remark the first time, for each prompt and each dimension of the state; `None` afterwards.
    pub fn report(&self, remark: &Remark, prompt: &str) -> Option<String> {
        let mut reported = self.reported.lock().unwrap_or_else(PoisonError::into_inner);
        match remark {
            Remark::CutPrompt { found, kept } => {
                if reported.prompts.len() == MAX_REPORTED || !reported.prompts.insert(prompt.to_owned()) {
                    return None;
                }
                Some(format!(
                    "prompt `{}` has {found} tokens, the policy reads the first {kept} (`prompt_len`): the end is dropped",
                    shown(prompt, SHOWN_PROMPT)
                ))
            }
            Remark::Far { dimension, raw, model } => reported.dimensions.insert(*dimension).then(|| {
                format!(
                    "state[{dimension}] is {raw}, which is {model:.1} in model units, far outside of the statistics (beyond {FAR}): check \
                     the unit and the order of the state, and the robot of the statistics"
                )
            }),
        }
    }

    /// Checks that a prompt can be tokenized. Returns a remark if the end of the prompt is dropped.
    ///
    /// # Errors
    /// The prompt cannot be tokenized, or has no room for the state.
    pub fn check_prompt(&self, prompt: &str) -> Result<Option<Remark>, ObservationError> {
        // -1 has the shortest text: only a prompt that no state fits is rejected here
        let tokens = self.tokens(prompt, &vec![-1.0; self.state_width.least])?;
        if !tokens.is_cut() {
            return Ok(None);
        }
        if self.contract.discrete_state_input {
            return Err(ObservationError::PromptLength {
                prompt: prompt.to_owned(),
                expected: tokens.ids.len(),
                found: tokens.found,
            });
        }
        Ok(Some(self.cut(&tokens)))
    }

    /// Returns the tokens of a prompt; `state` is in model units, not padded.
    fn tokens(&self, prompt: &str, state: &[f32]) -> Result<PromptTokens, PromptError> {
        let length = self.contract.prompt_len;
        if self.contract.discrete_state_input {
            self.tokenizer.tokenize_with_state(prompt, state, length)
        } else {
            self.tokenizer.tokenize(prompt, length)
        }
    }

    /// Returns a state in model units, not padded.
    fn state(&self, state: &[f32]) -> Result<Vec<f32>, ObservationError> {
        if !self.state_width.accepts(state.len()) {
            return Err(ObservationError::State {
                expected: self.state_width,
                found: state.len(),
            });
        }
        check_finite("state", state)?;
        Ok(self.normalized(|stats| &stats.state, state)?)
    }

    fn normalized(&self, which: fn(&NormStats) -> &DimStats, row: &[f32]) -> Result<Vec<f32>, NormError> {
        match &self.contract.norm_stats {
            Some(stats) => self.contract.normalization.normalize(which(stats), row),
            None => Ok(row.to_vec()),
        }
    }

    /// Returns actions in model units, not padded. `actions` holds rows of `width` numbers in environment units.
    ///
    /// `state` is the raw state of the observation; a policy with delta actions subtracts `state`.
    ///
    /// # Errors
    /// The statistics or the delta mask do not fit.
    pub fn model_actions(&self, actions: &[f32], width: usize, state: &[f32]) -> Result<Vec<f32>, NormError> {
        let mut model = Vec::with_capacity(actions.len());
        for row in actions.chunks_exact(width.max(1)) {
            let row = match &self.delta_mask {
                Some(mask) => delta_from_absolute(row, state, mask)?,
                None => row.to_vec(),
            };
            model.extend(self.normalized(|stats| &stats.actions, &row)?);
        }
        Ok(model)
    }

    /// Returns a chunk in environment units, `[action_horizon, env_action_dim]`.
    ///
    /// `actions` is `[action_horizon, action_dim]` in model units. `state` is the raw state of the observation; a policy with
    /// delta actions adds `state`.
    ///
    /// # Errors
    /// The statistics or the delta mask do not fit.
    pub fn env_actions(&self, actions: &[f32], state: &[f32]) -> Result<Vec<f32>, NormError> {
        let contract = &self.contract;
        let width = contract.env_action_dim;
        let mut env = Vec::with_capacity(contract.action_horizon * width);
        for row in actions.chunks_exact(contract.action_dim.max(1)) {
            // in openpi's order: the whole row of the model is unnormalized, then the state is added, then the row is cut
            let row = match &contract.norm_stats {
                Some(stats) => contract.normalization.unnormalize(&stats.actions, row)?,
                None => row.to_vec(),
            };
            let row = match &self.delta_mask {
                Some(mask) => absolute_from_delta(&row, state, mask)?,
                None => row,
            };
            env.extend(row.into_iter().take(width));
        }
        Ok(env)
    }

    /// Returns guidance in model units; `state` is the raw state of the observation.
    ///
    /// # Errors
    /// A wrong number of rows or columns, a number that is not finite, or a weight out of range.
    pub fn guidance(&self, raw: &RawGuidance, state: &[f32]) -> Result<Guidance, ObservationError> {
        let (width, horizon) = (self.contract.env_action_dim, self.contract.action_horizon);
        let rows = raw.previous.len() / raw.columns.max(1);
        if raw.columns != width || !(1..=horizon).contains(&rows) || raw.previous.len() != rows * width {
            return Err(ObservationError::Previous {
                rows,
                columns: raw.columns,
                width,
                horizon,
            });
        }
        if !(raw.max_weight.is_finite() && raw.max_weight > 0.0) {
            return Err(ObservationError::MaxWeight(raw.max_weight));
        }
        check_finite("guidance.previous", &raw.previous)?;
        let previous = self.model_actions(&raw.previous, width, state)?;
        Ok(Guidance::new(
            previous,
            width,
            horizon,
            raw.delay,
            f64::from(raw.max_weight),
        ))
    }
}

fn check_finite(field: &'static str, values: &[f32]) -> Result<(), ObservationError> {
    match values.iter().enumerate().find(|(_, value)| !value.is_finite()) {
        Some((index, value)) => Err(ObservationError::NotFinite {
            field,
            index,
            value: *value,
        }),
        None => Ok(()),
    }
}

#[cfg(test)]
mod table;

#[cfg(test)]
mod tests {
    use super::*;

    /// Returns a transform with two cameras of 2 x 2, action width 3 of 4, horizon 2, and a difference as first action dimension.
    fn transform() -> Transform {
        let stats = |mean: &[f64], std: &[f64]| DimStats {
            mean: mean.to_vec(),
            std: std.to_vec(),
            q01: None,
            q99: None,
        };
        let contract = Contract {
            cameras: ["top", "wrist"].map(str::to_owned).to_vec(),
            image_size: 2,
            vocab: 5,
            prompt_len: 3,
            action_dim: 4,
            action_horizon: 2,
            env_action_dim: 3,
            env_state_dim: None,
            discrete_state_input: false,
            normalization: Normalization::ZScore,
            norm_stats: Some(NormStats {
                state: stats(&[1.0, 2.0, 0.0, 0.0], &[2.0, 4.0, 0.0, 0.0]),
                actions: stats(&[0.5, 0.0, -1.0], &[0.5, 2.0, 1.0]),
            }),
            delta_actions: Some(vec![1, -1]),
        };
        Transform::new(contract, Tokenizer::from_words(&["pick".to_owned()]).expect("words")).expect("sound")
    }

    fn raw(cameras: &[&str]) -> RawObservation {
        let image = |value| RgbImage::new(2, 2, vec![value; 12]).expect("12 bytes");
        RawObservation {
            images: cameras
                .iter()
                .zip(7..)
                .map(|(name, value)| ((*name).to_owned(), image(value)))
                .collect(),
            state: vec![5.0, 2.0],
            prompt: "pick".to_owned(),
        }
    }

    #[test]
    fn images_are_placed_by_the_name_of_their_camera() {
        let input = transform().input(&raw(&["wrist"])).expect("fits");
        assert_eq!(input.images, [[0; 12], [7; 12]].concat(), "the first camera is absent");
        assert_eq!(input.image_mask, [false, true]);
        assert_eq!(input.state.len(), 4);
        assert!(
            (input.state[0] - 2.0).abs() < 1e-5 && input.state[1..] == [0.0; 3],
            "{:?}",
            input.state
        );
        assert_eq!(input.prompt_mask, [true, true, true], "begin, the word, newline");
        for (cameras, expected) in [(&["top", "side"][..], "`side`"), (&[], "no image")] {
            let error = transform().input(&raw(cameras)).expect_err("not the policy's cameras");
            assert!(error.to_string().contains(expected), "{error}");
        }
    }

    #[test]
    fn environment_actions_are_the_inverse_of_model_actions() {
        let transform = transform();
        let (state, actions) = ([5.0, 2.0, 0.0], [6.0f32, 1.0, -3.0, 4.5, -2.0, 0.25]);
        let model = transform.model_actions(&actions, 3, &state).expect("fits");
        let padded: Vec<f32> = model.chunks(3).flat_map(|row| [row, &[9.0]].concat()).collect();
        let back = transform.env_actions(&padded, &state).expect("fits");
        assert_eq!(back.len(), 2 * 3, "the whole horizon, without padding");
        for (back, action) in back.iter().zip(&actions) {
            // f32 rounding of both conversions, for numbers up to 6
            assert!((back - action).abs() < 2e-6, "{back} {action}");
        }
        assert!((model[0] - 1.0).abs() < 1e-5, "(6 - 5 - 0.5) / 0.5");
        let narrow = transform
            .env_actions(&padded, &[5.0])
            .expect_err("the mask covers two dimensions");
        assert!(
            matches!(narrow, NormError::DeltaMask { mask: 2, state: 1, .. }),
            "{narrow}"
        );
    }

    #[test]
    fn what_cannot_be_read_is_named() {
        let transform = transform();
        let with_state = |state: Vec<f32>| RawObservation { state, ..raw(&["top"]) };
        let guidance = |previous: Vec<f32>, columns, max_weight| RawGuidance {
            previous,
            columns,
            delay: 1,
            max_weight,
        };
        let observed = |raw| transform.input(&raw).expect_err("refused").to_string();
        let guided = |raw| transform.guidance(&raw, &[0.0; 3]).expect_err("refused").to_string();
        for (text, expected) in [
            (observed(with_state(vec![0.0; 5])), "5 numbers, expected 2 to 4"),
            (observed(with_state(vec![0.1])), "1 numbers, expected 2 to 4"),
            (observed(with_state(vec![])), "0 numbers, expected 2 to 4"),
            (
                observed(with_state(vec![0.0, f32::NAN])),
                "state holds NaN at element 1",
            ),
            (guided(guidance(vec![0.0; 9], 3, 5.0)), "3 rows of 3"),
            (guided(guidance(vec![0.0; 4], 2, 5.0)), "2 rows of 2"),
            (guided(guidance(vec![], 3, 5.0)), "0 rows"),
            (guided(guidance(vec![0.0; 3], 3, 0.0)), "max_weight is 0"),
            (
                guided(guidance(vec![0.0, f32::INFINITY, 0.0], 3, 5.0)),
                "guidance.previous holds inf",
            ),
        ] {
            assert!(text.contains(expected), "{text}");
        }
    }
}
