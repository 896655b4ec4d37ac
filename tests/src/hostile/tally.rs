//! Counts of an attack, and attacks at the same time or in turn.

use std::{
    fmt,
    ops::AddAssign,
    thread,
    time::{Duration, Instant},
};

/// Pause before a refused connection is tried again.
pub(super) const RETRY: Duration = Duration::from_millis(50);

/// Sleeps for a duration; attackers follow the clock.
#[expect(
    clippy::disallowed_methods,
    reason = "a slow attacker is slow by the clock, there is no event to wait for"
)]
pub fn pause(duration: Duration) {
    thread::sleep(duration);
}

/// Counts of an attack.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Tally {
    /// Opened connections, after the parts of greeting and handshake that the attack needs.
    pub opened: u64,
    /// Connections that were refused, cut or late before the attack started.
    pub unopened: u64,
    /// Connections closed by the attacked process.
    pub closed: u64,
    /// Sent bytes.
    pub sent: u64,
    /// Received bytes.
    pub received: u64,
    /// Answered requests.
    pub answered: u64,
    /// Requests that a message refused.
    pub refused: u64,
    /// Requests with neither answer nor refusal.
    pub failed: u64,
}

impl AddAssign for Tally {
    fn add_assign(&mut self, other: Self) {
        self.opened += other.opened;
        self.unopened += other.unopened;
        self.closed += other.closed;
        self.sent += other.sent;
        self.received += other.received;
        self.answered += other.answered;
        self.refused += other.refused;
        self.failed += other.failed;
    }
}

impl fmt::Display for Tally {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "opened {}, unopened {}, closed by the peer {}, sent {:.1} MB, received {:.1} MB, answered {}, refused {}, failed {}",
            self.opened,
            self.unopened,
            self.closed,
            self.sent as f64 / 1e6,
            self.received as f64 / 1e6,
            self.answered,
            self.refused,
            self.failed
        )
    }
}

/// Runs `attackers` copies of an attack in threads and adds up their counts.
pub fn crowd(attackers: usize, attack: impl Fn(usize) -> Tally + Sync) -> Tally {
    let mut sum = Tally::default();
    thread::scope(|scope| {
        let attack = &attack;
        let running: Vec<_> = (0..attackers).map(|i| scope.spawn(move || attack(i))).collect();
        for thread in running {
            sum += thread.join().expect("an attacker ends without a panic");
        }
    });
    sum
}

/// Repeats an attack until `duration` has passed; an attack without a connection is followed by a short pause.
pub fn repeat(duration: Duration, mut attack: impl FnMut(Duration) -> Tally) -> Tally {
    let end = Instant::now() + duration;
    let mut sum = Tally::default();
    loop {
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return sum;
        }
        let one = attack(left);
        sum += one;
        if one.opened == 0 {
            pause(RETRY.min(left));
        }
    }
}
