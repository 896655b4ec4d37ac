//! Advantages of an episode without a critic.

use super::{
    episode::{Advantages, Episode},
    gae::gae_episode,
};

impl Episode<'_> {
    /// Returns the rewards to go, discounted by `gamma` per step: of every step as advantages, of every chunk's first
    /// step as returns.
    pub(super) fn rewards_to_go(&self, gamma: f64) -> Advantages {
        let zeros = vec![0.0; self.chunks()];
        let to_go = gae_episode(self.rewards, self.chunk_len, &zeros, 0.0, gamma, 1.0);
        let returns = to_go.iter().step_by(self.chunk_len.max(1)).copied().collect();
        Advantages {
            advantages: to_go,
            returns,
        }
    }

    /// Assigns the same advantage to every step; the returns are the undiscounted rewards to go.
    pub(super) fn constant(&self, advantage: f32) -> Advantages {
        Advantages {
            advantages: vec![advantage; self.rewards.len()],
            returns: self.rewards_to_go(1.0).returns,
        }
    }
}
