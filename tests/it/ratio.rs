//! At equal weights the ratio is 1 and the critic's value is the recorded one, for every noise method, formulation, level of the likelihood
//! and choice of the last step. The learner's own sampler makes the records, without an engine.

use learner::{
    batch::RolloutBatch,
    model::Pi0,
    ranks::OneRank,
    update::{UpdateReport, Updater},
};
use policy::plan::RunPlan;

use crate::common::{SMALL_NETWORK, acted, network, recipe};

/// Number of episodes and of an update's records; order and neighbors differ from the rollout.
const EPISODES: usize = 24;

/// Tolerance of a ratio. The same f32 network on the same rows in batches of other sizes gives velocities that differ by some 1e-7. The
/// difference counts `|z| / std` times in a log-probability (up to 4 / 0.1), and a ratio is over up to 4 steps of 12 elements.
const RATIO: f64 = 1e-4;
/// Tolerance of a value: the value head's f32 sums.
const VALUE: f64 = 1e-5;

const COMMON: [&str; 6] = [
    "actor.optim.lr=0.0",
    "actor.optim.value_lr=0.0",
    "actor.optim.critic_warmup_epochs=0",
    "algorithm.update_epoch=1",
    "actor.global_batch_size=4096",
    "actor.micro_batch_size=7",
];

/// Acts at one version and updates in the iteration of another, with the same weights.
fn report(plan: &RunPlan, policy: &Pi0, acted_at: u64, updated_at: u32) -> UpdateReport {
    // episodes end after the first to the fourth of the actions, those of even environments with a success
    let pay = |env: u32| {
        let mut rewards = vec![0.0; 1 + env as usize % 4];
        rewards[0] = f32::from(env.is_multiple_of(2));
        (rewards, env.is_multiple_of(2))
    };
    let trajectories = acted(plan, policy, EPISODES, acted_at, &pay);
    let batch = RolloutBatch::new(plan, trajectories, acted_at, &OneRank).expect("records");
    let mut updater = Updater::new(plan, policy, &OneRank).expect("optimizer");
    updater.update(&batch, updated_at).expect("update")
}

fn assert_one(what: &str, report: &UpdateReport) {
    assert!(
        report.first_ratio_deviation <= RATIO && report.actor.ratio_deviation_max <= RATIO,
        "{what}: {report:?}"
    );
    assert!(
        report.actor.clip_fraction == 0.0 && report.first_value_gap <= VALUE,
        "{what}: {report:?}"
    );
    assert_eq!((report.updates, report.skipped), (1, 0), "{what}");
}

#[test]
fn the_ratio_is_one_at_equal_weights_for_every_way_of_acting() {
    const EXPERT: &str = "actor.model.value_head={input=\"expert\",hidden=[16],detach_critic_input=true}";
    const VLM: &str = "actor.model.value_head={input=\"vlm\",hidden=[16],detach_critic_input=true,state=true}";
    let noise_head = "actor.model.openpi.noise_head={hidden=[16,8],std_range=[0.08,0.16]}";
    let mut worst = (0.0f64, 0.0f64);
    let mut ways = 0;
    for method in ["flow_sde", "flow_cps", "flow_noise"] {
        for (mdp, joint) in [
            ("hybrid", None),
            ("joint", Some("sum")),
            ("joint", Some("mean")),
            ("two_layer", None),
        ] {
            for level in ["chunk_level", "action_level", "token_level"] {
                for ignore_last in [false, true] {
                    let mut keys: Vec<String> = SMALL_NETWORK
                        .iter()
                        .chain(&COMMON)
                        .map(|key| (*key).to_owned())
                        .collect();
                    keys.push(format!("actor.model.openpi.noise_method={method:?}"));
                    keys.push(format!("actor.model.openpi.mdp={mdp:?}"));
                    keys.push(format!("actor.model.openpi.ignore_last={ignore_last}"));
                    keys.push(format!("algorithm.logprob_type={level:?}"));
                    keys.push(if ignore_last { VLM } else { EXPERT }.to_owned());
                    keys.extend(joint.map(|rule| format!("actor.model.openpi.joint_logprob={rule:?}")));
                    if method == "flow_noise" {
                        keys.push(noise_head.to_owned());
                    }
                    let plan = recipe("quickstart", &keys);
                    let policy = network(&plan, 5);
                    let report = report(&plan, &policy, 0, 0);
                    let what = format!("{method} {mdp} {joint:?} {level}, ignore_last {ignore_last}");
                    assert_one(&what, &report);
                    worst.0 = worst.0.max(report.actor.ratio_deviation_max);
                    worst.1 = worst.1.max(report.first_value_gap);
                    ways += 1;
                }
            }
        }
    }
    println!(
        "{ways} ways: largest |ratio - 1| {:.1e}, |value gap| {:.1e}",
        worst.0, worst.1
    );
}

/// An annealed noise level belongs to the acting version. The learner uses the level of the version in training; another version's level
/// gives another ratio.
#[test]
fn an_annealed_level_is_that_of_the_version() {
    for method in ["flow_sde", "flow_cps"] {
        for mdp in ["hybrid", "two_layer"] {
            let mut keys: Vec<String> = SMALL_NETWORK
                .iter()
                .chain(&COMMON)
                .map(|key| (*key).to_owned())
                .collect();
            keys.push(format!("actor.model.openpi.noise_method={method:?}"));
            keys.push(format!("actor.model.openpi.mdp={mdp:?}"));
            keys.push("actor.model.openpi.noise_anneal={start=0.7,end=0.3,steps=10}".to_owned());
            let plan = recipe("quickstart", &keys);
            let policy = network(&plan, 5);
            for version in [3, 10, 12] {
                let what = format!("{method} {mdp} version {version}");
                assert_one(&what, &report(&plan, &policy, version, version as u32));
            }
            // the level of version 4 is 0.54, not 0.58: deviations of 7 %
            let other = report(&plan, &policy, 3, 4);
            assert!(other.first_ratio_deviation > 1e-2, "{method} {mdp}: {other:?}");
        }
    }
}
