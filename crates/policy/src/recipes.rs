//! The recipes in `configs/`: each is a sound plan; of a thousand mistyped keys none is accepted, and nearly every one is told its
//! right name.

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
/// Tables that an environment checks, not the run configuration.
const FREE: [&str; 2] = ["env.params", "env.demo_params"];

/// Every key of a table as a path of names.
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

/// One slip of the finger: a letter left out, doubled, swapped with its neighbour, or another one.
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

/// Recipes that have every optional section and nearly every optional key between them.
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
        let right: toml::Table = std::fs::read_to_string(&path).expect(name).parse().expect(name);
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
    println!("{tried} typos of {} keys refused, {told} told the right key", distinct.len());
    assert!(told >= 900, "{told} of {tried} were told the right key");
}

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs")
}

/// Every recipe as a plan, by its name.
fn recipes() -> Vec<(String, RunPlan)> {
    let paths = std::fs::read_dir(configs()).expect("configs");
    let paths = paths.map(|entry| entry.expect("entry").path());
    let plan = |path: PathBuf| {
        let config = RunConfig::load(&path, &[]).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let plan = RunPlan::new(config).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
        let name = path.file_stem().and_then(|stem| stem.to_str()).expect("a name");
        (name.to_owned(), plan)
    };
    paths
        .filter(|path| path.extension().is_some_and(|e| e == "toml"))
        .map(plan)
        .collect()
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

/// The published settings as the reference's files have them, typed from there; `-`: no such key. Environments and episodes differ
/// from its 64 x 8 where that would not play every task equally often, since an environment here keeps its task.
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
metaworld_50_ppo_pi0 100 5 100 5 5 5 4 2048 4 1 1e-5 0.5 0.2 expert flow_sde chunk_level 1 -
metaworld_50_ppo_pi05 100 5 100 5 5 5 4 2048 4 1 5e-6 0.5 0.2 vlm flow_sde chunk_level 0 -
metaworld_45_ppo_pi0 90 6 100 5 5 5 4 2048 4 1 1e-5 0.5 0.2 expert flow_sde chunk_level 1 -
calvin_abc_d_ppo_pi05 64 8 480 5 5 5 7 2048 4 1 5e-6 0.5 0.2 vlm flow_sde chunk_level 1 -
calvin_abcd_d_ppo_pi05 64 8 480 5 5 5 7 2048 4 1 5e-6 0.5 0.2 vlm flow_sde chunk_level 1 -
calvin_d_d_ppo_pi0 64 8 480 5 5 5 7 2048 4 1 5e-6 0.5 0.2 expert flow_sde chunk_level 1 -
calvin_d_d_ppo_pi05 64 8 480 5 5 5 7 2048 4 1 5e-6 0.5 0.2 vlm flow_sde chunk_level 1 -
libero_spatial_async_ppo_pi0 128 4 240 50 5 4 7 2048 4 1 5e-6 0.5 0.2 expert flow_sde chunk_level 1 2
libero_spatial_async_ppo_pi05 128 1 240 10 5 3 7 2048 2 1 5e-6 0.5 0.2 vlm flow_sde chunk_level 1 1
libero_object_async_ppo_pi05 128 1 240 10 5 5 7 2048 2 1 5e-6 0.3 0.2 vlm flow_sde chunk_level 1 2
maniskill_async_ppo_pi0 320 1 80 8 5 4 7 5120 1 1 7.91e-6 0.5 0.15 expert flow_noise token_level 1 1
maniskill_async_ppo_pi05 320 1 80 8 5 4 7 5120 2 1 7.91e-6 0.5 0.2 vlm flow_noise chunk_level 1 1
";

#[test]
fn every_published_recipe_is_there_with_its_values() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let mut published = BTreeSet::new();
    for row in PUBLISHED.trim().lines() {
        let (name, cells) = row.split_once(' ').expect("a name");
        let config = RunConfig::load(&folder.join(format!("{name}.toml")), &[]).expect(name);
        let table: toml::Table = config.to_toml().expect(name).parse().expect(name);
        let table = toml::Value::Table(table);
        let cells: Vec<&str> = cells.split(' ').collect();
        assert_eq!(cells.len(), COLUMNS.len(), "{name}");
        for (key, expected) in COLUMNS.iter().zip(cells) {
            let found = key.split('.').try_fold(&table, |at, part| at.get(part));
            let number = |value: &toml::Value| value.to_string().parse::<f64>().ok();
            let same = match found {
                None => expected == "-",
                Some(toml::Value::String(text)) => text == expected,
                Some(value) => number(value).is_some() && number(value) == expected.parse().ok(),
            };
            assert!(same, "{name}: `{key}` is {found:?}, published: {expected}");
        }
        published.insert(name.to_owned());
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
    // openpi's count holds an output head of the expert, `[vocab, width]`, that no computation reads and no policy here has
    let unread = 257_152 * 1024;
    for (name, plan) in recipes().into_iter().filter(|(_, plan)| plan.dims.vocab == 257_152) {
        let specs = params(&plan.dims, &Heads::default());
        let weights: usize = specs.iter().map(|spec| spec.shape.iter().product::<usize>()).sum();
        let (openpis, heads) = match plan.dims.variant {
            Variant::Pi0 => (3_501_372_176, "pi0"),
            Variant::Pi05 => (3_616_757_520, "pi05"),
        };
        assert_eq!(weights + unread, openpis, "{name}");
        assert!(name.ends_with(heads), "{name}");
    }
}
