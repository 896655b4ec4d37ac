//! The passes of an update whose loss is on the velocity: credit once per iteration, then one pass of the trained and the reference
//! policy per sample and epoch.

use policy::{
    flow::Schedule,
    noise::{Purpose, fill_normal, stream, uniform},
    plan::RunPlan,
};
use tch::{Kind, Tensor, no_grad};

use crate::{
    error::{LearnerError, Result},
    logprob::Executed,
    model::{Pi0, path},
    prefix_store::PrefixStore,
    reference::Reference,
    rollout::RolloutBatch,
    update::CreditReport,
    velocity::{Episodes, VELOCITY_LOSSES, Velocities, VelocityLoss, velocity_loss},
};

/// A method without likelihood, with its reference.
#[derive(Debug)]
pub(crate) struct VelocityObjective {
    method: Box<dyn VelocityLoss>,
    pub(crate) reference: Reference,
}

/// What an iteration's chunks are worth to the method.
#[derive(Debug)]
pub(crate) struct Credit {
    /// By sample, f32 `[M]`.
    by_sample: Tensor,
    /// 1 for executed elements, f32 `[M, H, A]`.
    executed: Tensor,
    report: CreditReport,
}

impl Credit {
    pub(crate) fn report(&self) -> CreditReport {
        self.report
    }
}

/// The method of a plan; `None` where the loss needs likelihoods.
///
/// # Errors
/// A section without its loss or the reverse, or parameters that the method refuses.
pub(crate) fn method(plan: &RunPlan) -> Result<Option<Box<dyn VelocityLoss>>> {
    let algorithm = &plan.config.algorithm;
    let name = &algorithm.loss_type;
    let missing = |text: String| Err(LearnerError::Missing(text));
    match (velocity_loss(name), &algorithm.velocity) {
        (None, None) => Ok(None),
        (Some(_), None) => missing(format!(
            "`algorithm.velocity` is missing, `loss_type = \"{name}\"` needs `reference` and `params`"
        )),
        (None, Some(_)) => missing(format!(
            "`algorithm.velocity` is given, but `algorithm.loss_type` is `{name}`: remove the section or set one of {}",
            VELOCITY_LOSSES.map(|(known, _)| known).join(", ")
        )),
        (Some(build), Some(velocity)) => build(&velocity.params)
            .map(Some)
            .map_err(|detail| LearnerError::Missing(format!("`algorithm.velocity.params` of `{name}`: {detail}"))),
    }
}

impl VelocityObjective {
    /// The method of a plan beside `policy`; `None` where the loss needs likelihoods.
    ///
    /// # Errors
    /// See [`method`].
    pub(crate) fn new(plan: &RunPlan, policy: &Pi0) -> Result<Option<Self>> {
        let Some((method, config)) = method(plan)?.zip(plan.config.algorithm.velocity.as_ref()) else {
            return Ok(None);
        };
        let reference = Reference::new(config.reference, policy)?;
        Ok(Some(Self { method, reference }))
    }

    /// Whether the records can teach anything.
    pub(crate) fn informed(&self, batch: &RolloutBatch) -> bool {
        batch.informative || !self.method.reads_advantage()
    }

    /// Gives credit to the samples of an iteration. The reference acts on the recorded initial noise, by ODE.
    pub(crate) fn credit(&self, plan: &RunPlan, batch: &RolloutBatch, prefixes: &PrefixStore<'_>) -> Result<Credit> {
        let model = &plan.config.actor.model;
        let (chunk, width) = (model.num_action_chunks, model.env_action_dim);
        let (horizon, action_dim) = (plan.dims.action_horizon, plan.dims.action_dim);
        let mut executed = vec![0.0f32; batch.len() * horizon * action_dim];
        for (sample, count) in executed.chunks_mut(horizon * action_dim).zip(&batch.executed) {
            for row in sample.chunks_mut(action_dim).take(*count) {
                row.iter_mut().take(width).for_each(|element| *element = 1.0);
            }
        }
        let executed = Tensor::from_slice(&executed)
            .view([batch.len() as i64, horizon as i64, action_dim as i64])
            .to_device(batch.chain.device());
        let displacement: Vec<f32> = if self.method.reads_displacement() {
            let executed = Executed {
                action_chunk: chunk,
                env_action_dim: width,
            };
            self.displacement(plan, batch, prefixes, executed)?
        } else {
            Vec::new()
        };
        let advantage: Vec<f32> = Vec::try_from(batch.advantage.to_kind(Kind::Float).contiguous())
            .map_err(|e| LearnerError::Missing(format!("reading the advantages: {e}")))?;
        let credit = self.method.credit(&Episodes {
            episode: &batch.episode,
            success: &batch.success,
            advantage: &advantage,
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
        executed: Executed,
    ) -> Result<Vec<f32>> {
        let model = &plan.config.actor.model;
        let schedule = Schedule::new(model.openpi.noise_method, model.num_steps, 0.0, false);
        let (chunk, width) = (executed.action_chunk as i64, executed.env_action_dim as i64);
        let (samples, rows) = (batch.len() as i64, prefixes.pass_rows());
        let mut distances = Vec::with_capacity(batch.len());
        let mut from = 0;
        while from < samples {
            let record = batch.record.narrow(0, from, rows.min(samples - from));
            let chain = batch.chain.index_select(0, &record);
            let state = batch.observations.state.index_select(0, &record);
            let sample = self.reference.policy().sample(
                &prefixes.rows(&record)?.0,
                Some(&state),
                &chain.select(1, 0),
                &schedule,
                &[],
            )?;
            let cut = |x: &Tensor| x.narrow(1, 0, chunk).narrow(2, 0, width);
            let gap = cut(&chain.select(1, -1)) - cut(&sample.actions);
            distances.push(
                gap.square()
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
        Ok(loss.mean(Kind::Float))
    }
}
