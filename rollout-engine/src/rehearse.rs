//! One drawn observation through pre-processing, both graphs and post-processing, before a robot depends on the policy.

use std::{collections::BTreeMap, fmt};

use policy::{
    config::TokenizerConfig,
    image::{CHANNELS, ImageError, RgbImage},
    noise::{NoiseKey, Purpose, below, stream, uniform},
    norm::{NormError, Normalization},
    transform::{ObservationError, RawObservation, Remark},
};
use wire::messages::Mode;

use crate::device::{
    Device,
    sampler::{ChunkInput, SampleError},
    versions::Policy,
};

/// Height and width of the drawn images in pixels, another aspect than the model's, so that the resize is part of the rehearsal.
const IMAGE: [usize; 2] = [48, 64];
/// Prompt for a `SentencePiece` model, which encodes every text.
const PROMPT: &str = "pick up the object";

/// Error of a rehearsal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RehearseError {
    /// An image cannot be drawn.
    #[error(transparent)]
    Image(#[from] ImageError),
    /// The policy rejects the drawn observation.
    #[error("the policy rejects an observation drawn for its own contract")]
    Observation(#[from] ObservationError),
    /// The device fails.
    #[error(transparent)]
    Sample(#[from] SampleError),
    /// The actions cannot be converted.
    #[error(transparent)]
    Norm(#[from] NormError),
    /// A command is not finite.
    #[error(
        "the command of row {row}, dimension {dimension}, is {value}, expected a finite number: check the statistics and the weights"
    )]
    NotFinite {
        /// Row of the chunk.
        row: usize,
        /// Dimension of the action.
        dimension: usize,
        /// NaN or infinity.
        value: f32,
    },
}

/// Commands of a drawn observation, in the robot's units.
#[derive(Debug, Clone, PartialEq)]
pub struct Commands {
    /// The drawn observation.
    pub observation: RawObservation,
    /// Properties of the observation that need attention.
    pub remarks: Vec<Remark>,
    /// Actions, `[action_horizon, env_action_dim]`.
    pub actions: Vec<f32>,
    /// Width of an action.
    pub env_action_dim: usize,
}

impl Commands {
    /// Returns the smallest and the largest command of each dimension over the chunk.
    pub fn ranges(&self) -> Vec<(f32, f32)> {
        (0..self.env_action_dim)
            .map(|dimension| {
                let column = self.actions.iter().skip(dimension).step_by(self.env_action_dim);
                column.fold((f32::INFINITY, f32::NEG_INFINITY), |(low, high), v| {
                    (low.min(*v), high.max(*v))
                })
            })
            .collect()
    }
}

impl fmt::Display for Commands {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let seen = &self.observation;
        let cameras: Vec<&str> = seen.images.keys().map(String::as_str).collect();
        write!(
            f,
            "drawn observation (cameras {}, state of {} numbers, prompt `{}`) gives {} rows of {} commands; first row, and the range over \
             the chunk:",
            cameras.join(", "),
            seen.state.len(),
            seen.prompt,
            self.actions.len() / self.env_action_dim.max(1),
            self.env_action_dim
        )?;
        for (dimension, (first, (low, high))) in self.actions.iter().zip(self.ranges()).enumerate() {
            let separator = if dimension == 0 { "" } else { "," };
            write!(f, "{separator} [{dimension}] {first:.4} ({low:.4} to {high:.4})")?;
        }
        Ok(())
    }
}

/// Draws an observation for the contract of a policy: an image of every camera, a state within the statistics, a prompt.
///
/// # Errors
/// An image cannot be made.
pub fn drawn_observation(policy: &Policy, seed: u64) -> Result<RawObservation, ImageError> {
    let mut rng = stream(Purpose::SelfTest, seed, 1, 0, 0);
    let contract = policy.transform.contract();
    let [height, width] = IMAGE;
    let mut images = BTreeMap::new();
    for camera in &contract.cameras {
        let pixels = (0..height * width * CHANNELS).map(|_| below(&mut rng, 256) as u8);
        images.insert(camera.clone(), RgbImage::new(height, width, pixels.collect())?);
    }
    let widths = contract.state_width();
    let stats = contract.norm_stats.as_ref().map(|stats| &stats.state);
    let (numbers, normalization) = match stats {
        Some(_) if contract.normalization != Normalization::None => {
            (widths.least.max(1).min(widths.most), contract.normalization)
        }
        _ => (widths.most, Normalization::None),
    };
    let state = (0..numbers).map(|index| {
        let part = uniform(&mut rng);
        let at = |values: Option<&Vec<f64>>| values.and_then(|v| v.get(index).copied()).unwrap_or(0.0);
        let value = match (normalization, stats) {
            (Normalization::ZScore, Some(stats)) => (2.0 * part - 1.0) * at(Some(&stats.std)) + at(Some(&stats.mean)),
            (Normalization::Quantile, Some(stats)) => {
                let low = at(stats.q01.as_ref());
                low + part * (at(stats.q99.as_ref()) - low)
            }
            _ => 2.0 * part - 1.0,
        };
        value as f32
    });
    let state = state.collect();
    let prompt = match &policy.manifest().tokenizer {
        TokenizerConfig::Words { words } => {
            let word = words.iter().find(|word| word.chars().all(char::is_alphabetic));
            word.cloned().unwrap_or_default()
        }
        TokenizerConfig::SentencePiece { .. } => PROMPT.to_owned(),
    };
    Ok(RawObservation { images, state, prompt })
}

/// Converts a drawn observation, runs both graphs, and converts the actions to commands.
///
/// # Errors
/// The observation is rejected, the device fails, or a command is not finite.
pub fn rehearse<D: Device>(device: &mut D, policy: &Policy, seed: u64) -> Result<Commands, RehearseError> {
    let observation = drawn_observation(policy, seed)?;
    let (input, remarks) = policy.transform.input_with_remarks(&observation)?;
    let key = NoiseKey {
        seed,
        env: 0,
        episode: 0,
        chunk: 0,
    };
    let row = ChunkInput {
        input,
        noise: policy.sampler().draw(key, Mode::Eval),
        key,
        guidance: None,
    };
    let sampled = policy.sampler().sample(device, policy.slot(), vec![row], None)?;
    let chunk = sampled.chunks.first().ok_or(SampleError::Short)?;
    let actions = policy.transform.env_actions(chunk.actions(), &observation.state)?;
    let env_action_dim = policy.manifest().env_action_dim;
    if let Some((index, value)) = actions.iter().enumerate().find(|(_, v)| !v.is_finite()) {
        return Err(RehearseError::NotFinite {
            row: index / env_action_dim.max(1),
            dimension: index % env_action_dim.max(1),
            value: *value,
        });
    }
    Ok(Commands {
        observation,
        remarks,
        actions,
        env_action_dim,
    })
}
