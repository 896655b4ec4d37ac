//! Admission of connections: a limit in total and per address; at the limit, idle connections are evicted.

use std::{
    collections::BTreeMap,
    net::IpAddr,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU8, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

use rustix::{
    io::Errno,
    process::{Resource, Rlimit, getrlimit, setrlimit},
};
use tokio::net::{TcpListener, TcpStream};

use super::closer::{Closed, Closer, Counters};
use crate::limits::RESERVED_DESCRIPTORS;

/// Idle time after which a connection without messages since its handshake may be evicted.
const SILENT_IDLE: Duration = Duration::from_secs(1);
/// Idle time after which a connection that has sent messages may be evicted.
const ACTIVE_IDLE: Duration = Duration::from_mins(1);
/// Pauses after consecutive failures to accept a connection, such as a lack of descriptors.
const BACKOFF: [Duration; 4] = [
    Duration::from_millis(10),
    Duration::from_millis(50),
    Duration::from_millis(200),
    Duration::from_secs(1),
];
/// Soft limit of descriptors that a process requests, as far as its hard limit allows.
const WANTED_DESCRIPTORS: u64 = 65_536;

/// Raises the soft limit of descriptors toward the hard limit. Returns how many connections fit in addition to the descriptors
/// that the process needs.
fn descriptors_for_connections() -> usize {
    let limit = getrlimit(Resource::Nofile);
    let hard = limit.maximum.unwrap_or(u64::MAX);
    let mut soft = limit.current.unwrap_or(u64::MAX);
    let wanted = hard.min(WANTED_DESCRIPTORS);
    if soft < wanted {
        let raised = Rlimit {
            current: Some(wanted),
            maximum: limit.maximum,
        };
        match setrlimit(Resource::Nofile, raised) {
            Ok(()) => soft = wanted,
            Err(error) => tracing::debug!("the limit of {soft} descriptors is unchanged: {error}"),
        }
    }
    // a process with very few descriptors keeps half for itself
    let left = soft.saturating_sub(RESERVED_DESCRIPTORS).max(soft / 2);
    usize::try_from(left).unwrap_or(usize::MAX)
}

/// Stage of a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
enum Stage {
    Opening,
    Silent,
    Active,
}

#[derive(Debug)]
struct Activity {
    begun: Instant,
    stage: AtomicU8,
    /// Milliseconds since `begun`.
    last: AtomicU64,
}

impl Activity {
    fn stage(&self) -> Stage {
        match self.stage.load(Ordering::Relaxed) {
            0 => Stage::Opening,
            1 => Stage::Silent,
            _ => Stage::Active,
        }
    }

    fn reach(&self, stage: Stage) {
        self.last
            .store(self.begun.elapsed().as_millis() as u64, Ordering::Relaxed);
        self.stage.store(stage as u8, Ordering::Relaxed);
    }

    fn idle_since(&self) -> Instant {
        self.begun + Duration::from_millis(self.last.load(Ordering::Relaxed))
    }

    fn may_be_evicted(&self) -> bool {
        let idle = self.idle_since().elapsed();
        match self.stage() {
            Stage::Opening => true,
            Stage::Silent => idle > SILENT_IDLE,
            Stage::Active => idle > ACTIVE_IDLE,
        }
    }
}

#[derive(Debug)]
struct Place {
    address: IpAddr,
    closer: Arc<Closer>,
    activity: Arc<Activity>,
}

/// Connection slots ("places") of an endpoint.
#[derive(Debug)]
pub struct Gate {
    most: usize,
    most_per_address: usize,
    places: Mutex<BTreeMap<u64, Place>>,
    next: AtomicU64,
    counters: Arc<Counters>,
}

impl Gate {
    /// Returns a gate for at most `connections`, limited by the descriptors of the process. One address has at most three
    /// quarters of the places, so that no host can lock out all others.
    pub fn new(connections: usize) -> Arc<Self> {
        let most = connections.min(descriptors_for_connections()).max(1);
        Arc::new(Self {
            most,
            most_per_address: most.div_ceil(4) * 3,
            places: Mutex::default(),
            next: AtomicU64::new(1),
            counters: Arc::default(),
        })
    }

    /// Returns the connection counts.
    pub fn counters(&self) -> &Arc<Counters> {
        &self.counters
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<u64, Place>> {
        // every change is one insertion or one removal
        self.places.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Accepts the next connection that gets a place. When the system has no descriptor left, an idle connection is evicted and
    /// the next attempt waits briefly. Safe to cancel.
    pub async fn accept(self: &Arc<Self>, listener: &TcpListener) -> (TcpStream, Admission) {
        let mut failures = 0;
        loop {
            match listener.accept().await {
                Ok((stream, peer)) => {
                    failures = 0;
                    match self.admit(peer.ip()) {
                        Some(admission) => return (stream, admission),
                        None => {
                            tracing::warn!("no place for a connection from {}: {} are in use", peer.ip(), self.most);
                        }
                    }
                }
                Err(error) => {
                    let exhausted = [Errno::MFILE, Errno::NFILE, Errno::NOBUFS, Errno::NOMEM];
                    if exhausted
                        .iter()
                        .any(|errno| error.raw_os_error() == Some(errno.raw_os_error()))
                    {
                        tracing::warn!("no connection can be accepted: {error}; idle ones are closed");
                        self.evict(None);
                    }
                    let pause = BACKOFF.get(failures).or(BACKOFF.last()).copied().unwrap_or_default();
                    failures += 1;
                    tokio::time::sleep(pause).await;
                }
            }
        }
    }

    fn admit(self: &Arc<Self>, address: IpAddr) -> Option<Admission> {
        self.counters.opened.fetch_add(1, Ordering::Relaxed);
        let mut places = self.lock();
        if places.len() >= self.most_per_address {
            let open = |place: &&Place| !place.closer.is_closed();
            let same = places
                .values()
                .filter(open)
                .filter(|place| place.address == address)
                .count();
            let all = places.values().filter(open).count();
            let room = if same >= self.most_per_address {
                evict(&places, Some(address))
            } else {
                all < self.most || evict(&places, None)
            };
            if !room {
                self.counters.count(Closed::Full);
                return None;
            }
        }
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let (closer, activity) = (
            Arc::new(Closer::default()),
            Arc::new(Activity {
                begun: Instant::now(),
                stage: AtomicU8::new(Stage::Opening as u8),
                last: AtomicU64::new(0),
            }),
        );
        let place = Place {
            address,
            closer: Arc::clone(&closer),
            activity: Arc::clone(&activity),
        };
        places.insert(id, place);
        Some(Admission {
            gate: Arc::clone(self),
            id,
            address,
            closer,
            activity,
        })
    }

    fn evict(&self, address: Option<IpAddr>) -> bool {
        evict(&self.lock(), address)
    }

    /// Closes all connections.
    pub fn close(&self) {
        for place in self.lock().values() {
            place.closer.close(Closed::Stopped);
        }
    }
}

/// Closes the evictable connection at the earliest stage, the longest idle first; returns whether there was one.
fn evict(places: &BTreeMap<u64, Place>, address: Option<IpAddr>) -> bool {
    let idle = places
        .values()
        .filter(|place| address.is_none_or(|address| place.address == address))
        .filter(|place| !place.closer.is_closed() && place.activity.may_be_evicted())
        .min_by_key(|place| (place.activity.stage(), place.activity.idle_since()));
    if let Some(place) = idle {
        place.closer.close(Closed::Evicted);
    }
    idle.is_some()
}

/// Place of a connection; dropping the value frees the place.
#[derive(Debug)]
pub struct Admission {
    gate: Arc<Gate>,
    pub(super) id: u64,
    /// Address of the peer.
    pub address: IpAddr,
    pub(super) closer: Arc<Closer>,
    activity: Arc<Activity>,
}

impl Admission {
    /// Waits until the connection is asked to close, and returns the reason.
    pub async fn evicted(&self) -> Closed {
        self.closer.closed().await
    }

    /// Records that the handshake is complete.
    pub fn opened(&self) {
        self.activity.reach(Stage::Silent);
    }

    /// Records that a message arrived.
    pub fn active(&self) {
        self.activity.reach(Stage::Active);
    }

    /// Frees the place and counts the reason.
    pub fn leave(self, reason: Closed) {
        self.gate.counters.count(reason);
        self.gate.lock().remove(&self.id);
        // removed above, so that dropping `self` does not count again
        self.closer.close(reason);
    }
}

impl Drop for Admission {
    fn drop(&mut self) {
        if self.gate.lock().remove(&self.id).is_some() {
            self.gate.counters.count(Closed::Stopped);
        }
    }
}
