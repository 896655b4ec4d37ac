//! Whether the engine's loops and its inference thread still move: what `/healthz` says.

use std::{
    sync::atomic::{AtomicU64, Ordering},
    time::{Duration, Instant},
};

/// A loop that has not come round for so long is stuck: each does so every second.
const LOOP_STALLED: Duration = Duration::from_secs(5);
/// The link may write and sync a file of weights in between.
const LINK_STALLED: Duration = Duration::from_secs(30);
/// Inference is stuck after so long, or after four times its slowest recent batch, whichever is longer.
const INFERENCE_STALLED: Duration = Duration::from_secs(10);

/// The engine's pulse.
#[derive(Debug)]
pub struct Pulse {
    begun: Instant,
    /// Milliseconds since `begun` of each loop's last round; 0: it has not begun.
    serving: AtomicU64,
    link: AtomicU64,
    /// When the batch in work began; 0: none is.
    inference: AtomicU64,
    /// Since when rows wait and no batch has begun; 0: none wait.
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

    /// The server's loop came round, and found so many rows waiting for inference.
    pub fn serving(&self, rows: usize) {
        self.serving.store(self.now(), Ordering::Relaxed);
        if rows == 0 {
            self.waiting.store(0, Ordering::Relaxed);
        } else if self.waiting.load(Ordering::Relaxed) == 0 {
            self.waiting.store(self.now(), Ordering::Relaxed);
        }
    }

    /// The link's loop came round.
    pub fn link(&self) {
        self.link.store(self.now(), Ordering::Relaxed);
    }

    /// Runs a batch and keeps how long it took.
    pub fn inference<T>(&self, batch: impl FnOnce() -> T) -> T {
        let begun = self.now();
        self.inference.store(begun, Ordering::Relaxed);
        self.waiting.store(0, Ordering::Relaxed);
        let result = batch();
        self.inference.store(0, Ordering::Relaxed);
        // an eighth less each time, so that one slow batch is forgotten
        let before = self.slowest.load(Ordering::Relaxed);
        self.slowest
            .store((self.now() - begun).max(before - before / 8), Ordering::Relaxed);
        result
    }

    /// What does not move, and for how long.
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
        assert_eq!(pulse.stalled(), None, "what has not begun does not stand still");
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
            "rows wait and nobody takes them"
        );
        early.inference(|| ());
        assert_eq!(early.stalled(), None);
    }
}
