//! The place of the frozen prefixes changes no bit of an update, and the cache never exceeds its bound.

use learner::{
    batch::{RolloutBatch, prefix_store::PrefixStore},
    model::Pi0,
    ranks::OneRank,
    update::{UpdateReport, Updater},
};
use policy::plan::RunPlan;
use tch::{Kind, Tensor};

use crate::common::{acted, network, observations, recipe, try_recipe, weights};

/// Number of records; odd, so that passes of one row remain.
const RECORDS: usize = 101;

const COMMON: [&str; 3] = [
    "actor.optim.lr_warmup_steps=0",
    "actor.optim.critic_warmup_epochs=0",
    "algorithm.update_epoch=2",
];

fn plan(config: &str, overrides: &[&str]) -> RunPlan {
    recipe(config, &[&COMMON, overrides].concat())
}

/// Returns a batch of episodes of one chunk, in groups of two (the last of three) with one success each.
fn batch(plan: &RunPlan, policy: &Pi0) -> RolloutBatch {
    let pay = |env: u32| {
        let actions = 0..plan.config.actor.model.num_action_chunks;
        let rewards = actions
            .map(|row| f32::from(row == 0 && env.is_multiple_of(2)))
            .collect();
        (rewards, env.is_multiple_of(2))
    };
    RolloutBatch::new(plan, acted(plan, policy, RECORDS, 0, &pay), 0, &OneRank).expect("batch")
}

fn update(plan: &RunPlan, batch: &RolloutBatch) -> (Vec<f32>, UpdateReport) {
    let policy = network(plan, 5);
    let report = Updater::new(plan, &policy, &OneRank)
        .expect("optimizer")
        .update(batch, 0)
        .expect("update");
    (weights(&policy), report)
}

/// Covers every critic, both kinds of loss, one and several denoise steps per sample. A bound of 1 MB keeps about two thirds of these
/// records.
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
        let (policy, records) = (network(&off, 5), batch(&off, &network(&off, 5)));
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

/// The prefix of a record depends neither on other records of the pass nor on the cache.
#[test]
fn a_record_has_the_same_prefix_in_any_company() {
    let dir = tempfile::tempdir().expect("folder");
    let output = format!("runner.output_dir={:?}", dir.path());
    let store_of = |keys: &[&str]| plan("quickstart", &[&[output.as_str()], keys].concat());
    let whole = store_of(&["actor.micro_batch_size=400"]);
    let policy = network(&whole, 5);
    let observations = observations(&whole, RECORDS);
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
            let ((a, pooled), (b, also)) = (store.rows(order).expect("rows"), reference.rows(order).expect("rows"));
            for (a, b) in [(&a.k, &b.k), (&a.v, &b.v), (&a.mask, &b.mask), (&pooled, &also)] {
                assert!(a.equal(b), "{keys:?}, {} records", order.len());
            }
        }
    }
    // and it is the one of the policy
    let rows = [4, 77, 12];
    let own = tch::no_grad(|| observations.select(&Tensor::from_slice(&rows)).prefix(&policy)).expect("prefix");
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
            let (policy, observations) = (network(&plan, 5), observations(&plan, RECORDS));
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
            // the file has no name during use, so no file remains
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
        let error = try_recipe("quickstart", keys).expect_err("refused");
        assert!(
            error.contains("`actor.prefix_cache_mb`") && error.contains(wanted),
            "{error}"
        );
    }
}
