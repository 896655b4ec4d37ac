//! Success rates over training episodes as a PNG: panels of curves.

use std::path::Path;

use plotters::{coord::Shift, drawing::DrawingAreaErrorKind, prelude::*};

use super::series::Spread;
use crate::error::{LearnerError, Result, io};

type DrawError = DrawingAreaErrorKind<<BitMapBackend<'static> as DrawingBackend>::ErrorType>;

/// Width and height of a single panel in pixels.
const LONE: (u32, u32) = (1000, 560);
/// Width and height of each of several panels in pixels.
const PANEL: (u32, u32) = (560, 400);

/// Curve of one series, with the range of its points as a band.
#[derive(Debug, Clone)]
pub(super) struct Curve {
    /// Name in the legend.
    pub(super) label: String,
    pub(super) colour: RGBColor,
    /// Whether the points are marked, for curves with few points.
    pub(super) marks: bool,
    pub(super) points: Vec<Spread>,
}

/// Title with the curves below.
#[derive(Debug, Clone)]
pub(super) struct Panel {
    pub(super) title: String,
    pub(super) curves: Vec<Curve>,
}

/// Registers the embedded font, so that pictures do not depend on the fonts of the machine.
pub(crate) fn font() {
    let registered = plotters::style::register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular());
    #[expect(
        clippy::expect_used,
        reason = "the font is a constant of this program and is only refused when it is not a font"
    )]
    registered.ok().expect("a readable font");
}

/// Draws the panels with the same range of episodes, several panels in rows of two.
///
/// # Errors
/// The picture cannot be written.
pub(super) fn draw(panels: &[Panel], out: &Path) -> Result<()> {
    let beside = out.with_extension("writing.png");
    draw_all(panels, &beside).map_err(|error| LearnerError::Picture {
        path: out.to_owned(),
        source: Box::new(error),
    })?;
    std::fs::rename(&beside, out).map_err(io("renaming to", out))
}

fn draw_all(panels: &[Panel], out: &Path) -> Result<(), DrawError> {
    font();
    let (columns, (width, height)) = if panels.len() == 1 { (1, LONE) } else { (2, PANEL) };
    let rows = panels.len().div_ceil(columns);
    let curves = panels.iter().flat_map(|panel| &panel.curves);
    let last = curves.flat_map(|curve| &curve.points).map(|s| s.x).fold(1.0, f64::max);
    let root = BitMapBackend::new(out, (width * columns as u32, height * rows as u32)).into_drawing_area();
    root.fill(&WHITE)?;
    for (panel, area) in panels.iter().zip(root.split_evenly((rows, columns))) {
        draw_panel(panel, last, &area)?;
    }
    root.present()
}

fn draw_panel(panel: &Panel, last: f64, area: &DrawingArea<BitMapBackend<'_>, Shift>) -> Result<(), DrawError> {
    let mut chart = ChartBuilder::on(area)
        .caption(&panel.title, ("sans-serif", 22))
        .margin(14)
        .x_label_area_size(44)
        .y_label_area_size(56)
        .build_cartesian_2d(0.0..last, 0.0..1.0)?;
    chart
        .configure_mesh()
        .x_desc("training episodes")
        .y_desc("success rate")
        .x_labels(6)
        .label_style(("sans-serif", 15))
        .axis_desc_style(("sans-serif", 16))
        .x_label_formatter(&|x| format!("{x:.0}"))
        .light_line_style(TRANSPARENT)
        .draw()?;
    for curve in &panel.curves {
        let (colour, points) = (curve.colour, &curve.points);
        let low = points.iter().map(|s| (s.x, s.low));
        let band: Vec<(f64, f64)> = low.chain(points.iter().rev().map(|s| (s.x, s.high))).collect();
        chart.draw_series(std::iter::once(Polygon::new(band, colour.mix(0.12))))?;
        chart
            .draw_series(LineSeries::new(
                points.iter().map(|s| (s.x, s.mean)),
                colour.stroke_width(2),
            ))?
            .label(&curve.label)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 22, y)], colour.stroke_width(2)));
        if curve.marks {
            chart.draw_series(points.iter().map(|s| Circle::new((s.x, s.mean), 3, colour.filled())))?;
        }
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::LowerRight)
        .label_font(("sans-serif", 15))
        .background_style(WHITE)
        .border_style(RGBColor(200, 200, 200))
        .draw()?;
    Ok(())
}
