//! Collection of the episodes of an order.

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

/// Time without an episode or a reload report after which the run ends with an error.
const SILENCE: Duration = Duration::from_mins(2);
/// Interval between two checks of the children while waiting.
const LOOK: Duration = Duration::from_millis(200);

/// Episodes of an order.
#[derive(Debug, Default)]
pub struct Collected {
    /// Episodes, sorted by environment and episode number.
    pub trajectories: Vec<Trajectory>,
    /// Times and counts of the collection.
    pub report: CollectReport,
}

/// Times and counts of a collection, for one order or for all orders of an iteration.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct CollectReport {
    /// Seconds from the announce until the version was live; 0 without a report during the collection.
    pub reload_seconds: f64,
    /// Seconds from the order to the last episode.
    pub seconds: f64,
    /// Seconds that the learner only waited, at most `seconds`.
    pub waited: f64,
    /// Episodes dropped for their version and ordered again.
    pub stale: usize,
}

/// Orders `resets` from `version`, replacing all open orders, and waits for all episodes.
///
/// # Errors
/// A child ends, an engine rejects the version, or no episode or reload report comes for two minutes.
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

/// Reports that came during a wait for episodes.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) struct Waited {
    /// Seconds from the announce until the version was live; `None` without a report during the wait.
    pub reload_seconds: Option<f64>,
    /// Episodes dropped for their version and ordered again.
    pub stale: usize,
}

/// Blocks until `take`, which gets every episode, has accepted `wanted` episodes. `version` is the newest announced version.
///
/// # Errors
/// A child ends, an engine rejects the version, or no episode or reload report comes for two minutes.
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
                    // a newer version may have replaced this version before loading
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

/// Returns the share of successful episodes.
pub fn success_rate(trajectories: &[Trajectory]) -> f64 {
    trajectories.iter().filter(|t| t.success).count() as f64 / trajectories.len().max(1) as f64
}

/// Returns the share of episodes that ended by themselves without success, for example with a wrong object in the goal.
pub fn failure_rate(trajectories: &[Trajectory]) -> f64 {
    trajectories.iter().filter(|t| t.terminated && !t.success).count() as f64 / trajectories.len().max(1) as f64
}
