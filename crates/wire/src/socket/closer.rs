//! Ends a connection from outside its task, and counts why connections ended.

use std::sync::{
    OnceLock,
    atomic::{AtomicU64, Ordering},
};

use tokio::sync::Notify;

/// Reason for the end of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Closed {
    /// The peer closed the connection, or the network failed.
    Left,
    /// Greeting or handshake took too long.
    Handshake,
    /// The peer broke the protocol or a limit of a frame.
    Protocol,
    /// A started message did not arrive in time.
    Late,
    /// The peer accepted too little of what was sent.
    Slow,
    /// Too many messages in a row could not be decoded.
    Malformed,
    /// The connection was idle and made room for another.
    Evicted,
    /// Connections in use held all places, or memory for a message was unavailable.
    Full,
    /// This side stopped.
    Stopped,
}

impl Closed {
    /// All reasons, in the order of their counters.
    pub const ALL: [Self; 9] = [
        Self::Left,
        Self::Handshake,
        Self::Protocol,
        Self::Late,
        Self::Slow,
        Self::Malformed,
        Self::Evicted,
        Self::Full,
        Self::Stopped,
    ];

    /// Returns the name in metrics.
    pub fn name(self) -> &'static str {
        match self {
            Self::Left => "left",
            Self::Handshake => "handshake",
            Self::Protocol => "protocol",
            Self::Late => "late",
            Self::Slow => "slow",
            Self::Malformed => "malformed",
            Self::Evicted => "evicted",
            Self::Full => "full",
            Self::Stopped => "stopped",
        }
    }
}

/// Connection counts of an endpoint since its start.
#[derive(Debug, Default)]
pub struct Counters {
    pub(super) opened: AtomicU64,
    closed: [AtomicU64; Closed::ALL.len()],
}

impl Counters {
    pub(super) fn count(&self, reason: Closed) {
        if let Some(counter) = self.closed.get(reason as usize) {
            counter.fetch_add(1, Ordering::Relaxed);
        }
    }

    /// Returns the number of closed connections by reason.
    pub fn closed(&self) -> impl Iterator<Item = (Closed, u64)> + '_ {
        let counts = self.closed.iter().map(|counter| counter.load(Ordering::Relaxed));
        Closed::ALL.into_iter().zip(counts)
    }

    /// Returns the number of open connections.
    pub fn open(&self) -> u64 {
        let closed: u64 = self.closed().map(|(_, count)| count).sum();
        self.opened.load(Ordering::Relaxed).saturating_sub(closed)
    }
}

/// Request to the task of a connection to end; the first reason counts.
#[derive(Debug, Default)]
pub(super) struct Closer {
    reason: OnceLock<Closed>,
    asked: Notify,
}

impl Closer {
    pub(super) fn close(&self, reason: Closed) {
        // a later reason changes nothing
        let _first = self.reason.set(reason);
        self.asked.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.reason.get().is_some()
    }

    /// Waits for [`Closer::close`]; one task at a time.
    pub(super) async fn closed(&self) -> Closed {
        loop {
            if let Some(reason) = self.reason.get() {
                return *reason;
            }
            self.asked.notified().await;
        }
    }
}
