//! Rules of the assignment, on hand-made events.

use wire::{array::Array, messages::Batch};

use super::*;

const SHAPE: Shape = Shape {
    action_chunk: 2,
    env_action_dim: 1,
    critic: true,
    bootstrap_terminated: false,
};

fn reset(env: u32) -> Reset {
    Reset {
        seed: 7,
        env,
        episode: 0,
        reset_state: None,
        task: None,
        group: None,
        video: false,
    }
}

fn batch(oldest: u64, newest: u64, mode: Mode, envs: &[u32]) -> Batch {
    Batch {
        oldest,
        newest,
        mode,
        resets: envs.iter().map(|e| reset(*e)).collect(),
    }
}

fn order(number: u64, version: u64, mode: Mode, envs: &[u32]) -> Order {
    Order {
        order: number,
        replaces: true,
        batches: vec![batch(version, version, mode, envs)],
    }
}

fn hello(slots: u32) -> Hello {
    Hello {
        client: "w0".to_owned(),
        env: "toy".to_owned(),
        action_dim: 1,
        slots,
    }
}

#[expect(clippy::unnecessary_wraps, reason = "the shape that a report has")]
fn seen() -> Option<Observation> {
    Some(Observation {
        images: Vec::new(),
        state: vec![0.0],
        prompt: "go".to_owned(),
    })
}

fn idle(slots: u32) -> Vec<SlotReport> {
    (0..slots)
        .map(|slot| SlotReport {
            slot,
            outcome: None,
            observation: None,
        })
        .collect()
}

#[expect(clippy::unnecessary_wraps, reason = "the shape that a report has")]
fn outcome(terminated: bool, truncated: bool) -> Option<Outcome> {
    Some(Outcome {
        rewards: vec![0.5, 1.0],
        terminated,
        truncated,
        success: terminated,
        frames: Vec::new(),
    })
}

fn actions() -> ActedRow {
    ActedRow {
        actions: Array::f32(&[2, 1], &[0.0, 0.0]),
        record: None,
    }
}

/// Returns an assignment with version 0 live and a worker `1` that has `slots` idle slots.
fn ready(slots: u32) -> Assign<u8> {
    let mut assign = Assign::new("e".to_owned());
    assign.went_live(0, SHAPE);
    assign.hello(1, &hello(slots)).expect("fits");
    assign.reports(&1, idle(slots));
    assign
}

fn resets(effects: &Effects<u8>, peer: u8) -> Vec<u32> {
    effects
        .commands
        .get(&peer)
        .into_iter()
        .flatten()
        .filter_map(|c| {
            if let Command::Reset(r) = &c.command {
                Some(r.env)
            } else {
                None
            }
        })
        .collect()
}

fn ticket(question: &Question) -> u64 {
    question.ticket.number()
}

/// Sends a report of slot 0.
fn report(assign: &mut Assign<u8>, outcome: Option<Outcome>, observation: Option<Observation>) {
    assign.reports(
        &1,
        vec![SlotReport {
            slot: 0,
            outcome,
            observation,
        }],
    );
}

/// Moves slot 0 from its reset to the execution of its first chunk.
fn act_once(assign: &mut Assign<u8>) {
    report(assign, None, seen());
    let question = assign.take_effects().questions.pop().expect("a question");
    assign.acted(ticket(&question), 0, actions());
    assert_eq!(assign.take_effects().commands[&1].len(), 1);
}

#[test]
fn episodes_are_parked_until_their_version_is_live() {
    let mut assign = ready(2);
    assign.take_order(order(1, 3, Mode::Train, &[4, 5, 6]));
    assert!(assign.take_effects().commands.is_empty());
    assert!(assign.parked());
    assign.went_live(3, SHAPE);
    assert_eq!(resets(&assign.take_effects(), 1), [4, 5]);
    assert!(!assign.parked());
    assert_eq!(assign.pending(), 1);
}

#[test]
fn a_terminated_episode_is_a_trajectory_and_frees_its_slot() {
    let mut assign = ready(1);
    assign.take_order(order(1, 0, Mode::Eval, &[4, 5]));
    assign.take_effects();
    act_once(&mut assign);
    report(&mut assign, outcome(false, false), seen());
    let question = assign.take_effects().questions.pop().expect("the next chunk");
    assert_eq!(
        question.row.key,
        NoiseKey {
            seed: 7,
            env: 4,
            episode: 0,
            chunk: 1
        }
    );
    assign.acted(ticket(&question), 0, actions());
    assign.take_effects();
    report(&mut assign, outcome(true, false), None);
    let effects = assign.take_effects();
    let [trajectory] = effects.trajectories.as_slice() else {
        panic!("one trajectory")
    };
    assert_eq!(
        (trajectory.order, trajectory.reset.env, trajectory.chunks.len()),
        (1, 4, 2)
    );
    assert!(trajectory.terminated && trajectory.success && trajectory.final_value.is_none());
    assert_eq!(trajectory.prompt, "go");
    assert_eq!(resets(&effects, 1), [5]);
}

#[test]
fn a_truncated_episode_waits_for_the_value_of_its_last_observation() {
    let mut assign = ready(1);
    assign.take_order(order(1, 0, Mode::Train, &[4]));
    assign.take_effects();
    act_once(&mut assign);
    report(&mut assign, outcome(false, true), seen());
    let mut effects = assign.take_effects();
    assert!(effects.trajectories.is_empty());
    let question = effects.questions.pop().expect("the value is asked for");
    assert!(matches!(question.ticket, Ticket::Bootstrap(_)));
    assert_eq!(question.row.key.chunk, 1, "the number of the next chunk");
    assign.bootstrapped(ticket(&question), Some(0.25));
    let trajectory = assign.take_effects().trajectories.pop().expect("finished");
    assert_eq!((trajectory.final_value, trajectory.terminated), (Some(0.25), false));
}

#[test]
fn a_terminated_episode_is_valued_only_where_that_is_wanted() {
    for wanted in [false, true] {
        let mut assign = ready(1);
        assign.went_live(
            0,
            Shape {
                bootstrap_terminated: wanted,
                ..SHAPE
            },
        );
        assign.take_order(order(1, 0, Mode::Train, &[4]));
        assign.take_effects();
        act_once(&mut assign);
        report(&mut assign, outcome(true, false), seen());
        let mut effects = assign.take_effects();
        if wanted {
            assert!(effects.trajectories.is_empty());
            let question = effects.questions.pop().expect("the value is asked for");
            assign.bootstrapped(ticket(&question), Some(0.25));
            effects = assign.take_effects();
        }
        let trajectory = effects.trajectories.pop().expect("finished");
        assert!(trajectory.terminated && trajectory.success);
        assert_eq!(trajectory.final_value, wanted.then_some(0.25));
    }
}

#[test]
fn episodes_of_a_lost_worker_begin_anew() {
    let mut assign = ready(2);
    assign.take_order(order(1, 0, Mode::Train, &[4, 5, 6]));
    assign.take_effects();
    act_once(&mut assign);
    // the same client on another connection, and the late answer to the first connection
    assign.hello(2, &hello(2)).expect("fits");
    assign.reports(&2, idle(2));
    assert_eq!(resets(&assign.take_effects(), 2), [4, 5]);
    assert_eq!((assign.restarted(), assign.slots()), (2, 2));
    report(&mut assign, outcome(true, false), None);
    let effects = assign.take_effects();
    assert!(effects.trajectories.is_empty());
    assert_eq!(effects.refusals.len(), 1);
    assign.gone(&2);
    assert_eq!(assign.pending(), 3);
}

#[test]
fn an_episode_is_made_by_one_version() {
    let mut assign = ready(1);
    assign.take_order(order(1, 0, Mode::Train, &[4]));
    assign.take_effects();
    act_once(&mut assign);
    report(&mut assign, outcome(false, false), seen());
    let question = assign.take_effects().questions.pop().expect("a question");
    assign.went_live(1, SHAPE);
    assign.acted(ticket(&question), 1, actions());
    assert!(assign.take_effects().commands.is_empty() && assign.parked());
    assign.went_live(0, SHAPE);
    assert_eq!(resets(&assign.take_effects(), 1), [4]);
}

#[test]
fn episodes_wait_for_exactly_their_version() {
    // a learner that resumes from a checkpoint orders an older version than the live one of the earlier learner
    let mut assign = ready(1);
    assign.went_live(45, SHAPE);
    assign.take_order(order(1, 40, Mode::Train, &[4]));
    assert!(assign.take_effects().commands.is_empty());
    assign.went_live(40, SHAPE);
    assert_eq!(resets(&assign.take_effects(), 1), [4]);
}

/// Returns an order of two batches: environment 4 from versions 0 to 1, environments 5 and 6 from versions 1 to 2.
fn window(number: u64) -> Order {
    Order {
        order: number,
        replaces: true,
        batches: vec![batch(0, 1, Mode::Train, &[4]), batch(1, 2, Mode::Train, &[5, 6])],
    }
}

fn next_observation(assign: &mut Assign<u8>) -> Question {
    report(assign, outcome(false, false), seen());
    assign.take_effects().questions.pop().expect("a question")
}

/// Returns the policy's answer, with a record of `version`.
fn recorded(version: u64) -> ActedRow {
    let empty = || Array::f32(&[0], &[]);
    let record = ChunkRecord {
        key: NoiseKey {
            seed: 7,
            env: 4,
            episode: 0,
            chunk: 0,
        },
        version,
        images: Array::u8(&[0], Vec::new()),
        image_mask: Vec::new(),
        prompt: Vec::new(),
        prompt_mask: Vec::new(),
        state: empty(),
        denoise_steps: Vec::new(),
        chain: empty(),
        logprob: None,
        values: Vec::new(),
    };
    ActedRow {
        record: Some(Box::new(record)),
        ..actions()
    }
}

#[test]
fn an_episode_goes_on_across_versions_that_may_make_it_and_each_chunk_keeps_its_own() {
    let mut assign = ready(1);
    assign.take_order(window(1));
    assert_eq!(resets(&assign.take_effects(), 1), [4]);
    report(&mut assign, None, seen());
    let mut question = assign.take_effects().questions.pop().expect("a question");
    for version in [0, 1] {
        // the version goes live while the policy computes the answer
        assign.went_live(version, SHAPE);
        assign.acted(ticket(&question), version, recorded(version));
        assert_eq!(assign.take_effects().commands[&1].len(), 1, "the episode continues");
        if version == 0 {
            question = next_observation(&mut assign);
        }
    }
    report(&mut assign, outcome(true, false), None);
    let effects = assign.take_effects();
    let chunks = &effects.trajectories[0].chunks;
    let versions: Vec<u64> = chunks
        .iter()
        .filter_map(|c| c.record.as_ref())
        .map(|r| r.version)
        .collect();
    assert_eq!(versions, [0, 1]);
    assert_eq!((assign.restarted(), resets(&effects, 1)), (0, vec![5]));
}

#[test]
fn an_episode_that_meets_a_version_beyond_its_bound_begins_anew() {
    let mut assign = ready(1);
    assign.take_order(window(1));
    assign.take_effects();
    act_once(&mut assign);
    let question = next_observation(&mut assign);
    assign.went_live(2, SHAPE);
    assign.acted(ticket(&question), 2, recorded(2));
    // version 2 may not sample environment 4, but may sample 5 and 6
    assert_eq!(resets(&assign.take_effects(), 1), [5]);
    assert_eq!((assign.restarted(), assign.pending()), (1, 2));
}

#[test]
fn resets_are_handed_out_within_the_bound_and_parked_beyond_it() {
    let mut assign = ready(4);
    assign.take_order(window(1));
    // version 0 may start the first batch only; an idle second slot does not block the first
    assert_eq!(resets(&assign.take_effects(), 1), [4]);
    assert!(assign.parked());
    assign.went_live(1, SHAPE);
    assert_eq!(resets(&assign.take_effects(), 1), [5, 6]);
    assert!(!assign.parked());
    // an evaluation of a version that is not live does not block training
    assign.take_order(Order {
        order: 2,
        replaces: true,
        batches: vec![batch(2, 2, Mode::Eval, &[8]), batch(1, 2, Mode::Train, &[5, 6, 7])],
    });
    assert_eq!(resets(&assign.take_effects(), 1), [7]);
    assert!(assign.parked(), "the evaluation waits for its version");
}

#[test]
fn an_order_that_adds_keeps_what_is_pending_and_running() {
    let mut assign = ready(1);
    assign.take_order(order(1, 0, Mode::Train, &[4, 5]));
    assert_eq!(resets(&assign.take_effects(), 1), [4]);
    let mut more = order(2, 0, Mode::Train, &[6]);
    more.batches.push(batch(0, 0, Mode::Eval, &[8, 9]));
    more.replaces = false;
    assign.take_order(more);
    assert_eq!(assign.pending(), 4);
    // the running episode is ordered again, and restarts after an interruption
    assign.reports(&1, idle(1));
    assert_eq!(resets(&assign.take_effects(), 1), [4]);
    let mut begun = Vec::new();
    for _ in 0..4 {
        act_once(&mut assign);
        report(&mut assign, outcome(true, false), None);
        let effects = assign.take_effects();
        assert_eq!(effects.trajectories.len(), 1);
        begun.extend(resets(&effects, 1));
    }
    assert_eq!(begun, [8, 9, 5, 6], "evaluations first");
}

#[test]
fn a_new_order_keeps_only_the_running_episodes_that_it_allows() {
    for (oldest, newest, goes_on) in [(0, 2, true), (1, 2, false)] {
        let mut assign = ready(1);
        assign.take_order(window(1));
        assign.take_effects();
        act_once(&mut assign);
        assign.take_order(Order {
            order: 2,
            replaces: true,
            batches: vec![batch(oldest, newest, Mode::Train, &[4])],
        });
        // its first chunk is of version 0
        assert_eq!(assign.pending(), usize::from(!goes_on), "versions {oldest} to {newest}");
    }
}

#[test]
fn weights_replaced_under_the_same_number_begin_every_episode_anew() {
    let mut assign = ready(1);
    assign.take_order(order(1, 0, Mode::Train, &[4]));
    assign.take_effects();
    act_once(&mut assign);
    assign.retire();
    report(&mut assign, outcome(true, false), None);
    let effects = assign.take_effects();
    assert!(effects.trajectories.is_empty() && effects.commands.is_empty());
    assign.went_live(0, SHAPE);
    assert_eq!(resets(&assign.take_effects(), 1), [4]);
}

#[test]
fn a_running_episode_goes_on_for_a_new_order_that_wants_it() {
    let mut assign = ready(1);
    assign.take_order(order(1, 0, Mode::Train, &[4, 5]));
    assign.take_effects();
    act_once(&mut assign);
    assign.take_order(order(2, 0, Mode::Train, &[4, 6]));
    assert_eq!(assign.pending(), 1, "environment 4 is not started twice");
    report(&mut assign, outcome(true, false), None);
    let effects = assign.take_effects();
    assert_eq!(
        (effects.trajectories[0].order, effects.trajectories[0].reset.env),
        (2, 4)
    );
    assert_eq!(resets(&effects, 1), [6]);
}

#[test]
fn a_new_order_replaces_what_is_pending_and_a_repeated_one_changes_nothing() {
    let mut assign = ready(1);
    assign.take_order(order(1, 0, Mode::Train, &[4, 5]));
    assert_eq!(resets(&assign.take_effects(), 1), [4]);
    assign.take_order(order(1, 0, Mode::Train, &[4, 5]));
    assert_eq!(assign.pending(), 1);
    assign.take_order(order(2, 0, Mode::Eval, &[8, 9]));
    assert_eq!(assign.pending(), 2);
    // the running episode of the old order does not restart when its worker disconnects
    assign.gone(&1);
    assert_eq!(assign.pending(), 2);
}

#[test]
fn a_report_that_breaks_the_protocol_turns_its_worker_away() {
    let cases: [(SlotReport, &str); 4] = [
        (
            SlotReport {
                slot: 9,
                outcome: None,
                observation: None,
            },
            "expected 0 to 0",
        ),
        (
            SlotReport {
                slot: 0,
                outcome: outcome(true, false),
                observation: None,
            },
            "was told to reset",
        ),
        (
            SlotReport {
                slot: 0,
                outcome: outcome(false, false),
                observation: None,
            },
            "was told to reset",
        ),
        (
            SlotReport {
                slot: 0,
                outcome: None,
                observation: None,
            },
            "",
        ),
    ];
    for (report, reason) in cases {
        let mut assign = ready(1);
        assign.take_order(order(1, 0, Mode::Train, &[4]));
        assign.take_effects();
        assign.reports(&1, vec![report]);
        let effects = assign.take_effects();
        if reason.is_empty() {
            assert!(effects.refusals.is_empty());
            assert_eq!(resets(&effects, 1), [4], "an idle report restarts the episode");
        } else {
            assert!(
                effects.refusals[0].1.reason.contains(reason),
                "{}",
                effects.refusals[0].1.reason
            );
            assert_eq!(assign.pending(), 1, "its episode is not lost");
        }
    }
}

#[test]
fn bad_rewards_are_refused_and_the_episode_is_kept() {
    for rewards in [vec![], vec![0.0; 3], vec![f32::NAN]] {
        let mut assign = ready(1);
        assign.take_order(order(1, 0, Mode::Train, &[4]));
        assign.take_effects();
        act_once(&mut assign);
        let bad = Outcome {
            rewards,
            terminated: true,
            truncated: false,
            success: true,
            frames: Vec::new(),
        };
        report(&mut assign, Some(bad), None);
        let effects = assign.take_effects();
        assert_eq!(effects.refusals.len(), 1);
        assert!(effects.trajectories.is_empty());
        assert_eq!(assign.pending(), 1);
    }
}

#[test]
fn no_episode_begins_while_the_learner_does_not_keep_up() {
    let mut assign = ready(1);
    assign.set_full(true);
    assign.take_order(order(1, 0, Mode::Train, &[4]));
    assert!(assign.take_effects().commands.is_empty());
    assign.set_full(false);
    assert_eq!(resets(&assign.take_effects(), 1), [4]);
}

#[test]
fn a_worker_that_is_not_known_is_asked_to_say_hello_and_keeps_nothing_busy() {
    let mut assign = ready(1);
    // a heartbeat of a known worker changes nothing
    assign.reports(&1, Vec::new());
    assert!(assign.take_effects().refusals.is_empty());
    assign.gone(&1);
    for reports in [Vec::new(), idle(1)] {
        assign.reports(&1, reports);
        let refusals = assign.take_effects().refusals;
        let [(1, refusal)] = refusals.as_slice() else {
            panic!("one refusal: {refusals:?}")
        };
        assert!(refusal.retry && refusal.request.is_none(), "{refusal:?}");
    }
    assert_eq!(assign.slots(), 0);
    assign.hello(1, &hello(1)).expect("fits");
    assert_eq!(assign.slots(), 1);
}

#[test]
fn a_chunk_that_stops_short_inside_an_episode_turns_the_worker_away() {
    let mut assign = ready(1);
    assign.take_order(order(1, 0, Mode::Train, &[0]));
    assign.take_effects();
    report(&mut assign, None, seen());
    let question = assign.take_effects().questions.remove(0);
    assign.acted(ticket(&question), 0, actions());
    assign.take_effects();
    let short = outcome(false, false).map(|outcome| Outcome {
        rewards: vec![0.5],
        ..outcome
    });
    report(&mut assign, short, seen());
    let refusals = assign.take_effects().refusals;
    assert!(
        refusals
            .iter()
            .any(|(_, refusal)| !refusal.retry && refusal.reason.contains("1 rewards, expected 2")),
        "{refusals:?}"
    );
    assert_eq!(assign.pending(), 1, "its episode restarts elsewhere");
}
