//! What one endpoint accepts from its peers together and from each: bytes, messages, connections and time.

use std::time::Duration;

use crate::codec::MAX_FRAME_BYTES;

/// A message beyond this is large: it is decoded on a thread of its own, and counts toward [`Limits::large_bytes_per_second`].
/// Three cameras of 640 x 480 pixels stay below.
pub const LARGE_BYTES: usize = 4 << 20;
/// A message with more elements is decoded on that thread too.
pub const LARGE_ELEMENTS: usize = 1 << 14;
/// Bytes that a connection reads ahead of the message it is in; for each connection in addition to the budgets below.
pub const READ_AHEAD_BYTES: usize = 16 << 10;
/// Largest ZMTP command (`READY`, `PING`, ...).
pub const MAX_COMMAND_BYTES: usize = 4096;
/// Parts of a message: an empty delimiter as REQ sends it, and the frame.
pub const MAX_PARTS: usize = 2;
/// Descriptors that connections leave to `/healthz`, files and libraries.
pub const RESERVED_DESCRIPTORS: u64 = 128;

/// Limits of an endpoint. The default is what an engine uses; a learner reads whole trajectories faster.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Largest message, in bytes.
    pub message_bytes: usize,
    /// Bytes of all messages that are being received or wait to be handled, over all connections; large ones have three quarters. One
    /// message beyond is finished.
    pub received_bytes: usize,
    /// Messages of one peer that wait to be handled; beyond that its socket is not read.
    pub waiting_messages: usize,
    /// Messages that one peer may send per second; beyond that its socket is read later.
    pub messages_per_second: u32,
    /// Bytes that one peer may send per second, beyond a first burst of as many; beyond that its socket is read later.
    pub peer_bytes_per_second: usize,
    /// Bytes of large messages that all peers together may send per second.
    pub large_bytes_per_second: usize,
    /// Messages in a row that cannot be decoded before the connection is closed.
    pub malformed_messages: u32,
    /// Bytes that wait to be sent to one peer; a peer beyond that is disconnected. One message is always accepted.
    pub queued_bytes_per_peer: usize,
    /// Messages that wait to be sent to one peer; a peer beyond that is disconnected.
    pub queued_messages_per_peer: usize,
    /// Bytes that wait to be sent to all peers; beyond that the peer that has taken nothing for longest is disconnected.
    pub queued_bytes: usize,
    /// Connections; never more than the descriptors of the process allow. One address has at most three quarters of them.
    pub connections: usize,
    /// Time for greeting and handshake.
    pub handshake: Duration,
    /// Time that each step of a message may take on top of its bytes at [`Limits::bytes_per_second`].
    pub message_grace: Duration,
    /// Slowest rate at which a begun message may arrive.
    pub bytes_per_second: usize,
    /// Time that a peer may take no byte while some wait for it.
    pub send_stall: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            message_bytes: MAX_FRAME_BYTES,
            received_bytes: 1 << 30,
            waiting_messages: 32,
            messages_per_second: 4096,
            peer_bytes_per_second: 128 << 20,
            large_bytes_per_second: 128 << 20,
            malformed_messages: 16,
            queued_bytes_per_peer: 64 << 20,
            queued_messages_per_peer: 4096,
            queued_bytes: 512 << 20,
            connections: 4096,
            handshake: Duration::from_secs(5),
            message_grace: Duration::from_secs(5),
            bytes_per_second: 256 << 10,
            send_stall: Duration::from_secs(10),
        }
    }
}
