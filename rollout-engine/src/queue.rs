//! The queue before the device: bounded, fair between clients, one batch prepared ahead.
//!
//! Slots of env workers share one line, every client has a line of its own; jobs are cut from the lines in turn. A job with more
//! rows than a batch is answered in parts, and batches of other jobs run between two parts. While other clients send requests, a
//! part has as few rows as possible.
//!
//! A job passes through three stages. The job waits in a line in the order of arrival ([`Queue::push_client`]). A preparing thread
//! cuts the job from the line ([`Queue::cut`]) and stages the prepared rows ([`Queue::stage`]). The device's thread takes staged
//! jobs ([`Queue::take`]). At most one batch is staged, and jobs that arrive while the device runs still join the next batch.

use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Condvar, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

use crate::job::{Job, JobError, SLOTS};

/// Maximum bytes of waiting observations, over all clients.
const MAX_BYTES: usize = 1 << 30;
/// Time after a client's request during which parts of large jobs are as small as possible.
const RECENT: Duration = Duration::from_secs(1);
/// Longest wait of a large job for its next part, independent of the number of small jobs.
const LARGE_WAIT: Duration = Duration::from_secs(1);
/// Maximum number of unfinished large jobs, over all clients; the parts that are answered take memory.
const MAX_BEGUN: usize = 4;
/// Staged jobs that wait for a job in preparation are looked at again after this time.
const RECHECK: Duration = Duration::from_millis(10);
/// Time for which waiting jobs are still answered after the queue was closed.
const DRAIN: Duration = Duration::from_secs(4);

/// Returns whether a job is answered in parts.
fn is_large<P>(job: &Job<P>, max_rows: usize) -> bool {
    job.rows.len() > max_rows || job.progress.is_some()
}

/// A job to prepare.
#[derive(Debug)]
pub struct Cut<P> {
    /// The job.
    pub job: Job<P>,
    /// Number of rows to prepare, from the first: all, or a part of a large job.
    pub rows: usize,
    /// Number to pass to [`Queue::stage`].
    pub number: CutNumber,
}

/// Number of a cut.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CutNumber(u64);

/// A job with prepared rows `R`; rows that are not prepared yet are still in the job.
#[derive(Debug)]
pub struct Prepared<R, P> {
    /// The job.
    pub job: Job<P>,
    /// The prepared rows of the job.
    pub rows: Vec<R>,
}

/// Next work of the device's thread.
#[derive(Debug)]
pub enum Taken<R, P> {
    /// Run these whole jobs; their rows fit one batch.
    Whole(Vec<Prepared<R, P>>),
    /// Run a part of a large job, then call [`Queue::put_back`] or [`Queue::finished`].
    Part(Prepared<R, P>),
    /// Check for work outside the queue: [`Queue::wake`] was called.
    Woken,
    /// The queue is closed and empty.
    Closed,
}

#[derive(Debug)]
struct Line<P> {
    jobs: VecDeque<Job<P>>,
    rows: usize,
    bytes: usize,
    /// When the large job at the front had its last part.
    part: Instant,
}

/// A job outside the lines: either in preparation, or a large job that was not put back yet.
struct Out {
    number: u64,
    line: u64,
    /// Rows to prepare.
    rows: usize,
    /// When the job was queued; for a large job, when the job had its last part.
    since: Instant,
    large: bool,
    /// Whether the device's thread has the job.
    taken: bool,
}

struct Waiting<R, P> {
    lines: BTreeMap<u64, Line<P>>,
    /// Lines with jobs, next line first.
    turns: VecDeque<u64>,
    /// Waiting rows of clients.
    client_rows: usize,
    client_bytes: usize,
    slot_rows: usize,
    /// Jobs in preparation or on the device; jobs of disconnected clients are removed.
    out: Vec<Out>,
    /// Number of the last cut.
    cuts: u64,
    /// Prepared whole jobs.
    staged: Vec<Prepared<R, P>>,
    staged_rows: usize,
    /// Rows of slots in the batch that is being staged.
    staged_slots: usize,
    /// A prepared part of a large job, and when the job had its previous part.
    staged_part: Option<(Prepared<R, P>, Instant)>,
    /// When a client last requested at most as many rows as a batch has.
    recent: Option<Instant>,
    /// Whether the last batch was a part although whole jobs waited; whole jobs are next then.
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

    /// Removes the first job of a line, or the last.
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

    /// Moves a line to the end of the turns.
    fn had_its_turn(&mut self, line: u64) {
        if let Some(place) = self.turns.iter().position(|turn| *turn == line) {
            self.turns.remove(place);
            self.turns.push_back(line);
        }
    }

    fn front(&self, line: u64) -> Option<&Job<P>> {
        self.lines.get(&line)?.jobs.front()
    }

    /// Removes a job of at most `room` rows: of the slots while the slots have fewer than `quota` rows staged, otherwise of the
    /// next line.
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

    /// Returns the line with the large job whose last part is longest ago. With [`MAX_BEGUN`] unfinished jobs, only these are
    /// considered.
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

    /// Records a job that was cut from a line: all rows, or the first `rows` of a large job.
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

    /// Cuts the next job to prepare from its line, if there is one; see [`Queue::cut`].
    fn next_cut(&mut self, max_rows: usize, least: usize) -> Option<Cut<P>> {
        let preparing: usize = self.preparing().map(|out| out.rows).sum();
        let room = max_rows.saturating_sub(self.staged_rows + preparing);
        // half of a batch is reserved for slots with enough rows, because the numbers of workers and of clients differ
        if let Some(job) = self.next_whole(room, max_rows.div_ceil(2)) {
            if job.line == SLOTS {
                self.staged_slots += job.rows.len();
            }
            let (rows, queued) = (job.rows.len(), job.queued);
            return Some(self.cut(job, rows, queued, false));
        }
        // one part is prepared while another part runs
        let ahead = self.out.iter().any(|out| out.large && !out.taken);
        if !ahead
            && let Some((line, since)) = self.next_large(max_rows)
            && let Some(job) = self.pop(line, true)
        {
            let recent = self.recent.is_some_and(|recent| recent.elapsed() < RECENT);
            let most = if recent { least.clamp(1, max_rows) } else { max_rows };
            let rows = most.min(job.rows.len());
            return Some(self.cut(job, rows, since, true));
        }
        None
    }

    /// Returns the whole jobs in preparation for the next batch.
    fn preparing(&self) -> impl Iterator<Item = &Out> {
        self.out.iter().filter(|out| !out.large)
    }

    /// Removes the record of a line's large job on the device; returns whether the client is still connected.
    fn returned(&mut self, line: u64) -> bool {
        let before = self.out.len();
        self.out.retain(|out| !(out.large && out.taken && out.line == line));
        self.out.len() < before
    }

    /// Returns whether a whole job of at most `room` rows, queued no later than `last`, is in preparation or still waiting.
    fn more_is_coming(&self, last: Instant, room: usize) -> bool {
        let waiting = self.turns.iter().filter_map(|line| self.front(*line));
        self.preparing().any(|out| out.since <= last)
            || waiting
                .filter(|job| job.progress.is_none() && job.rows.len() <= room)
                .any(|job| job.queued <= last)
    }
}

/// A bounded queue. Rows of clients are limited by the capacity. In a full queue the client with the most rows makes room for a
/// client with fewer rows: the newest job of the former is displaced. Rows of slots are limited by the number of slots, because a
/// slot has one question at a time; these rows are therefore always accepted.
pub struct Queue<R, P = ()> {
    waiting: Mutex<Waiting<R, P>>,
    /// Notifies the preparing threads.
    to_cut: Condvar,
    /// Notifies the device's thread.
    to_take: Condvar,
    capacity: usize,
    /// Most rows of a batch.
    max_rows: AtomicUsize,
}

impl<R, P> Queue<R, P> {
    /// Creates an empty queue for `capacity` rows of clients, with batches of at most `max_rows`.
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
            max_rows: AtomicUsize::new(max_rows.max(1)),
        }
    }

    fn lock(&self) -> MutexGuard<'_, Waiting<R, P>> {
        // no step between two changes of the state can panic
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Sets the most rows of a batch, for instance to the batch size of a new version's graphs.
    pub fn limit_rows(&self, max_rows: usize) {
        self.max_rows.store(max_rows.max(1), Ordering::Relaxed);
    }

    fn max_rows(&self) -> usize {
        self.max_rows.load(Ordering::Relaxed)
    }

    /// Returns the number of rows that wait for the device.
    pub fn rows(&self) -> usize {
        let waiting = self.lock();
        let preparing: usize = waiting.preparing().map(|out| out.rows).sum();
        let part = waiting.staged_part.as_ref().map_or(0, |(part, _)| part.rows.len());
        waiting.client_rows + waiting.slot_rows + preparing + waiting.staged_rows + part
    }

    /// Queues a client's job. Displaced jobs of other clients are added to `displaced`.
    ///
    /// # Errors
    /// The queue is full, the job has no rows or more than the capacity, or the queue is closed; the error returns the job.
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
        // the share of a line is in rows, or in bytes where bytes are the scarce resource
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
        if rows <= self.max_rows() {
            waiting.recent = Some(job.queued);
        }
        waiting.push(job, false);
        drop(waiting);
        self.to_cut.notify_one();
        Ok(())
    }

    /// Queues jobs of slots. After [`Queue::close`] the jobs are dropped.
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

    /// Blocks until there is a job to prepare. A whole job is returned while the next batch has room, a part of a large job while no
    /// part is staged. A part has the rows of a batch, or `least` while other clients send requests. Returns `None` when the queue
    /// is closed and empty.
    pub fn cut(&self, least: usize) -> Option<Cut<P>> {
        let mut waiting = self.lock();
        loop {
            if let Some(cut) = waiting.next_cut(self.max_rows(), least) {
                return Some(cut);
            }
            if let Some(closed) = waiting.closed
                && (waiting.turns.is_empty() || closed.elapsed() > DRAIN)
            {
                return None;
            }
            waiting = self.to_cut.wait(waiting).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Stages a prepared job for the device. The job of a client that disconnected meanwhile is dropped.
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

    /// Removes the record of a cut whose job cannot be prepared.
    pub fn give_up(&self, number: CutNumber) {
        self.lock().out.retain(|out| out.number != number.0);
        self.to_cut.notify_one();
        self.to_take.notify_one();
    }

    /// Queues a large job again after one of its parts was answered. The job of a disconnected client is dropped.
    ///
    /// # Errors
    /// The queue was closed meanwhile; the error returns the job.
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

    /// Records that the large job of a line, of which a part was taken, does not return to the queue.
    pub fn finished(&self, line: u64) {
        self.lock().returned(line);
        self.to_cut.notify_one();
    }

    /// Removes the jobs of a disconnected client.
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
        // the device's thread may have waited for one of these jobs to be prepared
        self.to_take.notify_one();
        removed
    }

    /// Closes the queue for new jobs and returns the large jobs, which are not started or finished any more. Other jobs are still
    /// handed out for 4 s.
    pub fn close(&self) -> Vec<Job<P>> {
        let mut waiting = self.lock();
        waiting.closed = Some(Instant::now());
        let (mut large, mut small) = (Vec::new(), Vec::new());
        for line in waiting.turns.clone() {
            while let Some(job) = waiting.pop(line, true) {
                if is_large(&job, self.max_rows()) {
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

    /// Removes all remaining jobs.
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
        drop(waiting);
        self.to_cut.notify_all();
        self.to_take.notify_all();
        jobs
    }

    /// Makes [`Queue::take`] return [`Taken::Woken`].
    pub fn wake(&self) {
        self.lock().woken = true;
        self.to_take.notify_one();
    }

    /// Blocks until there is work for the device's thread. Whole jobs are returned when they fill a batch, or when the oldest has
    /// waited for `deadline` and all jobs that arrived within that time are prepared. A part of a large job is returned when there
    /// are no whole jobs.
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
            let left = if let Some(oldest) = waiting.staged.iter().map(|prepared| prepared.job.queued).min() {
                // a large job leaves no time to wait for other jobs: these arrive while the next part runs
                let hurry = waiting.staged_part.is_some() || waiting.closed.is_some();
                let left = if hurry {
                    Duration::ZERO
                } else {
                    deadline.saturating_sub(oldest.elapsed())
                };
                let room = self.max_rows().saturating_sub(waiting.staged_rows);
                if room == 0 || (left.is_zero() && !waiting.more_is_coming(oldest + deadline, room)) {
                    return self.whole(waiting);
                }
                // a job that is waited for may be displaced instead of prepared
                if left.is_zero() { RECHECK } else { left }
            } else {
                // whole jobs that are being prepared come first
                if !waiting.more_is_coming(Instant::now(), self.max_rows())
                    && let Some((part, _)) = waiting.staged_part.take()
                {
                    waiting.forced = false;
                    return self.part(waiting, part);
                }
                Duration::ZERO
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
mod tests;
