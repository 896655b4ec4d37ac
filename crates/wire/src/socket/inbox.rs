//! Unhandled messages of all peers of a ROUTER: one queue per peer, taken in turn, so that a busy peer does not delay the others.
//! Peers that connect or disconnect wait behind established peers, so that many short connections cause no delay either.

use std::{
    collections::{HashMap, VecDeque},
    sync::{Mutex, MutexGuard, PoisonError},
};

use tokio::sync::Notify;

/// Items of established peers that are handled for one item of a peer that connects or disconnects.
const TALKING: u32 = 4;

/// Class of a peer's item.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Turn {
    /// First or last item of the peer.
    Door,
    /// Any other item.
    Talk,
}

#[derive(Debug)]
struct State<T> {
    queues: HashMap<u64, VecDeque<(Turn, T)>>,
    /// Peers with a [`Turn::Talk`] item at the head of their queue, the next peer first; [`Turn::Door`] items are in `door`.
    talking: VecDeque<u64>,
    door: VecDeque<u64>,
    /// [`Turn::Talk`] items since the last [`Turn::Door`] item.
    since: u32,
}

impl<T> State<T> {
    /// Appends the peer to the line for the item at the head of its queue.
    fn line_up(&mut self, peer: u64) {
        match self.queues.get(&peer).and_then(|queue| queue.front()) {
            Some((Turn::Talk, _)) => self.talking.push_back(peer),
            Some((Turn::Door, _)) => self.door.push_back(peer),
            None => {
                self.queues.remove(&peer);
            }
        }
    }
}

/// Inbox of a ROUTER. The producer of a peer's items bounds their number.
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
                talking: VecDeque::new(),
                door: VecDeque::new(),
                since: 0,
            }),
            filled: Notify::new(),
        }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // no step between two changes of the state can panic
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn push(&self, peer: u64, turn: Turn, item: T) {
        let mut state = self.lock();
        let queue = state.queues.entry(peer).or_default();
        queue.push_back((turn, item));
        if queue.len() == 1 {
            state.line_up(peer);
        }
        drop(state);
        self.filled.notify_one();
    }

    fn pop(&self) -> Option<(u64, T)> {
        let mut state = self.lock();
        let door = state.talking.is_empty() || state.since >= TALKING && !state.door.is_empty();
        let peer = if door {
            state.since = 0;
            state.door.pop_front()?
        } else {
            state.since += 1;
            state.talking.pop_front()?
        };
        let (_, item) = state.queues.get_mut(&peer)?.pop_front()?;
        state.line_up(peer);
        Some((peer, item))
    }

    /// Waits for the next item; takes peers in turn. One task at a time; safe to cancel.
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

    async fn all(inbox: &Inbox<u32>, count: usize) -> Vec<(u64, u32)> {
        let mut got = Vec::new();
        for _ in 0..count {
            got.push(inbox.next().await);
        }
        got
    }

    #[tokio::test]
    async fn peers_are_served_in_turn_and_each_in_order() {
        let inbox = Inbox::new();
        for item in 0..4 {
            inbox.push(1, Turn::Talk, item);
        }
        inbox.push(2, Turn::Talk, 10);
        inbox.push(3, Turn::Talk, 20);
        inbox.push(2, Turn::Talk, 11);
        assert_eq!(
            all(&inbox, 7).await,
            [(1, 0), (2, 10), (3, 20), (1, 1), (2, 11), (1, 2), (1, 3)]
        );
    }

    #[tokio::test]
    async fn a_crowd_at_the_door_waits_behind_those_that_talk() {
        let inbox = Inbox::new();
        for peer in 10..20 {
            inbox.push(peer, Turn::Door, 0);
        }
        inbox.push(10, Turn::Talk, 1);
        for item in 0..6 {
            inbox.push(1, Turn::Talk, item);
        }
        let order: Vec<u64> = all(&inbox, 17).await.into_iter().map(|(peer, _)| peer).collect();
        assert_eq!(
            order[..7],
            [1, 1, 1, 1, 10, 1, 10],
            "one of them for four that talk, each peer in its own order"
        );
        assert_eq!(
            order[7..],
            [1, 11, 12, 13, 14, 15, 16, 17, 18, 19],
            "nobody waits for ever"
        );
    }
}
