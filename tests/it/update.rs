//! Updates on hand-made records: accumulated gradients, steps that must be skipped, and the valid parts of a chunk.

use std::collections::BTreeMap;

use learner::{
    batch::RolloutBatch,
    model::Pi0,
    ranks::OneRank,
    update::{
        UpdateReport, Updater,
        logprob::{StepTable, TransitionBatch, transition},
    },
};
use policy::{
    message::told,
    noise::{Purpose, fill_normal, stream},
    params::Part,
    plan::RunPlan,
};
use tch::{Device, Kind, Tensor};
use wire::{
    array::Array,
    messages::{ChunkRecord, Mode, Reset, Trajectory, TrajectoryChunk},
};

use crate::common::{executed, largest_gap, network, recipe, weights};

/// Overrides for small batches, and for an Adam with steps smooth in the gradient, so that rounding is not amplified.
const COMMON: [&str; 6] = [
    "actor.global_batch_size=64",
    "actor.micro_batch_size=64",
    "actor.optim.eps=1.0",
    "actor.optim.lr_warmup_steps=0",
    "actor.optim.critic_warmup_epochs=0",
    "algorithm.update_epoch=1",
];

fn plan(config: &str, overrides: &[&str]) -> RunPlan {
    recipe(config, &[&COMMON, overrides].concat())
}

fn normal(number: u64, count: usize) -> Vec<f32> {
    let mut values = vec![0.0; count];
    fill_normal(&mut stream(Purpose::Init, 31, number, 0, 0), &mut values);
    values
}

/// Returns episodes of two groups with these rewards per chunk.
fn trajectories(plan: &RunPlan, rewards: &[&[&[f32]]]) -> Vec<Trajectory> {
    let (dims, model) = (&plan.dims, &plan.config.actor.model);
    let side = dims.vision.image_size;
    let record = |env: usize, chunk: usize| {
        let number = (env * 10 + chunk) as u64;
        let pixels = normal(number, dims.cameras * side * side * 3);
        let chain = [model.num_steps + 1, dims.action_horizon, dims.action_dim];
        let logprob = [1, model.num_action_chunks, model.env_action_dim];
        ChunkRecord {
            key: policy::noise::NoiseKey {
                seed: 1,
                env: env as u32,
                episode: 0,
                chunk: chunk as u32,
            },
            version: 0,
            images: Array::u8(
                &[dims.cameras, side, side, 3],
                pixels
                    .iter()
                    .map(|v| (128.0 + 40.0 * v).clamp(0.0, 255.0) as u8)
                    .collect(),
            ),
            image_mask: vec![true; dims.cameras],
            prompt: vec![1; dims.prompt_len],
            prompt_mask: vec![true; dims.prompt_len],
            state: Array::f32(&[dims.action_dim], &normal(number + 1000, dims.action_dim)),
            denoise_steps: vec![(number % model.num_steps as u64) as u32],
            chain: Array::f32(&chain, &normal(number + 2000, chain.iter().product())),
            logprob: Some(Array::f32(&logprob, &vec![0.0; logprob.iter().product()])),
            values: vec![0.1],
        }
    };
    rewards
        .iter()
        .enumerate()
        .map(|(env, chunks)| Trajectory {
            id: env as u64,
            engine: "by hand".to_owned(),
            order: 1,
            reset: Reset {
                seed: 1,
                env: env as u32,
                episode: 0,
                reset_state: Some(env as u64 / 2),
                task: None,
                group: None,
                video: false,
            },
            mode: Mode::Train,
            prompt: String::new(),
            chunks: chunks
                .iter()
                .enumerate()
                .map(|(chunk, rewards)| TrajectoryChunk {
                    record: Some(Box::new(record(env, chunk))),
                    rewards: rewards.to_vec(),
                    frames: Vec::new(),
                })
                .collect(),
            terminated: true,
            success: false,
            final_value: None,
        })
        .collect()
}

const FULL: &[f32] = &[0.0, 0.0, 0.0, 0.0];
const LATE: &[f32] = &[0.0, 1.0];
const CUT: &[f32] = &[0.0];

/// Returns four episodes of 1 to 3 chunks, three of which end inside a chunk.
fn records(plan: &RunPlan) -> Vec<Trajectory> {
    trajectories(plan, &[&[FULL, LATE], &[FULL, FULL, CUT], &[LATE], &[FULL, FULL]])
}

/// Returns the batch with the policy's own log-probabilities, slightly perturbed.
fn batch(plan: &RunPlan, policy: &Pi0, trajectories: &[Trajectory]) -> RolloutBatch {
    batch_moved(plan, policy, trajectories, 0.03)
}

/// Returns the batch with the policy's own log-probabilities, perturbed by `by`.
fn batch_moved(plan: &RunPlan, policy: &Pi0, trajectories: &[Trajectory], by: f64) -> RolloutBatch {
    let mut batch = RolloutBatch::new(plan, trajectories.to_vec(), 0, &OneRank).expect("records");
    let _guard = tch::no_grad_guard();
    let (cache, _) = batch.observations.frozen_prefix(policy, 64).expect("prefix");
    let table = StepTable::of(&plan.sampling(0), plan.dims.expert.width, Device::Cpu);
    let (record, step) = (Tensor::from_slice(&batch.record), batch.step.view(-1));
    let (x, x_next) = (
        batch.chain.index(&[Some(&record), Some(&step)]),
        batch.chain.index(&[Some(&record), Some(&(&step + 1))]),
    );
    let inputs = TransitionBatch {
        state: Some(&batch.observations.state),
        x: &x,
        x_next: &x_next,
        step: &step,
    };
    let out = transition(policy, &table, &cache, inputs, executed(plan), true).expect("transition");
    let moved = Tensor::from_slice(&normal(77, out.logprob.numel())).view_as(&out.logprob) * by;
    batch.old_logprob = out.logprob + moved;
    batch
}

/// Returns the weights before and after one update, and the update's report.
fn update(plan: &RunPlan, change: impl FnOnce(&mut RolloutBatch)) -> (Vec<f32>, Vec<f32>, UpdateReport) {
    let policy = network(plan, 5);
    let mut batch = batch(plan, &policy, &records(plan));
    change(&mut batch);
    let before = weights(&policy);
    let report = Updater::new(plan, &policy, &OneRank)
        .expect("optimizer")
        .update(&batch, 0)
        .expect("update");
    (before, weights(&policy), report)
}

#[test]
fn the_size_of_a_micro_batch_changes_nothing() {
    for (reward, level) in [
        ("chunk_level", "chunk_level"),
        ("chunk_level", "token_level"),
        ("action_level", "action_level"),
    ] {
        for agg in ["mean", "episode_length"] {
            let keys = [
                format!("algorithm.reward_type={reward:?}"),
                format!("algorithm.logprob_type={level:?}"),
                format!("algorithm.loss_agg={agg:?}"),
                "actor.optim.lr=0.1".to_owned(),
                "actor.optim.value_lr=0.1".to_owned(),
                "algorithm.kl_beta=0.5".to_owned(),
            ];
            let run = |micro: &str| {
                let overrides: Vec<&str> = keys.iter().map(String::as_str).chain([micro]).collect();
                update(&plan("quickstart", &overrides), |_| {})
            };
            let (before, whole, report) = run("actor.micro_batch_size=64");
            let (_, parts, report_of_parts) = run("actor.micro_batch_size=3");
            let (moved, gap) = (largest_gap(&before, &whole), largest_gap(&whole, &parts));
            // f32 gradients summed in another order, against steps of 1e-3 and more
            assert!(
                moved > 1e-3 && gap < 2e-5,
                "{level} {agg}: moved {moved:.1e}, gap {gap:.1e}"
            );
            let losses = (report.actor.policy_loss, report_of_parts.actor.policy_loss);
            assert!((losses.0 - losses.1).abs() < 1e-5, "{level} {agg}: {losses:?}");
            assert_eq!((report.updates, report_of_parts.updates, report.skipped), (1, 1, 0));
        }
    }
}

/// The means of entropies and of kept elements divide by the elements of the whole minibatch. Chunks are cut, so the parts of a minibatch
/// have other shares of elements than of rows.
#[test]
fn the_size_of_a_micro_batch_changes_nothing_with_a_bonus_or_dropped_elements() {
    let noise = [
        "actor.model.openpi.noise_method=\"flow_noise\"",
        "actor.model.openpi.noise_head={hidden=[16,8],std_range=[0.3,0.9]}",
        "algorithm.entropy_bonus=0.5",
    ];
    let decoupled = [
        "algorithm.loss_type=\"decoupled_actor_critic\"",
        "algorithm.behave_weight_threshold=1.02",
        "algorithm.kl_beta=0.5",
    ];
    let mut wrong = Vec::new();
    for (what, special) in [("entropy bonus", &noise), ("dropped elements", &decoupled)] {
        for level in ["chunk_level", "action_level", "token_level"] {
            for agg in ["mean", "episode_length"] {
                let keys = [
                    format!("algorithm.logprob_type={level:?}"),
                    format!("algorithm.loss_agg={agg:?}"),
                    "actor.optim.lr=0.1".to_owned(),
                    "actor.optim.value_lr=0.1".to_owned(),
                ];
                let run = |micro: &str| {
                    let keys = keys.iter().map(String::as_str).chain([micro]);
                    let overrides: Vec<&str> = special.iter().copied().chain(keys).collect();
                    update(&plan("quickstart", &overrides), |batch| {
                        // proximal policies two thirds of the way from the acting policies
                        batch.trained_version += 2;
                    })
                };
                let (before, whole, report) = run("actor.micro_batch_size=64");
                let (_, parts, report_of_parts) = run("actor.micro_batch_size=3");
                let (moved, gap) = (largest_gap(&before, &whole), largest_gap(&whole, &parts));
                let dropped = report.actor.behaviour_clip_fraction;
                assert_eq!(what == "dropped elements", dropped > 0.0, "{level} {agg}: {dropped}");
                let metrics = [
                    report.actor.policy_loss - report_of_parts.actor.policy_loss,
                    report.entropy - report_of_parts.entropy,
                ];
                // as above
                if moved < 1e-3 || gap > 2e-5 || metrics.iter().any(|gap| gap.abs() > 1e-5) {
                    wrong.push(format!(
                        "{what} {level} {agg}: moved {moved:.1e}, gap {gap:.1e}, metrics {metrics:?}"
                    ));
                }
            }
        }
    }
    assert!(wrong.is_empty(), "{wrong:#?}");
}

/// Flow times and noise belong to the sample, so a loss on the velocity does not depend on the split of a minibatch.
#[test]
fn the_size_of_a_micro_batch_changes_nothing_without_likelihood() {
    for recipe in ["tabletop_flow_ipo", "tabletop_nft"] {
        let run = |micro: &str| {
            let sde = "actor.model.openpi.noise_method=\"flow_sde\"";
            update(&plan(recipe, &["actor.optim.lr=0.1", sde, micro]), |_| {})
        };
        let (before, whole, report) = run("actor.micro_batch_size=64");
        let (_, parts, report_of_parts) = run("actor.micro_batch_size=3");
        let (moved, gap) = (largest_gap(&before, &whole), largest_gap(&whole, &parts));
        // as above
        assert!(moved > 1e-3 && gap < 2e-5, "{recipe}: moved {moved:.1e}, gap {gap:.1e}");
        let losses = (report.actor.policy_loss, report_of_parts.actor.policy_loss);
        assert!(
            losses.0 > 0.0 && (losses.0 - losses.1).abs() < 1e-5,
            "{recipe}: {losses:?}"
        );
    }
}

/// Actions that the environment did not execute are not in a loss on the velocity.
#[test]
fn rows_that_were_not_executed_do_not_count_without_likelihood() {
    let plan = plan("tabletop_nft", &["actor.optim.lr=0.1"]);
    let executing = |most: usize| {
        let (_, after, report) = update(&plan, |batch| {
            batch.executed.iter_mut().for_each(|count| *count = (*count).min(most));
        });
        (after, report.actor.policy_loss)
    };
    let (whole, loss) = executing(usize::MAX);
    let (short, _) = executing(1);
    let (_, nothing) = executing(0);
    assert!(loss > 0.0 && nothing.abs() < f64::EPSILON, "{loss} {nothing}");
    assert!(
        largest_gap(&whole, &short) > 1e-4,
        "fewer executed rows are another loss"
    );
}

/// If a step were taken, weight decay alone would change the weights.
#[test]
fn an_iteration_that_teaches_nothing_takes_no_step() {
    let grpo = plan("tabletop_grpo", &["actor.optim.weight_decay=0.1"]);
    let policy = network(&grpo, 5);
    let before = weights(&policy);
    let mut updater = Updater::new(&grpo, &policy, &OneRank).expect("optimizer");
    let solved: &[&[f32]] = &[FULL, LATE];
    let constant = trajectories(&grpo, &[solved, solved, &[CUT], &[FULL]]);
    for (trajectories, records) in [(&constant[..], 6), (&[][..], 0)] {
        let batch = RolloutBatch::new(&grpo, trajectories.to_vec(), 0, &OneRank).expect("records");
        let report = updater.update(&batch, 0).expect("update");
        assert_eq!((report.records, report.updates, report.skipped), (records, 0, 0));
        assert!(weights(&policy) == before, "bit for bit");
    }
    // one success in a group is enough
    let mixed = trajectories(&grpo, &[solved, &[FULL], &[CUT], &[FULL]]);
    let batch = batch(&grpo, &policy, &mixed);
    assert_eq!(updater.update(&batch, 0).expect("update").updates, 1);
    assert!(weights(&policy) != before);
}

#[test]
fn a_gradient_that_is_not_finite_is_skipped_and_counted() {
    let plan = plan(
        "tabletop_grpo",
        &["actor.micro_batch_size=3", "actor.optim.weight_decay=0.1"],
    );
    let (before, after, report) = update(&plan, |batch| {
        batch.advantages = &batch.advantages * f64::INFINITY;
    });
    assert!(before == after, "bit for bit");
    assert_eq!((report.updates, report.skipped, report.grad_norm), (0, 1, 0.0));
}

/// The critic's gradient is separate: if it is not finite, the actor still takes its step.
#[test]
fn a_gradient_of_the_critic_that_is_not_finite_is_skipped_and_counted() {
    let plan = plan("quickstart", &["actor.optim.lr=0.1", "actor.optim.weight_decay=0.1"]);
    let policy = network(&plan, 5);
    let mut batch = batch(&plan, &policy, &records(&plan));
    batch.returns = &batch.returns * f64::NAN;
    let export = |part| {
        policy
            .store()
            .export(part)
            .into_iter()
            .map(|(_, _, data)| data)
            .collect::<Vec<_>>()
    };
    let (head, expert) = (export(Part::ValueHead), export(Part::Expert));
    let mut updater = Updater::new(&plan, &policy, &OneRank).expect("optimizer");
    let report = updater.update(&batch, 0).expect("update");
    assert_eq!((report.updates, report.skipped), (1, 1));
    assert!(head == export(Part::ValueHead), "bit for bit");
    assert!(expert != export(Part::Expert));
    let (actor, critic) = updater.optimizers();
    let critic = critic.expect("a critic");
    assert_eq!(
        (
            actor.updates(),
            critic.updates(),
            critic.state()["skipped"].int64_value(&[])
        ),
        (1, 0, 1)
    );
}

#[test]
fn a_gradient_of_a_velocity_loss_that_is_not_finite_is_skipped_and_counted() {
    for recipe in ["tabletop_flow_ipo", "tabletop_nft"] {
        let sde = "actor.model.openpi.noise_method=\"flow_sde\"";
        let plan = plan(
            recipe,
            &["actor.micro_batch_size=3", "actor.optim.weight_decay=0.1", sde],
        );
        let (before, after, report) = update(&plan, |batch| {
            // an executed action of one record
            drop(batch.chain.get(2).get(-1).get(0).narrow(0, 0, 1).fill_(f64::NAN));
        });
        assert!(before == after, "{recipe}: bit for bit");
        assert_eq!(
            (report.updates, report.skipped, report.grad_norm),
            (0, 1, 0.0),
            "{recipe}"
        );
    }
}

/// The divergence is measured before a step. A step beyond the bound is not taken, nor any later step.
#[test]
fn target_kl_ends_the_iteration_before_the_step_that_would_go_too_far() {
    let run = |keys: &[&str], epochs: u32| {
        let epochs = format!("algorithm.update_epoch={epochs}");
        let plan = plan(
            "quickstart",
            &[&["actor.optim.lr=0.001", epochs.as_str()], keys].concat(),
        );
        let policy = network(&plan, 5);
        // the acting policy is the trained policy, so the first minibatch has no divergence
        let batch = batch_moved(&plan, &policy, &records(&plan), 0.0);
        let mut updater = Updater::new(&plan, &policy, &OneRank).expect("optimizer");
        let report = updater.update(&batch, 0).expect("update");
        let expert = policy.store().export(Part::Expert);
        (
            report,
            expert.into_iter().flat_map(|(_, _, data)| data).collect::<Vec<f32>>(),
        )
    };
    let (free, _) = run(&[], 6);
    assert_eq!((free.updates, free.stopped_early), (6, false), "{free:?}");
    // the divergences before the first, second, ... step; the same run gives the same bits, so a bound fits between two divergences
    let after: Vec<f64> = (1..=6).map(|epochs| run(&[], epochs).0.last_kl).collect();
    assert!(after[0] < 1e-9 && after.is_sorted() && after[3] > after[2], "{after:?}");
    let bound = format!("algorithm.target_kl={}", f64::midpoint(after[2], after[3]));
    let (stopped, weights) = run(&[&bound], 6);
    assert!(
        stopped.stopped_early && stopped.updates == 3,
        "{after:?} {bound}: {stopped:?}"
    );
    assert!((stopped.last_kl - after[3]).abs() < 1e-12, "{after:?}: {stopped:?}");
    let (_, of_three) = run(&[], 3);
    assert!(weights == of_three, "bit for bit");
    let (above, _) = run(&["algorithm.target_kl=1e9"], 6);
    assert_eq!((above.updates, above.stopped_early), (6, false));
}

/// The critic keeps its Adam moments when its warm-up ends. The critic's weights equal those of an endless warm-up, because its input is
/// the frozen prefix and its gradient stops at the head.
#[test]
fn the_critics_moments_survive_its_warm_up() {
    let run = |warm_up: u32| {
        let key = format!("actor.optim.critic_warmup_epochs={warm_up}");
        let plan = plan(
            "quickstart",
            &["actor.optim.eps=1e-8", &key, "algorithm.update_epoch=3"],
        );
        let policy = network(&plan, 5);
        let batch = batch(&plan, &policy, &records(&plan));
        let mut updater = Updater::new(&plan, &policy, &OneRank).expect("optimizer");
        let mut states = Vec::new();
        let mut actor_updates = 0;
        for iteration in 0..3 {
            actor_updates += updater.update(&batch, iteration).expect("update").updates;
            states.push(updater.optimizers().1.expect("a critic").state());
        }
        (states, actor_updates)
    };
    let (ended, of_actor) = run(1);
    let (warming, none) = run(3);
    assert_eq!((of_actor, none), (6, 0));
    for (iteration, (a, b)) in ended.iter().zip(&warming).enumerate() {
        assert!(!a.is_empty() && a.keys().eq(b.keys()));
        for (name, tensor) in a {
            assert!(tensor.equal(&b[name]), "iteration {iteration}, {name}: bit for bit");
        }
    }
    let zero = |state: &BTreeMap<String, Tensor>| state.values().all(|t| t.abs().max().double_value(&[]) == 0.0);
    assert!(!zero(&ended[0]), "there were moments to keep");
    assert!(
        ended[0].iter().any(|(name, tensor)| !tensor.equal(&ended[1][name])),
        "and they moved on"
    );
}

/// With records of the current version the proximal policy is the acting policy, and decoupled PPO equals PPO. With older records the clip
/// is around an intermediate policy, so decoupled PPO still learns where PPO's ratio is clipped.
#[test]
fn decoupled_ppo_is_ppo_on_policy_and_clips_later_off_policy() {
    let common = ["actor.optim.lr=0.1"];
    let decoupled = [
        "actor.optim.lr=0.1",
        "algorithm.loss_type=\"decoupled_actor_critic\"",
        "algorithm.behave_weight_threshold=2.0",
    ];
    let run = |overrides: &[&str], lag: u64| {
        let (_, after, report) = update(&plan("quickstart", overrides), |batch| {
            // log-ratios of about 12 * 0.03: ratios of 1.43 and more against a clip at 1.2
            batch.old_logprob = &batch.old_logprob - 0.03;
            // the records are of version 0; the weights in training have changed
            batch.trained_version += lag;
        });
        (after, report.actor)
    };
    let (ppo, metrics) = run(&common, 0);
    let (on_policy, of_decoupled) = run(&decoupled, 0);
    assert!(ppo == on_policy, "bit for bit");
    assert!(metrics.clip_fraction > 0.0 && of_decoupled.behaviour_clip_fraction < f64::EPSILON);
    // two versions late the proximal policy is two thirds of the way: ratios of about e^0.12
    let (off_policy, metrics_off_policy) = run(&decoupled, 2);
    assert!(ppo != off_policy);
    assert!(
        metrics_off_policy.clip_fraction < metrics.clip_fraction,
        "{metrics_off_policy:?}"
    );
}

/// Rows that were never executed are not in losses per action; one ratio per chunk covers the whole chunk.
#[test]
fn rows_that_were_not_executed_do_not_count_per_action() {
    for (level, counts) in [("token_level", false), ("action_level", false), ("chunk_level", true)] {
        let key = format!("algorithm.logprob_type={level:?}");
        let plan = plan("quickstart", &[key.as_str()]);
        let (_, plain, _) = update(&plan, |_| {});
        let (_, spoilt, _) = update(&plan, |batch| {
            // the fifth record is the last of its episode, cut after the first action
            let rows = batch.old_logprob.size()[1];
            assert_eq!(batch.valid.len(), 8);
            let last = batch.old_logprob.get(4);
            drop(last.narrow(0, 1, rows - 1).fill_(-3.0));
        });
        assert_eq!(plain != spoilt, counts, "{level}");
    }
}

#[test]
fn advantages_have_the_level_of_the_rewards() {
    let keys = [
        "algorithm.reward_type=\"action_level\"",
        "algorithm.logprob_type=\"action_level\"",
        "algorithm.normalize_advantages=false",
    ];
    let plan = plan("quickstart", &keys);
    let batch = RolloutBatch::new(&plan, records(&plan), 0, &OneRank).expect("records");
    let rows = plan.config.actor.model.num_action_chunks as i64;
    assert_eq!(batch.advantages.size(), [8, rows]);
    assert_eq!(batch.valid, [4, 2, 4, 4, 1, 2, 4, 4]);
    let row = |at: i64| Vec::<f32>::try_from(batch.advantages.get(at)).expect("floats");
    // values 0.1 everywhere, the reward 1 with the second action; gamma 0.99 per action
    let want = [0.99 - 0.1, 1.0 - 0.1, 0.0, 0.0];
    assert!(largest_gap(&row(1), &want) < 1e-6, "{:?}", row(1));
    let mask = Vec::<f32>::try_from(batch.mask.get(1).to_kind(Kind::Float)).expect("floats");
    assert_eq!(mask, [1.0, 1.0, 0.0, 0.0]);
    let lengths = Vec::<f32>::try_from(&batch.policy_episodes.len).expect("floats");
    assert_eq!(lengths, [6.0, 6.0, 9.0, 9.0, 9.0, 2.0, 8.0, 8.0]);
    assert!((batch.policy_episodes.steps - 8.0).abs() < 1e-9 && (batch.value_episodes.steps - 2.0).abs() < 1e-9);
}

#[test]
fn the_last_observation_is_worth_what_the_bootstrap_type_says() {
    let first_advantage = |bootstrap: &str, terminated: bool, value: Option<f32>| {
        let key = format!("algorithm.bootstrap_type={bootstrap:?}");
        let plan = plan("quickstart", &[key.as_str(), "algorithm.normalize_advantages=false"]);
        let mut episodes = trajectories(&plan, &[&[FULL]]);
        (episodes[0].terminated, episodes[0].final_value) = (terminated, value);
        RolloutBatch::new(&plan, episodes, 0, &OneRank).map(|batch| batch.advantages.double_value(&[0]))
    };
    let with = 0.99 * 5.0 - 0.1;
    for (bootstrap, terminated, want) in [
        ("none", true, -0.1),
        ("none", false, -0.1),
        ("truncation", true, -0.1),
        ("truncation", false, with),
        ("always", true, with),
        ("always", false, with),
    ] {
        let got = first_advantage(bootstrap, terminated, Some(5.0)).expect("records");
        assert!(
            (got - want).abs() < 1e-6,
            "{bootstrap} {terminated}: {got} against {want}"
        );
    }
    let error = told(&first_advantage("always", true, None).expect_err("no value"));
    assert!(
        error.contains("terminated") && error.contains("bootstrap_type"),
        "{error}"
    );
}

#[test]
fn a_short_chunk_inside_an_episode_is_refused() {
    let plan = plan("quickstart", &[]);
    let refused = RolloutBatch::new(&plan, trajectories(&plan, &[&[LATE, FULL]]), 0, &OneRank);
    let error = told(&refused.expect_err("refused"));
    assert!(error.contains("chunk 0 has 2 rewards, expected 4"), "{error}");
}

#[test]
fn the_learning_rate_rises_over_updates_and_falls_over_iterations() {
    let plan = plan(
        "quickstart",
        &[
            "runner.max_epochs=2",
            "actor.optim.lr=0.1",
            "actor.optim.lr_warmup_steps=4",
            "actor.optim.min_lr_ratio=0.5",
        ],
    );
    let policy = network(&plan, 5);
    let batch = batch(&plan, &policy, &records(&plan));
    let mut updater = Updater::new(&plan, &policy, &OneRank).expect("optimizer");
    // one update per iteration: fifths of the warm-up, then the cosine over two iterations half way down to a half
    for (iteration, lr) in [(0, 0.1 / 5.0), (1, 0.1 * 2.0 / 5.0 * 0.75)] {
        let report = updater.update(&batch, iteration).expect("update");
        assert_eq!(report.updates, 1);
        assert!((report.lr - lr).abs() < 1e-12, "{} against {lr}", report.lr);
    }
}

#[test]
fn the_actor_is_clipped_by_its_own_norm() {
    let plan = plan("quickstart", &["algorithm.huber_delta=1000.0"]);
    let norms = [0.0, 100.0].map(|shift| {
        let policy = network(&plan, 5);
        let mut batch = batch(&plan, &policy, &records(&plan));
        batch.returns = &batch.returns + shift;
        let mut updater = Updater::new(&plan, &policy, &OneRank).expect("optimizer");
        let report = updater.update(&batch, 0).expect("update");
        (report.grad_norm.to_bits(), report.value_loss)
    });
    assert_eq!(norms[0].0, norms[1].0, "the critic's error is no part of it");
    assert!(norms[1].1 > 100.0 * norms[0].1);
}

/// Against a reference the penalty is 0 at the start of RL, and later `mean(r - 1 - log r)` with `r` the ratio of reference to policy.
#[test]
fn a_kl_penalty_is_against_its_reference() {
    let overrides = |reference: &str| {
        [
            "algorithm.kl_beta=0.5".to_owned(),
            format!("algorithm.kl_reference={reference}"),
            "actor.optim.lr=0.05".to_owned(),
        ]
    };
    for (reference, moves) in [("{kind=\"frozen\"}", false), ("{kind=\"ema\",decay=0.0}", true)] {
        let overrides = overrides(reference);
        let plan = plan("tabletop_grpo", &overrides.each_ref().map(String::as_str));
        let (policy, begun) = (network(&plan, 5), network(&plan, 5));
        let records = records(&plan);
        let batch = batch(&plan, &policy, &records);
        let mut updater = Updater::new(&plan, &policy, &OneRank).expect("optimizer");
        let first = updater.update(&batch, 0).expect("update");
        assert!(first.actor.kl_penalty.abs() < 1e-12, "{}", first.actor.kl_penalty);

        let logprob = |policy: &Pi0| batch_moved(&plan, policy, &records, 0.0).old_logprob;
        let of_chunks = |policy: &Pi0| logprob(policy).sum_dim_intlist([1i64, 2].as_slice(), false, Kind::Double);
        let ratio = of_chunks(&begun) - of_chunks(&policy);
        let want = (ratio.exp() - 1.0 - &ratio).mean(Kind::Double).double_value(&[]);
        assert!(want > 1e-6, "the policy has moved: {want}");
        let second = updater.update(&batch, 1).expect("update").actor.kl_penalty;
        // a mean without memory equals the policy
        let want = if moves { 0.0 } else { want };
        // f32 log-probabilities of some 12 elements, in another order
        assert!(
            (second - want).abs() < 1e-4 * want.max(1e-2),
            "{reference}: {second} against {want}"
        );
    }
}
