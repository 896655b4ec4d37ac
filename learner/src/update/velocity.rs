//! The passes of an update whose loss is on the velocity: credit once per iteration, then one pass of the trained and the reference
//! policy per sample and epoch.

use policy::{
    config::{LossAgg, ReferenceConfig},
    flow::Schedule,
    noise::{Purpose, fill_normal, stream, uniform},
    plan::RunPlan,
};
use tch::{Kind, Tensor, no_grad};

use super::reference::Reference;
use crate::{
    batch::{RolloutBatch, prefix_store::PrefixStore},
    error::{LearnerError, Result},
    loss::episode_weighted_mean,
    model::{Pi0, path},
    velocity::{Episodes, Velocities, VelocityLoss},
};

/// A method without likelihood, with its reference.
#[derive(Debug)]
pub(crate) struct VelocityObjective {
    method: Box<dyn VelocityLoss>,
    pub(crate) reference: Reference,
    by_episode: bool,
}

/// What the chunks of an iteration were worth to a loss on the velocity.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CreditReport {
    /// Mean credit.
    pub mean: f64,
    /// Mean distance of the executed actions from the reference's, model units; 0 where the method does not read it.
    pub displacement: f64,
}

/// What an iteration's chunks are worth to the method.
#[derive(Debug)]
pub(crate) struct Credit {
    /// By sample, f32 `[M]`.
    by_sample: Tensor,
    /// Which elements were executed, bool `[M, H, A]`.
    executed: Tensor,
    report: CreditReport,
}

impl Credit {
    pub(crate) fn report(&self) -> CreditReport {
        self.report
    }
}

impl VelocityObjective {
    /// The method beside `policy`.
    ///
    /// # Errors
    /// The sizes do not fit together.
    pub(crate) fn new(
        plan: &RunPlan,
        method: Box<dyn VelocityLoss>,
        reference: ReferenceConfig,
        policy: &Pi0,
    ) -> Result<Self> {
        Ok(Self {
            method,
            reference: Reference::new(reference, policy)?,
            by_episode: plan.config.algorithm.loss_agg == LossAgg::EpisodeLength,
        })
    }

    /// Whether the records can teach anything.
    pub(crate) fn informed(&self, batch: &RolloutBatch) -> bool {
        batch.informative || !self.method.reads_advantages()
    }

    /// Gives credit to the samples of an iteration. The reference acts on the recorded initial noise, by ODE.
    pub(crate) fn credit(&self, plan: &RunPlan, batch: &RolloutBatch, prefixes: &PrefixStore<'_>) -> Result<Credit> {
        let model = &plan.config.actor.model;
        let width = model.env_action_dim;
        let (horizon, action_dim) = (plan.dims.action_horizon, plan.dims.action_dim);
        let mut executed = vec![false; batch.len() * horizon * action_dim];
        for (sample, count) in executed.chunks_mut(horizon * action_dim).zip(&batch.executed) {
            for row in sample.chunks_mut(action_dim).take(*count) {
                row.iter_mut().take(width).for_each(|element| *element = true);
            }
        }
        let executed = Tensor::from_slice(&executed)
            .view([batch.len() as i64, horizon as i64, action_dim as i64])
            .to_device(batch.chain.device());
        let displacement: Vec<f32> = if self.method.reads_displacement() {
            self.displacement(plan, batch, prefixes, &executed)?
        } else {
            Vec::new()
        };
        let advantages: Vec<f32> = Vec::try_from(batch.advantages.to_kind(Kind::Float).contiguous())
            .map_err(|e| LearnerError::Missing(format!("reading the advantages: {e}")))?;
        let credit = self.method.credit(&Episodes {
            episode: &batch.episode,
            success: &batch.success,
            advantages: &advantages,
            displacement: &displacement,
        });
        let mean = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>() / values.len().max(1) as f64;
        Ok(Credit {
            report: CreditReport {
                mean: mean(&credit),
                displacement: mean(&displacement),
            },
            by_sample: Tensor::from_slice(&credit).to_device(batch.chain.device()),
            executed,
        })
    }

    fn displacement(
        &self,
        plan: &RunPlan,
        batch: &RolloutBatch,
        prefixes: &PrefixStore<'_>,
        executed: &Tensor,
    ) -> Result<Vec<f32>> {
        let model = &plan.config.actor.model;
        let schedule = Schedule::new(model.openpi.noise_method, model.num_steps, 0.0, false);
        let (samples, rows) = (batch.len() as i64, prefixes.pass_rows());
        let mut distances = Vec::with_capacity(batch.len());
        let mut from = 0;
        while from < samples {
            let count = rows.min(samples - from);
            let record = batch.record.narrow(0, from, count);
            let chain = batch.chain.index_select(0, &record);
            let state = batch.observations.state.index_select(0, &record);
            let sample = self.reference.policy().sample(
                &prefixes.rows(&record)?.0,
                Some(&state),
                &chain.select(1, 0),
                &schedule,
                &[],
            )?;
            let left_out = executed.narrow(0, from, count).logical_not();
            let gap = chain.select(1, -1) - &sample.actions;
            distances.push(
                gap.masked_fill(&left_out, 0.0)
                    .square()
                    .sum_dim_intlist([1i64, 2].as_slice(), false, Kind::Float)
                    .sqrt(),
            );
            from += rows;
        }
        Vec::try_from(Tensor::cat(&distances, 0).contiguous())
            .map_err(|e| LearnerError::Missing(format!("reading the distances from the reference: {e}")))
    }

    /// Mean loss of the samples `rows`. Flow time and noise of a sample are keyed by (seed, iteration, epoch, sample).
    pub(crate) fn loss(
        &self,
        policy: &Pi0,
        batch: &RolloutBatch,
        prefixes: &PrefixStore<'_>,
        credit: &Credit,
        rows: &[usize],
        (seed, iteration, epoch): (u64, u64, u64),
    ) -> Result<Tensor> {
        let (horizon, width) = (policy.dims().action_horizon, policy.dims().action_dim);
        let elements = horizon * width;
        let (low, high) = self.method.times();
        let mut times = Vec::with_capacity(rows.len());
        let mut noise = vec![0.0f32; rows.len() * elements];
        for (row, eps) in rows.iter().zip(noise.chunks_mut(elements)) {
            let mut rng = stream(Purpose::Velocity, seed, iteration << 32 | epoch, *row as u64, 0);
            times.push(low + (high - low) * uniform(&mut rng));
            fill_normal(&mut rng, eps);
        }
        let device = policy.device();
        let noise = Tensor::from_slice(&noise)
            .view([rows.len() as i64, horizon as i64, width as i64])
            .to_device(device);
        let times = Tensor::from_slice(&times).to_device(device);
        let index: Vec<i64> = rows.iter().map(|row| *row as i64).collect();
        let index = Tensor::from_slice(&index).to_device(device);
        let record = batch.record.index_select(0, &index);
        let actions = batch.chain.select(1, -1).index_select(0, &record);
        let state = batch.observations.state.index_select(0, &record);
        let (cache, _) = prefixes.rows(&record)?;
        let (x_t, target) = path(&actions, &noise, &times);
        let velocity = policy.velocity(&cache, Some(&state), &x_t, &times)?.v_t;
        let reference = no_grad(|| self.reference.policy().velocity(&cache, Some(&state), &x_t, &times))?.v_t;
        let loss = self.method.loss(&Velocities {
            velocity: &velocity,
            reference: &reference,
            target: &target,
            executed: &credit.executed.index_select(0, &index),
            credit: &credit.by_sample.index_select(0, &index),
        });
        if !self.by_episode {
            return Ok(loss.mean(Kind::Float));
        }
        let lengths = batch.value_episodes.len.index_select(0, &index);
        Ok(episode_weighted_mean(
            &loss,
            &loss.ones_like(),
            &lengths,
            batch.value_episodes.steps,
        ))
    }
}
