//! The queue before inference: bounded, fair between clients, and taken in batches that fill up or run into a deadline.
//!
//! Env workers' slots and every client have a line of their own; a batch takes one job of each line in turn. A job of more rows than
//! a batch is answered in parts, between which batches of others run; while other clients ask, a part has as few rows as possible.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use wire::messages::ActRow;

/// Most bytes of observations that wait for all clients together.
const MAX_BYTES: usize = 1 << 30;
/// While a client has asked within this time, parts of large jobs are as small as possible.
const RECENT: Duration = Duration::from_secs(1);
/// A large job gets a part at least so often, however many small jobs there are.
const LARGE_WAIT: Duration = Duration::from_secs(1);
/// Large jobs that are begun and not finished, of all clients: what is answered of them takes memory.
const MAX_BEGUN: usize = 4;
/// What waits when the queue is closed is answered for so long.
const DRAIN: Duration = Duration::from_secs(4);
/// The line of the env workers' slots; connections are numbered from 1.
const SLOTS: u64 = 0;

/// Who waits for the result of a [`Job`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// The present chunk of a slot's episode (one row).
    Slot(u64),
    /// The value of the last observation of a finished episode (one row).
    Bootstrap(u64),
    /// A client's request.
    Client {
        /// Number of its connection.
        client: u64,
        /// Number of the request.
        request: u64,
    },
}

impl Target {
    fn line(self) -> u64 {
        match self {
            Self::Slot(_) | Self::Bootstrap(_) => SLOTS,
            Self::Client { client, .. } => client,
        }
    }
}

/// Rows that are answered together, by one policy version. `P` is what a large job carries from one part to the next.
#[derive(Debug)]
pub struct Job<P = ()> {
    /// The rows that are not answered yet, in the order of the answer.
    pub rows: VecDeque<ActRow>,
    /// Who waits.
    pub target: Target,
    /// When it was queued.
    pub queued: Instant,
    /// The parts that are answered.
    pub progress: Option<P>,
    bytes: usize,
}

impl<P> Job<P> {
    /// A job that is queued now.
    pub fn new(target: Target, rows: Vec<ActRow>) -> Self {
        Self {
            bytes: rows.iter().map(row_bytes).sum(),
            rows: rows.into(),
            target,
            queued: Instant::now(),
            progress: None,
        }
    }
}

impl Job {
    /// The same job, with nothing answered yet.
    pub fn begin<P>(self) -> Job<P> {
        Job {
            rows: self.rows,
            target: self.target,
            queued: self.queued,
            progress: None,
            bytes: self.bytes,
        }
    }
}

/// Bytes of an observation and what comes with it.
fn row_bytes(row: &ActRow) -> usize {
    let seen = &row.observation;
    let images: usize = seen.images.iter().flatten().map(|image| image.data.len()).sum();
    let guidance = row.guidance.as_ref().map_or(0, |guidance| guidance.previous.data.len());
    images + 4 * seen.state.len() + seen.prompt.len() + guidance
}

/// Whether a job is answered in parts.
fn is_large<P>(job: &Job<P>, max_rows: usize) -> bool {
    job.rows.len() > max_rows || job.progress.is_some()
}

/// Jobs to run now.
#[derive(Debug)]
pub enum Batch<P> {
    /// Whole jobs; their rows fit one batch.
    Whole(Vec<Job<P>>),
    /// The first `rows` rows of a large job, which then comes back by [`Queue::put_back`].
    Part {
        /// The job.
        job: Job<P>,
        /// Rows to answer now.
        rows: usize,
    },
}

/// Reason for rejecting a job.
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

impl QueueError {
    /// Whether the same request may succeed later.
    pub fn retry(&self) -> bool {
        !matches!(self, Self::Size { .. })
    }
}

struct Line<P> {
    jobs: VecDeque<Job<P>>,
    rows: usize,
    bytes: usize,
    /// When the large job at its front had its last part.
    part: Instant,
}

struct Waiting<P> {
    lines: BTreeMap<u64, Line<P>>,
    /// Lines with jobs, the next one first.
    turns: VecDeque<u64>,
    /// Rows and bytes of clients.
    client_rows: usize,
    client_bytes: usize,
    slot_rows: usize,
    /// The client whose large job is out for a part; `None` when that client has left meanwhile.
    out: Option<u64>,
    /// When a client last asked for no more rows than a batch has.
    recent: Option<Instant>,
    /// The last batch was a part although whole jobs waited: now it is their turn.
    forced: bool,
    closed: Option<Instant>,
}

impl<P> Waiting<P> {
    fn push(&mut self, job: Job<P>, front: bool) {
        let (line, rows) = (job.target.line(), job.rows.len());
        if line == SLOTS {
            self.slot_rows += rows;
        } else {
            self.client_rows += rows;
            self.client_bytes += job.bytes;
        }
        let entry = self.lines.entry(line).or_insert_with(|| Line {
            jobs: VecDeque::new(),
            rows: 0,
            bytes: 0,
            part: job.queued,
        });
        entry.rows += rows;
        entry.bytes += job.bytes;
        if entry.jobs.is_empty() {
            self.turns.push_back(line);
        }
        if front {
            entry.jobs.push_front(job);
        } else {
            entry.jobs.push_back(job);
        }
    }

    /// Takes the first job of a line, or the last.
    fn pop(&mut self, line: u64, front: bool) -> Option<Job<P>> {
        let entry = self.lines.get_mut(&line)?;
        let job = if front {
            entry.jobs.pop_front()
        } else {
            entry.jobs.pop_back()
        }?;
        entry.rows -= job.rows.len();
        entry.bytes -= job.bytes;
        if line == SLOTS {
            self.slot_rows -= job.rows.len();
        } else {
            self.client_rows -= job.rows.len();
            self.client_bytes -= job.bytes;
        }
        if entry.jobs.is_empty() {
            self.lines.remove(&line);
            self.turns.retain(|turn| *turn != line);
        }
        Some(job)
    }

    /// Takes a job of at most `room` rows from the line that comes next, and sends that line to the end.
    fn next_whole(&mut self, room: usize) -> Option<Job<P>> {
        let fits = |job: &Job<P>| job.rows.len() <= room && job.progress.is_none();
        let fits = |line: &u64| {
            self.lines
                .get(line)
                .and_then(|line| line.jobs.front())
                .is_some_and(fits)
        };
        let place = self.turns.iter().position(fits)?;
        let line = self.turns.remove(place)?;
        self.turns.push_back(line);
        self.pop(line, true)
    }

    /// The line with a large job whose last part is longest ago; of those that are begun where these are many.
    fn next_large(&self, max_rows: usize) -> Option<(u64, Instant)> {
        let begun = |line: &Line<P>| line.jobs.front().is_some_and(|job| job.progress.is_some());
        let full = self.lines.values().filter(|line| begun(line)).count() >= MAX_BEGUN;
        self.lines
            .iter()
            .filter(|(_, line)| line.jobs.front().is_some_and(|job| is_large(job, max_rows)))
            .filter(|(_, line)| !full || begun(line))
            .map(|(id, line)| (*id, line.part))
            .min_by_key(|(_, part)| *part)
    }
}

/// The queue. Rows of clients are bounded by its capacity. When it is full, the client with the most rows makes room for one with
/// fewer: its newest job is displaced. Rows of slots are bounded by the number of slots, because a slot has one question at a time,
/// so they are always accepted.
pub struct Queue<P = ()> {
    waiting: Mutex<Waiting<P>>,
    changed: Condvar,
    capacity: usize,
    max_rows: usize,
}

impl<P> Queue<P> {
    /// An empty queue for `capacity` rows of clients, taken in batches of at most `max_rows`.
    pub fn new(capacity: usize, max_rows: usize) -> Self {
        Self {
            waiting: Mutex::new(Waiting {
                lines: BTreeMap::new(),
                turns: VecDeque::new(),
                client_rows: 0,
                client_bytes: 0,
                slot_rows: 0,
                out: None,
                recent: None,
                forced: false,
                closed: None,
            }),
            changed: Condvar::new(),
            capacity,
            max_rows: max_rows.max(1),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting<P>> {
        // no step between two changes of the state can panic
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Rows that wait.
    pub fn rows(&self) -> usize {
        let waiting = self.lock();
        waiting.client_rows + waiting.slot_rows
    }

    /// Queues a client's job. Jobs of other clients that it displaces are added to `displaced`.
    ///
    /// # Errors
    /// The queue is full, the job can never fit, or the engine is leaving; the job comes back.
    pub fn push_client(&self, job: Job<P>, displaced: &mut Vec<Job<P>>) -> Result<(), (QueueError, Job<P>)> {
        let (rows, bytes, line) = (job.rows.len(), job.bytes, job.target.line());
        let capacity = self.capacity;
        if rows == 0 || rows > capacity {
            return Err((QueueError::Size { rows, capacity }, job));
        }
        let mut waiting = self.lock();
        if waiting.closed.is_some() {
            return Err((QueueError::Closed, job));
        }
        // the share of a line is what it has most of: rows, or bytes where these are short
        let own = waiting
            .lines
            .get(&line)
            .map_or((rows, bytes), |line| (line.rows + rows, line.bytes + bytes));
        while waiting.client_rows + rows > capacity || waiting.client_bytes + bytes > MAX_BYTES {
            let by_rows = waiting.client_rows + rows > capacity;
            let share = |(rows, bytes): (usize, usize)| if by_rows { rows } else { bytes };
            let others = waiting.lines.iter().filter(|(id, _)| **id != SLOTS && **id != line);
            let victim = others
                .map(|(id, line)| (*id, share((line.rows, line.bytes))))
                .max_by_key(|(_, share)| *share)
                .filter(|(_, theirs)| *theirs > share(own))
                .map(|(id, _)| id);
            let Some(job) = victim.and_then(|victim| waiting.pop(victim, false)) else {
                let waiting = waiting.client_rows;
                return Err((QueueError::Overloaded { waiting, capacity }, job));
            };
            displaced.push(job);
        }
        if rows <= self.max_rows {
            waiting.recent = Some(job.queued);
        }
        waiting.push(job, false);
        drop(waiting);
        self.changed.notify_one();
        Ok(())
    }

    /// Queues jobs of slots, together, so that they can be one batch. After [`Queue::close`] they are dropped.
    pub fn push_slots(&self, jobs: Vec<Job<P>>) {
        if jobs.is_empty() {
            return;
        }
        let mut waiting = self.lock();
        if waiting.closed.is_some() {
            return;
        }
        for job in jobs {
            waiting.push(job, false);
        }
        drop(waiting);
        self.changed.notify_one();
    }

    /// Takes a large job back after a part of it was answered. The job of a client that has left is dropped.
    ///
    /// # Errors
    /// The queue was closed meanwhile: the job comes back.
    pub fn put_back(&self, job: Job<P>) -> Result<(), Job<P>> {
        let mut waiting = self.lock();
        if waiting.out.take() != Some(job.target.line()) {
            return Ok(());
        }
        if waiting.closed.is_some() {
            return Err(job);
        }
        let line = job.target.line();
        waiting.push(job, true);
        if let Some(entry) = waiting.lines.get_mut(&line) {
            entry.part = Instant::now();
        }
        Ok(())
    }

    /// Removes the jobs of a client that has left.
    pub fn remove_client(&self, client: u64) -> Vec<Job<P>> {
        let mut waiting = self.lock();
        waiting.out = waiting.out.filter(|out| *out != client);
        std::iter::from_fn(|| waiting.pop(client, true)).collect()
    }

    /// Accepts no more jobs and returns the large ones, which are not begun or finished any more. The others are still handed out
    /// for a few seconds.
    pub fn close(&self) -> Vec<Job<P>> {
        let mut waiting = self.lock();
        waiting.closed = Some(Instant::now());
        let (mut large, mut small) = (Vec::new(), Vec::new());
        for line in waiting.turns.clone() {
            while let Some(job) = waiting.pop(line, true) {
                if is_large(&job, self.max_rows) {
                    large.push(job);
                } else {
                    small.push(job);
                }
            }
        }
        for job in small {
            waiting.push(job, false);
        }
        drop(waiting);
        self.changed.notify_all();
        large
    }

    /// Waits for jobs. Whole jobs are handed out when they fill a batch or the oldest has waited for `deadline`; a part of a large
    /// job when there are none. A part has the rows of a batch, or `least` while other clients ask. Returns `None` when the queue is
    /// closed and empty.
    pub fn take(&self, deadline: Duration, least: usize) -> Option<Batch<P>> {
        let mut waiting = self.lock();
        let large = loop {
            if let Some(closed) = waiting.closed
                && (waiting.turns.is_empty() || closed.elapsed() > DRAIN)
            {
                return None;
            }
            let large = waiting.next_large(self.max_rows);
            if let Some((line, part)) = large
                && part.elapsed() > LARGE_WAIT
                && !waiting.forced
            {
                break Some(line);
            }
            let whole = |line: &u64| {
                let entry = waiting.lines.get(line)?;
                let job = entry.jobs.front().filter(|job| !is_large(job, self.max_rows))?;
                Some((job.queued, entry.rows))
            };
            let fronts = waiting.turns.iter().filter_map(whole);
            let (oldest, rows) = fronts.fold((None, 0), |(oldest, sum), (queued, rows)| {
                (
                    Some(oldest.map_or(queued, |oldest: Instant| oldest.min(queued))),
                    sum + rows,
                )
            });
            let Some(oldest) = oldest else {
                if let Some((line, _)) = large {
                    break Some(line);
                }
                waiting = self.changed.wait(waiting).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let left = deadline.saturating_sub(oldest.elapsed());
            // with a large job there is no time to wait for others: they will come while its next part runs
            if rows >= self.max_rows || left.is_zero() || large.is_some() || waiting.closed.is_some() {
                break None;
            }
            waiting = self
                .changed
                .wait_timeout(waiting, left)
                .unwrap_or_else(PoisonError::into_inner)
                .0;
        };
        waiting.forced = large.is_some();
        if let Some(line) = large {
            let recent = waiting.recent.is_some_and(|recent| recent.elapsed() < RECENT);
            let job = waiting.pop(line, true)?;
            waiting.out = Some(line);
            let rows = if recent {
                least.clamp(1, self.max_rows)
            } else {
                self.max_rows
            };
            return Some(Batch::Part {
                rows: rows.min(job.rows.len()),
                job,
            });
        }
        let mut batch = Vec::new();
        let mut room = self.max_rows;
        // half of a batch is the slots' where they have so many: workers and clients are not of one number
        while room > self.max_rows / 2
            && let Some(job) = waiting.pop(SLOTS, true)
        {
            room -= job.rows.len();
            batch.push(job);
        }
        if let Some(place) = waiting.turns.iter().position(|line| *line == SLOTS) {
            waiting.turns.remove(place);
            waiting.turns.push_back(SLOTS);
        }
        while let Some(job) = waiting.next_whole(room) {
            room -= job.rows.len();
            batch.push(job);
        }
        Some(Batch::Whole(batch))
    }
}

#[cfg(test)]
mod tests {
    use policy::noise::NoiseKey;
    use wire::messages::{Mode, Observation};

    use super::*;

    fn job(target: Target, rows: usize) -> Job {
        let row = ActRow {
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
        Job::new(target, vec![row; rows])
    }

    fn slot(ticket: u64) -> Job {
        job(Target::Slot(ticket), 1)
    }

    fn request(client: u64, request: u64, rows: usize) -> Job {
        job(Target::Client { client, request }, rows)
    }

    fn push(queue: &Queue, job: Job) -> Result<(), QueueError> {
        let mut displaced = Vec::new();
        let pushed = queue.push_client(job, &mut displaced);
        assert!(displaced.is_empty(), "{displaced:?}");
        pushed.map_err(|(error, _job)| error)
    }

    /// Slot tickets and client requests of the next batch, which holds whole jobs.
    fn whole(queue: &Queue, deadline: Duration) -> Vec<u64> {
        match queue.take(deadline, 1) {
            Some(Batch::Whole(jobs)) => numbers(&jobs),
            other => panic!("expected whole jobs, got {other:?}"),
        }
    }

    fn numbers(jobs: &[Job]) -> Vec<u64> {
        let number = |job: &Job| match job.target {
            Target::Slot(number) | Target::Bootstrap(number) => number,
            Target::Client { request, .. } => request,
        };
        jobs.iter().map(number).collect()
    }

    /// Takes a part of a large job and gives the rest back.
    fn part(queue: &Queue) -> (u64, usize) {
        match queue.take(Duration::ZERO, 1) {
            Some(Batch::Part { mut job, rows }) => {
                job.rows.drain(..rows);
                job.progress = Some(());
                let Target::Client { client, .. } = job.target else {
                    panic!("of a client")
                };
                if !job.rows.is_empty() {
                    queue.put_back(job).expect("open");
                }
                (client, rows)
            }
            other => panic!("expected a part, got {other:?}"),
        }
    }

    #[test]
    fn a_full_batch_does_not_wait() {
        let queue = Queue::new(8, 2);
        queue.push_slots(vec![slot(1), slot(2), slot(3)]);
        let begun = Instant::now();
        assert_eq!(
            whole(&queue, Duration::from_mins(1)),
            [1, 2],
            "first come, first served"
        );
        assert!(
            begun.elapsed() < Duration::from_secs(30),
            "the deadline is not waited for"
        );
        assert_eq!(queue.rows(), 1);
    }

    #[test]
    fn the_deadline_releases_a_part_batch() {
        let queue = Queue::new(8, 4);
        queue.push_slots(vec![slot(1)]);
        let begun = Instant::now();
        assert_eq!(whole(&queue, Duration::from_millis(20)), [1]);
        // the job was queued a moment before `begun`
        assert!(begun.elapsed() >= Duration::from_millis(15), "{:?}", begun.elapsed());
    }

    #[test]
    fn overload_is_rejected_and_nothing_is_lost() {
        let queue = Queue::new(3, 9);
        assert!(push(&queue, request(1, 1, 2)).is_ok());
        assert!(matches!(
            push(&queue, request(1, 2, 2)),
            Err(QueueError::Overloaded {
                waiting: 2,
                capacity: 3
            })
        ));
        assert!(matches!(
            push(&queue, request(1, 3, 4)),
            Err(QueueError::Size { rows: 4, capacity: 3 })
        ));
        assert!(push(&queue, request(1, 4, 1)).is_ok());
        assert!(queue.close().is_empty());
        assert!(matches!(push(&queue, request(1, 5, 1)), Err(QueueError::Closed)));
        assert_eq!(whole(&queue, Duration::ZERO), [1, 4], "what waited is served");
        assert!(queue.take(Duration::ZERO, 1).is_none());
    }

    #[test]
    fn a_batch_takes_clients_and_slots_in_turn() {
        let queue = Queue::new(99, 5);
        queue.push_slots((1..=9).map(slot).collect());
        for number in 11..=19 {
            push(&queue, request(1, number, 1)).expect("room");
        }
        push(&queue, request(2, 21, 1)).expect("room");
        push(&queue, request(3, 31, 2)).expect("room");
        assert_eq!(
            whole(&queue, Duration::ZERO),
            [1, 2, 3, 11, 21],
            "half for the slots, then in turn"
        );
        assert_eq!(whole(&queue, Duration::ZERO), [4, 5, 6, 31]);
        assert_eq!(whole(&queue, Duration::ZERO), [7, 8, 9, 12, 13]);
    }

    #[test]
    fn a_job_that_fits_a_batch_is_never_split() {
        let queue = Queue::new(99, 4);
        push(&queue, request(1, 1, 3)).expect("room");
        push(&queue, request(2, 2, 2)).expect("room");
        push(&queue, request(2, 3, 2)).expect("room");
        assert_eq!(whole(&queue, Duration::ZERO), [1]);
        assert_eq!(whole(&queue, Duration::ZERO), [2, 3]);
    }

    #[test]
    fn large_jobs_are_answered_in_parts_and_give_way() {
        let queue = Queue::new(99, 4);
        push(&queue, request(1, 1, 10)).expect("room");
        push(&queue, request(2, 2, 6)).expect("room");
        assert_eq!(part(&queue), (1, 4), "no one else asks: a whole batch");
        assert_eq!(part(&queue), (2, 4), "large jobs take turns");
        push(&queue, request(3, 3, 1)).expect("room");
        assert_eq!(whole(&queue, Duration::ZERO), [3], "it waits for one part at most");
        assert_eq!(part(&queue), (1, 1), "while others ask parts are small");
        assert_eq!(part(&queue), (2, 1));
        assert_eq!(queue.rows(), 5 + 1);
    }

    #[test]
    fn large_jobs_that_waited_long_take_turns_with_small_ones() {
        let queue = Queue::new(99, 4);
        let long_ago = Instant::now().checked_sub(2 * LARGE_WAIT).expect("2 s after boot");
        for client in [1, 2] {
            let mut large = request(client, client, 10);
            large.queued = long_ago;
            push(&queue, large).expect("room");
        }
        push(&queue, request(3, 3, 3)).expect("room");
        push(&queue, request(3, 4, 3)).expect("room");
        assert_eq!(part(&queue).0, 1, "it waited for long");
        assert_eq!(
            whole(&queue, Duration::ZERO),
            [3],
            "and so did the other, but small ones come between"
        );
        assert_eq!(part(&queue).0, 2);
        assert_eq!(whole(&queue, Duration::ZERO), [4]);
    }

    #[test]
    fn the_client_with_the_most_rows_makes_room() {
        let queue = Queue::new(10, 4);
        push(&queue, request(1, 1, 3)).expect("room");
        push(&queue, request(1, 2, 5)).expect("room");
        push(&queue, request(2, 3, 2)).expect("room");
        let mut displaced = Vec::new();
        queue.push_client(request(3, 4, 1), &mut displaced).expect("a share");
        assert_eq!(numbers(&displaced), [2], "its newest job");
        displaced.clear();
        // with 5 rows it would have more than any other
        let (error, _job) = queue
            .push_client(request(3, 5, 5), &mut displaced)
            .expect_err("no share");
        assert!(error.retry() && displaced.is_empty(), "{displaced:?}");
    }

    #[test]
    fn what_a_client_left_behind_is_not_answered() {
        let queue = Queue::new(99, 4);
        push(&queue, request(1, 1, 1)).expect("room");
        push(&queue, request(2, 2, 10)).expect("room");
        push(&queue, request(3, 3, 1)).expect("room");
        assert_eq!(numbers(&queue.remove_client(1)), [1]);
        assert_eq!(whole(&queue, Duration::ZERO), [3]);
        let Some(Batch::Part { job, .. }) = queue.take(Duration::ZERO, 1) else {
            panic!("a part")
        };
        assert!(queue.remove_client(2).is_empty(), "its job is out for a part");
        queue.put_back(job).expect("dropped in silence");
        assert_eq!(queue.rows(), 0);
    }

    #[test]
    fn closing_returns_large_jobs_and_drains_the_others() {
        let queue = Queue::new(99, 4);
        push(&queue, request(1, 1, 1)).expect("room");
        push(&queue, request(1, 2, 10)).expect("room");
        push(&queue, request(2, 3, 10)).expect("room");
        assert_eq!(numbers(&queue.close()), [2, 3]);
        assert_eq!(whole(&queue, Duration::from_mins(1)), [1]);
        assert!(queue.take(Duration::from_mins(1), 1).is_none());
    }
}
