//! `/healthz` and `/metrics` over HTTP.

use std::{net::SocketAddr, sync::Arc};

use axum::{Router, extract::State, http::StatusCode, routing::get};
use tokio::{net::TcpListener, sync::watch};

use crate::{metrics::Metrics, policy_slot::PolicySlot};

/// What the pages show.
#[derive(Debug, Clone)]
pub struct Pages {
    /// The live policy.
    pub slot: Arc<PolicySlot>,
    /// The numbers.
    pub metrics: Arc<Metrics>,
}

async fn healthz(State(pages): State<Pages>) -> (StatusCode, String) {
    match pages.slot.live() {
        Some(policy) => (StatusCode::OK, format!("policy version {}\n", policy.version())),
        None => (StatusCode::SERVICE_UNAVAILABLE, "no policy is live yet\n".to_owned()),
    }
}

async fn metrics(State(pages): State<Pages>) -> (StatusCode, String) {
    match pages.metrics.text() {
        Ok(text) => (StatusCode::OK, text),
        Err(error) => (StatusCode::INTERNAL_SERVER_ERROR, format!("{error}\n")),
    }
}

/// Listens on `address` (port 0 picks a free one) and returns where it really listens.
///
/// # Errors
/// The address is wrong or in use.
pub async fn bind(address: &str) -> Result<(TcpListener, SocketAddr), HttpError> {
    let bad = |source| HttpError {
        address: address.to_owned(),
        source,
    };
    let listener = TcpListener::bind(address).await.map_err(bad)?;
    let bound = listener.local_addr().map_err(bad)?;
    Ok((listener, bound))
}

/// An HTTP address that cannot be listened on.
#[derive(Debug, thiserror::Error)]
#[error("listening on `{address}` for /healthz and /metrics: {source} (`rollout.http`; port 0 picks a free port)")]
pub struct HttpError {
    address: String,
    source: std::io::Error,
}

/// Answers until `stop` becomes true.
///
/// # Errors
/// The listener fails.
pub async fn serve(listener: TcpListener, pages: Pages, mut stop: watch::Receiver<bool>) -> std::io::Result<()> {
    let router = Router::new()
        .route("/healthz", get(healthz))
        .route("/metrics", get(metrics))
        .with_state(pages);
    axum::serve(listener, router)
        .with_graceful_shutdown(async move {
            // an error means that the sender is gone, which is a stop too
            if stop.wait_for(|stop| *stop).await.is_err() {
                tracing::debug!("stopped by the end of the engine");
            }
        })
        .await
}
