//! Chunk records made in libtorch by the reference sampler as by an engine, for benchmarks and for tests of the learner alone.

use policy::{
    flow::Schedule,
    noise::{ChunkNoise, NoiseKey},
    params::{CriticInput, ValueSteps},
    plan::RunPlan,
};
use tch::{Kind, Tensor};
use wire::{
    array::Array,
    messages::{ChunkRecord, Mode, Reset, Trajectory, TrajectoryChunk},
};

use super::logprob::{Executed, StepTable, TransitionBatch, transition};
use crate::{
    batch::observation::ObservationBatch,
    error::{Result, from_device},
    model::{ModelError, Pi0},
};

/// Returns the record of one chunk for each observation, with the noise of `keys`, by policy version `version` in training mode.
///
/// # Errors
/// The numbers of keys and observations differ, or a shape does not fit the policy.
pub fn act(
    plan: &RunPlan,
    policy: &Pi0,
    observations: &ObservationBatch,
    keys: &[NoiseKey],
    version: u64,
) -> Result<Vec<ChunkRecord>> {
    let dims = policy.dims();
    let count = observations.len() as usize;
    if keys.len() != count {
        return Err(ModelError::Elements {
            name: "keys".to_owned(),
            expected: count,
            found: keys.len(),
        }
        .into());
    }
    let _guard = tch::no_grad_guard();
    let observations = &observations.to_device(policy.device());
    let sampling = plan.sampling(version);
    let schedule = Schedule::of(&sampling);
    let elements = dims.action_horizon * dims.action_dim;
    let noise: Vec<ChunkNoise> = keys
        .iter()
        .map(|key| ChunkNoise::draw(*key, elements, schedule.draw()))
        .collect();
    let initial: Vec<f32> = noise.iter().flat_map(|n| n.initial.iter().copied()).collect();
    let initial = Tensor::from_slice(&initial)
        .view([count as i64, dims.action_horizon as i64, dims.action_dim as i64])
        .to_device(policy.device());
    let (steps_of, stochastic): (Vec<Vec<i64>>, Vec<_>) = noise
        .into_iter()
        .map(|n| (n.steps.iter().map(|s| s.step as i64).collect(), n.steps))
        .unzip();
    let (cache, pooled) = observations.frozen_prefix(policy, observations.len().max(1))?;
    let state = Some(&observations.state);
    let sample = policy.sample(&cache, state, &initial, &schedule, &stochastic)?;
    let table = StepTable::of(&sampling, dims.expert.width, policy.device());
    let model = &plan.config.actor.model;
    let executed = Executed::of(plan);
    let rows = Tensor::arange(count as i64, (Kind::Int64, policy.device()));
    // by stochastic step, then by record
    let mut logprobs: Vec<Vec<f32>> = Vec::new();
    let mut step_values: Vec<Vec<f32>> = Vec::new();
    for s in 0..schedule.stochastic_steps() {
        // every chunk of a schedule draws the same number of steps
        let step: Vec<i64> = steps_of.iter().map(|steps| steps[s]).collect();
        let step = Tensor::from_slice(&step).to_device(policy.device());
        let (x, x_next) = (
            sample.chain.index(&[Some(&rows), Some(&step)]),
            sample.chain.index(&[Some(&rows), Some(&(&step + 1))]),
        );
        let inputs = TransitionBatch {
            state,
            x: &x,
            x_next: &x_next,
            step: &step,
        };
        let out = transition(policy, &table, &cache, inputs, executed, true)?;
        logprobs.push(floats(&out.logprob)?);
        step_values.extend(out.value.map(|value| floats(&value)).transpose()?);
    }
    let values: Vec<Vec<f32>> = match &plan.heads.value {
        None => Vec::new(),
        Some(head) if head.input == CriticInput::Vlm => vec![floats(&policy.value_vlm(&pooled, &observations.state)?)?],
        Some(head) if head.steps == ValueSteps::Path => {
            let values = sample.values.ok_or(ModelError::NoValueHead)?;
            vec![floats(&values.mean_dim(1, false, Kind::Float))?]
        }
        Some(_) => step_values,
    };
    let (side, chain) = (
        dims.vision.image_size,
        [model.num_steps + 1, dims.action_horizon, dims.action_dim],
    );
    let chunk = executed.action_chunk * executed.env_action_dim;
    keys.iter()
        .zip(steps_of)
        .enumerate()
        .map(|(at, (key, steps))| {
            let row = |t: &Tensor| t.get(at as i64);
            let shape = [steps.len(), executed.action_chunk, executed.env_action_dim];
            let logprob: Vec<f32> = logprobs
                .iter()
                .flat_map(|step| step[at * chunk..(at + 1) * chunk].iter().copied())
                .collect();
            Ok(ChunkRecord {
                key: *key,
                version,
                images: Array::u8(&[dims.cameras, side, side, 3], bytes(&row(&observations.images))),
                image_mask: bytes(&row(&observations.image_mask).to_kind(Kind::Uint8))
                    .iter()
                    .map(|v| *v != 0)
                    .collect(),
                prompt: whole(&row(&observations.prompt))?,
                prompt_mask: bytes(&row(&observations.prompt_mask).to_kind(Kind::Uint8))
                    .iter()
                    .map(|v| *v != 0)
                    .collect(),
                state: Array::f32(&[dims.action_dim], &floats(&row(&observations.state))?),
                logprob: (!steps.is_empty()).then(|| Array::f32(&shape, &logprob)),
                denoise_steps: steps.iter().map(|step| *step as u32).collect(),
                chain: Array::f32(&chain, &floats(&row(&sample.chain))?),
                values: values.iter().map(|step| step[at]).collect(),
            })
        })
        .collect()
}

/// Returns a terminated training episode of one chunk, with reset state `start` and the rewards `rewards`.
pub fn episode(record: ChunkRecord, start: u64, rewards: Vec<f32>, success: bool) -> Trajectory {
    let NoiseKey { seed, env, episode, .. } = record.key;
    Trajectory {
        id: u64::from(env),
        engine: "libtorch".to_owned(),
        order: 1,
        reset: Reset {
            seed,
            env,
            episode,
            reset_state: Some(start),
            task: None,
            group: None,
            video: false,
        },
        mode: Mode::Train,
        prompt: String::new(),
        chunks: vec![TrajectoryChunk {
            record: Some(Box::new(record)),
            rewards,
            frames: Vec::new(),
        }],
        terminated: true,
        success,
        final_value: None,
    }
}

fn bytes(tensor: &Tensor) -> Vec<u8> {
    let mut out = vec![0u8; tensor.numel()];
    tensor.contiguous().copy_data_u8(&mut out, tensor.numel());
    out
}

fn floats(tensor: &Tensor) -> Result<Vec<f32>> {
    let flat = tensor.to_kind(Kind::Float).contiguous().view(-1);
    Vec::try_from(flat).map_err(from_device("the numbers of a record"))
}

fn whole(tensor: &Tensor) -> Result<Vec<i64>> {
    Vec::try_from(tensor.contiguous().view(-1)).map_err(from_device("the prompt of a record"))
}
