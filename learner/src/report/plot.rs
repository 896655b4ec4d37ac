//! The success curves of several series as a PNG, for places that show no HTML.

use std::path::Path;

use plotters::prelude::*;

use super::{
    run::Run,
    series::{Spread, group, spread},
};
use crate::{
    error::{LearnerError, Result},
    picture::font,
};

/// Size of a lone chart in pixels.
const SIZE: (u32, u32) = (1000, 560);
/// Size of a panel where there are several.
const PANEL: (u32, u32) = (560, 400);
/// Colours that stay apart for most kinds of colour blindness (Okabe and Ito 2008); they repeat.
const COLOURS: [(u8, u8, u8); 8] = [
    (0, 114, 178),
    (213, 94, 0),
    (0, 158, 115),
    (204, 121, 167),
    (86, 180, 233),
    (230, 159, 0),
    (90, 90, 90),
    (160, 130, 0),
];

/// Draws success on unseen episodes over training episodes: the mean of each series and, of several runs, its range. Series that are
/// called `FACTOR.VALUE` are drawn in a panel for each factor, the others in every panel.
///
/// # Errors
/// The picture cannot be written.
pub(super) fn draw(runs: &[Run], out: &Path) -> Result<()> {
    let lines: Vec<(String, Vec<Spread>)> = group(runs)
        .iter()
        .map(|members| {
            let curves: Vec<Vec<(f64, f64)>> = members
                .iter()
                .map(|run| run.eval.iter().map(|p| (p.episodes, p.success)).collect())
                .collect();
            (name(members), spread(&curves))
        })
        .collect();
    plot(&lines, out).map_err(|detail| LearnerError::Picture {
        path: out.to_owned(),
        detail,
    })
}

/// What the names of a series' runs have in common, without the number of the seed.
fn name(members: &[&Run]) -> String {
    let first = members.first().map_or("", |run| run.name.as_str());
    let common = members.iter().fold(first.len(), |most, run| {
        let same = first.bytes().zip(run.name.bytes()).take_while(|(a, b)| a == b).count();
        most.min(same)
    });
    let common = first
        .get(..common)
        .unwrap_or(first)
        .trim_end_matches(|c: char| c.is_ascii_digit());
    let common = common
        .strip_suffix("seed")
        .unwrap_or(common)
        .trim_end_matches(['-', '_']);
    let folder = common.rsplit('/').next().unwrap_or(common);
    if folder.is_empty() { first } else { folder }.to_owned()
}

/// A title and the lines below it.
type Panel<'a> = (String, Vec<(&'a str, &'a [Spread])>);

/// A panel for each factor, or one for all where there is none.
fn panels(lines: &[(String, Vec<Spread>)]) -> Vec<Panel<'_>> {
    let mut factors: Vec<&str> = lines
        .iter()
        .filter_map(|(name, _)| name.split_once('.'))
        .map(|f| f.0)
        .collect();
    factors.dedup();
    let title = "success on unseen episodes (ODE)";
    if factors.is_empty() {
        let all = lines.iter().map(|(name, points)| (name.as_str(), points.as_slice()));
        return vec![(title.to_owned(), all.collect())];
    }
    factors
        .into_iter()
        .map(|factor| {
            let shown = lines.iter().filter_map(|(name, points)| match name.split_once('.') {
                None => Some((name.as_str(), points.as_slice())),
                Some((own, value)) => (own == factor).then_some((value, points.as_slice())),
            });
            (factor.to_owned(), shown.collect())
        })
        .collect()
}

fn plot(lines: &[(String, Vec<Spread>)], out: &Path) -> Result<(), String> {
    font()?;
    let text = |e: &dyn std::fmt::Display| e.to_string();
    let panels = panels(lines);
    let columns = if panels.len() == 1 { 1 } else { 2 };
    let rows = panels.len().div_ceil(columns);
    let (width, height) = if panels.len() == 1 { SIZE } else { PANEL };
    let last = lines.iter().flat_map(|l| &l.1).map(|s| s.x).fold(1.0, f64::max);
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

type Area<'a> = DrawingArea<BitMapBackend<'a>, plotters::coord::Shift>;

fn draw_panel((title, lines): &Panel<'_>, last: f64, area: &Area<'_>) -> Result<(), Box<dyn std::error::Error>> {
    let mut chart = ChartBuilder::on(area)
        .caption(title, ("sans-serif", 22))
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
    for ((label, points), (r, g, b)) in lines.iter().zip(COLOURS.into_iter().cycle()) {
        let colour = RGBColor(r, g, b);
        let low = points.iter().map(|s| (s.x, s.low));
        let band: Vec<(f64, f64)> = low.chain(points.iter().rev().map(|s| (s.x, s.high))).collect();
        chart.draw_series(std::iter::once(Polygon::new(band, colour.mix(0.12))))?;
        chart
            .draw_series(LineSeries::new(
                points.iter().map(|s| (s.x, s.mean)),
                colour.stroke_width(2),
            ))?
            .label(*label)
            .legend(move |(x, y)| PathElement::new(vec![(x, y), (x + 22, y)], colour.stroke_width(2)));
        chart.draw_series(points.iter().map(|s| Circle::new((s.x, s.mean), 3, colour.filled())))?;
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_have_panels_and_the_rest_is_in_each() {
        let lines: Vec<(String, Vec<Spread>)> = ["base", "noise_level.0.3", "noise_level.0.5", "K.8"]
            .iter()
            .map(|name| ((*name).to_owned(), Vec::new()))
            .collect();
        let shown = |panel: &Panel<'_>| panel.1.iter().map(|l| l.0.to_owned()).collect::<Vec<_>>();
        let many = panels(&lines);
        assert_eq!(
            many.iter().map(|p| p.0.as_str()).collect::<Vec<_>>(),
            ["noise_level", "K"]
        );
        assert_eq!(shown(&many[0]), ["base", "0.3", "0.5"]);
        assert_eq!(shown(&many[1]), ["base", "8"]);
        assert_eq!(shown(&panels(&lines[..1])[0]), ["base"]);
    }
}
