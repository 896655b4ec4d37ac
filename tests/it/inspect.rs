//! Recipes whose files do not exist: `learner inspect` describes each recipe, `learner train` names the missing files, and neither writes a
//! file. A run's own configuration needs no recipe.

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use integration_tests::ring::program;

#[test]
fn every_recipe_is_described_where_none_of_its_files_exists() {
    let folder = tempfile::tempdir().expect("folder");
    let configs = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../configs")
        .canonicalize()
        .expect("configs");
    let mut described = 0;
    for entry in std::fs::read_dir(configs).expect("configs") {
        let path = entry.expect("entry").path();
        if path.extension().is_none_or(|extension| extension != "toml") {
            continue;
        }
        let output = Command::new(program("learner"))
            .arg("inspect")
            .arg(&path)
            .args(["--set", "runner.max_epochs=7"])
            .current_dir(folder.path())
            .output()
            .expect("running the program");
        let text = String::from_utf8_lossy(&output.stdout);
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(
            output.status.success() && errors.is_empty(),
            "{}: {errors}",
            path.display()
        );
        for part in [
            "in all",
            "optimizer steps per iteration, x 7 iterations",
            "runner.max_epochs = 7",
            "differences from the reference",
        ] {
            assert!(text.contains(part), "{}: `{part}` is not in:\n{text}", path.display());
        }
        described += 1;
    }
    assert!(described > 30, "{described} recipes");
    let left = std::fs::read_dir(folder.path()).expect("folder").count();
    assert_eq!(left, 0, "things left behind");
}

#[test]
fn a_wrong_configuration_is_one_line() {
    let config = format!("{}/../configs/libero_spatial_ppo_pi0.toml", env!("CARGO_MANIFEST_DIR"));
    for (set, wanted) in [
        (
            "actor.model.delta_actions=[8]",
            "`actor.model.delta_actions` (--set): [8], expected",
        ),
        (
            "actor.model.cameras=[\"base\",\"wrist\",\"base\"]",
            "`actor.model.cameras` (--set): `base` is there twice",
        ),
        ("env.worker=\"rust\"", "base/libero.toml): given, but"),
        ("algorithm.adv_type=\"gea\"", "`algorithm.adv_type` (--set): `gea`"),
    ] {
        let output = Command::new(program("learner"))
            .args(["inspect", &config, "--set", set])
            .output()
            .expect("running the program");
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(!output.status.success() && output.stdout.is_empty(), "{set}: {errors}");
        assert_eq!(errors.trim_end().lines().count(), 1, "{errors}");
        assert!(errors.contains(wanted), "`{wanted}` is not in: {errors}");
    }
}

#[test]
fn a_recipe_whose_weights_were_not_brought_says_which_and_begins_nothing() {
    let folder = tempfile::tempdir().expect("folder");
    let config = format!("{}/../configs/libero_spatial_ppo_pi0.toml", env!("CARGO_MANIFEST_DIR"));
    let output = Command::new(program("learner"))
        .args(["train", "--config", &config])
        .current_dir(folder.path())
        .output()
        .expect("running the program");
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(
        !output.status.success() && errors.contains("`actor.model.checkpoint` names it"),
        "{errors}"
    );
    assert!(
        errors.contains("checkpoints/RLinf-Pi0-LIBERO-Spatial-Object-Goal-SFT/model.safetensors"),
        "{errors}"
    );
    assert_eq!(std::fs::read_dir(folder.path()).expect("folder").count(), 0, "{errors}");
}

fn learner(args: &[&str]) -> Output {
    let output = Command::new(program("learner")).args(args).output();
    output.expect("running the program")
}

#[test]
fn a_run_keeps_its_whole_configuration_when_the_recipe_is_gone() {
    let folder = tempfile::tempdir().expect("folder");
    let recipes = folder.path().join("recipes");
    fs::create_dir(&recipes).expect("folder");
    let published = format!("{}/../configs/quickstart.toml", env!("CARGO_MANIFEST_DIR"));
    fs::write(
        recipes.join("base.toml"),
        format!("extends = {published:?}\nrunner.seed = 77"),
    )
    .expect("base");
    let mine = recipes.join("mine.toml");
    let short = "pretrain.scenes = 64\npretrain.optim.steps = 1\nsft.demos = 2\nsft.optim.steps = 1\n";
    fs::write(&mine, format!("extends = \"base.toml\"\n{short}")).expect("recipe");
    let run = folder.path().join("run");
    let (mine, set) = (
        mine.display().to_string(),
        format!("runner.output_dir={:?}", run.display().to_string()),
    );
    let described = learner(&["inspect", &mine, "--set", &set]);
    let trained = learner(&["sft", "--config", &mine, "--set", &set]);
    assert!(trained.status.success(), "{}", String::from_utf8_lossy(&trained.stderr));
    fs::remove_dir_all(&recipes).expect("removing the recipes");

    let kept = run.join("config.toml").display().to_string();
    let again = learner(&["inspect", &kept]);
    let (before, after) = (
        String::from_utf8_lossy(&described.stdout),
        String::from_utf8_lossy(&again.stdout),
    );
    assert!(again.status.success(), "{}", String::from_utf8_lossy(&again.stderr));
    assert_eq!(before.lines().next(), after.lines().next(), "the digest");
    assert!(after.contains("runner.seed = 77"), "{after}");
    assert!(!after.contains("quickstart.toml"), "{after}");
}
