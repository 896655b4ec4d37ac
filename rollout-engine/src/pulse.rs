//! Detects stalls of the engine's loops and of the inference thread, for `/healthz`.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// Time without a round after which a loop is stalled; a loop makes a round every second.
const LOOP_STALLED: Duration = Duration::from_secs(5);
/// Time without a round after which the link is stalled; the link may write and sync a file of weights between rounds.
const LINK_STALLED: Duration = Duration::from_secs(30);
/// Time after which inference is stalled; four times the slowest recent batch where that is longer.
const INFERENCE_STALLED: Duration = Duration::from_secs(10);

/// Times of the last round of each loop and of the last batch.
#[derive(Debug)]
pub struct Pulse {
    begun: Instant,
    /// Milliseconds since `begun` of each loop's last round; 0 before the first.
    serving: AtomicU64,
    link: AtomicU64,
    /// Start of the running batch, in milliseconds since `begun`; 0 without a batch.
    inference: AtomicU64,
    /// Time since which rows wait and no batch has started, in milliseconds since `begun`; 0 without waiting rows.
    waiting: AtomicU64,
    slowest: AtomicU64,
}

impl Default for Pulse {
    fn default() -> Self {
        Self {
            begun: Instant::now(),
            serving: AtomicU64::new(0),
            link: AtomicU64::new(0),
            inference: AtomicU64::new(0),
            waiting: AtomicU64::new(0),
            slowest: AtomicU64::new(0),
        }
    }
}

impl Pulse {
    fn now(&self) -> u64 {
        self.begun.elapsed().as_millis() as u64 + 1
    }

    /// Records a round of the server's loop, with `rows` rows waiting for inference.
    pub fn serving(&self, rows: usize) {
        self.serving.store(self.now(), Ordering::Relaxed);
        if rows == 0 {
            self.waiting.store(0, Ordering::Relaxed);
        } else if self.waiting.load(Ordering::Relaxed) == 0 {
            self.waiting.store(self.now(), Ordering::Relaxed);
        }
    }

    /// Records a round of the link's loop.
    pub fn link(&self) {
        self.link.store(self.now(), Ordering::Relaxed);
    }

    /// Runs a batch and records its duration.
    pub fn inference<T>(&self, batch: impl FnOnce() -> T) -> T {
        let begun = self.now();
        self.inference.store(begun, Ordering::Relaxed);
        self.waiting.store(0, Ordering::Relaxed);
        let result = batch();
        self.inference.store(0, Ordering::Relaxed);
        // the duration decays by an eighth per batch, so that one slow batch is forgotten
        let before = self.slowest.load(Ordering::Relaxed);
        self.slowest
            .store((self.now() - begun).max(before - before / 8), Ordering::Relaxed);
        result
    }

    /// Returns which part is stalled, and for how long; `None` if every part works.
    pub fn stalled(&self) -> Option<String> {
        let slowest = Duration::from_millis(self.slowest.load(Ordering::Relaxed));
        let parts = [
            ("the server's loop", &self.serving, LOOP_STALLED),
            ("the learner's link", &self.link, LINK_STALLED),
            ("inference", &self.inference, INFERENCE_STALLED.max(4 * slowest)),
            ("inference", &self.waiting, INFERENCE_STALLED.max(4 * slowest)),
        ];
        let now = self.now();
        parts.into_iter().find_map(|(name, last, limit)| {
            let last = last.load(Ordering::Relaxed);
            let still = Duration::from_millis(now.saturating_sub(last));
            (last > 0 && still > limit).then(|| format!("{name} has not moved for {:.0} s", still.as_secs_f64()))
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_that_stands_still_is_named() {
        let pulse = Pulse::default();
        assert_eq!(pulse.stalled(), None, "a part that has not started is not stalled");
        pulse.serving(0);
        pulse.link();
        pulse.inference(|| ());
        assert_eq!(pulse.stalled(), None);
        let early = Pulse {
            begun: Instant::now()
                .checked_sub(Duration::from_secs(20))
                .expect("20 s after boot"),
            ..pulse
        };
        assert_eq!(
            early.stalled().as_deref(),
            Some("the server's loop has not moved for 20 s")
        );
        early.serving(0);
        assert_eq!(early.stalled(), None, "the link may take 30 s, inference is idle");
        early.inference.store(1, Ordering::Relaxed);
        assert_eq!(early.stalled().as_deref(), Some("inference has not moved for 20 s"));
        early.slowest.store(6_000, Ordering::Relaxed);
        assert_eq!(early.stalled(), None, "batches of 6 s are usual here");
        early.slowest.store(0, Ordering::Relaxed);
        early.inference.store(0, Ordering::Relaxed);
        early.serving(3);
        early.waiting.store(1, Ordering::Relaxed);
        early.serving(3);
        assert_eq!(
            early.stalled().as_deref(),
            Some("inference has not moved for 20 s"),
            "rows wait and no batch starts"
        );
        early.inference(|| ());
        assert_eq!(early.stalled(), None);
    }
}
