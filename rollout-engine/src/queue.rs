//! The queue before inference: bounded, and taken in batches that fill up or run into a deadline.

use std::{
    collections::VecDeque,
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use policy::noise::NoiseKey;
use wire::{
    messages::{Guidance, Mode, Observation},
    socket::Peer,
};

/// One observation that wants an action chunk.
#[derive(Debug, Clone, PartialEq)]
pub struct Row {
    /// What was seen, as it came.
    pub observation: Observation,
    /// Which noise.
    pub key: NoiseKey,
    /// Sampling.
    pub mode: Mode,
    /// Whether a chunk record is made.
    pub record: bool,
    /// What a client goes on from.
    pub guidance: Option<Guidance>,
}

/// Who waits for the result of a [`Job`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Target {
    /// The present chunk of a slot's episode (one row).
    Slot(u64),
    /// The value of the last observation of a finished episode (one row).
    Bootstrap(u64),
    /// A client's request.
    Client {
        /// Who asked.
        peer: Peer,
        /// Its number.
        request: u64,
    },
}

/// Rows that are answered together, by one policy version.
#[derive(Debug)]
pub struct Job {
    /// The rows, in the order of the answer.
    pub rows: Vec<Row>,
    /// Who waits.
    pub target: Target,
    /// When it was queued.
    pub queued: Instant,
}

impl Job {
    /// A job that is queued now.
    pub fn new(target: Target, rows: Vec<Row>) -> Self {
        Self {
            rows,
            target,
            queued: Instant::now(),
        }
    }
}

/// Why a job was not taken; it comes back.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum QueueError {
    /// Full at the moment.
    #[error("overloaded: {waiting} of {capacity} rows wait, ask again")]
    Overloaded {
        /// Rows that wait.
        waiting: usize,
        /// Rows that may wait.
        capacity: usize,
    },
    /// Can never fit.
    #[error("request has {rows} rows, expected 1 to {capacity} (`rollout.queue_capacity`)")]
    Size {
        /// Its rows.
        rows: usize,
        /// Rows that may wait.
        capacity: usize,
    },
    /// The engine is leaving.
    #[error("the engine is shutting down")]
    Closed,
}

#[derive(Default)]
struct Waiting {
    jobs: VecDeque<Job>,
    rows: usize,
    closed: bool,
}

/// The queue. Rows of clients are bounded by its capacity; rows of slots by the number of slots, because a slot has one
/// question at a time, so they are always taken.
pub struct Queue {
    waiting: Mutex<Waiting>,
    changed: Condvar,
    capacity: usize,
}

impl Queue {
    /// An empty queue for `capacity` rows.
    pub fn new(capacity: usize) -> Self {
        Self {
            waiting: Mutex::default(),
            changed: Condvar::new(),
            capacity,
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting> {
        // a panic while the lock is held cannot leave a half-changed queue: every change is one push or one pop
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rows that wait.
    pub fn rows(&self) -> usize {
        self.lock().rows
    }

    /// Queues a client's job.
    ///
    /// # Errors
    /// The queue is full, the job can never fit, or the engine is leaving.
    pub fn push_client(&self, job: Job) -> Result<(), QueueError> {
        let rows = job.rows.len();
        if rows == 0 || rows > self.capacity {
            return Err(QueueError::Size {
                rows,
                capacity: self.capacity,
            });
        }
        let mut waiting = self.lock();
        if waiting.closed {
            return Err(QueueError::Closed);
        }
        if waiting.rows + rows > self.capacity {
            return Err(QueueError::Overloaded {
                waiting: waiting.rows,
                capacity: self.capacity,
            });
        }
        waiting.rows += rows;
        waiting.jobs.push_back(job);
        drop(waiting);
        self.changed.notify_one();
        Ok(())
    }

    /// Queues jobs of slots, together, so that they can be one batch. After [`Queue::close`] they are dropped.
    pub fn push_slots(&self, jobs: Vec<Job>) {
        if jobs.is_empty() {
            return;
        }
        let mut waiting = self.lock();
        if waiting.closed {
            return;
        }
        waiting.rows += jobs.iter().map(|j| j.rows.len()).sum::<usize>();
        waiting.jobs.extend(jobs);
        drop(waiting);
        self.changed.notify_one();
    }

    /// No job is taken any more; those that wait are still handed out.
    pub fn close(&self) {
        self.lock().closed = true;
        self.changed.notify_all();
    }

    /// Waits for jobs of at most `max_rows` rows in sum (a job with more comes alone). Returns when the batch is full or the
    /// oldest job has waited for `deadline`; `None` when the queue is closed and empty.
    pub fn take_batch(&self, max_rows: usize, deadline: Duration) -> Option<Vec<Job>> {
        let mut waiting = self.lock();
        loop {
            let Some(oldest) = waiting.jobs.front().map(|j| j.queued) else {
                if waiting.closed {
                    return None;
                }
                waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_sub(oldest.elapsed());
            if waiting.rows >= max_rows || left.is_zero() || waiting.closed {
                break;
            }
            waiting = self
                .changed
                .wait_timeout(waiting, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        }
        let mut batch = Vec::new();
        let mut rows = 0;
        while let Some(job) = waiting.jobs.front() {
            if !batch.is_empty() && rows + job.rows.len() > max_rows {
                break;
            }
            rows += job.rows.len();
            batch.extend(waiting.jobs.pop_front());
        }
        waiting.rows -= rows;
        Some(batch)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn job(ticket: u64, rows: usize) -> Job {
        let row = Row {
            observation: Observation {
                images: Vec::new(),
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
        Job::new(Target::Slot(ticket), vec![row; rows])
    }

    fn tickets(batch: &[Job]) -> Vec<u64> {
        batch
            .iter()
            .map(|j| if let Target::Slot(t) = j.target { t } else { u64::MAX })
            .collect()
    }

    #[test]
    fn a_full_batch_does_not_wait() {
        let queue = Queue::new(8);
        queue.push_slots(vec![job(1, 1), job(2, 1), job(3, 1)]);
        let begun = Instant::now();
        let batch = queue.take_batch(2, Duration::from_mins(1)).expect("open");
        assert_eq!(tickets(&batch), [1, 2], "first come, first served");
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "the deadline is not waited for"
        );
        assert_eq!(queue.rows(), 1);
    }

    #[test]
    fn the_deadline_releases_a_part_batch() {
        let queue = Queue::new(8);
        queue.push_slots(vec![job(1, 1)]);
        let begun = Instant::now();
        let batch = queue.take_batch(4, Duration::from_millis(20)).expect("open");
        assert_eq!(tickets(&batch), [1]);
        // the job was queued a moment before `begun`
        assert!(begun.elapsed() >= Duration::from_millis(15), "{:?}", begun.elapsed());
    }

    #[test]
    fn overload_is_refused_and_nothing_is_lost() {
        let queue = Queue::new(3);
        assert!(queue.push_client(job(1, 2)).is_ok());
        assert!(matches!(
            queue.push_client(job(2, 2)),
            Err(QueueError::Overloaded {
                waiting: 2,
                capacity: 3
            })
        ));
        assert!(matches!(
            queue.push_client(job(3, 4)),
            Err(QueueError::Size { rows: 4, capacity: 3 })
        ));
        assert!(queue.push_client(job(4, 1)).is_ok());
        queue.close();
        assert!(matches!(queue.push_client(job(5, 1)), Err(QueueError::Closed)));
        assert_eq!(
            tickets(&queue.take_batch(9, Duration::ZERO).expect("what waited is served")),
            [1, 4]
        );
        assert!(queue.take_batch(9, Duration::ZERO).is_none());
    }

    #[test]
    fn a_job_is_never_split() {
        let queue = Queue::new(99);
        queue.push_slots(vec![job(1, 1), job(2, 7), job(3, 1)]);
        assert_eq!(tickets(&queue.take_batch(4, Duration::ZERO).expect("open")), [1]);
        assert_eq!(tickets(&queue.take_batch(4, Duration::ZERO).expect("open")), [2]);
        assert_eq!(tickets(&queue.take_batch(4, Duration::ZERO).expect("open")), [3]);
    }
}
