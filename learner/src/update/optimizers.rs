//! Optimizers of actor and critic. Each optimizer clips its own gradient, so that a cold critic does not slow the actor.

use policy::{
    config::OptimConfig,
    params::{Heads, Part},
};

use crate::{
    error::Result,
    model::Pi0,
    optim::{AdamW, AdamWSettings, Decay, ParamGroup, Schedule, StepReport},
    ranks::Ranks,
};

/// Both optimizers, and the learning rate of the actor.
#[derive(Debug)]
pub(super) struct Optimizers {
    pub(super) actor: AdamW,
    pub(super) critic: Option<AdamW>,
    lr: f64,
    /// Factor of the learning rate by updates, because an iteration's number of updates varies with the episodes' lengths.
    warmup: Schedule,
    /// Factor of the learning rate by iterations.
    decay: Schedule,
}

impl Optimizers {
    /// Creates optimizers for the trained weights of a policy, in a run of `iterations` iterations.
    ///
    /// # Errors
    /// A setting is out of range.
    pub(super) fn new(config: &OptimConfig, iterations: u32, heads: &Heads, policy: &Pi0) -> Result<Self> {
        let settings = AdamWSettings {
            beta1: config.betas[0],
            beta2: config.betas[1],
            eps: config.eps,
            clip_norm: Some(config.clip_grad),
        };
        let group = |name: &str, lr: f64, parts: &[Part]| ParamGroup {
            name: name.to_owned(),
            lr,
            weight_decay: config.weight_decay,
            params: parts
                .iter()
                .flat_map(|part| policy.store().part(*part))
                .map(|(name, tensor)| (name.to_owned(), tensor.shallow_clone()))
                .collect(),
        };
        let actor = group("actor", config.lr, &[Part::Expert, Part::NoiseHead]);
        let critic = group("value_head", config.value_lr, &[Part::ValueHead]);
        let decay = Decay::Cosine {
            total_steps: u64::from(iterations),
            min_factor: config.min_lr_ratio,
        };
        Ok(Self {
            actor: AdamW::new(settings, vec![actor])?,
            critic: match heads.value {
                Some(_) => Some(AdamW::new(settings, vec![critic])?),
                None => None,
            },
            lr: config.lr,
            warmup: Schedule::warmup(u64::from(config.lr_warmup_steps), Decay::Constant),
            decay: Schedule::warmup(0, decay),
        })
    }

    /// Clears all gradients.
    pub(super) fn zero_grad(&mut self) {
        self.actor.zero_grad();
        if let Some(critic) = &mut self.critic {
            critic.zero_grad();
        }
    }

    /// Sums the gradients over the ranks.
    pub(super) fn sum_gradients(&mut self, ranks: &dyn Ranks) -> Result<()> {
        self.actor.sum_gradients(ranks)?;
        if let Some(critic) = &mut self.critic {
            critic.sum_gradients(ranks)?;
        }
        Ok(())
    }

    /// Clips the critic's gradient and takes a step; `None` without a critic.
    pub(super) fn step_critic(&mut self) -> Result<Option<StepReport>> {
        Ok(self.critic.as_mut().map(|critic| critic.step(1.0)).transpose()?)
    }

    /// Clips the actor's gradient and takes a step. Returns the step's report and the learning rate.
    pub(super) fn step_actor(&mut self, iteration: u32) -> Result<(StepReport, f64)> {
        let factor = self.warmup.factor(self.actor.updates()) * self.decay.factor(u64::from(iteration));
        Ok((self.actor.step(factor)?, self.lr * factor))
    }
}
