//! Episodes of an order, collected.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use wire::messages::{Mode, Reset, Trajectory};

use crate::{
    error::{LearnerError, Result},
    progress::progress_style,
    ring::{
        hub::{Hub, HubEvent},
        launch::Children,
    },
};

/// How long the ring may be silent before the run ends with an error.
const SILENCE: Duration = Duration::from_mins(2);
/// How often children are looked after while waiting.
const LOOK: Duration = Duration::from_millis(200);

/// Episodes of an order.
#[derive(Debug, Default)]
pub struct Collected {
    /// Episodes in the order of their environment and episode numbers.
    pub trajectories: Vec<Trajectory>,
    /// What happened meanwhile.
    pub report: CollectReport,
}

/// What happened while the episodes of an order, or of all orders of an iteration, came.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CollectReport {
    /// Seconds until the version was live, from the announce; 0 where that was not reported meanwhile.
    pub reload_seconds: f64,
    /// Seconds from the order to the last episode.
    pub seconds: f64,
    /// Seconds of these that the learner only waited.
    pub waited: f64,
    /// Episodes left out for their version and ordered again.
    pub stale: usize,
}

/// Orders `resets` from `version` in the place of all that is wanted, and waits for all of them.
///
/// # Errors
/// A child ends, an engine refuses the version, or nothing comes for two minutes.
pub fn collect(
    hub: &Hub,
    children: &mut Children,
    version: u64,
    mode: Mode,
    resets: Vec<Reset>,
    label: &str,
) -> Result<Collected> {
    let begin = Instant::now();
    let wanted = resets.len();
    let mut trajectories = Vec::with_capacity(wanted);
    hub.order(version, mode, resets)?;
    let waited = wait(hub, children, version, wanted, label, |trajectory| {
        trajectories.push(trajectory);
        true
    })?;
    trajectories.sort_by_key(|t: &Trajectory| (t.reset.env, t.reset.episode));
    let seconds = begin.elapsed().as_secs_f64();
    Ok(Collected {
        trajectories,
        report: CollectReport {
            reload_seconds: waited.reload_seconds.unwrap_or(0.0),
            seconds,
            waited: seconds,
            stale: waited.stale,
        },
    })
}

/// What came beside the episodes while they were waited for.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Waited {
    /// Seconds until the version was live, from the announce; `None`: that was not reported meanwhile.
    pub reload_seconds: Option<f64>,
    /// Episodes left out for their version and ordered again.
    pub stale: usize,
}

/// Blocks until `take`, which gets every episode, has accepted `wanted` of them. `version` is the newest that was announced.
///
/// # Errors
/// A child ends, an engine refuses the version, or nothing comes for two minutes.
pub(crate) fn wait(
    hub: &Hub,
    children: &mut Children,
    version: u64,
    wanted: usize,
    label: &str,
    mut take: impl FnMut(Trajectory) -> bool,
) -> Result<Waited> {
    let bar = ProgressBar::new(wanted as u64)
        .with_style(progress_style())
        .with_message(label.to_owned());
    let mut last_news = Instant::now();
    let mut state = "no engine has connected".to_owned();
    let mut waited = Waited {
        reload_seconds: None,
        stale: 0,
    };
    let mut left = wanted;
    while left > 0 {
        children.check()?;
        match hub.next(LOOK)? {
            Some(HubEvent::Trajectory(trajectory)) => {
                if take(*trajectory) {
                    left -= 1;
                    bar.inc(1);
                }
                last_news = Instant::now();
            }
            Some(HubEvent::Stale) => waited.stale += 1,
            Some(HubEvent::Reload(report)) => {
                last_news = Instant::now();
                match report.refused {
                    Some(reason) if report.version == version => return Err(LearnerError::Refused { version, reason }),
                    // the newer one may have taken its place before it was loaded
                    Some(reason) => tracing::warn!("an engine did not serve version {}: {reason}", report.version),
                    None if report.version == version => waited.reload_seconds = Some(report.seconds),
                    None => {}
                }
            }
            Some(HubEvent::State(engine)) => {
                state = format!(
                    "the engine serves version {:?} to {} slots",
                    engine.version, engine.slots
                );
            }
            Some(HubEvent::Gone) => tracing::warn!("an engine closed its connection; waiting for it or another one"),
            None => {}
        }
        if last_news.elapsed() > SILENCE {
            return Err(LearnerError::Silence {
                waiting_for: format!("{left} of {wanted} episodes of version {version}"),
                seconds: SILENCE.as_secs(),
                state,
            });
        }
    }
    bar.finish_and_clear();
    Ok(waited)
}

/// Share of successful episodes.
pub fn success_rate(trajectories: &[Trajectory]) -> f64 {
    trajectories.iter().filter(|t| t.success).count() as f64 / trajectories.len().max(1) as f64
}

/// Share of episodes that ended by themselves without success, like a wrong object in the goal.
pub fn failure_rate(trajectories: &[Trajectory]) -> f64 {
    trajectories.iter().filter(|t| t.terminated && !t.success).count() as f64 / trajectories.len().max(1) as f64
}
