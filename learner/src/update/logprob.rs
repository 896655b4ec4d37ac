//! Log-probability and value of recorded denoise transitions, with gradient: the learner's side of the PPO ratio.

use policy::{
    flow::{Sampling, Schedule, time_embedding},
    logprob::LN_SQRT_TWO_PI,
    plan::RunPlan,
};
use tch::{Device, Kind, Tensor};

use crate::model::{ModelError, Pi0, PrefixCache, check_shape};

/// Stochastic rows of a schedule as tensors, made once per schedule.
#[derive(Debug)]
pub struct StepTable {
    /// `c_x` of the mean, f32 `[K]`.
    c_x: Tensor,
    /// `c_v` of the mean, f32 `[K]`.
    c_v: Tensor,
    /// Standard deviation, f32 `[K]`.
    std: Tensor,
    /// Time embedding, f32 `[K, expert width]`.
    time_emb: Tensor,
    drawable: usize,
    /// Whether to use the reference's safe log-probability, `-(x_next - mean)^2`.
    safe: bool,
}

impl StepTable {
    /// Returns the table of `schedule` for an expert of width `expert_width`.
    pub fn new(schedule: &Schedule, expert_width: usize, device: Device) -> Self {
        let rows = &schedule.stochastic;
        let column = |values: Vec<f32>| Tensor::from_slice(&values).to_device(device);
        let embeddings: Vec<f32> = rows.iter().flat_map(|r| time_embedding(r.t, expert_width)).collect();
        Self {
            c_x: column(rows.iter().map(|r| r.mean_coefficients().0 as f32).collect()),
            c_v: column(rows.iter().map(|r| r.mean_coefficients().1 as f32).collect()),
            std: column(rows.iter().map(|r| r.std as f32).collect()),
            time_emb: column(embeddings).view([rows.len() as i64, expert_width as i64]),
            drawable: schedule.drawable,
            safe: false,
        }
    }

    /// Returns the table of a policy version's sampling.
    pub fn of(sampling: &Sampling, expert_width: usize, device: Device) -> Self {
        Self {
            safe: sampling.safe_logprob,
            ..Self::new(&Schedule::of(sampling), expert_width, device)
        }
    }

    /// Returns the number of denoise steps.
    pub fn num_steps(&self) -> i64 {
        self.time_emb.size()[0]
    }
}

/// Batch of recorded transitions.
#[derive(Debug, Clone, Copy)]
pub struct TransitionBatch<'a> {
    /// State `[B, A]`, pi0 only.
    pub state: Option<&'a Tensor>,
    /// `x` before the stochastic step, `[B, H, A]`.
    pub x: &'a Tensor,
    /// `x` after the stochastic step, `[B, H, A]`.
    pub x_next: &'a Tensor,
    /// Index of the stochastic step, i64 `[B]`.
    pub step: &'a Tensor,
}

/// Part of a chunk that the environment executes; only this part enters the log-probability.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Executed {
    /// Number of executed rows.
    pub action_chunk: usize,
    /// Action width of the environment.
    pub env_action_dim: usize,
}

impl Executed {
    /// Returns the executed part of a plan's chunks.
    pub fn of(plan: &RunPlan) -> Self {
        let model = &plan.config.actor.model;
        Self {
            action_chunk: model.num_action_chunks,
            env_action_dim: model.env_action_dim,
        }
    }
}

/// Recomputed numbers of recorded transitions.
#[derive(Debug)]
pub struct Transition {
    /// Log-probability per executed element, f32 `[B, action_chunk, env_action_dim]`.
    pub logprob: Tensor,
    /// Entropy per executed element, f32 `[B, action_chunk, env_action_dim]`; `None` if the entropy does not depend on the weights.
    pub entropy: Option<Tensor>,
    /// `V_expert` at the stochastic step, f32 `[B]`; `None` without an expert value head.
    pub value: Option<Tensor>,
    /// Velocity `[B, H, A]`.
    pub v_t: Tensor,
}

/// Returns the log-density per element of `x_next` under `N(mean, std^2)`: `policy::logprob::gaussian` on tensors.
pub fn gaussian(x_next: &Tensor, mean: &Tensor, std: &Tensor) -> Tensor {
    let z = (x_next - mean) / std;
    z.square() * -0.5 - (std.log() + f64::from(LN_SQRT_TWO_PI))
}

/// Returns the entropy of `N(0, 1)`: `ln sqrt(2 pi e)`.
pub fn standard_normal_entropy() -> f64 {
    0.5 + f64::from(LN_SQRT_TWO_PI)
}

/// Recomputes the log-probability of each transition and, with an expert value head, the value at the same step. Runs one expert pass
/// for the whole batch. With `detach_critic_input` the value's gradient stops at the head.
///
/// # Errors
/// A shape does not fit, or a step cannot be drawn.
pub fn transition(
    policy: &Pi0,
    table: &StepTable,
    cache: &PrefixCache,
    batch: TransitionBatch<'_>,
    executed: Executed,
    detach_critic_input: bool,
) -> Result<Transition, ModelError> {
    let TransitionBatch { state, x, x_next, step } = batch;
    let dims = policy.dims();
    check_shape("x_next", x_next, &x.size())?;
    check_shape("step", step, &[cache.batch()])?;
    let (chunk, width) = (executed.action_chunk, executed.env_action_dim);
    if chunk > dims.action_horizon || width > dims.action_dim {
        return Err(ModelError::Shape {
            name: "executed",
            expected: vec![dims.action_horizon as i64, dims.action_dim as i64],
            found: vec![chunk as i64, width as i64],
        });
    }
    for found in [step.min().int64_value(&[]), step.max().int64_value(&[])] {
        if usize::try_from(found).map_or(true, |k| k >= table.drawable) {
            return Err(ModelError::Step {
                found,
                limit: table.drawable,
            });
        }
    }
    let column = |values: &Tensor| values.index_select(0, step).view([-1, 1, 1]);
    let velocity = policy.velocity_embedded(cache, state, x, &table.time_emb.index_select(0, step))?;
    let cut = |y: &Tensor| y.narrow(1, 0, chunk as i64).narrow(2, 0, width as i64);
    let mean = cut(x) * column(&table.c_x) + cut(&velocity.v_t) * column(&table.c_v);
    let learnt = policy.noise_std(&velocity.hidden).map(|std| cut(&std));
    let std = match &learnt {
        Some(learnt) => learnt * column(&table.std),
        None => column(&table.std),
    };
    let logprob = if table.safe {
        (cut(x_next) - &mean).square().neg()
    } else {
        gaussian(&cut(x_next), &mean, &std)
    };
    // of N(., std^2)
    let entropy = learnt.map(|_| std.log() + standard_normal_entropy());
    let value = if detach_critic_input {
        policy.value_expert(&velocity.hidden.detach())
    } else {
        policy.value_expert(&velocity.hidden)
    };
    Ok(Transition {
        logprob: logprob.to_kind(Kind::Float),
        entropy,
        value,
        v_t: velocity.v_t,
    })
}

/// Returns `V_expert` as the mean over all denoise steps of the recorded paths `chain` `[B, K + 1, H, A]`, f32 `[B]`; `None` without an
/// expert value head. With `detach_critic_input` the gradient stops at the head.
///
/// # Errors
/// A shape does not fit.
pub fn path_value(
    policy: &Pi0,
    table: &StepTable,
    cache: &PrefixCache,
    state: Option<&Tensor>,
    chain: &Tensor,
    detach_critic_input: bool,
) -> Result<Option<Tensor>, ModelError> {
    let (batch, steps) = (cache.batch(), table.num_steps());
    let (horizon, width) = (policy.dims().action_horizon as i64, policy.dims().action_dim as i64);
    check_shape("chain", chain, &[batch, steps + 1, horizon, width])?;
    let mut values = Vec::with_capacity(steps as usize);
    for k in 0..steps {
        let time = table.time_emb.narrow(0, k, 1).expand([batch, -1], false);
        let pass = || policy.velocity_embedded(cache, state, &chain.select(1, k), &time);
        let hidden = if detach_critic_input {
            tch::no_grad(pass)?.hidden
        } else {
            pass()?.hidden
        };
        values.extend(policy.value_expert(&hidden));
    }
    Ok((!values.is_empty()).then(|| Tensor::stack(&values, 1).mean_dim(1, false, Kind::Float)))
}
