//! The pipeline from recorded rollouts to advantages: reward layouts, masks, group filter.

use integration_tests::Array;
use learner::{
    advantage::{
        ChunkLayout, Layout, chunk_any, chunk_sum, chunks_from_steps, episode_scores, group_relative_grid, loss_mask,
        normalize, stack_epochs, steps_from_chunks,
    },
    filter::keep_members,
};

use super::{Case, advantages::reference_gae, as_floats, flags, run};

fn chunk_layout(array: &Array) -> ChunkLayout {
    ChunkLayout {
        chunks: array.shape[0],
        envs: array.shape[1],
        chunk_len: array.shape[2],
    }
}

/// `[chunks + 1, envs, chunk_len]` flags to one row more than there are steps: the last ones.
fn step_dones(dones: &Array) -> Vec<bool> {
    let layout = chunk_layout(dones);
    let rows = steps_from_chunks(layout, &dones.bool()).unwrap();
    rows[(layout.chunk_len - 1) * layout.envs..].to_vec()
}

/// Loss mask and episode lengths in primitive steps of `[chunks + 1, envs, chunk_len]` flags, the mask per chunk layout.
fn chunk_loss_mask(dones: &Array) -> (ChunkLayout, Vec<bool>, Vec<usize>) {
    let full = chunk_layout(dones);
    let layout = ChunkLayout {
        chunks: full.chunks - 1,
        ..full
    };
    let mask = loss_mask(layout.step_grid(), &step_dones(dones)).unwrap();
    (
        layout,
        chunks_from_steps(layout, &mask.valid).unwrap(),
        mask.episode_len,
    )
}

/// Rewards, dones, values and mask of a grid, of chunks or of primitive steps.
struct Preprocessed {
    layout: Layout,
    rewards: Vec<f32>,
    dones: Vec<bool>,
    values: Option<Vec<f32>>,
    mask: Option<Vec<bool>>,
}

fn preprocess(case: &Case<'_>) -> Preprocessed {
    let rewards = case.array("in.rewards");
    let dones = case.array("in.dones");
    let chunk = chunk_layout(&rewards);
    let values = case.maybe("in.values");
    let mask = case.maybe("in.loss_mask");
    if case.text("reward_type") == "chunk_level" {
        return Preprocessed {
            layout: chunk.chunk_grid(),
            rewards: chunk_sum(chunk, &rewards.f32()).unwrap(),
            dones: chunk_any(chunk_layout(&dones), &dones.bool()).unwrap(),
            values: values.map(|values| values.f32()),
            mask: mask.map(|mask| chunk_any(chunk_layout(&mask), &mask.bool()).unwrap()),
        };
    }
    let layout = chunk.step_grid();
    Preprocessed {
        layout,
        rewards: steps_from_chunks(chunk, &rewards.f32()).unwrap(),
        dones: step_dones(&dones),
        values: values.map(|values| {
            let mut rows = steps_from_chunks(chunk_layout(&values), &values.f32()).unwrap();
            rows.truncate(layout.len() + layout.envs);
            rows
        }),
        mask: mask.map(|mask| steps_from_chunks(chunk_layout(&mask), &mask.bool()).unwrap()),
    }
}

fn check_pipeline(case: &Case<'_>) {
    let pre = preprocess(case);
    case.close_array("out.pre.rewards", &pre.rewards);
    case.close_array("out.pre.dones", &as_floats(&pre.dones));
    if let Some(values) = &pre.values {
        case.close_array("out.pre.values", values);
    }
    if let Some(mask) = &pre.mask {
        case.close_array("out.pre.loss_mask", &as_floats(mask));
    }
    // back from steps to [chunks, envs, chunk_len], where the reference gives it that way
    let shaped = |rows: &[f32]| {
        let chunk = chunk_layout(&case.array("in.rewards"));
        if case.text("reward_type") == "chunk_level" {
            rows.to_vec()
        } else {
            chunks_from_steps(chunk, rows).unwrap()
        }
    };
    if case.text("adv_type") == "gae" {
        let values = pre.values.as_ref().expect("GAE has values");
        let (gamma, lambda) = (case.need("gamma"), case.need("gae_lambda"));
        let mut out = reference_gae(pre.layout, &pre.rewards, values, &pre.dones, gamma, lambda);
        normalize(&mut out.advantages, pre.mask.as_deref());
        case.close_array("out.advantages", &shaped(&out.advantages));
        case.close_array("out.returns", &shaped(&out.returns));
    } else {
        let scores = episode_scores(pre.layout, &pre.rewards, &pre.dones).unwrap();
        case.close_array("out.scores", &scores);
        let mask = pre.mask.as_ref().expect("GRPO has a mask");
        let advantages = group_relative_grid(pre.layout, &scores, case.need("group_size") as usize, mask).unwrap();
        case.close_array("out.advantages", &shaped(&advantages));
    }
}

fn check_preprocess(case: &Case<'_>) {
    let epochs = case.need("rollout_epoch") as usize;
    let stacked = |name: &str| {
        let array = case.array(&format!("in.{name}"));
        let row_len = array.shape[1..].iter().product();
        let data = stack_epochs(epochs, array.shape[0] / epochs, row_len, &array.data).unwrap();
        let mut shape = array.shape.clone();
        (shape[0], shape[1]) = (shape[0] / epochs, shape[1] * epochs);
        Array {
            shape,
            data,
            dtype: array.dtype,
        }
    };
    let (rewards, dones, values) = (stacked("rewards"), stacked("dones"), stacked("prev_values"));
    case.close_array("out.rewards", &rewards.f32());
    case.close_array("out.dones", &flags(&dones));
    case.close_array("out.prev_values", &values.f32());
    let (layout, mut mask, episode_len) = chunk_loss_mask(&dones);
    let chunk_level = case.text("reward_type") == "chunk_level";
    if chunk_level {
        mask = chunk_any(layout, &mask).unwrap();
    }
    if case.flag("filter_rewards") == Some(true) {
        // scores of the first episodes; an end inside a chunk ends the episode with that chunk, or with its step
        let totals = if chunk_level {
            let ends = chunk_any(chunk_layout(&dones), &dones.bool()).unwrap();
            episode_scores(layout.chunk_grid(), &chunk_sum(layout, &rewards.f32()).unwrap(), &ends)
        } else {
            let rows = steps_from_chunks(layout, &rewards.f32()).unwrap();
            episode_scores(layout.step_grid(), &rows, &step_dones(&dones))
        }
        .unwrap();
        let (low, high) = (case.need("rewards_lower_bound"), case.need("rewards_upper_bound"));
        // a group is `group_size` consecutive environments
        let groups: Vec<u64> = (0..totals.len())
            .map(|at| (at / case.need("group_size") as usize) as u64)
            .collect();
        let keep = keep_members(&totals, &groups, low, high);
        let width = if chunk_level { 1 } else { layout.chunk_len };
        for (at, valid) in mask.iter_mut().enumerate() {
            *valid &= keep[at / width % layout.envs];
        }
    }
    case.close_array("out.loss_mask", &as_floats(&mask));
    let recorded = case.array("out.loss_mask_sum");
    let width = recorded.shape[2];
    for (at, sum) in recorded.data.iter().enumerate() {
        case.close("loss_mask_sum", episode_len[at / width % layout.envs] as f64, *sum);
    }
}

#[test]
fn the_embodied_pipeline_agrees_with_the_reference() {
    run("rlinf_embodied_pipeline", &[], |case, _| {
        match case.spec["fn"].as_str().unwrap() {
            "compute_loss_mask" => {
                let (layout, mask, episode_len) = chunk_loss_mask(&case.array("in.dones"));
                case.close_array("out.loss_mask", &as_floats(&mask));
                let lengths: Vec<f32> = (0..mask.len())
                    .map(|at| episode_len[at / layout.chunk_len % layout.envs] as f32)
                    .collect();
                case.close_array("out.loss_mask_sum", &lengths);
            }
            "calculate_adv_and_returns" => check_pipeline(case),
            "preprocess_embodied_batch" => check_preprocess(case),
            other => panic!("unknown function {other}"),
        }
    });
}
