//! Line chart as inline SVG, with colors from the page's style and numbers at the pointer.

use super::{
    html::{each, escape},
    series::{Spread, spread},
};
use crate::digits::grouped;

/// Width and height of the drawing in SVG units, scaled by the page.
const SIZE: (f64, f64) = (480.0, 300.0);
/// Left, top, right and bottom edge of the plot in SVG units.
const PLOT: (f64, f64, f64, f64) = (42.0, 10.0, 466.0, 250.0);
/// Largest number of points of a line; longer lines are averaged over neighbors.
const MOST_POINTS: usize = 600;
/// Largest number of points of a line with a hint.
const MOST_HINTS: usize = 100;
/// Number of distinct colors and line patterns; further series repeat them.
pub(super) const STYLES: usize = 8;

/// Horizontal axis of a chart.
pub(super) struct Axis {
    /// Label under the plot.
    pub(super) label: String,
    /// Length of one label unit in units of x.
    pub(super) unit: f64,
    /// Short unit after a number in a hint, for instance `min`.
    pub(super) short: &'static str,
}

/// Series of a chart.
pub(super) struct Series {
    /// Index in the palette.
    pub(super) style: usize,
    /// Name in hints.
    pub(super) label: String,
    /// Name and points (x, success rate) of each run, x ascending.
    pub(super) runs: Vec<(String, Vec<(f64, f64)>)>,
}

/// Chart with an accessible title.
pub(super) struct Chart {
    /// Identifier, unique in the page, letters only.
    pub(super) id: &'static str,
    /// Accessible title.
    pub(super) title: String,
    /// Horizontal axis.
    pub(super) axis: Axis,
    /// Whether the points are marked, for curves with few points.
    pub(super) marks: bool,
    /// Series in drawing order.
    pub(super) series: Vec<Series>,
}

/// Returns the number of neighbors that are averaged to one point, for a line with `count` points.
pub(super) fn thinning(count: usize) -> usize {
    count.div_ceil(MOST_POINTS).max(1)
}

fn thinned(points: Vec<Spread>) -> Vec<Spread> {
    let every = thinning(points.len());
    let mean = |group: &[Spread], value: fn(&Spread) -> f64| group.iter().map(value).sum::<f64>() / group.len() as f64;
    if every == 1 {
        return points;
    }
    points
        .chunks(every)
        .map(|group| Spread {
            x: mean(group, |s| s.x),
            mean: mean(group, |s| s.mean),
            low: mean(group, |s| s.low),
            high: mean(group, |s| s.high),
        })
        .collect()
}

/// Returns a step of 1, 2 or 5 times a power of ten that divides 0 to `most` into at most six parts.
fn tick_step(most: f64) -> f64 {
    let raw = most / 6.0;
    let power = 10f64.powf(raw.log10().floor());
    // rounding of the logarithm may leave the quotient slightly above the factor
    let factor = [1.0, 2.0, 5.0].into_iter().find(|f| raw / power <= f * (1.0 + 1e-9));
    power * factor.unwrap_or(10.0)
}

/// Formats a number with thousands separators and as many decimals as ticks of `step` need.
pub(super) fn number(value: f64, step: f64) -> String {
    let decimals = if step >= 1.0 {
        0
    } else {
        (-step.log10()).ceil() as usize
    };
    let text = format!("{value:.decimals$}");
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    grouped(whole) + rest
}

/// Returns the SVG path of a mark around (0, 0), whose shape distinguishes series without color.
pub(super) fn mark(style: usize) -> &'static str {
    match style % 4 {
        0 => "M-4 0a4 4 0 1 0 8 0a4 4 0 1 0 -8 0z",
        1 => "M-3.5 -3.5h7v7h-7z",
        2 => "M0 -4.5l4.5 8h-9z",
        _ => "M0 -5l5 5l-5 5l-5 -5z",
    }
}

struct Scale {
    most: f64,
}

impl Scale {
    fn place(&self, x: f64, y: f64) -> (f64, f64) {
        let (left, top, right, bottom) = PLOT;
        (left + (right - left) * x / self.most, bottom - (bottom - top) * y)
    }

    fn path(&self, points: impl Iterator<Item = (f64, f64)>) -> String {
        let places = points.enumerate().map(|(i, (x, y))| {
            let (x, y) = self.place(x, y);
            format!("{}{x:.1} {y:.1}", if i == 0 { "M" } else { "L" })
        });
        places.collect::<Vec<_>>().concat()
    }
}

impl Chart {
    /// Renders the chart as an `svg` element.
    pub(super) fn svg(&self) -> String {
        let xs = self.series.iter().flat_map(|l| &l.runs).flat_map(|r| &r.1).map(|p| p.0);
        let most = xs.fold(0.0, f64::max);
        let scale = Scale {
            most: if most > 0.0 { most } else { self.axis.unit },
        };
        let drawn: Vec<(&Series, Vec<Spread>)> = self
            .series
            .iter()
            .map(|series| {
                let curves: Vec<_> = series.runs.iter().map(|r| r.1.clone()).collect();
                (series, thinned(spread(&curves)))
            })
            .collect();
        let ends = drawn.iter().filter_map(|(series, points)| {
            let last = points.last()?;
            Some(format!("{} ends at {:.2}", escape(&series.label), last.mean))
        });
        let (id, title) = (self.id, escape(&self.title));
        [
            format!(
                r#"<svg viewBox="0 0 {} {}" role="img" aria-labelledby="{id}-title {id}-desc">"#,
                SIZE.0, SIZE.1
            ),
            format!(r#"<title id="{id}-title">{title}</title>"#),
            format!(
                r#"<desc id="{id}-desc">{}.</desc>"#,
                ends.collect::<Vec<_>>().join(", ")
            ),
            self.frame(&scale),
            each(&drawn, |(series, points)| band(series, points, &scale)),
            each(&drawn, |(series, points)| self.line(series, points, &scale)),
            each(&drawn, |(series, points)| self.hints(series, points, &scale)),
            "</svg>".to_owned(),
        ]
        .concat()
    }

    fn frame(&self, scale: &Scale) -> String {
        let (left, _, right, bottom) = PLOT;
        let rows = each([0.0, 0.25, 0.5, 0.75, 1.0], |y| {
            let at = scale.place(0.0, y).1;
            let class = if y == 0.0 { "axis" } else { "grid" };
            format!(
                r#"<path class="{class}" d="M{left} {at}H{right}"/><text class="tick" x="{}" y="{:.1}" text-anchor="end">{y}</text>"#,
                left - 6.0,
                at + 4.5,
            )
        });
        let step = tick_step(scale.most / self.axis.unit);
        let count = (scale.most / self.axis.unit / step + 1e-9).floor() as u32;
        let columns = each(0..=count, |i| {
            let value = f64::from(i) * step;
            let at = scale.place(value * self.axis.unit, 0.0).0;
            format!(
                r#"<path class="axis" d="M{at:.1} {bottom}v4"/><text class="tick" x="{at:.1}" y="{}" text-anchor="middle">{}</text>"#,
                bottom + 18.0,
                number(value, step),
            )
        });
        let name = format!(
            r#"<text class="name" x="{}" y="{}" text-anchor="middle">{}</text>"#,
            f64::midpoint(left, right),
            bottom + 40.0,
            escape(&self.axis.label)
        );
        rows + &columns + &name
    }

    fn line(&self, series: &Series, points: &[Spread], scale: &Scale) -> String {
        let style = series.style % STYLES;
        let single = if series.runs.len() > 1 {
            series.runs.as_slice()
        } else {
            &[]
        };
        let thin = each(single, |(name, curve)| {
            let own = thinned(spread(std::slice::from_ref(curve)));
            let path = scale.path(own.iter().map(|s| (s.x, s.mean)));
            format!(
                r#"<path class="thin s{style}" d="{path}"><title>{}</title></path>"#,
                escape(name)
            )
        });
        let path = scale.path(points.iter().map(|s| (s.x, s.mean)));
        // over wall time the runs' points differ in x: one mark per point of the longest run is enough
        let longest = series.runs.iter().map(|r| r.1.len()).max().unwrap_or(0);
        let every = points.len().div_ceil(longest.max(1)).max(1);
        let marks = each(points.iter().step_by(every).filter(|_| self.marks), |s| {
            let (x, y) = scale.place(s.x, s.mean);
            format!(
                r#"<path class="mark s{style}" transform="translate({x:.1} {y:.1})" d="{}"/>"#,
                mark(style)
            )
        });
        let mean = if path.is_empty() {
            path
        } else {
            format!(r#"<path class="mean s{style}" d="{path}"/>"#)
        };
        thin + &mean + &marks
    }

    fn hints(&self, series: &Series, points: &[Spread], scale: &Scale) -> String {
        let style = series.style % STYLES;
        let step = tick_step(scale.most / self.axis.unit) / 10.0;
        let every = points.len().div_ceil(MOST_HINTS).max(1);
        each(points.iter().step_by(every), |s| {
            let (x, y) = scale.place(s.x, s.mean);
            let range = if series.runs.len() > 1 {
                format!(" (mean; {:.2} to {:.2})", s.low, s.high)
            } else {
                String::new()
            };
            format!(
                r#"<circle class="hint s{style}" cx="{x:.1}" cy="{y:.1}" r="7"><title>{}: {:.2}{range} at {} {}</title></circle>"#,
                escape(&series.label),
                s.mean,
                number(s.x / self.axis.unit, step),
                self.axis.short,
            )
        })
    }
}

/// Renders the range of the runs around the mean.
fn band(series: &Series, points: &[Spread], scale: &Scale) -> String {
    if series.runs.len() < 2 || points.is_empty() {
        return String::new();
    }
    let there = points.iter().map(|s| (s.x, s.high));
    let back = points.iter().rev().map(|s| (s.x, s.low));
    format!(
        r#"<path class="band s{}" d="{}z"/>"#,
        series.style % STYLES,
        scale.path(there.chain(back))
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_are_round_and_few() {
        for (most, step) in [
            (23_040.0, 5000.0),
            (1.0, 0.2),
            (5.0, 1.0),
            (9.7, 2.0),
            (27_904.0, 5000.0),
            (0.3, 0.05),
            (100.0, 20.0),
        ] {
            assert!(
                (tick_step(most) / step - 1.0).abs() < 1e-9,
                "{most}: {}",
                tick_step(most)
            );
        }
    }

    #[test]
    fn numbers_are_readable() {
        assert_eq!(number(25_600.0, 5000.0), "25,600");
        assert_eq!(number(1_234_567.0, 1.0), "1,234,567");
        assert_eq!(number(999.0, 1.0), "999");
        assert_eq!(number(0.4, 0.2), "0.4");
        assert_eq!(number(0.25, 0.05), "0.25");
    }

    #[test]
    fn a_long_line_is_thinned_by_means() {
        let point = |i: usize| Spread {
            x: i as f64,
            mean: (i % 2) as f64,
            low: 0.0,
            high: 1.0,
        };
        let few: Vec<Spread> = (0..MOST_POINTS).map(point).collect();
        assert_eq!(thinned(few.clone()), few);
        let many = thinned((0..2 * MOST_POINTS).map(point).collect());
        assert_eq!(many.len(), MOST_POINTS);
        assert!(many.iter().all(|s| (s.mean, s.low, s.high) == (0.5, 0.0, 1.0)));
        assert_eq!(many.first().map(|s| s.x), Some(0.5));
    }

    #[test]
    fn a_known_curve_lies_where_the_axes_say() {
        let chart = Chart {
            id: "c",
            title: "<t>".to_owned(),
            axis: Axis {
                label: "episodes".to_owned(),
                unit: 1.0,
                short: "episodes",
            },
            marks: false,
            series: vec![Series {
                style: 0,
                label: "a & b".to_owned(),
                runs: vec![
                    ("a".to_owned(), vec![(0.0, 0.0), (10.0, 1.0)]),
                    ("b".to_owned(), vec![(0.0, 0.5), (10.0, 0.5)]),
                ],
            }],
        };
        let svg = chart.svg();
        // plot 42..466 by 250..10: the mean rises from 0.25 at the left edge to 0.75 at the right edge
        assert!(
            svg.contains(r#"<path class="mean s0" d="M42.0 190.0L466.0 70.0"/>"#),
            "{svg}"
        );
        // the range: upper edge 0.5 to 1, lower edge 0.5 back to 0
        assert!(
            svg.contains(r#"<path class="band s0" d="M42.0 130.0L466.0 10.0L466.0 130.0L42.0 250.0z"/>"#),
            "{svg}"
        );
        assert!(
            svg.contains("<title>a &amp; b: 0.75 (mean; 0.50 to 1.00) at 10.0 episodes</title>"),
            "{svg}"
        );
        assert!(svg.contains(">&lt;t&gt;</title>"), "{svg}");
    }
}
