//! Series of runs: grouped by configuration, averaged over seeds, compared key by key.

use std::collections::{BTreeMap, BTreeSet};

use policy::config::Neutral;

use super::run::Run;

/// Mean and range of a series at one x.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Spread {
    /// Training episodes or seconds.
    pub x: f64,
    /// Mean over the runs.
    pub mean: f64,
    /// Minimum over the runs.
    pub low: f64,
    /// Maximum over the runs.
    pub high: f64,
}

/// Key that differs between series, with its value in each series; `None` if absent.
pub type Difference<'a> = (&'a str, Vec<Option<&'a str>>);

/// Groups runs whose configurations differ only in the seed and in keys that change no weight, in the order of the runs.
pub fn group(runs: &[Run]) -> Vec<Vec<&Run>> {
    let mut series: Vec<(BTreeMap<&str, &str>, Vec<&Run>)> = Vec::new();
    for run in runs {
        let config = compared(run);
        match series.iter_mut().find(|(c, _)| *c == config) {
            Some((_, members)) => members.push(run),
            None => series.push((config, vec![run])),
        }
    }
    series.into_iter().map(|(_, members)| members).collect()
}

/// Returns the keys that distinguish experiments: all except neutral keys and the seed.
fn compared(run: &Run) -> BTreeMap<&str, &str> {
    let all = run.config.iter().map(|(k, v)| (k.as_str(), v.as_str()));
    all.filter(|(key, _)| !matches!(Neutral::of(key), Some(Neutral::Place | Neutral::Upkeep | Neutral::Seed)))
        .collect()
}

/// Returns the keys whose value differs between series, with the value in each series.
pub fn differences<'a>(series: &[Vec<&'a Run>]) -> Vec<Difference<'a>> {
    let configs: Vec<BTreeMap<&str, &str>> = series.iter().filter_map(|s| s.first()).map(|r| compared(r)).collect();
    let keys: BTreeSet<&str> = configs.iter().flat_map(|c| c.keys().copied()).collect();
    keys.into_iter()
        .map(|key| (key, configs.iter().map(|c| c.get(key).copied()).collect::<Vec<_>>()))
        .filter(|(_, values)| values.windows(2).any(|pair| pair.first() != pair.last()))
        .collect()
}

/// Computes mean and range of curves `(x, y)` with ascending x. The result has every x of any curve within the range that all
/// curves cover. Curves are linear between their points. Curves without a common range yield an empty result.
pub fn spread(curves: &[Vec<(f64, f64)>]) -> Vec<Spread> {
    if curves.iter().any(Vec::is_empty) {
        return Vec::new();
    }
    let low = curves.iter().filter_map(|c| c.first()).map(|p| p.0);
    let low = low.fold(f64::NEG_INFINITY, f64::max);
    let high = curves.iter().filter_map(|c| c.last()).map(|p| p.0);
    let high = high.fold(f64::INFINITY, f64::min);
    let mut places: Vec<f64> = curves.iter().flatten().map(|p| p.0).collect();
    places.retain(|x| (low..=high).contains(x));
    places.sort_by(f64::total_cmp);
    places.dedup();
    places
        .into_iter()
        .map(|x| {
            let values: Vec<f64> = curves.iter().filter_map(|c| at(c, x)).collect();
            Spread {
                x,
                mean: values.iter().sum::<f64>() / values.len().max(1) as f64,
                low: values.iter().copied().fold(f64::INFINITY, f64::min),
                high: values.iter().copied().fold(f64::NEG_INFINITY, f64::max),
            }
        })
        .collect()
}

/// Returns the value of a piecewise linear curve at `x`; `None` if `x` is after the last point.
fn at(curve: &[(f64, f64)], x: f64) -> Option<f64> {
    let after = curve.partition_point(|p| p.0 < x);
    let (right, left) = (curve.get(after)?, curve.get(after.saturating_sub(1))?);
    let width = right.0 - left.0;
    if width <= 0.0 {
        return Some(right.1);
    }
    Some(left.1 + (right.1 - left.1) * (x - left.0) / width)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::report::run::Video;

    fn run(name: &str, config: &[(&str, &str)]) -> Run {
        Run {
            name: name.to_owned(),
            config: config.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect(),
            train: Vec::new(),
            eval: Vec::new(),
            eval_episodes: None,
            iterations: 0,
            unreadable: 0,
            evaluations: Vec::new(),
            video: Video::Absent,
        }
    }

    #[test]
    fn mean_and_range_of_two_known_curves() {
        // the first curve rises from 0 to 1 on 0..10, the second is 0.5 on 0..20: the common range is 0..10
        let curves = [vec![(0.0, 0.0), (10.0, 1.0)], vec![(0.0, 0.5), (5.0, 0.5), (20.0, 0.5)]];
        let got: Vec<_> = spread(&curves).iter().map(|s| (s.x, s.mean, s.low, s.high)).collect();
        assert_eq!(
            got,
            [(0.0, 0.25, 0.0, 0.5), (5.0, 0.5, 0.5, 0.5), (10.0, 0.75, 0.5, 1.0)]
        );
    }

    #[test]
    fn one_curve_is_its_own_mean_and_disjoint_ones_have_none() {
        let curve = vec![(1.0, 0.25), (2.0, 0.75)];
        let got = spread(std::slice::from_ref(&curve));
        let back: Vec<_> = got.iter().map(|s| (s.x, s.mean)).collect();
        assert_eq!(back, curve);
        assert!(got.iter().all(|s| (s.low, s.high) == (s.mean, s.mean)));
        assert_eq!(spread(&[curve.clone(), vec![(3.0, 0.0)]]), []);
        assert_eq!(spread(&[curve, Vec::new()]), []);
    }

    #[test]
    fn seeds_form_a_series_and_only_differing_keys_are_listed() {
        let common = ("algorithm.gamma", "0.99");
        let runs = [
            run(
                "a1",
                &[common, ("runner.seed", "1"), ("noise", "0.5"), ("rollout.http", "x")],
            ),
            run(
                "b1",
                &[common, ("runner.seed", "1"), ("noise", "0.8"), ("state", "true")],
            ),
            run(
                "a2",
                &[
                    common,
                    ("runner.seed", "2"),
                    ("noise", "0.5"),
                    ("runner.output_dir", "y"),
                ],
            ),
        ];
        let series = group(&runs);
        let names: Vec<Vec<&str>> = series
            .iter()
            .map(|s| s.iter().map(|r| r.name.as_str()).collect())
            .collect();
        assert_eq!(names, [vec!["a1", "a2"], vec!["b1"]]);
        assert_eq!(
            differences(&series),
            [
                ("noise", vec![Some("0.5"), Some("0.8")]),
                ("state", vec![None, Some("true")])
            ]
        );
    }
}
