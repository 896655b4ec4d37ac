//! Rate limit of what peers send.

use std::time::{Duration, Instant};

/// Rate limit in units per second, after a first burst.
#[derive(Debug)]
pub(super) struct Pace {
    per_second: f64,
    burst: f64,
    left: f64,
    since: Instant,
}

impl Pace {
    /// Returns a pace of `per_second` units whose burst is `burst` seconds of units.
    pub(super) fn new(per_second: f64, burst: f64) -> Self {
        Self {
            per_second,
            burst: per_second * burst,
            left: per_second * burst,
            since: Instant::now(),
        }
    }

    /// Takes units at `now` and returns how long to wait before taking more. Units beyond the balance become a debt, which
    /// later takers wait for as well.
    pub(super) fn take(&mut self, units: usize, now: Instant) -> Duration {
        let earned = now.saturating_duration_since(self.since).as_secs_f64() * self.per_second;
        self.since = now;
        self.left = (self.left + earned).min(self.burst) - units as f64;
        Duration::from_secs_f64((-self.left / self.per_second).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_is_free_and_what_follows_has_its_pace() {
        let begun = Instant::now();
        let mut pace = Pace::new(100.0, 0.5);
        let at = |millis| begun + Duration::from_millis(millis);
        assert_eq!(pace.take(50, at(0)), Duration::ZERO, "half a second's units");
        assert_eq!(pace.take(10, at(0)), Duration::from_millis(100));
        assert_eq!(
            pace.take(10, at(0)),
            Duration::from_millis(200),
            "the next one waits behind the first"
        );
        assert_eq!(pace.take(10, at(200)), Duration::from_millis(100));
        assert_eq!(pace.take(50, at(10_000)), Duration::ZERO, "a long rest earns one burst");
        assert_eq!(pace.take(1, at(10_000)), Duration::from_millis(10));
    }
}
