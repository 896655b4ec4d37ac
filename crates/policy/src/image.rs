//! Camera images: checked construction, resize with padding, and the scale to `[-1, 1]`.
//!
//! Two resizes exist because the reference has two. [`resize_with_pad`] works on bytes, before the model, with the
//! antialiased bilinear filter of the Python imaging library, bit for bit. [`resize_with_pad_f32`] works on images that are
//! already in `[-1, 1]`, without antialiasing, as the PyTorch model does for images of another size than its own.

/// Longest side accepted, in pixels.
pub const MAX_SIDE: usize = 8192;
/// Colours of a pixel.
pub const CHANNELS: usize = 3;

/// Bits after the binary point of a filter weight: 32 less 8 for the pixel and 2 for the sum.
const PRECISION_BITS: u32 = 32 - 8 - 2;

/// An image that cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ImageError {
    /// A side is zero or too long.
    #[error("image of {height} x {width} pixels, expected 1 to {MAX_SIDE} on each side")]
    Side {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
    },
    /// The data does not fill the image.
    #[error("image of {height} x {width} x {channels} has {found} values, expected {expected}")]
    Length {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
        /// Colours.
        channels: usize,
        /// `height * width * channels`.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// Scaled to the target, a side would have no pixel left.
    #[error(
        "image of {height} x {width} pixels is too narrow for {target_height} x {target_width}: no pixel would be left"
    )]
    Vanishes {
        /// Rows.
        height: usize,
        /// Columns.
        width: usize,
        /// Rows wanted.
        target_height: usize,
        /// Columns wanted.
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
    /// Takes `height * width * 3` bytes.
    ///
    /// # Errors
    /// A side is zero or above [`MAX_SIDE`], or the data has another length.
    pub fn new(height: usize, width: usize, data: Vec<u8>) -> Result<Self, ImageError> {
        check_sides(height, width)?;
        check_length(height, width, CHANNELS, data.len())?;
        Ok(Self { height, width, data })
    }

    /// Rows.
    pub fn height(&self) -> usize {
        self.height
    }

    /// Columns.
    pub fn width(&self) -> usize {
        self.width
    }

    /// The bytes, `[height, width, 3]`.
    pub fn data(&self) -> &[u8] {
        &self.data
    }

    /// The bytes, `[height, width, 3]`.
    pub fn into_data(self) -> Vec<u8> {
        self.data
    }

    /// The network's input: `[3, height, width]` in `[-1, 1]` (see [`normalise_u8`]).
    pub fn to_chw(&self) -> Vec<f32> {
        let mut planes = Vec::with_capacity(self.data.len());
        for channel in 0..CHANNELS {
            planes.extend(
                self.data
                    .chunks_exact(CHANNELS)
                    .filter_map(|p| p.get(channel))
                    .map(|v| normalise_u8(*v)),
            );
        }
        planes
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

/// A byte in `[-1, 1]`: `x / 255 * 2 - 1` in f32, in this order.
pub fn normalise_u8(value: u8) -> f32 {
    f32::from(value) / 255.0 * 2.0 - 1.0
}

/// Where the scaled image lies on the target canvas.
struct Placement {
    height: usize,
    width: usize,
    top: usize,
    left: usize,
}

/// Scales by the larger of the two ratios, rounds the sides down and centres (the odd pixel goes to the end).
fn place(height: usize, width: usize, target_height: usize, target_width: usize) -> Result<Placement, ImageError> {
    check_sides(height, width)?;
    check_sides(target_height, target_width)?;
    let ratio = (width as f64 / target_width as f64).max(height as f64 / target_height as f64);
    // the quotient may come out one ulp above the target side, never a whole pixel: the minimum is for the index proof
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

/// Resizes to `[target_height, target_width, 3]` keeping the aspect ratio, on a black canvas; an image of that size is
/// returned as it is.
///
/// Triangle filter, widened by the scale when shrinking; 8-bit result after each of the two passes (columns, then rows),
/// weights of 22 bits: the same bytes as the Python imaging library's `BILINEAR`.
///
/// # Errors
/// A target side is zero or above [`MAX_SIDE`], or a very narrow image would vanish.
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

/// The source pixels behind one target pixel: consecutive from `first`, each with its weight.
struct FixedTaps {
    first: usize,
    weights: Vec<i32>,
}

/// Triangle-filter weights from `from` to `to` pixels, rounded to [`PRECISION_BITS`].
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

/// Resizes planes `[channels, height, width]` with values in `[-1, 1]` to `[channels, target_height, target_width]`.
///
/// Bilinear between pixel centres, no antialiasing, clamped to `[-1, 1]`, on a canvas of -1 (black); planes of that size
/// are returned as they are. Matches PyTorch's `interpolate(mode="bilinear", align_corners=False)` within f32 rounding.
///
/// # Errors
/// A side is zero or above [`MAX_SIDE`], the data has another length, or a very narrow image would vanish.
pub fn resize_with_pad_f32(
    data: &[f32],
    channels: usize,
    (height, width): (usize, usize),
    (target_height, target_width): (usize, usize),
) -> Result<Vec<f32>, ImageError> {
    let to = place(height, width, target_height, target_width)?;
    check_length(height, width, channels, data.len())?;
    if height == target_height && width == target_width {
        return Ok(data.to_vec());
    }
    let (rows, columns) = (linear_taps(height, to.height), linear_taps(width, to.width));
    let mut canvas = vec![-1.0f32; channels * target_height * target_width];
    let planes = data.chunks_exact(height * width);
    for (source, target) in planes.zip(canvas.chunks_exact_mut(target_height * target_width)) {
        let line = |y: usize| source.get(y * width..(y + 1) * width).unwrap_or_default();
        for (out, row) in target.chunks_exact_mut(target_width).skip(to.top).zip(&rows) {
            let (upper, lower) = (line(row.low), line(row.high));
            for (value, column) in out.iter_mut().skip(to.left).zip(&columns) {
                *value = row.mix(column.pick(upper), column.pick(lower)).clamp(-1.0, 1.0);
            }
        }
    }
    Ok(canvas)
}

/// The two source pixels around a target pixel's centre and the share of the higher one.
struct LinearTap {
    low: usize,
    high: usize,
    share: f32,
}

impl LinearTap {
    fn mix(&self, low: f32, high: f32) -> f32 {
        (1.0 - self.share) * low + self.share * high
    }
    fn pick(&self, line: &[f32]) -> f32 {
        let at = |i: usize| line.get(i).copied().unwrap_or(-1.0);
        self.mix(at(self.low), at(self.high))
    }
}

fn linear_taps(from: usize, to: usize) -> Vec<LinearTap> {
    let scale = from as f32 / to as f32;
    (0..to)
        .map(|index| {
            // one rounding, as the reference's compiler fuses it: an ulp of a position is 1e-6 of a pixel's difference
            let centre = (index as f32 + 0.5).mul_add(scale, -0.5).max(0.0);
            let low = (centre as usize).min(from - 1);
            LinearTap {
                low,
                high: (low + 1).min(from - 1),
                share: centre - low as f32,
            }
        })
        .collect()
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
        assert!(matches!(
            resize_with_pad_f32(&[0.0; 5], 1, (2, 3), (4, 4)),
            Err(ImageError::Length { .. })
        ));
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
            let planes = vec![0.5f32; h * w];
            match (resize_with_pad(&image, th, tw), resize_with_pad_f32(&planes, 1, (h, w), (th, tw))) {
                (Ok(bytes), Ok(floats)) => {
                    for (pixel, float) in bytes.data().chunks_exact(3).zip(&floats) {
                        // weights of 22 bits sum to one within 2^-20, far below half a level
                        let inside = (*float + 1.0).abs() > 1e-6;
                        let want = if inside { value } else { 0 };
                        proptest::prop_assert!(pixel.iter().all(|v| *v == want));
                        proptest::prop_assert!(!inside || (*float - 0.5).abs() < 1e-6);
                    }
                    proptest::prop_assert!(floats.iter().any(|v| *v > 0.0));
                }
                (Err(a), Err(b)) => proptest::prop_assert_eq!(a, b),
                (a, b) => proptest::prop_assert!(false, "they differ: {:?} {:?}", a.is_ok(), b.is_ok()),
            }
        }
    }
}
