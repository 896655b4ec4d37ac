//! Tests of data sets on disk and in memory: bits of the minibatches, rejected files, and memory use.

use std::{
    collections::{BTreeMap, HashMap},
    fs::File,
    path::{Path, PathBuf},
    sync::atomic::{AtomicUsize, Ordering},
    time::{Duration, SystemTime},
};

use policy::{
    config::{RunConfig, SftConfig},
    image::RgbImage,
    message::told,
    noise::{Purpose, below, fill_normal, stream},
    norm::{NormStats, bool_mask, delta_from_absolute},
    params::{Heads, Part},
    plan::RunPlan,
    prompt::Tokenizer,
    transform::{RawObservation, Transform},
};
use safetensors::{Dtype, SafeTensors, tensor::TensorView};
use tch::{Device, Kind, Tensor};

use super::{
    dataset::DataFile,
    loader::{Loader, Minibatch, Targets},
    prefixes::Prefixes,
    pretrain::pretrain,
    sft::sft,
    source::{Demo, DemoSource},
};
use crate::{
    batch::prefix_store::prefix_bytes,
    error::{DatasetError, LearnerError},
    metrics::MetricsLog,
    model::{ExportedParam, ParamStore, Pi0},
};

/// Change of one row.
type Change = fn(&mut Demo);

const PROMPTS: [&str; 3] = ["pick red", "pick", "pick blue"];
/// Keys of a network with one image token, so that a data set of many rows is small.
const SMALL: [&str; 1] = ["actor.model.vision.image_size=8"];
const STATS: &str = r#"{"norm_stats": {
    "state": {"mean": [0.1, -0.2, 0.3, 0.05], "std": [1.5, 0.7, 0.9, 2.0], "q01": [-2.1, -2.2, -1.9, -3.0], "q99": [2.2, 2.0, 2.5, 2.9]},
    "actions": {"mean": [0.3, 0.0, -0.1], "std": [0.8, 1.1, 1.3], "q01": [-2.3, -1.9, -2.6], "q99": [2.4, 2.1, 2.2]}}}"#;

/// Returns the quickstart's plan with a vocabulary that covers the state, and with the given keys.
fn plan(overrides: &[&str]) -> RunPlan {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../configs/quickstart.toml");
    let words = ["pick", "red", "blue", "Task", ":", ",", "State", ";", "Action"].map(str::to_owned);
    let words: Vec<String> = words.into_iter().chain((-1..256).map(|n| n.to_string())).collect();
    let keys = [
        format!("actor.model.tokenizer.words={words:?}"),
        "actor.model.vocab=300".to_owned(),
    ];
    let keys: Vec<String> = keys
        .into_iter()
        .chain(overrides.iter().map(|k| (*k).to_owned()))
        .collect();
    RunPlan::new(RunConfig::load(&path, &keys).expect("configuration")).expect("plan")
}

fn transform(plan: &RunPlan, stats: Option<&str>) -> Transform {
    let stats = stats.map(|text| NormStats::from_json(text).expect("statistics"));
    Transform::of_config(&plan.config.actor.model, stats).expect("transform")
}

/// Data set in the env workers' layout, drawn from a seed.
struct Drawn {
    rows: usize,
    cameras: usize,
    side: usize,
    state: usize,
    target: (&'static str, [usize; 2]),
}

/// Demonstrations for the quickstart's policy.
const DEMOS: Drawn = Drawn {
    rows: 7,
    cameras: 1,
    side: 32,
    state: 4,
    target: ("actions", [8, 3]),
};

impl Drawn {
    fn bytes(&self) -> Vec<u8> {
        let mut rng = stream(Purpose::SelfTest, 9, 0, 0, 0);
        let images: Vec<u8> = (0..self.rows * self.cameras * self.side * self.side * 3)
            .map(|_| below(&mut rng, 256) as u8)
            .collect();
        let mut floats = |count: usize| -> Vec<u8> {
            let mut values = vec![0.0f32; count];
            fill_normal(&mut rng, &mut values);
            values.iter().flat_map(|v| v.to_le_bytes()).collect()
        };
        let (name, [a, b]) = self.target;
        let (state, target) = (floats(self.rows * self.state), floats(self.rows * a * b));
        let ids: Vec<u8> = (0..self.rows as i64).flat_map(|row| (row % 3).to_le_bytes()).collect();
        let view = |dtype, shape, data| TensorView::new(dtype, shape, data).expect("fits");
        let n = self.rows;
        let tensors = [
            (
                "images",
                view(Dtype::U8, vec![n, self.cameras, self.side, self.side, 3], &images),
            ),
            ("state", view(Dtype::F32, vec![n, self.state], &state)),
            ("prompt_id", view(Dtype::I64, vec![n], &ids)),
            (name, view(Dtype::F32, vec![n, a, b], &target)),
        ];
        let meta = serde_json::json!({ "env": "drawn", "prompts": PROMPTS }).to_string();
        safetensors::serialize(tensors, Some(HashMap::from([("meta".to_owned(), meta)]))).expect("lays out")
    }
}

/// Data set in memory.
struct Listed {
    demos: Vec<Demo>,
    prompts: Vec<String>,
    target_shape: [usize; 2],
    /// Number of minibatches read.
    reads: AtomicUsize,
}

impl Listed {
    /// Creates one row for the quickstart's policy per prompt, state and actions.
    fn of(rows: &[(&str, [f32; 4], [f32; 24])], side: usize) -> Self {
        let demo = |(prompt, state, actions): &(&str, [f32; 4], [f32; 24])| Demo {
            observation: RawObservation {
                images: BTreeMap::from([(
                    "top".to_owned(),
                    RgbImage::new(side, side, vec![7; side * side * 3]).expect("image"),
                )]),
                state: state.to_vec(),
                prompt: (*prompt).to_owned(),
            },
            target: actions.to_vec(),
        };
        Self {
            demos: rows.iter().map(demo).collect(),
            prompts: PROMPTS.map(str::to_owned).to_vec(),
            target_shape: [8, 3],
            reads: AtomicUsize::new(0),
        }
    }
}

impl DemoSource for Listed {
    fn path(&self) -> &Path {
        Path::new("listed")
    }

    fn len(&self) -> usize {
        self.demos.len()
    }

    fn prompts(&self) -> &[String] {
        &self.prompts
    }

    fn target_shape(&self) -> [usize; 2] {
        self.target_shape
    }

    fn read(&self, rows: &[usize]) -> Result<Vec<Demo>, DatasetError> {
        self.reads.fetch_add(1, Ordering::SeqCst);
        let demo = |row: &usize| self.demos.get(*row).cloned();
        let missing = |row: &usize| DatasetError::NoRow {
            row: *row,
            rows: self.demos.len(),
        };
        rows.iter().map(|row| demo(row).ok_or_else(|| missing(row))).collect()
    }
}

fn floats(tensor: &Tensor) -> Vec<f32> {
    Vec::try_from(tensor.flatten(0, -1)).expect("f32")
}

/// Returns the SHA-256 over the tensors of consecutive minibatches.
fn digest(dir: &Path, minibatches: &[Minibatch]) -> String {
    let tensors = |minibatch: &Minibatch| {
        let o = &minibatch.observations;
        [
            &o.images,
            &o.image_mask,
            &o.prompt,
            &o.prompt_mask,
            &o.state,
            &minibatch.targets,
        ]
        .map(Tensor::shallow_clone)
    };
    let all: Vec<[Tensor; 6]> = minibatches.iter().map(tensors).collect();
    let mut bytes = Vec::new();
    for index in 0..6 {
        let tensor = Tensor::cat(&all.iter().map(|t| &t[index]).collect::<Vec<_>>(), 0);
        let from = bytes.len();
        bytes.resize(from + tensor.numel() * tensor.kind().elt_size_in_bytes(), 0);
        tensor.copy_data_u8(&mut bytes[from..], tensor.numel());
        bytes.extend(format!("{:?}", tensor.size()).into_bytes());
    }
    let path = dir.join("tensors");
    std::fs::write(&path, bytes).expect("written");
    policy::bundle::describe_file(&path).expect("digest").sha256
}

/// Compares with digests recorded from an implementation that read, normalized and tokenized whole data sets.
#[test]
fn rows_that_are_read_in_parts_have_the_bits_of_a_data_set_read_at_once() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("data.safetensors");
    let two = "actor.model.cameras=[\"top\",\"wrist\"]";
    let scenes = Drawn {
        cameras: 2,
        target: ("keypoints", [6, 2]),
        ..DEMOS
    };
    let cases = [
        (
            &["actor.model.prompt_len=6"][..],
            DEMOS,
            None,
            Targets::Actions,
            "f2f3be98dbfb88c4d188771e332e846817c363fae1b341676af5f6c45c5c5850",
        ),
        (
            &[two],
            scenes,
            None,
            Targets::KeyPoints(6),
            "6a23b6b2e947964426d6ba473ad9d4a2dce105f1e7f415117fcd6e6e8aadfc39",
        ),
        (
            &[
                "actor.model.normalization=\"z_score\"",
                "actor.model.norm_stats=\"s\"",
                "actor.model.delta_actions=[2,-1]",
                "actor.model.action_dim=7",
                two,
            ],
            Drawn { cameras: 2, ..DEMOS },
            Some(STATS),
            Targets::Actions,
            "9dc471c07860e2971a7037e1b0ffad171a9e524659bf239b765e4fdd9bc3dc60",
        ),
        (
            &[
                "actor.model.normalization=\"quantile\"",
                "actor.model.norm_stats=\"s\"",
                "actor.model.variant=\"pi05\"",
                "actor.model.discrete_state_input=true",
                "actor.model.prompt_len=20",
                "actor.model.value_head.state=false",
                "actor.model.delta_actions=[-1,2]",
            ],
            DEMOS,
            Some(STATS),
            Targets::Actions,
            "9f6cd0bcef4bc20eaf785fbeb82f57a5d4523c6d8d1d1d1b510ec71d6cd9b220",
        ),
    ];
    for (keys, drawn, stats, targets, expected) in cases {
        let plan = plan(keys);
        let transform = transform(&plan, stats);
        std::fs::write(&path, drawn.bytes()).expect("written");
        let file = DataFile::open(&path, targets.name(), &plan).expect("opens");
        let loader = Loader::new(&plan, &transform, &file, targets).expect("fits");
        let rows: Vec<usize> = (0..loader.rows()).collect();
        for size in [1, 3, 7] {
            let parts = rows.chunks(size).map(|part| loader.load(part.to_vec()).expect("rows"));
            let parts: Vec<Minibatch> = parts.collect();
            assert_eq!(digest(dir.path(), &parts), expected, "{keys:?}, {size} rows at once");
        }
        let mixed = loader.load(vec![5, 0, 5]).expect("rows");
        for (place, row) in [5, 0, 5].into_iter().enumerate() {
            let one = loader.load(vec![row]).expect("row");
            assert_eq!(mixed.targets.get(place as i64), one.targets.get(0), "row {row}");
            assert_eq!(
                mixed.observations.images.get(place as i64),
                one.observations.images.get(0)
            );
        }
    }
}

#[test]
fn a_prompt_with_the_state_is_tokenized_for_every_row() {
    let rows = [("pick red", -1.0f32), ("pick", 0.0), ("pick red", 1.0)];
    let listed = Listed::of(
        &rows.map(|(prompt, state)| (prompt, [state, 0.5, -0.5, 0.0], [0.0; 24])),
        32,
    );
    for discrete in [true, false] {
        let discrete_key = format!("actor.model.discrete_state_input={discrete}");
        let plan = plan(&[
            "actor.model.variant=\"pi05\"",
            "actor.model.value_head.state=false",
            "actor.model.prompt_len=20",
            &discrete_key,
        ]);
        let transform = transform(&plan, None);
        let tokenizer = Tokenizer::from_config(&plan.config.actor.model.tokenizer, None).expect("words");
        let loader = Loader::new(&plan, &transform, &listed, Targets::Actions).expect("fits");
        let batch = loader.load(vec![0, 1, 2]).expect("rows").observations;
        assert_eq!(
            (batch.prompt.size(), batch.prompt_mask.kind()),
            (vec![3, 20], Kind::Bool)
        );
        for (row, (prompt, state)) in rows.into_iter().enumerate() {
            let want = if discrete {
                tokenizer.tokenize_with_state(prompt, &[state, 0.5, -0.5, 0.0], 20)
            } else {
                tokenizer.tokenize(prompt, 20)
            };
            let got: Vec<i64> = Vec::try_from(batch.prompt.get(row as i64)).expect("ids");
            assert_eq!(got, want.expect("words").ids, "row {row}");
        }
    }
}

#[test]
fn actions_become_differences_as_openpi_makes_them() {
    let plan = plan(&["actor.model.delta_actions=[2,-1]"]);
    let transform = transform(&plan, None);
    let mut actions = [0.0f32; 24];
    fill_normal(&mut stream(Purpose::SelfTest, 1, 0, 0, 0), &mut actions);
    let state = [0.5f32, -1.0, 9.0, 3.0];
    let mut listed = Listed::of(&[("pick", state, actions)], 32);
    let load = |listed: &Listed| Loader::new(&plan, &transform, listed, Targets::Actions)?.load(vec![0]);
    let expected: Vec<f32> = actions
        .chunks(3)
        .flat_map(|row| delta_from_absolute(row, &state, &bool_mask(&[2, -1])).expect("fits"))
        .collect();
    let got = load(&listed).expect("fits").targets;
    assert_eq!(floats(&got.narrow(2, 0, 3)), expected);
    assert_eq!(floats(&got.narrow(2, 3, 1)), [0.0; 8], "padding");

    listed.demos[0].observation.state.truncate(2);
    let error = told(&load(&listed).expect_err("too narrow a state"));
    assert!(
        error.contains("row 0") && error.contains("state has 2 numbers, expected 3 to 4"),
        "{error}"
    );
}

/// Returns the bytes of a file with this header and data.
fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    [&(header.len() as u64).to_le_bytes()[..], header.as_bytes(), data].concat()
}

#[test]
fn a_file_that_cannot_be_trained_on_is_refused_when_it_is_opened() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("data.safetensors");
    let good = DEMOS.bytes();
    let length = usize::from_le_bytes(*good.first_chunk().expect("length"));
    let header = std::str::from_utf8(&good[8..8 + length]).expect("text");
    let swap = |from: &str, to: &str| {
        assert!(header.contains(from), "{header} does not hold {from}");
        with_header(&header.replacen(from, to, 1), &good[8 + length..])
    };
    let long = |claimed: u64| [&claimed.to_le_bytes()[..], &good[8..]].concat();
    let meta = r#""{\"env\":\"drawn\",\"prompts\":[\"pick red\",\"pick\",\"pick blue\"]}""#;
    let with = |drawn: Drawn| drawn.bytes();
    let cases: Vec<(Vec<u8>, &str)> = vec![
        (vec![], "header has 0 bytes"),
        (good[..7].to_vec(), "header has 0 bytes, expected at most 0"),
        (good[..40].to_vec(), "expected at most 32"),
        (long(u64::MAX), "header has 18446744073709551615 bytes"),
        (long(good.len() as u64), "cut"),
        (good[..good.len() - 1].to_vec(), "its header expects"),
        ([&good[..], &[0]].concat(), "its header expects"),
        (swap("{", "["), "header is invalid"),
        (swap("[7,4]", "[8,4]"), "header is invalid"),
        (swap("[7,4]", "[7,4611686018427387904]"), "header is invalid"),
        (
            swap("\"data_offsets\":[0,", "\"data_offsets\":[1,"),
            "header is invalid",
        ),
        (
            with_header(
                &format!(
                    r#"{{"__metadata__":{{"meta":{meta}}},"state":{{"dtype":"F32","shape":[9],"data_offsets":[0,36]}}}}"#
                ),
                &[0; 32],
            ),
            "its header expects",
        ),
        (swap("\"state\":", "\"stata\":"), "`state` is missing"),
        (
            swap("\"state\":{\"dtype\":\"F32\"", "\"state\":{\"dtype\":\"I32\""),
            "`state` has type I32, expected F32",
        ),
        (swap("\"U8\"", "\"I8\""), "`images` has type I8, expected U8"),
        (swap("\"meta\"", "\"mета\""), "`meta` is missing"),
        (swap(meta, "\"[]\""), "`meta` is invalid"),
        (swap("\\\"prompts\\\"", "\\\"prompt\\\""), "`meta` is invalid"),
        (swap("pick blue", "pick white"), "`white`"),
        (with(Drawn { rows: 0, ..DEMOS }), "found 0 rows"),
        (with(Drawn { cameras: 2, ..DEMOS }), "expected [7, 1, 32, 32, 3]"),
        (with(Drawn { side: 16, ..DEMOS }), "expected [7, 1, 32, 32, 3]"),
        (with(Drawn { state: 5, ..DEMOS }), "expected [7, 1 to 4]"),
        (with(Drawn { state: 0, ..DEMOS }), "expected [7, 1 to 4]"),
        (
            with(Drawn {
                target: ("actions", [7, 3]),
                ..DEMOS
            }),
            "expected [8, 3]",
        ),
        (
            with(Drawn {
                target: ("actions", [8, 5]),
                ..DEMOS
            }),
            "`actions` has shape [8, 5]",
        ),
        (
            with(Drawn {
                target: ("keypoints", [3, 2]),
                ..DEMOS
            }),
            "`actions` is missing",
        ),
    ];
    let plan = plan(&[]);
    let transform = transform(&plan, None);
    let open = |targets: Targets| -> String {
        let opened = DataFile::open(&path, targets.name(), &plan);
        let error = match &opened {
            Ok(file) => Loader::new(&plan, &transform, file, targets).err(),
            Err(_) => opened.err(),
        };
        let error = error.expect("refused");
        assert!(matches!(error, LearnerError::Dataset { .. }), "{error:?}");
        told(&error)
    };
    for (bytes, expected) in cases {
        std::fs::write(&path, bytes).expect("written");
        let error = open(Targets::Actions);
        assert!(
            error.contains(expected) && error.contains("data.safetensors"),
            "{error} does not say {expected}"
        );
    }
    let scenes = Drawn {
        target: ("keypoints", [3, 2]),
        ..DEMOS
    };
    std::fs::write(&path, scenes.bytes()).expect("written");
    let error = open(Targets::KeyPoints(6));
    assert!(
        error.contains("shape [3, 2], expected [6, 2]") && error.contains("pretrain.keypoints"),
        "{error}"
    );
    std::fs::remove_file(&path).expect("removed");
    std::fs::create_dir(&path).expect("folder");
    assert!(open(Targets::Actions).contains("directory"));
}

#[test]
fn a_number_that_cannot_be_used_is_named_by_row_and_column() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("data.safetensors");
    let plan = plan(&SMALL);
    // every checked tensor has several blocks
    let rows = 150_000;
    let small = |target| {
        let drawn = Drawn {
            rows,
            side: 8,
            target,
            ..DEMOS
        };
        (target.0, drawn.bytes())
    };
    let (demos, scenes) = (small(("actions", [8, 3])), small(("keypoints", [3, 2])));
    let open = |targets, bytes: &[u8]| {
        std::fs::write(&path, bytes).expect("written");
        DataFile::open(&path, targets, &plan).err().map(|e| told(&e))
    };
    assert_eq!(open(demos.0, &demos.1), None);
    let row = rows - 2;
    let (nan, infinite) = (f32::NAN.to_le_bytes(), f32::NEG_INFINITY.to_le_bytes());
    let (three, negative) = (3i64.to_le_bytes(), (-1i64).to_le_bytes());
    let cases = [
        (
            &demos,
            ("state", 16 * row + 8, &nan[..]),
            format!("`state` of row {row} holds NaN in column 2"),
        ),
        (
            &demos,
            ("actions", 96 * row + 92, &infinite[..]),
            format!("`actions` of row {row} holds -inf in column 23"),
        ),
        (
            &scenes,
            ("keypoints", 24 * row, &nan[..]),
            format!("`keypoints` of row {row} holds NaN in column 0"),
        ),
        (
            &demos,
            ("prompt_id", 8 * row, &three[..]),
            format!("`prompt_id` of row {row} is 3, expected 0 to 3"),
        ),
        (
            &demos,
            ("prompt_id", 8 * row, &negative[..]),
            format!("`prompt_id` of row {row} is -1"),
        ),
    ];
    for ((targets, bytes), (tensor, from, value), expected) in cases {
        let mut bytes = bytes.clone();
        let (header, metadata) = SafeTensors::read_metadata(&bytes).expect("whole");
        let start = 8 + header + metadata.info(tensor).expect("tensor").data_offsets.0 + from;
        bytes[start..start + value.len()].copy_from_slice(value);
        let error = open(targets, &bytes).expect("refused");
        assert!(error.contains(&expected), "{error} does not say {expected}");
    }
}

#[test]
fn a_file_that_changes_while_it_is_read_is_refused() {
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("data.safetensors");
    let plan = plan(&[]);
    let bytes = DEMOS.bytes();
    let cut: fn(&Path) = |path| {
        let file = File::options().write(true).open(path).expect("opens");
        file.set_len(100).expect("cut");
    };
    let touch: fn(&Path) = |path| {
        let file = File::options().write(true).open(path).expect("opens");
        let earlier = SystemTime::now() - Duration::from_mins(1);
        file.set_modified(earlier).expect("touched");
    };
    for change in [cut, touch] {
        std::fs::write(&path, &bytes).expect("written");
        let file = DataFile::open(&path, "actions", &plan).expect("opens");
        file.read(&[6, 0]).expect("rows");
        change(&path);
        let error = file.read(&[6, 0]).expect_err("changed");
        assert!(matches!(error, DatasetError::Changed), "{error:?}");
    }
    std::fs::write(&path, &bytes).expect("written");
    let file = DataFile::open(&path, "actions", &plan).expect("opens");
    // a new file with the same name is another file: reads continue on the open file
    let beside: PathBuf = dir.path().join("new");
    std::fs::write(&beside, b"new").expect("written");
    std::fs::rename(&beside, &path).expect("renamed");
    file.read(&[6, 0]).expect("rows");
    let error = file.read(&[0, 7]).expect_err("past the end");
    assert!(matches!(error, DatasetError::NoRow { row: 7, rows: 7 }), "{error:?}");
}

/// Checks that no unusable number reaches the network, even if the source describes its rows wrongly.
#[test]
fn rows_of_any_source_are_checked_when_they_are_read() {
    let plan = plan(&[]);
    let transform = transform(&plan, None);
    let row = ("pick", [0.5; 4], [0.25; 24]);
    let load = |change: Change| {
        let mut listed = Listed::of(&[row, row, row], 32);
        change(&mut listed.demos[1]);
        let loader = Loader::new(&plan, &transform, &listed, Targets::Actions).expect("fits");
        loader.load(vec![2, 0]).expect("the other rows");
        told(&loader.load(vec![2, 1]).expect_err("refused"))
    };
    let cases: [(Change, &str); 5] = [
        (
            |demo| demo.target[5] = f32::NAN,
            "`actions` of row 1 holds NaN in column 5",
        ),
        (|demo| demo.target.truncate(21), "8 * 3 numbers of row 1"),
        (
            |demo| demo.observation.state[3] = f32::INFINITY,
            "row 1 cannot be read by the policy: state holds inf at element 3",
        ),
        (|demo| demo.observation.state.push(0.0), "state has 5 numbers"),
        (|demo| demo.observation.prompt = "drop".to_owned(), "`drop`"),
    ];
    for (change, expected) in cases {
        let error = load(change);
        assert!(
            error.contains(expected) && error.contains("`listed`"),
            "{error} does not say {expected}"
        );
    }
}

#[test]
fn minibatches_come_in_their_order_and_no_more_than_two_are_in_memory() {
    let plan = plan(&SMALL);
    let transform = transform(&plan, None);
    let rows: Vec<_> = (0..5).map(|row| ("pick", [row as f32; 4], [0.0; 24])).collect();
    let listed = Listed::of(&rows, 8);
    let loader = Loader::new(&plan, &transform, &listed, Targets::Actions).expect("fits");
    // one row was read when the data set was checked
    let reads = || listed.reads.load(Ordering::SeqCst) - 1;
    let draws = |count: usize| (0..count).map(|i| (vec![i % 5, (i + 1) % 5], i));
    let mut steps = 0;
    loader
        .for_each(draws(40), |minibatch, drawn| {
            // the current minibatch and the one read ahead
            assert!(reads() <= steps + 2, "{} minibatches read at step {steps}", reads());
            assert_eq!(drawn, steps);
            assert_eq!(minibatch.rows, [steps % 5, (steps + 1) % 5]);
            let first = minibatch.observations.state.double_value(&[0, 0]);
            assert!((first - (steps % 5) as f64).abs() < 1e-12);
            steps += 1;
            Ok(())
        })
        .expect("all rows are there");
    assert_eq!((steps, reads()), (40, 40));

    // an error arrives in the order of the minibatches and stops both threads
    let (mut done, bad) = (0, (0..9).map(|i| (vec![if i == 3 { 99 } else { 0 }], ())));
    let error = loader.for_each(bad, |_, ()| {
        done += 1;
        Ok(())
    });
    assert!(told(&error.expect_err("no such row")).contains("row 99"));
    assert_eq!((done, reads()), (3, 44));

    let mut done = 0;
    let error = loader.for_each(draws(1000), |_, _| {
        done += 1;
        Err(LearnerError::NetworkEnded)
    });
    assert!(told(&error.expect_err("of the step")).contains("network thread has ended"));
    assert!(done == 1 && reads() <= 46, "{}", reads());
}

fn network(plan: &RunPlan) -> Pi0 {
    let heads = Heads::default();
    let store = ParamStore::random(&plan.dims, &heads, 5, Device::Cpu).expect("weights");
    Pi0::new(plan.dims.clone(), &heads, store).expect("policy")
}

#[test]
fn a_prefix_has_the_same_bits_kept_or_not_and_in_any_company() {
    // prompts of two lengths: passes with and without padding
    let plan = plan(&["actor.model.prompt_len=4"]);
    let transform = transform(&plan, None);
    let policy = network(&plan);
    let dir = tempfile::tempdir().expect("folder");
    let path = dir.path().join("data.safetensors");
    std::fs::write(&path, Drawn { rows: 300, ..DEMOS }.bytes()).expect("written");
    let file = DataFile::open(&path, "actions", &plan).expect("opens");
    let loader = Loader::new(&plan, &transform, &file, Targets::Actions).expect("fits");
    let all = loader.load((0..300).collect()).expect("rows").observations;
    let (expected, _) = all.frozen_prefix(&policy, 256).expect("prefix");
    let row = prefix_bytes(policy.dims()) as u64;
    for bytes in [0, row - 1, row, 5 * row + 3, 1 << 40] {
        let mut prefixes = Prefixes::new(&policy, 300, bytes);
        for rows in [
            vec![7],
            vec![7, 7, 8],
            (0..300).rev().collect(),
            vec![299, 7, 0, 7],
            vec![0],
        ] {
            let minibatch = loader.load(rows.clone()).expect("rows");
            let got = prefixes.of(&rows, &minibatch.observations).expect("prefix");
            let rows: Vec<i64> = rows.into_iter().map(|row| row as i64).collect();
            let want = expected.index_select(&Tensor::from_slice(&rows)).expect("rows");
            assert!(
                (got.k == want.k, got.v == want.v, got.mask == want.mask) == (true, true, true),
                "rows {rows:?} within {bytes} bytes"
            );
        }
    }
}

/// Returns the bytes of the written weights.
fn weights(policy: &Pi0) -> Vec<ExportedParam> {
    let store = policy.store();
    [store.export(Part::Vlm), store.export(Part::Expert)].concat()
}

/// Returns the weights after a few steps of both stages.
fn trained(plan: &RunPlan, scenes: &Loader<'_>, demos: &Loader<'_>, kept_bytes: u64) -> Vec<ExportedParam> {
    let dir = tempfile::tempdir().expect("folder");
    let mut log = MetricsLog::open(dir.path()).expect("log");
    let policy = network(plan);
    let stage = plan.config.pretrain.as_ref().expect("section");
    pretrain(&policy, stage, scenes, 3, &mut log).expect("pre-training");
    let config: &SftConfig = plan.config.sft.as_ref().expect("section");
    let loss = sft(&policy, config, demos, kept_bytes, 3, &mut log).expect("SFT");
    assert!(loss.is_finite());
    weights(&policy)
}

#[test]
fn neither_the_bound_of_the_prefixes_nor_the_kind_of_source_changes_a_bit_of_the_weights() {
    let plan = plan(&[
        "pretrain.optim.steps=2",
        "pretrain.optim.batch_size=5",
        "sft.optim.steps=6",
        "sft.optim.batch_size=8",
        "sft.optim.lr_warmup_steps=0",
    ]);
    let transform = transform(&plan, None);
    let dir = tempfile::tempdir().expect("folder");
    let write = |name: &str, target| {
        let path = dir.path().join(name);
        let drawn = Drawn {
            rows: 20,
            target,
            ..DEMOS
        };
        std::fs::write(&path, drawn.bytes()).expect("written");
        DataFile::open(&path, target.0, &plan).expect("opens")
    };
    let (scenes, demos) = (
        write("scenes", ("keypoints", [3, 2])),
        write("demos", ("actions", [8, 3])),
    );
    let in_memory = |file: &DataFile| Listed {
        demos: file.read(&(0..20).collect::<Vec<_>>()).expect("rows"),
        prompts: file.prompts().to_vec(),
        target_shape: file.target_shape(),
        reads: AtomicUsize::new(0),
    };
    let loader = |source, targets| Loader::new(&plan, &transform, source, targets).expect("fits");
    let row = prefix_bytes(&plan.dims) as u64;
    let from_files = |kept| {
        let scenes = loader(&scenes, Targets::KeyPoints(3));
        trained(&plan, &scenes, &loader(&demos, Targets::Actions), kept)
    };
    let all = from_files(1 << 40);
    for kept in [0, 3 * row] {
        assert!(from_files(kept) == all, "{kept} bytes kept");
    }
    let (scenes, demos) = (in_memory(&scenes), in_memory(&demos));
    let scenes = loader(&scenes, Targets::KeyPoints(3));
    let again = trained(&plan, &scenes, &loader(&demos, Targets::Actions), row);
    assert!(again == all, "from memory");
    assert!(all != weights(&network(&plan)), "the weights were trained");
}
