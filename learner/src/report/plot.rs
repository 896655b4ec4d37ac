//! Success curves of one run or of several series as a PNG, for places that cannot show HTML.

use std::path::Path;

use plotters::style::RGBColor;

use super::{
    curves::{Curves, Point},
    panels::{self, Curve, Panel},
    run::Run,
    series::{Spread, group, spread},
};
use crate::error::Result;

/// Palette that is distinguishable for most kinds of color blindness (Okabe and Ito 2008); further series repeat it.
const COLOURS: [RGBColor; 8] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
    RGBColor(86, 180, 233),
    RGBColor(230, 159, 0),
    RGBColor(90, 90, 90),
    RGBColor(160, 130, 0),
];

/// Draws success on unseen episodes over training episodes: the mean of each series and the range of its runs. Series named
/// `FACTOR.VALUE` are drawn in one panel per factor, other series in every panel.
///
/// # Errors
/// The picture cannot be written.
pub(super) fn draw(runs: &[Run], out: &Path) -> Result<()> {
    let series: Vec<(String, Vec<Spread>)> = group(runs)
        .iter()
        .map(|members| {
            let curves: Vec<Vec<(f64, f64)>> = members.iter().map(|run| over_episodes(&run.eval)).collect();
            (name(members), spread(&curves))
        })
        .collect();
    panels::draw(&panels(&series), out)
}

/// Draws success over training episodes of the run in `dir`: sampled (training) and ODE (unseen episodes).
///
/// # Errors
/// The metrics cannot be read, or the picture cannot be written.
pub(super) fn draw_one(dir: &Path, out: &Path) -> Result<()> {
    let curves = Curves::read(dir)?;
    let curve = |label: &str, points: &[Point], colour: RGBColor, marks: bool| Curve {
        label: label.to_owned(),
        colour,
        marks,
        points: spread(&[over_episodes(points)]),
    };
    let panel = Panel {
        title: "success over training episodes".to_owned(),
        curves: vec![
            curve(
                "sampled with noise, training",
                &curves.train,
                RGBColor(150, 170, 200),
                false,
            ),
            curve("ODE, unseen episodes", &curves.eval, RGBColor(190, 60, 30), true),
        ],
    };
    panels::draw(&[panel], out)
}

fn over_episodes(points: &[Point]) -> Vec<(f64, f64)> {
    points.iter().map(|p| (p.episodes, p.success)).collect()
}

/// Returns the common prefix of the names of a series' runs, without the seed and without parent folders.
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

/// Arranges the series in one panel per factor, or in a single panel without factors.
fn panels(series: &[(String, Vec<Spread>)]) -> Vec<Panel> {
    let panel = |title: &str, shown: Vec<(&str, &[Spread])>| Panel {
        title: title.to_owned(),
        curves: shown
            .into_iter()
            .zip(COLOURS.into_iter().cycle())
            .map(|((label, points), colour)| Curve {
                label: label.to_owned(),
                colour,
                marks: true,
                points: points.to_vec(),
            })
            .collect(),
    };
    let mut factors: Vec<&str> = series
        .iter()
        .filter_map(|(name, _)| Some(name.split_once('.')?.0))
        .collect();
    factors.dedup();
    if factors.is_empty() {
        let all = series.iter().map(|(name, points)| (name.as_str(), points.as_slice()));
        return vec![panel("success on unseen episodes (ODE)", all.collect())];
    }
    factors
        .into_iter()
        .map(|factor| {
            let shown = series.iter().filter_map(|(name, points)| match name.split_once('.') {
                None => Some((name.as_str(), points.as_slice())),
                Some((own, value)) => (own == factor).then_some((value, points.as_slice())),
            });
            panel(factor, shown.collect())
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn factors_have_panels_and_the_rest_is_in_each() {
        let series: Vec<(String, Vec<Spread>)> = ["base", "noise_level.0.3", "noise_level.0.5", "K.8"]
            .iter()
            .map(|name| ((*name).to_owned(), Vec::new()))
            .collect();
        let shown = |panel: &Panel| panel.curves.iter().map(|l| l.label.clone()).collect::<Vec<_>>();
        let many = panels(&series);
        assert_eq!(
            many.iter().map(|p| p.title.as_str()).collect::<Vec<_>>(),
            ["noise_level", "K"]
        );
        assert_eq!(shown(&many[0]), ["base", "0.3", "0.5"]);
        assert_eq!(shown(&many[1]), ["base", "8"]);
        assert_eq!(shown(&panels(&series[..1])[0]), ["base"]);
    }
}
