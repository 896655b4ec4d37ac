//! The published sizes: names and shapes of all weights, and the time embedding at the published width. No network is run.
#![expect(clippy::expect_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, path::Path};

use integration_tests::{Golden, assert_close, golden_dir, lacks};
use policy::{
    config::RunConfig,
    flow::time_embedding,
    params::{EMBEDDING_ALIAS, Heads, UNUSED, params},
    plan::RunPlan,
};

use super::network::MODES;

/// Returns name and shape of every tensor of a model of the published size.
fn recorded(file: &str) -> BTreeMap<String, Vec<usize>> {
    let text = std::fs::read_to_string(golden_dir().join(file)).expect("names");
    let line = |line: &str| {
        let cells: Vec<&str> = line.split('\t').collect();
        let shape = serde_json::from_str(cells.get(1).expect("a shape")).expect("a list of sizes");
        (cells[0].to_owned(), shape)
    };
    text.lines().filter(|l| !l.starts_with('#')).map(line).collect()
}

/// The recipes of published runs have exactly the tensors of the published models.
#[test]
fn recipes_of_published_sizes_have_the_published_tensors() {
    for mode in MODES {
        let file = format!("real_tensor_names_{mode}.txt");
        if lacks(&file) {
            continue;
        }
        let mut published = recorded(&file);
        // the tied embedding under its other name, and the expert's head over words that no computation reads
        for left_out in [EMBEDDING_ALIAS, UNUSED] {
            assert!(published.remove(left_out).is_some(), "{mode}: {left_out}");
        }
        let recipe = format!("../configs/libero_spatial_ppo_{mode}.toml");
        let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(recipe);
        let plan = RunPlan::new(RunConfig::load(&path, &[]).expect("configuration")).expect("plan");
        let specs = params(&plan.dims, &Heads::default());
        let count = specs.len();
        let ours: BTreeMap<String, Vec<usize>> = specs.into_iter().map(|s| (s.name, s.shape)).collect();
        assert_eq!(ours.len(), count, "{mode}: a name twice");
        for (name, shape) in &published {
            assert_eq!(ours.get(name), Some(shape), "{mode}: {name}");
        }
        let more: Vec<&String> = ours.keys().filter(|name| !published.contains_key(*name)).collect();
        assert!(more.is_empty(), "{mode}: {more:?}");
        println!("{mode}: {count} tensors");
    }
}

/// The file's other primitives are inside the network and are compared with the network, at the golden sizes.
#[test]
fn time_embedding_at_the_published_width() {
    let golden = Golden::open("real_geom");
    let (times, want) = (golden.get("time.t"), golden.get("time.emb1024_f64"));
    let width = *want.shape.last().expect("a width");
    let got: Vec<f32> = times.data.iter().flat_map(|t| time_embedding(*t, width)).collect();
    // f64 on both sides, rounded to f32 here
    assert_close("f64", &got, &want, 1e-7);
    // the reference casts it to f32
    assert_close("f32", &got, &golden.get("time.emb1024"), 1e-7);
}
