//! Film of an episode: the same episode with several policy versions, side by side, as a GIF.

use std::path::Path;

use plotters::{drawing::DrawingAreaErrorKind, prelude::*};
use wire::messages::Trajectory;

use crate::{
    error::{LearnerError, Result, io},
    report::font,
};

/// Display time of a GIF frame in hundredths of a second.
const FRAME_CENTISECONDS: u16 = 12;
/// Number of repeats of the last frame.
const LAST_FRAMES: usize = 8;
/// Height of a text line under a frame, in pixels.
const STRIP: usize = 26;

type DrawError = DrawingAreaErrorKind<<BitMapBackend<'static> as DrawingBackend>::ErrorType>;

/// Film that cannot be made.
#[derive(Debug, thiserror::Error)]
enum FilmError {
    #[error("found no frames; the env worker must send them")]
    NoFrames,
    #[error("failed to draw a caption")]
    Caption(#[source] DrawError),
    #[error("failed to encode the GIF")]
    Encode(#[source] gif::EncodingError),
}

struct Frame {
    width: usize,
    height: usize,
    rgb: Vec<u8>,
}

/// Returns all frames of an episode.
fn frames(trajectory: &Trajectory) -> Vec<Frame> {
    let all = trajectory.chunks.iter().flat_map(|c| &c.frames);
    all.filter_map(|array| {
        let [height, width, 3] = array.dims()[..] else {
            return None;
        };
        let rgb = array.as_u8("frame", Some(&[height, width, 3])).ok()?.to_vec();
        Some(Frame { width, height, rgb })
    })
    .collect()
}

/// Returns the index of the first episode in which the first version fails and the last version succeeds, otherwise 0.
fn chosen(films: &[(u64, Vec<Trajectory>)]) -> usize {
    let at = |film: Option<&(u64, Vec<Trajectory>)>, i: usize| {
        film.and_then(|f| f.1.get(i))
            .map(|t| (t.success, !frames(t).is_empty()))
    };
    let count = films.first().map_or(0, |f| f.1.len());
    (0..count)
        .find(|i| at(films.first(), *i) == Some((false, true)) && at(films.last(), *i) == Some((true, true)))
        .unwrap_or(0)
}

/// Writes a GIF of the same episode with each version side by side, and version, prompt and outcome below.
///
/// # Errors
/// No frames came, or the file cannot be written.
pub fn episode_gif(path: &Path, films: &[(u64, Vec<Trajectory>)]) -> Result<()> {
    let bad = |error: FilmError| LearnerError::Picture {
        path: path.to_owned(),
        source: Box::new(error),
    };
    let encode = |error| bad(FilmError::Encode(error));
    let index = chosen(films);
    let panels: Vec<(String, String, Vec<Frame>)> = films
        .iter()
        .filter_map(|(version, episodes)| {
            let episode = episodes.get(index)?;
            let outcome = if episode.success { "success" } else { "failure" };
            Some((
                format!("version {version}: {outcome}"),
                episode.prompt.clone(),
                frames(episode),
            ))
        })
        .collect();
    let (Some(width), Some(height)) = (
        panels.iter().flat_map(|p| &p.2).map(|f| f.width).max(),
        panels.iter().flat_map(|p| &p.2).map(|f| f.height).max(),
    ) else {
        return Err(bad(FilmError::NoFrames));
    };
    let (total_width, total_height) = (width * panels.len(), height + 2 * STRIP);
    let count = panels.iter().map(|p| p.2.len()).max().unwrap_or(0) + LAST_FRAMES;
    let beside = path.with_extension("writing.gif");
    let file = std::fs::File::create(&beside).map_err(io("creating", &beside))?;
    let mut encoder = gif::Encoder::new(file, total_width as u16, total_height as u16, &[]).map_err(encode)?;
    encoder.set_repeat(gif::Repeat::Infinite).map_err(encode)?;
    font();
    for number in 0..count {
        let mut canvas = vec![255u8; total_width * total_height * 3];
        for (panel, (_, _, frames)) in panels.iter().enumerate() {
            let Some(frame) = frames.get(number.min(frames.len().saturating_sub(1))) else {
                continue;
            };
            for (row, line) in frame.rgb.chunks(frame.width * 3).enumerate() {
                let at = (row * total_width + panel * width) * 3;
                if let Some(place) = canvas.get_mut(at..at + line.len()) {
                    place.copy_from_slice(line);
                }
            }
        }
        caption(&mut canvas, (total_width, total_height), width, height, &panels)
            .map_err(|error| bad(FilmError::Caption(error)))?;
        let mut frame = gif::Frame::from_rgb_speed(total_width as u16, total_height as u16, &canvas, 10);
        frame.delay = FRAME_CENTISECONDS;
        encoder.write_frame(&frame).map_err(encode)?;
    }
    drop(encoder);
    std::fs::rename(&beside, path).map_err(io("renaming to", path))
}

fn caption(
    canvas: &mut [u8],
    (total_width, total_height): (usize, usize),
    width: usize,
    height: usize,
    panels: &[(String, String, Vec<Frame>)],
) -> Result<(), DrawError> {
    let root = BitMapBackend::with_buffer(canvas, (total_width as u32, total_height as u32)).into_drawing_area();
    for (panel, (title, prompt, _)) in panels.iter().enumerate() {
        for (line, text) in [format!("\u{201c}{prompt}\u{201d}"), title.clone()]
            .into_iter()
            .enumerate()
        {
            let place = ((panel * width + 6) as i32, (height + line * STRIP + 5) as i32);
            root.draw(&Text::new(text, place, ("sans-serif", 15).into_font().color(&BLACK)))?;
        }
    }
    root.present()
}
