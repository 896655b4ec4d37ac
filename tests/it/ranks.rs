//! Two ranks, each with a part of the episodes, make the same update as one rank with all episodes.

use std::sync::mpsc::{Receiver, Sender, channel};

use learner::{
    batch::RolloutBatch,
    model::Pi0,
    ranks::{OneRank, Ranks, RanksError},
    update::{UpdateReport, Updater},
};
use policy::{
    noise::{Purpose, fill_normal, stream},
    params::Part,
    plan::RunPlan,
};
use tch::{Tensor, no_grad};
use wire::messages::Trajectory;

use crate::common::{SMALL_NETWORK, acted, largest_gap, network, recipe, weights};

/// One of two ranks in one process. If one rank ends, the other ends with an error.
#[derive(Debug)]
struct TwoRanks {
    rank: usize,
    to_other: Sender<Vec<Tensor>>,
    from_other: Receiver<Vec<Tensor>>,
}

fn two_ranks() -> [TwoRanks; 2] {
    let (to_first, from_second) = channel();
    let (to_second, from_first) = channel();
    [(0, to_second, from_second), (1, to_first, from_first)].map(|(rank, to_other, from_other)| TwoRanks {
        rank,
        to_other,
        from_other,
    })
}

impl TwoRanks {
    /// Sends these tensors to the other rank and returns the other rank's tensors.
    fn exchange(&self, operation: &'static str, tensors: &[Tensor]) -> Result<Vec<Tensor>, RanksError> {
        let gone = |source: Box<dyn std::error::Error + Send + Sync>| RanksError {
            operation,
            size: 2,
            source,
        };
        let copies = tensors.iter().map(|tensor| tensor.detach().copy()).collect();
        self.to_other
            .send(copies)
            .map_err(|error| gone(error.to_string().into()))?;
        let others = self.from_other.recv().map_err(|error| gone(error.into()))?;
        let layout = |tensors: &[Tensor]| tensors.iter().map(|t| (t.size(), t.kind())).collect::<Vec<_>>();
        assert_eq!(
            layout(tensors),
            layout(&others),
            "{operation}: the ranks gave other tensors"
        );
        Ok(others)
    }
}

impl Ranks for TwoRanks {
    fn rank(&self) -> usize {
        self.rank
    }

    fn size(&self) -> usize {
        2
    }

    fn sum(&self, tensors: &mut [Tensor]) -> Result<(), RanksError> {
        let others = self.exchange("sum", tensors)?;
        for (own, other) in tensors.iter_mut().zip(&others) {
            let sum = no_grad(|| &*own + other);
            no_grad(|| own.copy_(&sum));
        }
        Ok(())
    }

    fn broadcast(&self, tensors: &mut [Tensor], root: usize) -> Result<(), RanksError> {
        let others = self.exchange("broadcast", tensors)?;
        if self.rank != root {
            for (own, other) in tensors.iter_mut().zip(&others) {
                no_grad(|| own.copy_(other));
            }
        }
        Ok(())
    }
}

/// Overrides for one minibatch per epoch on every rank, and for an Adam with steps smooth in the gradient, so that rounding is not
/// amplified.
const COMMON: [&str; 9] = [
    "actor.global_batch_size=64",
    "actor.micro_batch_size=2",
    "actor.optim.eps=1.0",
    "actor.optim.lr=0.1",
    "actor.optim.value_lr=0.1",
    "actor.optim.lr_warmup_steps=0",
    "actor.optim.critic_warmup_epochs=0",
    "algorithm.update_epoch=3",
    "runner.max_epochs=4",
];

fn plan(config: &str, overrides: &[&str]) -> RunPlan {
    recipe(config, &[&SMALL_NETWORK[..], &COMMON, overrides].concat())
}

/// Chunks of four episodes in two groups of two; one episode of the second group succeeds.
const EPISODES: [&[u32]; 4] = [&[0, 1], &[2, 3, 4], &[5], &[6, 7]];

/// Returns the policy's episodes, three of which end inside a chunk: 5 records in the first group, 3 in the second.
fn episodes(plan: &RunPlan, policy: &Pi0) -> Vec<Trajectory> {
    let full = plan.config.actor.model.num_action_chunks;
    let pay = |chunk: u32| {
        let executed = match chunk {
            1 | 5 => 2,
            4 => 1,
            _ => full,
        };
        let mut rewards = vec![0.0; executed];
        rewards[executed - 1] = [0.0, 1.0, 0.0, 0.25, 0.0, 0.0, 0.0, 0.5][chunk as usize];
        (rewards, matches!(chunk, 0 | 6))
    };
    let acted = acted(plan, policy, 8, 0, &pay);
    let episode = |(index, chunks): (usize, &&[u32])| {
        let mut episode = acted[chunks[0] as usize].clone();
        episode.reset.reset_state = Some(index as u64 / 2);
        episode.chunks = chunks
            .iter()
            .flat_map(|chunk| acted[*chunk as usize].chunks.clone())
            .collect();
        episode
    };
    EPISODES.iter().enumerate().map(episode).collect()
}

/// Change of a rank's batch before the update.
type Change = fn(&mut RolloutBatch, usize);

/// Perturbs the recorded log-probabilities, so that ratios are clipped; a sample's perturbation is the same on any rank.
fn moved(batch: &mut RolloutBatch, _rank: usize) {
    let elements = batch.old_logprob.numel() / batch.len().max(1);
    let mut noise = vec![0.0f32; batch.old_logprob.numel()];
    for (sample, noise) in noise.chunks_mut(elements.max(1)).enumerate() {
        let number = (batch.whole.samples_before + sample) as u64;
        fill_normal(&mut stream(Purpose::Init, 31, number, 0, 0), noise);
    }
    batch.old_logprob = &batch.old_logprob + Tensor::from_slice(&noise).view_as(&batch.old_logprob) * 0.03;
}

/// Result of two iterations on the same episodes.
struct Outcome {
    before: Vec<f32>,
    after: Vec<f32>,
    reports: [UpdateReport; 2],
}

fn train(plan: &RunPlan, ranks: &dyn Ranks, episodes: Vec<Trajectory>, change: Change) -> Outcome {
    let policy = network(plan, 5);
    let before = weights(&policy);
    if ranks.rank() > 0 {
        // the other ranks must receive the first rank's weights
        for (_, tensor) in [Part::Expert, Part::NoiseHead, Part::ValueHead]
            .into_iter()
            .flat_map(|part| policy.store().part(part))
        {
            no_grad(|| drop(tensor.shallow_clone().g_add_scalar_(1.0)));
        }
    }
    let mut batch = RolloutBatch::new(plan, episodes, 0, ranks).expect("records");
    change(&mut batch, ranks.rank());
    let mut updater = Updater::new(plan, &policy, ranks).expect("optimizer");
    let reports = [0, 1].map(|iteration| updater.update(&batch, iteration).expect("update"));
    let after = weights(&policy);
    Outcome { before, after, reports }
}

/// Trains on two ranks, of which the first has the first `first` episodes.
fn train_on_two(plan: &RunPlan, mut episodes: Vec<Trajectory>, first: usize, change: Change) -> [Outcome; 2] {
    let later = episodes.split_off(first);
    let [zero, one] = two_ranks();
    std::thread::scope(|scope| {
        let one = scope.spawn(move || train(plan, &one, later, change));
        let zero = train(plan, &zero, episodes, change);
        [zero, one.join().expect("rank 1")]
    })
}

/// Returns the numbers of a report that are over all ranks.
fn numbers(report: &UpdateReport) -> Vec<(&'static str, f64)> {
    let actor = &report.actor;
    let mut numbers = vec![
        ("policy_loss", actor.policy_loss),
        ("kl_penalty", actor.kl_penalty),
        ("ratio", actor.ratio),
        ("ratio_deviation", actor.ratio_deviation),
        ("ratio_deviation_max", actor.ratio_deviation_max),
        ("approx_kl", actor.approx_kl),
        ("approx_kl_k1", actor.approx_kl_k1),
        ("clip_fraction", actor.clip_fraction),
        ("dual_clip_fraction", actor.dual_clip_fraction),
        ("behaviour_clip_fraction", actor.behaviour_clip_fraction),
        ("logprob_gap", report.logprob_gap),
        ("first_ratio_deviation", report.first_ratio_deviation),
        ("first_value_gap", report.first_value_gap),
        ("last_kl", report.last_kl),
        ("entropy", report.entropy),
        ("value_loss", report.value_loss),
        ("value_clip_fraction", report.value_clip_fraction),
        ("explained_variance", report.explained_variance),
        ("grad_norm", report.grad_norm),
        ("lr", report.lr),
        ("updates", report.updates as f64),
        ("skipped", report.skipped as f64),
        ("records", report.records as f64),
        ("stopped_early", f64::from(u8::from(report.stopped_early))),
    ];
    if let Some(credit) = report.credit {
        numbers.extend([("credit", credit.mean), ("displacement", credit.displacement)]);
    }
    numbers
}

/// Metrics whose means are over the elements that decoupled PPO does not drop. A part of a minibatch is weighted by its valid elements,
/// including dropped ones. So these means depend on the split of a minibatch into micro-batches and ranks.
const OF_KEPT: [&str; 4] = ["ratio", "ratio_deviation", "clip_fraction", "dual_clip_fraction"];

#[test]
fn two_ranks_do_the_update_of_one_with_all_episodes() {
    let flow_noise = [
        "actor.model.openpi.noise_method=\"flow_noise\"",
        "actor.model.openpi.noise_head={hidden=[16,8],std_range=[0.3,0.9]}",
        "algorithm.entropy_bonus=0.5",
        "algorithm.logprob_type=\"token_level\"",
    ];
    let by_action = [
        "algorithm.reward_type=\"action_level\"",
        "algorithm.logprob_type=\"action_level\"",
        "algorithm.loss_agg=\"episode_length\"",
        "algorithm.kl_beta=0.5",
        "algorithm.value_clip=0.01",
        "algorithm.clip_ratio_c=1.01",
    ];
    let decoupled = [
        "algorithm.loss_type=\"decoupled_actor_critic\"",
        "algorithm.behave_weight_threshold=1.02",
        "algorithm.logprob_type=\"action_level\"",
    ];
    let reference = [
        "algorithm.kl_beta=0.5",
        "algorithm.kl_reference={kind=\"ema\",decay=0.5}",
    ];
    let clip = ["algorithm.clip_ratio_low=0.02", "algorithm.clip_ratio_high=0.02"];
    let later: Change = |batch, rank| {
        moved(batch, rank);
        // proximal policies two thirds of the way from the acting policies
        batch.trained_version += 2;
    };
    let sde = ["actor.model.openpi.noise_method=\"flow_sde\""];
    let cases: [(&str, &[&str], Change); 8] = [
        ("quickstart", &[], moved),
        ("quickstart", &by_action, moved),
        ("quickstart", &flow_noise, moved),
        ("quickstart", &decoupled, later),
        ("tabletop_grpo", &reference, moved),
        ("tabletop_two_layer", &[], moved),
        ("tabletop_flow_ipo", &sde, moved),
        ("tabletop_nft", &sde, moved),
    ];
    for (config, keys, change) in cases {
        let velocity = config.ends_with("ipo") || config.ends_with("nft");
        let plan = plan(config, &[keys, if velocity { &[] } else { &clip[..] }].concat());
        let episodes = episodes(&plan, &network(&plan, 5));
        let what = format!("{config} {keys:?}");
        let whole = train(&plan, &OneRank, episodes.clone(), change);
        let [zero, one] = train_on_two(&plan, episodes, 2, change);
        assert!(zero.after == one.after, "{what}: both ranks have the same weights");
        let (moved, gap) = (
            largest_gap(&whole.before, &whole.after),
            largest_gap(&whole.after, &zero.after),
        );
        // f32 gradients summed in another order, against steps of 1e-3 and more
        assert!(moved > 1e-3 && gap < 2e-5, "{what}: moved {moved:.1e}, gap {gap:.1e}");
        for (at, want) in whole.reports.iter().enumerate() {
            let drops = want.actor.behaviour_clip_fraction > 0.0;
            assert_eq!(drops, keys == decoupled, "{what}: {want:?}");
            assert_eq!((want.updates, want.skipped, want.records), (3, 0, 8), "{what}");
            assert_eq!(want.actor.clip_fraction > 0.0, !velocity, "{what}: {want:?}");
            for rank in [&zero, &one] {
                for ((name, got), (_, want)) in numbers(&rank.reports[at]).into_iter().zip(numbers(want)) {
                    if drops && OF_KEPT.contains(&name) {
                        continue;
                    }
                    let same = (got - want).abs() < 1e-5 * want.abs().max(1.0) || (got.is_nan() && want.is_nan());
                    assert!(same, "{what}, iteration {at}: {name} {got} against {want}");
                }
            }
        }
    }
}

/// Each rank's part of the divergence is below the bound; only the sum is above.
#[test]
fn ranks_stop_together_at_target_kl() {
    let of = |keys: &[&str]| plan("quickstart", &[&["algorithm.update_epoch=6"], keys].concat());
    let run = |plan: &RunPlan| {
        let episodes = episodes(plan, &network(plan, 5));
        let whole = train(plan, &OneRank, episodes.clone(), |_, _| {});
        (whole, train_on_two(plan, episodes, 2, |_, _| {}))
    };
    let kl_of = |epochs: u32| {
        let plan = of(&[&format!("algorithm.update_epoch={epochs}")]);
        let episodes = episodes(&plan, &network(&plan, 5));
        train(&plan, &OneRank, episodes, |_, _| {}).reports[0].last_kl
    };
    let (third, fourth) = (kl_of(3), kl_of(4));
    assert!(third < fourth, "{third} {fourth}");
    let bound = format!("algorithm.target_kl={}", f64::midpoint(third, fourth));
    let (whole, ranks) = run(&of(&[&bound]));
    let first = &whole.reports[0];
    assert!(first.stopped_early && first.updates == 3, "{first:?}");
    for rank in &ranks {
        let report = &rank.reports[0];
        assert!(report.stopped_early && report.updates == 3, "{report:?}");
        assert!(largest_gap(&whole.after, &rank.after) < 2e-5);
    }
}

/// Ranks differ in the number of records, and a rank may have no record of a minibatch or of the iteration.
#[test]
fn a_rank_without_rows_steps_with_the_others() {
    let plan_of = |keys: &[&str]| plan("quickstart", keys);
    let plan = plan_of(&[]);
    let all = episodes(&plan, &network(&plan, 5));
    let whole = train(&plan, &OneRank, all.clone(), moved);
    let [zero, one] = train_on_two(&plan, all.clone(), 4, moved);
    assert!(zero.after == whole.after, "bit for bit: zeros were added");
    assert!(one.after == whole.after, "bit for bit");
    assert!(whole.before != whole.after);

    // three minibatches of 6 records: 5 on the first rank, 1 on the second
    let plan = plan_of(&["actor.global_batch_size=2"]);
    let [zero, one] = train_on_two(&plan, all.into_iter().take(3).collect(), 2, moved);
    assert!(zero.after == one.after && zero.before != zero.after);
    for rank in [&zero, &one] {
        for report in &rank.reports {
            assert_eq!((report.updates, report.skipped, report.records), (9, 0, 6));
        }
    }
    assert_eq!(
        zero.reports.each_ref().map(numbers),
        one.reports.each_ref().map(numbers)
    );
}

/// A non-finite gradient of one rank makes the gradient of all ranks non-finite.
#[test]
fn ranks_skip_a_step_together() {
    let plan = plan("tabletop_grpo", &["actor.optim.weight_decay=0.1"]);
    let spoilt: Change = |batch, rank| {
        if rank == 1 {
            batch.advantages = &batch.advantages * f64::INFINITY;
        }
    };
    for rank in train_on_two(&plan, episodes(&plan, &network(&plan, 5)), 2, spoilt) {
        for report in &rank.reports {
            assert_eq!((report.updates, report.skipped), (0, 3));
        }
        assert!(rank.before == rank.after, "bit for bit");
    }
}

/// Only the first group's episodes are equal, so the first rank trains on records that a rank alone would skip.
#[test]
fn a_rank_whose_own_records_teach_nothing_trains_with_the_others() {
    let plan = plan("tabletop_grpo", &[]);
    let mut episodes = episodes(&plan, &network(&plan, 5));
    for reward in episodes[..2]
        .iter_mut()
        .flat_map(|e| &mut e.chunks)
        .flat_map(|c| &mut c.rewards)
    {
        *reward = 0.0;
    }
    let alone = train(&plan, &OneRank, episodes[..2].to_vec(), moved);
    assert!(alone.before == alone.after);
    let whole = train(&plan, &OneRank, episodes.clone(), moved);
    for rank in train_on_two(&plan, episodes, 2, moved) {
        assert!(rank.before != rank.after && largest_gap(&whole.after, &rank.after) < 2e-5);
    }
}
