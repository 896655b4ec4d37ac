//! Another golden set instead of the committed set.

use std::{os::unix::fs::symlink, process::Command};

use integration_tests::golden_dir;

use super::network::MODES;

/// Tests of files that not every golden set has.
const TESTS: [&str; 2] = [
    "golden::network::a_bf16_checkpoint_gives_what_the_reference_computes_in_bf16",
    "golden::real::recipes_of_published_sizes_have_the_published_tensors",
];

#[test]
fn files_that_a_set_lacks_are_skipped_aloud() {
    let lacking = MODES.map(|mode| {
        [
            format!("{mode}_model_bf16.safetensors"),
            format!("real_tensor_names_{mode}.txt"),
        ]
    });
    let lacking = lacking.as_flattened();
    let set = tempfile::tempdir().expect("folder");
    for entry in std::fs::read_dir(golden_dir()).expect("the golden folder") {
        let entry = entry.expect("entry");
        let name = entry.file_name().into_string().expect("a name");
        if !lacking.contains(&name) {
            symlink(entry.path(), set.path().join(name)).expect("a link");
        }
    }
    let own = std::env::current_exe().expect("own path");
    let run = Command::new(own)
        .arg("--exact")
        .args(TESTS)
        .env("PIRL_GOLDEN_DIR", set.path())
        .output()
        .expect("starting the tests");
    let (out, said) = (
        String::from_utf8_lossy(&run.stdout),
        String::from_utf8_lossy(&run.stderr),
    );
    assert!(run.status.success() && out.contains("2 passed"), "{out}{said}");
    for file in lacking {
        assert!(said.contains(&format!("skipped: {file}: ")), "{file}: {said}");
    }
}
