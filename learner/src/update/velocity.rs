//! Passes of an update whose loss is on the velocity: credit once per iteration, then one pass of the trained and the reference
//! policy per sample and epoch.

use policy::{
    config::{LossAgg, ReferenceConfig},
    flow::Schedule,
    noise::{Purpose, fill_normal, stream, uniform},
    plan::RunPlan,
};
use tch::{Kind, Tensor, no_grad};

use super::{reference::Reference, report::CreditReport, samples::Samples, tally::Pass};
use crate::{
    batch::{RolloutBatch, minibatch::MicroBatch, prefix_store::PrefixStore},
    error::{Result, from_device},
    loss::{ActorMetrics, episode_weighted_mean},
    model::{Pi0, path},
    ranks::Ranks,
    velocity::{Episodes, Velocities, VelocityLoss},
};

/// Loss on the velocity, with its reference.
#[derive(Debug)]
pub(super) struct VelocityObjective {
    method: Box<dyn VelocityLoss>,
    pub(super) reference: Reference,
    by_episode: bool,
}

/// Credit of an iteration's samples.
struct Credit {
    /// Credit by sample, f32 `[M]`.
    by_sample: Tensor,
    /// Executed elements, bool `[M, H, A]`.
    executed: Tensor,
    report: CreditReport,
}

impl VelocityObjective {
    /// Creates the reference of `policy` for the method.
    ///
    /// # Errors
    /// The sizes do not fit together.
    pub(super) fn new(
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

    /// Returns whether the records can change the policy.
    pub(super) fn teaches(&self, batch: &RolloutBatch) -> bool {
        batch.whole.informative || !self.method.reads_advantages()
    }

    /// Prepares the passes over a batch and computes the credit of its samples. The reference acts by ODE on the recorded initial noise.
    pub(super) fn passes<'a>(
        &'a self,
        plan: &RunPlan,
        policy: &'a Pi0,
        batch: &'a RolloutBatch,
        prefixes: &'a PrefixStore<'a>,
        iteration: u32,
        ranks: &dyn Ranks,
    ) -> Result<VelocityPasses<'a>> {
        Ok(VelocityPasses {
            objective: self,
            policy,
            batch,
            prefixes,
            credit: self.credit(plan, batch, prefixes, ranks)?,
            seed: plan.config.runner.seed,
            iteration: u64::from(iteration),
        })
    }

    fn credit(
        &self,
        plan: &RunPlan,
        batch: &RolloutBatch,
        prefixes: &PrefixStore<'_>,
        ranks: &dyn Ranks,
    ) -> Result<Credit> {
        let executed = executed_elements(plan, batch);
        let displacement: Vec<f32> = if self.method.reads_displacement() {
            self.displacement(plan, batch, prefixes, &executed)?
        } else {
            Vec::new()
        };
        let advantages = Vec::try_from(batch.advantages.to_kind(Kind::Float).contiguous());
        let advantages: Vec<f32> = advantages.map_err(from_device("the advantages"))?;
        let credit = self.method.credit(&Episodes {
            episode: &batch.episode,
            success: &batch.success,
            advantages: &advantages,
            displacement: &displacement,
        });
        let sum = |values: &[f32]| values.iter().map(|v| f64::from(*v)).sum::<f64>();
        let [credit_sum, credits, displacement_sum, displacements] = ranks.sum_numbers([
            sum(&credit),
            credit.len() as f64,
            sum(&displacement),
            displacement.len() as f64,
        ])?;
        Ok(Credit {
            report: CreditReport {
                mean: credit_sum / credits.max(1.0),
                displacement: displacement_sum / displacements.max(1.0),
            },
            by_sample: Tensor::from_slice(&credit).to_device(batch.chain.device()),
            executed,
        })
    }

    /// Returns the distance of each sample's executed actions from the reference's actions, in model units.
    fn displacement(
        &self,
        plan: &RunPlan,
        batch: &RolloutBatch,
        prefixes: &PrefixStore<'_>,
        executed: &Tensor,
    ) -> Result<Vec<f32>> {
        let model = &plan.config.actor.model;
        let schedule = Schedule::new(model.openpi.noise_method, model.num_steps, 0.0, false);
        let rows: Vec<usize> = (0..batch.len()).collect();
        let mut distances: Vec<f32> = Vec::with_capacity(batch.len());
        for part in rows.chunks(prefixes.pass_rows()) {
            let samples = Samples::read(batch, prefixes, part, batch.chain.device())?;
            let chain = samples.of_records(&batch.chain);
            let state = samples.of_records(&batch.observations.state);
            let initial = chain.select(1, 0);
            let reference = self.reference.policy();
            let sample = reference.sample(&samples.cache, Some(&state), &initial, &schedule, &[])?;
            let left_out = samples.of_samples(executed).logical_not();
            let gap = chain.select(1, -1) - &sample.actions;
            let distance = gap
                .masked_fill(&left_out, 0.0)
                .square()
                .sum_dim_intlist([1i64, 2].as_slice(), false, Kind::Float)
                .sqrt();
            let distance = Vec::try_from(distance.contiguous());
            distances.extend::<Vec<f32>>(distance.map_err(from_device("the distances from the reference"))?);
        }
        Ok(distances)
    }
}

/// Returns the elements of each sample that the environment executed, bool `[M, H, A]`.
fn executed_elements(plan: &RunPlan, batch: &RolloutBatch) -> Tensor {
    let width = plan.config.actor.model.env_action_dim;
    let (horizon, action_dim) = (plan.dims.action_horizon, plan.dims.action_dim);
    let mut executed = vec![false; batch.len() * horizon * action_dim];
    for (sample, count) in executed.chunks_mut(horizon * action_dim).zip(&batch.executed) {
        for row in sample.chunks_mut(action_dim).take(*count) {
            row[..width].fill(true);
        }
    }
    Tensor::from_slice(&executed)
        .view([batch.len() as i64, horizon as i64, action_dim as i64])
        .to_device(batch.chain.device())
}

/// Passes of one iteration.
pub(super) struct VelocityPasses<'a> {
    objective: &'a VelocityObjective,
    policy: &'a Pi0,
    batch: &'a RolloutBatch,
    prefixes: &'a PrefixStore<'a>,
    credit: Credit,
    seed: u64,
    iteration: u64,
}

impl VelocityPasses<'_> {
    pub(super) fn credit(&self) -> CreditReport {
        self.credit.report
    }

    /// Computes the mean loss of a part of a minibatch.
    pub(super) fn pass(&self, part: MicroBatch<'_>, epoch: u32) -> Result<Pass> {
        let loss = self.loss(part.rows, u64::from(epoch))?;
        let policy_loss = loss.double_value(&[]);
        Ok(Pass {
            loss,
            actor: Some(ActorMetrics {
                policy_loss,
                ..ActorMetrics::default()
            }),
            critic: None,
            entropy: None,
            gaps: None,
        })
    }

    /// Computes the mean loss of the samples `rows`. Flow time and noise of a sample are keyed by (seed, iteration, epoch, index of the
    /// sample over all ranks).
    fn loss(&self, rows: &[usize], epoch: u64) -> Result<Tensor> {
        let Self {
            objective,
            policy,
            batch,
            ..
        } = *self;
        let (horizon, width) = (policy.dims().action_horizon, policy.dims().action_dim);
        let elements = horizon * width;
        let (low, high) = objective.method.times();
        let mut times = Vec::with_capacity(rows.len());
        let mut noise = vec![0.0f32; rows.len() * elements];
        for (row, eps) in rows.iter().zip(noise.chunks_mut(elements)) {
            let sample = (batch.whole.samples_before + row) as u64;
            let mut rng = stream(Purpose::Velocity, self.seed, self.iteration << 32 | epoch, sample, 0);
            times.push(low + (high - low) * uniform(&mut rng));
            fill_normal(&mut rng, eps);
        }
        let device = policy.device();
        let noise = Tensor::from_slice(&noise)
            .view([rows.len() as i64, horizon as i64, width as i64])
            .to_device(device);
        let times = Tensor::from_slice(&times).to_device(device);
        let samples = Samples::read(batch, self.prefixes, rows, device)?;
        let actions = samples.of_records(&batch.chain.select(1, -1));
        let state = samples.of_records(&batch.observations.state);
        let cache = &samples.cache;
        let (x_t, target) = path(&actions, &noise, &times);
        let velocity = policy.velocity(cache, Some(&state), &x_t, &times)?.v_t;
        let of_reference = || objective.reference.policy().velocity(cache, Some(&state), &x_t, &times);
        let reference = no_grad(of_reference)?.v_t;
        let loss = objective.method.loss(&Velocities {
            velocity: &velocity,
            reference: &reference,
            target: &target,
            executed: &samples.of_samples(&self.credit.executed),
            credit: &samples.of_samples(&self.credit.by_sample),
        });
        if !objective.by_episode {
            return Ok(loss.mean(Kind::Float));
        }
        let lengths = samples.of_samples(&batch.value_episodes.len);
        Ok(episode_weighted_mean(
            &loss,
            &loss.ones_like(),
            &lengths,
            batch.value_episodes.steps,
        ))
    }
}
