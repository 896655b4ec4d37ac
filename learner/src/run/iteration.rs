//! Metrics and log line of an RL iteration.

use crate::{batch::WholeBatch, collect::sampling::SampleReport, update::UpdateReport};

/// Finished iteration.
pub(crate) struct Iteration<'a> {
    /// Statistics of the iteration's episodes.
    pub(crate) got: &'a SampleReport,
    /// Statistics of the records that the update read.
    pub(crate) batch: &'a WholeBatch,
    /// Result of the update.
    pub(crate) report: &'a UpdateReport,
    /// Seconds from the end of the update to the announce of the next version.
    pub(crate) publish_seconds: f64,
    /// Seconds from the start of the sampling to the announce of the next version.
    pub(crate) seconds: f64,
}

impl Iteration<'_> {
    /// Returns the metrics by name; `episodes` is the number of training episodes so far.
    pub(crate) fn metrics(&self, episodes: u64) -> Vec<(&'static str, f64)> {
        let Self { got, batch, report, .. } = self;
        let a = &report.actor;
        let mut metrics = vec![
            ("episodes", episodes as f64),
            ("success", got.success),
            ("terminated_failure", got.failure),
            ("records", report.records as f64),
            ("env_steps", got.env_steps as f64),
            ("groups", got.groups as f64),
            ("rounds", f64::from(got.rounds)),
            ("action_magnitude", batch.action_magnitude),
            ("policy_loss", a.policy_loss),
            ("kl_penalty", a.kl_penalty),
            ("entropy", report.entropy),
            ("behaviour_clip_fraction", a.behaviour_clip_fraction),
            ("ratio", a.ratio),
            ("ratio_deviation", a.ratio_deviation),
            ("ratio_deviation_max", a.ratio_deviation_max),
            ("approx_kl", a.approx_kl),
            ("last_kl", report.last_kl),
            ("clip_fraction", a.clip_fraction),
            ("dual_clip_fraction", a.dual_clip_fraction),
            ("logprob_gap", report.logprob_gap),
            ("first_ratio_deviation", report.first_ratio_deviation),
            ("value_gap", report.first_value_gap),
            ("value_loss", report.value_loss),
            ("value_clip_fraction", report.value_clip_fraction),
            ("explained_variance", report.explained_variance),
            ("grad_norm", report.grad_norm),
            ("lr", report.lr),
            ("updates", report.updates as f64),
            ("skipped_updates", report.skipped as f64),
            ("stopped_early", f64::from(u8::from(report.stopped_early))),
            ("staleness_mean", batch.staleness_mean),
            ("staleness_max", batch.staleness_max as f64),
            ("stale_dropped", got.collect.stale as f64),
            ("rollout_seconds", got.collect.seconds),
            ("wait_seconds", got.collect.waited),
            ("reload_seconds", got.collect.reload_seconds),
            ("prefix_cache_bytes", report.prefix_cache_bytes as f64),
            ("prefix_seconds", report.prefix_seconds),
            ("update_seconds", report.update_seconds),
            ("publish_seconds", self.publish_seconds),
            ("iteration_seconds", self.seconds),
        ];
        if let Some(credit) = report.credit {
            metrics.extend([("credit", credit.mean), ("displacement", credit.displacement)]);
        }
        metrics
    }

    /// Returns the iteration's line in the log.
    pub(crate) fn told(&self, asynchronous: bool) -> String {
        let Self { got, batch, report, .. } = self;
        let age = if asynchronous {
            format!(", staleness {:.2}", batch.staleness_mean)
        } else {
            String::new()
        };
        format!(
            "success {:.3}, {}, {} records{age}, waited {:.1} s, update {:.1} s",
            got.success,
            learnt(report, !asynchronous),
            report.records,
            got.collect.waited,
            report.prefix_seconds + report.update_seconds,
        )
    }
}

/// Returns a text with the numbers of an update that its loss has. `parity` adds the ratio gap between engine and learner, which needs
/// records of the version in training; asynchronous training may lack such records.
fn learnt(report: &UpdateReport, parity: bool) -> String {
    let a = &report.actor;
    if let Some(credit) = report.credit {
        return format!(
            "loss {:.4}, credit {:.3}, gradient {:.3}",
            a.policy_loss, credit.mean, report.grad_norm
        );
    }
    let mut parts = vec![format!("KL {:.4}, clip {:.3}", a.approx_kl, a.clip_fraction)];
    if report.explained_variance.is_finite() {
        parts.push(format!("EV {:.2}", report.explained_variance));
    }
    if parity {
        parts.push(format!("ratio gap {:.1e}", report.first_ratio_deviation));
    }
    parts.join(", ")
}
