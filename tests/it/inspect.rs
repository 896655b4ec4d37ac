//! Recipes where none of the files exists that they name: `learner inspect` describes each, `learner train` says what is missing, and
//! neither leaves anything behind.

use std::{path::Path, process::Command};

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
            "`actor.model.delta_actions`: [8], expected",
        ),
        ("env.worker=\"rust\"", "`env.python`: given, but"),
        ("algorithm.adv_type=\"gea\"", "gea"),
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
