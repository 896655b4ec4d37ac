//! Conversion of wire rows to job rows: images get the names of their cameras, arrays are checked.

use std::collections::BTreeMap;

use policy::{
    image::{CHANNELS, ImageError, RgbImage},
    transform::{RawGuidance, RawObservation},
};
use wire::{
    array::ArrayError,
    messages::{ActRow, Guidance, Observation},
};

use crate::job::Row;

/// A row that does not match the policy's observations.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RowError {
    /// The number of images differs from the number of cameras.
    #[error("observation has {found} images, the policy has {expected} cameras ({names})")]
    Cameras {
        /// Cameras of the policy.
        expected: usize,
        /// Images of the observation.
        found: usize,
        /// Names of the cameras.
        names: String,
    },
    /// An array has a wrong type or length.
    #[error(transparent)]
    Array(#[from] ArrayError),
    /// An image has a wrong shape.
    #[error("image of camera `{camera}` has shape {found:?}, expected [height, width, 3]")]
    Shape {
        /// Name of the camera.
        camera: String,
        /// Shape of the image.
        found: Vec<usize>,
    },
    /// The size of an image is invalid.
    #[error("camera `{camera}`")]
    Image {
        /// Name of the camera.
        camera: String,
        /// Cause.
        source: ImageError,
    },
    /// The previous chunk has a wrong shape.
    #[error("guidance.previous has shape {found:?}, expected [rows, env_action_dim]")]
    Previous {
        /// Shape of the array.
        found: Vec<usize>,
    },
}

/// Returns the row of a job. Images on the wire are in the order of the policy's `cameras`.
pub(crate) fn row(row: ActRow, cameras: &[String]) -> Result<Row, RowError> {
    Ok(Row {
        observation: observation(row.observation, cameras)?,
        key: row.key,
        mode: row.mode,
        record: row.record,
        guidance: row.guidance.map(guidance).transpose()?,
    })
}

fn observation(seen: Observation, cameras: &[String]) -> Result<RawObservation, RowError> {
    if seen.images.len() != cameras.len() {
        return Err(RowError::Cameras {
            expected: cameras.len(),
            found: seen.images.len(),
            names: cameras.join(", "),
        });
    }
    let mut images = BTreeMap::new();
    for (image, camera) in seen.images.into_iter().zip(cameras) {
        let Some(image) = image else { continue };
        let shape = image.dims();
        let &[height, width, CHANNELS] = shape.as_slice() else {
            return Err(RowError::Shape {
                camera: camera.clone(),
                found: shape,
            });
        };
        image.as_u8(camera, None)?;
        let image = RgbImage::new(height, width, image.data).map_err(|source| RowError::Image {
            camera: camera.clone(),
            source,
        })?;
        images.insert(camera.clone(), image);
    }
    Ok(RawObservation {
        images,
        state: seen.state,
        prompt: seen.prompt,
    })
}

fn guidance(guidance: Guidance) -> Result<RawGuidance, RowError> {
    let found = guidance.previous.dims();
    let &[_, columns] = found.as_slice() else {
        return Err(RowError::Previous { found });
    };
    Ok(RawGuidance {
        previous: guidance.previous.to_f32("guidance.previous", None)?,
        columns,
        delay: guidance.delay as usize,
        max_weight: guidance.max_weight,
    })
}
