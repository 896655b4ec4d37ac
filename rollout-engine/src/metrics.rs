//! Metrics for operators: counters, gauges and histograms in Prometheus' text format.

use std::time::Duration;

use prometheus::{
    Encoder, Histogram, HistogramOpts, HistogramVec, IntCounter, IntCounterVec, IntGauge, Opts, Registry, TextEncoder,
};
use wire::socket::Counters;

/// All metrics of an engine.
#[derive(Debug)]
pub struct Metrics {
    registry: Registry,
    /// Received messages, by `kind` (`hello`, `reports`, `act`, `malformed`; `observation` of a websocket).
    pub messages: IntCounterVec,
    /// Refused messages, by `reason` (`overload`, `not_ready`, `invalid`).
    pub refused: IntCounterVec,
    /// Sampled action chunks, by `mode` (`train`, `eval`).
    pub chunks: IntCounterVec,
    /// Requests whose prompt lost its end.
    pub prompts_cut: IntCounter,
    /// Numbers of a state far outside of the statistics, by `dimension`.
    pub state_far: IntCounterVec,
    /// Rows of a batch.
    pub batch_rows: Histogram,
    /// Seconds by `stage`: `preprocess` per job, `queue`, `prefix`, `denoise` and `record` per batch.
    stage_seconds: HistogramVec,
    /// Rows that wait for inference.
    pub queue_rows: IntGauge,
    /// Live policy version; -1 before the first.
    pub version: IntGauge,
    /// Announced versions by `result` (`live`, `refused`).
    pub reloads: IntCounterVec,
    /// Seconds from the announce of a version until the version is live.
    pub reload_seconds: Histogram,
    /// Finished episodes.
    pub trajectories: IntCounter,
    /// Finished episodes that the learner has not acknowledged.
    pub unacked: IntGauge,
    /// Slots of all workers.
    pub slots: IntGauge,
    /// Resets that wait for a slot or a version.
    pub pending_resets: IntGauge,
    /// 1 while the learner is connected.
    pub learner_connected: IntGauge,
    /// Connections of clients and workers.
    connections: IntGauge,
    /// Connections that ended, by `reason` ([`wire::socket::Closed`]).
    connections_closed: IntCounterVec,
}

impl Metrics {
    /// Registers all metrics.
    ///
    /// # Errors
    /// Two metrics have the same name; a test excludes this case.
    pub fn new() -> Result<Self, prometheus::Error> {
        let registry = Registry::new();
        let counter_vec = |name: &str, help: &str, label: &str| {
            let made = IntCounterVec::new(Opts::new(name, help), &[label])?;
            registry.register(Box::new(made.clone()))?;
            Ok::<_, prometheus::Error>(made)
        };
        let gauge = |name: &str, help: &str| {
            let made = IntGauge::new(name, help)?;
            registry.register(Box::new(made.clone()))?;
            Ok::<_, prometheus::Error>(made)
        };
        let histogram = |name: &str, help: &str, buckets: Vec<f64>| {
            let made = Histogram::with_opts(HistogramOpts::new(name, help).buckets(buckets))?;
            registry.register(Box::new(made.clone()))?;
            Ok::<_, prometheus::Error>(made)
        };
        // 0.1 ms to 26 s
        let latency = prometheus::exponential_buckets(1e-4, 2.0, 19)?;
        let stage_seconds = HistogramVec::new(
            HistogramOpts::new(
                "engine_stage_seconds",
                "seconds per stage, of a job for preprocess and of a batch for the others",
            )
            .buckets(latency.clone()),
            &["stage"],
        )?;
        registry.register(Box::new(stage_seconds.clone()))?;
        let trajectories = IntCounter::new("engine_trajectories_total", "finished episodes")?;
        registry.register(Box::new(trajectories.clone()))?;
        let prompts_cut = IntCounter::new("engine_prompts_cut_total", "requests whose prompt lost its end")?;
        registry.register(Box::new(prompts_cut.clone()))?;
        let metrics = Self {
            messages: counter_vec("engine_messages_total", "messages taken", "kind")?,
            refused: counter_vec("engine_refused_total", "messages refused", "reason")?,
            chunks: counter_vec("engine_chunks_total", "action chunks sampled", "mode")?,
            prompts_cut,
            state_far: counter_vec(
                "engine_state_far_total",
                "numbers of a state far outside of the statistics",
                "dimension",
            )?,
            batch_rows: histogram(
                "engine_batch_rows",
                "rows of a batch",
                prometheus::exponential_buckets(1.0, 2.0, 11)?,
            )?,
            stage_seconds,
            queue_rows: gauge("engine_queue_rows", "rows that wait for inference")?,
            version: gauge("engine_policy_version", "live policy version, -1 before the first")?,
            reloads: counter_vec("engine_reloads_total", "announced versions", "result")?,
            reload_seconds: histogram("engine_reload_seconds", "seconds from an announce to live", latency)?,
            trajectories,
            unacked: gauge(
                "engine_unacked_trajectories",
                "episodes that the learner has not acknowledged",
            )?,
            slots: gauge("engine_slots", "slots of all workers")?,
            pending_resets: gauge("engine_pending_resets", "resets that wait for a slot or a version")?,
            learner_connected: gauge("engine_learner_connected", "1 while the learner is connected")?,
            connections: gauge("engine_connections", "connections of clients and workers")?,
            connections_closed: counter_vec("engine_connections_closed_total", "connections that ended", "reason")?,
            registry,
        };
        metrics.version.set(-1);
        Ok(metrics)
    }

    /// Records the duration of a stage of a batch.
    pub fn observe_stage(&self, stage: &str, time: Duration) {
        self.stage_seconds
            .with_label_values(&[stage])
            .observe(time.as_secs_f64());
    }

    /// Returns the text of `/metrics`, including the connections of clients and workers.
    ///
    /// # Errors
    /// The encoder fails.
    pub fn text(&self, connections: &Counters) -> Result<String, prometheus::Error> {
        self.connections.set(connections.open() as i64);
        for (reason, count) in connections.closed() {
            let counter = self.connections_closed.with_label_values(&[reason.name()]);
            counter.inc_by(count.saturating_sub(counter.get()));
        }
        let mut text = Vec::new();
        TextEncoder::new().encode(&self.registry.gather(), &mut text)?;
        Ok(String::from_utf8_lossy(&text).into_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_is_registered_once_and_shown() {
        let metrics = Metrics::new().expect("no two metrics share a name");
        metrics.reloads.with_label_values(&["refused"]).inc();
        metrics.stage_seconds.with_label_values(&["prefix"]).observe(0.01);
        let text = metrics.text(&Counters::default()).expect("encodes");
        for line in [
            "engine_policy_version -1",
            "engine_reloads_total{result=\"refused\"} 1",
            "engine_connections_closed_total{reason=\"slow\"} 0",
        ] {
            assert!(text.lines().any(|l| l == line), "{text}");
        }
    }
}
