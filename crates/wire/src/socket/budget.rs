//! Budget of bytes for all messages that are being received or wait to be handled, over all connections of an endpoint.
//!
//! Large messages have three quarters of the budget, so that small messages never wait for large ones. Bytes are reserved on
//! arrival, not on announcement. When a part is used up, the connection with the largest stalled unfinished message is closed;
//! other messages wait. When only unfinished messages hold the part and all of these messages wait, one may exceed the budget.
//! This prevents a deadlock.

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use tokio::sync::Notify;

use super::closer::{Closed, Closer};

/// Time without progress after which an unfinished message may be dropped to make room.
const STALLED: Duration = Duration::from_millis(100);
/// Bytes that count as progress: at the slowest allowed rate this many bytes arrive in less than [`STALLED`].
const MOVE_BYTES: usize = 16 << 10;
/// Least time between two searches for a stalled message.
const SEARCH: Duration = Duration::from_millis(10);

#[derive(Debug)]
struct Unfinished {
    bytes: usize,
    moved: Instant,
    /// Whether the message waits for this side: for bytes of the budget, for its pace, or to be decoded.
    waits: bool,
    closer: Arc<Closer>,
}

#[derive(Debug)]
struct State {
    searched: Instant,
    used: usize,
    unfinished: BTreeMap<u64, Unfinished>,
    /// Bytes that unfinished messages hold.
    unfinished_bytes: usize,
    /// Connection that may exceed the budget.
    finisher: Option<u64>,
}

/// Budget of an endpoint.
#[derive(Debug)]
pub(super) struct Budget {
    small: Arc<Pool>,
    large: Arc<Pool>,
}

impl Budget {
    pub(super) fn new(total: usize) -> Self {
        Self {
            small: Pool::new(total / 4),
            large: Pool::new(total - total / 4),
        }
    }

    /// Starts a message of a connection, holding no bytes yet.
    pub(super) fn begin(&self, large: bool, connection: u64, closer: &Arc<Closer>) -> Receiving {
        if large { &self.large } else { &self.small }.begin(connection, closer)
    }
}

#[derive(Debug)]
struct Pool {
    total: usize,
    state: Mutex<State>,
    freed: Notify,
}

impl Pool {
    fn new(total: usize) -> Arc<Self> {
        Arc::new(Self {
            total,
            state: Mutex::new(State {
                searched: Instant::now(),
                used: 0,
                unfinished: BTreeMap::new(),
                unfinished_bytes: 0,
                finisher: None,
            }),
            freed: Notify::new(),
        })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // no step between two changes of the state can panic
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn begin(self: &Arc<Self>, connection: u64, closer: &Arc<Closer>) -> Receiving {
        let unfinished = Unfinished {
            bytes: 0,
            moved: Instant::now(),
            waits: false,
            closer: Arc::clone(closer),
        };
        self.lock().unfinished.insert(connection, unfinished);
        Receiving {
            pool: Arc::clone(self),
            connection,
            bytes: 0,
            still: 0,
        }
    }

    fn free(&self, bytes: usize) {
        let mut state = self.lock();
        state.used -= bytes;
        drop(state);
        self.freed.notify_waiters();
    }
}

/// Bytes that an unfinished message holds; dropping the value frees the bytes.
#[derive(Debug)]
pub(super) struct Receiving {
    pool: Arc<Pool>,
    connection: u64,
    bytes: usize,
    /// Bytes that arrived since the last progress.
    still: usize,
}

impl Receiving {
    /// Reserves bytes, waits if necessary, and returns the time waited.
    pub(super) async fn grow(&mut self, bytes: usize) -> Duration {
        if self.try_grow(bytes) {
            return Duration::ZERO;
        }
        let begun = Instant::now();
        loop {
            let pool = Arc::clone(&self.pool);
            let freed = pool.freed.notified();
            if self.try_grow(bytes) {
                return begun.elapsed();
            }
            // the next round finds messages that stalled after this wait started
            drop(tokio::time::timeout(STALLED, freed).await);
        }
    }

    fn try_grow(&mut self, bytes: usize) -> bool {
        let mut state = self.pool.lock();
        let fits = state.used + bytes <= self.pool.total;
        if !fits && state.finisher != Some(self.connection) && state.searched.elapsed() >= SEARCH {
            state.searched = Instant::now();
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

    /// Counts arrived bytes; [`MOVE_BYTES`] of them count as progress.
    pub(super) fn arrived(&mut self, bytes: usize) {
        self.still += bytes;
        if self.still >= MOVE_BYTES {
            self.still = 0;
            self.waits(false);
        }
    }

    /// Sets whether the message waits for this side; such a wait does not count as stalling.
    pub(super) fn waits(&self, waits: bool) {
        if let Some(own) = self.pool.lock().unfinished.get_mut(&self.connection) {
            own.waits = waits;
            own.moved = Instant::now();
        }
    }

    /// Completes the message, which holds its bytes until handled.
    pub(super) fn complete(mut self) -> Held {
        let bytes = std::mem::take(&mut self.bytes);
        self.pool.lock().unfinished_bytes -= bytes;
        Held {
            pool: Arc::clone(&self.pool),
            bytes,
        }
    }
}

impl Drop for Receiving {
    fn drop(&mut self) {
        let mut state = self.pool.lock();
        state.unfinished.remove(&self.connection);
        state.unfinished_bytes -= self.bytes;
        state.finisher = state.finisher.filter(|id| *id != self.connection);
        drop(state);
        self.pool.free(self.bytes);
    }
}

/// Bytes that a complete message holds; dropping the value frees the bytes.
#[derive(Debug)]
pub(super) struct Held {
    pool: Arc<Pool>,
    bytes: usize,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.pool.free(self.bytes);
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
        let budget = Pool::new(100);
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
        let budget = Pool::new(100);
        let (mut one, mut two) = (budget.begin(1, &closer()), budget.begin(2, &closer()));
        one.grow(50).await;
        two.grow(50).await;
        assert!(!one.try_grow(30), "the other may still finish");
        two.waits(true);
        one.grow(30).await;
        assert!(
            !two.try_grow(30),
            "all waited and nothing was complete: one of them went beyond, and no other"
        );
        drop(one);
        assert!(two.try_grow(30));
    }

    #[tokio::test]
    async fn large_messages_do_not_hold_up_others() {
        let budget = Budget::new(100);
        let mut large = budget.begin(true, 1, &closer());
        large.grow(75).await;
        let mut small = budget.begin(false, 2, &closer());
        assert_eq!(small.grow(25).await, Duration::ZERO);
    }

    #[tokio::test]
    async fn a_message_that_waits_for_this_side_does_not_stand_still() {
        let pool = Pool::new(100);
        let resting = closer();
        let mut one = pool.begin(1, &resting);
        one.grow(80).await;
        one.waits(true);
        let mut two = pool.begin(2, &closer());
        two.grow(10).await;
        two.grow(90).await;
        assert!(!resting.is_closed(), "the other went beyond the budget instead");
    }

    #[tokio::test]
    async fn a_byte_now_and_then_is_no_movement() {
        let pool = Pool::new(100);
        let dripping = closer();
        let mut one = pool.begin(1, &dripping);
        one.grow(80).await;
        let mut two = pool.begin(2, &closer());
        let waiting = tokio::spawn(async move { two.grow(40).await });
        let mut drip = tokio::time::interval(Duration::from_millis(10));
        while !dripping.is_closed() {
            drip.tick().await;
            one.arrived(1);
        }
        drop(one);
        waiting.await.expect("granted");
    }

    #[tokio::test]
    async fn a_message_that_does_not_move_makes_room() {
        let budget = Pool::new(100);
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
