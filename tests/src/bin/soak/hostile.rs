//! `soak hostile`: every attack in turn, and the process of an attacker.

use std::time::Duration;

use clap::{Args, builder::PossibleValuesParser};
use integration_tests::{
    attacks::{ATTACKS, Scene, Target},
    probe::Question,
    siege::{Bounds, header, lines, measure},
    standalone::{Limits, Server},
};

use crate::shared::{Attacked, end_with_parent, finish, plan, say, scratch};

/// Descriptors of the engine in the attacks on descriptors.
const SCARCE_DESCRIPTORS: u64 = 1024;

fn names() -> PossibleValuesParser {
    PossibleValuesParser::new(ATTACKS.iter().map(|attack| attack.name))
}

/// Arguments of `soak hostile`.
#[derive(Debug, Args)]
pub(crate) struct HostileArgs {
    /// Seconds of each attack.
    #[arg(default_value_t = 60)]
    seconds: u64,
    /// Attacks to run; default: all.
    #[arg(long, value_name = "NAME", value_delimiter = ',', value_parser = names())]
    only: Vec<String>,
    /// Seconds of the steady client's measurement before each attack.
    #[arg(long, value_name = "SECONDS", default_value_t = 5)]
    idle_seconds: u64,
    /// Niceness of the attackers.
    #[arg(long, default_value_t = 10)]
    nice: u8,
    #[command(flatten)]
    attacked: Attacked,
}

/// Arguments of an attacker process.
#[derive(Debug, Args)]
pub(crate) struct AttackArgs {
    #[arg(value_parser = names())]
    name: String,
    #[arg(long)]
    endpoint: String,
    #[arg(long, default_value = "")]
    http: String,
    #[arg(long)]
    seconds: f64,
}

/// Runs the attacks, prints their table and returns whether every bound was kept.
pub(crate) fn run(args: &HostileArgs) -> bool {
    let scratch = scratch();
    let programs = args.attacked.programs();
    let bounds = Bounds {
        seconds: Duration::from_secs(args.seconds),
        idle: Duration::from_secs(args.idle_seconds),
        nice: args.nice,
    };
    let plan = plan(scratch.path());
    let mut running: Option<(Target, Server)> = None;
    let mut failed = Vec::new();
    let mut end = |running: &mut Option<(Target, Server)>| {
        if let Some((target, mut server)) = running.take()
            && !finish(&mut server)
        {
            failed.push(format!("end of the {target:?}"));
        }
    };
    let mut breached = Vec::new();
    say(&header());
    for attack in &ATTACKS {
        if !args.only.is_empty() && !args.only.iter().any(|name| name == attack.name) {
            continue;
        }
        if running.as_ref().is_some_and(|(target, _)| *target != attack.target) {
            end(&mut running);
        }
        let (_, server) = running.get_or_insert_with(|| {
            let limits = Limits {
                descriptors: (attack.target == Target::ScarceEngine).then_some(SCARCE_DESCRIPTORS),
                address_space: args.attacked.address_space(),
            };
            let server = match attack.target {
                Target::Engine | Target::ScarceEngine => Server::engine(&programs, &plan, scratch.path(), limits),
                Target::Learner => Server::learner(&programs, &plan, scratch.path(), limits),
            };
            (attack.target, server)
        });
        let question = match attack.target {
            Target::Engine | Target::ScarceEngine => Question::act(&plan),
            Target::Learner => Question::part("steady"),
        };
        let measured = measure(server, attack, &bounds, &question);
        say(&lines(attack, &bounds, &measured));
        if !measured.breaches.is_empty() {
            breached.push(attack.name.to_owned());
        }
        // a learner ends when no engine delivers for two minutes, so each attack has a new learner
        if measured.broken || attack.target == Target::Learner {
            end(&mut running);
        }
    }
    end(&mut running);
    failed.extend(breached);
    if failed.is_empty() {
        say("every attack stayed within its bounds");
    } else {
        say(&format!("FAILED: {}", failed.join(", ")));
    }
    failed.is_empty()
}

/// Runs one attacker process.
pub(crate) fn attack(args: &AttackArgs) -> bool {
    end_with_parent();
    let found = ATTACKS.iter().find(|attack| attack.name == args.name);
    let attack = found.expect("an attack of the list");
    let scene = Scene {
        plan: plan(&std::env::temp_dir()),
        endpoint: args.endpoint.clone(),
        http: args.http.clone(),
        duration: Duration::from_secs_f64(args.seconds),
    };
    say(&(attack.run)(&scene).to_string());
    true
}
