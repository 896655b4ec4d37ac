//! Requests per second of several engines in one run: in every round each engine is measured in turn for a short time.

use std::time::Instant;

use crate::probe::{Pace, Question, Trips, steady_clients};

/// Measurements of one engine's clients over all rounds.
#[derive(Debug, Clone, Default)]
pub struct Load {
    /// Round trips of all rounds.
    pub trips: Trips,
    /// Requests per second of each round.
    pub rates: Vec<f64>,
    seconds: f64,
}

impl Load {
    /// Returns the requests per second over all rounds.
    pub fn rate(&self) -> f64 {
        self.trips.answered as f64 / self.seconds
    }

    /// Returns whether requests were answered, without a wrong answer and without a lost connection.
    pub fn good(&self) -> bool {
        self.trips.answered > 0 && (self.trips.lost, self.trips.wrong) == (0, 0)
    }
}

/// Measures engines with `clients` concurrent clients. Every round measures each engine once; odd rounds are in reverse order.
pub fn interleaved(endpoints: &[String], question: &Question, clients: usize, rounds: usize, pace: Pace) -> Vec<Load> {
    let mut loads = vec![Load::default(); endpoints.len()];
    for round in 0..rounds {
        let mut turn: Vec<(&String, &mut Load)> = endpoints.iter().zip(&mut loads).collect();
        if round % 2 == 1 {
            turn.reverse();
        }
        for (endpoint, load) in turn {
            let begin = Instant::now();
            let trips = steady_clients(endpoint, question, clients, pace);
            let seconds = begin.elapsed().as_secs_f64();
            load.rates.push(trips.answered as f64 / seconds);
            load.seconds += seconds;
            load.trips.merge(trips);
        }
    }
    loads
}
