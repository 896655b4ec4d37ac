//! ZeroMQ endpoints: a ROUTER that accepts any peer, a DEALER that connects to one ROUTER, and the rule that plain endpoints
//! stay on loopback.
//!
//! Both speak ZMTP 3.1 on their own sockets (`crate::zmtp`), so that the cost of a peer is bounded at every layer ([`Limits`]).
//! The [`gate`] bounds connections, the budget arriving bytes, a fair inbox waiting messages, and an outbox per peer the bytes to
//! send. Only the task of a peer's own connection waits for the peer.

use std::{io, net::IpAddr};

use crate::{codec::CodecError, limits::Limits};

mod closer;
pub mod gate;
mod budget;
mod outbox;
mod pace;
mod connection;
mod inbox;
mod router;
mod dealer;

pub use closer::{Closed, Counters};
pub use connection::detect_vanished;
pub use dealer::{DealerReceiver, DealerSender, connect_dealer};
pub use router::{Peer, RouterEvent, RouterReceiver, RouterSender, bind_router};

/// Failure of a socket operation.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// The endpoint is not `tcp://HOST:PORT`.
    #[error("endpoint `{0}`: expected tcp://HOST:PORT, like tcp://127.0.0.1:5555")]
    Endpoint(String),
    /// The endpoint is plain and not on loopback.
    #[error(
        "endpoint `{0}` is not on loopback: frames are not sealed yet, so use 127.0.0.1 and a tunnel (ssh -L, WireGuard) between machines"
    )]
    NotLoopback(String),
    /// Binding failed.
    #[error("failed to listen on `{endpoint}`{remedy}")]
    Bind {
        /// Endpoint as configured.
        endpoint: String,
        /// Remedy, where one is known; otherwise empty.
        remedy: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// The peer accepts too little of what is sent; its connection is closed.
    #[error("the other side accepts too little of what is sent")]
    Slow,
    /// The other side closed the connection.
    #[error("the other side closed the connection")]
    Disconnected,
    /// A frame cannot be decoded or encoded.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

impl SocketError {
    /// Returns whether the endpoint itself is invalid, as opposed to a failed connection.
    pub fn is_wrong_endpoint(&self) -> bool {
        matches!(self, Self::Endpoint(_) | Self::NotLoopback(_))
    }
}

/// Returns whether `HOST:PORT` is on loopback; `None` for a text of another form.
pub fn is_loopback(address: &str) -> Option<bool> {
    let (host, port) = address.rsplit_once(':')?;
    port.parse::<u16>().ok()?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Some(host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()))
}

/// Checks that an endpoint is `tcp://HOST:PORT` with a loopback host. Returns `HOST:PORT`.
///
/// # Errors
/// The endpoint has another form or is not on loopback.
pub fn check_endpoint(endpoint: &str) -> Result<&str, SocketError> {
    let address = endpoint.strip_prefix("tcp://");
    match address.and_then(|address| Some((address, is_loopback(address)?))) {
        Some((address, true)) => Ok(address),
        Some((_, false)) => Err(SocketError::NotLoopback(endpoint.to_owned())),
        None => Err(SocketError::Endpoint(endpoint.to_owned())),
    }
}

#[cfg(test)]
mod tests;
