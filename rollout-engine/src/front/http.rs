//! `/healthz` and `/metrics` over HTTP, on a thread and a runtime of their own, so that they answer when the engine's are stuck.

use std::{
    convert::Infallible,
    net::{SocketAddr, TcpListener as StdListener},
    sync::Arc,
    thread,
    time::Duration,
};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use hyper::server::conn::http1;
use hyper_util::{
    rt::{TokioIo, TokioTimer},
    service::TowerToHyperService,
};
use tokio::net::{TcpListener, TcpStream};
use wire::socket::{
    Closed, RouterSender,
    gate::{Admission, Gate},
    is_loopback,
};

use crate::{device::versions::Versions, metrics::Metrics, pulse::Pulse};

/// Connections at a time; beyond that the oldest makes room.
const CONNECTIONS: usize = 64;
/// Time for the head of a request.
const HEAD: Duration = Duration::from_secs(5);
/// Time for a whole exchange.
const EXCHANGE: Duration = Duration::from_secs(10);

/// What the pages show.
#[derive(Debug, Clone)]
pub struct Pages {
    /// The live policy.
    pub versions: Arc<Versions>,
    /// The numbers.
    pub metrics: Arc<Metrics>,
    /// Whether the engine moves.
    pub pulse: Arc<Pulse>,
    /// Connections of clients and workers.
    pub connections: RouterSender,
}

/// 200 while a policy is live and the engine moves.
async fn healthz(State(pages): State<Pages>) -> (StatusCode, String) {
    match (pages.pulse.stalled(), pages.versions.live()) {
        (Some(stalled), _) => (StatusCode::SERVICE_UNAVAILABLE, format!("{stalled}\n")),
        (None, None) => (StatusCode::SERVICE_UNAVAILABLE, "no policy is live yet\n".to_owned()),
        (None, Some(policy)) => (StatusCode::OK, format!("policy version {}\n", policy.version())),
    }
}

async fn metrics(State(pages): State<Pages>) -> (StatusCode, String) {
    match pages.metrics.text(pages.connections.counters()) {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// An HTTP address that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// Not a loopback address.
    #[error(
        "`rollout.http = \"{0}\"`: expected HOST:PORT on loopback, like 127.0.0.1:9090 (for other machines use a tunnel)"
    )]
    Address(String),
    /// In use, or no such address.
    #[error("failed to listen on `{address}` for /healthz and /metrics (`rollout.http`; port 0 picks a free port)")]
    Bind {
        /// Where.
        address: String,
        /// Why.
        source: std::io::Error,
    },
}

/// Listens on `address` (port 0 picks a free one), answers on a thread of its own until the process ends, and returns where it really
/// listens.
///
/// # Errors
/// The address is wrong, not on loopback or in use, or there is no thread for it.
pub fn start(address: &str, pages: Pages) -> Result<SocketAddr, HttpError> {
    let failed = |source| HttpError::Bind {
        address: address.to_owned(),
        source,
    };
    if is_loopback(address) != Some(true) {
        return Err(HttpError::Address(address.to_owned()));
    }
    let listener = StdListener::bind(address).map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    if !bound.ip().is_loopback() {
        return Err(HttpError::Address(format!("{address} ({bound})")));
    }
    listener.set_nonblocking(true).map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    thread::Builder::new()
        .name("http".to_owned())
        .spawn(move || {
            let Err(error) = runtime.block_on(serve(listener, pages));
            tracing::error!("/healthz and /metrics are gone: {error}");
        })
        .map_err(failed)?;
    Ok(bound)
}

#[expect(clippy::infinite_loop, reason = "it answers as long as the process lives")]
async fn serve(listener: StdListener, pages: Pages) -> std::io::Result<Infallible> {
    let listener = TcpListener::from_std(listener)?;
    let gate = Gate::new(CONNECTIONS);
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics))
        .with_state(pages);
    loop {
        let (stream, admission) = gate.accept(&listener).await;
        tokio::spawn(exchange(stream, admission, router.clone()));
    }
}

/// One request and its answer.
async fn exchange(stream: TcpStream, admission: Admission, router: Router) {
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router));
    let reason = tokio::select! {
        done = tokio::time::timeout(EXCHANGE, connection) => {
            if let Ok(Err(error)) = &done {
                tracing::debug!("an HTTP request from {} failed: {error}", admission.address);
            }
            if done.is_ok() { Closed::Left } else { Closed::Late }
        }
        reason = admission.evicted() => reason,
    };
    admission.leave(reason);
}
