//! One budget of bytes for all messages that are being received or wait to be handled, over all connections of an endpoint.
//!
//! Bytes are reserved as they arrive, not as they are announced. When the budget is used up, a connection whose message has begun
//! and does not move is closed, the largest first; others wait. When only unfinished messages hold the budget, and all of them wait,
//! one of them may go beyond it, so that they cannot block each other for ever.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use super::closer::{Closed, Closer};

/// A message that has not moved for so long makes room for others.
const STALLED: Duration = Duration::from_millis(100);

#[derive(Debug)]
struct Unfinished {
    bytes: usize,
    moved: Instant,
    waits: bool,
    closer: Arc<Closer>,
}

#[derive(Debug, Default)]
struct State {
    used: usize,
    unfinished: BTreeMap<u64, Unfinished>,
    /// Bytes that these hold.
    unfinished_bytes: usize,
    /// Who may go beyond the budget.
    finisher: Option<u64>,
}

/// The budget.
#[derive(Debug)]
pub(super) struct Budget {
    total: usize,
    state: Mutex<State>,
    freed: Notify,
}

impl Budget {
    pub(super) fn new(total: usize) -> Arc<Self> {
        Arc::new(Self {
            total,
            state: Mutex::default(),
            freed: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // no step between two changes of the state can panic
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Begins the message of a connection; it holds nothing yet.
    pub(super) fn begin(self: &Arc<Self>, connection: u64, closer: &Arc<Closer>) -> Receiving {
        let unfinished = Unfinished {
            bytes: 0,
            moved: Instant::now(),
            waits: false,
            closer: Arc::clone(closer),
        };
        self.lock().unfinished.insert(connection, unfinished);
        Receiving {
            budget: Arc::clone(self),
            connection,
            bytes: 0,
        }
    }

    fn free(&self, bytes: usize) {
        let mut state = self.lock();
        state.used -= bytes;
        drop(state);
        self.freed.notify_waiters();
    }
}

/// What an unfinished message holds; dropping it frees the bytes.
#[derive(Debug)]
pub(super) struct Receiving {
    budget: Arc<Budget>,
    connection: u64,
    bytes: usize,
}

impl Receiving {
    /// Reserves bytes, waits for them if need be, and returns how long that took.
    pub(super) async fn grow(&mut self, bytes: usize) -> Duration {
        if self.try_grow(bytes) {
            return Duration::ZERO;
        }
        let begun = Instant::now();
        loop {
            let budget = Arc::clone(&self.budget);
            let freed = budget.freed.notified();
            if self.try_grow(bytes) {
                return begun.elapsed();
            }
            // a message that stalls later than this one began to wait is found at the next round
            drop(tokio::time::timeout(STALLED, freed).await);
        }
    }

    fn try_grow(&mut self, bytes: usize) -> bool {
        let mut state = self.budget.lock();
        let fits = state.used + bytes <= self.budget.total;
        if !fits && state.finisher != Some(self.connection) {
            let stalled = state
                .unfinished
                .iter()
                .filter(|(id, message)| **id != self.connection && message.bytes > 0 && !message.waits)
                .filter(|(_, message)| message.moved.elapsed() > STALLED && !message.closer.is_closed())
                .max_by_key(|(_, message)| message.bytes);
            if let Some((_, message)) = stalled {
                message.closer.close(Closed::Late);
            } else if state.finisher.is_none() && state.unfinished_bytes == state.used {
                let mut others = state.unfinished.iter().filter(|(id, _)| **id != self.connection);
                if others.all(|(_, message)| message.waits || message.bytes == 0) {
                    state.finisher = Some(self.connection);
                }
            }
        }
        let granted = fits || state.finisher == Some(self.connection);
        if granted {
            state.used += bytes;
            state.unfinished_bytes += bytes;
        }
        if let Some(own) = state.unfinished.get_mut(&self.connection) {
            own.waits = !granted;
            own.moved = Instant::now();
            if granted {
                own.bytes += bytes;
            }
        }
        drop(state);
        if granted {
            self.bytes += bytes;
        }
        granted
    }

    /// Bytes arrived: the message moves.
    pub(super) fn moved(&self) {
        if let Some(own) = self.budget.lock().unfinished.get_mut(&self.connection) {
            own.moved = Instant::now();
        }
    }

    /// The message is complete: it holds its bytes until it is handled.
    pub(super) fn complete(mut self) -> Held {
        let bytes = std::mem::take(&mut self.bytes);
        self.budget.lock().unfinished_bytes -= bytes;
        Held {
            budget: Arc::clone(&self.budget),
            bytes,
        }
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        let mut state = self.budget.lock();
        state.unfinished.remove(&self.connection);
        state.unfinished_bytes -= self.bytes;
        state.finisher = state.finisher.filter(|id| *id != self.connection);
        drop(state);
        self.budget.free(self.bytes);
    }
}

/// What a complete message holds; dropping it frees the bytes.
#[derive(Debug)]
pub(super) struct Held {
    budget: Arc<Budget>,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.free(self.bytes);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn closer() -> Arc<Closer> {
        Arc::new(Closer::default())
    }

    #[tokio::test]
    async fn a_message_waits_until_another_is_handled() {
        let budget = Budget::new(100);
        let mut first = budget.begin(1, &closer());
        assert_eq!(first.grow(80).await, Duration::ZERO);
        let held = first.complete();
        let mut second = budget.begin(2, &closer());
        assert!(
            !second.try_grow(40),
            "80 of 100 are held by a message that waits to be handled"
        );
        let waiting = tokio::spawn(async move {
            second.grow(40).await;
            second
        });
        drop(held);
        let second = waiting.await.expect("granted");
        assert_eq!(budget.lock().used, 40);
        drop(second);
        assert_eq!(budget.lock().used, 0);
    }

    #[tokio::test]
    async fn unfinished_messages_do_not_block_each_other() {
        let budget = Budget::new(100);
        let (mut one, mut two) = (budget.begin(1, &closer()), budget.begin(2, &closer()));
        one.grow(50).await;
        two.grow(50).await;
        assert!(!one.try_grow(30), "the other may still finish");
        assert!(
            two.try_grow(30),
            "all wait and nothing is complete: one of them goes beyond"
        );
        assert!(!one.try_grow(30), "and no other");
        drop(two);
        assert!(one.try_grow(30));
    }

    #[tokio::test]
    async fn a_message_that_does_not_move_makes_room() {
        let budget = Budget::new(100);
        let (small, large, own) = (closer(), closer(), closer());
        let (mut one, mut two, mut three) = (budget.begin(1, &small), budget.begin(2, &large), budget.begin(3, &own));
        one.grow(30).await;
        two.grow(60).await;
        let waiting = tokio::spawn(async move {
            three.grow(50).await;
            three
        });
        assert_eq!(large.closed().await, Closed::Late);
        drop(two);
        drop(waiting.await.expect("granted"));
        assert!(!small.is_closed() && !own.is_closed());
    }
}
