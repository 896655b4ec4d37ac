//! Small policies, observations and records for several tests.

use std::path::Path;

use learner::{
    batch::observation::ObservationBatch,
    model::{ParamStore, Pi0},
    update::{
        logprob::Executed,
        reference_records::{act, episode},
    },
};
use policy::{
    config::RunConfig,
    noise::{NoiseKey, Purpose, below, fill_normal, stream},
    params::Part,
    plan::RunPlan,
};
use tch::{Device, Tensor};
use wire::messages::Trajectory;

/// Overrides of a network that runs in milliseconds, for tests with many passes.
pub(crate) const SMALL_NETWORK: [&str; 6] = [
    "actor.model.vlm={width=16,mlp=32}",
    "actor.model.expert={width=32,mlp=64}",
    "actor.model.depth=2",
    "actor.model.heads=2",
    "actor.model.head_dim=16",
    "actor.model.vision={width=16,mlp=32,depth=1,heads=2,image_size=16,patch=8}",
];

/// Loads a recipe with these overrides, or returns the reason for its rejection.
pub(crate) fn try_recipe<S: AsRef<str>>(name: &str, overrides: &[S]) -> Result<RunPlan, String> {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../configs/{name}.toml"));
    let overrides: Vec<String> = overrides.iter().map(|s| s.as_ref().to_owned()).collect();
    RunConfig::load(&path, &overrides)
        .and_then(RunPlan::new)
        .map_err(|error| error.to_string())
}

/// Loads a recipe with these overrides.
pub(crate) fn recipe<S: AsRef<str>>(name: &str, overrides: &[S]) -> RunPlan {
    try_recipe(name, overrides).expect("plan")
}

/// Returns the plan's policy with random weights.
pub(crate) fn network(plan: &RunPlan, seed: u64) -> Pi0 {
    tch::set_num_threads(1);
    let store = ParamStore::random(&plan.dims, &plan.heads, seed, Device::Cpu).expect("weights");
    Pi0::new(plan.dims.clone(), &plan.heads, store).expect("network")
}

/// Returns all weights that RL trains.
pub(crate) fn weights(policy: &Pi0) -> Vec<f32> {
    let parts = [Part::Expert, Part::NoiseHead, Part::ValueHead].map(|part| policy.store().export(part));
    parts.into_iter().flatten().flat_map(|(_, _, data)| data).collect()
}

/// Returns the part of a chunk that the plan's environment executes.
pub(crate) fn executed(plan: &RunPlan) -> Executed {
    let model = &plan.config.actor.model;
    Executed {
        action_chunk: model.num_action_chunks,
        env_action_dim: model.env_action_dim,
    }
}

/// Returns random observations; prompts have from one to all tokens, and every fifth camera is absent.
pub(crate) fn observations(plan: &RunPlan, records: usize) -> ObservationBatch {
    let (dims, count) = (&plan.dims, records as i64);
    let (side, cameras) = (dims.vision.image_size, dims.cameras);
    let mut rng = stream(Purpose::Init, 41, 0, 0, 0);
    let images: Vec<u8> = (0..records * cameras * side * side * 3)
        .map(|_| below(&mut rng, 256) as u8)
        .collect();
    let mut state = vec![0.0f32; records * dims.action_dim];
    fill_normal(&mut rng, &mut state);
    let prompt: Vec<i64> = (0..records * dims.prompt_len)
        .map(|_| below(&mut rng, dims.vocab) as i64)
        .collect();
    let prompt_mask: Vec<bool> = (0..records)
        .flat_map(|n| (0..dims.prompt_len).map(move |slot| slot <= n % dims.prompt_len))
        .collect();
    let image_mask: Vec<bool> = (0..records * cameras).map(|n| n % 5 != 4).collect();
    ObservationBatch {
        images: Tensor::from_slice(&images).view([count, cameras as i64, side as i64, side as i64, 3]),
        image_mask: Tensor::from_slice(&image_mask).view([count, -1]),
        prompt: Tensor::from_slice(&prompt).view([count, -1]),
        prompt_mask: Tensor::from_slice(&prompt_mask).view([count, -1]),
        state: Tensor::from_slice(&state).view([count, -1]),
    }
}

/// Outcome of an episode of one chunk, by environment: the rewards of the executed actions, and success.
pub(crate) type Pay<'a> = &'a dyn Fn(u32) -> (Vec<f32>, bool);

/// Returns episodes of one chunk each, made by `policy` as `version`, two from each start (three from the last start for an odd number).
pub(crate) fn acted(plan: &RunPlan, policy: &Pi0, records: usize, version: u64, pay: Pay<'_>) -> Vec<Trajectory> {
    let keys: Vec<NoiseKey> = (0..records as u32)
        .map(|env| NoiseKey {
            seed: 3,
            env,
            episode: 0,
            chunk: 0,
        })
        .collect();
    let made = act(plan, policy, &observations(plan, records), &keys, version).expect("records");
    made.into_iter()
        .zip(&keys)
        .map(|(record, key)| {
            let start = u64::from(key.env / 2).min((records as u64 / 2).saturating_sub(1));
            let (rewards, success) = pay(key.env);
            episode(record, start, rewards, success)
        })
        .collect()
}

pub(crate) fn largest_gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}
