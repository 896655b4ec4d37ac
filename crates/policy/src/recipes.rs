//! The recipes in `configs/`: each is a sound plan; of a thousand mistyped keys none is accepted, and nearly every one is told its
//! right name.

use std::path::Path;

use rand_core::Rng;

use crate::{
    config::RunConfig,
    noise::{Purpose, below, stream},
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

#[test]
fn a_thousand_typos_are_refused_and_most_are_told_the_right_key() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs/quickstart.toml");
    let text = std::fs::read_to_string(&path).expect("configuration");
    let right: toml::Table = text.parse().expect("TOML");
    let mut all = Vec::new();
    keys(&right, &[], &mut all);
    assert!(all.len() > 80, "{} keys", all.len());

    let mut rng = stream(Purpose::Reset, 11, 0, 0, 0);
    let (mut tried, mut told) = (0, 0);
    while tried < TYPOS {
        let key = &all[below(&mut rng, all.len())];
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
        match RunConfig::parse(&typed, &path, &[]) {
            Ok(_) => panic!("`{wrong}` was taken in the place of `{}`", key.join(".")),
            Err(error) => told += usize::from(error.to_string().contains(&format!("`{name}`"))),
        }
    }
    println!("{tried} typos refused, {told} told the right key");
    assert!(told >= 900, "{told} of {tried} were told the right key");
}

#[test]
fn every_recipe_is_a_plan_of_its_own_folder() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs");
    let mut outputs = std::collections::BTreeSet::new();
    for entry in std::fs::read_dir(folder).expect("configs") {
        let path = entry.expect("entry").path();
        if path.extension().is_some_and(|e| e == "toml") {
            let config = RunConfig::load(&path, &[]).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let plan = RunPlan::new(config).unwrap_or_else(|e| panic!("{}: {e}", path.display()));
            let output = plan.config.runner.output_dir;
            assert!(
                outputs.insert(output.clone()),
                "two recipes write to {}",
                output.display()
            );
        }
    }
    assert!(outputs.len() >= 5, "{outputs:?}");
}
