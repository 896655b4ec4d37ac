//! The queue before the device: bounded, fair between clients, one batch prepared ahead.
//!
//! Env workers' slots and every client have a line of their own; jobs are cut from the lines in turn. A job of more rows than a batch
//! is answered in parts, between which batches of others run; while other clients ask, a part has as few rows as possible.
//!
//! Jobs go through three places: they wait in a line as they came ([`Queue::push_client`]), a preparing thread cuts them
//! ([`Queue::cut`]) and stages them prepared ([`Queue::stage`]), and the device's thread takes what is staged ([`Queue::take`]). No more
//! than a batch is staged, and what arrives while the device runs still joins it.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{Condvar, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

use crate::job::{Job, JobError, SLOTS};

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

/// Whether a job is answered in parts.
fn is_large<P>(job: &Job<P>, max_rows: usize) -> bool {
    job.rows.len() > max_rows || job.progress.is_some()
}

/// A job to prepare.
#[derive(Debug)]
pub struct Cut<P> {
    /// The job.
    pub job: Job<P>,
    /// Its first rows to prepare: all, or a part of a large job.
    pub rows: usize,
    /// For [`Queue::stage`].
    pub number: CutNumber,
}

/// Number of a cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutNumber(u64);

/// A job with prepared rows `R`; the rows that are not prepared yet are still in the job.
#[derive(Debug)]
pub struct Prepared<R, P> {
    /// The job.
    pub job: Job<P>,
    /// Its prepared rows.
    pub rows: Vec<R>,
}

/// What the device's thread does next.
#[derive(Debug)]
pub enum Taken<R, P> {
    /// Run these whole jobs; their rows fit one batch.
    Whole(Vec<Prepared<R, P>>),
    /// Run a part of a large job, then call [`Queue::put_back`] or [`Queue::finished`].
    Part(Prepared<R, P>),
    /// Look after something else: [`Queue::wake`] was called.
    Woken,
    /// The queue is closed and empty.
    Closed,
}

#[derive(Debug)]
struct Line<P> {
    jobs: VecDeque<Job<P>>,
    rows: usize,
    bytes: usize,
    /// When the large job at its front had its last part.
    part: Instant,
}

/// A job that is in no line: it is being prepared, or it is a large one that is not put back yet.
struct Out {
    number: u64,
    line: u64,
    /// Rows to prepare.
    rows: usize,
    /// When it was queued; of a large job, when it had its last part.
    since: Instant,
    large: bool,
    /// The device's thread has it.
    taken: bool,
}

struct Waiting<R, P> {
    lines: BTreeMap<u64, Line<P>>,
    /// Lines with jobs, the next one first.
    turns: VecDeque<u64>,
    /// Rows and bytes of clients.
    client_rows: usize,
    client_bytes: usize,
    slot_rows: usize,
    /// Those of clients that have left are not among them.
    out: Vec<Out>,
    /// Number of the last cut.
    cuts: u64,
    /// Whole jobs that are prepared, and their rows.
    staged: Vec<Prepared<R, P>>,
    staged_rows: usize,
    /// Rows of slots that were cut for the batch that is being staged.
    staged_slots: usize,
    /// A part of a large job that is prepared, and when that job had its last one.
    staged_part: Option<(Prepared<R, P>, Instant)>,
    /// When a client last asked for no more rows than a batch has.
    recent: Option<Instant>,
    /// The last batch was a part although whole jobs waited: now it is their turn.
    forced: bool,
    woken: bool,
    closed: Option<Instant>,
}

impl<R, P> Waiting<R, P> {
    fn push(&mut self, job: Job<P>, front: bool) {
        let (line, rows) = (job.line, job.rows.len());
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

    /// Sends a line to the end of the turns.
    fn had_its_turn(&mut self, line: u64) {
        if let Some(place) = self.turns.iter().position(|turn| *turn == line) {
            self.turns.remove(place);
            self.turns.push_back(line);
        }
    }

    fn front(&self, line: u64) -> Option<&Job<P>> {
        self.lines.get(&line)?.jobs.front()
    }

    /// Takes a job of at most `room` rows: of the slots while they have not `quota` rows, otherwise of the line that comes next.
    fn next_whole(&mut self, room: usize, quota: usize) -> Option<Job<P>> {
        let fits = |job: &Job<P>| job.rows.len() <= room && job.progress.is_none();
        let line = if self.staged_slots < quota && self.front(SLOTS).is_some_and(fits) {
            SLOTS
        } else {
            *self.turns.iter().find(|line| self.front(**line).is_some_and(fits))?
        };
        let job = self.pop(line, true)?;
        self.had_its_turn(line);
        Some(job)
    }

    /// The line with a large job whose last part is longest ago; of those that are begun where these are many.
    fn next_large(&self, max_rows: usize) -> Option<(u64, Instant)> {
        let begun = |line: &Line<P>| line.jobs.front().is_some_and(|job| job.progress.is_some());
        let out = self.out.iter().filter(|out| out.large).count();
        let full = out + self.lines.values().filter(|line| begun(line)).count() >= MAX_BEGUN;
        let is_out = |id: &u64| self.out.iter().any(|out| out.large && out.line == *id);
        self.lines
            .iter()
            .filter(|(_, line)| line.jobs.front().is_some_and(|job| is_large(job, max_rows)))
            .filter(|(id, line)| !is_out(id) && (!full || begun(line)))
            .map(|(id, line)| (*id, line.part))
            .min_by_key(|(_, part)| *part)
    }

    /// Takes note of a job that is cut from its line: all of it, or the first `rows` of a large one.
    fn cut(&mut self, job: Job<P>, rows: usize, since: Instant, large: bool) -> Cut<P> {
        self.cuts += 1;
        self.out.push(Out {
            number: self.cuts,
            line: job.line,
            rows,
            since,
            large,
            taken: false,
        });
        Cut {
            job,
            rows,
            number: CutNumber(self.cuts),
        }
    }

    /// Whole jobs that are being prepared for the next batch.
    fn preparing(&self) -> impl Iterator<Item = &Out> {
        self.out.iter().filter(|out| !out.large)
    }

    /// Ends the absence of a line's large job that the device's thread had; returns whether its client is still there.
    fn returned(&mut self, line: u64) -> bool {
        let before = self.out.len();
        self.out.retain(|out| !(out.large && out.taken && out.line == line));
        self.out.len() < before
    }

    /// Whether a whole job is being prepared, or will be, that was queued no later than `last` and has no more than `room` rows.
    fn more_is_coming(&self, last: Instant, room: usize) -> bool {
        let waiting = self.turns.iter().filter_map(|line| self.front(*line));
        self.preparing().any(|out| out.since <= last)
            || waiting
                .filter(|job| job.progress.is_none() && job.rows.len() <= room)
                .any(|job| job.queued <= last)
    }
}

/// The queue. Rows of clients are bounded by its capacity. When it is full, the client with the most rows makes room for one with
/// fewer: its newest job is displaced. Rows of slots are bounded by the number of slots, because a slot has one question at a time,
/// so they are always accepted.
pub struct Queue<R, P = ()> {
    waiting: Mutex<Waiting<R, P>>,
    /// For the preparing threads.
    to_cut: Condvar,
    /// For the device's thread.
    to_take: Condvar,
    capacity: usize,
    max_rows: usize,
}

impl<R, P> Queue<R, P> {
    /// Makes an empty queue for `capacity` rows of clients, taken in batches of at most `max_rows`.
    pub fn new(capacity: usize, max_rows: usize) -> Self {
        Self {
            waiting: Mutex::new(Waiting {
                lines: BTreeMap::new(),
                turns: VecDeque::new(),
                client_rows: 0,
                client_bytes: 0,
                slot_rows: 0,
                out: Vec::new(),
                cuts: 0,
                staged: Vec::new(),
                staged_rows: 0,
                staged_slots: 0,
                staged_part: None,
                recent: None,
                forced: false,
                woken: false,
                closed: None,
            }),
            to_cut: Condvar::new(),
            to_take: Condvar::new(),
            capacity,
            max_rows: max_rows.max(1),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting<R, P>> {
        // no step between two changes of the state can panic
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Returns the rows that wait for the device.
    pub fn rows(&self) -> usize {
        let waiting = self.lock();
        let preparing: usize = waiting.preparing().map(|out| out.rows).sum();
        let part = waiting.staged_part.as_ref().map_or(0, |(part, _)| part.rows.len());
        waiting.client_rows + waiting.slot_rows + preparing + waiting.staged_rows + part
    }

    /// Queues a client's job. Jobs of other clients that it displaces are added to `displaced`.
    ///
    /// # Errors
    /// The queue is full, the job can never fit, or the engine is leaving; the job comes back.
    pub fn push_client(&self, job: Job<P>, displaced: &mut Vec<Job<P>>) -> Result<(), Box<(JobError, Job<P>)>> {
        let (rows, bytes, line) = (job.rows.len(), job.bytes, job.line);
        let capacity = self.capacity;
        if rows == 0 || rows > capacity {
            return Err(Box::new((JobError::Size { rows, capacity }, job)));
        }
        let mut waiting = self.lock();
        if waiting.closed.is_some() {
            return Err(Box::new((JobError::Closed, job)));
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
                return Err(Box::new((JobError::Overloaded { waiting, capacity }, job)));
            };
            displaced.push(job);
        }
        if rows <= self.max_rows {
            waiting.recent = Some(job.queued);
        }
        waiting.push(job, false);
        drop(waiting);
        self.to_cut.notify_one();
        Ok(())
    }

    /// Queues jobs of slots. After [`Queue::close`] they are dropped.
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
        self.to_cut.notify_all();
    }

    /// Waits for a job to prepare: a whole one while the next batch has room, or a part of a large one while none is staged. A part has
    /// the rows of a batch, or `least` while other clients ask. Returns `None` when the queue is closed and nothing waits.
    pub fn cut(&self, least: usize) -> Option<Cut<P>> {
        let mut waiting = self.lock();
        loop {
            let preparing: usize = waiting.preparing().map(|out| out.rows).sum();
            let room = self.max_rows.saturating_sub(waiting.staged_rows + preparing);
            // half of a batch is the slots' where they have so many: workers and clients are not of one number
            if let Some(job) = waiting.next_whole(room, self.max_rows.div_ceil(2)) {
                if job.line == SLOTS {
                    waiting.staged_slots += job.rows.len();
                }
                let (rows, queued) = (job.rows.len(), job.queued);
                return Some(waiting.cut(job, rows, queued, false));
            }
            // one part ahead of the one that runs
            let ahead = waiting.out.iter().any(|out| out.large && !out.taken);
            if !ahead
                && let Some((line, since)) = waiting.next_large(self.max_rows)
                && let Some(job) = waiting.pop(line, true)
            {
                let recent = waiting.recent.is_some_and(|recent| recent.elapsed() < RECENT);
                let most = if recent {
                    least.clamp(1, self.max_rows)
                } else {
                    self.max_rows
                };
                let rows = most.min(job.rows.len());
                return Some(waiting.cut(job, rows, since, true));
            }
            if let Some(closed) = waiting.closed
                && (waiting.turns.is_empty() || closed.elapsed() > DRAIN)
            {
                return None;
            }
            waiting = self.to_cut.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Stages a prepared job for the device. The job of a client that has left meanwhile is dropped.
    pub fn stage(&self, number: CutNumber, prepared: Prepared<R, P>) {
        let mut waiting = self.lock();
        let Some(place) = waiting.out.iter().position(|out| out.number == number.0) else {
            return;
        };
        match waiting.out.get(place) {
            Some(out) if out.large => {
                let since = out.since;
                waiting.staged_part = Some((prepared, since));
            }
            _ => {
                waiting.out.swap_remove(place);
                waiting.staged_rows += prepared.rows.len();
                waiting.staged.push(prepared);
            }
        }
        drop(waiting);
        self.to_take.notify_one();
    }

    /// Forgets a cut whose job cannot be prepared.
    pub fn give_up(&self, number: CutNumber) {
        self.lock().out.retain(|out| out.number != number.0);
        self.to_cut.notify_one();
        self.to_take.notify_one();
    }

    /// Takes a large job back after a part of it was answered. The job of a client that has left is dropped.
    ///
    /// # Errors
    /// The queue was closed meanwhile: the job comes back.
    pub fn put_back(&self, job: Job<P>) -> Result<(), Job<P>> {
        let line = job.line;
        let mut waiting = self.lock();
        if !waiting.returned(line) {
            return Ok(());
        }
        if waiting.closed.is_some() {
            return Err(job);
        }
        waiting.push(job, true);
        if let Some(entry) = waiting.lines.get_mut(&line) {
            entry.part = Instant::now();
        }
        drop(waiting);
        self.to_cut.notify_one();
        Ok(())
    }

    /// Notes that the large job of a line, of which a part was taken, is not coming back.
    pub fn finished(&self, line: u64) {
        self.lock().returned(line);
        self.to_cut.notify_one();
    }

    /// Removes the jobs of a client that has left.
    pub fn remove_client(&self, client: u64) -> Vec<Job<P>> {
        let mut waiting = self.lock();
        waiting.out.retain(|out| out.line != client);
        let mut removed: Vec<Job<P>> = std::iter::from_fn(|| waiting.pop(client, true)).collect();
        let (gone, staged) = std::mem::take(&mut waiting.staged)
            .into_iter()
            .partition(|prepared| prepared.job.line == client);
        waiting.staged = staged;
        let gone: Vec<Prepared<R, P>> = gone;
        waiting.staged_rows -= gone.iter().map(|prepared| prepared.rows.len()).sum::<usize>();
        let part = waiting.staged_part.take_if(|(part, _)| part.job.line == client);
        removed.extend(
            gone.into_iter()
                .chain(part.map(|(part, _)| part))
                .map(|prepared| prepared.job),
        );
        drop(waiting);
        self.to_cut.notify_one();
        removed
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
        large.extend(waiting.staged_part.take().map(|(part, _)| part.job));
        drop(waiting);
        self.to_cut.notify_all();
        self.to_take.notify_all();
        large
    }

    /// Removes all jobs that are left.
    pub fn clear(&self) -> Vec<Job<P>> {
        let mut waiting = self.lock();
        waiting.out.clear();
        waiting.staged_rows = 0;
        let mut jobs = Vec::new();
        while let Some(line) = waiting.turns.front().copied() {
            jobs.extend(waiting.pop(line, true));
        }
        let staged = std::mem::take(&mut waiting.staged);
        let part = waiting.staged_part.take().map(|(part, _)| part);
        jobs.extend(staged.into_iter().chain(part).map(|prepared| prepared.job));
        jobs
    }

    /// Makes [`Queue::take`] return [`Taken::Woken`].
    pub fn wake(&self) {
        self.lock().woken = true;
        self.to_take.notify_one();
    }

    /// Waits for what the device's thread does next. Whole jobs are handed out when they fill a batch, or when the oldest has waited
    /// for `deadline` and all that came within that time is prepared; a part of a large job when there are none.
    pub fn take(&self, deadline: Duration) -> Taken<R, P> {
        let mut waiting = self.lock();
        loop {
            if std::mem::take(&mut waiting.woken) {
                return Taken::Woken;
            }
            let idle = waiting.staged.is_empty() && waiting.preparing().next().is_none();
            if let Some(closed) = waiting.closed
                && ((idle && waiting.turns.is_empty()) || closed.elapsed() > DRAIN)
            {
                return Taken::Closed;
            }
            let forced = waiting.forced;
            if let Some((part, _)) = waiting
                .staged_part
                .take_if(|(_, since)| since.elapsed() > LARGE_WAIT && !forced)
            {
                waiting.forced = true;
                return self.part(waiting, part);
            }
            let left = match waiting.staged.iter().map(|prepared| prepared.job.queued).min() {
                Some(oldest) => {
                    // with a large job there is no time to wait for others: they will come while its next part runs
                    let hurry = waiting.staged_part.is_some() || waiting.closed.is_some();
                    let left = if hurry {
                        Duration::ZERO
                    } else {
                        deadline.saturating_sub(oldest.elapsed())
                    };
                    let room = self.max_rows.saturating_sub(waiting.staged_rows);
                    if room == 0 || (left.is_zero() && !waiting.more_is_coming(oldest + deadline, room)) {
                        return self.whole(waiting);
                    }
                    left
                }
                None if waiting.more_is_coming(Instant::now(), self.max_rows) => Duration::ZERO,
                None => {
                    if let Some((part, _)) = waiting.staged_part.take() {
                        waiting.forced = false;
                        return self.part(waiting, part);
                    }
                    Duration::ZERO
                }
            };
            waiting = if left.is_zero() {
                self.to_take.wait(waiting).unwrap_or_else(PoisonError::into_inner)
            } else {
                let (waiting, _) = self
                    .to_take
                    .wait_timeout(waiting, left)
                    .unwrap_or_else(PoisonError::into_inner);
                waiting
            };
        }
    }

    fn whole(&self, mut waiting: MutexGuard<'_, Waiting<R, P>>) -> Taken<R, P> {
        let whole = std::mem::take(&mut waiting.staged);
        waiting.staged_rows = 0;
        waiting.staged_slots = 0;
        waiting.forced = false;
        drop(waiting);
        self.to_cut.notify_all();
        Taken::Whole(whole)
    }

    fn part(&self, mut waiting: MutexGuard<'_, Waiting<R, P>>, part: Prepared<R, P>) -> Taken<R, P> {
        for out in waiting.out.iter_mut().filter(|out| out.line == part.job.line) {
            out.taken |= out.large;
        }
        drop(waiting);
        self.to_cut.notify_all();
        Taken::Part(part)
    }
}

#[cfg(test)]
mod tests {
    use policy::{noise::NoiseKey, transform::RawObservation};
    use tokio::sync::oneshot;
    use wire::messages::Mode;

    use super::*;
    use crate::job::{Row, Ticket};

    /// A prepared row is the number of its request, which is the row's `chunk` here.
    type Numbers = Queue<u32>;

    fn row(number: u32) -> Row {
        Row {
            observation: RawObservation {
                images: BTreeMap::new(),
                state: Vec::new(),
                prompt: String::new(),
            },
            key: NoiseKey {
                seed: 0,
                env: 0,
                episode: 0,
                chunk: number,
            },
            mode: Mode::Eval,
            record: false,
            guidance: None,
        }
    }

    fn slot(number: u32) -> Job {
        Job::of_slot(Ticket::Chunk(number.into()), row(number))
    }

    fn request(client: u64, number: u32, rows: usize) -> Job {
        Job::of_client(client, vec![row(number); rows], oneshot::channel().0)
    }

    fn push(queue: &Numbers, job: Job) -> Result<(), JobError> {
        let mut displaced = Vec::new();
        let pushed = queue.push_client(job, &mut displaced);
        assert!(displaced.is_empty(), "{displaced:?}");
        pushed.map_err(|rejected| rejected.0)
    }

    fn prepared(cut: Cut<()>) -> (CutNumber, Prepared<u32, ()>) {
        let Cut { mut job, rows, number } = cut;
        let rows = job.rows.drain(..rows).map(|row| row.key.chunk).collect();
        (number, Prepared { job, rows })
    }

    /// Stages all that can be staged now.
    fn prepare(queue: &Numbers) {
        while can_cut(queue) {
            let (number, prepared) = prepared(queue.cut(1).expect("something to cut"));
            queue.stage(number, prepared);
        }
    }

    /// Whether [`Queue::cut`] would return without waiting.
    fn can_cut(queue: &Numbers) -> bool {
        let waiting = queue.lock();
        let room = queue.max_rows - waiting.staged_rows;
        let whole = waiting.turns.iter().filter_map(|line| waiting.front(*line));
        let mut whole = whole.filter(|job| job.progress.is_none() && job.rows.len() <= room);
        let ahead = waiting.out.iter().any(|out| out.large && !out.taken);
        whole.next().is_some() || (!ahead && waiting.next_large(queue.max_rows).is_some())
    }

    fn numbers(jobs: &[Job]) -> Vec<u32> {
        jobs.iter()
            .filter_map(|job| Some(job.rows.front()?.key.chunk))
            .collect()
    }

    /// Numbers of the next batch, which holds whole jobs.
    fn whole(queue: &Numbers, deadline: Duration) -> Vec<u32> {
        prepare(queue);
        match queue.take(deadline) {
            Taken::Whole(jobs) => jobs.iter().filter_map(|job| job.rows.first().copied()).collect(),
            other => panic!("expected whole jobs, got {other:?}"),
        }
    }

    /// Takes a part of a large job and gives the rest back.
    fn part(queue: &Numbers) -> (u64, usize) {
        prepare(queue);
        match queue.take(Duration::ZERO) {
            Taken::Part(Prepared { mut job, rows }) => {
                let line = job.line;
                job.progress = Some(());
                if job.rows.is_empty() {
                    queue.finished(line);
                } else {
                    queue.put_back(job).expect("open");
                }
                (line, rows.len())
            }
            other => panic!("expected a part, got {other:?}"),
        }
    }

    #[test]
    fn a_full_batch_does_not_wait() {
        let queue: Numbers = Queue::new(8, 2);
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
        let queue: Numbers = Queue::new(8, 4);
        queue.push_slots(vec![slot(1)]);
        let begun = Instant::now();
        assert_eq!(whole(&queue, Duration::from_millis(20)), [1]);
        // the job was queued a moment before `begun`
        assert!(begun.elapsed() >= Duration::from_millis(15), "{:?}", begun.elapsed());
    }

    #[test]
    fn overload_is_rejected_and_nothing_is_lost() {
        let queue: Numbers = Queue::new(3, 9);
        assert!(push(&queue, request(1, 1, 2)).is_ok());
        assert!(matches!(
            push(&queue, request(1, 2, 2)),
            Err(JobError::Overloaded {
                waiting: 2,
                capacity: 3
            })
        ));
        assert!(matches!(
            push(&queue, request(1, 3, 4)),
            Err(JobError::Size { rows: 4, capacity: 3 })
        ));
        assert!(push(&queue, request(1, 4, 1)).is_ok());
        assert!(queue.close().is_empty());
        assert!(matches!(push(&queue, request(1, 5, 1)), Err(JobError::Closed)));
        assert_eq!(whole(&queue, Duration::ZERO), [1, 4], "what waited is served");
        assert!(queue.cut(1).is_none());
        assert!(matches!(queue.take(Duration::ZERO), Taken::Closed));
    }

    #[test]
    fn a_batch_takes_clients_and_slots_in_turn() {
        let queue: Numbers = Queue::new(99, 5);
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
        let queue: Numbers = Queue::new(99, 4);
        push(&queue, request(1, 1, 3)).expect("room");
        push(&queue, request(2, 2, 2)).expect("room");
        push(&queue, request(2, 3, 2)).expect("room");
        assert_eq!(whole(&queue, Duration::ZERO), [1]);
        assert_eq!(whole(&queue, Duration::ZERO), [2, 3]);
    }

    #[test]
    fn large_jobs_are_answered_in_parts_and_give_way() {
        let queue: Numbers = Queue::new(99, 4);
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
        let queue: Numbers = Queue::new(99, 4);
        let long_ago = Instant::now().checked_sub(2 * LARGE_WAIT).expect("2 s after boot");
        for client in [1, 2] {
            let mut large = request(client.into(), client, 10);
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
        let queue: Numbers = Queue::new(10, 4);
        push(&queue, request(1, 1, 3)).expect("room");
        push(&queue, request(1, 2, 5)).expect("room");
        push(&queue, request(2, 3, 2)).expect("room");
        let mut displaced = Vec::new();
        queue.push_client(request(3, 4, 1), &mut displaced).expect("a share");
        assert_eq!(numbers(&displaced), [2], "its newest job");
        displaced.clear();
        // with 5 rows it would have more than any other
        let rejected = queue
            .push_client(request(3, 5, 5), &mut displaced)
            .expect_err("no share");
        assert!(rejected.0.retry() && displaced.is_empty(), "{displaced:?}");
    }

    #[test]
    fn what_a_client_left_behind_is_not_answered() {
        let queue: Numbers = Queue::new(99, 4);
        push(&queue, request(1, 1, 1)).expect("room");
        push(&queue, request(2, 2, 10)).expect("room");
        push(&queue, request(3, 3, 1)).expect("room");
        assert_eq!(numbers(&queue.remove_client(1)), [1]);
        assert_eq!(whole(&queue, Duration::ZERO), [3]);
        let Taken::Part(Prepared { job, .. }) = queue.take(Duration::ZERO) else {
            panic!("a part")
        };
        assert!(queue.remove_client(2).is_empty(), "its job is out for a part");
        queue.put_back(job).expect("dropped in silence");
        assert_eq!(queue.rows(), 0);
    }

    #[test]
    fn a_client_that_leaves_takes_its_prepared_jobs_along() {
        let queue: Numbers = Queue::new(99, 4);
        push(&queue, request(1, 1, 1)).expect("room");
        push(&queue, request(2, 2, 2)).expect("room");
        push(&queue, request(3, 3, 10)).expect("room");
        prepare(&queue);
        push(&queue, request(1, 4, 1)).expect("room");
        let (number, late) = prepared(queue.cut(1).expect("the batch has room"));
        assert_eq!(queue.remove_client(1).len(), 1, "the one that was staged");
        queue.stage(number, late);
        assert_eq!(queue.remove_client(3).len(), 1, "the part that was staged");
        assert_eq!(whole(&queue, Duration::ZERO), [2]);
        assert_eq!(queue.rows(), 0);
    }

    #[test]
    fn what_came_within_the_deadline_is_waited_for() {
        let queue: Numbers = Queue::new(99, 4);
        push(&queue, request(1, 1, 1)).expect("room");
        prepare(&queue);
        let soon = request(2, 2, 1);
        let first = queue.lock().staged[0].job.queued;
        push(&queue, soon).expect("room");
        assert!(queue.lock().more_is_coming(first + Duration::from_mins(1), 3));
        let (number, second) = prepared(queue.cut(1).expect("the batch has room"));
        assert!(
            queue.lock().more_is_coming(first + Duration::from_mins(1), 3),
            "it is being prepared"
        );
        let long_ago = first.checked_sub(Duration::from_secs(1)).expect("1 s after boot");
        assert!(!queue.lock().more_is_coming(long_ago, 3), "it came later");
        queue.stage(number, second);
        assert!(!queue.lock().more_is_coming(first + Duration::from_mins(1), 2));
        assert_eq!(whole(&queue, Duration::ZERO), [1, 2]);
    }

    #[test]
    fn no_more_than_a_batch_is_prepared_ahead() {
        let queue: Numbers = Queue::new(99, 4);
        for number in 1..=6 {
            push(&queue, request(number.into(), number, 1)).expect("room");
        }
        prepare(&queue);
        assert_eq!(queue.lock().staged_rows, 4);
        assert_eq!(queue.rows(), 6);
        assert_eq!(whole(&queue, Duration::from_mins(1)), [1, 2, 3, 4]);
        assert_eq!(whole(&queue, Duration::ZERO), [5, 6]);
    }

    #[test]
    fn closing_returns_large_jobs_and_drains_the_others() {
        let queue: Numbers = Queue::new(99, 4);
        push(&queue, request(1, 1, 1)).expect("room");
        push(&queue, request(1, 2, 10)).expect("room");
        push(&queue, request(2, 3, 10)).expect("room");
        assert_eq!(numbers(&queue.close()), [2, 3]);
        assert_eq!(whole(&queue, Duration::from_mins(1)), [1]);
        assert!(queue.cut(1).is_none());
        assert!(matches!(queue.take(Duration::from_mins(1)), Taken::Closed));
    }
}
