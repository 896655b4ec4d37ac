//! From an observation to model input: pixels, prompt tokens, normalised state.

use policy::{
    bundle::Manifest,
    guidance::Guidance,
    image::{CHANNELS, ImageError, RgbImage, normalise_u8, resize_with_pad},
    norm::{bool_mask, delta_from_absolute},
    prompt::{PromptError, Tokenizer},
};
use wire::{array::ArrayError, messages};

use crate::backend::PrefixBatch;

/// An observation that cannot be used.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ObservationError {
    /// Another number of cameras.
    #[error("observation has {found} images, the policy has {expected} cameras ({names})")]
    Cameras {
        /// Cameras of the policy.
        expected: usize,
        /// What came.
        found: usize,
        /// Their names.
        names: String,
    },
    /// No camera at all.
    #[error("observation has no image: at least one camera must be there")]
    Blind,
    /// An image that is none.
    #[error(transparent)]
    Array(#[from] ArrayError),
    /// An image of another layout.
    #[error("image of camera `{camera}` has shape {found:?}, expected [height, width, 3]")]
    Shape {
        /// Which camera.
        camera: String,
        /// Its shape.
        found: Vec<usize>,
    },
    /// An image of an impossible size.
    #[error("camera `{camera}`: {source}")]
    Image {
        /// Which camera.
        camera: String,
        /// What is wrong.
        source: ImageError,
    },
    /// A state that does not fit.
    #[error("state has {found} numbers, the policy takes at most {expected}")]
    State {
        /// Width of the model's state.
        expected: usize,
        /// What came.
        found: usize,
    },
    /// NaN or infinity.
    #[error("state or actions hold {value} at element {index}")]
    NotFinite {
        /// Which element.
        index: usize,
        /// What is there.
        value: f32,
    },
    /// A chunk to go on from that does not fit.
    #[error("guidance.previous has shape {found:?}, expected [1 to {horizon}, {width}]")]
    Previous {
        /// Its shape.
        found: Vec<usize>,
        /// Width of an action.
        width: usize,
        /// Rows of a chunk.
        horizon: usize,
    },
    /// A weight out of range.
    #[error("guidance.max_weight is {0}, expected a number above 0")]
    MaxWeight(f32),
    /// A prompt outside the vocabulary.
    #[error(transparent)]
    Prompt(#[from] PromptError),
    /// Statistics that do not fit.
    #[error(transparent)]
    Norm(#[from] policy::norm::NormError),
}

/// One observation in model units.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelInput {
    /// Pixels as the network sees them, `[cameras, size, size, 3]`, 0 to 255; zero for an absent camera.
    pub images: Vec<u8>,
    /// Which cameras were there.
    pub image_mask: Vec<bool>,
    /// Prompt ids, padded.
    pub prompt: Vec<i64>,
    /// Which of them are valid.
    pub prompt_mask: Vec<bool>,
    /// Normalised state padded with zeros, `[action_dim]`.
    pub state: Vec<f32>,
}

/// Makes model inputs as a bundle's manifest says.
#[derive(Debug)]
pub struct Preprocessor {
    manifest: Manifest,
    tokenizer: Tokenizer,
}

impl Preprocessor {
    /// The preprocessor of a bundle.
    ///
    /// # Errors
    /// A tokenizer that is not read.
    pub fn new(manifest: &Manifest, dir: &std::path::Path) -> Result<Self, PromptError> {
        let tokenizer = Tokenizer::from_config(&manifest.tokenizer, Some(dir))?;
        Ok(Self {
            manifest: manifest.clone(),
            tokenizer,
        })
    }

    /// Checks and converts one observation.
    ///
    /// # Errors
    /// Says what was expected and what came.
    pub fn prepare(&self, seen: &messages::Observation) -> Result<ModelInput, ObservationError> {
        let manifest = &self.manifest;
        let dims = &manifest.dims;
        if seen.images.len() != dims.cameras {
            return Err(ObservationError::Cameras {
                expected: dims.cameras,
                found: seen.images.len(),
                names: manifest.cameras.join(", "),
            });
        }
        if seen.images.iter().all(Option::is_none) {
            return Err(ObservationError::Blind);
        }
        let size = dims.vision.image_size;
        let mut images = Vec::with_capacity(dims.cameras * size * size * 3);
        for (image, camera) in seen.images.iter().zip(&manifest.cameras) {
            let Some(image) = image else {
                images.resize(images.len() + size * size * CHANNELS, 0);
                continue;
            };
            let shape = image.dims();
            let &[height, width, CHANNELS] = shape.as_slice() else {
                return Err(ObservationError::Shape {
                    camera: camera.clone(),
                    found: shape,
                });
            };
            let pixels = image.as_u8(camera, None)?;
            if (height, width) == (size, size) {
                images.extend_from_slice(pixels);
            } else {
                let fitted = RgbImage::new(height, width, pixels.to_vec())
                    .and_then(|image| resize_with_pad(&image, size, size))
                    .map_err(|source| ObservationError::Image {
                        camera: camera.clone(),
                        source,
                    })?;
                images.extend(fitted.into_data());
            }
        }
        let mut state = self.state(&seen.state)?;
        let tokens = if manifest.discrete_state_input {
            self.tokenizer
                .tokenize_with_state(&seen.prompt, &state, dims.prompt_len)?
        } else {
            self.tokenizer.tokenize(&seen.prompt, dims.prompt_len)?
        };
        state.resize(dims.action_dim, 0.0);
        Ok(ModelInput {
            images,
            image_mask: seen.images.iter().map(Option::is_some).collect(),
            prompt: tokens.ids,
            prompt_mask: tokens.mask,
            state,
        })
    }

    /// Checks what a client goes on from and brings it to model units. `state` is the one of its observation, in the environment's units.
    ///
    /// # Errors
    /// Says what was expected and what came.
    pub fn guidance(&self, wanted: &messages::Guidance, state: &[f32]) -> Result<Guidance, ObservationError> {
        let manifest = &self.manifest;
        let (width, horizon) = (manifest.env_action_dim, manifest.dims.action_horizon);
        let shape = wanted.previous.dims();
        let &[rows, columns] = shape.as_slice() else {
            return Err(ObservationError::Previous {
                found: shape,
                width,
                horizon,
            });
        };
        if rows == 0 || rows > horizon || columns != width {
            return Err(ObservationError::Previous {
                found: shape,
                width,
                horizon,
            });
        }
        if !(wanted.max_weight.is_finite() && wanted.max_weight > 0.0) {
            return Err(ObservationError::MaxWeight(wanted.max_weight));
        }
        let actions = wanted.previous.to_f32("guidance.previous", None)?;
        if let Some((index, value)) = actions.iter().enumerate().find(|(_, v)| !v.is_finite()) {
            return Err(ObservationError::NotFinite { index, value: *value });
        }
        let mut previous = Vec::with_capacity(actions.len());
        for row in actions.chunks_exact(width) {
            let row = match &manifest.delta_actions {
                Some(runs) => delta_from_absolute(row, state, &bool_mask(runs))?,
                None => row.to_vec(),
            };
            previous.extend(match &manifest.norm_stats {
                Some(stats) => manifest.normalization.normalize(&stats.actions, &row)?,
                None => row,
            });
        }
        Ok(Guidance::new(
            previous,
            width,
            horizon,
            wanted.delay as usize,
            f64::from(wanted.max_weight),
        ))
    }

    /// Checked and normalised, not padded yet.
    fn state(&self, state: &[f32]) -> Result<Vec<f32>, ObservationError> {
        let width = self.manifest.dims.action_dim;
        if state.len() > width {
            return Err(ObservationError::State {
                expected: width,
                found: state.len(),
            });
        }
        if let Some((index, value)) = state.iter().enumerate().find(|(_, v)| !v.is_finite()) {
            return Err(ObservationError::NotFinite { index, value: *value });
        }
        Ok(match &self.manifest.norm_stats {
            Some(stats) => self.manifest.normalization.normalize(&stats.state, state)?,
            None => state.to_vec(),
        })
    }
}

/// Puts inputs together; `size` is the side of an image. Pixels become `x / 255 * 2 - 1`, channels first.
pub fn batch(inputs: &[&ModelInput], size: usize) -> PrefixBatch {
    let plane = size * size;
    let mut images = Vec::with_capacity(inputs.iter().map(|i| i.images.len()).sum());
    for input in inputs {
        for camera in input.images.chunks_exact(plane * CHANNELS) {
            for channel in 0..CHANNELS {
                images.extend(camera.iter().skip(channel).step_by(CHANNELS).map(|p| normalise_u8(*p)));
            }
        }
    }
    PrefixBatch {
        rows: inputs.len(),
        images,
        image_mask: inputs.iter().flat_map(|i| i.image_mask.iter().copied()).collect(),
        prompt: inputs.iter().flat_map(|i| i.prompt.iter().copied()).collect(),
        prompt_mask: inputs.iter().flat_map(|i| i.prompt_mask.iter().copied()).collect(),
        state: inputs.iter().flat_map(|i| i.state.iter().copied()).collect(),
    }
}
