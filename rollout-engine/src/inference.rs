//! The threads between the queue and the device: preparing threads convert rows, the inference thread owns the device and runs
//! batches.

use std::{
    error::Error,
    sync::{Arc, mpsc},
    thread,
    time::{Duration, Instant},
};

use policy::{
    config::{Flavour, RolloutConfig},
    message::told,
    params::{CriticInput, Pooling},
    transform::Remark,
};
use tokio::sync::mpsc::Sender;
use wire::messages::Mode;

use crate::{
    device::{
        Device, DeviceError, SelfTestRun, Slot, StepOutput,
        record::chunk_record,
        sampler::{ChunkInput, SampleError, SampledChunk},
        versions::{Free, Policy, Versions},
    },
    job::{Answer, Chunk, Job, JobError, JobResult, Row, Ticket},
    metrics::Metrics,
    pulse::Pulse,
    queue::{Cut, Prepared, Queue, Taken},
};

/// A row that is ready for the device, with the data for its answer.
#[derive(Debug)]
pub struct ReadyRow {
    chunk: ChunkInput,
    asked: Asked,
}

/// Data for the answer to a row, in addition to the sampled chunk.
#[derive(Debug)]
struct Asked {
    /// State in the environment's units, `[state width]`.
    state: Vec<f32>,
    mode: Mode,
    record: bool,
}

/// State of a large job between two parts: the version of the first part answers all parts.
#[derive(Debug)]
pub struct Progress {
    policy: Arc<Policy>,
    answer: Answer,
}

/// The queue of an engine.
pub type EngineQueue = Queue<ReadyRow, Progress>;

/// The answer to a slot's question, with its ticket.
pub type Answered = (Ticket, JobResult);

/// Maximum number of undelivered batches of answers to slots; inference blocks beyond the maximum.
pub const ANSWERED_CAPACITY: usize = 2;

/// State that the threads share.
#[derive(Clone)]
pub struct Shared {
    /// The queue of rows.
    pub queue: Arc<EngineQueue>,
    /// Versions in use.
    pub versions: Arc<Versions>,
    /// Metrics of the engine.
    pub metrics: Arc<Metrics>,
    /// Record of the running batch, for the detection of stalls.
    pub pulse: Arc<Pulse>,
    /// Channel for answers to slots.
    pub answered: Sender<Vec<Answered>>,
}

/// Work of the inference thread between batches.
enum Work<D: Device> {
    Install(Box<Install<D>>),
    Free(Slot),
}

struct Install<D: Device> {
    staged: D::Staged,
    test: SelfTestRun,
    reply: mpsc::SyncSender<Result<(Slot, Vec<StepOutput>), DeviceError>>,
}

/// Handle of the inference thread, for loaders.
pub struct InferenceThread<D: Device> {
    work: mpsc::Sender<Work<D>>,
    queue: Arc<EngineQueue>,
}

impl<D: Device> InferenceThread<D> {
    /// Installs a version in a slot, between two batches. Blocks until the version is installed.
    ///
    /// # Errors
    /// The device rejects the version, or the thread has ended.
    pub fn install(&self, staged: D::Staged, test: SelfTestRun) -> Result<(Slot, Vec<StepOutput>), DeviceError> {
        let (reply, installed) = mpsc::sync_channel(1);
        let work = Work::Install(Box::new(Install { staged, test, reply }));
        self.work.send(work).map_err(|_ended| DeviceError::Closed)?;
        self.queue.wake();
        installed.recv().map_err(|_ended| DeviceError::Closed)?
    }

    /// Returns a function that frees a slot between two batches, without blocking.
    pub fn free(&self) -> Free {
        let (work, queue) = (self.work.clone(), Arc::clone(&self.queue));
        Arc::new(move |slot| {
            // a device whose thread has ended is freed as a whole
            if work.send(Work::Free(slot)).is_ok() {
                queue.wake();
            }
        })
    }
}

/// Closes the queue when the thread of this guard panics: the other threads end too, and the engine stops with an error.
struct CloseOnPanic(Arc<EngineQueue>);

impl Drop for CloseOnPanic {
    fn drop(&mut self) {
        if thread::panicking() {
            close(&self.0);
        }
    }
}

/// Closes the queue and answers what waits.
fn close(queue: &EngineQueue) {
    let large = queue.close();
    for job in large.into_iter().chain(queue.clear()) {
        job.reply.send(Err(JobError::Closed));
    }
}

/// Returns the number of preparing threads: one per four cores, at least 1 and at most 4.
fn preparing_threads() -> usize {
    thread::available_parallelism().map_or(1, |cores| (cores.get() / 4).clamp(1, 4))
}

/// Starts the threads. The threads end when the queue is closed and empty, or when the receiver of answers is dropped.
///
/// # Errors
/// The system fails to start a thread.
pub fn start<D: Device>(device: D, shared: Shared, config: &RolloutConfig) -> std::io::Result<InferenceThread<D>> {
    let fixed_batch = config.fixed_batch;
    for number in 0..preparing_threads() {
        let shared = shared.clone();
        thread::Builder::new()
            .name(format!("prepare-{number}"))
            .spawn(move || {
                let _guard = CloseOnPanic(Arc::clone(&shared.queue));
                // graphs with a fixed batch size take as long for fewer rows
                let rows = || shared.versions.live().and_then(|policy| policy.manifest().batch);
                while let Some(cut) = shared.queue.cut(rows().or(fixed_batch).unwrap_or(1)) {
                    prepare(&shared, cut);
                }
            })?;
    }
    let (sender, work) = mpsc::channel();
    let queue = Arc::clone(&shared.queue);
    let deadline = Duration::from_micros(config.batch_deadline_micros);
    let mut inference = Inference {
        device,
        shared,
        fixed_batch,
        lost: false,
    };
    thread::Builder::new().name("inference".to_owned()).spawn(move || {
        let _guard = CloseOnPanic(Arc::clone(&inference.shared.queue));
        inference.run(&work, deadline);
    })?;
    Ok(InferenceThread { work: sender, queue })
}

/// Prepares the rows of a job. A row that the policy cannot read fails its own job only.
fn prepare(shared: &Shared, cut: Cut<Progress>) {
    let Cut { mut job, rows, number } = cut;
    let begun = Instant::now();
    let ready = match shared.versions.live() {
        Some(policy) => job
            .rows
            .drain(..rows)
            .map(|row| ready_row(&policy, row, &shared.metrics))
            .collect(),
        None => Err(JobError::NotReady),
    };
    shared.metrics.observe_stage("preprocess", begun.elapsed());
    match ready {
        Ok(rows) => shared.queue.stage(number, Prepared { job, rows }),
        Err(error) => {
            shared.queue.give_up(number);
            shared.deliver(vec![(job, Err(error))]);
        }
    }
}

fn ready_row(policy: &Policy, row: Row, metrics: &Metrics) -> Result<ReadyRow, JobError> {
    if row.guidance.is_some() && (row.mode == Mode::Train || row.record) {
        return Err(JobError::Guided);
    }
    let transform = &policy.transform;
    let (input, remarks) = transform.input_with_remarks(&row.observation)?;
    for remark in &remarks {
        match remark {
            Remark::CutPrompt { .. } => metrics.prompts_cut.inc(),
            Remark::Far { dimension, .. } => {
                let dimension = dimension.to_string();
                metrics.state_far.with_label_values(&[dimension.as_str()]).inc();
            }
        }
        if let Some(line) = transform.report(remark, &row.observation.prompt) {
            tracing::warn!("{line}");
        }
    }
    let manifest = policy.manifest();
    let reads_first = manifest.flavour == Flavour::Cuda
        && manifest
            .heads
            .value
            .as_ref()
            .is_some_and(|head| head.input == CriticInput::Vlm)
        && manifest.heads.pooling() == Pooling::First;
    if reads_first && input.image_mask.first() == Some(&false) {
        let camera = manifest.cameras.first().cloned().unwrap_or_default();
        return Err(JobError::FirstCamera { camera });
    }
    let guidance = match &row.guidance {
        Some(guidance) => Some(transform.guidance(guidance, &row.observation.state)?),
        None => None,
    };
    Ok(ReadyRow {
        chunk: ChunkInput {
            input,
            noise: policy.sampler().draw(row.key, row.mode),
            key: row.key,
            guidance,
        },
        asked: Asked {
            state: row.observation.state,
            mode: row.mode,
            record: row.record,
        },
    })
}

impl Shared {
    /// Delivers results. Returns whether the receiver of the slots' answers still exists.
    fn deliver(&self, results: Vec<(Job<Progress>, JobResult)>) -> bool {
        let answered: Vec<Answered> = results
            .into_iter()
            .filter_map(|(job, result)| job.reply.send(result))
            .collect();
        answered.is_empty() || self.answered.blocking_send(answered).is_ok()
    }
}

struct Inference<D: Device> {
    device: D,
    shared: Shared,
    fixed_batch: Option<usize>,
    /// Whether the device stopped working.
    lost: bool,
}

impl<D: Device> Inference<D> {
    fn run(&mut self, work: &mpsc::Receiver<Work<D>>, deadline: Duration) {
        loop {
            let shared = self.shared.clone();
            let results = match shared.queue.take(deadline) {
                Taken::Closed => return,
                Taken::Woken => {
                    for work in work.try_iter() {
                        self.work(work);
                    }
                    continue;
                }
                Taken::Whole(jobs) => shared.pulse.inference(|| self.whole(jobs)),
                Taken::Part(part) => shared.pulse.inference(|| self.part(part)),
            };
            if !shared.deliver(results) {
                return;
            }
            if self.lost {
                // the engine ends with an error: whoever supervises it starts it again
                close(&shared.queue);
                return;
            }
        }
    }

    fn work(&mut self, work: Work<D>) {
        match work {
            Work::Install(install) => {
                let Install { staged, test, reply } = *install;
                // if the loader has ended, the slot is freed
                if let Err(mpsc::SendError(Ok((slot, _)))) = reply.send(self.device.install(staged, &test)) {
                    self.device.free(slot);
                }
            }
            Work::Free(slot) => self.device.free(slot),
        }
    }

    /// Answers whole jobs with the live version.
    fn whole(&mut self, jobs: Vec<Prepared<ReadyRow, Progress>>) -> Vec<(Job<Progress>, JobResult)> {
        let (jobs, rows): (Vec<_>, Vec<_>) = jobs.into_iter().map(|ready| (ready.job, ready.rows)).unzip();
        let Some(policy) = self.shared.versions.live() else {
            return jobs.into_iter().map(|job| (job, Err(JobError::NotReady))).collect();
        };
        if let Some(oldest) = jobs.iter().map(|job| job.queued).min() {
            self.shared.metrics.observe_stage("queue", oldest.elapsed());
        }
        let version = policy.version();
        let answers = self.answer(&policy, rows);
        let answers = answers
            .into_iter()
            .map(|rows| rows.map(|rows| Answer { version, rows }));
        jobs.into_iter().zip(answers).collect()
    }

    /// Answers the prepared rows of a large job, and queues the job again until all rows are answered.
    fn part(&mut self, part: Prepared<ReadyRow, Progress>) -> Vec<(Job<Progress>, JobResult)> {
        let Prepared { mut job, rows } = part;
        let line = job.line;
        let result = match self.continued(job.progress.take(), rows) {
            Ok(progress) if !job.rows.is_empty() => {
                job.progress = Some(progress);
                return match self.shared.queue.put_back(job) {
                    Ok(()) => Vec::new(),
                    Err(job) => vec![(job, Err(JobError::Closed))],
                };
            }
            result => result.map(|progress| progress.answer),
        };
        self.shared.queue.finished(line);
        vec![(job, result)]
    }

    /// Answers more rows of a large job with the version of its first part.
    fn continued(&mut self, progress: Option<Progress>, rows: Vec<ReadyRow>) -> Result<Progress, JobError> {
        let mut progress = if let Some(progress) = progress {
            progress
        } else {
            let policy = self.shared.versions.live().ok_or(JobError::NotReady)?;
            let (version, rows) = (policy.version(), Vec::new());
            Progress {
                policy,
                answer: Answer { version, rows },
            }
        };
        let version = progress.answer.version;
        if !self.shared.versions.is_recent(&progress.policy) {
            return Err(JobError::Replaced { version });
        }
        for answered in self.answer(&progress.policy, vec![rows]) {
            progress.answer.rows.extend(answered?);
        }
        Ok(progress)
    }

    /// Answers the rows of every job with one policy version, in one batch.
    fn answer(&mut self, policy: &Policy, jobs: Vec<Vec<ReadyRow>>) -> Vec<Result<Vec<Chunk>, JobError>> {
        let metrics = Arc::clone(&self.shared.metrics);
        let mut asked: Vec<Vec<Asked>> = Vec::with_capacity(jobs.len());
        let mut inputs = Vec::new();
        for rows in jobs {
            asked.push(
                rows.into_iter()
                    .map(|row| {
                        inputs.push(row.chunk);
                        row.asked
                    })
                    .collect(),
            );
        }
        metrics.batch_rows.observe(inputs.len() as f64);
        let sampled = policy
            .sampler()
            .sample(&mut self.device, policy.slot(), inputs, self.fixed_batch);
        let sampled = match sampled {
            Ok(sampled) => sampled,
            Err(error) => {
                if let SampleError::Device(DeviceError::Lost { .. }) = &error {
                    tracing::error!("{}", told(&error));
                    self.lost = true;
                }
                let error: Arc<dyn Error + Send + Sync> = Arc::new(error);
                let failed = |_rows| Err(JobError::Inference(Arc::clone(&error)));
                return asked.into_iter().map(failed).collect();
            }
        };
        metrics.observe_stage("prefix", sampled.prefix);
        metrics.observe_stage("denoise", sampled.denoise);
        let begun = Instant::now();
        let mut chunks = sampled.chunks.into_iter();
        let answers = asked
            .into_iter()
            .map(|rows| {
                // all chunks of a job are consumed, even if the first fails
                let own: Vec<_> = rows.into_iter().zip(chunks.by_ref()).collect();
                own.into_iter()
                    .map(|(asked, chunk)| finish(policy, asked, chunk, &metrics))
                    .collect()
            })
            .collect();
        metrics.observe_stage("record", begun.elapsed());
        answers
    }
}

/// Converts a sampled chunk to the answer to its row.
fn finish(policy: &Policy, asked: Asked, chunk: SampledChunk, metrics: &Metrics) -> Result<Chunk, JobError> {
    let mode = match asked.mode {
        Mode::Train => "train",
        Mode::Eval => "eval",
    };
    metrics.chunks.with_label_values(&[mode]).inc();
    if let Some((index, value)) = chunk.chain.iter().enumerate().find(|(_, v)| !v.is_finite()) {
        return Err(JobError::NotFinite { index, value: *value });
    }
    let manifest = policy.manifest();
    let actions = policy.transform.env_actions(chunk.actions(), &asked.state)?;
    if let Some((index, value)) = actions.iter().enumerate().find(|(_, v)| !v.is_finite()) {
        return Err(JobError::NotFiniteAction {
            row: index / manifest.env_action_dim,
            dimension: index % manifest.env_action_dim,
            value: *value,
        });
    }
    Ok(Chunk {
        actions,
        value: chunk.value(manifest.sampling.mdp),
        record: asked.record.then(|| Box::new(chunk_record(manifest, chunk))),
    })
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use policy::{noise::NoiseKey, transform::RawObservation};
    use tokio::sync::oneshot;

    use super::*;

    #[test]
    fn a_thread_that_panics_ends_the_others_and_answers_what_waits() {
        let queue: Arc<EngineQueue> = Arc::new(Queue::new(9, 2));
        let row = Row {
            observation: RawObservation {
                images: BTreeMap::new(),
                state: Vec::new(),
                prompt: String::new(),
            },
            key: NoiseKey {
                seed: 0,
                env: 0,
                episode: 0,
                chunk: 0,
            },
            mode: Mode::Eval,
            record: false,
            guidance: None,
        };
        let mut answers = Vec::new();
        for rows in [1, 3] {
            let (reply, answer) = oneshot::channel();
            let job = Job::of_client(1, vec![row.clone(); rows], reply);
            assert!(queue.push_client(job, &mut Vec::new()).is_ok());
            answers.push(answer);
        }
        let guard = CloseOnPanic(Arc::clone(&queue));
        let ended = thread::spawn(move || {
            let _guard = guard;
            panic!("as a defect would");
        });
        assert!(ended.join().is_err());
        assert!(queue.cut(1).is_none(), "preparing threads end");
        assert!(
            matches!(queue.take(Duration::from_mins(1)), Taken::Closed),
            "the inference thread ends"
        );
        for answer in answers {
            assert!(matches!(answer.blocking_recv(), Ok(Err(JobError::Closed))));
        }
    }
}
