//! Advantage estimators.

use learner::{
    advantage::{AdvantageError, Episode, EstimatorSettings, NORMALIZE_EPS, estimator, normalize},
    loss::k3,
    ranks::OneRank,
};

use super::{
    Case, Coverage, floats,
    grid::{Layout, Recorded, episodes, of_scores},
    run,
};

fn check_gae(case: &Case<'_>, coverage: &mut Coverage) {
    let rewards = case.array("in.rewards");
    let layout = Layout::of(&rewards);
    let dones = case.array("in.dones").bool();
    let mask = case.maybe("in.loss_mask").map(|mask| mask.bool());
    let values = case.maybe("in.values").map(|values| values.f32());
    // without a critic the reference sums the rewards to go, whatever its discounts are
    let (name, gamma, gae_lambda) = if values.is_some() {
        ("gae", case.need("gamma"), case.need("gae_lambda"))
    } else {
        ("reinforce_pp", 1.0, 1.0)
    };
    let recorded = Recorded {
        layout,
        rewards: &rewards.f32(),
        values: values.as_deref().unwrap_or_default(),
        group_size: 1,
    };
    let spans = episodes(layout, &dones);
    let settings = EstimatorSettings { gamma, gae_lambda };
    let mut ours = recorded.estimate(name, settings, &spans).unwrap();
    if case.flag("normalize_advantages").unwrap_or(true) {
        normalize(&mut ours.advantages, mask.as_deref(), &OneRank).unwrap();
    }
    if case.flag("normalize_returns").unwrap_or(false) {
        normalize(&mut ours.returns, mask.as_deref(), &OneRank).unwrap();
    }
    case.close_array("out.returns", &ours.returns);
    let recorded = case.array("out.advantages");
    if mask
        .as_ref()
        .is_some_and(|mask| mask.iter().filter(|valid| **valid).count() == 1)
    {
        assert!(
            recorded.data.iter().all(|value| value.is_nan()),
            "{}: the reference's NaN",
            case.id
        );
        assert!(ours.advantages.iter().all(|value| value.is_finite()));
        coverage.differs(
            case,
            "one valid entry has no spread: the reference turns all advantages into NaN, ours stay as they are",
        );
    } else {
        case.close_array("out.advantages", &ours.advantages);
    }
}

fn check_grpo(case: &Case<'_>, coverage: &mut Coverage) {
    let scores = case.array("in.rewards").f32();
    let group_size = case.need("group_size") as usize;
    match of_scores("grpo", &scores, &case.array("in.loss_mask"), group_size) {
        Ok(advantages) => case.close_array("out.advantages", &advantages),
        Err(AdvantageError::LonelyEpisode { .. }) => {
            assert!(group_size < 2);
            assert!(case.array("out.advantages").data.iter().any(|value| value.is_nan()));
            coverage.differs(
                case,
                "a group of 1 has no spread: the reference gives NaN, ours is an error",
            );
        }
        Err(other) => panic!("{}: {other}", case.id),
    }
}

/// Reproduces the reference's `reinpp` from its cause. The reward's step is the mirrored environment's first valid step, the penalty is
/// clamped at 10, and the normalization divides by the biased deviation.
fn reference_reinpp(layout: Layout, rewards: &[f32], mask: &[bool], penalty: &[f64]) -> Vec<f32> {
    let mut to_go = vec![0.0f64; layout.len()];
    for (env, reward) in rewards.iter().enumerate() {
        let mirrored = layout.envs - 1 - env;
        let first = (0..layout.steps)
            .find(|step| mask[step * layout.envs + mirrored])
            .unwrap_or(0);
        let rewarded = layout.steps - 1 - first;
        let mut sum = 0.0;
        for step in (0..layout.steps).rev() {
            let at = step * layout.envs + env;
            sum += if step == rewarded { f64::from(*reward) } else { 0.0 } - penalty[at];
            to_go[at] = sum;
        }
    }
    let valid = || {
        to_go
            .iter()
            .zip(mask)
            .filter(|(_, valid)| **valid)
            .map(|(value, _)| *value)
    };
    let count = valid().count() as f64;
    let mean = valid().sum::<f64>() / count;
    let variance = valid().map(|value| (value - mean).powi(2)).sum::<f64>() / count;
    to_go
        .iter()
        .map(|value| ((value - mean) / variance.max(1e-8).sqrt()) as f32)
        .collect()
}

/// Checks REINFORCE++ of the paper: the reward to go, with the reward at the end of the sample's own valid steps, less the penalty.
/// Advantages are normalized over the batch by the unbiased deviation. The reference's defects are stated with both numbers.
fn check_reinpp(case: &Case<'_>, coverage: &mut Coverage) {
    let mask_array = case.array("in.loss_mask");
    let (layout, mask) = (Layout::of(&mask_array), mask_array.bool());
    let mut rewards = case.array("in.rewards").f32();
    let penalty: Vec<f64> = match case.number("kl_beta") {
        None => vec![0.0; layout.len()],
        Some(beta) => {
            let log_ratio = case.input("ref_logprob") - case.input("logprob");
            floats(&k3(&log_ratio)).iter().map(|kl| beta * f64::from(*kl)).collect()
        }
    };
    let baseline = case.flag("use_reinpp_baseline") == Some(true);
    let name = if baseline {
        "reinforce_pp_baseline"
    } else {
        "reinforce_pp"
    };
    if !baseline {
        let most = 10.0 * case.number("kl_beta").unwrap_or(0.0);
        let clamped: Vec<f64> = penalty.iter().map(|kl| kl.min(most)).collect();
        case.close_array("out.advantages", &reference_reinpp(layout, &rewards, &mask, &clamped));
    }

    let steps = |env: usize| {
        (0..layout.steps)
            .map(move |step| step * layout.envs + env)
            .filter(|at| mask[*at])
    };
    let columns: Vec<Vec<f32>> = (0..layout.envs)
        .map(|env| {
            let mut column: Vec<f32> = steps(env).map(|at| -penalty[at] as f32).collect();
            *column.last_mut().expect("a valid step") += rewards[env];
            column
        })
        .collect();
    let group_size = case.need("group_size") as usize;
    let episodes: Vec<Episode<'_>> = columns
        .iter()
        .enumerate()
        .map(|(env, rewards)| Episode {
            rewards,
            chunk_len: 1,
            values: &[],
            final_value: 0.0,
            group: (env / group_size) as u64,
        })
        .collect();
    let settings = EstimatorSettings {
        gamma: 1.0,
        gae_lambda: 1.0,
    };
    let estimated = estimator(name).unwrap()(&episodes, settings).unwrap();
    let mut ours: Vec<f32> = estimated.iter().flat_map(|a| a.advantages.clone()).collect();
    normalize(&mut ours, None, &OneRank).unwrap();

    // plain loop
    if baseline {
        for group in rewards.chunks_mut(group_size) {
            let mean = group.iter().sum::<f32>() / group_size as f32;
            for reward in group {
                *reward -= mean;
            }
        }
    }
    let to_go: Vec<f64> = (0..layout.envs)
        .flat_map(|env| {
            let at: Vec<usize> = steps(env).collect();
            (0..at.len())
                .map(|step| f64::from(rewards[env]) - at[step..].iter().map(|at| penalty[*at]).sum::<f64>())
                .collect::<Vec<_>>()
        })
        .collect();
    let mean = to_go.iter().sum::<f64>() / to_go.len() as f64;
    let variance = to_go.iter().map(|value| (value - mean).powi(2)).sum::<f64>() / (to_go.len() - 1) as f64;
    for (got, value) in ours.iter().zip(&to_go) {
        case.close(
            name,
            f64::from(*got),
            (value - mean) / (variance.sqrt() + NORMALIZE_EPS),
        );
    }
    let first = ours[0];
    if baseline {
        assert!(!case.has("out.advantages"));
        coverage.differs(
            case,
            &format!("the reference fails with an IndexError, ours of the first sample is {first:.4}"),
        );
    } else {
        let recorded = case.array("out.advantages").data[steps(0).next().expect("a valid step")];
        coverage.differs(
            case,
            &format!(
                "the reference takes a sample's last step from another one and divides by the biased deviation: \
                 {recorded:.4} in the first sample's first step, ours {first:.4}"
            ),
        );
    }
}

#[test]
fn advantages_agree_with_the_reference() {
    run(
        "rlinf_advantages",
        // for multi-turn agents, video generators, distillation from a teacher
        &["grpo_dynamic", "grpo_video", "opd"],
        |case, coverage| {
            let name = case.spec["fn"]
                .as_str()
                .unwrap()
                .trim_start_matches("get_adv_and_returns('")
                .trim_end_matches("')");
            match name {
                "gae" => check_gae(case, coverage),
                "grpo" => check_grpo(case, coverage),
                "raw" => {
                    let mask = case.array("in.loss_mask");
                    let mut advantages = of_scores(name, &case.array("in.rewards").f32(), &mask, 1).unwrap();
                    if case.flag("normalize_advantages").unwrap_or(true) {
                        normalize(&mut advantages, Some(&mask.bool()), &OneRank).unwrap();
                    }
                    case.close_array("out.advantages", &advantages);
                }
                "reinpp" => check_reinpp(case, coverage),
                "grpo_video" | "grpo_dynamic" | "opd" => {
                    assert!(estimator(name).is_none(), "{name} is offered: test it");
                    coverage.not_offered(case, name);
                }
                other => panic!("unknown function {other}"),
            }
        },
    );
}
