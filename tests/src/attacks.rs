//! Attacks of the soak and of the hostile tests by name, each for any duration.

use std::time::Duration;

use policy::plan::RunPlan;

use crate::hostile::{
    Answers, BOMBS, Churn, Cut, Drip, Nils, PLACES, Stage, Tally, act_frame, bad_handshakes, churn, crowd, drip,
    endless_parts, fetch_unread, flood, forge, frame, idle, in_flight, length_bomb, nil_frame, one_message, ping,
    random_bytes, repeat, unknown_variant_frame, vanishing_workers,
};

/// Number of connections of the attacks on descriptors.
const SCARCE_CONNECTIONS: usize = 1100;
/// Longest wait of an attacker for one answer.
pub const PATIENCE: Duration = Duration::from_secs(5);
/// Rows of a large request; the tabletop's `rollout.queue_capacity`.
const MANY_ROWS: usize = 4096;
/// Largest memory of an engine of the tabletop or its learner, in bytes: 50 to 150 MB when idle, plus a large request and its answer.
const MEMORY: u64 = 512 << 20;
/// Value of `wire::limits::Limits::received_bytes`.
const RECEIVED: u64 = 1 << 30;

/// Attacked server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Target {
    /// An engine.
    Engine,
    /// An engine with few file descriptors.
    ScarceEngine,
    /// A learner.
    Learner,
}

/// Parameters of an attack.
pub struct Scene {
    /// The attacked policy's plan.
    pub plan: RunPlan,
    /// Endpoint of the engine or the learner.
    pub endpoint: String,
    /// `HOST:PORT` of the engine's pages.
    pub http: String,
    /// Duration of the attack.
    pub duration: Duration,
}

impl Scene {
    fn action_dim(&self) -> u32 {
        self.plan.config.actor.model.env_action_dim as u32
    }
}

/// An attack.
pub struct Attack {
    /// Name on the command line.
    pub name: &'static str,
    /// Attacked server.
    pub target: Target,
    /// Largest memory of the attacked process, in bytes.
    pub memory: u64,
    /// Function that attacks for the scene's duration.
    pub run: fn(&Scene) -> Tally,
}

const fn attack(name: &'static str, target: Target, run: fn(&Scene) -> Tally) -> Attack {
    Attack {
        name,
        target,
        memory: MEMORY,
        run,
    }
}

/// Returns an attack with partially received messages, which may fill the budget of all peers.
const fn filling(name: &'static str, target: Target, run: fn(&Scene) -> Tally) -> Attack {
    Attack {
        memory: MEMORY + RECEIVED,
        ..attack(name, target, run)
    }
}

fn churn_of(scene: &Scene, clients: usize, body: &[u8], patience: Duration) -> Tally {
    let bounds = Churn {
        connections: u64::MAX,
        duration: scene.duration,
        patience,
    };
    crowd(clients, |_| churn(&scene.endpoint, body, bounds, |_| {}))
}

fn bombs(scene: &Scene) -> Tally {
    let all: Vec<_> = PLACES
        .iter()
        .flat_map(|place| BOMBS.iter().map(move |length| (*length, *place)))
        .collect();
    let mut next = all.iter().cycle();
    repeat(scene.duration, |left| {
        next.next().map_or_else(Tally::default, |(length, place)| {
            length_bomb(&scene.endpoint, *length, *place, left.min(Duration::from_secs(1)))
        })
    })
}

fn random(scene: &Scene) -> Tally {
    random_bytes(&scene.endpoint, u64::MAX, 3000, 5, scene.duration)
}

fn parts(scene: &Scene, part_bytes: u8) -> Tally {
    repeat(scene.duration, |left| {
        endless_parts(&scene.endpoint, part_bytes, 38 << 20, left.min(Duration::from_secs(10)))
    })
}

fn flood_of(scene: &Scene, one: &[u8], answers: Answers) -> Tally {
    repeat(scene.duration, |left| {
        flood(&scene.endpoint, one, u64::MAX, answers, left)
    })
}

fn idle_of(scene: &Scene, endpoint: &str, stage: Stage) -> Tally {
    idle(endpoint, SCARCE_CONNECTIONS, stage, scene.duration)
}

fn nils(scene: &Scene, kinds: [Nils; 2]) -> Tally {
    let bodies = kinds.map(|kind| nil_frame(kind, 19 << 20));
    let mut next = bodies.iter().cycle();
    repeat(scene.duration, |left| {
        next.next()
            .map(|body| one_message(&scene.endpoint, body, left.min(PATIENCE)))
            .unwrap_or_default()
    })
}

fn workers(scene: &Scene, cut: Cut) -> Tally {
    let mut round = 0;
    repeat(scene.duration, |_left| {
        round += 1;
        vanishing_workers(
            &scene.endpoint,
            &format!("{cut:?}-{round}"),
            2500,
            1,
            scene.action_dim(),
            cut,
        )
    })
}

fn slow(scene: &Scene, at_once: usize, every: Option<Duration>) -> Tally {
    let plan = Drip {
        connections: 20,
        announced: 50 << 20,
        at_once,
        every,
        hold: scene.duration,
    };
    drip(&scene.endpoint, plan)
}

/// All attacks, in the order of execution.
pub const ATTACKS: [Attack; 36] = [
    attack("churn", Target::Engine, |s| {
        churn_of(s, 2, &act_frame(&s.plan, 1, 1, false), PATIENCE)
    }),
    attack("churn-junk", Target::Engine, |s| {
        churn_of(s, 2, b"junk", Duration::from_secs(1))
    }),
    attack("bombs", Target::Engine, bombs),
    attack("random", Target::Engine, random),
    attack("parts-empty", Target::Engine, |s| parts(s, 0)),
    attack("parts-one-byte", Target::Engine, |s| parts(s, 1)),
    attack("flood-unread", Target::Engine, |s| {
        flood_of(s, &frame(0, b"x"), Answers::Unread)
    }),
    attack("rows-unread", Target::Engine, |s| {
        flood_of(s, &frame(0, &act_frame(&s.plan, 1, MANY_ROWS, true)), Answers::Unread)
    }),
    attack("rows-read", Target::Engine, |s| {
        flood_of(s, &frame(0, &act_frame(&s.plan, 1, MANY_ROWS, true)), Answers::Read)
    }),
    attack("in-flight", Target::Engine, |s| {
        let body = act_frame(&s.plan, 1, MANY_ROWS, false);
        crowd(3, |_| repeat(s.duration, |left| in_flight(&s.endpoint, &body, 1, left)))
    }),
    attack("nil-elements", Target::Engine, |s| nils(s, [Nils::Reports, Nils::Rows])),
    attack("nil-images", Target::Engine, |s| {
        nils(s, [Nils::ReportImages, Nils::RowImages])
    }),
    attack("workers-reset", Target::Engine, |s| workers(s, Cut::Reset)),
    attack("workers-close", Target::Engine, |s| workers(s, Cut::Close)),
    attack("junk", Target::Engine, |s| flood_of(s, &frame(0, b"?"), Answers::Read)),
    attack("variant", Target::Engine, |s| {
        let body = unknown_variant_frame(30_000_000);
        repeat(s.duration, |left| one_message(&s.endpoint, &body, left.min(PATIENCE)))
    }),
    attack("names", Target::Engine, |s| {
        forge(&s.endpoint, &s.plan, s.action_dim(), s.duration)
    }),
    attack("drip", Target::Engine, |s| slow(s, 0, Some(Duration::from_millis(500)))),
    attack("handshakes", Target::Engine, |s| {
        bad_handshakes(&s.endpoint, &act_frame(&s.plan, 1, 1, false), s.duration)
    }),
    attack("pings-unread", Target::Engine, |s| {
        flood_of(s, &ping(0, b"context"), Answers::Unread)
    }),
    attack("pings-read", Target::Engine, |s| {
        flood_of(s, &ping(0, b"context"), Answers::Read)
    }),
    // last, because its memory is freed while the next attack would be measured
    filling("partial", Target::Engine, |s| slow(s, 49 << 20, None)),
    attack("idle-silent", Target::ScarceEngine, |s| {
        idle_of(s, &s.endpoint, Stage::Silent)
    }),
    attack("idle-greeting", Target::ScarceEngine, |s| {
        idle_of(s, &s.endpoint, Stage::Greeting)
    }),
    attack("idle-slow", Target::ScarceEngine, |s| {
        idle_of(s, &s.endpoint, Stage::SlowGreeting)
    }),
    attack("idle-ready", Target::ScarceEngine, |s| {
        idle_of(s, &s.endpoint, Stage::Ready)
    }),
    attack("idle-http", Target::ScarceEngine, |s| {
        idle_of(s, &s.http, Stage::Silent)
    }),
    attack("half-http", Target::ScarceEngine, |s| {
        idle_of(s, &s.http, Stage::HalfRequest)
    }),
    attack("learner-fetch", Target::Learner, |s| {
        let mut round = 0;
        repeat(s.duration, |left| {
            round += 1;
            fetch_unread(&s.endpoint, &format!("greedy-{round}"), left)
        })
    }),
    attack("learner-bombs", Target::Learner, bombs),
    attack("learner-random", Target::Learner, random),
    attack("learner-handshakes", Target::Learner, |s| {
        bad_handshakes(&s.endpoint, b"junk", s.duration)
    }),
    attack("learner-parts", Target::Learner, |s| parts(s, 0)),
    attack("learner-junk", Target::Learner, |s| {
        flood_of(s, &frame(0, b"?"), Answers::Unread)
    }),
    attack("learner-churn", Target::Learner, |s| {
        churn_of(s, 2, b"junk", Duration::from_millis(200))
    }),
    filling("learner-partial", Target::Learner, |s| slow(s, 49 << 20, None)),
];
