//! Drawing of anti-aliased discs on a small RGB canvas.

use crate::env::Image;

/// Square canvas of linear RGB in `[0, 1]`; x runs to the right, y down, both in `[0, 1]`.
#[derive(Debug, Clone)]
pub struct Canvas {
    size: usize,
    pixels: Vec<[f32; 3]>,
}

impl Canvas {
    /// Returns a canvas of `size * size` pixels filled with one gray level.
    pub fn new(size: usize, grey: f32) -> Self {
        Self {
            size,
            pixels: vec![[grey; 3]; size * size],
        }
    }

    /// Paints a disc: coverage `clamp((r - |pixel - center|) * size + 1/2, 0, 1)` at pixel centers `(i + 1/2) / size`.
    pub fn disc(&mut self, centre: [f32; 2], radius: f32, colour: [f32; 3]) {
        let size = self.size as f32;
        let reach = radius + 1.0 / size;
        let range = |c: f32| {
            let from = ((c - reach) * size).floor().clamp(0.0, size) as usize;
            let to = ((c + reach) * size).ceil().clamp(0.0, size) as usize;
            from..to
        };
        for row in range(centre[1]) {
            for column in range(centre[0]) {
                let dx = (column as f32 + 0.5) / size - centre[0];
                let dy = (row as f32 + 0.5) / size - centre[1];
                let alpha = ((radius - dx.hypot(dy)) * size + 0.5).clamp(0.0, 1.0);
                if let Some(pixel) = self.pixels.get_mut(row * self.size + column) {
                    for (value, wanted) in pixel.iter_mut().zip(colour) {
                        *value += (wanted - *value) * alpha;
                    }
                }
            }
        }
    }

    /// Returns the canvas as bytes, `round(255 v)`.
    pub fn image(&self) -> Image {
        let data = self
            .pixels
            .iter()
            .flatten()
            .map(|v| (v * 255.0).round() as u8)
            .collect();
        Image {
            height: self.size,
            width: self.size,
            data,
        }
    }
}
