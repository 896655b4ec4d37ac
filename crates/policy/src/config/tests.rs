//! Tests of `extends`: precedence, origins and rejected configurations.

use std::{
    error::Error,
    fs::{self, File},
    path::{Path, PathBuf},
};

use tempfile::TempDir;

use super::*;
use crate::message::told;

fn published(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../configs").join(name)
}

/// Creates a folder with these files. `QUICKSTART` in a text stands for the quoted path of the published recipe.
fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().expect("folder");
    let quickstart = format!("{:?}", published("quickstart.toml").display().to_string());
    for (name, text) in files {
        let path = folder.path().join(name);
        fs::create_dir_all(path.parent().expect("a parent")).expect("folder");
        fs::write(path, text.replace("QUICKSTART", &quickstart)).expect("file");
    }
    folder
}

fn load(folder: &TempDir, name: &str, overrides: &[&str]) -> Result<(RunConfig, Origins), ConfigError> {
    let overrides: Vec<String> = overrides.iter().map(|s| (*s).to_owned()).collect();
    RunConfig::load_with_origins(&folder.path().join(name), &overrides)
}

/// Asserts that the configuration is rejected with a single line that contains all of `wanted`.
#[track_caller]
fn assert_refused(folder: &TempDir, name: &str, overrides: &[&str], wanted: &[&str]) -> ConfigError {
    let error = load(folder, name, overrides).expect_err("refused");
    let text = error.to_string();
    let line = told(&error);
    assert!(!text.contains('\n'), "{text}");
    for part in wanted {
        assert!(line.contains(part), "`{part}` is not in: {line}");
    }
    error
}

#[test]
fn a_later_file_counts_and_tables_are_merged() {
    let folder = folder(&[
        (
            "one.toml",
            "extends = QUICKSTART\nrunner.seed = 11\nenv.params.place_tol = 0.1\n[algorithm]\ngamma = 0.1\ngae_lambda = 0.1\nupdate_epoch = 9",
        ),
        (
            "two.toml",
            "actor.model.cameras = [\"a\", \"b\"]\nalgorithm = { gamma = 0.2, gae_lambda = 0.2 }",
        ),
        (
            "mine.toml",
            "extends = [\"one.toml\", \"two.toml\"]\nalgorithm.gamma = 0.3",
        ),
    ]);
    let (config, origins) = load(&folder, "mine.toml", &["algorithm.update_epoch=7"]).expect("configuration");
    assert_eq!((config.algorithm.gamma, config.algorithm.gae_lambda), (0.3, 0.2));
    assert_eq!((config.algorithm.update_epoch, config.runner.seed), (7, 11));
    assert_eq!(
        config.actor.model.cameras,
        ["a", "b"],
        "an array is replaced, not merged"
    );
    let params: Vec<&str> = config.env.params.keys().map(String::as_str).collect();
    assert_eq!(params, ["grasp_tol", "image_size", "max_episode_steps", "place_tol"]);
    assert_eq!(config.env.params["place_tol"].as_float(), Some(0.1));

    let names: Vec<&str> = origins
        .files()
        .iter()
        .filter_map(|path| path.file_name()?.to_str())
        .collect();
    let bases = ["small_pi0.toml", "small_ppo.toml", "tabletop.toml", "quickstart.toml"];
    assert_eq!(names[..4], bases);
    assert_eq!(names[4..], ["one.toml", "two.toml", "mine.toml"]);
    let file = |name: &str| Some(Origin::File(folder.path().join(name)));
    for (key, origin) in [
        ("algorithm.gamma", file("mine.toml")),
        ("algorithm.gae_lambda", file("two.toml")),
        ("algorithm.update_epoch", Some(Origin::Set)),
        ("actor.model.cameras", file("two.toml")),
        ("env.params.place_tol", file("one.toml")),
        (
            "env.params.grasp_tol",
            Some(Origin::File(published("base/tabletop.toml"))),
        ),
        ("runner.keep_best", None),
    ] {
        assert_eq!(origins.get(key), origin.as_ref(), "{key}");
    }
}

#[test]
fn set_wins_over_every_file() {
    let folder = folder(&[
        ("base.toml", "extends = QUICKSTART\nalgorithm.gamma = 0.1"),
        (
            "mine.toml",
            "extends = \"base.toml\"\nalgorithm.gamma = 0.2\nenv.params.extra = 1",
        ),
    ]);
    let set = ["algorithm.gamma=0.5", "env.params={ image_size = 32, other = 2 }"];
    let (config, origins) = load(&folder, "mine.toml", &set).expect("configuration");
    assert!((config.algorithm.gamma - 0.5).abs() < 1e-12);
    let params: Vec<&str> = config.env.params.keys().map(String::as_str).collect();
    assert_eq!(
        params,
        ["image_size", "other"],
        "a table on the command line replaces the section"
    );
    assert_eq!(origins.get("env.params.other"), Some(&Origin::Set));
    assert_eq!(origins.get("env.params.extra"), None);
    assert_refused(
        &folder,
        "mine.toml",
        &["extends=\"base.toml\""],
        &["`extends` (--set)", "only a file"],
    );
}

#[test]
fn every_value_of_a_recipe_has_an_origin_or_is_a_known_default() {
    let defaults = [
        "actor.model.discrete_state_input",
        "actor.model.openpi.safe_get_logprob",
        "actor.model.value_head.chunk_critic_input",
        "actor.model.value_head.state",
        "runner.keep_best",
    ];
    for name in ["quickstart", "libero_object_0_nft_pi0", "maniskill_async_ppo_pi05"] {
        let (config, origins) = RunConfig::load_with_origins(&published(&format!("{name}.toml")), &[]).expect(name);
        for key in config.keys().expect("keys").keys() {
            let known = origins.get(key).is_some() || defaults.contains(&key.as_str());
            assert!(known, "{name}: {key}");
        }
    }
}

#[test]
fn a_recipe_in_another_folder_extends_a_published_one() {
    let text = "extends = QUICKSTART\nrunner.seed = 5";
    let folder = folder(&[
        ("recipes/mine.toml", text),
        ("copies/base/q.toml", "extends = QUICKSTART"),
    ]);
    fs::write(
        folder.path().join("recipes/up.toml"),
        "extends = \"../copies/base/q.toml\"",
    )
    .expect("file");
    let quickstart = RunConfig::load(&published("quickstart.toml"), &[]).expect("quickstart");
    let (absolute, _) = load(&folder, "recipes/mine.toml", &[]).expect("by an absolute path");
    assert_eq!(absolute.runner.seed, 5);
    let (relative, _) = load(&folder, "recipes/up.toml", &[]).expect("by a path with `..`");
    assert_eq!(relative, quickstart);
    // parsing the text of a file gives the same result as loading the file
    let path = folder.path().join("recipes/up.toml");
    let text = fs::read_to_string(&path).expect("text");
    assert_eq!(RunConfig::parse(&text, &path, &[]).expect("text"), quickstart);
}

#[test]
fn what_is_wrong_in_a_base_names_the_base() {
    let folder = folder(&[
        ("base/unknown.toml", "extends = QUICKSTART\nalgorithm.gama = 0.9"),
        ("unknown.toml", "extends = \"base/unknown.toml\"\nalgorithm.gamma = 0.9"),
        ("base/section.toml", "extends = QUICKSTART\n[algorithms]\ngamma = 0.9"),
        ("section.toml", "extends = \"base/section.toml\""),
        ("base/value.toml", "extends = QUICKSTART\nrunner.seed = \"one\""),
        ("value.toml", "extends = \"base/value.toml\""),
        ("base/extend.toml", "extend = QUICKSTART"),
        ("extend.toml", "extends = [\"base/extend.toml\"]"),
        ("base/kind.toml", "extends = QUICKSTART"),
        (
            "kind.toml",
            "extends = [\"base/kind.toml\"]\nactor.model.tokenizer.kind = \"sentence_piece\"",
        ),
        ("base/syntax.toml", "[runner\nseed = 1"),
        ("syntax.toml", "extends = \"base/syntax.toml\""),
    ]);
    for (name, wanted) in [
        (
            "unknown.toml",
            &["`algorithm.gama`", "base/unknown.toml", "did you mean `gamma`"][..],
        ),
        (
            "section.toml",
            &["`algorithms`", "base/section.toml", "did you mean `algorithm`"],
        ),
        ("value.toml", &["`runner.seed`", "base/value.toml"]),
        (
            "extend.toml",
            &["`extend`", "base/extend.toml", "did you mean `extends`"],
        ),
        // the words come from the base of the published recipe
        ("kind.toml", &["`actor.model.tokenizer.words`", "base/tabletop.toml"]),
        ("syntax.toml", &["base/syntax.toml", "not TOML"]),
    ] {
        assert_refused(&folder, name, &[], wanted);
    }
    assert_refused(
        &folder,
        "base/kind.toml",
        &["algorithm.gama=0.9"],
        &["`algorithm.gama` (--set)", "did you mean `gamma`"],
    );
}

#[test]
fn a_cycle_is_refused_with_its_chain() {
    let folder = folder(&[
        ("itself.toml", "extends = \"itself.toml\""),
        ("alias.toml", "extends = \"base/../alias.toml\""),
        ("a.toml", "extends = \"base/b.toml\""),
        ("base/b.toml", "extends = [\"c.toml\", \"../a.toml\"]"),
        ("base/c.toml", ""),
    ]);
    let text = |name: &str| assert_refused(&folder, name, &[], &["`extends`", "cycle"]).to_string();
    let chain = |names: &[&str]| {
        let names = names
            .iter()
            .map(|name| format!("`{}`", folder.path().join(name).display()));
        names.collect::<Vec<_>>().join(" -> ")
    };
    assert!(text("itself.toml").contains(&chain(&["itself.toml", "itself.toml"])));
    assert!(text("alias.toml").contains(&chain(&["alias.toml", "base/../alias.toml"])));
    assert!(text("a.toml").contains(&chain(&["a.toml", "base/b.toml", "base/../a.toml"])));
    #[cfg(unix)]
    {
        std::os::unix::fs::symlink("link.toml", folder.path().join("link2.toml")).expect("link");
        fs::write(folder.path().join("link.toml"), "extends = \"link2.toml\"").expect("file");
        assert!(text("link.toml").contains(&chain(&["link.toml", "link2.toml"])));
    }
}

#[test]
fn four_levels_of_bases_are_the_most() {
    let folder = folder(&[
        ("4.toml", "extends = \"3.toml\""),
        ("3.toml", "extends = \"2.toml\""),
        ("2.toml", "extends = \"1.toml\""),
        // quickstart and its bases are the third and the fourth level of `2.toml`
        ("1.toml", "extends = QUICKSTART"),
    ]);
    load(&folder, "2.toml", &[]).expect("three levels");
    load(&folder, "3.toml", &[]).expect("four levels");
    let error = assert_refused(
        &folder,
        "4.toml",
        &[],
        &[
            "quickstart.toml",
            "5 levels of bases, expected at most 4",
            "4.toml` -> ",
            "small_pi0.toml`",
        ],
    );
    assert!(matches!(error, ConfigError::Extends { .. }), "{error}");
}

#[test]
fn a_file_is_extended_once() {
    let folder = folder(&[
        ("root.toml", "extends = QUICKSTART"),
        ("one.toml", "extends = \"root.toml\""),
        ("two.toml", "extends = \"root.toml\""),
        ("both.toml", "extends = [\"one.toml\", \"two.toml\"]"),
        ("same.toml", "extends = [\"root.toml\", \"./root.toml\"]"),
    ]);
    assert_refused(
        &folder,
        "both.toml",
        &[],
        &["two.toml", "`extends`", "root.toml` a second time"],
    );
    assert_refused(&folder, "same.toml", &[], &["same.toml", "root.toml` a second time"]);
}

#[test]
fn a_base_that_cannot_be_read_is_one_clear_line() {
    let folder = folder(&[
        ("missing.toml", "extends = \"base/nowhere.toml\""),
        ("folder.toml", "extends = \"base\""),
        ("empty.toml", "extends = \"\""),
        ("nul.toml", "extends = \"a\\u0000b\""),
        ("base/x.toml", ""),
        ("latin.toml", "extends = \"base/latin.toml\""),
        ("long.toml", "extends = \"base/long.toml\""),
        ("limit.toml", "extends = \"base/limit.toml\""),
    ]);
    fs::write(folder.path().join("base/latin.toml"), b"# \xe9\n").expect("file");
    let long = File::create(folder.path().join("base/long.toml")).expect("file");
    long.set_len(100 << 20).expect("100 MiB without a byte written");
    let quickstart = published("quickstart.toml").display().to_string();
    let mut limit = format!("extends = {quickstart:?}\n#");
    limit.push_str(&"x".repeat((1 << 20) - limit.len()));
    fs::write(folder.path().join("base/limit.toml"), limit).expect("file");
    for (name, wanted) in [
        ("nowhere.toml", &["failed to read", "nowhere.toml", "No such file"][..]),
        (
            "missing.toml",
            &[
                "failed to read",
                "base/nowhere.toml`, which `",
                "missing.toml` extends",
                "No such file",
            ],
        ),
        ("folder.toml", &["failed to read", "base`, which", "directory"]),
        ("empty.toml", &["failed to read", "directory"]),
        ("nul.toml", &["failed to read", "which", "nul.toml` extends"]),
        ("latin.toml", &["base/latin.toml", "utf-8"]),
        ("long.toml", &["base/long.toml", "more than the 1048576 bytes"]),
        ("base/long.toml", &["base/long.toml", "more than the 1048576 bytes"]),
    ] {
        assert_refused(&folder, name, &[], wanted);
    }
    load(&folder, "limit.toml", &[]).expect("a file of exactly 1 MiB");
    let missing = load(&folder, "missing.toml", &[]).expect_err("refused");
    assert!(missing.source().is_some() && !missing.to_string().contains("No such file"));
}

#[test]
fn extends_is_a_name_or_a_list_of_names() {
    let folder = folder(&[
        ("number.toml", "extends = 3"),
        ("list.toml", "extends = [\"base.toml\", 3]"),
        ("table.toml", "[extends]\na = 1"),
        ("base.toml", ""),
        ("section.toml", "extends = QUICKSTART\nrunner.extends = QUICKSTART"),
    ]);
    for (name, found) in [
        ("number.toml", "integer"),
        ("list.toml", "integer"),
        ("table.toml", "table"),
    ] {
        assert_refused(
            &folder,
            name,
            &[],
            &["`extends`", name, found, "expected the name of a file"],
        );
    }
    assert_refused(&folder, "section.toml", &[], &["`runner.extends`", "unknown key"]);
}

#[test]
fn an_error_quotes_no_more_than_a_bit_of_a_file() {
    let deep = format!("a = {}", "[".repeat(500_000));
    let dotted = format!("{}a = 1", "a.".repeat(200_000));
    let name = format!("{} = 1", "a".repeat(900_000));
    let folder = folder(&[("deep.toml", &deep), ("dotted.toml", &dotted), ("name.toml", &name)]);
    for name in ["deep.toml", "dotted.toml", "name.toml"] {
        let line = told(&assert_refused(&folder, name, &[], &[]));
        assert!(line.len() < 5000, "{} bytes: {line:.200}", line.len());
    }
}
