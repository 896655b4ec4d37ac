//! A small `scripts/bench-engine`: every request of every client is answered, in any time.

use std::time::Duration;

use integration_tests::{
    load::interleaved,
    probe::{Pace, Question},
    ring::plan,
    standalone::{Limits, Programs, Server},
};
use tempfile::TempDir;

#[test]
fn all_clients_of_engines_side_by_side_are_answered() {
    let dirs = [(); 2].map(|()| tempfile::tempdir().expect("folder"));
    let plan = plan(dirs[0].path(), &[]);
    let start = |dir: &TempDir| Server::engine(&Programs::default(), &plan, dir.path(), Limits::default());
    let servers = dirs.each_ref().map(start);
    let endpoints = servers.each_ref().map(|server| server.listen.clone());
    let pace = Pace {
        duration: Duration::from_mins(2),
        requests: Some(10),
        between: Duration::ZERO,
    };
    for clients in [1, 4, 16] {
        for load in interleaved(&endpoints, &Question::act(&plan), clients, 2, pace) {
            let trips = load.trips;
            assert_eq!(trips.answered, 2 * 10 * clients as u64, "{trips:?}");
            assert_eq!((trips.lost, trips.wrong, trips.unanswered), (0, 0, 0), "{trips:?}");
            assert_eq!(trips.times.len() as u64, trips.answered);
            assert_eq!(load.rates.len(), 2);
        }
    }
}
