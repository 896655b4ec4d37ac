//! ZeroMQ endpoints: binding, connecting, and the rule that plain endpoints stay on loopback.

use std::{net::IpAddr, time::Duration};

use bytes::Bytes;
use futures::{StreamExt, channel::mpsc};
use serde::{Serialize, de::DeserializeOwned};
use zeromq::{
    DealerRecvHalf, DealerSendHalf, DealerSocket, RouterRecvHalf, RouterSendHalf, RouterSocket, Socket, SocketEvent,
    SocketRecv, SocketSend, ZmqMessage,
};

use crate::codec::{CodecError, decode, encode};

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
    #[error("listening on `{endpoint}`: {detail}")]
    Bind {
        /// Where.
        endpoint: String,
        /// Why.
        detail: String,
    },
    /// Connecting failed.
    #[error("connecting to `{endpoint}`: {detail}")]
    Connect {
        /// Where.
        endpoint: String,
        /// Why.
        detail: String,
    },
    /// Sending failed.
    #[error("sending: {0}")]
    Send(String),
    /// Receiving failed.
    #[error("receiving: {0}")]
    Receive(String),
    /// The other side is gone.
    #[error("the other side closed the connection")]
    Disconnected,
    /// A frame that cannot be read or written.
    #[error(transparent)]
    Codec(#[from] CodecError),
}

/// Checks an endpoint: `tcp://HOST:PORT` with a loopback host.
///
/// # Errors
/// Says what was expected.
pub fn check_endpoint(endpoint: &str) -> Result<(), SocketError> {
    let bad = || SocketError::Endpoint(endpoint.to_owned());
    let rest = endpoint.strip_prefix("tcp://").ok_or_else(bad)?;
    let (host, port) = rest.rsplit_once(':').ok_or_else(bad)?;
    port.parse::<u16>().map_err(|_ignored| bad())?;
    let host = host.trim_start_matches('[').trim_end_matches(']');
    let loopback = host == "localhost" || host.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    if loopback {
        Ok(())
    } else {
        Err(SocketError::NotLoopback(endpoint.to_owned()))
    }
}

/// Who sent a frame; the answer goes there.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Peer(Bytes);

/// Binds a ROUTER and returns its halves with the endpoint that it really has (port 0 picks a free one).
///
/// # Errors
/// The endpoint is wrong or in use.
pub async fn bind_router(endpoint: &str) -> Result<(RouterSender, RouterReceiver, String), SocketError> {
    check_endpoint(endpoint)?;
    let mut socket = RouterSocket::new();
    let bound = socket.bind(endpoint).await.map_err(|e| {
        let hint = if e.to_string().contains("in use") {
            " (another process has the port: stop it, choose another, or use port 0)"
        } else {
            ""
        };
        SocketError::Bind {
            endpoint: endpoint.to_owned(),
            detail: format!("{e}{hint}"),
        }
    })?;
    let events = socket.monitor();
    let (send, receive) = socket.split();
    Ok((
        RouterSender(send),
        RouterReceiver { receive, events },
        bound.to_string(),
    ))
}

/// What happens at a ROUTER.
#[derive(Debug)]
pub enum RouterEvent<T> {
    /// A frame came; one that cannot be read carries its error, so that the sender can be told.
    Frame(Peer, Result<T, CodecError>),
    /// A peer closed its connection.
    Gone(Peer),
}

/// The sending half of a ROUTER; cheap to clone.
#[derive(Clone)]
pub struct RouterSender(RouterSendHalf);

impl RouterSender {
    /// Sends a message to a peer.
    ///
    /// # Errors
    /// The peer is gone or the message is too long.
    pub async fn send<T: Serialize>(&mut self, peer: &Peer, message: &T) -> Result<(), SocketError> {
        let mut out = ZmqMessage::from(encode(message)?);
        out.push_front(peer.0.clone());
        self.0.send(out).await.map_err(|e| SocketError::Send(e.to_string()))
    }
}

/// The receiving half of a ROUTER.
pub struct RouterReceiver {
    receive: RouterRecvHalf,
    events: mpsc::Receiver<SocketEvent>,
}

impl RouterReceiver {
    /// Waits for the next frame or the next disconnect. Safe to cancel.
    ///
    /// # Errors
    /// The socket itself failed.
    pub async fn receive<T: DeserializeOwned>(&mut self) -> Result<RouterEvent<T>, SocketError> {
        loop {
            tokio::select! {
                message = self.receive.recv() => {
                    let message = message.map_err(|e| SocketError::Receive(e.to_string()))?;
                    let mut frames = message.into_vec().into_iter();
                    let Some(identity) = frames.next() else { continue };
                    let body = frames.next_back().unwrap_or_default();
                    return Ok(RouterEvent::Frame(Peer(identity), decode(&body)));
                }
                Some(event) = self.events.next() => {
                    if let SocketEvent::Disconnected(identity) = event {
                        return Ok(RouterEvent::Gone(Peer(identity.into())));
                    }
                }
            }
        }
    }
}

/// Connects a DEALER; waits and retries until the other side is there.
///
/// # Errors
/// The endpoint is wrong.
pub async fn connect_dealer(endpoint: &str) -> Result<(DealerSender, DealerReceiver), SocketError> {
    check_endpoint(endpoint)?;
    let mut waited = false;
    loop {
        let mut socket = DealerSocket::new();
        match socket.connect(endpoint).await {
            Ok(()) => {
                let events = socket.monitor();
                let (send, receive) = socket.split();
                return Ok((DealerSender(send), DealerReceiver { receive, events }));
            }
            Err(error) => {
                if !waited {
                    tracing::info!("waiting for {endpoint}: {error}");
                    waited = true;
                }
                tokio::time::sleep(RETRY).await;
            }
        }
    }
}

/// Pause between attempts to connect.
const RETRY: Duration = Duration::from_millis(250);

/// The sending half of a DEALER.
pub struct DealerSender(DealerSendHalf);

impl DealerSender {
    /// Sends a message.
    ///
    /// # Errors
    /// The peer is gone or the message is too long.
    pub async fn send<T: Serialize>(&mut self, message: &T) -> Result<(), SocketError> {
        self.0
            .send(ZmqMessage::from(encode(message)?))
            .await
            .map_err(|e| SocketError::Send(e.to_string()))
    }
}

/// The receiving half of a DEALER.
pub struct DealerReceiver {
    receive: DealerRecvHalf,
    events: mpsc::Receiver<SocketEvent>,
}

impl DealerReceiver {
    /// Waits for the next message. Safe to cancel. After [`SocketError::Disconnected`] both halves are dropped and
    /// [`connect_dealer`] is called anew, so that the other side is greeted again.
    ///
    /// # Errors
    /// The other side is gone, the connection failed or the frame cannot be read.
    pub async fn receive<T: DeserializeOwned>(&mut self) -> Result<T, SocketError> {
        loop {
            tokio::select! {
                message = self.receive.recv() => {
                    let message = message.map_err(|e| SocketError::Receive(e.to_string()))?;
                    let body = message.into_vec().pop().unwrap_or_default();
                    return Ok(decode(&body)?);
                }
                Some(event) = self.events.next() => {
                    if matches!(event, SocketEvent::Disconnected(_)) {
                        return Err(SocketError::Disconnected);
                    }
                }
            }
        }
    }
}
