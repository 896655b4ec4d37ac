//! Chunk records, checked against the plan and laid out by row.

use policy::{
    config::JointLogprob,
    flow::{Mdp, Schedule},
    logprob,
    params::{CriticInput, ValueSteps},
    plan::RunPlan,
};
use tch::{Device, Kind, Tensor};
use wire::messages::ChunkRecord;

use crate::{error::RecordError, versions::check_version};

/// Records by row, and their samples.
#[derive(Debug)]
pub(super) struct Rows {
    /// Pixels, u8 `[records, cameras, size, size, 3]`.
    pub(super) images: Tensor,
    pub(super) image_mask: Vec<bool>,
    pub(super) prompt: Vec<i64>,
    pub(super) prompt_mask: Vec<bool>,
    pub(super) state: Vec<f32>,
    pub(super) chain: Vec<f32>,
    /// Number of records so far.
    pub(super) records: i64,
    /// Index of each sample's record.
    pub(super) record: Vec<i64>,
    pub(super) step: Vec<i64>,
    pub(super) logprob: Vec<f32>,
    /// Values of the samples.
    pub(super) value: Vec<f32>,
    pub(super) version: Vec<i64>,
    /// Sum over the records of the mean magnitude of their executed actions.
    pub(super) magnitude: f64,
}

/// Checked numbers of a record.
struct Numbers {
    steps: Vec<i64>,
    /// Log-probability `[steps, action_chunk, env_action_dim]`; empty for an ODE sample, which has no density.
    logprob: Vec<f32>,
    /// One value, or one value per stochastic step; a single 0 without a critic.
    values: Vec<f32>,
    state: Vec<f32>,
    /// Denoise chain `[num_steps + 1, action_horizon, action_dim]`.
    chain: Vec<f32>,
}

/// Rejects a chunk of a version that an update at `version` may not read, and a partial chunk that is not the last of its episode.
pub(super) fn check_chunk(
    plan: &RunPlan,
    record: &ChunkRecord,
    executed: usize,
    last: bool,
    version: u64,
) -> Result<(), RecordError> {
    let chunk = record.key.chunk;
    check_version(chunk, record.version, plan.oldest(version)..=version)?;
    let full = plan.config.actor.model.num_action_chunks;
    if executed == 0 || executed > full || (executed < full && !last) {
        return Err(RecordError::Rewards {
            chunk,
            found: executed,
            expected: full,
        });
    }
    Ok(())
}

impl Rows {
    /// Allocates the images of `records` records.
    pub(super) fn new(plan: &RunPlan, records: usize) -> Self {
        let (side, cameras) = (plan.dims.vision.image_size as i64, plan.dims.cameras as i64);
        Self {
            images: Tensor::empty([records as i64, cameras, side, side, 3], (Kind::Uint8, Device::Cpu)),
            image_mask: Vec::new(),
            prompt: Vec::new(),
            prompt_mask: Vec::new(),
            state: Vec::new(),
            chain: Vec::new(),
            records: 0,
            record: Vec::new(),
            step: Vec::new(),
            logprob: Vec::new(),
            value: Vec::new(),
            version: Vec::new(),
            magnitude: 0.0,
        }
    }

    /// Adds a record.
    ///
    /// # Errors
    /// A field does not fit the plan; the error names the field.
    pub(super) fn push(&mut self, plan: &RunPlan, record: &ChunkRecord) -> Result<(), RecordError> {
        let dims = &plan.dims;
        let side = dims.vision.image_size;
        let images = record.images.as_u8("images", Some(&[dims.cameras, side, side, 3]))?;
        for (field, found, expected) in [
            ("image_mask", record.image_mask.len(), dims.cameras),
            ("prompt", record.prompt.len(), dims.prompt_len),
            ("prompt_mask", record.prompt_mask.len(), dims.prompt_len),
        ] {
            check_length(field, found, expected)?;
        }
        let numbers = Numbers::read(plan, record)?;
        self.push_samples(plan, record.version, &numbers);
        let mut slot = self.images.get(self.records);
        slot.copy_(&Tensor::from_slice(images).view_as(&slot));
        self.records += 1;
        self.image_mask.extend(&record.image_mask);
        self.prompt.extend(&record.prompt);
        self.prompt_mask.extend(&record.prompt_mask);
        self.state.extend(numbers.state);
        self.chain.extend(numbers.chain);
        Ok(())
    }

    /// Adds the samples of a record: each of its stochastic steps for a two-layer MDP, otherwise the whole chunk.
    fn push_samples(&mut self, plan: &RunPlan, version: u64, numbers: &Numbers) {
        let model = &plan.config.actor.model;
        let (rows, cols, width) = (model.num_action_chunks, model.env_action_dim, plan.dims.action_dim);
        let elements = plan.dims.action_horizon * width;
        let Numbers {
            steps,
            logprob,
            values,
            chain,
            ..
        } = numbers;
        let initial = &chain[..elements];
        match model.openpi.mdp {
            Mdp::TwoLayer => {
                for (s, step) in steps.iter().enumerate() {
                    self.record.push(self.records);
                    self.version.push(version as i64);
                    self.step.push(*step);
                    self.value.push(if values.len() == 1 { values[0] } else { values[s] });
                }
                self.logprob.extend(logprob);
            }
            Mdp::Hybrid | Mdp::Joint => {
                self.record.push(self.records);
                self.version.push(version as i64);
                self.value.push(values.iter().sum::<f32>() / values.len() as f32);
                let of_initial = logprob::executed(initial, initial, width, rows, cols, |_, x, _| {
                    logprob::gaussian(x, 0.0, 1.0)
                });
                let joined = joint(model.openpi.joint_logprob, logprob, model.num_steps, &of_initial);
                self.step.extend(steps);
                self.logprob.extend(joined);
            }
        }
        let executed = &chain[model.num_steps * elements..];
        let sum: f32 = executed
            .chunks(width)
            .take(rows)
            .flat_map(|r| r.iter().take(cols))
            .map(|v| v.abs())
            .sum();
        self.magnitude += f64::from(sum) / (rows * cols) as f64;
    }
}

impl Numbers {
    fn read(plan: &RunPlan, record: &ChunkRecord) -> Result<Self, RecordError> {
        let dims = &plan.dims;
        let model = &plan.config.actor.model;
        let state = record.state.to_f32("state", Some(&[dims.action_dim]))?;
        let chain = [model.num_steps + 1, dims.action_horizon, dims.action_dim];
        let chain = record.chain.to_f32("chain", Some(&chain))?;
        let schedule = Schedule::of(&plan.sampling(record.version));
        let (count, limit) = (schedule.stochastic_steps(), schedule.drawable);
        let steps: Vec<i64> = record.denoise_steps.iter().map(|s| i64::from(*s)).collect();
        if steps.len() != count || steps.iter().any(|s| *s >= limit as i64) {
            return Err(RecordError::DenoiseSteps {
                found: record.denoise_steps.clone(),
                count,
                limit,
            });
        }
        let logprob = match &record.logprob {
            // an ODE sample has no density
            None if steps.is_empty() => Vec::new(),
            None => return Err(RecordError::NoLogprob { steps: steps.len() }),
            Some(logprob) => {
                let shape = [steps.len(), model.num_action_chunks, model.env_action_dim];
                logprob.to_f32("logprob", Some(&shape))?
            }
        };
        let values = match &plan.heads.value {
            None => vec![0.0],
            Some(head) => {
                // a plan with a critic has a stochastic step
                let one = head.input == CriticInput::Vlm || head.steps == ValueSteps::Path;
                check_length("values", record.values.len(), if one { 1 } else { steps.len() })?;
                record.values.clone()
            }
        };
        Ok(Self {
            steps,
            logprob,
            values,
            state,
            chain,
        })
    }
}

fn check_length(field: &'static str, found: usize, expected: usize) -> Result<(), RecordError> {
    if found == expected {
        Ok(())
    } else {
        Err(RecordError::Length { field, found, expected })
    }
}

/// Returns the log-probability per element of one decision. `logprob` `[steps, elements]` is of the stochastic steps, `initial`
/// `[elements]` of the initial noise.
///
/// A mean is over all `num_steps` and the noise, as in the reference; a step without density adds 0. Without a rule there is one step.
fn joint(rule: Option<JointLogprob>, logprob: &[f32], num_steps: usize, initial: &[f32]) -> Vec<f32> {
    let elements = initial.len();
    initial
        .iter()
        .enumerate()
        .map(|(e, initial)| {
            let sum: f32 = logprob.iter().skip(e).step_by(elements).sum();
            match rule {
                Some(JointLogprob::Mean) => (sum + initial) / (num_steps + 1) as f32,
                Some(JointLogprob::Sum) | None => sum,
            }
        })
        .collect()
}
