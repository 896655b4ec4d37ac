//! Learning does not depend on the order of environments, and actions that were not executed are not in a loss on the velocity.

use learner::{
    batch::RolloutBatch,
    model::Pi0,
    ranks::OneRank,
    update::Updater,
    velocity::{Episodes, Velocities, VelocityLoss, velocity_loss},
};
use policy::plan::RunPlan;
use proptest::{collection::vec, prelude::*};
use tch::{Kind, Tensor};
use wire::messages::Trajectory;

use crate::common::{SMALL_NETWORK, acted, largest_gap, network, recipe, weights};

/// Chunks of each episode; the last chunk may be cut.
const LENGTHS: [usize; 6] = [2, 3, 1, 2, 1, 3];

const SMALL: [&str; 6] = [
    "actor.optim.critic_warmup_epochs=0",
    "actor.optim.lr_warmup_steps=0",
    // smooth in the gradient: rounding stays rounding
    "actor.optim.eps=1.0",
    "actor.optim.lr=0.1",
    "algorithm.update_epoch=1",
    "actor.global_batch_size=4096",
];

/// Returns episodes of [`LENGTHS`], in three groups of two with one success each.
fn episodes(plan: &RunPlan, policy: &Pi0) -> Vec<Trajectory> {
    let full = plan.config.actor.model.num_action_chunks;
    let mut last = vec![false; LENGTHS.iter().sum()];
    let mut ends = 0;
    for length in LENGTHS {
        ends += length;
        last[ends - 1] = true;
    }
    let pay = |env: u32| {
        let executed = if last[env as usize] {
            1 + env as usize % full
        } else {
            full
        };
        let mut rewards = vec![0.0; executed];
        rewards[0] = f32::from(env.is_multiple_of(3));
        (rewards, false)
    };
    let mut chunks = acted(plan, policy, last.len(), 0, &pay).into_iter();
    let mut episodes = Vec::new();
    for (number, length) in LENGTHS.into_iter().enumerate() {
        let mut episode = chunks.next().expect("a chunk");
        episode
            .chunks
            .extend(chunks.by_ref().take(length - 1).flat_map(|t| t.chunks));
        episode.id = number as u64;
        (episode.reset.env, episode.reset.reset_state) = (number as u32, Some(number as u64 / 2));
        episode.success = number.is_multiple_of(2);
        (episode.terminated, episode.final_value) = (!number.is_multiple_of(3), Some(0.3 * number as f32));
        episodes.push(episode);
    }
    episodes
}

/// Returns the samples of each episode of a batch.
fn samples(batch: &RolloutBatch) -> Vec<Vec<i64>> {
    let mut by_episode = vec![Vec::new(); LENGTHS.len()];
    for (sample, episode) in batch.episode.iter().enumerate() {
        by_episode[*episode].push(sample as i64);
    }
    by_episode
}

fn assert_permuted(what: &str, plain: &RolloutBatch, moved: &RolloutBatch, order: &[usize]) {
    let (of_plain, of_moved) = (samples(plain), samples(moved));
    for (to, from) in order.iter().enumerate() {
        let (a, b) = (Tensor::from_slice(&of_moved[to]), Tensor::from_slice(&of_plain[*from]));
        let equal = |name: &str, moved: &Tensor, plain: &Tensor| {
            let (moved, plain) = (moved.index_select(0, &a), plain.index_select(0, &b));
            assert!(moved.equal(&plain), "{what}: {name} of episode {from}");
        };
        equal("step", &moved.step, &plain.step);
        equal("old_logprob", &moved.old_logprob, &plain.old_logprob);
        equal("old_value", &moved.old_value, &plain.old_value);
        equal("version", &moved.version, &plain.version);
        equal("mask", &moved.mask, &plain.mask);
        equal(
            "policy_episodes",
            &moved.policy_episodes.len,
            &plain.policy_episodes.len,
        );
        equal("value_episodes", &moved.value_episodes.len, &plain.value_episodes.len);
        equal("returns", &moved.returns, &plain.returns);
        let record = |batch: &RolloutBatch, rows: &Tensor| Tensor::from_slice(&batch.record).index_select(0, rows);
        let (of_a, of_b) = (record(moved, &a), record(plain, &b));
        let chains = |batch: &RolloutBatch, records: &Tensor| batch.chain.index_select(0, records);
        assert!(chains(moved, &of_a).equal(&chains(plain, &of_b)), "{what}: chain");
        let states = |batch: &RolloutBatch, records: &Tensor| batch.observations.state.index_select(0, records);
        assert!(states(moved, &of_a).equal(&states(plain, &of_b)), "{what}: state");
        // mean and deviation over all of them are f64 sums in another order
        let gap = (moved.advantages.index_select(0, &a) - plain.advantages.index_select(0, &b))
            .abs()
            .max();
        assert!(gap.double_value(&[]) < 1e-6, "{what}: advantage of episode {from}");
        for (a, b) in of_moved[to].iter().zip(&of_plain[*from]) {
            let (a, b) = (*a as usize, *b as usize);
            assert_eq!(
                (moved.executed[a], moved.valid[a]),
                (plain.executed[b], plain.valid[b]),
                "{what}"
            );
            assert_eq!(moved.success[a], plain.success[b], "{what}");
        }
    }
    assert!((moved.policy_episodes.steps - plain.policy_episodes.steps).abs() < 1e-12);
    assert!((moved.whole.action_magnitude - plain.whole.action_magnitude).abs() < 1e-9);
}

/// The order of the environments changes neither the batch of the episodes nor the weights after an update.
#[test]
fn permuting_environments_permutes_the_batch_and_changes_no_update() {
    let orders: [[usize; 6]; 3] = [[5, 4, 3, 2, 1, 0], [2, 0, 1, 5, 3, 4], [1, 0, 3, 2, 5, 4]];
    let by_action = [
        "algorithm.reward_type=\"action_level\"",
        "algorithm.logprob_type=\"action_level\"",
    ];
    for (name, keys) in [
        ("quickstart", &[][..]),
        ("quickstart", &by_action[..]),
        ("quickstart", &["algorithm.loss_agg=\"episode_length\""]),
        ("tabletop_grpo", &[]),
        ("tabletop_reinforce_pp", &[]),
        ("tabletop_flow_noise", &[]),
        ("tabletop_two_layer", &[]),
    ] {
        let plan = recipe(name, &[&SMALL_NETWORK, &SMALL, keys].concat());
        let update = |episodes: &[Trajectory]| {
            let policy = network(&plan, 5);
            let batch = RolloutBatch::new(&plan, episodes.to_vec(), 0, &OneRank).expect("records");
            let mut updater = Updater::new(&plan, &policy, &OneRank).expect("optimizer");
            let report = updater.update(&batch, 0).expect("update");
            assert_eq!((report.updates, report.skipped), (1, 0), "{name}");
            (batch, weights(&policy))
        };
        let policy = network(&plan, 5);
        let (start, plain) = (weights(&policy), episodes(&plan, &policy));
        let (batch, whole) = update(&plain);
        let moved_by = largest_gap(&start, &whole);
        for order in orders {
            let what = format!("{name} {keys:?} {order:?}");
            let moved: Vec<Trajectory> = order.iter().map(|at| plain[*at].clone()).collect();
            let (permuted, after) = update(&moved);
            assert_permuted(&what, &batch, &permuted, &order);
            // f32 gradients summed in another order, against steps that are a hundred times as large
            let gap = largest_gap(&whole, &after);
            assert!(
                moved_by > 1e-3 && gap < 2e-5,
                "{what}: moved {moved_by:.1e}, gap {gap:.1e}"
            );
        }
    }
}

/// The split of a minibatch changes no update, also if a sample has several denoise steps or is one of several.
#[test]
fn the_cut_of_a_minibatch_changes_no_update_of_any_formulation() {
    let bonus = "algorithm.entropy_bonus=0.5";
    for (name, special) in [
        ("tabletop_flow_noise", &[bonus][..]),
        (
            "tabletop_flow_noise",
            &[bonus, "actor.model.openpi.joint_logprob=\"mean\""],
        ),
        ("tabletop_two_layer", &[]),
        (
            "tabletop_two_layer",
            &["actor.model.value_head={input=\"vlm\",hidden=[16],state=true,detach_critic_input=true}"],
        ),
    ] {
        for level in ["chunk_level", "action_level", "token_level"] {
            for agg in ["mean", "episode_length"] {
                let keys = [
                    format!("algorithm.logprob_type={level:?}"),
                    format!("algorithm.loss_agg={agg:?}"),
                ];
                let with = |micro: &'static str| {
                    let keys = keys.iter().map(String::as_str).chain([micro]);
                    let overrides: Vec<&str> = SMALL_NETWORK
                        .iter()
                        .chain(&SMALL)
                        .chain(special)
                        .copied()
                        .chain(keys)
                        .collect();
                    recipe(name, &overrides)
                };
                let start = network(&with("actor.micro_batch_size=4096"), 5);
                let update = |plan: &RunPlan| {
                    let policy = network(plan, 5);
                    let batch = RolloutBatch::new(plan, episodes(plan, &policy), 0, &OneRank).expect("records");
                    let mut updater = Updater::new(plan, &policy, &OneRank).expect("optimizer");
                    let report = updater.update(&batch, 0).expect("update");
                    assert_eq!((report.updates, report.skipped), (1, 0), "{name}");
                    weights(&policy)
                };
                let whole = update(&with("actor.micro_batch_size=4096"));
                let moved = largest_gap(&weights(&start), &whole);
                for micro in ["actor.micro_batch_size=5", "actor.micro_batch_size=1"] {
                    let gap = largest_gap(&whole, &update(&with(micro)));
                    // as above
                    assert!(
                        moved > 1e-3 && gap < 2e-5,
                        "{name} {special:?} {level} {agg} {micro}: moved {moved:.1e}, gap {gap:.1e}"
                    );
                }
            }
        }
    }
}

fn method(name: &str, params: &str) -> Box<dyn VelocityLoss> {
    velocity_loss(name).expect("registered")(&params.parse().expect("TOML")).expect("parameters")
}

fn methods() -> [(&'static str, Box<dyn VelocityLoss>); 4] {
    let ipo = |credit: &str| {
        method(
            "flow_ipo",
            &format!("alpha=2.0\nt_min=0.2\nt_max=0.8\ncredit={credit:?}"),
        )
    };
    let nft = |form: &str| {
        method(
            "nft",
            &format!("beta=0.5\nadvantage_max=2.0\nt_min=0.1\nt_max=0.9\nform={form:?}"),
        )
    };
    [
        ("flow_ipo by displacement", ipo("displacement")),
        ("flow_ipo by advantage", ipo("advantage")),
        ("nft mse", nft("mse")),
        ("nft softplus", nft("softplus")),
    ]
}

/// Elements of a sample: `H x A` = 3 x 2.
const ELEMENTS: usize = 6;
const SAMPLES: usize = 4;

fn velocity_numbers() -> impl Strategy<Value = Vec<f32>> {
    vec(-2.0f32..2.0, SAMPLES * ELEMENTS)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn permuting_environments_permutes_the_credit_of_their_chunks(
        drawn in vec((1usize..5, any::<bool>()), 5),
        numbers in vec((0.0f32..3.0, -2.0f32..2.0), 25),
        order in Just((0..5).collect::<Vec<usize>>()).prop_shuffle(),
    ) {
        // chunk n of episode e has the numbers 5 e + n
        let credit = |method: &dyn VelocityLoss, order: &[usize]| -> Vec<Vec<f32>> {
            let (mut episode, mut success, mut advantage, mut displacement) = (vec![], vec![], vec![], vec![]);
            for (to, from) in order.iter().enumerate() {
                let (length, succeeded) = drawn[*from];
                for (far, worth) in &numbers[5 * from..5 * from + length] {
                    episode.push(to);
                    success.push(succeeded);
                    advantage.push(*worth);
                    displacement.push(*far);
                }
            }
            let all = method.credit(&Episodes {
                episode: &episode,
                success: &success,
                advantages: &advantage,
                displacement: &displacement,
            });
            let of = |e: usize| episode.iter().zip(&all).filter(|(of, _)| **of == e).map(|(_, c)| *c).collect();
            (0..order.len()).map(of).collect()
        };
        for (name, method) in methods() {
            let (plain, moved) = (credit(&*method, &[0, 1, 2, 3, 4]), credit(&*method, &order));
            for (to, from) in order.iter().enumerate() {
                prop_assert_eq!(&moved[to], &plain[*from], "{}", name);
            }
        }
    }

    #[test]
    fn an_element_that_was_not_executed_changes_no_velocity_loss(
        velocity in velocity_numbers(),
        reference in velocity_numbers(),
        target in velocity_numbers(),
        credit in vec(-1.0f32..1.0, SAMPLES),
        executed in vec(any::<bool>(), SAMPLES * ELEMENTS),
        junk in prop::sample::select(vec![f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -200.0]),
    ) {
        let shape = [SAMPLES as i64, 3, 2];
        let mask = Tensor::from_slice(&executed).to_kind(Kind::Float).view(shape);
        let credit = Tensor::from_slice(&credit);
        let evaluate = |method: &dyn VelocityLoss, junk: Option<f32>| {
            let tensor = |numbers: &[f32]| {
                let spoilt = |(value, counts): (&f32, &bool)| if *counts { *value } else { junk.unwrap_or(*value) };
                let numbers: Vec<f32> = numbers.iter().zip(&executed).map(spoilt).collect();
                Tensor::from_slice(&numbers).view(shape)
            };
            let velocity = tensor(&velocity).set_requires_grad(true);
            let loss = method.loss(&Velocities {
                velocity: &velocity,
                reference: &tensor(&reference),
                target: &tensor(&target),
                executed: &mask,
                credit: &credit,
            });
            loss.sum(Kind::Float).backward();
            let gradient: Vec<f32> = Vec::try_from(velocity.grad().contiguous().view(-1)).expect("floats");
            let loss: Vec<f32> = Vec::try_from(loss.detach()).expect("floats");
            (loss, gradient)
        };
        for (name, method) in methods() {
            let clean = evaluate(&*method, None);
            prop_assert!(clean.0.iter().chain(&clean.1).all(|number| number.is_finite()), "{name}");
            prop_assert_eq!(evaluate(&*method, Some(junk)), clean, "{} {}", name, junk);
        }
    }
}
