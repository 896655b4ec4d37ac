//! The inference thread: the one place where the live policy runs.

use std::{sync::Arc, thread, time::Duration};

use policy::config::RolloutConfig;
use tokio::sync::mpsc;
use wire::messages::{ActedRow, Mode};

use crate::{
    infer::{Sample, Wanted, draw, sample_fixed},
    metrics::Metrics,
    policy_slot::{LoadedPolicy, PolicySlot},
    queue::{Job, Queue, Row, Target},
    record,
};

/// The answer to a job.
#[derive(Debug)]
pub struct Answer {
    /// Version of all rows.
    pub version: u64,
    /// In the order of the job.
    pub rows: Vec<ActedRow>,
    /// Value of each row.
    pub values: Vec<Option<f32>>,
}

/// A job that is done.
#[derive(Debug)]
pub struct Done {
    /// Who waits.
    pub target: Target,
    /// The answer, or why there is none.
    pub result: Result<Answer, String>,
}

/// Batches that wait for delivery: inference goes on while one is delivered, and no further.
pub const DONE_CAPACITY: usize = 2;

/// Starts the thread. It ends when the queue is closed and empty, or when nobody takes results any more.
///
/// # Errors
/// The system gives no thread.
pub fn start(
    queue: Arc<Queue>,
    slot: Arc<PolicySlot>,
    metrics: Arc<Metrics>,
    config: &RolloutConfig,
    done: mpsc::Sender<Vec<Done>>,
) -> std::io::Result<thread::JoinHandle<()>> {
    let (max_batch, fixed_batch) = (config.max_batch, config.fixed_batch);
    let deadline = Duration::from_micros(config.batch_deadline_micros);
    thread::Builder::new().name("inference".to_owned()).spawn(move || {
        while let Some(jobs) = queue.take_batch(max_batch, deadline) {
            let results = match slot.live() {
                Some(policy) => answer(&policy, jobs, max_batch, fixed_batch, &metrics),
                None => jobs
                    .into_iter()
                    .map(|job| Done {
                        target: job.target,
                        result: Err("no policy is live yet".to_owned()),
                    })
                    .collect(),
            };
            if done.blocking_send(results).is_err() {
                return;
            }
        }
    })
}

/// Answers jobs with one policy version, in batches of at most `max_batch` rows, or of exactly `fixed_batch`. A job with a row
/// that cannot be used fails alone.
pub fn answer(
    policy: &LoadedPolicy,
    jobs: Vec<Job>,
    max_batch: usize,
    fixed_batch: Option<usize>,
    metrics: &Metrics,
) -> Vec<Done> {
    let observe = |stage: &str, time: Duration| {
        metrics
            .stage_seconds
            .with_label_values(&[stage])
            .observe(time.as_secs_f64());
    };
    if let Some(oldest) = jobs.first() {
        observe("queue", oldest.queued.elapsed());
    }
    let begun = std::time::Instant::now();
    let mut prepared = Vec::new();
    let mut waiting = Vec::with_capacity(jobs.len());
    for job in jobs {
        let rows: Result<Vec<_>, _> = job.rows.iter().map(|row| wanted(policy, row)).collect();
        match rows {
            Ok(rows) => {
                prepared.extend(rows);
                waiting.push((job, None));
            }
            Err(reason) => waiting.push((job, Some(reason))),
        }
    }
    observe("preprocess", begun.elapsed());

    let mut samples = Vec::with_capacity(prepared.len());
    let mut failure = None;
    let mut rest = prepared.into_iter();
    loop {
        let part: Vec<_> = rest.by_ref().take(max_batch.max(1)).collect();
        if part.is_empty() {
            break;
        }
        metrics.batch_rows.observe(part.len() as f64);
        match sample_fixed(policy, part, fixed_batch) {
            Ok(sampled) => {
                observe("prefix", sampled.prefix);
                observe("denoise", sampled.denoise);
                samples.extend(sampled.samples);
            }
            Err(error) => {
                failure = Some(error.to_string());
                break;
            }
        }
    }

    let begun = std::time::Instant::now();
    let mut samples = samples.into_iter();
    let results = waiting
        .into_iter()
        .map(|(job, unusable)| {
            let Job { rows, target, .. } = job;
            let result = match (unusable, &failure) {
                (Some(reason), _) => Err(reason),
                (None, Some(reason)) => Err(reason.clone()),
                (None, None) => finish(policy, &rows, samples.by_ref().take(rows.len()), metrics),
            };
            Done { target, result }
        })
        .collect();
    observe("record", begun.elapsed());
    results
}

fn wanted(policy: &LoadedPolicy, row: &Row) -> Result<Wanted, String> {
    let input = policy
        .preprocessor
        .prepare(&row.observation)
        .map_err(|e| e.to_string())?;
    let guidance = match &row.guidance {
        None => None,
        Some(_) if row.mode == Mode::Train || row.record => {
            return Err(
                "a guided chunk is no sample of the policy: ask for it in mode `eval` and without a record".to_owned(),
            );
        }
        Some(guidance) => Some(
            policy
                .preprocessor
                .guidance(guidance, &row.observation.state)
                .map_err(|e| e.to_string())?,
        ),
    };
    Ok(Wanted {
        input,
        noise: draw(policy, row.key, row.mode),
        key: row.key,
        guidance,
    })
}

fn finish(
    policy: &LoadedPolicy,
    rows: &[Row],
    samples: impl Iterator<Item = Sample>,
    metrics: &Metrics,
) -> Result<Answer, String> {
    let mut answer = Answer {
        version: policy.version(),
        rows: Vec::with_capacity(rows.len()),
        values: Vec::new(),
    };
    for (row, sample) in rows.iter().zip(samples) {
        let mode = match row.mode {
            Mode::Train => "train",
            Mode::Eval => "eval",
        };
        metrics.chunks.with_label_values(&[mode]).inc();
        if let Some((index, value)) = sample.chain.iter().enumerate().find(|(_, v)| !v.is_finite()) {
            return Err(format!(
                "the policy gave {value} at element {index} of the denoise chain"
            ));
        }
        answer.values.push(sample.value(policy.manifest.sampling.mdp));
        answer
            .rows
            .push(record::acted(policy, sample, row.record).map_err(|e| e.to_string())?);
    }
    Ok(answer)
}
