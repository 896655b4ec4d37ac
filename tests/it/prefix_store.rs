//! Where the frozen prefixes are kept changes no bit of an update, and never takes more than its bound.

use std::path::Path;

use learner::{
    model::{ParamStore, Pi0},
    observation::ObservationBatch,
    prefix_store::PrefixStore,
    records::{act, episode},
    rollout::RolloutBatch,
    update::{UpdateReport, Updater},
};
use policy::{
    config::RunConfig,
    noise::{NoiseKey, Purpose, below, fill_normal, stream},
    params::Part,
    plan::RunPlan,
};
use tch::{Device, Kind, Tensor};
use wire::messages::Trajectory;

/// Odd, so that passes of one row remain.
const RECORDS: usize = 101;

fn try_plan(config: &str, overrides: &[&str]) -> Result<RunPlan, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../configs/{config}.toml"));
    let common = [
        "actor.optim.lr_warmup_steps=0",
        "actor.optim.critic_warmup_epochs=0",
        "algorithm.update_epoch=2",
    ];
    let overrides: Vec<String> = common.iter().chain(overrides).map(|s| (*s).to_owned()).collect();
    RunConfig::load(&path, &overrides)
        .and_then(RunPlan::new)
        .map_err(|error| error.to_string())
}

fn plan(config: &str, overrides: &[&str]) -> RunPlan {
    try_plan(config, overrides).expect("plan")
}

fn network(plan: &RunPlan) -> Pi0 {
    tch::set_num_threads(1);
    let store = ParamStore::random(&plan.dims, &plan.heads, 5, Device::Cpu).expect("weights");
    Pi0::new(plan.dims.clone(), &plan.heads, store).expect("network")
}

/// Drawn observations; the prompts have from one token to all, and every fifth camera is absent.
fn observations(plan: &RunPlan) -> ObservationBatch {
    let (dims, count) = (&plan.dims, RECORDS as i64);
    let (side, cameras) = (dims.vision.image_size, dims.cameras);
    let mut rng = stream(Purpose::Init, 41, 0, 0, 0);
    let images: Vec<u8> = (0..RECORDS * cameras * side * side * 3)
        .map(|_| below(&mut rng, 256) as u8)
        .collect();
    let mut state = vec![0.0f32; RECORDS * dims.action_dim];
    fill_normal(&mut rng, &mut state);
    let prompt: Vec<i64> = (0..RECORDS * dims.prompt_len)
        .map(|_| below(&mut rng, dims.vocab) as i64)
        .collect();
    let prompt_mask: Vec<bool> = (0..RECORDS)
        .flat_map(|n| (0..dims.prompt_len).map(move |slot| slot <= n % dims.prompt_len))
        .collect();
    let image_mask: Vec<bool> = (0..RECORDS * cameras).map(|n| n % 5 != 4).collect();
    ObservationBatch {
        images: Tensor::from_slice(&images).view([count, cameras as i64, side as i64, side as i64, 3]),
        image_mask: Tensor::from_slice(&image_mask).view([count, -1]),
        prompt: Tensor::from_slice(&prompt).view([count, -1]),
        prompt_mask: Tensor::from_slice(&prompt_mask).view([count, -1]),
        state: Tensor::from_slice(&state).view([count, -1]),
    }
}

/// Episodes of one chunk, in groups of two (the last of three) of which one succeeds.
fn batch(plan: &RunPlan, policy: &Pi0) -> RolloutBatch {
    let keys: Vec<NoiseKey> = (0..RECORDS as u32)
        .map(|env| NoiseKey {
            seed: 3,
            env,
            episode: 0,
            chunk: 0,
        })
        .collect();
    let records = act(plan, policy, &observations(plan), &keys, 0).expect("records");
    let trajectories: Vec<Trajectory> = records
        .into_iter()
        .zip(&keys)
        .map(|(record, key)| {
            let rewards = (0..plan.config.actor.model.num_action_chunks)
                .map(|row| f32::from(row == 0 && key.env % 2 == 0))
                .collect();
            let start = u64::from(key.env / 2).min(RECORDS as u64 / 2 - 1);
            episode(record, start, rewards, key.env % 2 == 0)
        })
        .collect();
    RolloutBatch::new(plan, &trajectories, 0).expect("batch")
}

fn weights(policy: &Pi0) -> Vec<f32> {
    let parts = [Part::Expert, Part::NoiseHead, Part::ValueHead].map(|part| policy.store().export(part));
    parts.into_iter().flatten().flat_map(|(_, _, data)| data).collect()
}

fn update(plan: &RunPlan, batch: &RolloutBatch) -> (Vec<f32>, UpdateReport) {
    let policy = network(plan);
    let report = Updater::new(plan, &policy)
        .expect("optimizer")
        .update(&policy, batch, 0)
        .expect("update");
    (weights(&policy), report)
}

/// Every critic, both kinds of loss, one and several denoise steps per sample; a bound of 1 MB keeps about two thirds of the
/// records of these sizes.
#[test]
fn the_place_of_the_prefix_cache_changes_no_bit_of_an_update() {
    let dir = tempfile::tempdir().expect("folder");
    let output = format!("runner.output_dir={:?}", dir.path());
    for (config, micro) in [
        ("quickstart", "actor.micro_batch_size=2"),
        ("tabletop_grpo", "actor.micro_batch_size=33"),
        ("tabletop_flow_noise", "actor.micro_batch_size=9"),
        ("tabletop_two_layer", "actor.micro_batch_size=50"),
        ("tabletop_flow_ipo", "actor.micro_batch_size=7"),
    ] {
        let sizes = ["actor.global_batch_size=60", micro, output.as_str()];
        let with = |keys: &[&str]| plan(config, &sizes.iter().chain(keys).copied().collect::<Vec<_>>());
        let off = with(&["actor.prefix_cache=\"off\""]);
        let (policy, records) = (network(&off), batch(&off, &network(&off)));
        let (reference, report) = update(&off, &records);
        assert!(report.updates >= 4 && report.skipped == 0, "{config}: {report:?}");
        assert!(reference != weights(&policy), "{config}: nothing was trained");
        assert_eq!(report.prefix_cache_bytes, 0);
        for (keys, whole) in [
            (&[][..], true),
            (&["actor.prefix_cache_mb=1"], false),
            (&["actor.prefix_cache=\"disk\"", "actor.prefix_cache_mb=100"], true),
            (&["actor.prefix_cache=\"disk\"", "actor.prefix_cache_mb=1"], false),
        ] {
            let (got, report) = update(&with(keys), &records);
            assert!(got == reference, "{config} {micro} {keys:?}: bit for bit");
            assert_eq!(report.prefix_cache_bytes > 1_000_000, whole, "{config} {keys:?}");
            assert!(report.prefix_cache_bytes > 0, "{config} {keys:?}");
        }
    }
    let left: Vec<_> = std::fs::read_dir(dir.path()).expect("folder").collect();
    assert!(left.is_empty(), "{left:?}");
}

/// The prefix of a record does not depend on the records beside it, nor on whether it was kept.
#[test]
fn a_record_has_the_same_prefix_in_any_company() {
    let dir = tempfile::tempdir().expect("folder");
    let output = format!("runner.output_dir={:?}", dir.path());
    let store_of = |keys: &[&str]| plan("quickstart", &[&[output.as_str()], keys].concat());
    let whole = store_of(&["actor.micro_batch_size=400"]);
    let policy = network(&whole);
    let observations = observations(&whole);
    let reference = PrefixStore::fill(&whole, &policy, &observations).expect("store");
    let orders: [Vec<i64>; 5] = [
        vec![100],
        vec![0],
        vec![70, 3, 70, 99, 3],
        (0..RECORDS as i64).rev().collect(),
        (0..RECORDS as i64).collect(),
    ];
    for keys in [
        &["actor.prefix_cache=\"off\"", "actor.micro_batch_size=5"][..],
        &["actor.prefix_cache_mb=1", "actor.micro_batch_size=10"],
        &["actor.prefix_cache=\"disk\"", "actor.prefix_cache_mb=1"],
        &["actor.prefix_cache=\"disk\"", "actor.prefix_cache_mb=9"],
    ] {
        let plan = store_of(keys);
        let store = PrefixStore::fill(&plan, &policy, &observations).expect("store");
        for order in &orders {
            let records = Tensor::from_slice(order);
            let ((a, pooled), (b, also)) = (
                store.rows(&records).expect("rows"),
                reference.rows(&records).expect("rows"),
            );
            for (a, b) in [(&a.k, &b.k), (&a.v, &b.v), (&a.mask, &b.mask), (&pooled, &also)] {
                assert!(a.equal(b), "{keys:?}, {} records", order.len());
            }
        }
    }
    // and it is the one of the policy
    let rows = Tensor::from_slice(&[4i64, 77, 12]);
    let own = tch::no_grad(|| observations.select(&rows).prefix(&policy)).expect("prefix");
    let (cache, pooled) = reference.rows(&rows).expect("rows");
    assert!(cache.k.equal(&own.cache.k) && cache.v.equal(&own.cache.v) && cache.mask.equal(&own.cache.mask));
    assert!(pooled.equal(&policy.pooled(&own)) && pooled.kind() == Kind::Float);
}

#[test]
fn the_cache_never_exceeds_its_bound_and_uses_it() {
    let dir = tempfile::tempdir().expect("folder");
    let output = format!("runner.output_dir={:?}", dir.path());
    let stale = dir.path().join("prefix_cache.bin");
    for place in ["memory", "disk"] {
        for mb in [1u64, 2, 100] {
            if place == "disk" {
                std::fs::write(&stale, b"something of this name").expect("file");
            }
            let keys = [
                output.clone(),
                format!("actor.prefix_cache={place:?}"),
                format!("actor.prefix_cache_mb={mb}"),
            ];
            let plan = plan("quickstart", &keys.each_ref().map(String::as_str));
            let (policy, observations) = (network(&plan), observations(&plan));
            let store = PrefixStore::fill(&plan, &policy, &observations).expect("store");
            let bytes = store.bytes().expect("size");
            // by hand: keys and values of 3 layers, 1 head of 32, 20 tokens; 64 pooled numbers; 20 of the mask
            let row = 4 * (2 * 3 * 32 * 20 + 64 + 20);
            assert_eq!(store.wanted_bytes(), row * RECORDS as u64);
            assert_eq!(bytes, row * store.held() as u64, "{place} {mb}");
            assert!(bytes <= mb * 1_000_000, "{place} {mb}: {bytes}");
            assert!(
                store.held() == RECORDS || bytes + row > mb * 1_000_000,
                "{place} {mb}: {bytes}"
            );
            // the file has no name while it is used, so nothing stays of it
            assert!(!stale.exists(), "{place} {mb}");
        }
    }
}

#[test]
fn a_bound_that_makes_no_sense_is_refused() {
    for (keys, wanted) in [
        (&["actor.prefix_cache=\"disk\""][..], "missing"),
        (
            &["actor.prefix_cache=\"off\"", "actor.prefix_cache_mb=5"],
            "remove the key",
        ),
        (&["actor.prefix_cache_mb=0"], "expected 1 to"),
    ] {
        let error = try_plan("quickstart", keys).expect_err("refused");
        assert!(
            error.contains("`actor.prefix_cache_mb`") && error.contains(wanted),
            "{error}"
        );
    }
}
