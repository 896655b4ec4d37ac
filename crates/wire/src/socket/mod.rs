//! ZeroMQ endpoints: a ROUTER that anyone may connect to, a DEALER that stays connected to one, and the rule that plain endpoints
//! stay on loopback.
//!
//! Both speak ZMTP 3.1 on their own sockets (`crate::zmtp`), because what a peer may cost is bounded at every layer ([`Limits`]):
//! connections by the [`gate`], bytes that arrive by the budget, messages that wait by a fair inbox, bytes that leave by an outbox
//! per peer. Nothing here waits for a single peer but the task of its own connection.

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
pub use dealer::{DealerReceiver, DealerSender, connect_dealer};
pub use router::{Peer, RouterEvent, RouterReceiver, RouterSender, bind_router};

/// A socket operation that failed.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum SocketError {
    /// An endpoint that is not `tcp://HOST:PORT`.
    #[error("endpoint `{0}`: expected tcp://HOST:PORT, like tcp://127.0.0.1:5555")]
    Endpoint(String),
    /// A plain endpoint on a network.
    #[error(
        "endpoint `{0}` is not on loopback: frames are not sealed yet, so use 127.0.0.1 and a tunnel (ssh -L, WireGuard) between machines"
    )]
    NotLoopback(String),
    /// Binding failed.
    #[error("failed to listen on `{endpoint}`{remedy}")]
    Bind {
        /// Where.
        endpoint: String,
        /// What to do, where that is known.
        remedy: &'static str,
        /// Why.
        source: io::Error,
    },
    /// The peer does not take what is sent to it; its connection is closed.
    #[error("the other side does not take what is sent to it")]
    Slow,
    /// The other side is gone.
    #[error("the other side closed the connection")]
    Disconnected,
    /// A frame that cannot be read or written.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

impl SocketError {
    /// Returns whether the endpoint is wrong as it is written, rather than a connection.
    pub fn is_wrong_endpoint(&self) -> bool {
        matches!(self, Self::Endpoint(_) | Self::NotLoopback(_))
    }
}

/// Returns whether `HOST:PORT` is on loopback; `None` when it is not of that form.
pub fn is_loopback(address: &str) -> Option<bool> {
    let (host, port) = address.rsplit_once(':')?;
    port.parse::<u16>().ok()?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    Some(host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback()))
}

/// Checks an endpoint: `tcp://HOST:PORT` with a loopback host. Returns `HOST:PORT`.
///
/// # Errors
/// Says what was expected.
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
