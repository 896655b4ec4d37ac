//! Mean and standard deviation of the scores within each group of episodes.

use std::collections::BTreeMap;

use super::{
    episode::Episode,
    error::{AdvantageError, Result},
    normalize::mean_and_std,
};

/// Returns for every episode the mean and unbiased standard deviation of its group's scores. Rejects a group of one episode.
pub(super) fn group_spreads(episodes: &[Episode<'_>]) -> Result<Vec<(f64, f64)>> {
    let mut scores: BTreeMap<u64, Vec<f32>> = BTreeMap::new();
    for episode in episodes {
        scores.entry(episode.group).or_default().push(episode.score());
    }
    let mut spreads = BTreeMap::new();
    for (group, scores) in scores {
        let spread = mean_and_std(&scores, None).ok_or(AdvantageError::LonelyEpisode { group })?;
        spreads.insert(group, spread);
    }
    // the score of the episode itself is in the group, so that the index exists
    Ok(episodes.iter().map(|episode| spreads[&episode.group]).collect())
}
