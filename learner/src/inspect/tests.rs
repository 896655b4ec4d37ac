//! Tests of the description against numbers computed by hand, and of the explanation of every key of every recipe.

use std::path::{Path, PathBuf};

use policy::config::RunConfig;

use super::*;

fn configs() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs")
}

/// Returns the description of a recipe.
fn described(name: &str, overrides: &[&str]) -> String {
    let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
    let (config, origins) = RunConfig::load_with_origins(&configs().join(name), &overrides).expect("configuration");
    describe(&RunPlan::new(config).expect("plan"), &origins).expect("text")
}

#[test]
fn every_key_of_every_recipe_is_explained() {
    let mut seen = 0;
    for entry in std::fs::read_dir(configs()).expect("folder") {
        let path = entry.expect("entry").path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let config = RunConfig::load(&path, &[]).expect("configuration");
        for key in config.keys().expect("keys").keys() {
            assert!(
                keys::meaning(key, &config.algorithm.loss_type).is_some(),
                "{}: `{key}` is not explained in configs/README.md",
                path.display()
            );
            seen += 1;
        }
    }
    assert!(seen > 500, "{seen} keys");
    assert_eq!(keys::meaning("algorithm.gama", "actor"), None);
    let params = |loss| keys::meaning("algorithm.velocity.params.t_min", loss).expect("explained");
    assert!(params("nft").contains("branches") && params("flow_ipo").contains("sharpness"));
    assert!(
        keys::meaning("sft.optim.clip_grad", "actor")
            .expect("explained")
            .contains("gradient norm")
    );
}

#[test]
fn the_arithmetic_is_that_of_the_quickstart() {
    let text = described("quickstart.toml", &[]);
    // 40 env steps in chunks of 4; 2560 / 800 = 3.2, so 3 steps of 854 in parts of at most 400; 4 epochs, 120 iterations
    for fact in [
        "256 environments x 1 episode(s) = 256 episodes, 256 group(s) of 1",
        "x at most 10 chunks = 2,560 records, at most; x 1 = 2,560 samples",
        "2,560 samples / 800 = 3 optimizer step(s) of about 854 samples, each in 3 part(s) of at most 400",
        "x 4 epochs = 12 optimizer steps per iteration, x 120 iterations = 1,440",
        "20 prefix tokens (4 of the prompt)",
        // 2 tensors x 3 layers x 1 head x 20 tokens x 32, 64 pooled numbers and 20 of the mask, x 4 bytes; 8.77 over 2.98 MFLOP
        "prefix 15.7 kB per record, worth 3 expert passes",
        "prefixes of all records: 40.2 MB, kept (memory) up to 2.00 GB",
        "step 0: t 1.000 to 0.750, std 0.800",
        "4 per chunk in the rollout, 1 per sample and epoch in the update",
    ] {
        assert!(text.contains(fact), "`{fact}` is not in:\n{text}");
    }
    let two_layer = described("tabletop_two_layer.toml", &[]);
    assert!(
        two_layer.contains("= 2,560 records, at most; x 4 = 10,240 samples"),
        "{two_layer}"
    );
}

#[test]
fn the_arithmetic_is_that_of_the_published_recipes() {
    // 240 env steps in chunks of 5 are 48 records of each of 512 episodes; 12 steps of 2048, four times
    let ppo = described("libero_spatial_ppo_pi0.toml", &[]);
    let grpo = described("libero_10_grpo_pi05.toml", &[]);
    for (text, fact) in [
        (&ppo, "64 environments x 8 episode(s) = 512 episodes, 512 group(s) of 1"),
        (
            &ppo,
            "x at most 48 chunks = 24,576 records, at most; x 1 = 24,576 samples",
        ),
        (
            &ppo,
            "24,576 samples / 2048 = 12 optimizer step(s) of about 2048 samples, each in 16 part(s) of at most 128",
        ),
        (
            &ppo,
            "x 4 epochs = 48 optimizer steps per iteration, x 1000 iterations = 48,000",
        ),
        // three cameras of 256 tokens, and 48 of the prompt; 2 tensors x 18 layers x 816 tokens x 256 x 4 bytes
        (
            &ppo,
            "816 prefix tokens (48 of the prompt), horizon 50 of which 5 are executed, action width 7 of 32",
        ),
        (&ppo, "prefix 30.1 MB per record"),
        (&grpo, "64 environments x 8 episode(s) = 512 episodes, 64 group(s) of 8"),
        (
            &grpo,
            "968 prefix tokens (200 of the prompt), horizon 10 of which 10 are executed",
        ),
    ] {
        assert!(text.contains(fact), "`{fact}` is not in:\n{text}");
    }
}

#[test]
fn the_published_sizes_have_the_published_number_of_weights() {
    let text = described("libero_spatial_ppo_pi0.toml", &[]);
    // openpi's pi0 without the expert's unused output head `[257152, 1024]`, and the value head 1024-512-256-128-1
    let value_head = (1024 + 1) * 512 + (512 + 1) * 256 + (256 + 1) * 128 + (128 + 1);
    let all = 3_501_372_176usize - 257_152 * 1024 + value_head;
    assert!(text.contains(&format!("{}  in all, ", grouped(all))), "{all}: {text}");
    assert!(text.contains(&format!("{}  value head", grouped(value_head))), "{text}");
    // 400M SigLIP-So400m/14, 2.5B Gemma, 300M expert
    let count = |name: &str| -> f64 {
        let line = text
            .lines()
            .find(|line| line.ends_with(name))
            .unwrap_or_else(|| panic!("{name}: {text}"));
        let number = line.split_whitespace().next().expect("number").replace(',', "");
        number.parse().expect("number")
    };
    let near = |found: f64, published: f64| (found / published - 1.0).abs() < 0.04;
    assert!(near(count("image tower"), 412e6), "{text}");
    assert!(near(count("frozen as the tower is"), 2.51e9), "{text}");
    assert!(near(count("action expert and projections"), 311e6), "{text}");
}

#[test]
fn differences_are_those_of_the_configuration() {
    let text = |name: &str| described(name, &[]);
    let (ppo, grpo, ipo) = (
        text("quickstart.toml"),
        text("tabletop_grpo.toml"),
        text("tabletop_flow_ipo.toml"),
    );
    assert!(ppo.contains("mean of `V_vlm` over a padded prompt: reference -0.0272, here -0.0409"));
    assert!(ppo.contains("an unknown or misplaced key") && !ppo.contains("GRPO with a group of 1"));
    assert!(grpo.contains("GRPO with a group of 1") && grpo.contains("`filter_rewards`: reference groups are masked"));
    assert!(!grpo.contains("V_vlm` over a padded prompt"));
    assert!(ipo.contains("padded steps included"));
}

#[test]
fn every_value_has_its_origin() {
    let folder = tempfile::tempdir().expect("folder");
    let mine = folder.path().join("mine.toml");
    let published = configs().join("tabletop_async.toml");
    let text = format!(
        "extends = {:?}\nalgorithm.gamma = 0.9\n",
        published.display().to_string()
    );
    std::fs::write(&mine, text).expect("file");
    let text = described(mine.to_str().expect("a name"), &["runner.seed=7"]);
    let line = |start: &str| {
        let mut lines = text.lines().map(str::trim_start);
        let line = lines
            .find(|line| line.starts_with(start))
            .unwrap_or_else(|| panic!("{start}: {text}"));
        line.split_whitespace().collect::<Vec<_>>().join(" ")
    };
    let base = |name: &str| configs().join("base").join(name).display().to_string();
    for (start, wanted) in [
        ("runner.seed =", "7 --set seed of".to_owned()),
        ("algorithm.gamma =", "0.9 mine.toml discount".to_owned()),
        ("rollout.max_staleness =", format!("1 {} optional", published.display())),
        (
            "env.params.grasp_tol =",
            format!("0.05 {} parameters", base("tabletop.toml")),
        ),
        ("runner.keep_best =", "false default optional".to_owned()),
    ] {
        let found = line(start);
        assert!(
            found.starts_with(&format!("{start} {wanted}")),
            "`{start} {wanted}`: {found}"
        );
    }
    let (_, below) = text.split_once("files, a later one wins\n").expect("files");
    let files: Vec<&str> = below
        .lines()
        .map(str::trim)
        .take_while(|line| !line.is_empty())
        .collect();
    let bases = ["small_pi0.toml", "small_ppo.toml", "tabletop.toml"].map(base);
    let wanted = bases
        .into_iter()
        .chain([published.display().to_string(), mine.display().to_string()]);
    assert_eq!(files, wanted.collect::<Vec<_>>());
    // bases in the recipe's folder are named relative to the folder; a value longer than its column has a line of its own
    let quickstart = described("quickstart.toml", &[]);
    let words = quickstart
        .lines()
        .skip_while(|line| !line.contains("tokenizer.words"))
        .nth(1);
    let words: Vec<&str> = words.expect("the next line").split_whitespace().collect();
    assert_eq!(words[0], "base/tabletop.toml");
}
