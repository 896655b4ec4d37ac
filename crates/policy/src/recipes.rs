//! Tests of the recipes in `configs/`: each is a valid plan. Each of a thousand mistyped keys is rejected, and nearly every error
//! names the right key.

mod effective;

use std::{
    collections::BTreeSet,
    path::{Path, PathBuf},
};

use rand_core::Rng;

use crate::{
    config::RunConfig,
    dims::Variant,
    noise::{Purpose, below, stream},
    params::{Heads, params},
    plan::RunPlan,
};

const TYPOS: usize = 1000;
/// Tables that an environment or a method checks instead of the run configuration.
const FREE: [&str; 3] = ["env.params", "env.demo_params", "algorithm.velocity.params"];

/// Appends every key of a table, as a path of names, to `out`.
fn keys(table: &toml::Table, path: &[String], out: &mut Vec<Vec<String>>) {
    for (name, value) in table {
        let here: Vec<String> = path.iter().cloned().chain([name.clone()]).collect();
        out.push(here.clone());
        if let toml::Value::Table(inner) = value
            && !FREE.contains(&here.join(".").as_str())
        {
            keys(inner, &here, out);
        }
    }
}

/// Returns `key` with one typing error: a letter omitted, doubled, swapped with its neighbor, or replaced.
fn slip(key: &str, rng: &mut impl Rng) -> String {
    let mut letters: Vec<char> = key.chars().collect();
    let at = below(rng, letters.len());
    match below(rng, 4) {
        0 if letters.len() > 1 => {
            letters.remove(at);
        }
        1 => letters.insert(at, letters[at]),
        2 if at + 1 < letters.len() => letters.swap(at, at + 1),
        _ => letters[at] = char::from(b'a' + below(rng, 26) as u8),
    }
    letters.into_iter().collect()
}

/// Recipes that together have every optional section and nearly every optional key.
const MISTYPED: [&str; 8] = [
    "quickstart",
    "tabletop_async",
    "tabletop_grpo",
    "tabletop_nft",
    "libero_10_ppo_pi05",
    "libero_object_async_ppo_pi05",
    "maniskill_ppo_pi0",
    "metaworld_reach_ppo",
];

#[test]
fn a_thousand_typos_are_refused_and_most_are_told_the_right_key() {
    let mut recipes = Vec::new();
    let mut all = Vec::new();
    for name in MISTYPED {
        let path = configs().join(format!("{name}.toml"));
        let config = RunConfig::load(&path, &[]).expect(name);
        let right: toml::Table = config.to_toml().expect(name).parse().expect(name);
        let mut found = Vec::new();
        keys(&right, &[], &mut found);
        all.extend(found.into_iter().map(|key| (recipes.len(), key)));
        recipes.push((path, right));
    }
    let distinct: BTreeSet<&Vec<String>> = all.iter().map(|(_, key)| key).collect();
    assert!(distinct.len() > 140, "{} keys", distinct.len());

    let mut rng = stream(Purpose::Reset, 11, 0, 0, 0);
    let (mut tried, mut told) = (0, 0);
    while tried < TYPOS {
        let (recipe, key) = &all[below(&mut rng, all.len())];
        let (path, right) = &recipes[*recipe];
        let (name, section) = key.split_last().expect("a key has a name");
        let wrong = slip(name, &mut rng);
        let mut table = right.clone();
        let inner = section
            .iter()
            .fold(&mut table, |t, part| t[part].as_table_mut().expect("a section"));
        if inner.contains_key(&wrong) || &wrong == name {
            continue;
        }
        let value = inner.remove(name).expect("the key");
        inner.insert(wrong.clone(), value);
        tried += 1;
        let typed = toml::to_string(&table).expect("TOML");
        match RunConfig::parse(&typed, path, &[]) {
            Ok(_) => panic!("`{wrong}` was taken in the place of `{}`", key.join(".")),
            Err(error) => told += usize::from(error.to_string().contains(&format!("`{name}`"))),
        }
    }
    println!(
        "{tried} typos of {} keys refused, {told} told the right key",
        distinct.len()
    );
    assert!(told >= 900, "{told} of {tried} were told the right key");
}

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs")
}

/// Returns the name and the plan of every recipe.
fn recipes() -> Vec<(String, RunPlan)> {
    let plan = |path: PathBuf| {
        let config = RunConfig::load(&path, &[]).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let plan = RunPlan::new(config).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let name = path.file_stem().and_then(|stem| stem.to_str()).expect("a name");
        (name.to_owned(), plan)
    };
    files(&configs()).into_iter().map(plan).collect()
}

#[test]
fn every_recipe_is_a_plan_of_its_own_folder_and_survives_being_written() {
    let mut outputs = BTreeSet::new();
    for (name, plan) in recipes() {
        let text = plan.config.to_toml().expect("toml");
        assert_eq!(
            RunConfig::parse(&text, Path::new(&name), &[]).expect("again"),
            plan.config,
            "{name}"
        );
        let output = plan.config.runner.output_dir;
        assert!(
            outputs.insert(output.clone()),
            "{name}: another recipe writes to {}",
            output.display()
        );
    }
    assert!(outputs.len() >= 5, "{outputs:?}");
}

/// Returns the TOML files of a folder.
fn files(folder: &Path) -> BTreeSet<PathBuf> {
    let paths = std::fs::read_dir(folder)
        .expect("a folder")
        .map(|entry| entry.expect("entry").path());
    paths
        .filter(|path| path.extension().is_some_and(|e| e == "toml"))
        .collect()
}

#[test]
fn a_recipe_is_its_differences_from_bases_that_are_all_in_use() {
    let lines = |path: &PathBuf| std::fs::read_to_string(path).expect("a file").lines().count();
    let (recipes, bases) = (files(&configs()), files(&configs().join("base")));
    let mut used = BTreeSet::new();
    for path in &recipes {
        assert!(lines(path) < 25, "{}: {} lines", path.display(), lines(path));
        let (_, origins) = RunConfig::load_with_origins(path, &[]).expect("a recipe");
        used.extend(origins.files().iter().filter(|file| *file != path).cloned());
    }
    assert_eq!(used, bases, "files that recipes extend, and the files of configs/base");
    let all: usize = recipes.iter().chain(&bases).map(lines).sum();
    assert!(all < 2500, "{all} lines");
}

/// Columns of [`PUBLISHED`] after the recipe's name.
const COLUMNS: [&str; 18] = [
    "env.train.total_num_envs",
    "env.train.rollout_epoch",
    "env.params.max_episode_steps",
    "actor.model.action_horizon",
    "actor.model.num_action_chunks",
    "actor.model.num_steps",
    "actor.model.env_action_dim",
    "actor.global_batch_size",
    "algorithm.update_epoch",
    "algorithm.group_size",
    "actor.optim.lr",
    "actor.model.openpi.noise_level",
    "algorithm.clip_ratio_high",
    "actor.model.value_head.input",
    "actor.model.openpi.noise_method",
    "algorithm.logprob_type",
    "actor.optim.min_lr_ratio",
    "rollout.max_staleness",
];

/// Published settings, copied from the reference's files and the paper's tables; `-`: no such key.
///
/// An environment here keeps its task. Environments and episodes differ from the published 64 x 8 if the tasks would not have
/// equally many episodes.
const PUBLISHED: &str = "
libero_spatial_ppo_pi0 64 8 240 50 5 4 7 2048 4 1 5e-6 0.5 0.2 expert flow_sde chunk_level 1 -
libero_spatial_ppo_pi05 64 8 240 10 5 3 7 2048 1 1 5e-6 0.5 0.2 vlm flow_sde chunk_level 1 -
libero_object_ppo_pi0 64 8 240 50 5 4 7 2048 4 1 5e-6 0.5 0.2 expert flow_sde chunk_level 1 -
libero_object_ppo_pi05 64 8 240 10 5 5 7 2048 1 1 5e-6 0.3 0.2 vlm flow_sde chunk_level 1 -
libero_goal_ppo_pi0 64 8 320 50 5 4 7 2048 4 1 5e-6 0.5 0.2 expert flow_sde chunk_level 1 -
libero_goal_ppo_pi05 64 8 320 10 5 5 7 2048 4 1 5e-6 0.3 0.2 vlm flow_sde chunk_level 1 -
libero_10_ppo_pi0 64 8 480 50 10 4 7 2048 4 1 5e-6 0.5 0.2 expert flow_sde chunk_level 1 -
libero_10_ppo_pi05 64 8 480 10 10 5 7 2048 4 1 5e-6 0.5 0.2 vlm flow_sde chunk_level 0.1 -
libero_130_ppo_pi05 130 4 512 10 10 5 7 2048 4 1 5e-6 0.5 0.2 vlm flow_sde chunk_level 0.1 -
libero_spatial_ppo_pi0_quickstart 32 2 240 50 5 4 7 256 4 1 1e-6 0.5 0.2 expert flow_sde chunk_level 1 -
libero_spatial_ppo_flow_noise_pi0 64 8 240 50 5 4 7 2048 4 1 5e-6 0.5 0.2 expert flow_noise chunk_level 1 -
libero_spatial_ppo_flow_noise_pi05 64 8 240 10 5 3 7 2048 1 1 5e-6 0.5 0.2 vlm flow_noise chunk_level 1 -
libero_object_ppo_flow_noise_pi0 64 8 240 50 5 4 7 2048 4 1 5e-6 0.5 0.2 expert flow_noise chunk_level 1 -
libero_object_ppo_flow_noise_pi05 64 8 240 10 5 5 7 2048 1 1 5e-6 0.3 0.2 vlm flow_noise chunk_level 1 -
libero_goal_ppo_flow_noise_pi0 64 8 320 50 5 4 7 2048 4 1 5e-6 0.5 0.2 expert flow_noise chunk_level 1 -
libero_goal_ppo_flow_noise_pi05 64 8 320 10 5 5 7 2048 4 1 5e-6 0.3 0.2 vlm flow_noise chunk_level 1 -
libero_10_ppo_flow_noise_pi0 64 8 480 50 10 4 7 2048 4 1 5e-6 0.5 0.2 expert flow_noise chunk_level 1 -
libero_10_ppo_flow_noise_pi05 64 8 480 10 10 5 7 2048 4 1 5e-6 0.5 0.2 vlm flow_noise chunk_level 0.1 -
libero_object_0_nft_pi0 64 1 240 50 5 4 7 512 2 8 5e-6 0.5 0.2 - flow_ode chunk_level 1 -
libero_spatial_grpo_pi0 64 8 240 50 5 4 7 2048 2 8 5e-6 0.5 0.2 - flow_sde chunk_level 1 -
libero_spatial_grpo_pi05 64 8 240 10 5 3 7 2048 1 8 5e-6 0.5 0.2 - flow_sde chunk_level 1 -
libero_object_grpo_pi0 64 8 240 50 5 4 7 2048 2 8 5e-6 0.5 0.2 - flow_sde chunk_level 1 -
libero_object_grpo_pi05 64 8 240 10 5 5 7 2048 1 8 5e-6 0.3 0.2 - flow_sde chunk_level 1 -
libero_goal_grpo_pi0 64 8 320 50 5 4 7 2048 2 8 5e-6 0.5 0.2 - flow_sde chunk_level 1 -
libero_goal_grpo_pi05 64 8 320 10 5 5 7 2048 1 8 5e-6 0.3 0.2 - flow_sde chunk_level 1 -
libero_10_grpo_pi0 64 8 480 50 10 4 7 2048 2 8 5e-6 0.5 0.2 - flow_sde chunk_level 1 -
libero_10_grpo_pi05 64 8 480 10 10 4 7 2048 4 8 5e-6 0.5 0.2 - flow_sde chunk_level 1 -
maniskill_ppo_pi0 320 1 80 8 5 4 7 5120 4 1 7.91e-6 0.5 0.2 expert flow_noise token_level 1 -
maniskill_ppo_pi05 320 1 80 8 5 4 7 5120 5 1 7.91e-6 0.5 0.2 vlm flow_noise chunk_level 1 -
maniskill_ppo_flow_sde_pi0 320 1 80 8 5 4 7 5120 4 1 7.91e-6 0.5 0.2 expert flow_sde token_level 1 -
maniskill_ppo_flow_sde_pi05 320 1 80 8 5 4 7 5120 5 1 7.91e-6 0.5 0.2 vlm flow_sde chunk_level 1 -
metaworld_50_ppo_flow_noise_pi0 100 5 100 5 5 5 4 2048 4 1 1e-5 0.5 0.2 expert flow_noise chunk_level 1 -
metaworld_50_ppo_flow_noise_pi05 100 5 100 5 5 5 4 2048 4 1 5e-6 0.5 0.2 vlm flow_noise chunk_level 0 -
metaworld_50_ppo_pi0 100 5 100 5 5 5 4 2048 4 1 1e-5 0.5 0.2 expert flow_sde chunk_level 1 -
metaworld_50_ppo_pi05 100 5 100 5 5 5 4 2048 4 1 5e-6 0.5 0.2 vlm flow_sde chunk_level 0 -
metaworld_45_ppo_pi0 90 6 100 5 5 5 4 2048 4 1 1e-5 0.5 0.2 expert flow_sde chunk_level 1 -
calvin_abc_d_ppo_pi05 64 8 480 5 5 5 7 2048 4 1 5e-6 0.5 0.2 vlm flow_sde chunk_level 1 -
calvin_abcd_d_ppo_pi05 64 8 480 5 5 5 7 2048 4 1 5e-6 0.5 0.2 vlm flow_sde chunk_level 1 -
calvin_d_d_ppo_pi0 64 8 480 5 5 5 7 2048 4 1 5e-6 0.5 0.2 expert flow_sde chunk_level 1 -
calvin_d_d_ppo_pi05 64 8 480 5 5 5 7 2048 4 1 5e-6 0.5 0.2 vlm flow_sde chunk_level 1 -
robotwin_adjust_bottle_ppo_pi0 256 4 200 50 50 4 14 2048 2 1 5.6e-6 0.5 0.2 expert flow_sde chunk_level 1 -
robotwin_adjust_bottle_ppo_pi05 256 4 200 50 50 5 14 2048 5 1 5e-6 0.3 0.2 expert flow_sde chunk_level 1 -
isaaclab_stack_cube_ppo_pi05 128 2 450 10 5 5 7 256 3 1 5e-6 0.5 0.2 vlm flow_sde chunk_level 1 -
behavior_ppo_pi05 8 2 4096 32 32 8 23 64 1 1 5e-6 0.4 0.28 vlm flow_sde chunk_level 1 -
gsenv_put_cube_ppo_pi05 64 8 100 5 5 5 7 2048 4 1 5e-6 0.5 0.2 vlm flow_sde chunk_level 1 -
libero_spatial_async_ppo_pi0 128 4 240 50 5 4 7 2048 4 1 5e-6 0.5 0.2 expert flow_sde chunk_level 1 2
libero_spatial_async_ppo_pi05 128 1 240 10 5 3 7 2048 2 1 5e-6 0.5 0.2 vlm flow_sde chunk_level 1 1
libero_object_async_ppo_pi05 128 1 240 10 5 5 7 2048 2 1 5e-6 0.3 0.2 vlm flow_sde chunk_level 1 2
maniskill_async_ppo_pi0 320 1 80 8 5 4 7 5120 1 1 7.91e-6 0.5 0.15 expert flow_noise token_level 1 1
maniskill_async_ppo_pi05 320 1 80 8 5 4 7 5120 2 1 7.91e-6 0.5 0.2 vlm flow_noise chunk_level 1 1
";

/// Further keys, each with the value of most recipes, then other values with patterns of recipe names (`*`: any text).
///
/// The first pattern that matches a recipe gives the recipe's value.
const FURTHER: &str = "
runner.seed 42; 0 maniskill_*; 1234 robotwin_* behavior_*
runner.max_epochs 1000; 100 gsenv_* *_nft_*; 500 metaworld_45_*
runner.save_interval 40; 0 libero_spatial_async_ppo_pi0 metaworld_45_* *_nft_*; 50 maniskill_* gsenv_* metaworld_50_*; 10 robotwin_*; 100 calvin_* isaaclab_*
runner.val_check_interval 0; 10 maniskill_* metaworld_45_* robotwin_*; 5 gsenv_*
actor.micro_batch_size 128; 64 *_quickstart; 32 maniskill_* robotwin_* isaaclab_* *_nft_*; 4 behavior_*
actor.optim.value_lr 1e-4; 1.55e-4 maniskill_*; 1.1e-4 robotwin_*_pi0
actor.optim.betas [0.9,0.95]; [0.9,0.999] behavior_*
actor.optim.eps 1e-8; 1e-5 maniskill_async_*
actor.optim.weight_decay 0.01
actor.optim.clip_grad 1; 2 libero_10_*_pi0
actor.optim.critic_warmup_epochs 0; 5 libero_object_async_*
actor.model.delta_actions -; [6,-1] libero_*_pi0 libero_*_quickstart; [6,-1,6,-1] robotwin_*
actor.model.normalization quantile; z_score *_pi0 *_quickstart
actor.model.value_head.hidden [512,256,128]; - *_grpo_* *_nft_*; [1024,512,256] libero_*_pi05 maniskill_*_pi05 behavior_*
actor.model.value_head.detach_critic_input true; - *_grpo_* *_nft_*; true robotwin_* isaaclab_* behavior_*; false *_pi05
actor.model.openpi.ignore_last false; true behavior_*
actor.model.openpi.mdp hybrid; joint *_flow_noise_*; hybrid *_flow_sde_*; joint maniskill_*
actor.model.openpi.joint_logprob -; mean *_flow_noise_*; - *_flow_sde_*; mean maniskill_*
actor.model.openpi.noise_head.std_range -; [0.04,0.1] metaworld_*_flow_noise_* *_flow_noise_pi05; [0.08,0.16] *_flow_noise_*; - *_flow_sde_*; [0.08,0.16] maniskill_*
actor.model.discrete_state_input false; true robotwin_*_pi05 behavior_*
algorithm.adv_type gae; grpo *_grpo_* *_nft_*
algorithm.loss_type actor_critic; actor *_grpo_*; nft *_nft_*; decoupled_actor_critic *_async_*
algorithm.reward_type chunk_level
algorithm.bootstrap_type none; truncation maniskill_async_*; always maniskill_*
algorithm.loss_agg episode_length; mean maniskill_* *_nft_*
algorithm.gamma 0.99
algorithm.gae_lambda 0.95
algorithm.clip_ratio_low 0.2; 0.15 maniskill_async_ppo_pi0
algorithm.clip_ratio_c -; 3 *_async_*
algorithm.behave_weight_threshold -; 5 libero_spatial_async_ppo_pi0 libero_object_async_*; 2 *_async_*
algorithm.entropy_bonus -; 0.005 *_flow_noise_*; - *_flow_sde_*; 0.005 maniskill_*
algorithm.value_clip 0.2; - *_grpo_* *_nft_*
algorithm.huber_delta 10
algorithm.filter_rewards.lower -; 0.1 *_grpo_* *_nft_*
algorithm.filter_rewards.upper -; 0.9 *_grpo_* *_nft_*
algorithm.filter_rewards.mode -; mask *_grpo_* *_nft_*
algorithm.velocity.params.beta -; 1 *_nft_*
algorithm.velocity.params.advantage_max -; 0.5 *_nft_*
algorithm.velocity.params.form -; mse *_nft_*
env.params.tasks -; [0] *_nft_*
env.params.reward_coef -; 10 behavior_*
env.eval.episodes 500; 320 maniskill_*; 100 metaworld_45_*; 1000 calvin_*; 128 robotwin_*; 32 isaaclab_*; 16 behavior_*; 512 gsenv_*
";

/// Returns whether `name` matches `pattern`, in which `*` stands for any text.
fn fits(pattern: &str, name: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == name,
        Some((head, rest)) => name
            .strip_prefix(head)
            .is_some_and(|tail| (0..=tail.len()).any(|at| fits(rest, &tail[at..]))),
    }
}

/// Parsed line of [`FURTHER`]: a key, and patterns with values in the order of matching.
struct Further {
    key: &'static str,
    values: Vec<(&'static str, &'static str)>,
}

fn further() -> Vec<Further> {
    let line = |line: &'static str| {
        let (key, values) = line.split_once(' ').expect("a key");
        let (common, others) = values.split_once("; ").unwrap_or((values, ""));
        let others = others.split("; ").flat_map(|other| {
            let (value, patterns) = other.split_once(' ').unwrap_or((other, ""));
            patterns.split_terminator(' ').map(move |pattern| (pattern, value))
        });
        Further {
            key,
            values: others.chain([("*", common)]).collect(),
        }
    };
    FURTHER.trim().lines().map(line).collect()
}

/// Asserts that a recipe's key has the expected value; `-`: no such key.
fn check(name: &str, recipe: &toml::Value, key: &str, expected: &str) {
    let found = key.split('.').try_fold(recipe, |at, part| at.get(part));
    let number = |value: &toml::Value| value.to_string().parse::<f64>().ok();
    let same = match found {
        None => expected == "-",
        Some(toml::Value::String(text)) => text == expected,
        Some(toml::Value::Array(items)) => {
            let items: Vec<String> = items.iter().map(ToString::to_string).collect();
            format!("[{}]", items.join(",")) == expected
        }
        Some(toml::Value::Boolean(value)) => value.to_string() == expected,
        Some(value) => number(value).is_some() && number(value) == expected.parse().ok(),
    };
    assert!(same, "{name}: `{key}` is {found:?}, published: {expected}");
}

#[test]
fn every_published_recipe_is_there_with_its_values() {
    let further = further();
    let mut used = BTreeSet::new();
    let mut published = BTreeSet::new();
    for row in PUBLISHED.trim().lines() {
        let (name, cells) = row.split_once(' ').expect("a name");
        let config = RunConfig::load(&configs().join(format!("{name}.toml")), &[]).expect(name);
        let table: toml::Table = config.to_toml().expect(name).parse().expect(name);
        let recipe = toml::Value::Table(table);
        let cells: Vec<&str> = cells.split(' ').collect();
        assert_eq!(cells.len(), COLUMNS.len(), "{name}");
        for (key, expected) in COLUMNS.iter().zip(cells) {
            check(name, &recipe, key, expected);
        }
        for Further { key, values } in &further {
            let first = values.iter().find(|(pattern, _)| fits(pattern, name));
            let (pattern, expected) = first.expect("`*` fits");
            check(name, &recipe, key, expected);
            used.insert((key, pattern, expected));
        }
        published.insert(name.to_owned());
    }
    for Further { key, values } in &further {
        for (pattern, value) in values {
            assert!(
                used.contains(&(key, pattern, value)),
                "no recipe has `{key}` = {value} by `{pattern}`"
            );
        }
    }
    let full_size = recipes().into_iter().filter(|(_, plan)| plan.dims.vocab == 257_152);
    let full_size: BTreeSet<String> = full_size.map(|(name, _)| name).collect();
    assert_eq!(
        full_size, published,
        "recipes of full size, and those that are published"
    );
}

#[test]
fn full_size_policies_have_openpis_number_of_weights() {
    // openpi's count includes an output head of the expert, `[vocab, width]`, which no computation reads and policies here lack
    let unread = 257_152 * 1024;
    for (name, plan) in recipes().into_iter().filter(|(_, plan)| plan.dims.vocab == 257_152) {
        let specs = params(&plan.dims, &Heads::default());
        let weights: usize = specs.iter().map(|spec| spec.shape.iter().product::<usize>()).sum();
        let (openpis, heads) = match plan.dims.variant {
            Variant::Pi0 => (3_501_372_176, "pi0"),
            Variant::Pi05 => (3_616_757_520, "pi05"),
        };
        assert_eq!(weights + unread, openpis, "{name}");
        assert!(name.trim_end_matches("_quickstart").ends_with(heads), "{name}");
    }
}
