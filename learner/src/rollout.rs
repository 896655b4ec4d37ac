//! An iteration's episodes: ordered, collected, and laid out as one batch of chunk records.

use std::time::{Duration, Instant};

use indicatif::ProgressBar;
use policy::{
    config::JointLogprob,
    flow::{Mdp, Schedule},
    logprob,
    params::{CriticInput, ValueSteps},
    plan::RunPlan,
};
use tch::Tensor;
use wire::{
    array::ArrayError,
    messages::{ChunkRecord, Mode, Reset, Trajectory},
};

use crate::{
    advantage::{Advantages, Episode, EstimatorSettings, estimator, normalize},
    error::{LearnerError, Result},
    hub::{Hub, HubEvent},
    launch::Children,
    metrics::progress_style,
    observation::ObservationBatch,
    two_layer,
};

/// How long the ring may be silent before the run ends with an error.
const SILENCE: Duration = Duration::from_mins(2);
/// How often children are looked after while waiting.
const LOOK: Duration = Duration::from_millis(200);

/// Episodes of an iteration, with what the reports of engines said meanwhile.
#[derive(Debug)]
pub struct Collected {
    /// Episodes in the order of their environment and episode numbers.
    pub trajectories: Vec<Trajectory>,
    /// Seconds until the version was live, from the announce.
    pub reload_seconds: f64,
    /// Seconds from the order to the last episode.
    pub seconds: f64,
}

/// Orders `resets` from `version` and waits for all of them.
///
/// # Errors
/// A child ends, the engine refuses the version, or nothing comes for two minutes.
pub fn collect(
    hub: &Hub,
    children: &mut Children,
    version: u64,
    mode: Mode,
    resets: Vec<Reset>,
    label: &str,
) -> Result<Collected> {
    let wanted = resets.len();
    let bar = ProgressBar::new(wanted as u64)
        .with_style(progress_style())
        .with_message(label.to_owned());
    hub.order(version, mode, resets)?;
    let begin = Instant::now();
    let mut last_news = Instant::now();
    let mut state = "no engine has connected".to_owned();
    let mut reload_seconds = 0.0;
    let mut trajectories: Vec<Trajectory> = Vec::with_capacity(wanted);
    while trajectories.len() < wanted {
        children.check()?;
        match hub.next(LOOK)? {
            Some(HubEvent::Trajectory(trajectory)) => {
                trajectories.push(*trajectory);
                bar.inc(1);
                last_news = Instant::now();
            }
            Some(HubEvent::Reload(report)) => {
                last_news = Instant::now();
                if report.version == version {
                    if let Some(reason) = report.refused {
                        return Err(LearnerError::Refused { version, reason });
                    }
                    reload_seconds = report.seconds;
                }
            }
            Some(HubEvent::State(engine)) => {
                state = format!(
                    "the engine serves version {:?} to {} slots",
                    engine.version, engine.slots
                );
            }
            Some(HubEvent::Gone) => tracing::warn!("an engine closed its connection; waiting for it or another one"),
            None => {}
        }
        if last_news.elapsed() > SILENCE {
            return Err(LearnerError::Silence {
                waiting_for: format!(
                    "{} of {wanted} episodes of version {version}",
                    wanted - trajectories.len()
                ),
                seconds: SILENCE.as_secs(),
                state,
            });
        }
    }
    bar.finish_and_clear();
    trajectories.sort_by_key(|t| (t.reset.env, t.reset.episode));
    Ok(Collected {
        trajectories,
        reload_seconds,
        seconds: begin.elapsed().as_secs_f64(),
    })
}

/// Share of successful episodes.
pub fn success_rate(trajectories: &[Trajectory]) -> f64 {
    trajectories.iter().filter(|t| t.success).count() as f64 / trajectories.len().max(1) as f64
}

/// Share of episodes that ended by themselves without success, like a wrong object in the goal.
pub fn failure_rate(trajectories: &[Trajectory]) -> f64 {
    trajectories.iter().filter(|t| t.terminated && !t.success).count() as f64 / trajectories.len().max(1) as f64
}

/// All chunk records of an iteration, and the decisions to train on: `M` samples, each of one record.
///
/// A sample is a whole chunk, or a single denoise step of one when every step is a transition of its own (`mdp = "two_layer"`).
#[derive(Debug)]
pub struct RolloutBatch {
    /// What was seen, `N` records.
    pub observations: ObservationBatch,
    /// `x` before each denoise step and after the last, f32 `[N, K + 1, H, A]`.
    pub chain: Tensor,
    /// Which record, i64 `[M]`.
    pub record: Tensor,
    /// Which stochastic denoise steps, i64 `[M, S]`; `S` is above 1 for joint likelihoods only.
    pub step: Tensor,
    /// Log-probability at rollout per executed element (joined over the `S` steps), f32 `[M, action_chunk, env_action_dim]`.
    pub old_logprob: Tensor,
    /// Value at rollout, f32 `[M]`; zeros without a critic.
    pub old_value: Tensor,
    /// Advantages, normalised when configured, f32 `[M]`.
    pub advantage: Tensor,
    /// Value targets, f32 `[M]`.
    pub returns: Tensor,
    /// Mean magnitude of the executed actions.
    pub action_magnitude: f64,
}

/// A chunk record that does not fit the plan.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RecordError {
    /// An array.
    #[error(transparent)]
    Array(#[from] ArrayError),
    /// Another field.
    #[error("`{0}` does not fit the policy: {1}")]
    Field(&'static str, String),
}

#[derive(Default)]
struct Rows {
    images: Vec<u8>,
    image_mask: Vec<bool>,
    prompt: Vec<i64>,
    prompt_mask: Vec<bool>,
    state: Vec<f32>,
    chain: Vec<f32>,
    records: i64,
    record: Vec<i64>,
    step: Vec<i64>,
    logprob: Vec<f32>,
    /// Values of the samples.
    value: Vec<f32>,
    magnitude: f64,
}

impl RolloutBatch {
    /// Checks every record against the plan and estimates the advantages.
    ///
    /// # Errors
    /// Names the episode whose record does not fit.
    pub fn new(plan: &RunPlan, trajectories: &[Trajectory], version: u64) -> Result<Self> {
        let mut rows = Rows::default();
        let mut rewards: Vec<Vec<f32>> = Vec::with_capacity(trajectories.len());
        let mut values: Vec<Vec<f32>> = Vec::with_capacity(trajectories.len());
        for trajectory in trajectories {
            let Reset { env, episode, .. } = trajectory.reset;
            let from = rows.value.len();
            for chunk in &trajectory.chunks {
                let record = chunk.record.as_deref().ok_or_else(|| LearnerError::Record {
                    env,
                    episode,
                    detail: "a training episode came without its chunk records".to_owned(),
                })?;
                if record.version != version {
                    return Err(LearnerError::Record {
                        env,
                        episode,
                        detail: format!(
                            "chunk {} is of version {}, expected {version}",
                            record.key.chunk, record.version
                        ),
                    });
                }
                rows.push(plan, record)
                    .map_err(|source| LearnerError::Trajectory { env, episode, source })?;
            }
            rewards.push(trajectory.chunks.iter().map(|c| c.rewards.iter().sum()).collect());
            values.push(rows.value.get(from..).unwrap_or_default().to_vec());
        }
        let algorithm = &plan.config.algorithm;
        let estimate = estimator(&algorithm.adv_type).ok_or_else(|| unknown_estimator(&algorithm.adv_type))?;
        let critic = plan.heads.value.is_some();
        // samples per chunk: its denoise steps, where each is a transition of its own
        let inner = rows.record.len() / (rows.records as usize).max(1);
        let first_values: Vec<Vec<f32>> = values
            .iter()
            .map(|v| v.iter().copied().step_by(inner.max(1)).collect())
            .collect();
        let episodes: Vec<Episode<'_>> = trajectories
            .iter()
            .zip(rewards.iter().zip(&first_values))
            .map(|(trajectory, (rewards, values))| Episode {
                rewards,
                values: if critic { values } else { &[] },
                final_value: trajectory.final_value.unwrap_or(0.0),
                group: trajectory.reset.group.map_or(0, u64::from),
            })
            .collect();
        let settings = EstimatorSettings {
            gamma: algorithm.gamma,
            gae_lambda: algorithm.gae_lambda,
        };
        let estimated: Vec<Advantages> = if inner > 1 && algorithm.adv_type == "gae" {
            let pairs = episodes.iter().zip(&values);
            pairs
                .map(|(e, values)| two_layer::gae(e.rewards, values, inner, e.final_value, settings))
                .collect()
        } else {
            let per_chunk = estimate(&episodes, settings)?;
            per_chunk.into_iter().map(|a| repeated(a, inner)).collect()
        };
        let mut advantage: Vec<f32> = estimated.iter().flat_map(|a| a.advantages.iter().copied()).collect();
        let returns: Vec<f32> = estimated.iter().flat_map(|a| a.returns.iter().copied()).collect();
        if algorithm.normalize_advantages {
            normalize(&mut advantage, None);
        }
        Ok(rows.into_batch(plan, &advantage, &returns))
    }

    /// Number of samples.
    pub fn len(&self) -> usize {
        self.record.numel()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// The advantage of a chunk for each of its samples.
fn repeated(chunks: Advantages, samples: usize) -> Advantages {
    let each = |v: Vec<f32>| v.into_iter().flat_map(|x| std::iter::repeat_n(x, samples)).collect();
    Advantages {
        advantages: each(chunks.advantages),
        returns: each(chunks.returns),
    }
}

fn unknown_estimator(name: &str) -> LearnerError {
    let known: Vec<&str> = crate::advantage::ESTIMATORS.iter().map(|(n, _)| *n).collect();
    LearnerError::Missing(format!(
        "`algorithm.adv_type` is `{name}`, expected one of {}",
        known.join(", ")
    ))
}

impl Rows {
    fn push(&mut self, plan: &RunPlan, record: &ChunkRecord) -> Result<(), RecordError> {
        let dims = &plan.dims;
        let model = &plan.config.actor.model;
        let (side, horizon, width) = (dims.vision.image_size, dims.action_horizon, dims.action_dim);
        let images = record.images.as_u8("images", Some(&[dims.cameras, side, side, 3]))?;
        let state = record.state.to_f32("state", Some(&[width]))?;
        let chain = record
            .chain
            .to_f32("chain", Some(&[model.num_steps + 1, horizon, width]))?;
        let (rows, cols) = (model.num_action_chunks, model.env_action_dim);
        let lengths = (record.image_mask.len(), record.prompt.len(), record.prompt_mask.len());
        if lengths != (dims.cameras, dims.prompt_len, dims.prompt_len) {
            return Err(RecordError::Field("masks and prompt", format!("lengths {lengths:?}")));
        }
        let elements = horizon * width;
        let at = |k: usize| chain.get(k * elements..(k + 1) * elements).unwrap_or_default();
        let schedule = Schedule::of(&plan.sampling(record.version));
        let steps: Vec<i64> = record.denoise_steps.iter().map(|s| i64::from(*s)).collect();
        if steps.len() != schedule.stochastic_steps() || steps.iter().any(|s| *s >= schedule.drawable as i64) {
            return Err(RecordError::Field("denoise_steps", format!("{steps:?}")));
        }
        let logprob = record
            .logprob
            .as_ref()
            .ok_or(RecordError::Field("logprob", "none".to_owned()))?;
        let logprob = logprob.to_f32("logprob", Some(&[steps.len(), rows, cols]))?;
        let values = match &plan.heads.value {
            None => vec![0.0],
            Some(head) => {
                let one = head.input == CriticInput::Vlm || head.steps == ValueSteps::Path;
                let expected = if one { 1 } else { steps.len() };
                if record.values.len() != expected {
                    return Err(RecordError::Field(
                        "values",
                        format!("{} of {expected}", record.values.len()),
                    ));
                }
                record.values.clone()
            }
        };
        match model.openpi.mdp {
            Mdp::TwoLayer => {
                for (s, step) in steps.iter().enumerate() {
                    self.record.push(self.records);
                    self.step.push(*step);
                    self.value.extend(values.get(s).or(values.first()));
                }
                self.logprob.extend(&logprob);
            }
            Mdp::Hybrid | Mdp::Joint => {
                self.record.push(self.records);
                self.value.push(values.iter().sum::<f32>() / values.len().max(1) as f32);
                let initial = logprob::executed(at(0), at(0), width, rows, cols, |_, x, _| {
                    logprob::gaussian(x, 0.0, 1.0)
                });
                let joined = joint(model.openpi.joint_logprob, &logprob, steps.len(), &initial);
                self.step.extend(steps);
                self.logprob.extend(joined);
            }
        }
        self.records += 1;
        self.images.extend_from_slice(images);
        self.image_mask.extend(&record.image_mask);
        self.prompt.extend(&record.prompt);
        self.prompt_mask.extend(&record.prompt_mask);
        self.state.extend(state);
        self.chain.extend_from_slice(&chain);
        let executed = at(model.num_steps);
        let sum: f32 = executed
            .chunks(width)
            .take(rows)
            .flat_map(|r| r.iter().take(cols))
            .map(|v| v.abs())
            .sum();
        self.magnitude += f64::from(sum) / (rows * cols) as f64;
        Ok(())
    }

    fn into_batch(self, plan: &RunPlan, advantage: &[f32], returns: &[f32]) -> RolloutBatch {
        let dims = &plan.dims;
        let model = &plan.config.actor.model;
        let (n, m) = (self.records, self.record.len() as i64);
        let (side, cameras) = (dims.vision.image_size as i64, dims.cameras as i64);
        let (horizon, width) = (dims.action_horizon as i64, dims.action_dim as i64);
        let (rows, cols) = (model.num_action_chunks as i64, model.env_action_dim as i64);
        let observations = ObservationBatch {
            images: Tensor::from_slice(&self.images).view([n, cameras, side, side, 3]),
            image_mask: Tensor::from_slice(&self.image_mask).view([n, cameras]),
            prompt: Tensor::from_slice(&self.prompt).view([n, dims.prompt_len as i64]),
            prompt_mask: Tensor::from_slice(&self.prompt_mask).view([n, dims.prompt_len as i64]),
            state: Tensor::from_slice(&self.state).view([n, width]),
        };
        let steps = if m == 0 { 1 } else { self.step.len() as i64 / m };
        RolloutBatch {
            observations,
            chain: Tensor::from_slice(&self.chain).view([n, model.num_steps as i64 + 1, horizon, width]),
            record: Tensor::from_slice(&self.record),
            step: Tensor::from_slice(&self.step).view([m, steps]),
            old_logprob: Tensor::from_slice(&self.logprob).view([m, rows, cols]),
            old_value: Tensor::from_slice(&self.value),
            advantage: Tensor::from_slice(advantage),
            returns: Tensor::from_slice(returns),
            action_magnitude: self.magnitude / (n.max(1)) as f64,
        }
    }
}

/// The log-probability per element of one decision from its `steps` stochastic steps, `logprob` `[steps, elements]`, and the initial
/// noise's `[elements]`. Without a rule there is one step.
fn joint(rule: Option<JointLogprob>, logprob: &[f32], steps: usize, initial: &[f32]) -> Vec<f32> {
    let elements = initial.len();
    (0..elements)
        .map(|e| {
            let sum: f32 = logprob.iter().skip(e).step_by(elements.max(1)).sum();
            match rule {
                Some(JointLogprob::Mean) => (sum + initial.get(e).copied().unwrap_or(0.0)) / (steps + 1) as f32,
                Some(JointLogprob::Sum) | None => sum,
            }
        })
        .collect()
}
