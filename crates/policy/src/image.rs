//! Camera images: checked construction, resize with padding, and the scale to `[-1, 1]`.
//!
//! The reference has a second resize in its PyTorch model, for float images of another size than the model's. Here
//! [`resize_with_pad`] resizes every image as bytes before the conversion to floats, so that no second resize is necessary.

/// Longest side accepted, in pixels.
pub const MAX_SIDE: usize = 8192;
/// Color channels of a pixel.
pub const CHANNELS: usize = 3;

/// Bits after the binary point of a filter weight: 32 minus 8 for the pixel and 2 for the sum.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// Reason for rejecting an image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A side is zero or too long.
    #[error("image of {height} x {width} pixels, expected 1 to {MAX_SIDE} on each side")]
    Side {
        /// Height in pixels.
        height: usize,
        /// Width in pixels.
        width: usize,
    },
    /// Data of another length than the image's.
    #[error("image of {height} x {width} x {channels} has {found} values, expected {expected}")]
    Length {
        /// Height in pixels.
        height: usize,
        /// Width in pixels.
        width: usize,
        /// Color channels of a pixel.
        channels: usize,
        /// Number of values expected, `height * width * channels`.
        expected: usize,
        /// Number of values found.
        found: usize,
    },
    /// An image so narrow that a side would have 0 pixels after scaling.
    #[error(
        "image of {height} x {width} pixels is too narrow for {target_height} x {target_width}: no pixel would be left"
    )]
    Vanishes {
        /// Height in pixels.
        height: usize,
        /// Width in pixels.
        width: usize,
        /// Height of the target in pixels.
        target_height: usize,
        /// Width of the target in pixels.
        target_width: usize,
    },
}

/// An RGB image of bytes, `[height, width, 3]`, row-major.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RgbImage {
    height: usize,
    width: usize,
    data: Vec<u8>,
}

impl RgbImage {
    /// Makes an image from `height * width * 3` bytes.
    ///
    /// # Errors
    /// A side is zero or above [`MAX_SIDE`], or the data has another length.
    pub fn new(height: usize, width: usize, data: Vec<u8>) -> Result<Self, ImageError> {
        check_sides(height, width)?;
        check_length(height, width, CHANNELS, data.len())?;
        Ok(Self { height, width, data })
    }

    /// Returns the height in pixels.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Returns the width in pixels.
    pub fn width(&self) -> usize {
        self.width
    }

    /// Returns the bytes, `[height, width, 3]`.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// Returns the bytes, `[height, width, 3]`, without a copy.
    pub fn into_data(self) -> Vec<u8> {
        self.data
    }
}

fn check_sides(height: usize, width: usize) -> Result<(), ImageError> {
    if (1..=MAX_SIDE).contains(&height) && (1..=MAX_SIDE).contains(&width) {
        return Ok(());
    }
    Err(ImageError::Side { height, width })
}

fn check_length(height: usize, width: usize, channels: usize, found: usize) -> Result<(), ImageError> {
    let expected = height.saturating_mul(width).saturating_mul(channels);
    if found == expected {
        return Ok(());
    }
    Err(ImageError::Length {
        height,
        width,
        channels,
        expected,
        found,
    })
}

/// Maps a byte to `[-1, 1]` by `x / 255 * 2 - 1` in f32, in this order.
pub fn normalise_u8(value: u8) -> f32 {
    f32::from(value) / 255.0 * 2.0 - 1.0
}

/// Size and position of the scaled image on the target canvas, in pixels.
struct Placement {
    height: usize,
    width: usize,
    top: usize,
    left: usize,
}

/// Scales by the larger of the two ratios, rounds the sides down and centers; an odd pixel of padding goes to the end.
fn place(height: usize, width: usize, target_height: usize, target_width: usize) -> Result<Placement, ImageError> {
    check_sides(height, width)?;
    check_sides(target_height, target_width)?;
    let ratio = (width as f64 / target_width as f64).max(height as f64 / target_height as f64);
    // the quotient may be one ulp above the target side, never a whole pixel: the minimum keeps the indices in bounds
    let new_height = ((height as f64 / ratio) as usize).min(target_height);
    let new_width = ((width as f64 / ratio) as usize).min(target_width);
    if new_height == 0 || new_width == 0 {
        return Err(ImageError::Vanishes {
            height,
            width,
            target_height,
            target_width,
        });
    }
    Ok(Placement {
        height: new_height,
        width: new_width,
        top: (target_height - new_height) / 2,
        left: (target_width - new_width) / 2,
    })
}

/// Resizes to `[target_height, target_width, 3]` with the aspect ratio kept, on a black canvas.
///
/// An image of the target size is returned unchanged. Otherwise a triangle filter, widened by the scale when shrinking, runs in
/// two passes (columns, then rows). Each pass has weights of 22 bits and an 8-bit result. The bytes are the same as of the
/// Python Imaging Library's `BILINEAR`.
///
/// # Errors
/// A target side is zero or above [`MAX_SIDE`], or a side of a very narrow image would have 0 pixels.
pub fn resize_with_pad(image: &RgbImage, target_height: usize, target_width: usize) -> Result<RgbImage, ImageError> {
    let to = place(image.height, image.width, target_height, target_width)?;
    if image.height == target_height && image.width == target_width {
        return Ok(image.clone());
    }
    let row = image.width * CHANNELS;
    let new_row = to.width * CHANNELS;

    let mut columns = vec![0u8; image.height * new_row];
    let taps = fixed_taps(image.width, to.width);
    for (source, target) in image.data.chunks_exact(row).zip(columns.chunks_exact_mut(new_row)) {
        for (pixel, tap) in target.chunks_exact_mut(CHANNELS).zip(&taps) {
            for (channel, value) in pixel.iter_mut().enumerate() {
                *value = weigh(
                    &tap.weights,
                    source.iter().skip(tap.first * CHANNELS + channel).step_by(CHANNELS),
                );
            }
        }
    }

    let mut canvas = vec![0u8; target_height * target_width * CHANNELS];
    let taps = fixed_taps(image.height, to.height);
    let rows = canvas.chunks_exact_mut(target_width * CHANNELS).skip(to.top);
    for (target, tap) in rows.zip(&taps) {
        for (index, value) in target.iter_mut().skip(to.left * CHANNELS).take(new_row).enumerate() {
            *value = weigh(
                &tap.weights,
                columns.iter().skip(tap.first * new_row + index).step_by(new_row),
            );
        }
    }
    Ok(RgbImage {
        height: target_height,
        width: target_width,
        data: canvas,
    })
}

/// Weights of the source pixels of one target pixel, consecutive from `first`.
struct FixedTaps {
    first: usize,
    weights: Vec<i32>,
}

/// Returns the triangle-filter weights for a resize from `from` to `to` pixels, rounded to [`PRECISION_BITS`].
fn fixed_taps(from: usize, to: usize) -> Vec<FixedTaps> {
    let scale = from as f64 / to as f64;
    let support = scale.max(1.0);
    (0..to)
        .map(|index| {
            let centre = (index as f64 + 0.5) * scale;
            let first = (centre - support + 0.5).max(0.0) as usize;
            let end = ((centre + support + 0.5) as usize).min(from);
            let triangle = |i: usize| (1.0 - ((i as f64 - centre + 0.5) * (1.0 / support)).abs()).max(0.0);
            let weights: Vec<f64> = (first..end).map(triangle).collect();
            let sum: f64 = weights.iter().sum();
            let unit = f64::from(1u32 << PRECISION_BITS);
            FixedTaps {
                first,
                weights: weights.iter().map(|w| (0.5 + w / sum * unit) as i32).collect(),
            }
        })
        .collect()
}

fn weigh<'a>(weights: &[i32], pixels: impl Iterator<Item = &'a u8>) -> u8 {
    let half = 1i32 << (PRECISION_BITS - 1);
    // the weights sum to one within their rounding, so the sum stays below 2^31
    let sum = weights
        .iter()
        .zip(pixels)
        .fold(half, |sum, (w, p)| sum + w * i32::from(*p));
    (sum >> PRECISION_BITS).clamp(0, 255) as u8
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sides_and_length_are_checked_before_use() {
        assert_eq!(
            RgbImage::new(0, 4, vec![]),
            Err(ImageError::Side { height: 0, width: 4 })
        );
        assert_eq!(
            RgbImage::new(1, MAX_SIDE + 1, vec![]),
            Err(ImageError::Side {
                height: 1,
                width: MAX_SIDE + 1
            })
        );
        let error = RgbImage::new(2, 2, vec![0; 11])
            .expect_err("one byte short")
            .to_string();
        assert!(error.contains("11") && error.contains("12"), "{error}");
        let image = RgbImage::new(1, 1000, vec![0; 3000]).expect("valid");
        assert!(matches!(
            resize_with_pad(&image, 8, 8),
            Err(ImageError::Vanishes { .. })
        ));
        assert!(matches!(resize_with_pad(&image, 0, 8), Err(ImageError::Side { .. })));
    }

    #[test]
    fn the_ends_of_the_byte_range_are_the_ends_of_the_network_range() {
        assert_eq!(
            (normalise_u8(0).to_bits(), normalise_u8(255).to_bits()),
            ((-1.0f32).to_bits(), 1.0f32.to_bits())
        );
    }

    proptest::proptest! {
        #[test]
        fn a_flat_image_stays_flat_and_centred(
            (h, w) in (1usize..40, 1usize..40), (th, tw) in (1usize..40, 1usize..40), value in 1u8..,
        ) {
            let image = RgbImage::new(h, w, vec![value; h * w * 3]).expect("valid");
            let resized = match resize_with_pad(&image, th, tw) {
                Ok(resized) => resized,
                // the longer side fills the target, the shorter side has less than one pixel
                Err(error) => {
                    let vanishes = h * tw < w || w * th < h;
                    proptest::prop_assert!(vanishes && matches!(error, ImageError::Vanishes { .. }), "{error}");
                    return Ok(());
                }
            };
            let at = |y: usize, x: usize| &resized.data()[(y * tw + x) * 3..][..3];
            let rows: Vec<usize> = (0..th).filter(|y| (0..tw).any(|x| at(*y, x) != [0; 3])).collect();
            let columns: Vec<usize> = (0..tw).filter(|x| (0..th).any(|y| at(y, *x) != [0; 3])).collect();
            proptest::prop_assert!(!rows.is_empty() && !columns.is_empty());
            for (y, x) in rows.iter().flat_map(|y| columns.iter().map(move |x| (*y, *x))) {
                proptest::prop_assert_eq!(at(y, x), [value; 3]);
            }
            for (lines, side) in [(&rows, th), (&columns, tw)] {
                let (before, after) = (lines[0], side - 1 - lines[lines.len() - 1]);
                proptest::prop_assert_eq!(lines.len(), side - before - after, "a gap");
                proptest::prop_assert!(after == before || after == before + 1, "{} before, {} after", before, after);
            }
            // a quotient slightly below the target side loses one pixel
            proptest::prop_assert!(rows.len() + 1 >= th || columns.len() + 1 >= tw);
        }
    }
}
