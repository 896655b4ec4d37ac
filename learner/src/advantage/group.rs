//! Spread of the scores within each group of episodes.

use std::collections::BTreeMap;

use super::{
    episode::Episode,
    error::{AdvantageError, Result},
    normalize::mean_and_std,
};

/// Mean and unbiased standard deviation of the scores of every group; a group of one episode has none.
pub(super) fn group_spreads(episodes: &[Episode<'_>]) -> Result<BTreeMap<u64, (f64, f64)>> {
    let mut groups: BTreeMap<u64, Vec<f32>> = BTreeMap::new();
    for episode in episodes {
        groups.entry(episode.group).or_default().push(episode.score());
    }
    groups
        .into_iter()
        .map(|(group, scores)| {
            let spread = mean_and_std(&scores, None).ok_or(AdvantageError::LonelyEpisode { group })?;
            Ok((group, spread))
        })
        .collect()
}
