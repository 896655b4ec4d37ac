//! What an attack did, and several attacks at the same time or one after the other.

use std::{
    fmt,
    ops::AddAssign,
    thread,
    time::{Duration, Instant},
};

/// Pause before a refused connection is tried again.
pub(super) const RETRY: Duration = Duration::from_millis(50);

/// Waits; attackers pace themselves by the clock.
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
    /// Connections opened, with what the attack needs of greeting and handshake.
    pub opened: u64,
    /// Connections that were refused, cut or late before the attack began on them.
    pub unopened: u64,
    /// Connections that the attacked process closed.
    pub closed: u64,
    /// Bytes sent.
    pub sent: u64,
    /// Bytes received.
    pub received: u64,
    /// Requests answered.
    pub answered: u64,
    /// Requests refused by a message.
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
