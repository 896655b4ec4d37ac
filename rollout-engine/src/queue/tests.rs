use std::thread;

use policy::{noise::NoiseKey, transform::RawObservation};
use tokio::sync::oneshot;
use wire::messages::Mode;

use super::*;
use crate::job::{Row, Ticket};

/// A queue whose prepared row is the number of the request, here the row's `chunk`.
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

/// Stages all jobs that can be staged now.
fn prepare(queue: &Numbers) {
    while can_cut(queue) {
        let (number, prepared) = prepared(queue.cut(1).expect("something to cut"));
        queue.stage(number, prepared);
    }
}

/// Returns whether [`Queue::cut`] would return without waiting.
fn can_cut(queue: &Numbers) -> bool {
    let waiting = queue.lock();
    let room = queue.max_rows() - waiting.staged_rows;
    let whole = waiting.turns.iter().filter_map(|line| waiting.front(*line));
    let mut whole = whole.filter(|job| job.progress.is_none() && job.rows.len() <= room);
    let ahead = waiting.out.iter().any(|out| out.large && !out.taken);
    whole.next().is_some() || (!ahead && waiting.next_large(queue.max_rows()).is_some())
}

fn numbers(jobs: &[Job]) -> Vec<u32> {
    jobs.iter()
        .filter_map(|job| Some(job.rows.front()?.key.chunk))
        .collect()
}

/// Returns the numbers of the next batch, which has whole jobs.
fn whole(queue: &Numbers, deadline: Duration) -> Vec<u32> {
    prepare(queue);
    match queue.take(deadline) {
        Taken::Whole(jobs) => jobs.iter().filter_map(|job| job.rows.first().copied()).collect(),
        other => panic!("expected whole jobs, got {other:?}"),
    }
}

/// Takes a part of a large job and puts the rest back.
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
    // with 5 rows the client would have more rows than any other
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
    queue.put_back(job).expect("dropped without an error");
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

#[test]
fn a_job_whose_client_leaves_during_its_preparation_delays_nobody() {
    let queue: Numbers = Queue::new(99, 4);
    push(&queue, request(1, 1, 1)).expect("room");
    prepare(&queue);
    push(&queue, request(2, 2, 1)).expect("room");
    let (number, second) = prepared(queue.cut(1).expect("the batch has room"));
    let deadline = Duration::from_millis(1);
    thread::scope(|scope| {
        // both came within the deadline, so the device's thread waits for the second
        let device = scope.spawn(|| queue.take(deadline));
        assert!(queue.remove_client(2).is_empty(), "its job is being prepared");
        let Taken::Whole(jobs) = device.join().expect("the device's thread") else {
            panic!("expected whole jobs")
        };
        assert_eq!(jobs.len(), 1);
    });
    queue.stage(number, second);
    assert_eq!(queue.rows(), 0, "the job of a client that left is dropped");
}
