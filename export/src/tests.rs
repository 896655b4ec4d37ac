//! Bundles of a tiny policy: writing, next versions, checks, rejections.

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    os::unix::fs::{FileExt, MetadataExt},
    path::Path,
};

use policy::{
    bundle::{
        Bundle, BundleError, EXPERT_WEIGHTS, FLOW_TIME, MANIFEST, Manifest, VLM_WEIGHTS, VerifiedFiles, write_weights,
    },
    config::{Flavour, Precision, TokenizerConfig, WeightMode},
    cuda::{Attention, CudaContract},
    dims::{PolicyDims, StackDims, Variant, VisionDims},
    element::ElementType,
    flow::{Mdp, NoiseMethod, Sampling},
    graph::{DENOISE_GRAPH, GraphContract, PREFIX_GRAPH, TensorSpec},
    message::told,
    norm::Normalization,
    params::{CriticInput, Heads, ParamSpec, Part, Pooling, ValueHeadDims, ValueSteps, expert_params, params},
    weights::{Weight, WeightsError},
};

use crate::{
    BundleSpec, ExportError, GraphOptions, GraphSource, NextVersion, WeightSource, check::spec_of, check_bundle,
    cuda_graphs, denoise_graph, graph::cuda::cuda_contracts, next_version, write_bundle,
};

fn dims(variant: Variant) -> PolicyDims {
    PolicyDims {
        variant,
        vocab: 11,
        vlm: StackDims { width: 12, mlp: 10 },
        expert: StackDims { width: 8, mlp: 6 },
        depth: 2,
        heads: 4,
        kv_heads: 2,
        head_dim: 4,
        vision: VisionDims {
            width: 6,
            mlp: 5,
            depth: 1,
            heads: 2,
            image_size: 4,
            patch: 2,
        },
        cameras: 2,
        prompt_len: 3,
        action_horizon: 5,
        action_dim: 3,
    }
}

fn manifest(variant: Variant, weights: WeightMode, batch: Option<usize>) -> Manifest {
    Manifest {
        format_version: 0,
        policy_version: 0,
        flow_time: FLOW_TIME.to_owned(),
        dims: dims(variant),
        heads: Heads::value(ValueHeadDims {
            input: CriticInput::Vlm,
            hidden: vec![7],
            state: false,
            pooling: Pooling::Mean,
            tokens: None,
            steps: ValueSteps::Stochastic,
        }),
        sampling: Sampling {
            noise_method: NoiseMethod::named("flow_sde").expect("registered"),
            noise_level: 0.5,
            ignore_last: false,
            num_steps: 4,
            mdp: Mdp::Hybrid,
            safe_logprob: false,
        },
        action_chunk: 5,
        env_action_dim: 2,
        env_state_dim: None,
        cameras: vec!["a".to_owned(), "b".to_owned()],
        tokenizer: TokenizerConfig::Words {
            words: vec!["go".to_owned()],
        },
        normalization: Normalization::None,
        norm_stats: None,
        delta_actions: None,
        discrete_state_input: false,
        flavour: Flavour::Plain,
        precision: Precision::F32,
        weights,
        batch,
        config_digest: String::new(),
        self_test: None,
        files: Vec::new(),
    }
}

fn weights(manifest: &Manifest, value: f32) -> BTreeMap<String, Weight> {
    params(&manifest.dims, &manifest.heads)
        .into_iter()
        .map(|spec| {
            let data = vec![value; spec.shape.iter().product()];
            (
                spec.name,
                Weight {
                    shape: spec.shape,
                    data,
                },
            )
        })
        .collect()
}

/// Returns the manifest of a bundle of flavour `cuda`.
fn cuda_manifest(variant: Variant, precision: Precision, batch: usize) -> Manifest {
    let mut manifest = manifest(variant, WeightMode::Inputs, Some(batch));
    manifest.flavour = Flavour::Cuda;
    manifest.precision = precision;
    manifest.dims.kv_heads = 1;
    manifest.dims.head_dim = 16;
    manifest
}

/// Returns version 1 with the given weights and the sampling of the earlier version.
fn next<'a>(earlier: &Bundle, expert: &'a BTreeMap<String, Weight>) -> NextVersion<'a> {
    NextVersion {
        policy_version: 1,
        sampling: earlier.manifest.sampling.clone(),
        expert,
        self_test: None,
    }
}

fn first(dir: &Path, manifest: Manifest) -> Result<Bundle, ExportError> {
    let weights = weights(&manifest, 0.25);
    let spec = BundleSpec {
        manifest,
        vlm: WeightSource::Weights(&weights),
        expert: WeightSource::Weights(&weights),
        graphs: GraphSource::Build,
        tokenizer: None,
    };
    write_bundle(dir, spec)
}

#[test]
fn bundles_of_every_kind_pass_the_check() {
    let folder = tempfile::tempdir().expect("folder");
    for (i, (variant, mode, batch)) in [
        (Variant::Pi0, WeightMode::Constants, None),
        (Variant::Pi0, WeightMode::Inputs, Some(3)),
        (Variant::Pi05, WeightMode::Constants, Some(1)),
        (Variant::Pi05, WeightMode::Inputs, None),
    ]
    .into_iter()
    .enumerate()
    {
        let dir = folder.path().join(i.to_string());
        first(&dir, manifest(variant, mode, batch)).expect("written");
        let report = check_bundle(&dir).expect("sound");
        assert_eq!((report.policy_version, report.files), (0, 4));
    }
}

#[test]
fn delta_actions_that_fit_the_actions_travel_in_the_manifest() {
    let mut manifest = manifest(Variant::Pi0, WeightMode::Constants, None);
    manifest.delta_actions = Some(vec![1, -1]);
    let dir = tempfile::tempdir().expect("folder");
    let whole = first(&dir.path().join("whole"), manifest.clone()).expect("bundle");
    assert_eq!(
        Bundle::open(whole.dir()).expect("read").manifest.delta_actions,
        manifest.delta_actions
    );
    for wrong in [vec![], vec![3], vec![1, 0], vec![i32::MAX, i32::MIN]] {
        let text = fs::read_to_string(whole.dir().join(MANIFEST)).expect("manifest");
        let mut raw: serde_json::Value = serde_json::from_str(&text).expect("JSON");
        raw["delta_actions"] = wrong.into();
        fs::write(whole.dir().join(MANIFEST), raw.to_string()).expect("written");
        let error = told(&Bundle::open(whole.dir()).expect_err("refused"));
        assert!(error.contains("delta_actions"), "{error}");
        fs::write(whole.dir().join(MANIFEST), text).expect("restored");
    }
}

#[test]
fn the_next_version_writes_only_the_expert() {
    let folder = tempfile::tempdir().expect("folder");
    let zero = first(
        &folder.path().join("0"),
        manifest(Variant::Pi0, WeightMode::Constants, None),
    )
    .expect("first");
    let expert = weights(&zero.manifest, -1.5);
    let one = next_version(&zero, &folder.path().join("1"), next(&zero, &expert)).expect("second");
    check_bundle(one.dir()).expect("sound");
    let inode = |bundle: &Bundle, name: &str| fs::metadata(bundle.path(name)).expect("file").ino();
    for name in [PREFIX_GRAPH, DENOISE_GRAPH, VLM_WEIGHTS] {
        assert_eq!(inode(&zero, name), inode(&one, name), "`{name}` is linked");
    }
    assert_ne!(inode(&zero, EXPERT_WEIGHTS), inode(&one, EXPERT_WEIGHTS));
    assert_eq!(one.manifest.policy_version, 1);
}

#[test]
fn weights_of_another_policy_leave_nothing_behind() {
    let folder = tempfile::tempdir().expect("folder");
    let zero = first(
        &folder.path().join("0"),
        manifest(Variant::Pi05, WeightMode::Constants, None),
    )
    .expect("first");
    let dir = folder.path().join("1");
    let good = weights(&zero.manifest, 1.0);
    let specs = expert_params(&zero.manifest.dims, &zero.manifest.heads);
    let name = specs.first().expect("a weight").name.clone();

    let refusal = |expert: &BTreeMap<String, Weight>| match next_version(&zero, &dir, next(&zero, expert)) {
        Err(ExportError::Weights { file, source }) => (file, source),
        other => panic!("weights that are refused, got {other:?}"),
    };
    let mut diverged = good.clone();
    diverged.get_mut(&name).expect("weight").data[1] = f32::NAN;
    let (file, error) = refusal(&diverged);
    assert_eq!(file, EXPERT_WEIGHTS);
    assert!(matches!(&error, WeightsError::NotFinite { index: 1, .. }), "{error}");

    let mut missing = good.clone();
    missing.remove(&name);
    let error = next_version(&zero, &dir, next(&zero, &missing))
        .expect_err("missing")
        .to_string();
    assert_eq!(
        error,
        format!("weights for `expert.safetensors`: tensor `{name}` is missing")
    );

    let mut misshapen = good.clone();
    misshapen.get_mut(&name).expect("weight").shape.push(1);
    assert!(matches!(refusal(&misshapen).1, WeightsError::Shape { .. }));

    let mut short = good;
    short.get_mut(&name).expect("weight").data.pop();
    assert!(matches!(refusal(&short).1, WeightsError::Shape { .. }));

    let left: Vec<_> = fs::read_dir(folder.path())
        .expect("list")
        .map(|e| e.expect("entry").file_name())
        .collect();
    assert_eq!(left, ["0"], "nothing in addition to the first bundle");
}

#[test]
fn graphs_are_only_reused_for_the_same_policy() {
    let folder = tempfile::tempdir().expect("folder");
    let zero = first(
        &folder.path().join("0"),
        manifest(Variant::Pi0, WeightMode::Constants, None),
    )
    .expect("first");
    let other = manifest(Variant::Pi0, WeightMode::Constants, Some(2));
    let weights = weights(&other, 0.0);
    let spec = BundleSpec {
        manifest: other,
        vlm: WeightSource::Weights(&weights),
        expert: WeightSource::Weights(&weights),
        graphs: GraphSource::Reuse(&zero),
        tokenizer: None,
    };
    let error = write_bundle(&folder.path().join("1"), spec)
        .expect_err("another batch")
        .to_string();
    assert_eq!(error, "the graphs of version 0 cannot be reused: `batch` differs");
}

/// Writes `bytes` over a file of the bundle and updates the manifest's entry, so that only the content is wrong.
fn replace(dir: &Path, name: &str, bytes: &[u8]) {
    fs::write(dir.join(name), bytes).expect("writing");
    let entry = policy::bundle::describe_file(&dir.join(name)).expect("entry");
    let mut manifest = Bundle::open(dir).expect("bundle").manifest;
    for file in &mut manifest.files {
        if file.name == name {
            file.clone_from(&entry);
        }
    }
    fs::write(dir.join(MANIFEST), serde_json::to_vec(&manifest).expect("json")).expect("writing");
}

#[test]
fn weight_files_of_another_policy_are_refused() {
    type Named = BTreeMap<String, Weight>;
    let folder = tempfile::tempdir().expect("folder");
    let refusal = |case: &str, change: &dyn Fn(&mut Named), cut: &dyn Fn(&mut Vec<u8>)| {
        let dir = folder.path().join(case);
        let manifest = manifest(Variant::Pi05, WeightMode::Constants, None);
        let heads = &manifest.heads;
        let mut weights = weights(&manifest, 1.0);
        let own: BTreeSet<String> = expert_params(&manifest.dims, heads)
            .into_iter()
            .map(|s| s.name)
            .collect();
        weights.retain(|name, _| own.contains(name));
        first(&dir, manifest).expect("written");
        change(&mut weights);
        let specs: Vec<ParamSpec> = weights
            .iter()
            .map(|(name, weight)| ParamSpec {
                name: name.clone(),
                shape: weight.shape.clone(),
                part: Part::Expert,
            })
            .collect();
        let file = folder.path().join("changed");
        write_weights(&file, &specs, &weights).expect("written");
        let mut bytes = fs::read(file).expect("bytes");
        cut(&mut bytes);
        replace(&dir, EXPERT_WEIGHTS, &bytes);
        match Bundle::open(&dir).expect("manifest").verify() {
            Err(BundleError::Weights { path, source }) => {
                assert!(path.ends_with(EXPERT_WEIGHTS));
                source
            }
            other => panic!("expected weights that are refused, found {other:?}"),
        }
    };
    let name = "action_out_proj.weight";
    let missing = |weights: &mut Named| drop(weights.remove(name));
    let error = refusal("missing", &missing, &|_| {});
    assert_eq!(error, WeightsError::Missing(name.to_owned()));
    let extra = |weights: &mut Named| drop(weights.insert("action_out_proj.weights".to_owned(), weights[name].clone()));
    let error = refusal("extra", &extra, &|_| {});
    assert!(
        matches!(&error, WeightsError::Extra { hint, .. } if hint.contains(name)),
        "{error}"
    );
    let misshapen = |weights: &mut Named| weights.get_mut(name).expect("weight").shape.reverse();
    let error = refusal("misshapen", &misshapen, &|_| {});
    assert!(matches!(&error, WeightsError::Shape { .. }), "{error}");
    let error = refusal("diverged", &|_| {}, &|bytes| {
        let last = bytes.len() - 4;
        bytes[last..].copy_from_slice(&f32::INFINITY.to_le_bytes());
    });
    assert!(
        matches!(&error, WeightsError::NotFinite { value, .. } if value == "inf"),
        "{error}"
    );
    let error = refusal("truncated", &|_| {}, &|bytes| bytes.truncate(bytes.len() - 1));
    assert!(matches!(&error, WeightsError::Format(_)), "{error}");
}

/// Returns the first version, its verified files, and the next version.
fn verified(folder: &Path) -> (Bundle, VerifiedFiles, Bundle) {
    let manifest = manifest(Variant::Pi0, WeightMode::Constants, None);
    let zero = first(&folder.join("0"), manifest).expect("first");
    let known = zero.verify_with(&VerifiedFiles::default()).expect("sound");
    let expert = weights(&zero.manifest, -1.5);
    let one = next_version(&zero, &folder.join("1"), next(&zero, &expert)).expect("second");
    (zero, known, one)
}

/// Changes the last value of a file in place, and restores the time of the last change.
fn scribble(path: &Path) {
    let file = fs::OpenOptions::new().read(true).write(true).open(path).expect("file");
    let before = file.metadata().expect("metadata");
    let at = before.len() - 4;
    file.write_all_at(&7.5f32.to_le_bytes(), at).expect("written");
    file.set_modified(before.modified().expect("time")).expect("time");
}

fn assert_file_refused(verified: Result<VerifiedFiles, BundleError>, name: &str) {
    match verified {
        Err(BundleError::File { name: found, .. }) => assert_eq!(found, name),
        other => panic!("expected that `{name}` is refused, found {other:?}"),
    }
}

#[test]
fn linked_files_that_were_verified_are_not_read_again() {
    let folder = tempfile::tempdir().expect("folder");
    let (zero, known, one) = verified(folder.path());
    for name in [PREFIX_GRAPH, DENOISE_GRAPH, VLM_WEIGHTS] {
        scribble(&one.path(name));
    }
    // a verification that reads the file detects the change
    assert_file_refused(one.verify_with(&VerifiedFiles::default()), DENOISE_GRAPH);
    let known = one.verify_with(&known).expect("not read");
    // the verified files of this version are valid for the next
    let expert = weights(&zero.manifest, 3.0);
    let two = next_version(&one, &folder.path().join("2"), next(&one, &expert)).expect("third");
    let known = two.verify_with(&known).expect("not read");
    // files outside of the latest version are forgotten
    assert!(two.verify_with(&known).is_ok());
    scribble(&one.path(EXPERT_WEIGHTS));
    assert_file_refused(one.verify_with(&known), EXPERT_WEIGHTS);
}

#[test]
fn files_that_were_replaced_or_changed_are_found() {
    let folder = tempfile::tempdir().expect("folder");
    let (_, known, one) = verified(folder.path());
    one.verify_with(&known).expect("sound");

    // another file of the same size and time
    let path = one.path(VLM_WEIGHTS);
    let before = fs::metadata(&path).expect("metadata");
    let mut bytes = fs::read(&path).expect("bytes");
    fs::remove_file(&path).expect("removed");
    *bytes.last_mut().expect("a byte") ^= 1;
    fs::write(&path, bytes).expect("written");
    let file = fs::File::open(&path).expect("file");
    file.set_modified(before.modified().expect("time")).expect("time");
    assert_file_refused(one.verify_with(&known), VLM_WEIGHTS);
}

#[test]
fn a_file_that_was_written_to_is_found() {
    let folder = tempfile::tempdir().expect("folder");
    let (_, known, one) = verified(folder.path());
    scribble(&one.path(VLM_WEIGHTS));
    one.verify_with(&known).expect("not read");
    let file = fs::File::open(one.path(VLM_WEIGHTS)).expect("file");
    file.set_modified(std::time::SystemTime::UNIX_EPOCH).expect("time");
    assert_file_refused(one.verify_with(&known), VLM_WEIGHTS);
}

#[test]
fn a_known_digest_is_no_proof_for_another_file() {
    let folder = tempfile::tempdir().expect("folder");
    let (zero, known, one) = verified(folder.path());
    scribble(&one.path(EXPERT_WEIGHTS));
    assert_file_refused(one.verify_with(&known), EXPERT_WEIGHTS);

    // the manifest has the digest of a verified file in the entry of a file with other weights
    let rewrite = |change: &dyn Fn(&mut Manifest)| {
        let mut manifest = one.manifest.clone();
        change(&mut manifest);
        fs::write(one.path(MANIFEST), serde_json::to_vec(&manifest).expect("JSON")).expect("written");
        Bundle::open(one.dir()).expect("manifest")
    };
    let entry = |name: &str| zero.manifest.file(name).expect("entry").clone();
    let expert = entry(EXPERT_WEIGHTS);
    let claimed = rewrite(&|manifest| {
        for file in manifest.files.iter_mut().filter(|file| file.name == EXPERT_WEIGHTS) {
            file.clone_from(&expert);
        }
    });
    assert_file_refused(claimed.verify_with(&known), EXPERT_WEIGHTS);

    // a verified file in place of another
    let vlm = entry(VLM_WEIGHTS);
    fs::remove_file(one.path(EXPERT_WEIGHTS)).expect("removed");
    fs::hard_link(zero.path(VLM_WEIGHTS), one.path(EXPERT_WEIGHTS)).expect("linked");
    let swapped = rewrite(&|manifest| {
        for file in manifest.files.iter_mut().filter(|file| file.name == EXPERT_WEIGHTS) {
            (file.bytes, file.sha256) = (vlm.bytes, vlm.sha256.clone());
        }
    });
    let error = swapped.verify_with(&known).expect_err("other weights").to_string();
    assert!(
        error.contains(EXPERT_WEIGHTS) && error.contains("is missing"),
        "{error}"
    );
}

#[test]
fn wrong_graphs_are_refused_with_the_reason() {
    let folder = tempfile::tempdir().expect("folder");
    let good = manifest(Variant::Pi0, WeightMode::Constants, None);
    let refusal = |i: usize, name: &str, bytes: &[u8]| {
        let dir = folder.path().join(i.to_string());
        first(&dir, good.clone()).expect("written");
        replace(&dir, name, bytes);
        told(&check_bundle(&dir).expect_err("wrong graph"))
    };
    let other = first(
        &folder.path().join("other"),
        manifest(Variant::Pi0, WeightMode::Constants, Some(2)),
    )
    .expect("other");
    let read = |name: &str| fs::read(other.path(name)).expect("graph");
    let error = refusal(0, PREFIX_GRAPH, &read(PREFIX_GRAPH));
    assert!(
        error.contains("`images` F32 [2, 2, 3, 4, 4], expected `images` F32 [batch, 2, 3, 4, 4]"),
        "{error}"
    );
    let error = refusal(1, DENOISE_GRAPH, &read(PREFIX_GRAPH));
    assert!(error.contains("expected `x_t`"), "{error}");
    let error = refusal(2, DENOISE_GRAPH, b"not a graph at all");
    assert!(
        error.starts_with("graph `denoise.onnx` ") && error.contains("not an ONNX model"),
        "{error}"
    );

    // a tensor whose offset is four bytes too low
    let mine = first(&folder.path().join("mine"), good.clone()).expect("mine");
    let mut model = <crate::proto::ModelProto as prost::Message>::decode(
        fs::read(mine.path(DENOISE_GRAPH)).expect("graph").as_slice(),
    )
    .expect("model");
    let graph = model.graph.as_mut().expect("graph");
    let tensor = graph
        .initializer
        .iter_mut()
        .find(|t| !t.external_data.is_empty())
        .expect("external");
    let name = tensor.name().to_owned();
    for entry in &mut tensor.external_data {
        if entry.key() == "offset" {
            let offset: u64 = entry.value().parse().expect("offset");
            entry.value = Some((offset - 4).to_string());
        }
    }
    let error = refusal(3, DENOISE_GRAPH, &prost::Message::encode_to_vec(&model));
    assert!(error.contains(&format!("weight `{name}` has offset")), "{error}");

    let graph = model.graph.as_mut().expect("graph");
    graph.node.remove(0);
    let tensor = graph
        .initializer
        .iter_mut()
        .find(|t| t.name() == name)
        .expect("external");
    for entry in &mut tensor.external_data {
        if entry.key() == "offset" {
            let offset: u64 = entry.value().parse().expect("offset");
            entry.value = Some((offset + 4).to_string());
        }
    }
    let error = refusal(4, DENOISE_GRAPH, &prost::Message::encode_to_vec(&model));
    assert!(error.contains("which no earlier node makes"), "{error}");
}

#[test]
fn weights_as_inputs_come_last_in_table_order() {
    let (dims, heads) = (dims(Variant::Pi05), Heads::default());
    let mode = WeightMode::Inputs;
    let bytes = denoise_graph(&dims, &heads, &BTreeMap::new(), mode, GraphOptions::default()).expect("graph");
    let model = <crate::proto::ModelProto as prost::Message>::decode(bytes.as_slice()).expect("model");
    let found: Vec<String> = model
        .graph
        .expect("graph")
        .input
        .iter()
        .map(|input| input.name().to_owned())
        .collect();
    let contract = GraphContract::denoise(&dims, &heads, mode, None);
    let inputs = contract.inputs.into_iter().map(|spec| spec.name);
    let weights = expert_params(&dims, &heads).into_iter().map(|spec| spec.name);
    assert_eq!(found, inputs.chain(weights).collect::<Vec<_>>());
}

#[test]
fn graphs_of_flavour_plain_keep_their_bytes() {
    let folder = tempfile::tempdir().expect("folder");
    let mut found = Vec::new();
    for (variant, mode, batch) in [
        (Variant::Pi0, WeightMode::Constants, None),
        (Variant::Pi0, WeightMode::Inputs, Some(3)),
        (Variant::Pi05, WeightMode::Constants, Some(1)),
        (Variant::Pi05, WeightMode::Inputs, None),
    ] {
        let dir = folder.path().join(found.len().to_string());
        let bundle = first(&dir, manifest(variant, mode, batch)).expect("written");
        for name in [PREFIX_GRAPH, DENOISE_GRAPH] {
            found.push(bundle.manifest.file(name).expect("listed").sha256.clone());
        }
    }
    // digests of the graphs before there were flavours; they change with the version of this crate, which is in the files
    let known = [
        "1831711bdff17c4e0be097890b6b6104397f887db2d9908a07d3e2ed352a9521",
        "2d27baf019b28c35ad80ccd70136d9b01837b4761e87dba72b53e06cfc776238",
        "3cf1919fe46efc9cec00077eea8395c24af8b246d737f8c096c447de387ef451",
        "b331412293911cc4d8094604c89d8bc2bee5f6b9afa6e428ff31c97db4a09fb6",
        "8a4bac2d422957cbf441fe7e57b352e53af5495075a2e35f6482c7bf64a969c4",
        "9798a28ec7874ce7443e2f625034351b106914c3149b9af690b7f43694c5cb25",
        "1831711bdff17c4e0be097890b6b6104397f887db2d9908a07d3e2ed352a9521",
        "f7c55dedabb4db1207e7a79b5a173fdad5facf80ca60b506406459d92103f6cc",
    ];
    assert_eq!(found, known);
}

#[test]
fn bundles_of_flavour_cuda_pass_the_check() {
    let folder = tempfile::tempdir().expect("folder");
    for (i, (variant, precision, batch, files)) in [
        (
            Variant::Pi0,
            Precision::Bf16,
            1,
            ["denoise.onnx", "prefix.1.onnx", "prefix.onnx", "state.onnx"],
        ),
        (
            Variant::Pi05,
            Precision::Bf16,
            1,
            ["condition.onnx", "denoise.onnx", "prefix.1.onnx", "prefix.onnx"],
        ),
        (
            Variant::Pi0,
            Precision::F32,
            3,
            ["denoise.onnx", "prefix.1.onnx", "prefix.onnx", "state.onnx"],
        ),
        (
            Variant::Pi05,
            Precision::Bf16,
            2,
            ["condition.onnx", "denoise.onnx", "prefix.1.onnx", "prefix.onnx"],
        ),
    ]
    .into_iter()
    .enumerate()
    {
        let zero = first(
            &folder.path().join(format!("{i}.0")),
            cuda_manifest(variant, precision, batch),
        )
        .expect("written");
        let report = check_bundle(zero.dir()).expect("sound");
        assert_eq!(report.files, files.len() + 2);
        let expert = weights(&zero.manifest, -1.5);
        let one = next_version(&zero, &folder.path().join(format!("{i}.1")), next(&zero, &expert)).expect("second");
        check_bundle(one.dir()).expect("sound");
        let inode = |bundle: &Bundle, name: &str| fs::metadata(bundle.path(name)).expect("file").ino();
        for name in files.into_iter().chain([VLM_WEIGHTS]) {
            assert_eq!(inode(&zero, name), inode(&one, name), "`{name}` is linked");
        }
        assert_ne!(inode(&zero, EXPERT_WEIGHTS), inode(&one, EXPERT_WEIGHTS));
    }
}

#[test]
fn policies_without_graphs_of_flavour_cuda_are_refused() {
    let folder = tempfile::tempdir().expect("folder");
    let dir = folder.path().join("refused");
    let refusal = |change: &dyn Fn(&mut Manifest)| {
        let mut manifest = cuda_manifest(Variant::Pi0, Precision::Bf16, 1);
        change(&mut manifest);
        let error = first(&dir, manifest).expect_err("refused").to_string();
        assert!(!dir.exists(), "nothing is left");
        error
    };
    let error = refusal(&|manifest| manifest.dims.kv_heads = 2);
    assert!(error.contains("`kv_heads` is 2, expected 1"), "{error}");
    let error = refusal(&|manifest| manifest.dims.head_dim = 8);
    assert!(error.contains("`head_dim` is 8, expected a multiple of 16"), "{error}");
    let error = refusal(&|manifest| manifest.batch = None);
    assert!(error.contains("the batch size is not fixed"), "{error}");
    let error = refusal(&|manifest| manifest.weights = WeightMode::Constants);
    assert!(error.contains("expected `inputs`"), "{error}");
    for pooling in [Pooling::Last, Pooling::MeanPadded] {
        let error = refusal(&|manifest| {
            if let Some(head) = &mut manifest.heads.value {
                head.pooling = pooling;
            }
        });
        assert!(error.contains("`pooling`"), "{error}");
    }
}

#[test]
fn graphs_of_flavour_cuda_are_not_mixed_up() {
    let folder = tempfile::tempdir().expect("folder");
    let manifest = cuda_manifest(Variant::Pi05, Precision::Bf16, 1);
    let zero = first(&folder.path().join("0"), manifest.clone()).expect("written");
    let refused = |key: &str, change: &dyn Fn(&mut Manifest)| {
        let mut manifest = manifest.clone();
        change(&mut manifest);
        let weights = weights(&manifest, 0.0);
        let spec = BundleSpec {
            manifest,
            vlm: WeightSource::Weights(&weights),
            expert: WeightSource::Weights(&weights),
            graphs: GraphSource::Reuse(&zero),
            tokenizer: None,
        };
        let error = write_bundle(&folder.path().join("1"), spec)
            .expect_err("another policy")
            .to_string();
        assert!(error.ends_with(&format!("`{key}` differs")), "{error}");
    };
    refused("precision", &|manifest| manifest.precision = Precision::F32);
    refused("flavour", &|manifest| manifest.flavour = Flavour::Plain);
    refused("num_steps", &|manifest| manifest.sampling.num_steps = 5);

    let plain = crate::tests::manifest(Variant::Pi05, WeightMode::Inputs, Some(1));
    let plain = first(&folder.path().join("plain"), plain).expect("written");
    let graph = fs::read(plain.path(DENOISE_GRAPH)).expect("graph");
    replace(zero.dir(), DENOISE_GRAPH, &graph);
    let error = told(&check_bundle(zero.dir()).expect_err("wrong graph"));
    assert!(
        error.contains("operator set `` 20, expected `` 24 and `com.microsoft` 1"),
        "{error}"
    );
}

#[test]
fn graphs_of_flavour_cuda_keep_the_contract_at_published_sizes() {
    for variant in [Variant::Pi0, Variant::Pi05] {
        for (batch, attention) in [(1, Attention::Grouped), (8, Attention::General)] {
            let dims = PolicyDims::published(variant);
            let heads = manifest(variant, WeightMode::Inputs, None).heads;
            let contract = CudaContract::new(&dims, &heads, ElementType::Bf16, batch, 10).expect("contract");
            assert_eq!(contract.attention, attention);
            let graphs = cuda_graphs(&contract).expect("graphs");
            let contracts = cuda_contracts(&contract);
            assert_eq!(graphs.len(), contracts.len());
            for ((name, bytes), (file, ports)) in graphs.iter().zip(&contracts) {
                assert_eq!(name, file);
                let model = <crate::proto::ModelProto as prost::Message>::decode(bytes.as_slice()).expect("model");
                let graph = model.graph.expect("graph");
                let found = |infos: &[crate::proto::ValueInfoProto]| -> Vec<TensorSpec> {
                    infos.iter().map(|info| spec_of(info).expect("tensor")).collect()
                };
                let inputs: Vec<TensorSpec> = ports.inputs.iter().chain(&ports.weights).cloned().collect();
                assert_eq!(found(&graph.input), inputs, "{name}");
                assert_eq!(found(&graph.output), ports.outputs, "{name}");
            }
            let files: Vec<String> = graphs.into_iter().map(|(name, _)| name).collect();
            assert_eq!(files, contract.files());
        }
    }
}
