//! `/healthz` and `/metrics` over HTTP, on a separate thread and runtime, which answer even when the engine's threads are stuck.

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

/// Maximum number of connections; beyond the maximum the oldest is closed.
const CONNECTIONS: usize = 64;
/// Time limit for the head of a request.
const HEAD: Duration = Duration::from_secs(5);
/// Time limit for a request and its answer.
const EXCHANGE: Duration = Duration::from_secs(10);

/// Sources of the pages.
#[derive(Debug, Clone)]
pub struct Pages {
    /// The policy versions in use.
    pub versions: Arc<Versions>,
    /// The metrics of the engine.
    pub metrics: Arc<Metrics>,
    /// Detection of stalls.
    pub pulse: Arc<Pulse>,
    /// Counters of the connections of clients and workers.
    pub connections: RouterSender,
}

/// Returns 200 while a policy is live and no part of the engine is stalled.
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

/// An HTTP address on which the server cannot listen.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum HttpError {
    /// The address is not HOST:PORT on loopback.
    #[error(
        "`rollout.http = \"{0}\"`: expected HOST:PORT on loopback, like 127.0.0.1:9090 (for other machines use a tunnel)"
    )]
    Address(String),
    /// The address is in use or invalid.
    #[error("failed to listen on `{address}` for /healthz and /metrics (`rollout.http`; port 0 picks a free port)")]
    Bind {
        /// The address, HOST:PORT.
        address: String,
        /// Cause.
        source: std::io::Error,
    },
}

/// Listens on `address` (port 0 picks a free port) and answers on a separate thread until the process ends. Returns the bound
/// address.
///
/// # Errors
/// The address is wrong, not on loopback or in use, or the thread cannot be started.
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

/// Handles one request.
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
