//! Hostile and short-lived peers against an engine and a learner, as a small `scripts/soak`. After every attack the process runs, a steady
//! client has every answer, and a new client is served. Memory and log are within their bounds.

use std::{
    path::Path,
    time::{Duration, Instant},
};

use integration_tests::{
    attacks::{ATTACKS, Target},
    hostile::{Churn, Cut, Tally, act_frame, churn, crowd, open, pause, vanishing_workers},
    probe::{Question, http_get, metric},
    ring::plan,
    siege::{Bounds, GRACE, measure},
    standalone::{Limits, Programs, Server, signal, stop},
};

/// Descriptors of the engine in the attacks on descriptors.
const SCARCE: u64 = 1024;

fn engine(dir: &Path, descriptors: Option<u64>) -> Server {
    let limits = Limits {
        descriptors,
        ..Limits::default()
    };
    Server::engine(&Programs::default(), &plan(dir, &[]), dir, limits)
}

/// Runs all attacks on a target for a second each and asserts the bounds.
#[track_caller]
fn withstands(server: &mut Server, target: Target, question: &Question) {
    let bounds = Bounds {
        seconds: Duration::from_secs(1),
        // latency is measured by the soak, on an otherwise idle host
        idle: Duration::ZERO,
        nice: 10,
    };
    for attack in ATTACKS.iter().filter(|attack| attack.target == target) {
        let measured = measure(server, attack, &bounds, question);
        assert!(
            measured.breaches.is_empty(),
            "{}: {}; log: {}",
            attack.name,
            measured.breaches.join(", "),
            server.log_tail()
        );
    }
    assert!(server.terminate(GRACE).is_some(), "SIGTERM ends it within {GRACE:?}");
}

#[test]
fn an_engine_withstands_every_attack() {
    let dir = tempfile::tempdir().expect("folder");
    let question = Question::act(&plan(dir.path(), &[]));
    withstands(&mut engine(dir.path(), None), Target::Engine, &question);
}

#[test]
fn an_engine_with_few_descriptors_withstands_every_attack_on_them() {
    let dir = tempfile::tempdir().expect("folder");
    let question = Question::act(&plan(dir.path(), &[]));
    withstands(&mut engine(dir.path(), Some(SCARCE)), Target::ScarceEngine, &question);
}

#[test]
fn a_learner_withstands_every_attack() {
    let dir = tempfile::tempdir().expect("folder");
    let plan = plan(dir.path(), &[]);
    let mut learner = Server::learner(&Programs::default(), &plan, dir.path(), Limits::default());
    withstands(&mut learner, Target::Learner, &Question::part("steady"));
}

/// Short-lived clients without any other client once hung an engine forever.
#[test]
fn clients_that_come_and_go_are_all_served() {
    let dir = tempfile::tempdir().expect("folder");
    let mut server = engine(dir.path(), None);
    let act = act_frame(&plan(dir.path(), &[]), 1, 1, false);
    let bounds = |connections| Churn {
        connections,
        duration: Duration::from_secs(40),
        patience: Duration::from_secs(20),
    };
    let come_and_go =
        |clients, body: &[u8], each| crowd(clients, |_| churn(&server.listen, body, bounds(each), |_| {}));
    for (clients, each) in [(1, 500), (2, 1000), (4, 500)] {
        let tally = come_and_go(clients, &act, each);
        assert_eq!(tally.answered, clients as u64 * each, "{tally}");
    }
    let tally = come_and_go(2, b"junk", 5000);
    assert_eq!(tally.refused + tally.closed, 10_000, "{tally}");
    assert_eq!(come_and_go(1, &act, 1).answered, 1);
    assert!(server.terminate(GRACE).is_some(), "SIGTERM ends it within {GRACE:?}");
}

/// Vanished workers leave no slots, and many vanished workers do not block others.
#[test]
fn workers_that_vanish_leave_no_slots() {
    let dir = tempfile::tempdir().expect("folder");
    let plan = plan(dir.path(), &[]);
    let server = engine(dir.path(), None);
    let width = plan.config.actor.model.env_action_dim as u32;
    let http = server.http.clone().expect("pages");
    let tally: Tally = [Cut::Close, Cut::Reset]
        .map(|cut| vanishing_workers(&server.listen, &format!("{cut:?}"), 300, 7, width, cut))
        .into_iter()
        .fold(Tally::default(), |mut sum, tally| {
            sum.opened += tally.opened;
            sum
        });
    assert_eq!(tally.opened, 600);
    let begin = Instant::now();
    while metric(&http, "engine_slots", GRACE).expect("a number") > 0.0 {
        assert!(begin.elapsed() < GRACE, "slots of workers that are gone stay");
        pause(Duration::from_millis(20));
    }
}

/// An engine that was stopped for a while continues to serve.
#[test]
fn an_engine_that_stood_still_serves_on() {
    let dir = tempfile::tempdir().expect("folder");
    let mut server = engine(dir.path(), None);
    let http = server.http.clone().expect("pages");
    let status = || http_get(&http, "/healthz", Duration::from_secs(2)).map(|(status, _)| status);
    assert_eq!(status().expect("an answer"), 200);
    stop(server.pid());
    assert!(status().is_err());
    signal("CONT", server.pid());
    let begin = Instant::now();
    while !status().is_ok_and(|status| status == 200) {
        assert!(begin.elapsed() < GRACE, "it moves again");
        pause(Duration::from_millis(20));
    }
    assert!(server.terminate(GRACE).is_some());
    assert!(
        open(&server.listen, Duration::from_millis(100)).is_err(),
        "nobody listens any more"
    );
}
