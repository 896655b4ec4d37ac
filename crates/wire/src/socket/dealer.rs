//! DEALER socket: one connection to a ROUTER.

use std::{fmt, sync::Arc, time::Duration};

use serde::{Serialize, de::DeserializeOwned};
use tokio::{net::TcpStream, sync::mpsc, time::timeout};

use super::{
    Limits, SocketError,
    budget::{Budget, Held},
    check_endpoint,
    closer::{Closed, Closer},
    connection::{Fault, Reader, Traffic, open},
    outbox::Outbox,
};
use crate::{
    codec::{decode, encode},
    zmtp::SocketType,
};

/// Pause between attempts to connect.
const RETRY: Duration = Duration::from_millis(250);
/// Time limit of one attempt to reach the host. Short, so that a returning host is found within two seconds: the kernel retries
/// after 1, 3, 7, ... seconds.
const ATTEMPT: Duration = Duration::from_millis(1500);

/// Connects a DEALER; waits and retries until the other side accepts.
///
/// # Errors
/// The endpoint is invalid.
pub async fn connect_dealer(endpoint: &str) -> Result<(DealerSender, DealerReceiver), SocketError> {
    let address = check_endpoint(endpoint)?;
    let limits = Limits {
        messages_per_second: u32::MAX,
        peer_bytes_per_second: usize::MAX,
        large_bytes_per_second: usize::MAX,
        ..Limits::default()
    };
    let traffic = Traffic::new(limits);
    let mut waited = false;
    loop {
        match attempt(address, &traffic).await {
            Ok(halves) => return Ok(halves),
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

async fn attempt(address: &str, traffic: &Arc<Traffic>) -> Result<(DealerSender, DealerReceiver), Fault> {
    let connecting = timeout(ATTEMPT, TcpStream::connect(address));
    let late = || std::io::Error::new(std::io::ErrorKind::TimedOut, format!("no answer within {ATTEMPT:?}"));
    let stream = connecting
        .await
        .unwrap_or_else(|_late| Err(late()))
        .map_err(Fault::Io)?;
    let (reader, outbox) = open(stream, SocketType::Dealer, traffic).await?;
    let closer = Arc::new(Closer::default());
    let limits = &traffic.limits;
    let (sender, frames) = mpsc::channel(limits.waiting_messages);
    let handle = Arc::new(Handle {
        outbox: Arc::clone(&outbox),
        closer: Arc::clone(&closer),
    });
    // received messages are bounded in bytes as well; one message may always be received
    let budget = Budget::new(limits.received_bytes);
    tokio::spawn(async move {
        let ended = tokio::select! {
            fault = read(reader, &outbox, &budget, &closer, &sender) => fault.to_string(),
            Closed::Slow = outbox.run() => Fault::Slow.to_string(),
            _stopped = closer.closed() => Fault::Left.to_string(),
        };
        tracing::debug!("the connection ended: {ended}");
        outbox.close(Closed::Stopped);
    });
    Ok((
        DealerSender {
            handle: Arc::clone(&handle),
        },
        DealerReceiver {
            frames,
            _handle: handle,
        },
    ))
}

type Frame = (Vec<u8>, Held);

async fn read(
    mut reader: Reader,
    outbox: &Outbox,
    budget: &Budget,
    closer: &Arc<Closer>,
    frames: &mpsc::Sender<Frame>,
) -> Fault {
    loop {
        let Ok(place) = frames.reserve().await else {
            return Fault::Left;
        };
        match reader.message(budget, 0, closer, outbox).await {
            Ok((frame, receiving)) => place.send((frame, receiving.complete())),
            Err(fault) => return fault,
        }
    }
}

#[derive(Debug)]
struct Handle {
    outbox: Arc<Outbox>,
    closer: Arc<Closer>,
}

impl Drop for Handle {
    fn drop(&mut self) {
        self.closer.close(Closed::Stopped);
    }
}

/// The sending half of a DEALER.
pub struct DealerSender {
    handle: Arc<Handle>,
}

impl fmt::Debug for DealerSender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DealerSender").finish_non_exhaustive()
    }
}

impl DealerSender {
    /// Sends a message; waits while the outbox is full. A peer that accepts no bytes for
    /// [`Limits::send_stall`] is disconnected.
    ///
    /// # Errors
    /// The connection has ended or the message is too long.
    pub async fn send<T: Serialize>(&mut self, message: &T) -> Result<(), SocketError> {
        let frame = encode(message)?;
        let sent = self.handle.outbox.send_in_time(frame).await;
        sent.map_err(|_gone| SocketError::Disconnected)
    }
}

/// The receiving half of a DEALER.
pub struct DealerReceiver {
    frames: mpsc::Receiver<Frame>,
    _handle: Arc<Handle>,
}

impl fmt::Debug for DealerReceiver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DealerReceiver").finish_non_exhaustive()
    }
}

impl DealerReceiver {
    /// Waits for the next message. Safe to cancel. After [`SocketError::Disconnected`], drop both halves and call
    /// [`connect_dealer`] again, so that the peer gets a new greeting.
    ///
    /// # Errors
    /// The connection has ended or the frame cannot be decoded.
    pub async fn receive<T: DeserializeOwned>(&mut self) -> Result<T, SocketError> {
        match self.frames.recv().await {
            Some((frame, _held)) => Ok(decode(&frame)?),
            None => Err(SocketError::Disconnected),
        }
    }
}
