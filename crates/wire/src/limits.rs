//! Limits of one endpoint, for all peers together and for each peer: bytes, messages, connections and time.

use std::time::Duration;

use crate::codec::MAX_FRAME_BYTES;

/// Bytes above which a message is large: decoded on a separate thread, and counted toward [`Limits::large_bytes_per_second`].
/// Three cameras of 640 x 480 pixels stay below.
pub const LARGE_BYTES: usize = 4 << 20;
/// Elements above which a message is decoded on the thread for large messages as well.
pub const LARGE_ELEMENTS: usize = 1 << 14;
/// Bytes that each connection reads ahead of its current message, in addition to the budgets below.
pub const READ_AHEAD_BYTES: usize = 16 << 10;
/// Largest ZMTP command (`READY`, `PING`, ...), in bytes.
pub const MAX_COMMAND_BYTES: usize = 4096;
/// Most parts of a message: an empty delimiter as sent by REQ, and the frame.
pub const MAX_PARTS: usize = 2;
/// Descriptors reserved for `/healthz`, files and libraries.
pub const RESERVED_DESCRIPTORS: u64 = 128;

/// Limits of an endpoint. The default is the engine's; a learner reads whole trajectories at a higher rate.
#[derive(Debug, Clone)]
pub struct Limits {
    /// Largest message, in bytes.
    pub message_bytes: usize,
    /// Bytes of all messages that are being received or wait to be handled, over all connections. Large messages have three
    /// quarters. One message may exceed the limit in order to finish.
    pub received_bytes: usize,
    /// Messages of one peer that wait to be handled; at the limit the peer's socket is not read.
    pub waiting_messages: usize,
    /// Messages that one peer may send per second; above the limit the peer's socket is read later.
    pub messages_per_second: u32,
    /// Bytes that one peer may send per second, after a first burst; above the limit the peer's socket is read later.
    pub peer_bytes_per_second: usize,
    /// Bytes of large messages that all peers together may send per second.
    pub large_bytes_per_second: usize,
    /// Undecodable messages in a row after which the next one closes the connection.
    pub malformed_messages: u32,
    /// Bytes queued for one peer; above the limit the peer is disconnected. One message is always accepted.
    pub queued_bytes_per_peer: usize,
    /// Messages queued for one peer; above the limit the peer is disconnected.
    pub queued_messages_per_peer: usize,
    /// Bytes queued for all peers; above the limit the peer that has accepted no bytes for longest is disconnected.
    pub queued_bytes: usize,
    /// Connections; never more than the descriptors of the process allow. One address has at most three quarters.
    pub connections: usize,
    /// Time limit of greeting and handshake.
    pub handshake: Duration,
    /// Time that each step of a message may take in addition to its bytes at [`Limits::bytes_per_second`].
    pub message_grace: Duration,
    /// Slowest rate at which a started message may arrive.
    pub bytes_per_second: usize,
    /// Time for which a peer may accept no bytes while some are queued.
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
