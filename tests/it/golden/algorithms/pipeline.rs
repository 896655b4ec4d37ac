//! The pipeline from recorded rollouts to advantages: reward levels, episodes and masks, group filter.

use integration_tests::Array;
use learner::{
    advantage::{EstimatorSettings, normalize},
    collect::filter::keep_members,
    ranks::OneRank,
};

use super::{
    Case, as_floats,
    grid::{Layout, Recorded, chunks_of, episodes, first_episodes, mask_of, steps_of},
    run,
};

/// Returns which steps or, at the chunk level, which chunks were an episode's last, from `[chunks + 1, envs, width]` flags; one row more
/// than steps.
fn ends(dones: &Array, chunk_level: bool) -> (Layout, Vec<bool>) {
    let (envs, width) = (dones.shape[1], dones.shape[2]);
    let rows = if chunk_level {
        let chunks = dones.bool();
        chunks.chunks_exact(width).map(|chunk| chunk.contains(&true)).collect()
    } else {
        steps_of(&dones.shape, &dones.bool())[(width - 1) * envs..].to_vec()
    };
    let steps = rows.len() / envs - 1;
    (Layout { steps, envs }, rows)
}

/// Returns the rewards of steps or, at the chunk level, of chunks, from `[chunks, envs, width]`.
fn rewards_of(rewards: &Array, chunk_level: bool) -> Vec<f32> {
    if chunk_level {
        let chunks = rewards.f32();
        chunks
            .chunks_exact(rewards.shape[2])
            .map(|chunk| chunk.iter().sum())
            .collect()
    } else {
        steps_of(&rewards.shape, &rewards.f32())
    }
}

/// Returns the number of steps of each environment's first episode, from `[chunks + 1, envs, width]` flags.
fn first_lengths(dones: &Array) -> Vec<f32> {
    let (layout, ends) = ends(dones, false);
    let first = first_episodes(layout, &ends);
    first.iter().map(|span| span.steps.len() as f32).collect()
}

/// Repeats a number per environment for every element of an array `[chunks, envs, width]`.
fn repeated(per_env: &[f32], shape: &[usize]) -> Vec<f32> {
    (0..shape.iter().product())
        .map(|at| per_env[at / shape[2] % shape[1]])
        .collect()
}

fn check_loss_mask(case: &Case<'_>) {
    let dones = case.array("in.dones");
    let (layout, ends) = ends(&dones, false);
    let mask = as_floats(&mask_of(layout, &first_episodes(layout, &ends)));
    let shape = case.array("out.loss_mask").shape;
    case.close_array("out.loss_mask", &chunks_of(&shape, &mask));
    case.close_array("out.loss_mask_sum", &repeated(&first_lengths(&dones), &shape));
}

fn check_pipeline(case: &Case<'_>) {
    let chunk_level = case.text("reward_type") == "chunk_level";
    let recorded_rewards = case.array("in.rewards");
    let rewards = rewards_of(&recorded_rewards, chunk_level);
    let (layout, ends) = ends(&case.array("in.dones"), chunk_level);
    case.close_array("out.pre.rewards", &rewards);
    case.close_array("out.pre.dones", &as_floats(&ends));
    let values = case.maybe("in.values").map_or_else(Vec::new, |values| {
        let mut rows = steps_of(&values.shape, &values.f32());
        rows.truncate(layout.len() + layout.envs);
        case.close_array("out.pre.values", &rows);
        rows
    });
    // the reference masks the steps after the first episodes
    let first = first_episodes(layout, &ends);
    let mask = case.has("in.loss_mask").then(|| {
        let mask = mask_of(layout, &first);
        case.close_array("out.pre.loss_mask", &as_floats(&mask));
        mask
    });

    let recorded = Recorded {
        layout,
        rewards: &rewards,
        values: &values,
        group_size: case.need("group_size") as usize,
    };
    let settings = EstimatorSettings {
        gamma: case.need("gamma"),
        gae_lambda: case.need("gae_lambda"),
    };
    // the reference has steps in their chunks again
    let shaped = |rows: &[f32]| {
        if chunk_level {
            rows.to_vec()
        } else {
            chunks_of(&recorded_rewards.shape, rows)
        }
    };
    let name = case.text("adv_type");
    if name == "gae" {
        let all = episodes(layout, &ends);
        let mut ours = recorded.estimate(name, settings, &all).unwrap();
        normalize(&mut ours.advantages, mask.as_deref(), &OneRank).unwrap();
        case.close_array("out.advantages", &shaped(&ours.advantages));
        case.close_array("out.returns", &shaped(&ours.returns));
    } else {
        assert!(mask.is_some(), "{}: the first episodes alone", case.id);
        case.close_array("out.scores", &recorded.scores(&first));
        let ours = recorded.estimate(name, settings, &first).unwrap();
        case.close_array("out.advantages", &shaped(&ours.advantages));
    }
}

/// Checks the group filter. The reference first puts consecutive rollouts side by side; this result is read as recorded.
fn check_preprocess(case: &Case<'_>) {
    let chunk_level = case.text("reward_type") == "chunk_level";
    let dones = case.array("out.dones");
    let rewards = rewards_of(&case.array("out.rewards"), chunk_level);
    let (layout, ends) = ends(&dones, chunk_level);
    let mut first = first_episodes(layout, &ends);
    if case.flag("filter_rewards") == Some(true) {
        let recorded = Recorded {
            layout,
            rewards: &rewards,
            values: &[],
            group_size: case.need("group_size") as usize,
        };
        let groups: Vec<u64> = first
            .iter()
            .map(|span| (span.env / recorded.group_size) as u64)
            .collect();
        let (low, high) = (case.need("rewards_lower_bound"), case.need("rewards_upper_bound"));
        let keep = keep_members(&recorded.scores(&first), &groups, low, high);
        first.retain(|span| keep[span.env]);
    }
    let mask = as_floats(&mask_of(layout, &first));
    let shape = case.array("out.loss_mask").shape;
    case.close_array("out.loss_mask", &chunks_of(&shape, &mask));
    case.close_array("out.loss_mask_sum", &repeated(&first_lengths(&dones), &shape));
}

#[test]
fn the_embodied_pipeline_agrees_with_the_reference() {
    run("rlinf_embodied_pipeline", &[], |case, _| {
        match case.spec["fn"].as_str().unwrap() {
            "compute_loss_mask" => check_loss_mask(case),
            "calculate_adv_and_returns" => check_pipeline(case),
            "preprocess_embodied_batch" => check_preprocess(case),
            other => panic!("unknown function {other}"),
        }
    });
}
