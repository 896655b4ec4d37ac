//! Success rates over training episodes as a PNG: panels of curves.

use std::path::Path;

use plotters::{coord::Shift, prelude::*};

use super::series::Spread;
use crate::error::{LearnerError, Result};

/// Size of a lone panel in pixels.
const LONE: (u32, u32) = (1000, 560);
/// Size of a panel where there are several.
const PANEL: (u32, u32) = (560, 400);

/// One curve; where its points have a range, that is a band.
#[derive(Debug, Clone)]
pub(super) struct Curve {
    /// In the legend.
    pub(super) label: String,
    pub(super) colour: RGBColor,
    /// The points are few and each is marked.
    pub(super) marks: bool,
    pub(super) points: Vec<Spread>,
}

/// A title and the curves below it.
#[derive(Debug, Clone)]
pub(super) struct Panel {
    pub(super) title: String,
    pub(super) curves: Vec<Curve>,
}

/// Registers the embedded font: a picture must not depend on the fonts of the machine.
pub(crate) fn font() -> Result<(), String> {
    plotters::style::register_font("sans-serif", FontStyle::Normal, dejavu::sans::regular())
        .map_err(|_e| "the embedded font is not readable".to_owned())
}

/// Draws the panels, two in a row where there are several, all over the same episodes.
///
/// # Errors
/// The picture cannot be written.
pub(super) fn draw(panels: &[Panel], out: &Path) -> Result<()> {
    write(panels, out).map_err(|detail| LearnerError::Picture {
        path: out.to_owned(),
        detail,
    })
}

fn write(panels: &[Panel], out: &Path) -> Result<(), String> {
    font()?;
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let (columns, (width, height)) = if panels.len() == 1 { (1, LONE) } else { (2, PANEL) };
    let rows = panels.len().div_ceil(columns);
    let curves = panels.iter().flat_map(|panel| &panel.curves);
    let last = curves.flat_map(|curve| &curve.points).map(|s| s.x).fold(1.0, f64::max);
    let beside = out.with_extension("writing.png");
    {
        let root = BitMapBackend::new(&beside, (width * columns as u32, height * rows as u32)).into_drawing_area();
        root.fill(&WHITE).map_err(|e| text(&e))?;
        for (panel, area) in panels.iter().zip(root.split_evenly((rows, columns))) {
            draw_panel(panel, last, &area).map_err(|e| text(&*e))?;
        }
        root.present().map_err(|e| text(&e))?;
    }
    std::fs::rename(&beside, out).map_err(|e| text(&e))
}

fn draw_panel(
    panel: &Panel,
    last: f64,
    area: &DrawingArea<BitMapBackend<'_>, Shift>,
) -> Result<(), Box<dyn std::error::Error>> {
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
