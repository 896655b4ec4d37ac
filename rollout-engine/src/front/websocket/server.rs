//! The listener: HTTP until the upgrade to a websocket, `/healthz`, and the checks of a client before its session.

use std::{
    convert::Infallible,
    net::{SocketAddr, TcpListener as StdListener},
    path::PathBuf,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    thread,
    time::Duration,
};

use axum::body::Body;
use hyper::{
    Method, Request, Response, StatusCode,
    body::Incoming,
    header::{ALLOW, AUTHORIZATION, HeaderValue, ORIGIN, UPGRADE, WWW_AUTHENTICATE},
    server::conn::http1,
    service::service_fn,
    upgrade::{OnUpgrade, on},
};
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::{
    net::{TcpListener, TcpStream},
    sync::{oneshot, watch},
    task::JoinSet,
    time::timeout,
};
use tokio_tungstenite::tungstenite::handshake::server::create_response_with_body;
use wire::{
    limits::Limits,
    socket::{
        Closed, detect_vanished,
        gate::{Admission, Gate},
        is_loopback,
    },
    text::shown,
};

use super::{
    arrival::{Arrival, Pace, Received},
    key::{ApiKey, KeyError},
    session::{Session, Shared},
};
use crate::{
    device::versions::{Policy, Versions},
    inference::EngineQueue,
    job::JobError,
    metrics::Metrics,
    pulse::Pulse,
};

/// Maximum number of connections; one address, such as the host itself, has at most three quarters.
const CONNECTIONS: usize = 512;
/// Bytes of the head of a request.
const HEAD_BYTES: usize = 16 << 10;
/// Header lines of a request.
const HEADERS: usize = 64;
/// Time for the last messages of all sessions when the engine stops.
const LEAVE: Duration = Duration::from_secs(1);

/// An endpoint that cannot be opened.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum WebsocketError {
    /// The address is not HOST:PORT on loopback.
    #[error(
        "`--websocket {0}`: expected HOST:PORT on loopback, like 127.0.0.1:8000; frames are not sealed, with a key neither, so use a tunnel (ssh -L, WireGuard) between machines"
    )]
    Address(String),
    /// The address is in use or invalid.
    #[error("failed to listen on `{address}` for websockets (`--websocket`; port 0 picks a free port)")]
    Bind {
        /// The address, HOST:PORT.
        address: String,
        /// Cause.
        source: std::io::Error,
    },
    /// The key cannot be used.
    #[error(transparent)]
    Key(#[from] KeyError),
}

/// Options of the endpoint.
#[derive(Debug, Clone)]
pub struct WebsocketOptions {
    /// HOST:PORT on loopback; port 0 picks a free port.
    pub address: String,
    /// File with the key that clients must send; `None` accepts every client of this host.
    pub key_file: Option<PathBuf>,
}

/// Parts of the engine that the endpoint uses.
#[derive(Clone)]
pub struct Sources {
    /// The queue of rows.
    pub queue: Arc<EngineQueue>,
    /// The policy versions in use.
    pub versions: Arc<Versions>,
    /// The metrics of the engine.
    pub metrics: Arc<Metrics>,
    /// Detection of stalls.
    pub pulse: Arc<Pulse>,
}

/// A running endpoint.
#[derive(Debug)]
pub struct Websocket {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    ended: oneshot::Receiver<Infallible>,
}

impl Websocket {
    /// Returns the bound address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Closes all sessions, and waits at most a second for their last messages.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        if timeout(LEAVE, self.ended).await.is_err() {
            tracing::warn!("websocket sessions did not end in time");
        }
    }
}

/// Listens and serves on a separate thread until [`Websocket::stop`].
///
/// # Errors
/// The address is wrong, not on loopback or in use, the key cannot be used, or the thread cannot be started.
pub fn start(options: &WebsocketOptions, sources: Sources) -> Result<Websocket, WebsocketError> {
    let address = &options.address;
    let failed = |source| WebsocketError::Bind {
        address: address.clone(),
        source,
    };
    if is_loopback(address) != Some(true) {
        return Err(WebsocketError::Address(address.clone()));
    }
    let key = options.key_file.as_deref().map(ApiKey::read).transpose()?;
    let listener = StdListener::bind(address).map_err(failed)?;
    let bound = listener.local_addr().map_err(failed)?;
    if !bound.ip().is_loopback() {
        return Err(WebsocketError::Address(format!("{address} ({bound})")));
    }
    listener.set_nonblocking(true).map_err(failed)?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(failed)?;
    let (stop, stopped) = watch::channel(false);
    let (guard, ended) = oneshot::channel();
    let limits = Limits::default();
    let front = Front {
        shared: Shared {
            queue: sources.queue,
            versions: sources.versions,
            metrics: sources.metrics,
            stop: stopped,
        },
        pulse: sources.pulse,
        key,
        received: Arc::new(Received::new(limits.received_bytes)),
        pace: Pace {
            grace: limits.message_grace,
            bytes_per_second: limits.bytes_per_second,
        },
        handshake: limits.handshake,
        connections: AtomicU64::new(0),
        sessions: AtomicU64::new(0),
    };
    thread::Builder::new()
        .name("websocket".to_owned())
        .spawn(move || {
            let _guard: oneshot::Sender<Infallible> = guard;
            if let Err(error) = runtime.block_on(serve(listener, Arc::new(front))) {
                tracing::error!("the websocket endpoint is gone: {error}");
            }
        })
        .map_err(failed)?;
    Ok(Websocket {
        address: bound,
        stop,
        ended,
    })
}

async fn serve(listener: StdListener, front: Arc<Front>) -> std::io::Result<()> {
    let listener = TcpListener::from_std(listener)?;
    let gate = Gate::new(CONNECTIONS);
    let mut stop = front.shared.stop.clone();
    let mut connections = JoinSet::new();
    loop {
        tokio::select! {
            (stream, admission) = gate.accept(&listener) => {
                connections.spawn(Arc::clone(&front).connection(stream, admission));
            }
            Some(_ended) = connections.join_next() => {}
            _ = stop.wait_for(|stop| *stop) => break,
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
    Ok(())
}

/// State of the endpoint.
struct Front {
    shared: Shared,
    pulse: Arc<Pulse>,
    key: Option<ApiKey>,
    received: Arc<Received>,
    pace: Pace,
    /// Time limit for the request and its answer.
    handshake: Duration,
    /// Number of the next connection.
    connections: AtomicU64,
    /// Number of the next session.
    sessions: AtomicU64,
}

/// A request that became a websocket, with the policy that it was told.
type Accepted = Mutex<Option<(OnUpgrade, Arc<Policy>)>>;

impl Front {
    /// Handles a connection: one HTTP request, then the session if the request was an upgrade.
    async fn connection(self: Arc<Self>, stream: TcpStream, admission: Admission) {
        if let Err(error) = detect_vanished(&stream) {
            tracing::debug!("a websocket connection failed: {error}");
            return admission.leave(Closed::Left);
        }
        let accepted = Accepted::default();
        let service = service_fn(|request| {
            let response = self.respond(request, &accepted);
            async { Ok::<_, Infallible>(response) }
        });
        let connection = http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(self.handshake)
            .max_buf_size(HEAD_BYTES)
            .max_headers(HEADERS)
            .keep_alive(false)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades();
        let mut stop = self.shared.stop.clone();
        let answered = tokio::select! {
            answered = timeout(self.handshake, connection) => answered,
            _ = stop.wait_for(|stop| *stop) => return admission.leave(Closed::Stopped),
            reason = admission.evicted() => return admission.leave(reason),
        };
        match answered {
            Err(_late) => return admission.leave(Closed::Handshake),
            Ok(Err(error)) => {
                tracing::debug!("a request from {} failed: {error}", admission.address);
                return admission.leave(Closed::Protocol);
            }
            Ok(Ok(())) => {}
        }
        let accepted = accepted.into_inner().unwrap_or_else(PoisonError::into_inner);
        let Some((upgrade, policy)) = accepted else {
            return admission.leave(Closed::Left);
        };
        let upgraded = match upgrade.await {
            Ok(upgraded) => upgraded,
            Err(error) => {
                tracing::debug!("an upgrade from {} failed: {error}", admission.address);
                return admission.leave(Closed::Left);
            }
        };
        admission.opened();
        let arrival = Arrival::new(
            &self.received,
            self.connections.fetch_add(1, Ordering::Relaxed),
            self.pace,
        );
        let number = self.sessions.fetch_add(1, Ordering::Relaxed);
        let shared = self.shared.clone();
        let session = Session::new(upgraded, arrival, admission, shared, &policy, number).await;
        session.run(policy).await;
    }

    fn respond(&self, request: Request<Incoming>, accepted: &Accepted) -> Response<Body> {
        match (request.uri().path(), request.method()) {
            ("/healthz", &Method::GET) => self.healthz(),
            ("/healthz" | "/", method) if method != Method::GET => {
                let text = format!("found method {}, expected GET", shown(method.as_str()));
                let mut response = plain(StatusCode::METHOD_NOT_ALLOWED, &text);
                response.headers_mut().insert(ALLOW, HeaderValue::from_static("GET"));
                response
            }
            ("/", _) => self.upgrade(request, accepted).unwrap_or_else(|response| *response),
            (path, _) => plain(
                StatusCode::NOT_FOUND,
                &format!("found path `{}`, expected `/` (websocket) or `/healthz`", shown(path)),
            ),
        }
    }

    /// Returns 200 while a policy is live and no part of the engine is stalled; needs no key.
    fn healthz(&self) -> Response<Body> {
        match (self.pulse.stalled(), self.shared.versions.live()) {
            (Some(stalled), _) => plain(StatusCode::SERVICE_UNAVAILABLE, &stalled),
            (None, None) => plain(StatusCode::SERVICE_UNAVAILABLE, &JobError::NotReady.to_string()),
            (None, Some(_)) => plain(StatusCode::OK, "OK"),
        }
    }

    fn upgrade(
        &self,
        mut request: Request<Incoming>,
        accepted: &Accepted,
    ) -> Result<Response<Body>, Box<Response<Body>>> {
        let headers = request.headers();
        if let Some(key) = &self.key {
            let header = headers.get(AUTHORIZATION).map(HeaderValue::as_bytes);
            key.check(header).map_err(|found| {
                self.shared.metrics.refused.with_label_values(&["invalid"]).inc();
                let text = format!("wrong key: found {found}, expected `Authorization: Api-Key KEY`");
                let mut response = plain(StatusCode::UNAUTHORIZED, &text);
                let scheme = HeaderValue::from_static("Api-Key");
                response.headers_mut().insert(WWW_AUTHENTICATE, scheme);
                response
            })?;
        }
        // a page in a browser of this host could otherwise drive the robot
        if headers.contains_key(ORIGIN) {
            let text = "found the header `Origin`, expected a client that is not a browser";
            return Err(Box::new(plain(StatusCode::FORBIDDEN, text)));
        }
        let response = create_response_with_body(&request, Body::empty).map_err(|error| {
            let text = format!("expected the upgrade to a websocket, as openpi-client sends it: {error}");
            let mut response = plain(StatusCode::UPGRADE_REQUIRED, &text);
            response
                .headers_mut()
                .insert(UPGRADE, HeaderValue::from_static("websocket"));
            response
        })?;
        let Some(policy) = self.shared.versions.live() else {
            let text = format!("{} (retry: the same request may succeed later)", JobError::NotReady);
            self.shared.metrics.refused.with_label_values(&["not_ready"]).inc();
            return Err(Box::new(plain(StatusCode::SERVICE_UNAVAILABLE, &text)));
        };
        let mut accepted = accepted.lock().unwrap_or_else(PoisonError::into_inner);
        *accepted = Some((on(&mut request), policy));
        Ok(response)
    }
}

/// Returns a response of one line.
fn plain(status: StatusCode, line: &str) -> Response<Body> {
    let mut response = Response::new(Body::from(format!("{line}\n")));
    *response.status_mut() = status;
    response
}
