//! The inference thread: the one place where the live policy runs.

use std::{collections::VecDeque, sync::Arc, thread, time::Duration};

use policy::config::RolloutConfig;
use tokio::sync::mpsc;
use wire::messages::{ActRow, ActedRow, Mode};

use crate::{
    infer::{Sample, Wanted, draw, sample_fixed},
    metrics::Metrics,
    policy_slot::{LoadedPolicy, PolicySlot},
    pulse::Pulse,
    queue::{Batch, Job, Queue, Target},
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

/// Why a job has no answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Failure {
    /// Whether the same request may succeed later.
    pub retry: bool,
    /// What was expected and found.
    pub reason: String,
}

impl Failure {
    /// The request itself cannot be answered.
    fn invalid(reason: impl ToString) -> Self {
        Self {
            retry: false,
            reason: reason.to_string(),
        }
    }
}

/// A job that is done.
#[derive(Debug)]
pub struct Done {
    /// Who waits.
    pub target: Target,
    /// The answer, or why there is none.
    pub result: Result<Answer, Failure>,
}

/// What a job that is answered in parts carries: the version that began it also ends it.
#[derive(Debug)]
pub struct Progress {
    policy: Arc<LoadedPolicy>,
    answer: Answer,
}

/// Batches that wait for delivery: inference goes on while one is delivered, and no further.
pub const DONE_CAPACITY: usize = 2;

/// Starts the thread. It ends when the queue is closed and empty, or when nobody takes results any more.
///
/// # Errors
/// The system gives no thread.
pub fn start(
    queue: Arc<Queue<Progress>>,
    slot: Arc<PolicySlot>,
    metrics: Arc<Metrics>,
    pulse: Arc<Pulse>,
    config: &RolloutConfig,
    done: mpsc::Sender<Vec<Done>>,
) -> std::io::Result<thread::JoinHandle<()>> {
    let fixed_batch = config.fixed_batch;
    let deadline = Duration::from_micros(config.batch_deadline_micros);
    thread::Builder::new().name("inference".to_owned()).spawn(move || {
        while let Some(batch) = queue.take(deadline, fixed_batch.unwrap_or(1)) {
            let results = pulse.inference(|| match (batch, slot.live()) {
                (Batch::Whole(jobs), Some(policy)) => answer(&policy, jobs, fixed_batch, &metrics),
                (Batch::Whole(jobs), None) => jobs.into_iter().map(|job| not_ready(job.target)).collect(),
                (Batch::Part { job, rows }, _) => part(&queue, job, rows, &slot, fixed_batch, &metrics),
            });
            if !results.is_empty() && done.blocking_send(results).is_err() {
                return;
            }
        }
    })
}

fn not_ready(target: Target) -> Done {
    Done {
        target,
        result: Err(Failure {
            retry: true,
            reason: "no policy is live yet".to_owned(),
        }),
    }
}

/// Answers the first rows of a large job; it goes back to the queue until all are answered.
fn part(
    queue: &Queue<Progress>,
    mut job: Job<Progress>,
    count: usize,
    slot: &PolicySlot,
    fixed_batch: Option<usize>,
    metrics: &Metrics,
) -> Vec<Done> {
    let target = job.target;
    let begun = job.progress.take().or_else(|| {
        let policy = slot.live()?;
        let answer = Answer {
            version: policy.version(),
            rows: Vec::new(),
            values: Vec::new(),
        };
        Some(Progress { policy, answer })
    });
    let Some(mut progress) = begun else {
        return vec![not_ready(target)];
    };
    if !slot.is_recent(&progress.policy) {
        return vec![Done {
            target,
            result: Err(Failure {
                retry: true,
                reason: format!(
                    "version {} was replaced twice while the request was answered in parts: ask again, or for fewer rows",
                    progress.answer.version
                ),
            }),
        }];
    }
    let rows: Vec<ActRow> = job.rows.drain(..count).collect();
    let Some(done) = answer(&progress.policy, vec![Job::new(target, rows)], fixed_batch, metrics).pop() else {
        return Vec::new();
    };
    match done.result {
        Err(failure) => vec![Done {
            target,
            result: Err(failure),
        }],
        Ok(part) => {
            progress.answer.rows.extend(part.rows);
            progress.answer.values.extend(part.values);
            if job.rows.is_empty() {
                return vec![Done {
                    target,
                    result: Ok(progress.answer),
                }];
            }
            job.progress = Some(progress);
            match queue.put_back(job) {
                Ok(()) => Vec::new(),
                Err(job) => vec![closed(job.target)],
            }
        }
    }
}

/// The end of a job that the engine leaves behind.
pub fn closed(target: Target) -> Done {
    Done {
        target,
        result: Err(Failure {
            retry: true,
            reason: "the engine is shutting down".to_owned(),
        }),
    }
}

/// Answers jobs with one policy version, in one batch, padded to `fixed_batch` rows where that is set. A job with a row that cannot
/// be used fails alone.
pub fn answer(
    policy: &LoadedPolicy,
    jobs: Vec<Job<Progress>>,
    fixed_batch: Option<usize>,
    metrics: &Metrics,
) -> Vec<Done> {
    let observe = |stage: &str, time: Duration| {
        metrics
            .stage_seconds
            .with_label_values(&[stage])
            .observe(time.as_secs_f64());
    };
    if let Some(oldest) = jobs.iter().map(|job| job.queued).min() {
        observe("queue", oldest.elapsed());
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

    let mut samples = Vec::new();
    let mut failure = None;
    if !prepared.is_empty() {
        metrics.batch_rows.observe(prepared.len() as f64);
        match sample_fixed(policy, prepared, fixed_batch) {
            Ok(sampled) => {
                observe("prefix", sampled.prefix);
                observe("denoise", sampled.denoise);
                samples = sampled.samples;
            }
            Err(error) => failure = Some(error.to_string()),
        }
    }

    let begun = std::time::Instant::now();
    let mut samples = samples.into_iter();
    let results = waiting
        .into_iter()
        .map(|(job, unusable)| {
            let Job { rows, target, .. } = job;
            let result = match (unusable, &failure) {
                (Some(reason), _) => Err(Failure::invalid(reason)),
                // the request was sound: another batch, or another version, may succeed
                (None, Some(reason)) => Err(Failure {
                    retry: true,
                    reason: format!("inference failed: {reason}"),
                }),
                (None, None) => {
                    finish(policy, &rows, samples.by_ref().take(rows.len()), metrics).map_err(Failure::invalid)
                }
            };
            Done { target, result }
        })
        .collect();
    observe("record", begun.elapsed());
    results
}

fn wanted(policy: &LoadedPolicy, row: &ActRow) -> Result<Wanted, String> {
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
    rows: &VecDeque<ActRow>,
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
