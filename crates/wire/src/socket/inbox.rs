//! What all peers of a ROUTER sent and nobody has handled yet: one queue per peer, taken in turn, so that a busy peer does not
//! hold up the others.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

#[derive(Debug)]
struct State<T> {
    queues: HashMap<u64, VecDeque<T>>,
    /// Peers with something in their queue, the next one first.
    turns: VecDeque<u64>,
}

/// The inbox. The producer of a peer's items bounds them.
#[derive(Debug)]
pub(super) struct Inbox<T> {
    state: Mutex<State<T>>,
    filled: Notify,
}

impl<T> Inbox<T> {
    pub(super) fn new() -> Self {
        Self {
            state: Mutex::new(State {
                queues: HashMap::new(),
                turns: VecDeque::new(),
            }),
            filled: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // no step between two changes of the state can panic
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, peer: u64, item: T) {
        let mut state = self.lock();
        let queue = state.queues.entry(peer).or_default();
        queue.push_back(item);
        if queue.len() == 1 {
            state.turns.push_back(peer);
        }
        drop(state);
        self.filled.notify_one();
    }

    fn pop(&self) -> Option<(u64, T)> {
        let mut state = self.lock();
        let peer = state.turns.pop_front()?;
        let queue = state.queues.get_mut(&peer)?;
        let item = queue.pop_front()?;
        if queue.is_empty() {
            state.queues.remove(&peer);
        } else {
            state.turns.push_back(peer);
        }
        Some((peer, item))
    }

    /// Waits for the next item, of the peers in turn. One task at a time; safe to cancel.
    pub(super) async fn next(&self) -> (u64, T) {
        loop {
            if let Some(next) = self.pop() {
                return next;
            }
            self.filled.notified().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn peers_are_served_in_turn_and_each_in_order() {
        let inbox = Inbox::new();
        for item in 0..4 {
            inbox.push(1, item);
        }
        inbox.push(2, 10);
        inbox.push(3, 20);
        inbox.push(2, 11);
        let mut got = Vec::new();
        for _ in 0..7 {
            got.push(inbox.next().await);
        }
        assert_eq!(got, [(1, 0), (2, 10), (3, 20), (1, 1), (2, 11), (1, 2), (1, 3)]);
    }
}
